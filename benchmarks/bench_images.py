"""Images into training steps: our decoded copy and batched crops, next to torchvision's folder and loader."""

import os
import tempfile

import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from deepknn_lib.augment import normalize, random_crop_flip
from deepknn_lib.datasets import load_dataset
from deepknn_lib.models import rows_of

pytest.importorskip("pytest_benchmark")
SIZE, CROP, BATCH, COUNT = 48, 42, 96, 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A thousand JPEGs of 600 × 450 pixels, enlarged from the synthetic lesions."""
    root, lesions = tmp_path_factory.mktemp("jpegs"), load_dataset("lesions", image_size=SIZE).train
    for number, label in enumerate(lesions.labels[:COUNT]):
        image = Image.fromarray(lesions.images[number].transpose(1, 2, 0))
        path = root / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.resize((600, 450), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def batches_of_ours(data):
    statistics, generator = (torch.tensor(MEAN), torch.tensor(STD)), torch.Generator().manual_seed(0)
    for index in torch.randperm(len(data.train)).split(BATCH):
        rows = rows_of(data.train.images, index, torch.device("cpu"))
        yield normalize(random_crop_flip(rows, CROP, generator), *statistics)


def ours(folder):
    """From the copy decoded before; four fifths of the images, as the rest is the test part."""
    data = load_dataset(f"folder:{folder}", image_size=SIZE)
    return lambda: list(batches_of_ours(data))


def ours_with_decoding(folder):
    """The first epoch: each time with a data folder that holds no decoded copy."""

    def epoch():
        os.environ["DEEPKNN_DATA"] = tempfile.mkdtemp(dir=os.environ["DEEPKNN_DATA"])
        return list(batches_of_ours(load_dataset(f"folder:{folder}", image_size=SIZE)))

    return epoch


def torchvision(folder):
    steps = [v2.ToImage(), v2.Resize(SIZE), v2.RandomCrop(CROP), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    images = datasets.ImageFolder(folder, v2.Compose(steps))
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, num_workers=os.cpu_count())
    return lambda: [batch for batch, _ in loader]


@pytest.mark.parametrize("contender", [ours, ours_with_decoding, torchvision])
def bench_images(benchmark, contender, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    benchmark.group = "an epoch of 1,000 JPEGs of 600 × 450 pixels"
    epoch = contender(folder)
    batches = benchmark.pedantic(epoch, rounds=5, warmup_rounds=1)
    benchmark.extra_info["images a second"] = sum(map(len, batches)) / benchmark.stats["median"]
    assert batches[0].shape == (BATCH, 3, CROP, CROP)
