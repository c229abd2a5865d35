"""The deep kNN loss against Eqs. 1-3 in plain loops, at its limits and edges, and in low precision; class weights."""

import math
from functools import partial

import pytest
import reference
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from reference import random_batch

from deepknn_lib.criteria import whole_set_neighbors, whole_set_terms
from deepknn_lib.losses import class_weights, deep_knn_loss, deep_knn_terms, mean_term


def value_and_gradient(loss, features, *args, **kwargs):
    features = features.detach().clone().requires_grad_()
    value = loss(features, *args, **kwargs)
    value.backward()
    return value.detach(), features.grad


def assert_same(found, expected, tolerance=1e-6):
    """Equal within a relative error, of a tensor as a whole."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


@pytest.mark.parametrize("k, m", [(1, 1), (5, 5), (2, 7), (9, 30)])  # The rare classes have fewer than 9.
@pytest.mark.parametrize("normalised, margin", [(False, 0.7), (True, 0.2)])
def test_deep_knn_is_equation_3_in_loops_also_with_neighbours_from_a_whole_set(k, m, normalised, margin):
    features, labels = random_batch(k, normalised=normalised)
    hinges = reference.deep_knn_hinges(features, labels, k, m, margin)
    expected = value_and_gradient(reference.deep_knn_loss, features, labels, k, m, margin)
    assert_same(value_and_gradient(deep_knn_loss, features, labels, k, m, margin), expected)
    assert_same(value_and_gradient(deep_knn_loss, features.float(), labels, k, m, margin), expected, 1e-4)
    terms, valid = deep_knn_terms(features, labels, k, m, margin)
    assert terms.shape == (24, k, m) and (hinges == 0).any()  # Both sides of the hinge were compared.
    torch.testing.assert_close(terms[valid], hinges)
    near = whole_set_neighbors(features, labels, k, m)
    index = torch.cat([torch.arange(24), near.positive.flatten(), near.negative.flatten()])
    assert torch.equal(whole_set_terms(features[index], near, margin)[1], valid)
    found = value_and_gradient(lambda f: mean_term(*whole_set_terms(f[index], near, margin)), features)
    assert_same(found, expected, 1e-5)


def test_by_hand_the_mean_counts_inactive_triplets_and_single_images_are_only_negatives():
    features, labels = torch.tensor([[0.0], [1.0], [3.0], [20.0]]), torch.tensor([0, 0, 1, 2])
    # Anchor 0: 1 + 4 - 3 = 2 and [1 + 4 - 20] = 0. Anchor 1: 1 + 4 - 2 = 3 and 0. The others have no positive.
    assert deep_knn_loss(features, labels, 5, 5, 4.0).item() == pytest.approx((2 + 0 + 3 + 0) / 4)
    assert deep_knn_loss(features, labels, 1, 1, 4.0).item() == pytest.approx((2 + 3) / 2)


@pytest.mark.parametrize("count, kind", [(1, "easy"), (15, "all"), (100, "all")])
def test_the_limits_are_the_easy_positive_with_the_hard_negative_and_batch_all(count, kind):
    features, labels = random_batch(count, size=16)
    euclidean = distances.LpDistance(normalize_embeddings=False)
    theirs = losses.TripletMarginLoss(2.0, distance=euclidean, reducer=reducers.MeanReducer())
    easy = miners.BatchEasyHardMiner("easy", "hard", distance=euclidean)(features, labels)
    expected = value_and_gradient(theirs, features, labels, easy if kind == "easy" else None)
    ours = partial(deep_knn_loss, labels=labels, k=count, m=count, margin=2.0)
    assert_same(value_and_gradient(ours, features), expected)
    assert torch.autograd.gradcheck(ours, features.requires_grad_())


def test_images_that_are_alike_have_a_finite_gradient():
    features, labels = random_batch(0)
    features[1::2] = features[::2]  # Every image comes twice, also across classes.
    for dtype in (torch.float64, torch.float32):
        value, gradient = value_and_gradient(deep_knn_loss, features.to(dtype), labels, margin=0.7)
        assert value > 0 and gradient.isfinite().all() and 0 < gradient.norm() < 10
    value, gradient = value_and_gradient(deep_knn_loss, torch.full((24, 3), 2.0), labels, margin=0.3)
    assert value.item() == pytest.approx(0.3) and (gradient == 0).all()


@pytest.mark.parametrize("labels", [[], [0], [1, 1, 1], [0, 1, 2]])
def test_without_a_triplet_the_loss_is_0_with_a_gradient(labels):
    features, labels = torch.ones(len(labels), 4), torch.tensor(labels).long()
    value, gradient = value_and_gradient(deep_knn_loss, features, labels)
    assert value == 0 and value.dtype == torch.float32
    assert gradient.shape == features.shape and (gradient == 0).all()


def test_features_that_are_not_finite_do_not_give_a_perfect_loss():
    features, labels = random_batch(0)
    for factor in (math.nan, math.inf, 1e25):  # The squares of 1e25 overflow.
        assert not deep_knn_loss((factor * features).float(), labels).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    features, labels = random_batch(0)
    low = (100 * features).to(dtype)  # The squares overflow float16.
    value, gradient = value_and_gradient(deep_knn_loss, low, labels, margin=70.0)
    assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    assert value.item() == pytest.approx(deep_knn_loss(low.double(), labels, margin=70.0).item(), rel=1e-5)
    inside = torch.autocast("cpu", dtype=torch.bfloat16)(deep_knn_loss)
    expected = value_and_gradient(deep_knn_loss, features.float(), labels)
    assert_same(value_and_gradient(inside, features.float(), labels), expected)


def test_no_tensor_is_larger_than_the_distance_matrix():
    features = torch.randn(600, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with reference.LargestTensor() as largest:
        deep_knn_loss(features, torch.arange(600) % 7).backward()
    assert 600 < largest.numel <= 600**2


@pytest.mark.parametrize("features, labels, options, told", [
    (torch.ones(4), torch.ones(4).long(), {}, "shape"),
    (torch.ones(4, 2, 1, 1), torch.ones(4).long(), {}, "flatten"),
    (torch.ones(4, 2).long(), torch.ones(4).long(), {}, "floating point"),
    (torch.ones(4, 2), torch.ones(3).long(), {}, "4 integers"),
    (torch.ones(4, 2), torch.ones(4), {}, "4 integers"),
    *[(*random_batch(0), {name: value}, f"^{name} must be") for name in "km" for value in (0, -1, 1.0, True)],
    *[(*random_batch(0), {"margin": value}, "margin") for value in (-0.1, math.nan, math.inf)],
])  # fmt: skip
def test_bad_batches_counts_and_margins_are_refused(features, labels, options, told):
    with pytest.raises(ValueError, match=told):
        deep_knn_loss(features, labels, **options)


def test_class_weights_by_hand():
    labels, plain = torch.tensor([2, 0, 1, 0]), torch.tensor([1.0, 3, 3])  # (N - n) / n: 2/2, 3/1 and 3/1
    torch.testing.assert_close(class_weights(labels, 3), plain / 7)
    torch.testing.assert_close(class_weights(labels, 3, 0.5), plain.sqrt() / plain.sqrt().sum())
    for bad, n_classes in (([0, 0, 1], 3), ([0, 2], 3), ([0, 1, 2], 2), ([0, 0], 1), ([], 2)):
        with pytest.raises(ValueError, match="class weights"):
            class_weights(torch.tensor(bad, dtype=torch.int64), n_classes)
