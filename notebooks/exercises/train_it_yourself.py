"""Checks of the exercises of notebook 03."""

import math

import torch
from exercises.compare import compare


def check_settled(answer) -> bool:
    """Two numbers: where a collapsed triplet loss stands with a margin of 2, and with the soft margin."""
    return compare(answer, [2, math.log(2)], 0.01)


def check_batches(batches) -> bool:
    """A function of labels, images per class and a generator; tried on classes of 50, 30 and 10 images."""
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 10)[
        torch.randperm(90, generator=torch.Generator().manual_seed(0))
    ]
    drawn = [torch.as_tensor(batch) for batch in batches(labels, 8, torch.Generator().manual_seed(1))]
    wrong = [batch for batch in drawn if labels[batch].bincount(minlength=3).tolist() != [8, 8, 8]]
    left_out = sorted(set(range(90)) - set(torch.cat(drawn).tolist()))
    if wrong:
        print(f"not yet: {len(wrong)} of {len(drawn)} batches do not hold 8 images of each class")
    elif left_out:
        print(f"not yet: {len(left_out)} of 90 images are in no batch")
    elif len(drawn) > 7:
        print(f"not yet: {len(drawn)} batches, though 7 of 8 images hold a class of 50")
    else:
        print("right")
        return True
    return False


def check_batch_all(loss) -> bool:
    """A function of features and labels: the mean over all triplets, margin 0.5; tried on twelve random points."""
    points = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, hinges = torch.arange(12) % 3, []
    for a, p, n in torch.cartesian_prod(*[torch.arange(12)] * 3).tolist():
        if a != p and labels[a] == labels[p] != labels[n]:
            hinges.append(((points[a] - points[p]).norm() + 0.5 - (points[a] - points[n]).norm()).relu())
    return compare(float(loss(points, labels)), float(torch.stack(hinges).mean()), 1e-4)
