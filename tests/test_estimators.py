"""The six methods of Table 3: scikit-learn's own checks, what each learns, and LMNN against metric-learn."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from sets import REFUSED
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepknn_lib.criteria import whole_set_neighbors
from deepknn_lib.estimators import ESTIMATORS, LMNNClassifier, from_run, lmnn_parts

MLPS = ("mlp-triplet", "mlp-ce", "mlp-deep-knn")
QUICK = {"nca": {"max_iter": 10}, "lmnn": {"max_iter": 10}}
QUICK |= dict.fromkeys(MLPS, {"epochs": 2, "batch_size": 48})
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def quick(name, **changes):
    return ESTIMATORS[name](**QUICK.get(name, {}) | changes)


@pytest.fixture(scope="module")
def drowned():
    """Two informative features among thirty of noise that is five times as large: train and test part."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 400)
    centers = np.array([[0, 0], [4, 0], [0, 4]])
    vectors = np.hstack([centers[codes] + rng.normal(size=(400, 2)), 5 * rng.normal(size=(400, 30))])
    names = np.array(["nevus", "melanoma", "other"])[codes]
    return vectors[:250], names[:250], vectors[250:], names[250:]


# With default parameters where they are quick; those of the MLPs take half a minute each.
DEFAULTS = [ESTIMATORS[name]() for name in ("knn", "nca", "lmnn")]


@parametrize_with_checks([*DEFAULTS, *map(quick, MLPS), quick("mlp-ce", n_neighbors=0)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("name", list(ESTIMATORS)[1:])
def test_each_finds_the_features_that_noise_drowns_and_the_same_again(drowned, name):
    vectors, names, others, truth = drowned
    told, settings = [], {"epochs": 15, "batch_size": 48} if name in MLPS else {}
    raw = ESTIMATORS["knn"]().fit(vectors, names).score(others, truth)
    learnt = ESTIMATORS[name](n_neighbors=1, **settings).fit(vectors, names, on_epoch=told.append)
    assert raw < 0.6 and learnt.score(others, truth) > raw + 0.15
    space, rival = learnt.transform(others), KNeighborsClassifier(1).fit(learnt.transform(vectors), names)
    assert (learnt.predict(others) == rival.predict(space)).mean() > 0.99
    backwards = others.astype(np.float32)[::-1]  # negative strides, which torch does not take
    assert np.array_equal(learnt.predict(backwards), learnt.predict(others)[::-1])
    assert told == learnt.history_ and len(told) == settings.get("epochs", 0)
    assert np.array_equal(clone(learnt).fit(vectors, names).transform(others), space)


def test_linear_methods_learn_from_a_part_in_the_classes_proportions(drowned, monkeypatch):
    seen, labels = mock.Mock(return_value=(torch.eye(32), 1)), np.repeat([0, 1, 2], [150, 75, 25])
    monkeypatch.setattr(LMNNClassifier, "_fit_map", seen)
    for limit in (100, None):
        LMNNClassifier(max_samples=limit).fit(drowned[0], labels)
    assert [call.args[1].bincount().tolist() for call in seen.call_args_list] == [[60, 30, 10], [150, 75, 25]]


def test_from_run_takes_the_settings_of_the_run():
    settings = {"k": 4, "m": 2, "lr": 0.3, "epochs": 7, "class_power": 0.5, "normalize": "l2"}
    expected = settings | {"n_neighbors": 1, "random_state": 3, "max_iter": 7}
    for method, kind in ESTIMATORS.items():
        made = from_run(SimpleNamespace(method=method, seed=3, k_predict=1, backbone="resnet50", **settings))
        found = made.get_params()
        assert type(made) is kind and all(expected.get(name, value) == value for name, value in found.items())
    with pytest.raises(ValueError, match="no estimator for 'deep-knn'.*mlp-deep-knn"):
        from_run(SimpleNamespace(method="deep-knn"))


@pytest.mark.parametrize(("name", "changes", "told"), REFUSED["no estimator"])
def test_errors_say_what_is_wrong(name, changes, told):
    with pytest.raises((ValueError, TypeError), match=told):
        quick(name, **changes).fit(np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3)


def test_shares_neighbours_and_names_are_those_of_scikit_learns_own_vote(drowned):
    vectors, names, others, _ = drowned
    kinds = ESTIMATORS["knn"], KNeighborsClassifier
    learnt, rival = (kind(n_neighbors=5).fit(vectors, names) for kind in kinds)
    shares = learnt.predict_proba(others)
    assert np.allclose(shares, rival.predict_proba(others), atol=1e-6)
    assert np.array_equal(learnt.classes_[shares.argmax(1)], learnt.predict(others))
    for asked in ({"X": others}, {}, {"X": others, "n_neighbors": 3}):
        for ours, theirs in zip(learnt.kneighbors(**asked), rival.kneighbors(**asked), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert np.array_equal(learnt.kneighbors(others, return_distance=False), learnt.kneighbors(others)[1])
    tie = ESTIMATORS["knn"](n_neighbors=2).fit([[0.0], [3.0]], ["b", "a"])
    assert tie.predict([[1.0]]) == "b" and tie.predict_proba([[1.0]]) == pytest.approx(np.array([[0.5, 0.5]]))
    softmax = quick("mlp-ce", n_neighbors=0).fit(vectors, names)
    assert np.array_equal(softmax.predict(others), softmax.classes_[softmax.logits(others).argmax(1)])


def test_estimators_work_inside_scikit_learns_tools_and_take_numpys_numbers(drowned):
    vectors, names, *_ = drowned
    for name in ESTIMATORS:
        assert np.isfinite(cross_val_score(quick(name), vectors, names, cv=3, scoring="roc_auc_ovr")).all()
    calibrated = CalibratedClassifierCV(quick("mlp-ce", n_neighbors=0), cv=2).fit(vectors, names == "nevus")
    assert calibrated.predict_proba(vectors).shape == (250, 2)
    numbers = {"k": np.int64(3), "n_neighbors": np.int32(3), "epochs": np.int64(1), "lr": np.float32(0.1)}
    plain = {name: value.item() for name, value in numbers.items()} | {"random_state": 4}
    same = quick("mlp-deep-knn", **plain).fit(vectors, names).transform(vectors)
    for random_state in (np.int64(4), np.random.RandomState(0), None):
        made = quick("mlp-deep-knn", **numbers, random_state=random_state).fit(vectors, names)
        assert np.array_equal(made.transform(vectors), same) == (random_state == 4)


# metric_learn.LMNN(init="identity", n_neighbors=3, max_iter=5000, learn_rate=1e-4, convergence_tol=1e-6,
# regularization=0.5).fit(vectors, labels) of metric-learn 0.7.0 with scikit-learn 1.5.2, on half of the standardised
# wines: its own objective at the identity and where it stopped, and the accuracy of 3 neighbours on the other half.
AT_IDENTITY, AT_THE_END, ACCURACY = 899.5578787727428, 89.26357378614546, 0.9662921348314607


def test_lmnn_reaches_the_objective_and_accuracy_of_metric_learn():
    vectors, labels = load_wine(return_X_y=True)
    vectors = ((vectors - vectors.mean(0)) / vectors.std(0)).astype(np.float32)
    halves = train_test_split(vectors, labels, test_size=0.5, random_state=0, stratify=labels)
    inputs, others, labels, truth = map(torch.from_numpy, halves)
    near = whole_set_neighbors(inputs, labels, 3, 1)
    assert sum(lmnn_parts(inputs, labels, near, 0.5, chunk=40)).item() == pytest.approx(AT_IDENTITY, rel=1e-4)
    linear, _ = LMNNClassifier(k=3, max_iter=300, tol=1e-5)._fit_map(inputs, labels)
    assert sum(lmnn_parts(inputs @ linear.T, labels, near, 0.5)).item() < 1.01 * AT_THE_END
    voters = KNeighborsClassifier(3).fit(inputs @ linear.T, labels)
    assert abs(voters.score(others @ linear.T, truth) - ACCURACY) < 0.03
    with pytest.warns(ConvergenceWarning, match="LMNNClassifier did not converge in max_iter=2"):
        LMNNClassifier(max_iter=2).fit(inputs.numpy(), labels.numpy())
