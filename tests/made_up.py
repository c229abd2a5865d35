"""Images that are easy to tell apart; results and rows of runs that nobody executed, of a chosen quality."""

import time

import numpy as np
from sets import put

from deepknn_lib.study.experiments import Result
from deepknn_lib.study.results import KEYS, SETTINGS
from deepknn_lib.study.runs import METHODS, make_run

LABELS = np.repeat([0, 1, 2], [160, 80, 60])


def draw_classes(folder, names="abc", seed=0, size=(24, 24), turned=0):
    """Draw twelve noisy images of each class, which differ in colour, and give the data set's name."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(names):
        for number in range(12):
            pixels = rng.integers(0, 120, (*size, 3)) + 100 * (np.arange(3) == (c + turned) % 3)
            put(folder / name / f"{number}.png", pixels.astype(np.uint8))
    return f"folder:{folder}"


def result(method, seed=0, quality=0.5, arrives=4, stuck=False, ratios=(0.6, 0.7), **given):
    """A result that is right on the given share of the images, or share of each class.

    All draw on the same luck, so that a better method is right wherever a worse one is. Training accuracy is 92 % from
    epoch `arrives` on, or stays at 50 % (`stuck`). `ratios` stand in the features of the training and the test part.
    """
    settings = {"seed": seed, "backbone": "resnet18", "weights": "imagenet"} | given
    run = make_run("lesions", method, "demo", **settings)
    luck = (np.random.default_rng(7).permutation(len(LABELS)) + 0.2 * seed) / len(LABELS)
    predictions = np.where(luck < np.broadcast_to(quality, 3)[LABELS], LABELS, (LABELS + 1) % 3)
    ids, groups = np.array([f"image {n}" for n in range(len(LABELS))]), np.arange(len(LABELS)) // 2
    arrays = {"test_labels": LABELS, "train_labels": LABELS, "test_groups": groups, "test_ids": ids}
    arrays |= {"train_features": np.array([[ratios[0]]]), "test_features": np.array([[ratios[1]]])}
    arrays["test_logits"] = np.eye(3)[predictions]
    accuracy = [50 if stuck else 50 + 42 * min(epoch / arrives, 1) for epoch in range(1, 17)]
    history = [{"epoch": epoch, "train_acc": value} for epoch, value in enumerate(accuracy, start=1)]
    record = {"class_names": ["a", "b", "c"], "class_counts": {"train": [50, 30, 20]}, "smallest": 2}
    record |= {"collapsed": False, "seconds": 1.0, "device": "cpu", "versions": "python 3", "commit": "abc"}
    votes = dict.fromkeys((1, 3, 5, 7, 9), predictions)
    return Result(run, arrays, history if METHODS[method].loss else [], record, votes)


def result_row(dataset, method, profile="demo", columns=(), **changes):
    """A row as of `results_table`; scores are 70, 50 and 30 per cent unless changed, other changes are the run's."""
    scores = {"acc": 70.0, "mcr": 50.0, "rs": 30.0, "collapsed": False}
    scores |= {name: changes.pop(name) for name in scores if name in changes}
    run = make_run(dataset, method, profile, **changes)
    row = {name: getattr(run, name) for name in (*KEYS, *SETTINGS, "k_predict", "evaluate_on")}
    return row | scores | dict(columns)


def digits(method="knn", seed=0, **changes):
    """A run of seconds."""
    return make_run("digits", method, "smoke", split="grouped", seed=seed, **changes)


def same(first, second):
    """Whether two results have equal arrays."""
    one, other = first.arrays, second.arrays
    return [*one] == [*other] and all(map(np.array_equal, one.values(), other.values()))


def wait_for(condition, seconds):
    """What the condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)
    return found
