"""Checks of the exercises of notebook 09 (sensitivity)."""

import pandas as pd
import torch
from exercises.compare import compare

from deepknn_lib import deep_knn_loss
from deepknn_lib.neighbors import pairwise_distances
from deepknn_lib.storage import repository


def check_one_negative(points) -> bool:
    """Exercise 1: MCR with M = 5 minus MCR with M = 1 on Skin-7, K_p = K, mean over K, in points."""
    rows = pd.read_csv(repository() / "data" / "results" / "skin7_sweeps_runs.csv")
    rows = rows.query("method == 'deep-knn' and k_predict == k")
    mcr = rows.groupby("m")["mcr"].mean()
    right = mcr[5] - mcr[1]
    return compare(points, right, 0.15 / right)  # the table has one decimal


def check_collapsed(function) -> bool:
    """Exercise 2: `function(history, margin)` says whether a run collapsed, by the library's rule."""
    # Mean distance before the first step and by epoch, loss by epoch, margin, and whether that is a collapse.
    cases = {
        "all images end in one point": (2.0, (0.5, 0.02), (0.9, 0.2), 0.2, True),
        "the loss stays near α, but nothing shrinks": (1.4, (1.4, 1.4), (1.0, 0.95), 1.0, False),
        "the features shrink, and the loss is far below α": (9.0, (3.0, 0.8), (2.0, 0.05), 0.2, False),
        "the features shrink at first and recover": (2.0, (0.01, 1.5), (0.5, 0.45), 0.5, False),
        "the first epoch has shrunk them already": (8.0, (0.3, 0.2), (0.55, 0.5), 0.5, True),
    }
    for words, (start, distances, losses, margin, right) in cases.items():
        history = [
            {
                "epoch": n + 1,
                "loss": losses[n],
                "mean_pairwise_distance": distances[n],
                "start_distance": start,
            }
            for n in range(len(losses))
        ]
        print(f"{words}: ", end="")
        said, true = (
            "collapsed" if found else "not collapsed" for found in (function(history, margin), right)
        )
        if not compare(said, true):
            return False
    return True


def check_scale_free(function) -> bool:
    """Exercise 3: `function(features, labels, k, m, margin)` is Eq. 3 of features over their mean pairwise distance."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    features = torch.randn(24, 5, generator=generator, dtype=torch.float64) + labels[:, None]

    def value_and_gradient(scale):
        inputs = (scale * features).requires_grad_()
        value = function(inputs, labels, 3, 4, 0.2)
        (gradient,) = torch.autograd.grad(value, inputs)
        return value.item(), gradient, (gradient * inputs).sum().item()

    mean = pairwise_distances(features).sum() / (24 * 23)
    right = deep_knn_loss(features / mean, labels, 3, 4, 0.2).item()
    print("its value: ", end="")
    if not compare(value_and_gradient(1.0)[0], right, 1e-6):
        return False
    print("its value, features a hundred times as small: ", end="")
    if not compare(value_and_gradient(0.01)[0], right, 1e-6):
        return False
    value, gradient, along = value_and_gradient(1.0)
    if not gradient.isfinite().all() or not gradient.any():
        print("not yet: the gradient is not finite, or 0")
        return False
    if abs(along) > 1e-6:
        print(
            "not yet: a step that only shrinks the features still lowers the loss; the mean distance needs a gradient"
        )
        return False
    print("right: no step towards one point is rewarded")
    return True
