"""The measures by hand, the bootstrap on simulated test sets where the truth is known, compactness in loops."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, silhouette_samples

from deepknn_lib.metrics import bootstrap, compactness, epochs_to_accuracy, interval, scores

SIZES, RECALLS = np.array([200, 80, 40]), np.array([0.9, 0.6, 0.75])
LABELS = np.repeat([0, 1, 2], SIZES)
VIEWS = np.arange(len(LABELS)) // 4  # four images of each lesion


def simulated(seed):
    """Which images are right in one test set."""
    return np.random.default_rng(seed).random(len(LABELS)) < RECALLS[LABELS]


def test_scores_and_epochs_by_hand():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 0, 1])
    found = scores(labels, predictions, 4, smallest=1)  # Class 3 has no test image: it does not count.
    assert found == pytest.approx({"acc": 50, "mcr": 100 * (3 / 4 + 1 / 2 + 0) / 3, "rs": 50})
    assert found["mcr"] == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
    draws = bootstrap(np.array([0, 0, 2]), np.array([1, 1, 0]), 4, 3, draws=50)
    assert np.allclose(draws["acc"], 200 / 3) and (draws["mcr"] == 50).all() and np.isnan(draws["rs"]).all()
    history = [{"epoch": n + 1, "train_acc": value} for n, value in enumerate((50, 80, 70, 90))]
    assert [epochs_to_accuracy(history, level) for level in (10, 80, 81, 91)] == [1, 2, 4, 5]


@pytest.mark.parametrize("level, least, most", [(0.95, 0.88, 0.99), (0.5, 0.38, 0.63)])
def test_intervals_cover_the_truth_as_often_as_they_say(level, least, most):
    truth = {"acc": 100 * SIZES @ RECALLS / SIZES.sum(), "mcr": 100 * RECALLS.mean(), "rs": 100 * RECALLS[2]}
    hits, tests = dict.fromkeys(truth, 0), 150
    for test in range(tests):
        draws = bootstrap(LABELS, simulated(test), 3, 2, draws=200, seed=test)
        for name, value in truth.items():
            low, high = interval(draws[name], level)
            hits[name] += low <= value <= high
    assert all(least <= count / tests <= most for count in hits.values()), hits


def test_intervals_for_images_and_seeds_cover_the_truth():
    """Five seeds, whose recalls scatter by 8 points around the truth, on one test set."""
    recalls, rng = np.array([0.7, 0.6, 0.65]), np.random.default_rng(3)
    hits = {"images alone": 0, "images and seeds": 0}
    for test in range(100):
        rows = rng.random(len(LABELS)) < recalls[LABELS] + rng.normal(0, 0.08, (5, 1))
        for name, correct in {"images alone": rows.mean(0), "images and seeds": rows}.items():
            low, high = interval(bootstrap(LABELS, correct, 3, 2, draws=300, seed=test)["mcr"])
            hits[name] += low <= 100 * recalls.mean() <= high
    assert hits["images alone"] < 85 and 85 <= hits["images and seeds"] <= 99


def test_committed_intervals_can_be_computed_again():
    """A seed's draws must never change; these are of commit 080a783."""
    groups = 60 * LABELS + np.random.default_rng(1).integers(0, 60, len(LABELS))
    draws = bootstrap(LABELS, [simulated(n) for n in range(3)], 3, 2, groups, draws=50, seed=7)
    assert interval(draws["acc"]) == pytest.approx((74.06802638850512, 85.87728750938096), rel=1e-9)
    assert interval(draws["mcr"]) == pytest.approx((67.13666244364626, 82.75938518126017), rel=1e-9)
    assert interval(draws["rs"]) == pytest.approx((63.598531211750306, 83.78378378378379), rel=1e-9)


def test_a_group_of_several_classes_is_drawn_whole():
    draws = bootstrap(np.array([0, 1, 0, 1, 1]), np.array([1, 1, 0, 0, 0]), 2, 0, np.array([5, 5, 9, 9, 3]))
    assert {*draws["rs"]} == {0, 50, 100} and np.array_equal(draws["acc"], 0.8 * draws["rs"])


def test_draws_that_are_all_alike_give_no_interval():
    one = bootstrap(
        np.array([0, 1, 1]), np.array([[1, 1, 0], [0, 1, 0]]), 2, 0
    )  # the smallest class has one image
    assert np.isnan(interval(one["rs"])).all() and one["acc"].std() > 0
    assert np.isnan(interval(np.full(9, 39.0))).all() and interval(np.zeros(9)) == (0, 0)


def test_whole_groups_are_drawn_within_their_class_by_any_names_and_alike_for_pairs():
    # One lesion has three views and one has one; a draw holds one of them twice, or both.
    draws = bootstrap(np.zeros(4), np.array([1, 1, 1, 0]), 1, 0, np.array([5, 5, 5, 9]), draws=400)["rs"]
    assert set(np.round(draws, 6)) == {0, 75, 100} and np.mean(draws == 75) == pytest.approx(0.5, abs=0.1)
    first, second, named = simulated(0) * 1.0, simulated(1) * 1.0, np.array([f"lesion {v:03}" for v in VIEWS])
    one, other, paired = (bootstrap(LABELS, c, 3, 2, VIEWS)["mcr"] for c in (first, second, first - second))
    np.testing.assert_allclose(bootstrap(LABELS, [first], 3, 2, named)["mcr"], one)
    np.testing.assert_allclose(one - other, paired, atol=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_compactness_is_what_its_definitions_say(k):
    labels, every = np.repeat([0, 1, 2], [20, 14, 6]), range(40)
    features = (np.random.default_rng(0).normal(size=(40, 5)) + labels[:, None]).astype(np.float32)
    away = [[math.dist(a, b) for b in features.tolist()] for a in features.tolist()]
    same = [away[i][j] for i in every for j in every if i != j and labels[i] == labels[j]]
    other = [away[i][j] for i in every for j in every if labels[i] != labels[j]]
    near = [sorted(set(every) - {i}, key=away[i].__getitem__)[:k] for i in every]
    pure = np.array([np.mean(labels[near[i]] == labels[i]) for i in every])
    silhouettes = silhouette_samples(features, labels)
    means = [np.mean([of[labels == c].mean() for c in range(3)]) for of in (silhouettes, pure)]
    found = compactness(features, labels, k=k)
    expected = {"ratio": np.mean(same) / np.mean(other), "silhouette": means[0], "purity": 100 * means[1]}
    assert found == pytest.approx(expected, rel=1e-5)
    chosen = np.random.default_rng(0).permutation(40)[:25]
    part = compactness(features[chosen], labels[chosen])
    assert compactness(features, labels, sample=25) == pytest.approx(part)
    alone = compactness(np.concatenate([features, features[:1] + 50]), np.append(labels, 3), k=k)
    assert alone["purity"] == pytest.approx(found["purity"])  # A class of one image has no purity.
