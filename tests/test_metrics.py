"""The measures by hand, and the bootstrap on simulated test sets where the truth is known."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from deepknn_lib.metrics import arrival, bootstrap, class_recalls, interval, scores, t_interval


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


# Seeds


def test_equal_seeds_change_nothing():
    correct, groups = simulated(np.random.default_rng(0)), np.arange(len(LABELS)) // 4
    alone = bootstrap(LABELS, correct, 3, 2, groups)
    for rows in (correct[None], np.stack([correct] * 3)):
        together = bootstrap(LABELS, rows, 3, 2, groups)
        assert all(together[name] == pytest.approx(values, abs=1e-9) for name, values in alone.items())


@pytest.mark.parametrize("right", [(0, 1), (0.2, 0.5, 0.9), (0.1, 0.4, 0.5, 0.6, 0.8)])
def test_seeds_alone_spread_as_the_standard_error_of_their_mean(right):
    rows = np.repeat(np.array(right)[:, None], len(LABELS), axis=1)  # all images alike: only the seeds differ
    for values in bootstrap(LABELS, rows, 3, 2, draws=4000).values():
        assert values.mean() == pytest.approx(100 * np.mean(right), abs=2)
        assert values.std() == pytest.approx(100 * np.std(right, ddof=1) / np.sqrt(len(right)), rel=0.06)


def test_seeds_that_differ_widen_the_intervals():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.random(len(LABELS)) < RECALLS[LABELS] - shift for shift in (0, 0.1, 0.3)])
    images, both = bootstrap(LABELS, rows.mean(0), 3, 2), bootstrap(LABELS, rows, 3, 2)
    assert all(width(both[name]) > 1.5 * width(images[name]) for name in both)


def test_intervals_for_images_and_seeds_cover_the_truth():
    """Five seeds whose recalls scatter by 8 points around the truth, on one test set."""
    recalls = np.array([0.7, 0.6, 0.65])
    hits, rng = {"images alone": 0, "images and seeds": 0}, np.random.default_rng(3)
    for test in range(100):
        luck, shifts = rng.random(len(LABELS)), rng.normal(0, 0.08, (5, 1))
        rows = luck < recalls[LABELS] + shifts
        for name, correct in {"images alone": rows.mean(0), "images and seeds": rows}.items():
            low, high = interval(bootstrap(LABELS, correct, 3, 2, draws=300, seed=test)["mcr"])
            hits[name] += low <= 100 * recalls.mean() <= high
    assert hits["images alone"] < 85 and 85 <= hits["images and seeds"] <= 99


def test_t_interval_by_hand():
    low, high = t_interval([1.0, 2.0, 3.0])  # t = 4.3027 with two degrees of freedom
    assert (low, high) == pytest.approx((2 - 4.3027 / np.sqrt(3), 2 + 4.3027 / np.sqrt(3)), abs=1e-4)
    assert t_interval([1.0, 2.0, 3.0], 0.995)[0] < low
    assert np.isnan(t_interval([1.0])).all() and np.isnan(t_interval([])).all()


def test_arrival_is_the_first_epoch_at_the_level_or_one_past_the_last():
    history = [{"epoch": n + 1, "train_acc": value} for n, value in enumerate((50, 80, 70, 90))]
    assert [arrival(history, level) for level in (10, 60, 80, 81, 91)] == [1, 2, 2, 4, 5]


def test_bootstrap_is_decided_by_its_seed():
    correct = simulated(np.random.default_rng(0))
    first, again, other = (bootstrap(LABELS, correct, 3, 2, draws=50, seed=seed) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() and (first[name] != other[name]).any() for name in first)


def test_interval_is_the_central_part():
    values = np.arange(101.0)
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(np.append(values, np.nan), 0.5) == pytest.approx((25, 75))
