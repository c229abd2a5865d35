"""The triplet losses against Eqs. 1-3 in plain loops, at their edges, and in low precision; class weights."""

import math

import pytest
import reference
import torch
from reference import random_batch

from deepknn_lib import losses, neighbors
from deepknn_lib.losses import (
    batch_hard_terms,
    batch_hard_triplet_loss,
    class_weights,
    deep_knn_loss,
    deep_knn_terms,
    mean_term,
    whole_set_terms,
)
from deepknn_lib.neighbors import Neighbors, whole_set_neighbors

KM = [(1, 1), (5, 5), (2, 7), (4, 1)]
LOSSES = [deep_knn_loss, batch_hard_triplet_loss]
both_losses = pytest.mark.parametrize("loss", LOSSES)
raw_and_normalised = pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])


def value_and_gradient(loss, features, *args, **kwargs):
    features = features.detach().clone().requires_grad_()
    value = loss(features, *args, **kwargs)
    value.backward()
    return value.detach(), features.grad


def assert_same(found, expected, tolerance=1e-6):
    """Equal within a relative error, of a tensor as a whole."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


# Equations


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k, m", KM)
@raw_and_normalised
def test_deep_knn_is_equation_3_in_loops_with_its_gradient(seed, k, m, normalised):
    features, labels = random_batch(seed, normalised=normalised)
    margin = 0.2 if normalised else 0.7
    triplets = reference.deep_knn_triplets(features, labels, k, m)
    expected = value_and_gradient(reference.mean_hinge, features, triplets, margin)
    assert_same(value_and_gradient(deep_knn_loss, features, labels, k, m, margin), expected)
    assert_same(value_and_gradient(deep_knn_loss, features.float(), labels, k, m, margin), expected, 1e-4)
    terms, valid = deep_knn_terms(features, labels, k, m, margin)
    assert valid.sum() == len(triplets)
    assert (terms[valid] == 0).any() and (terms[valid] > 0).any()  # both sides of the hinge were compared


@pytest.mark.parametrize("large", [0, 2**25], ids=["mined in float32", "in float64"])
@pytest.mark.parametrize("cached", [1, 100, 2**16])
@pytest.mark.parametrize("size, scale, apart", [(24, 1.0, 0), (60, 1.0, 0), (60, 1e-6, 1)])
def test_pieces_and_precision_of_mining_do_not_change_equation_3(large, cached, size, scale, apart, monkeypatch):
    monkeypatch.setattr(neighbors, "LARGE", large)
    monkeypatch.setattr(losses, "CACHED", cached)
    features, labels = random_batch(1, size=size)
    features = apart + scale * features  # all within 1e-5 of one another, or not
    expected = value_and_gradient(reference.mean_hinge, features, reference.deep_knn_triplets(features, labels, 3, 4), 0.7)
    assert_same(value_and_gradient(deep_knn_loss, features, labels, 3, 4, 0.7), expected)


@pytest.mark.parametrize("seed", range(6))
@raw_and_normalised
def test_batch_hard_is_hermans_equation_5_in_loops_with_its_gradient(seed, normalised):
    features, labels = random_batch(seed, normalised=normalised)
    features = features * torch.where(torch.arange(len(labels)) % 3 == 0, 1.0, 0.3)[:, None]
    triplets = reference.batch_hard_triplets(features, labels)
    expected = value_and_gradient(reference.mean_hinge, features, triplets, 0.2)
    assert_same(value_and_gradient(batch_hard_triplet_loss, features, labels, 0.2), expected)
    assert batch_hard_terms(features, labels)[1].sum() == len(triplets)


def test_terms_are_laid_out_by_anchor_positive_and_negative():
    features, labels = random_batch(1)
    terms, valid = deep_knn_terms(features, labels, 3, 4, 0.7)
    assert terms.shape == valid.shape == (24, 3, 4)
    for i in range(24):
        positives, negatives = reference.neighbors(features, labels, i)
        for k, m in zip(*valid[i].nonzero(as_tuple=True), strict=True):
            assert terms[i, k, m] == pytest.approx(
                float(reference.mean_hinge(features, [(i, positives[k], negatives[m])], 0.7)), rel=1e-9
            )


def test_by_hand_the_mean_counts_inactive_triplets_and_single_images_are_only_negatives():
    features = torch.tensor([[0.0], [1.0], [3.0], [20.0]])
    labels = torch.tensor([0, 0, 1, 2])
    # anchor 0: 1 + 4 - 3 = 2 and [1 + 4 - 20] = 0; anchor 1: 1 + 4 - 2 = 3 and 0; the others have no positive
    assert deep_knn_loss(features, labels, 5, 5, 4.0).item() == (2 + 0 + 3 + 0) / 4
    assert deep_knn_loss(features, labels, 1, 1, 4.0).item() == (2 + 3) / 2
    assert batch_hard_triplet_loss(features, labels, 4.0).item() == (2 + 3) / 2


def test_by_hand_deep_knn_takes_the_nearest_positive_and_batch_hard_the_furthest():
    features = torch.tensor([[0.0], [1.0], [5.0], [7.0]])
    labels = torch.tensor([0, 0, 0, 1])
    # easy positives: 1 + 3 - 7 < 0, 1 + 3 - 6 < 0, 4 + 3 - 2; hard ones: 5 + 3 - 7, 4 + 3 - 6, 5 + 3 - 2
    assert deep_knn_loss(features, labels, 1, 1, 3.0).item() == pytest.approx((0 + 0 + 5) / 3)
    assert batch_hard_triplet_loss(features, labels, 3.0).item() == pytest.approx((1 + 1 + 6) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_one_neighbour_each_is_easy_positive_hard_negative(seed):
    features, labels = random_batch(seed)
    hinges = []
    for i in range(len(labels)):
        to = [reference.distance(features[i], f) for f in features]
        same = [to[j] for j in range(len(labels)) if labels[j] == labels[i] and j != i]
        other = [to[j] for j in range(len(labels)) if labels[j] != labels[i]]
        hinges += [max(0.0, float(min(same) + 0.7 - min(other)))] if same and other else []
    mean = sum(hinges) / len(hinges)
    assert deep_knn_loss(features, labels, 1, 1, 0.7).item() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("seed, many", [(0, 15), (1, 16), (2, 100)])
def test_many_neighbours_are_batch_all(seed, many):
    features, labels = random_batch(seed, size=16)
    triplets = reference.batch_all_triplets(labels.tolist())
    assert_same(
        value_and_gradient(deep_knn_loss, features, labels, many, many, 0.7),
        value_and_gradient(reference.mean_hinge, features, triplets, 0.7),
    )
    assert deep_knn_terms(features, labels, many, many)[1].sum() == len(triplets)


@both_losses
@raw_and_normalised
def test_gradcheck(loss, normalised):
    features, labels = random_batch(3, size=14, dim=4, classes=3, normalised=normalised)
    assert torch.autograd.gradcheck(lambda f: loss(f, labels, margin=0.5), features.requires_grad_())


@both_losses
def test_order_of_the_batch_and_names_of_the_classes_do_not_matter(loss):
    features, labels = random_batch(5)
    value, gradient = value_and_gradient(loss, features, labels)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert_same(value_and_gradient(loss, features[order], labels[order]), (value, gradient[order]), 1e-9)
    names = torch.tensor([7, -3, 1000, 0, 2])
    assert_same(value_and_gradient(loss, features, names[labels]), (value, gradient), 1e-12)
    assert_same(value_and_gradient(loss, features, labels.to(torch.uint8)), (value, gradient), 1e-12)


def soft_mean(features, triplets):
    """ln(1 + exp(d(anchor, positive) − d(anchor, negative))), one triplet after the other."""
    to = reference.distance
    gaps = [to(features[i], features[y]) - to(features[i], features[z]) for i, y, z in triplets]
    return sum((1 + gap.exp()).log() for gap in gaps) / len(triplets)


@pytest.mark.parametrize("seed", range(4))
@raw_and_normalised
def test_the_soft_margin_in_loops_with_its_gradient(seed, normalised):
    features, labels = random_batch(seed, normalised=normalised)
    expected = value_and_gradient(soft_mean, features, reference.batch_hard_triplets(features, labels))
    for margin in (0.0, 0.2, 5.0):  # it has none
        assert_same(value_and_gradient(batch_hard_triplet_loss, features, labels, margin, soft=True), expected)
    assert_same(value_and_gradient(batch_hard_triplet_loss, features.float(), labels, soft=True), expected, 1e-4)


def test_the_soft_margin_is_the_softplus_of_the_hinge_without_its_margin():
    features, labels = random_batch(4)
    soft, valid = batch_hard_terms(features, labels, soft=True)
    hinge, _ = batch_hard_terms(features, labels, margin=100.0)  # so large that no hinge is cut off
    gap = hinge - 100
    assert valid.sum() > 15 and (gap[valid] > 0).any() and (gap[valid] < 0).any()
    torch.testing.assert_close(soft[valid], torch.nn.functional.softplus(gap)[valid], rtol=1e-9, atol=0)
    assert (soft[valid] > gap[valid].relu()).all()  # so it never stops pulling


def test_the_soft_margin_at_equal_distances_is_ln_2_with_a_finite_gradient():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    value, gradient = value_and_gradient(batch_hard_triplet_loss, corners[:3], torch.tensor([0, 0, 1]), soft=True)
    # anchor 0: 1 - 1; anchor 1: 1 - sqrt(2)
    expected = (math.log(2) + math.log1p(math.exp(1 - math.sqrt(2)))) / 2
    assert value.item() == pytest.approx(expected) and gradient.isfinite().all() and gradient.abs().sum() > 0
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    value, gradient = value_and_gradient(batch_hard_triplet_loss, torch.full((6, 3), 2.0), labels, soft=True)
    assert value.item() == pytest.approx(math.log(2)) and (gradient == 0).all()  # one point: nothing to pull at


def whole_batch(features, near):
    """Anchors, then their positives, then their negatives: the batch that `whole_set_terms` is given."""
    index = torch.cat([torch.arange(len(features)), near.positive.flatten(), near.negative.flatten()])
    return features[index]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k, m", [*KM, (9, 30)])  # the last: more than the rare classes have
def test_searched_in_the_whole_set_is_searched_in_the_batch_when_the_batch_is_the_set(seed, k, m):
    features, labels = random_batch(seed)

    def searched(features):
        near = whole_set_neighbors(features.detach(), labels, k, m)
        return mean_term(*whole_set_terms(whole_batch(features, near), near, 0.7))

    terms, valid = deep_knn_terms(features, labels, k, m, 0.7)
    near = whole_set_neighbors(features, labels, k, m)
    found, found_valid = whole_set_terms(whole_batch(features, near), near, 0.7)
    assert torch.equal(found_valid, valid) and found.shape == terms.shape
    torch.testing.assert_close(found[valid], terms[valid], rtol=1e-9, atol=0)
    expected = value_and_gradient(deep_knn_loss, features, labels, k, m, 0.7)
    assert_same(value_and_gradient(searched, features), expected)


def test_a_few_anchors_with_neighbours_from_the_whole_set_by_hand():
    features = torch.tensor([[0.0], [1.0], [3.0], [20.0], [6.0]])
    labels = torch.tensor([0, 0, 1, 2, 1])
    near = Neighbors(*(part[[2, 0, 3]] for part in whole_set_neighbors(features, labels, 2, 2)))
    index = torch.cat([torch.tensor([2, 0, 3]), near.positive.flatten(), near.negative.flatten()])
    terms, valid = whole_set_terms(features[index], near, 4.0)
    # of 3: 3 + 4 - 2 and 3 + 4 - 3; of 0: 1 + 4 - 3 and [1 + 4 - 6]; 20 is alone; no class has a second positive
    assert valid.tolist() == [[[True, True], [False, False]], [[True, True], [False, False]], [[False] * 2] * 2]
    assert terms[valid].tolist() == [5, 4, 2, 0]
    assert mean_term(terms, valid).item() == (5 + 4 + 2) / 4


# Edges


@both_losses
def test_duplicate_images_have_a_finite_gradient(loss):
    features, labels = random_batch(0)
    features[1::2] = features[::2]  # every image twice, also across classes
    value, gradient = value_and_gradient(loss, features, labels, margin=0.7)
    assert value > 0 and gradient.isfinite().all() and gradient.abs().sum() > 0


@both_losses
def test_all_images_alike_give_the_margin_and_no_gradient(loss):
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    value, gradient = value_and_gradient(loss, torch.full((6, 3), 2.0), labels, margin=0.3)
    assert value.item() == pytest.approx(0.3) and (gradient == 0).all()


@pytest.mark.parametrize("apart", [0.0, 1000.0], ids=["one offset", "two offsets"])
def test_near_duplicates_far_from_the_origin_keep_their_distances_in_float32(apart):
    noise, labels = random_batch(2, size=60, classes=3)
    side = torch.where(torch.arange(60) % 2 == 0, apart, -apart)[:, None]
    features = (1000 + side + 1e-3 * noise).float()  # float32 tells 6e-5 apart there
    exact = features.double()
    found = losses._distances(features, torch.arange(60).roll(2)[:, None])[:, 0]
    truth = torch.stack([reference.distance(a, b) for a, b in zip(exact, exact.roll(2, 0), strict=True)])
    torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=0)
    triplets = reference.deep_knn_triplets(exact, labels, 3, 3)
    expected = value_and_gradient(reference.mean_hinge, exact, triplets, 1e-3)
    assert_same(value_and_gradient(deep_knn_loss, features, labels, 3, 3, 1e-3), expected, 1e-3)
    triplets = reference.batch_hard_triplets(exact, labels)
    expected = value_and_gradient(reference.mean_hinge, exact, triplets, 1e-3)[0]
    assert_same([batch_hard_triplet_loss(features, labels, 1e-3)], [expected], 1e-3)


def test_pulls_by_image_are_those_of_the_pairs_one_by_one():
    """The first is what a CPU does, the second what a GPU does."""
    features, generator = random_batch(0)[0], torch.Generator().manual_seed(0)
    indices = torch.randint(24, (10, 7), generator=generator)
    weight = torch.randn(10, 7, dtype=torch.float64, generator=generator)
    pairs = torch.arange(10).repeat_interleave(7), indices.flatten(), weight.flatten()
    found = losses._pull(features, *pairs, torch.zeros_like(features))
    torch.testing.assert_close(losses._sum_pulls(features, indices, weight), found, rtol=1e-9, atol=1e-12)
    expected = torch.zeros_like(features)
    for i, j, w in zip(*(part.tolist() for part in pairs), strict=True):
        expected[i] += w * (features[i] - features[j])
        expected[j] -= w * (features[i] - features[j])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@both_losses
def test_near_duplicates_keep_their_gradient_in_float32(loss):
    """Each image has a twin so near that (Σ w) x_i − Σ w x_j would cancel; of the other class, so that it pulls alone."""
    features, labels = random_batch(2, size=60, classes=3)
    features[1::2] = features[::2] + 1e-5 * features[1::2]
    labels[1::2] = (labels[::2] + 1) % 3
    expected = value_and_gradient(loss, features.float().double(), labels, margin=0.7)
    assert_same(value_and_gradient(loss, features.float(), labels, margin=0.7), expected, 1e-5)


@pytest.mark.parametrize("per_class", [2, 3, 6])
def test_fewer_than_k_positives_use_those_there_are(per_class):
    labels = torch.arange(3).repeat_interleave(per_class)
    features = random_batch(0, size=len(labels))[0]
    _, valid = deep_knn_terms(features, labels, 5, 4)
    assert valid.sum() == 3 * per_class * (per_class - 1) * min(4, 2 * per_class)
    assert deep_knn_loss(features, labels, 5, 4) == deep_knn_loss(features, labels, per_class - 1, 4)


@both_losses
@pytest.mark.parametrize("labels", [[], [0], [1, 1, 1], [0, 1, 2]])
def test_without_a_triplet_the_loss_is_0_with_a_gradient(loss, labels):
    features = torch.ones(len(labels), 4)
    value, gradient = value_and_gradient(loss, features, torch.tensor(labels, dtype=torch.int64))
    assert value == 0 and value.dtype == torch.float32
    assert gradient.shape == features.shape and (gradient == 0).all()


@both_losses
def test_nan_features_give_a_nan_loss_and_not_a_perfect_one(loss):
    features, labels = random_batch(0)
    features[:] = math.nan
    assert loss(features, labels).isnan() and deep_knn_loss(features, labels, 1, 1).isnan()


@both_losses
def test_features_that_overflow_do_not_give_a_perfect_loss(loss):
    features, labels = random_batch(0)
    assert not loss(1e25 * features.float(), labels).isfinite()


# Precision


@both_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(loss, dtype):
    features, labels = random_batch(0)
    features = (100 * features).to(dtype)  # their squares overflow float16
    value, gradient = value_and_gradient(loss, features, labels, margin=70.0)
    expected = loss(features.double(), labels, margin=70.0)
    assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@both_losses
def test_autocast_does_not_lower_the_precision(loss):
    features, labels = random_batch(0)
    features = features.float()
    expected = value_and_gradient(loss, features, labels, margin=0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradient(loss, features, labels, margin=0.7)
        low = torch.nn.Linear(6, 8, bias=False)(features)
        assert low.dtype == torch.bfloat16 and loss(low, labels).dtype == torch.float32
    assert found[0].dtype == torch.float32
    assert_same(found, expected, 1e-6)


def test_float64_stays_float64():
    features, labels = random_batch(0)
    assert all(loss(features, labels).dtype == torch.float64 for loss in LOSSES)


@both_losses
def test_no_tensor_is_larger_than_the_distance_matrix(loss):
    size = 2000
    features = torch.randn(size, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with reference.LargestTensor() as largest:
        loss(features, torch.arange(size) % 7).backward()
    assert size < largest.numel <= size**2


# Errors


@both_losses
@pytest.mark.parametrize(
    "features, labels, told",
    [
        (torch.ones(4), torch.ones(4).long(), "shape"),
        (torch.ones(4, 2, 1, 1), torch.ones(4).long(), "flatten"),
        (torch.ones(4, 2).long(), torch.ones(4).long(), "floating point"),
        (torch.ones(4, 2), torch.ones(3).long(), "4 integers"),
        (torch.ones(4, 2), torch.ones(4), "4 integers"),
        (torch.ones(4, 2), torch.ones(4, 1).long(), "4 integers"),
    ],
)
def test_bad_batches_are_refused(loss, features, labels, told):
    with pytest.raises(ValueError, match=told):
        loss(features, labels)


@pytest.mark.parametrize("name", ["k", "m"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None])
def test_bad_counts_are_refused(name, value):
    features, labels = random_batch(0)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        deep_knn_loss(features, labels, **{name: value})


@both_losses
@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_bad_margins_are_refused(loss, margin):
    with pytest.raises(ValueError, match="margin"):
        loss(*random_batch(0), margin=margin)


# Class weights


def test_class_weights_by_hand():
    # (N - n) / n: 1/3 and 3, then 2/2, 3/1 and 3/1
    torch.testing.assert_close(class_weights(torch.tensor([0, 1, 0, 0]), 2), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(class_weights(torch.tensor([2, 0, 1, 0]), 3), torch.tensor([1, 3, 3]) / 7)


@pytest.mark.parametrize(
    "labels, n_classes", [([0, 0, 1], 3), ([0, 2], 3), ([0, 1, 2], 2), ([0, 0], 1), ([], 2)]
)
def test_class_weights_need_an_image_of_each_of_two_classes(labels, n_classes):
    with pytest.raises(ValueError, match="class weights"):
        class_weights(torch.tensor(labels, dtype=torch.int64), n_classes)
