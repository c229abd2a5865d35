"""The measures by hand, the bootstrap on simulated test sets where the truth is known, compactness in loops."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from deepknn_lib.metrics import (
    bootstrap,
    class_recalls,
    compactness,
    epochs_to_accuracy,
    interval,
    scores,
    t_interval,
)

SIZES, RECALLS = np.array([200, 80, 40]), np.array([0.9, 0.6, 0.75])
LABELS = np.repeat([0, 1, 2], SIZES)


def width(values):
    low, high = interval(values)
    return high - low


def simulated(seed=0, views=1):
    """Which images are right in one test set; with several views, those of one group are right together."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.random(len(LABELS) // views) < RECALLS[LABELS[::views]], views)


# Acc, MCR, RS


def test_scores_by_hand():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 0, 1])
    np.testing.assert_allclose(class_recalls(labels, predictions, 3), [3 / 4, 1 / 2, 0])
    found = scores(labels, predictions, 3, smallest=1)
    assert found == pytest.approx({"acc": 50, "mcr": 100 * (3 / 4 + 1 / 2 + 0) / 3, "rs": 50})
    assert all(type(value) is float for value in found.values())


def test_a_class_without_test_images_is_left_out():
    labels, predictions = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2])
    np.testing.assert_array_equal(class_recalls(labels, predictions, 4), [0.5, np.nan, 1, np.nan])
    found = scores(labels, predictions, 4, smallest=1)
    assert found["mcr"] == 75 and np.isnan(found["rs"])
    draws = bootstrap(np.array([0, 0, 2]), np.array([1, 1, 0]), 4, 3, draws=50)
    assert (
        draws["acc"] == pytest.approx(200 / 3) and (draws["mcr"] == 50).all() and np.isnan(draws["rs"]).all()
    )


def test_mcr_is_scikit_learns_balanced_accuracy():
    rng = np.random.default_rng(0)
    labels, predictions = rng.choice(5, 300, p=[0.6, 0.2, 0.1, 0.06, 0.04]), rng.integers(0, 5, 300)
    found = scores(labels, predictions, 5, smallest=4)
    assert found["mcr"] == pytest.approx(100 * balanced_accuracy_score(labels, predictions))


@pytest.mark.parametrize(
    "labels, predictions", [([], []), ([0, 1], [0]), ([[0, 1]], [[0, 1]]), ([0, 3], [0, 3])]
)
def test_bad_predictions_are_refused(labels, predictions):
    with pytest.raises(ValueError):
        scores(np.array(labels, dtype=int), np.array(predictions, dtype=int), 3, 0)


# Bootstrap


@pytest.mark.parametrize("level, least, most", [(0.95, 0.88, 0.99), (0.5, 0.38, 0.63)])
def test_intervals_cover_the_truth_as_often_as_they_say(level, least, most):
    truth = {"acc": 100 * SIZES @ RECALLS / SIZES.sum(), "mcr": 100 * RECALLS.mean(), "rs": 100 * RECALLS[2]}
    hits, rng, tests = dict.fromkeys(truth, 0), np.random.default_rng(1), 150
    for test in range(tests):
        draws = bootstrap(LABELS, rng.random(len(LABELS)) < RECALLS[LABELS], 3, 2, draws=200, seed=test)
        for name, value in truth.items():
            low, high = interval(draws[name], level)
            hits[name] += low <= value <= high
    assert all(least <= count / tests <= most for count in hits.values()), hits


def test_bootstrap_centres_on_the_score_with_the_binomial_standard_deviation():
    correct = simulated()
    draws = bootstrap(LABELS, correct, 3, 2)
    for name, value in scores(LABELS, np.where(correct, LABELS, (LABELS + 1) % 3), 3, 2).items():
        assert draws[name].shape == (2000,) and draws[name].mean() == pytest.approx(value, abs=0.5)
    recall = correct[LABELS == 2].mean()
    assert draws["rs"].std() == pytest.approx(100 * np.sqrt(recall * (1 - recall) / 40), rel=0.1)


def test_committed_intervals_can_be_computed_again():
    """A seed's draws must never change; these are of commit 080a783."""
    groups = np.random.default_rng(1).integers(0, 60, len(LABELS))
    draws = bootstrap(
        LABELS, np.stack([simulated(0), simulated(1), simulated(2)]), 3, 2, groups, draws=50, seed=7
    )
    found = {name: interval(values) for name, values in draws.items()}
    assert found["acc"] == pytest.approx((74.06802638850512, 85.87728750938096), rel=1e-9)
    assert found["mcr"] == pytest.approx((67.13666244364626, 82.75938518126017), rel=1e-9)
    assert found["rs"] == pytest.approx((63.598531211750306, 83.78378378378379), rel=1e-9)


def test_views_that_are_right_together_widen_the_intervals():
    correct, groups = simulated(views=4), np.arange(len(LABELS)) // 4
    alone, together = bootstrap(LABELS, correct, 3, 2), bootstrap(LABELS, correct, 3, 2, groups)
    for name in alone:  # With a quarter of the independent images, intervals are twice as wide.
        assert 1.7 < width(together[name]) / width(alone[name]) < 2.3


def test_groups_may_have_any_name_and_size():
    correct, groups = simulated(), np.random.default_rng(1).integers(0, 60, len(LABELS))
    found = bootstrap(LABELS, correct, 3, 2, groups)
    named = bootstrap(LABELS, correct, 3, 2, np.array([f"lesion {g:02}" for g in groups]))
    assert all((found[name] == named[name]).all() for name in found)


def test_group_recall_weighs_images_not_groups():
    """One lesion has three views and one has one; a draw holds one of them twice, or both."""
    draws = bootstrap(np.zeros(4, dtype=int), np.array([1, 1, 1, 0]), 1, 0, np.array([5, 5, 5, 9]), draws=400)
    assert set(np.round(draws["rs"], 6)) == {0, 75, 100}
    assert np.mean(draws["rs"] == 75) == pytest.approx(0.5, abs=0.1)


def test_classes_keep_their_share_and_stay_present():
    draws = bootstrap(np.array([0] * 9 + [1]), np.array([1.0] * 9 + [0]), 2, 1)
    for name, value in {"acc": 90, "mcr": 50, "rs": 0}.items():
        np.testing.assert_allclose(draws[name], value)


def test_pairing_narrows_the_difference_of_similar_methods_and_is_0_for_the_same():
    first = simulated().astype(float)
    second = np.where(np.random.default_rng(0).random(len(first)) < 0.05, 1 - first, first)
    paired = bootstrap(LABELS, first - second, 3, 2)
    apart = bootstrap(LABELS, first, 3, 2, seed=1)["acc"] - bootstrap(LABELS, second, 3, 2, seed=2)["acc"]
    assert paired["acc"].mean() == pytest.approx(100 * (first.mean() - second.mean()), abs=0.2)
    assert width(paired["acc"]) < 0.7 * width(apart)
    assert all((values == 0).all() for values in bootstrap(LABELS, first - first, 3, 2).values())


# Seeds


def test_equal_seeds_change_nothing():
    correct, groups = simulated(), np.arange(len(LABELS)) // 4
    alone = bootstrap(LABELS, correct, 3, 2, groups)
    for rows in (correct[None], np.stack([correct] * 3)):
        together = bootstrap(LABELS, rows, 3, 2, groups)
        assert all(together[name] == pytest.approx(values, abs=1e-9) for name, values in alone.items())


@pytest.mark.parametrize("right", [(0, 1), (0.2, 0.5, 0.9), (0.1, 0.4, 0.5, 0.6, 0.8)])
def test_seeds_alone_vary_as_the_standard_error_of_their_mean(right):
    rows = np.repeat(
        np.array(right)[:, None], len(LABELS), axis=1
    )  # All images are alike: only seeds differ.
    for values in bootstrap(LABELS, rows, 3, 2, draws=4000).values():
        assert values.mean() == pytest.approx(100 * np.mean(right), abs=2)
        assert values.std() == pytest.approx(100 * np.std(right, ddof=1) / np.sqrt(len(right)), rel=0.06)


def test_intervals_for_images_and_seeds_cover_the_truth():
    """Five seeds, whose recalls scatter by 8 points around the truth, on one test set."""
    recalls, rng = np.array([0.7, 0.6, 0.65]), np.random.default_rng(3)
    hits = {"images alone": 0, "images and seeds": 0}
    for test in range(100):
        luck, shifts = rng.random(len(LABELS)), rng.normal(0, 0.08, (5, 1))
        rows = luck < recalls[LABELS] + shifts
        for name, correct in {"images alone": rows.mean(0), "images and seeds": rows}.items():
            low, high = interval(bootstrap(LABELS, correct, 3, 2, draws=300, seed=test)["mcr"])
            hits[name] += low <= 100 * recalls.mean() <= high
    assert hits["images alone"] < 85 and 85 <= hits["images and seeds"] <= 99


def test_t_interval_by_hand():
    half = 4.3027 / np.sqrt(3)  # t = 4.3027 with two degrees of freedom.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert t_interval([1.0, 2.0, 3.0], 0.995)[0] < 2 - half
    assert np.isnan(t_interval([1.0])).all() and np.isnan(t_interval([])).all()


def test_interval_is_the_central_part():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.arange(101.0), 0.5) == pytest.approx((25, 75))


def test_epochs_to_accuracy_is_the_first_epoch_at_the_level_or_one_past_the_last():
    history = [{"epoch": n + 1, "train_acc": value} for n, value in enumerate((50, 80, 70, 90))]
    assert [epochs_to_accuracy(history, level) for level in (10, 60, 80, 81, 91)] == [1, 2, 2, 4, 5]


# Compactness


@pytest.fixture
def points():
    """Forty points of three overlapping classes in five dimensions."""
    labels = np.repeat([0, 1, 2], [20, 14, 6])
    return (np.random.default_rng(0).normal(size=(40, 5)) + labels[:, None]).astype(np.float32), labels


def loops(features, labels, k):
    """The three measures as their definitions say, pair by pair."""
    n, classes = len(labels), sorted(set(labels.tolist()))
    away = [[math.dist(a, b) for b in features.tolist()] for a in features.tolist()]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = np.mean([away[i][j] for i, j in pairs if labels[i] == labels[j]])
    between = np.mean([away[i][j] for i, j in pairs if labels[i] != labels[j]])
    silhouettes, pure = [], []
    for i in range(n):
        mean_to = {c: np.mean([away[i][j] for j in range(n) if labels[j] == c and j != i]) for c in classes}
        own, nearest = mean_to[labels[i]], min(v for c, v in mean_to.items() if c != labels[i])
        silhouettes.append((nearest - own) / max(nearest, own))
        near = sorted((j for j in range(n) if j != i), key=lambda j, i=i: away[i][j])[:k]
        pure.append(np.mean([labels[j] == labels[i] for j in near]))
    silhouette, purity = (
        np.mean([np.mean(np.array(values)[labels == c]) for c in classes]) for values in (silhouettes, pure)
    )
    return {"ratio": within / between, "silhouette": silhouette, "purity": 100 * purity}


@pytest.mark.parametrize("k", [1, 5])
def test_compactness_is_what_its_definitions_say(points, k):
    assert compactness(*points, k=k) == pytest.approx(loops(*points, k), rel=1e-5)


def test_a_class_in_two_far_islands_is_pure_but_not_tight():
    features = np.repeat([[-9.0], [0.0], [9.0]], 10, axis=0) + 1e-3 * np.random.default_rng(0).normal(
        size=(30, 1)
    )
    found = compactness(features, np.repeat([0, 1, 0], 10))
    assert found["purity"] == 100 and found["ratio"] > 0.5 and found["silhouette"] < 0.5
    found = compactness(features, np.repeat([0, 1, 2], 10))
    assert found["purity"] == 100 and found["ratio"] < 0.01 and found["silhouette"] > 0.99


def test_one_image_alone_in_its_class_is_left_out_and_of_many_images_a_part_is_measured(points):
    features, labels = points
    found = compactness(np.concatenate([features, features[:1] + 50]), np.append(labels, 3))
    assert found["purity"] == pytest.approx(compactness(*points)["purity"])
    chosen = np.random.default_rng(0).permutation(40)[:25]
    assert compactness(features, labels, sample=25) == compactness(features[chosen], labels[chosen])
