"""Checks for the exercises of notebook 02. They say whether an answer is right, and not what is right."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from exercises.compare import compare

from deepknn_lib import deep_knn_loss
from deepknn_lib.losses import deep_knn_terms


def check_six_points(loss: float) -> bool:
    """Exercise 1: Eq. 3 for A at 0, 1, 4 and B at 6, 7, 9 with K = M = 2 and α = 1, a number."""
    points = torch.tensor([[0.0], [1.0], [4.0], [6.0], [7.0], [9.0]])
    right = deep_knn_loss(points, torch.tensor([0, 0, 0, 1, 1, 1]), k=2, m=2, margin=1.0)
    return compare(loss, right.item(), 0.005)


def check_dial(k: int) -> bool:
    """Exercise 2: the least K with which the clumps of class A end nearer than they began, an integer."""
    return compare(k, _least_k())


@cache
def _least_k() -> int:
    """The toy and the descent of the notebook, for growing K."""
    rng = np.random.default_rng(0)
    clumps = [rng.normal(center, 0.7, (15, 2)) for center in [(-2, 0), (2, 0), (0, 0)]]
    toy, labels = torch.from_numpy(np.concatenate(clumps)), torch.tensor([0] * 30 + [1] * 15)

    def apart(points):
        return (points[:15].mean(0) - points[15:30].mean(0)).norm()

    for k in range(1, 30):
        points = toy
        for _ in range(120):
            free = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(deep_knn_loss(free, labels, k, 5, 0.5), free)
            points = points - 0.02 * len(points) * gradient
        if apart(points) < apart(toy):
            break
    return k


def check_active_mean(loss_of: Callable) -> bool:
    """Exercise 3: `loss_of(features, labels, k, m, margin)`, the mean over the active triplets, a tensor.

    It is tried on three batches: one with all triplets, one in which a class has too few images, one without an active
    triplet.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    usual, uneven = torch.arange(24) % 3, torch.tensor([0] * 2 + [1] * 10 + [2] * 12)
    solved = features / 1000 + 10 * usual[:, None]
    cases = [("a batch with all triplets", features, usual, 1.0)]
    cases += [("a batch in which a class has fewer than K + 1 images", features, uneven, 1.0)]
    cases += [("a batch without an active triplet", solved, usual, 0.1)]
    for what, batch, labels, margin in cases:
        free = batch.clone().requires_grad_()
        terms, _ = deep_knn_terms(free, labels, 5, 4, margin)
        wanted = terms.sum() / (terms > 0).sum().clamp(min=1)
        (right,) = torch.autograd.grad(wanted, free)
        said = loss_of(free, labels, 5, 4, margin)
        if not isinstance(said, torch.Tensor) or not said.requires_grad:
            print(f"not yet: on {what} there is no gradient; return a tensor that depends on the features")
            return False
        (gradient,) = torch.autograd.grad(said, free, allow_unused=True)
        if gradient is None or not gradient.isfinite().all() or not said.isfinite():
            print(f"not yet: on {what} the loss or its gradient is not a finite number")
            return False
        print(f"{what}, loss: ", end="")
        if not compare(said.item(), wanted.item(), 1e-6):
            return False
        print(f"{what}, gradient: ", end="")
        if not compare(gradient.numpy(), right.numpy(), 1e-6):
            return False
    return True
