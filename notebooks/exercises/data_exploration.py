"""Checks for the exercises of notebook 01. They say whether an answer is right, and not what is right."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from exercises.compare import compare

from deepknn_lib import metrics
from deepknn_lib.datasets import Dataset, load_dataset
from deepknn_lib.study import notebook
from deepknn_lib.study.runs import make_run


def check_always_smallest(scores: Sequence[float], session: notebook.Session) -> bool:
    """Exercise 1: Acc, MCR and RS, in per cent, of a classifier that always says the smallest class."""
    data = _data(session)
    labels, smallest = data.test.labels, data.info["smallest"]
    right = metrics.scores(labels, np.full(len(labels), smallest), len(data.class_names), smallest)
    return compare(scores, list(right.values()), 0.001)


def check_shares(shares: Sequence[float], session: notebook.Session) -> bool:
    """Exercise 2: the share of test images with a twin, in per cent, for folds 1 to 5 of the split by image."""
    right = []
    for fold in range(1, 6):
        data = _data(session, fold)
        right.append(100 * np.isin(data.test.groups, data.train.groups).mean())
    return compare(shares, right, 0.002)


def check_finder(features_of: Callable, session: notebook.Session) -> bool:
    """Exercise 3: `features_of(images)`, uint8 (N, C, H, W) to (N, D), finds more twins than pixels and colours."""
    data = _data(session)
    index = np.flatnonzero(np.isin(data.test.groups, data.train.groups))[:1000]
    if len(index) == 0:
        print("not yet: no test image of this data set has a twin; choose another set")
        return False

    def found(features_of):
        """Per cent of the test images with a twin whose nearest training image is the twin."""
        train, test = (
            torch.as_tensor(features_of(images)).float()
            for images in (data.train.images, data.test.images[index])
        )
        if train.ndim != 2 or len(train) != len(data.train) or test.shape[1:] != train.shape[1:]:
            raise ValueError(f"features must be (N, D) for N images, got {tuple(train.shape)}")
        nearest = torch.cdist(test, train).argmin(1).numpy()
        return 100 * np.mean(data.train.groups[nearest] == data.test.groups[index])

    yours, least = found(features_of), max(found(_pixels), found(_colours))
    verdict = "right" if yours > least else "not yet"
    print(f"{verdict}: the twin comes first in {yours:.1f} %, with pixels or colours in {least:.1f} %")
    return bool(yours > least)


def _data(session: notebook.Session, fold: int = 1) -> Dataset:
    """The images of the notebook, split by image."""
    size = min(make_run(session.dataset, "knn", session.profile).image_size, 96)
    return load_dataset(session.dataset, "paper", fold, size)


def _pixels(images: np.ndarray) -> torch.Tensor:
    """The thumbnails of the notebook."""
    pool = torch.nn.AdaptiveAvgPool2d(12)
    return torch.cat([pool(block.float()).flatten(1) / 255 for block in torch.from_numpy(images).split(500)])


def _colours(images: np.ndarray) -> torch.Tensor:
    """The colour histograms of the notebook."""
    red, green, blue = torch.from_numpy(images // 43).int().expand(-1, 3, -1, -1).unbind(1)
    code = (36 * red + 6 * green + blue).flatten(1)
    return (torch.stack([torch.bincount(one, minlength=216) for one in code]) / code.shape[1]).sqrt()
