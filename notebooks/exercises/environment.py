"""Checks for the exercises of notebook 00. They say whether an answer is right, and not what is right."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from exercises.compare import compare

from deepknn_lib import deep_knn_loss
from deepknn_lib.datasets import load_dataset

LABELS = torch.tensor([0, 0, 1, 1])


def check_no_margin(loss: float) -> bool:
    """Exercise 1: the loss of the four images of the self-test with margin 0, a number."""
    features = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
    return compare(loss, deep_knn_loss(features, LABELS, k=1, m=1, margin=0.0).item(), 0.001)


def check_gradient(gradient: Sequence[float]) -> bool:
    """Exercise 2: the derivative of the loss (margin 1) with respect to the features at 0, 1, 1.5 and 4."""
    features = torch.tensor([[0.0], [1.0], [1.5], [4.0]], requires_grad=True)
    deep_knn_loss(features, LABELS, k=1, m=1, margin=1.0).backward()
    return compare(gradient, features.grad.flatten().tolist(), 0.001)


def check_folder(path: str | Path) -> bool:
    """Exercise 3: a folder of class folders with at least five pictures each, that every notebook can load."""
    try:
        with warnings.catch_warnings(record=True) as doubts:
            data = load_dataset(f"folder:{path}", "grouped", image_size=32)
    except (OSError, ValueError) as error:
        print("not yet:", str(error).replace(str(path), "<path>"))
        return False
    if len(data.class_names) < 2:
        print("not yet: there is one class only; a second folder is needed beside the first")
        return False
    for doubt in doubts:
        print("note:", str(doubt.message).replace(str(path), "<path>"))
    print(f"right: {len(data.train) + len(data.test)} images in {len(data.class_names)} classes")
    return True
