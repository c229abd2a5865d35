"""What a finished run says of new images: `python -m deepknn_lib predict --run DIR --images PATH`.

A new image is prepared as the run's own images were, and its K_p nearest training images vote; where the run has a
softmax and K_p is 0, that decides. An image is *far* when its last neighbour is further away than that of 99 % of the
run's test images, which the training did not see either: then the run knows nothing like it, whatever the votes say.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from deepknn_lib.datasets.decode import each, resize
from deepknn_lib.datasets.readers import Index, images_in
from deepknn_lib.models import Network, extract_features, preprocessing
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.storage import check_writable, data_dir, whole_file, write_csv
from deepknn_lib.study.cache import Result, read_run
from deepknn_lib.study.experiments import images_of, network_of, parts
from deepknn_lib.study.runs import METHODS, SOFTMAX

PICTURED, PICTURES = 30, (".png", ".pdf", ".svg", ".jpg")  # images in one; its kinds


class Predictions(NamedTuple):
    """`table` has a row an image: its path, `class`, `share` of the votes (or softmax), `far`, and its neighbours."""

    result: Result
    table: pd.DataFrame  # the n-th neighbour is `neighbour_n` (its id in the set), `class_n`, `distance_n`
    features: np.ndarray  # float32 (N, D), of the same rows
    bad: list[str]  # a sentence for each file that cannot be read
    told: str  # how many images are far, and from what distance on


def open_run(folder: Path) -> tuple[Result, Network]:
    """A run from its folder, and its network on the CPU; ValueError if there is none that takes images."""
    try:
        result = read_run(folder)
    except Exception as error:  # JSON and NumPy raise many kinds
        told = f"{folder} is no run, or not whole ({type(error).__name__}: {error!s:.200}); give a folder"
        raise ValueError(f"{told} that `run --out` wrote, or one of {data_dir() / 'runs'}") from error
    run = result.run
    if METHODS[run.method].on_features:
        told = f"{run.method} learns on the feature vectors of another run, so that it takes no images"
        raise ValueError(f"{told}; predict with a run of {run.base.method} or of deep-knn")
    state = load_file(folder / "model.safetensors")
    return result, network_of(run, len(result.record["class_names"]), state)


def predict(folder: Path, images: Path) -> Predictions:
    """The classes of new images by the run in `folder`, which needs neither its own images nor a network connection.

    `folder` is as `run --out` writes it, or as it lies in `data_dir()/runs`; `images` is a file or a folder with its
    sub-folders. Where the softmax decides, five neighbours are shown. ValueError if the folder is no run that takes
    images, or no image can be read; FileNotFoundError if there is none.
    """
    result, network = open_run(folder)
    there, notes = ({"": images}, []) if images.is_file() else images_in(images)
    if not there:
        raise FileNotFoundError(f"there is no image at {images}; give an image, or a folder of images")
    made = _each(result, [*there.values()], lambda image: extract_features(network, torch.from_numpy(image)))
    bad = [why for why in made.values() if isinstance(why, str)]
    good = {path: one for path, one in made.items() if not isinstance(one, str)}
    if not good:
        raise ValueError(f"no image at {images} can be read: {'; '.join(bad[:3])}")
    features = torch.cat([*good.values()])
    columns, told = _judge(result, network, features)
    table = pd.DataFrame({"image": map(str, good)} | columns)
    return Predictions(result, table, features.numpy(), bad, " ".join([told, *(f"{n}." for n in notes)]))


def _each(result: Result, files: list[Path], work: Callable) -> dict[Path, object]:
    """What `work` makes of each file's pixels, uint8 (1, 3, S, S) as the run's set has them; or why it is bad."""
    # White is that of the run's own 16-bit greys, else 255, so that no image depends on those beside it.
    run, rows, white = result.run, np.arange(len(files)), result.record.get("white") or 255
    size, how = run.image_size, preprocessing(run.backbone, run.weights)["interpolation"]
    index = Index(rows, rows, rows, (), files)
    made = each(index, size, lambda image: work(resize(image[None], size, how)), "reading", white)
    return dict(zip(files, made, strict=True))


def _judge(result: Result, network: Network, features: torch.Tensor) -> tuple[dict, str]:
    """Columns of the table for new features (N, D), and the sentence on those that are far."""
    names, ids = np.array(result.record["class_names"]), result.arrays["train_ids"]
    gallery, tested = (torch.from_numpy(result.arrays[f"{part}_features"]) for part in ("train", "test"))
    k = result.run.k_predict or min(5, len(gallery))
    distances, rows = nearest_neighbors(features, gallery, k)
    labels = torch.from_numpy(result.arrays["train_labels"])[rows]
    if result.run.k_predict == SOFTMAX:
        shares, called = network.classifier(features).detach().softmax(1).max(1)
    else:
        called = majority_vote(labels, distances, len(names))
        shares = (labels == called[:, None]).float().mean(1)
    limit = np.percentile(nearest_neighbors(tested, gallery, k)[0][:, -1].numpy(), 99)
    far = distances[:, -1].numpy() > limit
    found = {"class": names[called], "share": shares, "far": far}
    for n in range(k):
        found[f"neighbour_{n + 1}"] = ids[rows[:, n]]
        found |= {f"class_{n + 1}": names[labels[:, n]], f"distance_{n + 1}": distances[:, n]}
    told = f"{far.sum()} of {len(far)} images are far from all that the run knows: their neighbour {k} is further"
    return found, f"{told} than {limit:.3g}, as it is for 1 % of the run's test images."


def picture(found: Predictions):
    """A matplotlib figure of each new image beside its neighbours, those of its class in green; `PICTURED` rows.

    ValueError or FileNotFoundError if the images that the run was trained on are not there.
    """
    from matplotlib.figure import Figure

    run, rows = found.result.run, found.table.head(PICTURED)
    train, known = parts(run).train, found.result.record.get("images")  # Earlier versions have none.
    at, ids = {name: row for row, name in enumerate(train.ids)}, rows.filter(regex="^neighbour_")
    gone = {*ids.to_numpy().ravel()} - {*at}
    if gone or known not in (None, images_of(run)):
        told = f"no image {min(gone)} any more" if gone else "other images or labels than the run had"
        raise ValueError(f"{run.dataset} has {told}; a picture needs the run's images")
    k, images = ids.shape[1], [*map(Path, rows["image"])]
    shown = _each(found.result, images, lambda image: image[0])
    figure = Figure((1.7 * (k + 1), 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), k + 1, squeeze=False)
    for line, (path, pixels), row in zip(axes, shown.items(), rows.to_dict("records"), strict=True):
        share = f"{row['share']:.0%}" + ", far" * row["far"]
        _tile(line[0], pixels, [path.name, row["class"], share], "black")
        for n, axis in enumerate(line[1:], start=1):
            told = ["", row[f"class_{n}"], f"at {row[f'distance_{n}']:.3g}"]
            color = "tab:green" if row[f"class_{n}"] == row["class"] else "tab:red"
            _tile(axis, train.images[at[row[f"neighbour_{n}"]]], told, color)
    return figure


def _tile(axis, pixels: np.ndarray, lines: list[str], color: str) -> None:
    """Draw an image (C, S, S) under its lines of text, which are shortened."""
    short = [text if len(text) <= 20 else f"{text[:8]}…{text[-10:]}" for text in lines]
    axis.imshow(np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3)))
    axis.set_title("\n".join(short), fontsize=8, color=color, parse_math=False)
    axis.set_axis_off()


def report(folder: Path, images: Path, out: Path | None, figure: Path | None) -> int:
    """Print the table of `predict`, or write it to `out`, and the picture to `figure`; 1 if a file cannot be read."""
    for path in filter(None, (out, figure)):
        check_writable(path)
    if figure and figure.suffix.lower() not in PICTURES:
        raise ValueError(f"{figure}: a picture ends with one of {', '.join(PICTURES)}")
    found = predict(folder, images)
    if out:
        write_csv(found.table, out)
    else:
        print(found.table.to_string(index=False, float_format="{:.3g}".format))
    if figure:
        with whole_file(figure) as temporary:
            picture(found).savefig(temporary, dpi=150, bbox_inches="tight")
    for text in [*(f"warning: {text}" for text in found.bad), found.told]:
        print(text, file=sys.stderr)
    return int(bool(found.bad))
