"""Mining, search and vote against scikit-learn and loops; ties, precision, memory."""

import math

import numpy as np
import pytest
import reference
import torch
from reference import random_batch
from sklearn.neighbors import KNeighborsClassifier

from deepknn_lib.criteria import whole_set_neighbors
from deepknn_lib.neighbors import batch_neighbors, majority_vote, nearest_neighbors, pairwise_distances


def points(count, dim=5, seed=0):
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mine", [batch_neighbors, whole_set_neighbors])
@pytest.mark.parametrize("k, m", [(1, 1), (2, 9), (30, 30)])
def test_mined_neighbours_are_those_of_the_loops_nearest_first(mine, k, m):
    features, labels = random_batch(k)
    near = mine(features.requires_grad_(), labels, k, m)
    for i in range(24):
        for side, truth in enumerate(reference.neighbors(features, labels, i)):
            assert near[side][i][near[side + 2][i]].tolist() == truth[: (k, m)[side]]
    alike = mine(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), np.int64(1), 1)
    assert alike.positive.tolist() == [[1], [0], [3], [2]]  # No image is its own positive; its duplicate is.


def exact_distances(features):
    return torch.cdist(*[features.double()] * 2, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("scale, dtype", [(1e-2, torch.float32), (1e-6, torch.float64)])
def test_distances_far_from_the_origin_are_right_also_under_autocast(scale, dtype):
    features = (1000 + scale * points(60)).to(dtype)
    truth = exact_distances(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, (nearest, _) = pairwise_distances(features), nearest_neighbors(features[:20], features[20:], 5)
    torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-3 * scale)
    best = truth[:20, 20:].topk(5, largest=False).values
    torch.testing.assert_close(nearest, best.to(dtype), rtol=1e-3, atol=0)


@pytest.mark.parametrize("k, chunk", [(1, 1024), (5, 1024), (9, 7), (5, 2)])
def test_search_and_vote_are_those_of_scikit_learn(k, chunk):
    queries, gallery, labels = points(53).half().double(), points(301, seed=1), torch.arange(301) % 4
    distances, indices = nearest_neighbors(queries, gallery, k, chunk=chunk)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(gallery.numpy(), labels.numpy())
    their_distances, their_indices = theirs.kneighbors(queries.numpy())
    assert (indices.numpy() == their_indices).all()
    np.testing.assert_allclose(distances.numpy(), their_distances, rtol=1e-9)
    half, none = (nearest_neighbors(part.half(), gallery, k) for part in (queries, queries[:0]))
    assert torch.equal(half[1], indices) and none[0].shape == none[1].shape == (0, k)
    shares = np.sort(theirs.predict_proba(queries.numpy()), 1)
    clear = shares[:, -1] > shares[:, -2]  # There is no tie.
    ours = majority_vote(labels[indices], distances, 4).numpy()
    assert clear.sum() > 25 and (ours == theirs.predict(queries.numpy()))[clear].all()


@pytest.mark.parametrize("k, chunk, itself", [(4, 1024, True), (71, 1, True), (12, 9, False), (12, 2, False)])
def test_duplicates_keep_the_order_of_the_gallery_and_only_the_image_itself_is_left_out(k, chunk, itself):
    gallery = points(8).repeat(9, 1)[torch.randperm(72, generator=torch.Generator().manual_seed(0))]
    distances, indices = nearest_neighbors(gallery, gallery, k, chunk=chunk, exclude_self=itself)
    assert torch.equal(indices, reference.search(gallery, gallery, k, itself)) and not distances[:, 0].any()


@pytest.mark.parametrize("width", [1e-2, 1e-5])
def test_search_in_tight_classes_is_exact_within_what_the_docstring_says(width):
    """As after training: more images lie in a tiny cluster than there are candidates to spare."""
    centers = torch.nn.functional.normalize(points(3, 64), dim=1).repeat_interleave(60, 0)
    features = (centers + width / 8 * points(180, 64, seed=1)).float()
    distances, indices = nearest_neighbors(features, features, 3, exclude_self=True)
    truth = exact_distances(features).fill_diagonal_(math.inf).topk(3, largest=False)
    assert (distances.double().square() - truth.values.square()).abs().max() < 1e-6
    assert (indices == truth.indices).float().mean() > 0.99 or width < 1e-2


def test_rows_far_from_all_others_blur_no_distance():
    gallery = torch.cat([points(200), torch.full((3, 5), 1e8)])
    _, indices = nearest_neighbors(gallery, gallery, 3)
    assert torch.equal(indices, reference.search(gallery, gallery, 3, False))
    for scale in (1e-30, 1e30):  # The squares of such numbers are 0, or infinite, in float32.
        distances, found = nearest_neighbors(*[gallery[:200].float() * scale] * 2, 3)
        assert torch.equal(found, indices[:200]) and 0 < distances[:, 1].min() <= distances.max() < math.inf


def test_memory_is_bounded_by_the_chunk():
    with reference.LargestTensor() as largest:
        nearest_neighbors(points(1000, 2), points(1000, 2), 5, chunk=15, exclude_self=True)
    assert largest.numel <= 5000  # All distances would be 1,000,000; the answer is 5,000.


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_a_tied_vote_goes_to_the_nearest_tied_neighbour_then_to_the_earlier_column(k):
    labels, distances = torch.randint(4, (200, k)), torch.randint(9, (200, k)).float()
    expected = [reference.vote(*row) for row in zip(labels, distances, strict=True)]
    for classes, kind in ((4, torch.int64), (99, torch.uint8)):
        assert majority_vote(labels.to(kind), distances, classes).tolist() == expected
