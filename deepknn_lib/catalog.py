"""The data sets: where each comes from, under which licence, what it should hold, and which reader reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepknn_lib import arrays, sources
from deepknn_lib.download import Remote
from deepknn_lib.images import Listing

ISIC = "https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_Training"
FOLDS = "https://raw.githubusercontent.com/JiaxinZhuang/Skin-Lesion-Recognition.Pytorch/HEAD/data/ISIC2018/split_data/"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"


@dataclass(frozen=True)
class Entry:
    """A data set.

    Attributes
    ----------
    title, licence, citation, page : str
        `page` is where a person finds it.
    read : callable
        From the folder of the set, what follows the colon of its name and the image size to a `Listing`.
    wanted : tuple of str
        The set is there if one of these is in its folder, `data_dir()/<name>`; empty for what needs no files.
    steps : str
        What to do by hand to get it.
    remotes : tuple of Remote
        Its files, with checksums; unpacked after download where they are archives.
    size : str
        How much is downloaded.
    counts : dict, optional
        Images of each class in the whole set.
    pins : dict
        sha256 over the sorted lines `<id>,<value>` of "labels", "groups" and the split files: whatever the layout, these
        are the labels, lesions and folds that our results rest on.
    folds : callable, optional
        The published folds for `split="paper"`.
    argument : str
        What follows the colon of its name, as told to users.
    synthetic : bool
        Drawn by a program.
    """

    title: str
    read: Callable[[Path, str, int], Listing]
    licence: str
    citation: str
    page: str = ""
    wanted: tuple[str, ...] = ()
    steps: str = ""
    remotes: tuple[Remote, ...] = ()
    size: str = ""
    counts: dict[str, int] | None = None
    pins: dict[str, str] | None = None
    folds: Callable[[Path, Listing, int], np.ndarray | None] | None = None
    argument: str = ""
    synthetic: bool = False


def remotes_of(name: str) -> tuple[Remote, ...]:
    """The files to download for a set; those of MedMNIST+ are listed by its package."""
    kind, _, argument = name.partition(":")
    if kind != "medmnist":
        return DATASETS[kind].remotes
    info, size, file = arrays.medmnist_info(argument)
    suffix = "" if size == 28 else f"_{size}"
    return (Remote(info[f"url{suffix}"], file, f"md5:{info[f'MD5{suffix}']}"),)


DATASETS = {
    "lesions": Entry(
        title="lesions (synthetic stand-in for Skin-7)",
        read=arrays.lesions,
        licence="MIT, made by deepknn_lib.synthetic",
        citation="this repository",
        synthetic=True,
        counts={"akiec": 98, "bcc": 154, "bkl": 329, "df": 34, "mel": 333, "nv": 2009, "vasc": 43},
    ),
    "skin7": Entry(
        title="Skin-7 (HAM10000, ISIC 2018 Task 3)",
        read=sources.skin7,
        licence="CC BY-NC 4.0",
        citation="Tschandl, Rosendahl & Kittler, The HAM10000 dataset, Scientific Data 5 (2018)",
        page="https://challenge.isic-archive.com/data/#2018",
        wanted=sources.SKIN7_LAYOUTS,
        steps="get the three Task 3 training files (Input, GroundTruth, LesionGroupings) from the page, unpack them there",
        remotes=(
            Remote(f"{ISIC}_LesionGroupings.csv", "ISIC2018_Task3_Training_LesionGroupings.csv",
                   "md5:9517b6aa6902d6c27e234bac8279a64a", 492_996),
            Remote(f"{ISIC}_GroundTruth.zip", "ISIC2018_Task3_Training_GroundTruth.zip",
                   "md5:8302427e4ce0c107559531b9f444abe9"),
            *(Remote(f"{FOLDS}split_data_{n}_fold_test.csv", f"split_data_{n}_fold_test.csv") for n in range(1, 6)),
            Remote(f"{ISIC}_Input.zip", "ISIC2018_Task3_Training_Input.zip",
                   "md5:0c281f121070a8d63457caffcdec439a", 2_771_732_744),
        ),
        size="2.8 GB",
        counts={"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142},
        pins={
            "labels": "847e32970173e050e1f2a34411dbc76920b8e1b481bba184bc526858ba7c9e42",
            "groups": "79b3c34f947feaf8c27faf8c96c9355f21331d2f1dbdb5a2b9162af7a5d02c2b",
            "paper": "68f6f489e7947e951b66e61ac1525a30e42f90d573d5d5358f2e7c84029053f8",
            "grouped": "470bad5f23a02b4cbe69428fbbb2d7cfcd7462ba0a7276fc85c66e1d2b0a37fa",
        },
        folds=sources.skin7_folds,
    ),
    "pneumonia": Entry(
        title="Pneumonia (RSNA Pneumonia Detection Challenge, stage 2)",
        read=sources.pneumonia,
        licence="Kaggle competition rules (RSNA: non-commercial, academic research and education)",
        citation="Shih et al., Augmenting the NIH chest radiograph dataset with expert annotations of possible pneumonia, "
        "Radiology: Artificial Intelligence 1 (2019)",
        page="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
        wanted=("stage_2_detailed_class_info.csv",),
        steps="join the competition on the page (free account, accept its rules), download all, and unpack it there",
        size="about 4 GB, with your Kaggle account",
        counts={"Normal": 8851, "No Lung Opacity / Not Normal": 11821, "Lung Opacity": 6012},
    ),
    "sd198": Entry(
        title="SD-198",
        read=sources.sd198,
        licence="research use, by request from its authors",
        citation="Sun, Yang, Sun & Wang, A benchmark for automatic visual classification of clinical skin disease images, "
        "ECCV 2016",
        page="http://xiaopingwu.cn/assets/projects/sd-198/",
        wanted=("",),  # any class folders there
        steps="ask its authors for it (page or paper; say who you are and that it is for research) and unpack it there, so "
        "that images/ holds the class folders",
        folds=sources.sd198_folds,
    ),
    "chestxray3": Entry(
        title="chest X-rays (Kermany 2018; a stand-in for Pneumonia)",
        read=sources.chestxray3,
        licence="CC BY 4.0",
        citation="Kermany et al., Identifying medical diagnoses and treatable diseases by image-based deep learning, "
        "Cell 172 (2018)",
        page="https://doi.org/10.17632/rscbjbr9sj",
        wanted=("groups.csv",),
        steps="get the chest X-rays from the page, put the class folders bacteria, normal and virus there, and groups.csv "
        "with the columns file,patient_id",
        counts={"bacteria": 2780, "normal": 1583, "virus": 1493},
    ),
    "medmnist": Entry(
        title="MedMNIST+",
        read=arrays.medmnist,
        licence="CC BY 4.0 (dermamnist: CC BY-NC 4.0)",
        citation="Yang et al., MedMNIST v2, a large-scale lightweight benchmark for 2D and 3D biomedical image "
        "classification, Scientific Data 10 (2023), and the paper of the images themselves (see the page)",
        page="https://medmnist.com",
        steps="get the .npz of the set and size from the page and put it there",
        size="under 1 MB to over 10 GB",
        argument="<flag>@<size>",
    ),
    "stl10": Entry(
        title="STL10",
        read=arrays.stl10,
        licence="none stated; the images come from ImageNet",
        citation="Coates, Lee & Ng, An analysis of single-layer networks in unsupervised feature learning, AISTATS 2011",
        page="https://cs.stanford.edu/~acoates/stl10/",
        wanted=("stl10_binary/train_X.bin", "stl10_binary.tar.gz"),
        steps="put stl10_binary.tar.gz there",
        remotes=(
            Remote("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "stl10_binary.tar.gz",
                   "md5:91f7769df0f17e558f3565bffb0c7dfb", 2_640_397_119),
        ),
        size="2.6 GB",
    ),
    "mnist": Entry(
        title="MNIST",
        read=arrays.mnist,
        licence="CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, "
        "Proceedings of the IEEE 86 (1998)",
        page="https://ossci-datasets.s3.amazonaws.com/mnist/",
        wanted=("MNIST/raw/t10k-labels-idx1-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte.gz"),
        steps="put the four .gz files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        "t10k-labels-idx1-ubyte.gz) into its folder MNIST/raw",
        remotes=tuple(
            Remote(f"{MNIST}{file}.gz", f"MNIST/raw/{file}.gz", f"md5:{digest}")
            for file, digest in (
                ("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
            )
        ),
        size="12 MB",
    ),
    "digits": Entry(
        title="digits (UCI, real 8 × 8 scans; an offline stand-in for MNIST)",
        read=arrays.digits,
        licence="CC BY 4.0",
        citation="Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998)",
        page="https://archive.ics.uci.edu/dataset/80",
    ),
    "folder": Entry(
        title="your own images",
        read=sources.folder,
        licence="the user's own",
        citation="the user's own",
        argument="<path to class folders>",
    ),
}  # fmt: skip
