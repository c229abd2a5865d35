"""What a finished run says of new images: `python -m deepknn_lib predict --run DIR --images PATH`.

A new image is prepared as the run's own images were, and its K_p nearest training images vote; where the run has a
softmax and K_p is 0, that decides. An image is *far* when its last neighbour is further away than that of 99 % of the
run's test images, which the training did not see either: then the run knows nothing like it, whatever the votes say.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from deepknn_lib.datasets.decode import BLOCK, each, resize
from deepknn_lib.datasets.readers import Index, images_in
from deepknn_lib.models import Network, extract_features, preprocessing
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.storage import data_dir, whole_file, write_csv
from deepknn_lib.study.experiments import Result, _stored, network_of, parts
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run

PICTURED = 30  # images in one picture


class Predictions(NamedTuple):
    """`table` has a row an image: its path, `class`, `share` of the votes (or softmax), `far`, and its neighbours."""

    run: Run
    table: pd.DataFrame  # the n-th neighbour is `neighbour_n` (its id in the set), `class_n`, `distance_n`
    features: np.ndarray  # float32 (N, D), of the same rows
    pixels: list[np.ndarray]  # uint8 (C, S, S), of the first `PICTURED`
    bad: list[str]  # a sentence for each file that cannot be read
    told: str  # how many images are far, and from what distance on


def open_run(folder: Path) -> tuple[Result, Network]:
    """A run from its folder, and its network on the CPU; ValueError if there is none that takes images."""
    from safetensors.torch import load_file

    if not (folder / "run.json").is_file():
        where = f"give a folder that `run --out` wrote, or one of {data_dir() / 'runs'}"
        raise ValueError(f"{folder} is no run, for it holds no run.json; {where}")
    try:
        arrays, *_, record = _stored(folder)
        base = record["run"]["base"]
        run = Run(**record["run"] | {"base": base and Run(**base)})
        state = load_file(folder / "model.safetensors")
    except Exception as error:  # JSON, NumPy and safetensors raise many kinds
        raise ValueError(f"{folder} is not whole ({error!r:.200}); copy or execute the run again") from error
    if METHODS[run.method].on_features:
        told = f"{run.method} learns on the feature vectors of another run, so that it takes no images"
        raise ValueError(f"{told}; predict with a run of {run.base.method} or of deep-knn")
    network = network_of(run, len(record["class_names"]), "none")
    network.load_state_dict(state)
    # The pixels' mean and std are not in the file; a run that starts from another has those of no weights.
    pixels = preprocessing(run.backbone, "none" if run.base else run.weights)
    network.mean, network.std = torch.tensor(pixels["mean"]), torch.tensor(pixels["std"])
    return Result(run, arrays, [], record), network


def predict(folder: Path, images: Path, k_predict: int | None = None) -> Predictions:
    """The classes of new images by the run in `folder`, which needs neither its own images nor a network connection.

    `folder` is as `run --out` writes it, or as it lies in `data_dir()/runs`; `images` is a file or a folder with its
    sub-folders; `k_predict` stands in place of the run's K_p. Where the softmax decides, five neighbours are shown.
    ValueError if the folder is no run that takes images, K_p cannot be meant, or no image can be read;
    FileNotFoundError if there is none.
    """
    result, network = open_run(folder)
    run, arrays, names = result.run, result.arrays, np.array(result.record["class_names"])
    k = run.k_predict if k_predict is None else k_predict
    if k == SOFTMAX and not network.classifier:
        raise ValueError(f"{run.method} has no softmax; give a K_p of at least 1")
    there, notes = ({"": images}, []) if images.is_file() else images_in(images)
    files = [*there.values()]
    if not files:
        raise FileNotFoundError(f"there is no image at {images}; give an image, or a folder of images")
    features, pixels, good, bad = [], [], [], []
    for start in range(0, len(files), BLOCK):
        made = _pixels(run, files[start : start + BLOCK])
        bad += [one for one in made.values() if isinstance(one, str)]
        read = {str(path): one for path, one in made.items() if not isinstance(one, str)}
        good += read
        features += [extract_features(network, torch.from_numpy(np.stack([*read.values()])))] if read else []
        pixels += [*read.values()][: PICTURED - len(pixels)]
    if not good:
        raise ValueError(f"no image at {images} can be read: {'; '.join(bad[:3])}")
    features, gallery = torch.cat(features), torch.from_numpy(arrays["train_features"])
    shown = k or min(5, len(gallery))
    distances, rows = nearest_neighbors(features, gallery, shown)
    labels = torch.from_numpy(arrays["train_labels"])[rows]
    if k == SOFTMAX:
        shares, called = network.classifier(features).detach().softmax(1).max(1)
    else:
        called = majority_vote(labels, distances, len(names))
        shares = (labels == called[:, None]).float().mean(1)
    usual = nearest_neighbors(torch.from_numpy(arrays["test_features"]), gallery, shown)[0][:, -1]
    far = distances[:, -1].numpy() > (limit := np.percentile(usual.numpy(), 99))
    found = {"image": good, "class": names[called], "share": shares, "far": far}
    for n in range(shown):
        found[f"neighbour_{n + 1}"] = arrays["train_ids"][rows[:, n]]
        found |= {f"class_{n + 1}": names[labels[:, n]], f"distance_{n + 1}": distances[:, n]}
    told = f"{far.sum()} of {len(far)} images are far from all that the run knows: their neighbour {shown} is further"
    told += f" than {limit:.3g}, as it is for 1 % of the run's test images."
    told += "".join(f" {note}." for note in notes)
    return Predictions(run, pd.DataFrame(found), features.numpy(), pixels, bad, told)


def _pixels(run: Run, files: list[Path]) -> dict[Path, np.ndarray | str]:
    """Each file's pixels as the run's set has them, uint8 (3, S, S), or why it cannot be read."""
    size, how = run.image_size, preprocessing(run.backbone, run.weights)["interpolation"]
    rows = np.arange(len(files))
    index = Index(rows, rows, rows, (), files)
    made = each(index, size, lambda i: resize(i[None], size, how)[0], "reading")
    return dict(zip(files, made, strict=True))


def picture(found: Predictions):
    """A matplotlib figure of each new image beside its neighbours, those of its class in green; `PICTURED` rows.

    ValueError or FileNotFoundError if the images that the run was trained on are not there.
    """
    from matplotlib.figure import Figure

    run, rows = found.run, found.table.head(PICTURED)
    train = parts(run).train
    at, ids = {name: row for row, name in enumerate(train.ids)}, rows.filter(regex="^neighbour_")
    if gone := {*ids.to_numpy().ravel()} - {*at}:
        raise ValueError(f"{run.dataset} has no image {min(gone)} any more; a picture needs the run's images")
    figure = Figure((1.7 * (ids.shape[1] + 1), 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), ids.shape[1] + 1, squeeze=False)
    for line, image, row in zip(axes, found.pixels, rows.to_dict("records"), strict=True):
        called = [Path(row["image"]).name, row["class"], f"{row['share']:.0%}" + ", far" * row["far"]]
        tiles = [(image, called, "black")]
        for n in range(1, ids.shape[1] + 1):
            told = ["", row[f"class_{n}"], f"at {row[f'distance_{n}']:.3g}"]
            color = "tab:green" if row[f"class_{n}"] == row["class"] else "tab:red"
            tiles.append((train.images[at[row[f"neighbour_{n}"]]], told, color))
        for axis, (pixels, told, color) in zip(line, tiles, strict=True):
            short = [text if len(text) <= 20 else f"{text[:8]}…{text[-10:]}" for text in told]
            axis.imshow(np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3)))
            axis.set_title("\n".join(short), fontsize=8, color=color, parse_math=False)
            axis.set_axis_off()
    return figure


def report(folder: Path, images: Path, k_predict: int | None, out: Path | None, figure: Path | None) -> int:
    """Print the table of `predict`, or write it to `out`, and the picture to `figure`; 1 if a file cannot be read."""
    found = predict(folder, images, k_predict)
    if figure:
        with whole_file(figure) as temporary:
            picture(found).savefig(temporary, dpi=150, bbox_inches="tight")
    if out:
        write_csv(found.table, out)
    else:
        print(found.table.to_string(index=False, float_format="{:.3g}".format))
    for text in [*(f"warning: {text}" for text in found.bad), found.told]:
        print(text, file=sys.stderr)
    return int(bool(found.bad))
