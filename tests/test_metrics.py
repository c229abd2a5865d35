"""The measures by hand, and the bootstrap on simulated test sets where the truth is known."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from deepknn_lib.metrics import bootstrap, class_recalls, interval, scores


def width(values, level=0.95):
    low, high = interval(values, level)
    return high - low


# Acc, MCR, RS


def test_scores_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 1, 2, 0, 1])
    np.testing.assert_allclose(class_recalls(labels, predictions, 3), [3 / 4, 1 / 2, 0])
    found = scores(labels, predictions, 3, smallest=1)
    assert found == pytest.approx({"acc": 50, "mcr": 100 * (3 / 4 + 1 / 2 + 0) / 3, "rs": 50})
    assert all(type(value) is float for value in found.values())


def test_a_class_without_test_images_is_left_out():
    labels, predictions = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2])
    np.testing.assert_array_equal(class_recalls(labels, predictions, 4), [0.5, np.nan, 1, np.nan])
    found = scores(labels, predictions, 4, smallest=1)
    assert found["mcr"] == 75 and np.isnan(found["rs"])


def test_mcr_is_scikit_learns_balanced_accuracy():
    rng = np.random.default_rng(0)
    labels, predictions = rng.choice(5, 300, p=[0.6, 0.2, 0.1, 0.06, 0.04]), rng.integers(0, 5, 300)
    found = scores(labels, predictions, 5, smallest=4)
    assert found["mcr"] == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
    assert found["rs"] == pytest.approx(100 * np.mean(predictions[labels == 4] == 4))


@pytest.mark.parametrize(
    "labels, predictions", [([], []), ([0, 1], [0]), ([[0, 1]], [[0, 1]]), ([0, 1, 3], [0, 1, 3])]
)
def test_bad_predictions_are_refused(labels, predictions):
    with pytest.raises(ValueError):
        scores(np.array(labels, dtype=int), np.array(predictions, dtype=int), 3, 0)


# Bootstrap

SIZES, RECALLS = np.array([200, 80, 40]), np.array([0.9, 0.6, 0.75])
LABELS = np.repeat([0, 1, 2], SIZES)


def simulated(rng, views=1):
    """Which images are right in one test set; with views, those of one group are right together."""
    return np.repeat(rng.random(len(LABELS) // views) < RECALLS[LABELS[::views]], views)


def covered(level, tests=150):
    """How often the intervals of simulated test sets hold the truth."""
    rng = np.random.default_rng(1)
    truth = {"acc": 100 * SIZES @ RECALLS / SIZES.sum(), "mcr": 100 * RECALLS.mean(), "rs": 100 * RECALLS[2]}
    hits = dict.fromkeys(truth, 0)
    for test in range(tests):
        draws = bootstrap(LABELS, simulated(rng), 3, 2, draws=200, seed=test)
        for name, value in truth.items():
            low, high = interval(draws[name], level)
            hits[name] += low <= value <= high
    return {name: count / tests for name, count in hits.items()}


def test_intervals_cover_the_truth_as_often_as_they_say():
    assert all(0.88 <= share <= 0.99 for share in covered(0.95).values())
    assert all(0.38 <= share <= 0.63 for share in covered(0.5).values())


def test_bootstrap_centres_on_the_score_with_the_binomial_spread():
    correct = simulated(np.random.default_rng(0))
    draws = bootstrap(LABELS, correct, 3, 2)
    predictions = np.where(correct, LABELS, (LABELS + 1) % 3)
    for name, value in scores(LABELS, predictions, 3, 2).items():
        assert draws[name].shape == (2000,) and draws[name].mean() == pytest.approx(value, abs=0.5)
    recall = correct[LABELS == 2].mean()
    assert draws["rs"].std() == pytest.approx(100 * np.sqrt(recall * (1 - recall) / 40), rel=0.1)


def test_views_that_are_right_together_widen_the_intervals():
    correct = simulated(np.random.default_rng(0), views=4)
    groups = np.arange(len(LABELS)) // 4
    alone, together = bootstrap(LABELS, correct, 3, 2), bootstrap(LABELS, correct, 3, 2, groups)
    for name in alone:  # a quarter of the independent images: intervals twice as wide
        assert 1.7 < width(together[name]) / width(alone[name]) < 2.3


def test_groups_may_have_any_name_and_size():
    correct = simulated(np.random.default_rng(0))
    groups = np.random.default_rng(1).integers(0, 60, len(LABELS))
    found = bootstrap(LABELS, correct, 3, 2, groups)
    named = bootstrap(LABELS, correct, 3, 2, np.array([f"lesion {g:02}" for g in groups]))
    assert all((found[name] == named[name]).all() for name in found)
    own = bootstrap(LABELS, correct, 3, 2, np.arange(len(LABELS)))
    assert all((own[name] == values).all() for name, values in bootstrap(LABELS, correct, 3, 2).items())


def test_group_recall_weighs_images_not_groups():
    """One lesion with three views and one with one; a draw holds each twice or both."""
    draws = bootstrap(np.zeros(4, dtype=int), np.array([1, 1, 1, 0]), 1, 0, np.array([5, 5, 5, 9]), draws=400)
    assert set(np.round(draws["rs"], 6)) == {0, 75, 100}
    assert np.mean(draws["rs"] == 75) == pytest.approx(0.5, abs=0.1)


def test_classes_keep_their_share_and_stay_present():
    labels = np.array([0] * 9 + [1])
    draws = bootstrap(labels, np.array([1.0] * 9 + [0]), 2, 1)
    for name, value in {"acc": 90, "mcr": 50, "rs": 0}.items():
        np.testing.assert_allclose(draws[name], value)


def test_a_class_without_test_images_does_not_count():
    draws = bootstrap(np.array([0, 0, 2]), np.array([1, 1, 0]), 4, 3, draws=50)
    assert draws["acc"] == pytest.approx(200 / 3) and (draws["mcr"] == 50).all()
    assert np.isnan(draws["rs"]).all()


def test_the_difference_of_a_method_and_itself_is_exactly_0():
    correct = simulated(np.random.default_rng(0)).astype(float)
    draws = bootstrap(LABELS, correct - correct, 3, 2, np.arange(len(LABELS)) // 3)
    assert all((values == 0).all() and interval(values) == (0, 0) for values in draws.values())


def test_pairing_narrows_the_difference_of_similar_methods():
    rng = np.random.default_rng(0)
    first = simulated(rng).astype(float)
    second = np.where(rng.random(len(first)) < 0.05, 1 - first, first)
    paired = bootstrap(LABELS, first - second, 3, 2)
    apart = bootstrap(LABELS, first, 3, 2, seed=1)["acc"] - bootstrap(LABELS, second, 3, 2, seed=2)["acc"]
    assert paired["acc"].mean() == pytest.approx(100 * (first.mean() - second.mean()), abs=0.2)
    assert width(paired["acc"]) < 0.7 * width(apart)


def test_the_mean_over_seeds_is_scored_as_it_is():
    draws = bootstrap(LABELS, np.full(len(LABELS), 0.6), 3, 2, draws=20)
    assert all(values == pytest.approx(60) for values in draws.values())


def test_bootstrap_is_decided_by_its_seed():
    correct = simulated(np.random.default_rng(0))
    first, again, other = (bootstrap(LABELS, correct, 3, 2, draws=50, seed=seed) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() and (first[name] != other[name]).any() for name in first)


def test_interval_is_the_central_part():
    values = np.arange(101.0)
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(np.append(values, np.nan), 0.5) == pytest.approx((25, 75))
