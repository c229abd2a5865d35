"""Checks of the exercises of notebook 07 (feature vectors)."""

import numpy as np
import pandas as pd
from exercises.compare import compare
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from deepknn_lib.estimators import DeepKNNClassifier
from deepknn_lib.models import build_network
from deepknn_lib.storage import repository


def check_decided(count) -> bool:
    """Exercise 1: over how many rivals deep kNN is ahead in MCR, by lesion, with an interval above 0 (an integer)."""
    gaps = pd.read_csv(repository() / "data" / "results" / "skin7_table3_differences.csv")
    right = gaps.query("split == 'grouped' and score == 'MCR' and low > 0")
    return compare(count, len(right))


def check_n_parameters(function) -> bool:
    """Exercise 2: `function(n_inputs)` gives the number of the MLP's parameters, an integer."""
    for n_inputs in (30, 1280, 2048):
        network = build_network("mlp", n_inputs=n_inputs)
        print(f"{n_inputs} inputs: ", end="")
        if not compare(function(n_inputs), sum(p.numel() for p in network.parameters())):
            return False
    return True


def check_pipeline(pipeline, least: float = 0.96) -> bool:
    """Exercise 3: an unfitted pipeline for the breast cancer set, in which a classifier judges deep kNN's vectors.

    Its answers must not depend on the units of the 30 numbers, and it must be right for 96 % in 5 folds.
    """
    if not any(isinstance(step, DeepKNNClassifier) for _, step in getattr(pipeline, "steps", [])[:-1]):
        print("not yet: a pipeline is needed with deep kNN before its last step")
        return False
    vectors, diagnoses = load_breast_cancer(return_X_y=True)
    units = 10.0 ** np.random.default_rng(0).integers(-2, 3, vectors.shape[1])
    train, test = slice(0, 400), slice(400, None)
    first, other = (
        clone(pipeline).fit(x[train], diagnoses[train]).predict(x[test]) for x in (vectors, vectors * units)
    )
    same = np.mean(first == other)
    print(f"{same:.1%} of the answers stay when the units change")
    if same < 0.99:
        print("not yet: the units must not matter")
        return False
    folds = StratifiedKFold(5, shuffle=True, random_state=1)
    found = np.mean(cross_val_predict(clone(pipeline), vectors, diagnoses, cv=folds) == diagnoses)
    print(f"{'right' if found >= least else 'not yet'}: {found:.1%} in 5 folds, {least:.0%} are asked for")
    return bool(found >= least)
