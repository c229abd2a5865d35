"""Checks of the exercises of notebook 04 (train and compare)."""

import numpy as np
import torch
from exercises.compare import compare

from deepknn_lib import nearest_neighbors
from deepknn_lib.metrics import bootstrap, interval
from deepknn_lib.study.experiments import execute, parts
from deepknn_lib.study.runs import make_run


def check_step(points, session) -> bool:
    """Exercise 1: the smallest step in which the RS of one run can move on the split by lesion, in points."""
    data = parts(make_run(session.dataset, "knn", session.profile, split="grouped"))
    count = np.sum(data.test.labels == data.info["smallest"])
    return compare(points, 100 / count, 0.005)


def check_twins(per_cent, session) -> bool:
    """Exercise 2: of the test images with a twin, per cent with a twin among the five nearest; deep kNN, by image."""
    run = make_run(session.dataset, "deep-knn", session.profile, split="paper", seed=session.seeds[0])
    arrays = execute(run, session.device).arrays
    has_twin = np.isin(arrays["test_groups"], arrays["train_groups"])
    if not has_twin.any():
        print("these data have no twins; take another data set")
        return False
    queries, gallery = (torch.from_numpy(arrays[f"{part}_features"]) for part in ("test", "train"))
    near = arrays["train_groups"][nearest_neighbors(queries, gallery, 5)[1].numpy()]
    found = (near == arrays["test_groups"][:, None]).any(axis=1)
    return compare(per_cent, 100 * found[has_twin].mean(), 0.01)


def check_interval(function) -> bool:
    """Exercise 3: `function(gain, labels, groups)` gives (low, high), the 95 % interval of MCR, in points.

    Four images a group, which are all right or all wrong; three classes of very different size; four seeds.
    """
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (400, 80, 40))
    groups = np.arange(len(labels)) // 4
    gain = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.4, 0.4], size=(4, groups.max() + 1))[:, groups]
    gain[:, labels == 2] *= 0.5
    low, high = function(gain, labels, groups)

    def ends(**changes):
        about = {
            "labels": labels,
            "correct": gain,
            "n_classes": 3,
            "smallest": 2,
            "groups": groups,
            "draws": 4000,
        }
        return {name: np.array(interval(values)) for name, values in bootstrap(**about | changes).items()}

    right, images = ends(), ends(groups=None)
    width = right["mcr"][1] - right["mcr"][0]
    off = np.abs(np.array([low, high], float) - right["mcr"]).max() / width
    if good := off < 0.1:
        print("right")
    else:
        print(f"not yet: an end is off by {off:.2f} of the interval's width")
        for name, wrong in (("Acc's interval", right["acc"]), ("MCR's, with images drawn", images["mcr"])):
            if np.abs(np.array([low, high]) - wrong).max() < 0.1 * width:
                print(f"this is {name}")
    return bool(good)
