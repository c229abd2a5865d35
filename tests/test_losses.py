"""The deep kNN loss against Eqs. 1-3 in plain loops, at its limits and edges, and in low precision; class weights."""

import math
from functools import partial

import pytest
import reference
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from reference import random_batch

from deepknn_lib.criteria import whole_set_neighbors, whole_set_terms
from deepknn_lib.losses import class_weights, deep_knn_loss, mean_term


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
    hinges = partial(reference.deep_knn_hinges, labels=labels, k=k, m=m, margin=margin)
    assert (hinges(features) == 0).any()  # Both sides of the hinge are compared.
    expected = value_and_gradient(lambda f: hinges(f).mean(), features)
    assert_same(value_and_gradient(deep_knn_loss, features, labels, k, m, margin), expected)
    assert_same(value_and_gradient(deep_knn_loss, features.float(), labels, k, m, margin), expected, 1e-4)
    near = whole_set_neighbors(features, labels, k, m)
    index = torch.cat([torch.arange(24), near.positive.flatten(), near.negative.flatten()])
    found = value_and_gradient(lambda f: mean_term(*whole_set_terms(f[index], near, margin)), features)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("count, mine", [(1, miners.BatchEasyHardMiner), (100, None)])
def test_the_limits_are_the_easy_positive_with_the_hard_negative_and_batch_all(count, mine):
    features, labels = random_batch(count, size=16)
    euclidean = distances.LpDistance(normalize_embeddings=False)
    theirs = losses.TripletMarginLoss(2.0, distance=euclidean, reducer=reducers.MeanReducer())
    mined = mine("easy", "hard", distance=euclidean)(features, labels) if mine else None
    ours = partial(deep_knn_loss, labels=labels, k=count, m=count, margin=2.0)
    assert_same(value_and_gradient(ours, features), value_and_gradient(theirs, features, labels, mined))
    assert torch.autograd.gradcheck(ours, features.requires_grad_())


def test_features_that_are_alike_or_not_finite_or_half_precision():
    features, labels = random_batch(0)
    for factor in (math.nan, math.inf, 1e25):  # The squares of 1e25 overflow; that is no perfect loss.
        assert not deep_knn_loss((factor * features).float(), labels).isfinite()
    low = (100 * features).half()  # The squares overflow float16.
    value, gradient = value_and_gradient(deep_knn_loss, low, labels, margin=70.0)
    assert value == deep_knn_loss(low.float(), labels, margin=70.0) and gradient.isfinite().all()
    features[1::2] = features[::2]  # Every image comes twice, also across classes.
    value, gradient = value_and_gradient(deep_knn_loss, features.float(), labels, margin=0.7)
    assert value > 0 and 0 < gradient.norm() < 10
    value, gradient = value_and_gradient(deep_knn_loss, torch.full((24, 3), 2.0), labels, margin=0.3)
    assert value.item() == pytest.approx(0.3) and (gradient == 0).all()


@pytest.mark.parametrize("labels", [[], [0], [1, 1, 1], [0, 1, 2]])
def test_without_a_triplet_the_loss_is_0_with_a_gradient(labels):
    features, labels = torch.ones(len(labels), 4), torch.tensor(labels).long()
    value, gradient = value_and_gradient(deep_knn_loss, features, labels)
    assert value == 0 and (gradient == 0).all()


def test_class_weights_by_hand():
    labels, plain = torch.tensor([2, 0, 1, 0]), torch.tensor([1.0, 3, 3])  # (N - n) / n: 2/2, 3/1 and 3/1
    torch.testing.assert_close(class_weights(labels, 3), plain / 7)
    torch.testing.assert_close(class_weights(labels, 3, 0.5), plain.sqrt() / plain.sqrt().sum())
