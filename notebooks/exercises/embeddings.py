"""Checks of the exercises of notebook 06 (embeddings)."""

import numpy as np
from exercises.compare import compare

from deepknn_lib.metrics import compactness
from deepknn_lib.study.experiments import execute_all
from deepknn_lib.study.runs import grid


def check_purity_lead(points, session) -> bool:
    """Exercise 1: purity on the test part, split by lesion: deep kNN minus weighted cross-entropy, in points."""
    runs = grid(session.dataset, session.profile, ("deep-knn", "weighted-ce"), ("grouped",), session.seeds)
    purity = {"deep-knn": [], "weighted-ce": []}
    for result in execute_all(runs, session.device):
        measured = compactness(result.arrays["test_features"], result.arrays["test_labels"])
        purity[result.run.method].append(measured["purity"])
    right = np.mean(purity["deep-knn"]) - np.mean(purity["weighted-ce"])
    return compare(points, right, 0.11 / max(abs(right), 1e-9))  # the table has one decimal


def check_purity(function) -> bool:
    """Exercise 2: `function(features, labels, k)` gives the purity of every class in per cent, an array (C,)."""
    rng = np.random.default_rng(0)
    for sizes, k in (((40, 40, 40), 5), ((80, 12, 6), 3)):
        labels = rng.permutation(np.repeat([0, 1, 2], sizes))
        features = rng.normal(size=(len(labels), 4)) + labels[:, None]
        right = [_purity_of_class(features, labels, c, k) for c in range(3)]
        print(f"classes of {', '.join(map(str, sizes))} images, k = {k}: ", end="")
        if not compare(function(features, labels, k), right, 1e-6):
            return False
    return True


def _purity_of_class(features, labels, wanted, k) -> float:
    shares = []
    for i in np.flatnonzero(labels == wanted):
        near = np.argsort(np.linalg.norm(features - features[i], axis=1))
        shares.append(np.mean(labels[near[near != i][:k]] == wanted))
    return 100 * np.mean(shares)


def check_pure_but_loose(points, labels) -> bool:
    """Exercise 3: 200 points (200, 2) in two classes, labels (200,), with a purity of 100 % and a ratio above 1."""
    points, labels = np.asarray(points, float), np.asarray(labels, int)
    if points.shape != (200, 2) or sorted(set(labels.tolist())) != [0, 1] or labels.shape != (200,):
        print(
            f"not yet: needed are points (200, 2) and labels (200,) of 0 and 1, got {points.shape}, {labels.shape}"
        )
        return False
    found = compactness(points, labels)
    good = found["purity"] == 100 and found["ratio"] > 1
    print(f"{'right' if good else 'not yet'}: purity {found['purity']:.1f} %, ratio {found['ratio']:.2f}")
    return good
