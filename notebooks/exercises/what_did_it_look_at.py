"""Checks of the exercises of 10 · What did it look at?"""

import numpy as np
import torch
from exercises.compare import compare

from deepknn_lib import majority_vote, nearest_neighbors
from deepknn_lib.study.experiments import execute
from deepknn_lib.study.runs import make_run

K_P = 5


def _ten_nearest(session):
    """Distances and labels of the ten nearest of each test image, the test labels, how many classes, the largest."""
    seed = session.seeds[0]
    run = make_run(session.dataset, "deep-knn", session.profile, split="grouped", seed=seed)
    result = execute(run, session.device)
    names = ("test_features", "train_features", "train_labels")
    queries, gallery, labels = (torch.from_numpy(result.arrays[name]) for name in names)
    distances, index = nearest_neighbors(queries, gallery, 2 * K_P)
    largest = int(np.argmax(result.record["class_counts"]["train"]))
    return distances, labels[index], result.arrays["test_labels"], len(result.record["class_names"]), largest


def check_unanimous(wrong_of_all, wrong_of_others, session) -> bool:
    """Of the unanimous predictions of deep kNN (five of five), how many per cent are wrong?

    Two numbers, right to a tenth of a point: over all test images, and over those that are truly of another class
    than the largest of the training images.
    """
    _, labels, truth, _, largest = _ten_nearest(session)
    votes = labels[:, :K_P].numpy()
    unanimous = (votes == votes[:, :1]).all(1)
    right = []
    for group in (unanimous, unanimous & (truth != largest)):
        right.append(100 * np.mean(votes[group, 0] != truth[group]) if group.any() else 0.0)
    found = []
    for given, wanted, title in zip((wrong_of_all, wrong_of_others), right, ("all", "others"), strict=True):
        print(f"{title}: ", end="")
        found.append(compare(given, wanted, 0.06 / max(wanted, 0.06)))
    return all(found)


def check_removed(per_cent, session) -> bool:
    """For how many per cent of the test images does deep kNN's prediction change without their five nearest images?

    One number, right to a tenth of a point. The five nearest training images are removed and the next five vote.
    """
    distances, labels, _, n_classes, _ = _ten_nearest(session)
    first, second = (majority_vote(labels[:, part], distances[:, part], n_classes) for part in _halves())
    right = 100 * (first != second).double().mean().item()
    return compare(per_cent, right, 0.06 / max(right, 0.06))


def _halves() -> tuple[slice, slice]:
    """The first five neighbours and the next five."""
    return slice(K_P), slice(K_P, 2 * K_P)


def check_weighted_vote(vote) -> bool:
    """A function in which each neighbour's vote counts 1 / distance.

    `vote(labels, distances, n_classes)` gives the class of each query, (Q,), from the labels, int64 (Q, K_p), and the
    distances, (Q, K_p), of its neighbours.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200, 5), generator=generator)
    distances = 0.1 + torch.rand(200, 5, generator=generator)
    weights = torch.zeros(200, 4).scatter_add_(1, labels, 1 / distances)
    right = weights.argmax(1)
    given = torch.as_tensor(vote(labels, distances, 4))
    if given.shape != right.shape:
        print(
            f"not yet: the answer has shape {tuple(given.shape)}; one class for each query is {tuple(right.shape)}"
        )
        return False
    one_near = torch.as_tensor(vote(torch.tensor([[1, 0, 0]]), torch.tensor([[0.1, 1.0, 1.0]]), 2))
    if one_near.item() != 1:
        print("not yet: one neighbour at 0.1 (weight 10) must win against two at 1 (weight 2)")
        return False
    two_far = torch.as_tensor(vote(torch.tensor([[1, 0, 0]]), torch.tensor([[0.9, 1.0, 1.0]]), 2))
    if two_far.item() != 0:
        print("not yet: one neighbour at 0.9 (weight 1.1) must lose against two at 1 (weight 2)")
        return False
    if not torch.equal(torch.as_tensor(vote(labels, 7 * distances, 4)), given):
        print("not yet: all distances were multiplied by 7, and classes changed")
        return False
    off = int((given != right).sum())
    print(f"not yet: {off} of {len(right)} queries get another class" if off else "right")
    return not off
