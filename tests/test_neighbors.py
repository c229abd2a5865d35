"""Mining, search and vote against scikit-learn and loops; ties, duplicates, precision, memory, errors."""

import importlib
import math
import sys
import types
from itertools import repeat

import numpy as np
import pytest
import reference
import torch
from reference import random_batch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from deepknn_lib import neighbors, search
from deepknn_lib.neighbors import (
    batch_distances,
    batch_neighbors,
    majority_vote,
    mine,
    nearest_neighbors,
    whole_set_neighbors,
)
from deepknn_lib.search import SPARE


def points(count, dim=5, seed=0, dtype=torch.float64):
    return torch.randn(count, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# Mining inside a batch


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k, m", [(1, 1), (5, 5), (2, 9), (30, 30)])
def test_mined_neighbours_are_those_of_the_loops_nearest_first(seed, k, m):
    features, labels = random_batch(seed)
    near = batch_neighbors(features, labels, k, m)
    assert near.positive.shape == near.positive_valid.shape == (24, k)
    assert near.negative.shape == near.negative_valid.shape == (24, m)
    for i in range(24):
        positives, negatives = reference.neighbors(features, labels, i)
        assert near.positive[i][near.positive_valid[i]].tolist() == positives[:k]
        assert near.negative[i][near.negative_valid[i]].tolist() == negatives[:m]
        assert near.positive_valid[i].sum() == min(k, len(positives))  # and those come first
        assert near.positive_valid[i, : len(positives)].all()
        assert near.negative_valid[i, : len(negatives)].all()


@pytest.mark.parametrize("large", [0, 1000])
def test_a_batch_mined_some_anchors_at_a_time_is_the_batch_mined_at_once(large, monkeypatch):
    features, labels = random_batch(3, size=100, classes=30)
    expected = batch_neighbors(features, labels, 4, 5)
    monkeypatch.setattr(neighbors, "LARGE", large)
    monkeypatch.setattr(neighbors, "BLOCK", 700)  # seven anchors, two at the end
    found = batch_neighbors(features, labels, 4, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and not found.positive_valid.all()


def test_where_there_are_too_few_the_index_is_0_and_not_valid():
    near = batch_neighbors(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]), 2, 3)
    assert near.positive.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert near.positive_valid.tolist() == [[True, False], [True, False], [False, False]]
    assert near.negative.tolist() == [[2, 0, 0], [2, 0, 0], [1, 0, 0]]
    assert near.negative_valid.tolist() == [[True, False, False]] * 2 + [[True, True, False]]


def test_an_image_is_not_its_own_positive_but_its_duplicate_is():
    near = batch_neighbors(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), 1, 1)
    assert near.positive.tolist() == [[1], [0], [3], [2]] and near.positive_valid.all()


@pytest.mark.parametrize("scale, dtype", [(1e-3, torch.float32), (1e-6, torch.float64)])
def test_batch_distances_far_from_the_origin_are_those_of_the_loops_without_gradient(scale, dtype):
    features = (1000 + scale * points(30)).to(dtype).requires_grad_()
    found = batch_distances(features)
    exact = features.detach().double()
    truth = torch.stack([reference.distance(a, b) for a in exact for b in exact]).view(30, 30)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6 * scale)
    assert not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batch_distances(features), found)


# Search


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("chunk", [1024, 53, 7, 2])  # in the gallery 16 times as many: 1, 1, 3 and 10 pieces
def test_search_and_vote_are_those_of_scikit_learn(k, chunk):
    queries, gallery = points(53), points(301, seed=1)
    labels = torch.arange(301) % 4
    distances, indices = nearest_neighbors(queries, gallery, k, chunk=chunk)
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(gallery.numpy())
    their_distances, their_indices = search.kneighbors(queries.numpy())
    assert (indices.numpy() == their_indices).all() and indices.dtype == torch.int64
    np.testing.assert_allclose(distances.numpy(), their_distances, rtol=1e-9)

    ours = majority_vote(labels[indices], distances, 4).numpy()
    classifier = KNeighborsClassifier(k, algorithm="brute").fit(gallery.numpy(), labels.numpy())
    shares = np.sort(classifier.predict_proba(queries.numpy()), 1)
    clear = shares[:, -1] > shares[:, -2]  # no tie
    assert clear.sum() > 25 and (ours == classifier.predict(queries.numpy()))[clear].all()


@pytest.mark.parametrize("chunk", [1024, 7, 1])
@pytest.mark.parametrize("k", [1, 4, 39])
def test_leave_one_out_is_the_loop_without_the_image_itself(chunk, k):
    gallery = points(40)
    gallery[20:30] = gallery[:10]  # a duplicate is still found
    distances, indices = nearest_neighbors(gallery, gallery, k, chunk=chunk, exclude_self=True)
    assert torch.equal(indices, reference.search(gallery, gallery, k, exclude_self=True))
    assert (distances[20:30, 0] == 0).all() and (indices != torch.arange(40)[:, None]).all()
    assert torch.equal(nearest_neighbors(gallery, gallery, 1)[0], torch.zeros(40, 1).double())


@pytest.mark.parametrize("chunk", [1024, 2, 1])
def test_equal_distances_keep_the_order_of_the_gallery(chunk):
    gallery = points(8).repeat(9, 1)[torch.randperm(72, generator=torch.Generator().manual_seed(0))]
    queries = points(6, seed=2)
    _, indices = nearest_neighbors(queries, gallery, 12, chunk=chunk)
    assert torch.equal(indices, reference.search(queries, gallery, 12))


def test_a_gallery_of_one_image_many_times_gives_distances_of_0():
    gallery = torch.ones(40, 3)
    distances, indices = nearest_neighbors(gallery, gallery, 3, chunk=1, exclude_self=True)
    assert (distances == 0).all() and (indices != torch.arange(40)[:, None]).all()
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_distances_are_true_far_from_the_origin_in_float32():
    points32 = (1000 + 1e-3 * points(80)).float()  # float32 tells 6e-5 apart there
    distances, indices = nearest_neighbors(points32[:20], points32[20:], 5)
    exact = points32.double()
    truth = torch.cdist(exact[:20], exact[20:], compute_mode="donot_use_mm_for_euclid_dist")
    truth = truth.topk(5, largest=False).values
    torch.testing.assert_close(distances.double(), truth, rtol=1e-5, atol=0)
    assert distances.dtype == torch.float32


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_search_is_exact_in_tight_normalised_classes(spread):
    """As after training: more images in a tiny cluster than candidates to spare."""
    centers = torch.nn.functional.normalize(points(3, 64), dim=1).repeat_interleave(60, 0)
    features = torch.nn.functional.normalize(centers + spread / 8 * points(180, 64, seed=1), dim=1).float()
    distances, indices = nearest_neighbors(features, features, 3, exclude_self=True)
    exact = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    truth = exact.fill_diagonal_(math.inf).topk(3, largest=False)
    torch.testing.assert_close(distances.double(), truth.values, rtol=1e-3, atol=0)
    assert (indices == truth.indices).float().mean() > 0.99


def test_search_under_autocast_and_with_half_features():
    queries, gallery = points(30, dtype=torch.float32), points(300, seed=1, dtype=torch.float32)
    expected = nearest_neighbors(queries, gallery, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_neighbors(queries.requires_grad_(), gallery, 5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not found[0].requires_grad
    halves = queries.half(), gallery.half()
    low = nearest_neighbors(*halves, 5)
    assert low[0].dtype == torch.float32
    assert torch.equal(low[1], nearest_neighbors(halves[0].double(), halves[1].double(), 5)[1])


def test_no_queries_give_an_empty_answer():
    distances, indices = nearest_neighbors(torch.empty(0, 3), torch.ones(4, 3), 2)
    assert distances.shape == indices.shape == (0, 2) and indices.dtype == torch.int64
    assert majority_vote(indices, distances, 2).shape == (0,)


def test_memory_is_bounded_by_the_chunk():
    features = points(1000, 2)
    with reference.LargestTensor() as largest:
        nearest_neighbors(features, features, 5, chunk=20, exclude_self=True)
    assert largest.numel == 16 * 20 * (5 + SPARE)  # candidates; all distances would be 1,000,000


def matters(name):
    """Features whose neighbours float32 products cannot tell, or could get wrong: queries, gallery, k."""
    base = points(300, 16, seed=3)
    galleries = {
        "near-duplicates": 1 + 1e-7 * base,
        "offset": (1e4 + base).float(),
        "huge": 1e25 * base,
        "huge with tiny differences": (1e8 + base).double(),
        "tiny": 1e-22 * base,
        "one outlier": torch.cat([1e-3 * base, torch.full((1, 16), 1e3).double()]),
        "half": base.half(),
        "tight": torch.tensor([1.0, -1.0]).repeat(150)[:, None] + 1e-3 * base,
        "float32 queries": base,
    }
    gallery = galleries[name]
    queries = gallery[:1] if name == "offset" else gallery[:40] + (0 if name == "half" else 1e-2 * gallery.std())
    return (queries.float() if name == "float32 queries" else queries), gallery


MATTERS = ["near-duplicates", "offset", "huge", "huge with tiny differences", "tiny", "one outlier", "half"]
MATTERS += ["tight", "float32 queries"]


@pytest.mark.parametrize("name", MATTERS)
@pytest.mark.parametrize("k", [5, "all"])
def test_search_of_hard_features_is_brute_force_in_float64(name, k):
    queries, gallery = matters(name)
    k = len(gallery) if k == "all" else k
    distances, indices = nearest_neighbors(queries, gallery, k, chunk=7)
    truth = (queries.double()[:, None] - gallery.double()).square().sum(2).sqrt().sort(dim=1, stable=True)
    assert torch.equal(indices, truth.indices[:, :k])
    tolerance = {"rtol": 1e-6 if distances.dtype == torch.float32 else 1e-12, "atol": 0}
    torch.testing.assert_close(distances.double(), truth.values[:, :k], **tolerance)


def products(monkeypatch):
    """The precisions in which candidates are searched from now on, with the number of queries."""
    calls, candidates = [], search._candidates

    def watched(queries, *args):
        calls.append((args[-1], len(queries)))
        return candidates(queries, *args)

    monkeypatch.setattr(search, "_candidates", watched)
    return calls


def test_a_query_too_far_for_float32_products_is_searched_in_float64(monkeypatch):
    calls, gallery = products(monkeypatch), 1e10 * points(60, 4)
    queries = 1e30 * points(3, 4, seed=1)
    for k in (2, 60):  # 60: all rows are candidates
        _, indices = nearest_neighbors(queries.float(), gallery, k)
        assert all(len(set(row)) == k for row in indices.tolist())
        assert calls[-1] == (torch.float64, 3)


def test_no_copy_of_the_gallery_is_made():
    gallery = points(50_000, 8, dtype=torch.float32)
    with reference.LargestTensor() as largest:
        nearest_neighbors(gallery[:10], gallery, 5, chunk=16)
    assert largest.numel <= 16384 * 8 < gallery.numel() / 3


def test_what_float32_proves_is_not_searched_again_and_what_it_cannot_prove_is(monkeypatch):
    calls = products(monkeypatch)
    gallery = torch.cat([points(300, 16), 50 + 1e-6 * points(100, 16, seed=1)]).float()
    nearest_neighbors(gallery[:20], gallery, 5)
    assert calls == [(torch.float32, 20)]
    calls.clear()
    nearest_neighbors(gallery[290:310], gallery, 5)  # ten of them in the tight class
    assert calls == [(torch.float32, 20), (torch.float64, 10)]


@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_the_bound_is_below_every_true_squared_distance_and_not_far(spread):
    queries, gallery = points(50, 64).float(), (1 + spread * points(400, 64, seed=1)).float()
    center, keep = gallery.mean(0), 1 - search.slack(64)
    values, index, largest = search._candidates(
        queries, gallery, center, keep, torch.full((50,), -1), 400, 1024, torch.float32
    )
    low = values.double() + (search.square_norms(queries - center) * keep - search.underflow(64))[:, None]
    true = (queries.double()[:, None] - gallery.double()).square().sum(2).gather(1, index)
    assert largest < search.OVERFLOW and (low < true).all() and (true - low < 1e-4 * true).all()


def test_products_in_lower_precision_are_noticed(monkeypatch):
    calls, gallery = products(monkeypatch), points(200, 8, dtype=torch.float32)
    monkeypatch.setattr(search, "exact_products", lambda device: False)
    expected = torch.cdist(gallery.double(), gallery.double()).topk(3, largest=False).indices
    assert torch.equal(nearest_neighbors(gallery, gallery, 3)[1], expected) and calls == [(torch.float64, 200)]
    monkeypatch.undo()
    assert search.exact_products(torch.device("cpu"))
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
    assert not search.exact_products(torch.device("cpu"))


def rounded_knn(queries, gallery, k):
    """What FAISS may return at worst: squared distances off by all that their rounding allows, and the nearest of those."""
    queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    norms = (queries**2).sum(1)[:, None] + (gallery**2).sum(1)
    sign = np.random.default_rng(0).choice([-1, 1], norms.shape)
    found = np.maximum(norms - 2 * queries @ gallery.T + sign * 1.99 * search.slack(queries.shape[1]) * norms, 0)
    order = found.argsort(1)[:, :k]
    return np.take_along_axis(found, order, 1).clip(max=3e38).astype(np.float32), order


def use_faiss(monkeypatch, knn=None):
    """FAISS for searches of every size from now on, or `knn` in its place; the sizes of what it is asked."""
    asked = []
    if knn is None:
        knn = pytest.importorskip("faiss").knn
    else:
        module = types.ModuleType("faiss")
        module.__spec__ = importlib.machinery.ModuleSpec("faiss", None)
        module.omp_get_max_threads, module.omp_set_num_threads = lambda: 1, lambda threads: None
        monkeypatch.setitem(sys.modules, "faiss", module)

    def watched(queries, gallery, k):
        asked.append((len(queries), len(gallery), k))
        return knn(queries, gallery, k)

    monkeypatch.setattr(sys.modules["faiss"], "knn", watched, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(search, "FAISS_FROM", 0)
    return asked


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("elements", [2**24, 37 * 16])
@pytest.mark.parametrize("name, knn", [*zip([*MATTERS, "ordinary"], repeat(rounded_knn)), ("tight", None), ("half", None)])
def test_search_with_faiss_is_exact_however_it_rounds(name, knn, elements, itself, monkeypatch):
    queries, gallery = (points(40, 16), points(300, 16, seed=1)) if name == "ordinary" else matters(name)
    queries = gallery if itself else queries
    monkeypatch.setattr(search, "FAISS_FROM", math.inf)
    expected = nearest_neighbors(queries, gallery, 6, exclude_self=itself)
    asked, calls = use_faiss(monkeypatch, knn), products(monkeypatch)
    monkeypatch.setattr(search, "FAISS_GALLERY", elements)
    found = nearest_neighbors(queries, gallery, 6, exclude_self=itself)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [rows for _, rows, _ in asked] == ([len(gallery)] if elements == 2**24 else [37] * 8 + [len(gallery) - 37 * 8])
    assert name != "ordinary" or len(calls) == 1  # proven, not searched again


def test_a_neighbour_that_faiss_may_have_lost_is_found_again(monkeypatch):
    """The two nearest are as far off upwards as rounding allows, the others downwards; only the whole bound covers it."""
    unit = search.slack(16) * 32  # a (|q|² + |x|²), as q and x lie 4 from the mean
    squares = torch.cat([torch.full((2,), 5.0), torch.linspace(5.1, 8.5, 30), torch.full((20,), 20.0)]) * unit
    gallery = torch.ones(52, 16, dtype=torch.float64)
    gallery[:, 1] += squares.double().sqrt()
    gallery[1, 1], gallery[1, 2] = 1, gallery[0, 1]  # as near, in another direction
    query, gallery = torch.ones(1, 16, dtype=torch.float64), torch.cat([gallery, -gallery])

    def unlucky(queries, rows, k):
        norms = (queries.astype(np.float64) ** 2).sum(1)[:, None] + (rows.astype(np.float64) ** 2).sum(1)
        exact = ((queries.astype(np.float64)[:, None] - rows) ** 2).sum(2)
        sign = np.where(np.arange(len(rows)) < 2, 1, -1)
        found = np.maximum(exact + sign * 1.9 * search.slack(16) * norms, 0)
        order = found.argsort(1)[:, :k]
        assert not {0, 1} & set(order[0])
        return np.take_along_axis(found, order, 1).astype(np.float32), order

    asked = use_faiss(monkeypatch, unlucky)
    assert set(nearest_neighbors(query, gallery, 2)[1][0].tolist()) == {0, 1} and asked


def test_faiss_is_left_alone_where_it_is_not_or_would_not_pay(monkeypatch):
    gallery = points(300, 16, dtype=torch.float32)
    asked = use_faiss(monkeypatch, rounded_knn)
    for change in (
        (sys, "platform", "darwin"),
        (search, "FAISS_FROM", 300 * 300 * 16 + 1),
        (search, "exact_products", lambda _: False),
    ):
        with monkeypatch.context() as here:
            here.setattr(*change)
            nearest_neighbors(gallery, gallery, 3)
    with monkeypatch.context() as here:
        here.setitem(sys.modules, "faiss", None)  # not installed
        nearest_neighbors(gallery, gallery, 3)
    assert not asked
    nearest_neighbors(gallery, gallery, 3)
    assert asked == [(300, 300, 31)]


@pytest.mark.parametrize("name", [*MATTERS, "ordinary", "too few", "duplicates"])
def test_a_large_batch_is_mined_in_float32_to_the_same_neighbours(name, monkeypatch):
    features = points(300, 16) if name in ("ordinary", "too few", "duplicates") else matters(name)[1]
    if name == "duplicates":
        features[1::2] = features[::2]
    labels = torch.arange(len(features)) % (150 if name == "too few" else 7)
    exact = (features.double()[:, None] - features.double()).square().sum(2).sqrt()
    expected = mine(exact, labels, 4, 5)
    monkeypatch.setattr(neighbors, "LARGE", 0)
    again, old = [], mine
    monkeypatch.setattr(neighbors, "mine", lambda *args: (again.append(args), old(*args))[1])
    found = batch_neighbors(features, labels, 4, 5)
    if name == "duplicates":  # which of two equals comes first is not said
        found, expected = (exact.gather(1, torch.cat(near[:2], 1)) for near in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    certain = {"ordinary": False, "huge": True, "one outlier": True}
    assert bool(again) == certain.get(name, bool(again))  # float64 had to help


@pytest.mark.parametrize(
    "queries, gallery, options, told",
    [
        (torch.ones(3), torch.ones(4, 2), {}, "share D"),
        (torch.ones(3, 2), torch.ones(4, 3), {}, "share D"),
        (torch.ones(3, 2), torch.ones(4, 2), {"k": 0}, "1 <= k <= 4"),
        (torch.ones(3, 2), torch.ones(4, 2), {"k": 5}, "1 <= k <= 4"),
        (torch.ones(4, 2), torch.ones(4, 2), {"k": 4, "exclude_self": True}, "1 <= k <= 3"),
        (torch.ones(3, 2), torch.ones(4, 2), {"exclude_self": True}, "3 and 4 rows"),
        (torch.ones(3, 2), torch.ones(4, 2), {"chunk": 0}, "chunk"),
        (torch.ones(3, 2), torch.ones(4, 2), {"chunk": -5}, "chunk"),
        (torch.full((3, 2), math.nan), torch.ones(4, 2), {}, "NaN"),
        (torch.ones(3, 2), torch.tensor([[1, 2], [1, math.inf]]), {}, "infinity"),
    ],
)
def test_bad_searches_are_refused(queries, gallery, options, told):
    with pytest.raises(ValueError, match=told):
        nearest_neighbors(queries, gallery, **{"k": 1, **options})


@pytest.mark.parametrize("rows_of, spread", [(0, 1e-6), (1, 1e-4)])
def test_a_large_batch_is_certain_only_when_both_sides_are(rows_of, spread, monkeypatch):
    """A wide class whose anchors have near-duplicates as negatives; and, the other way round, as positives."""
    features = torch.cat([points(60, 16), 5 + spread * points(60, 16, seed=1)])
    labels = torch.arange(120) // 60
    exact = (features[:, None] - features).square().sum(2).sqrt()
    expected = mine(exact, labels, 4, 5)
    monkeypatch.setattr(neighbors, "LARGE", 0)
    found, rows = batch_neighbors(features, labels, 4, 5), labels == rows_of
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(found, expected, strict=True))


# Search of a whole set for the loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k, m", [(1, 1), (5, 5), (2, 9), (30, 30)])
def test_whole_set_neighbours_are_those_of_the_loops_and_of_the_batch(seed, k, m):
    features, labels = random_batch(seed)
    assert labels.bincount(minlength=5).min() < 6  # some class has fewer than K + 1 = 6 images
    near = whole_set_neighbors(features, labels, k, m)
    for i in range(24):
        positives, negatives = reference.neighbors(features, labels, i)
        for index, valid, truth, count in (
            (near.positive[i], near.positive_valid[i], positives, k),
            (near.negative[i], near.negative_valid[i], negatives, m),
        ):
            found = min(count, len(truth))
            assert index.tolist() == truth[:found] + [0] * (count - found)
            assert valid.tolist() == [True] * found + [False] * (count - found)
    for ours, theirs in zip(near, batch_neighbors(features, labels, k, m), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_whole_set_neighbours_carry_no_gradient_and_need_no_matrix_of_all_distances():
    features = points(600, 3).requires_grad_()
    labels = torch.arange(600) % 60
    with reference.LargestTensor() as largest:
        near = whole_set_neighbors(features, labels, 2, 3)
    assert largest.numel < 600**2 / 10
    assert not any(part.requires_grad for part in near) and near.positive_valid.all()


def test_a_whole_set_of_one_class_has_no_negatives_and_one_of_single_images_no_positives():
    near = whole_set_neighbors(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([4, 4, 4]), 1, 2)
    assert near.positive.tolist() == [[1], [0], [1]] and near.positive_valid.all()
    assert near.negative.tolist() == [[0, 0]] * 3 and not near.negative_valid.any()
    near = whole_set_neighbors(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([2, 0, 1]), 1, 1)
    assert not near.positive_valid.any() and near.negative.tolist() == [[1], [0], [1]]


@pytest.mark.parametrize(
    "features, labels, options, told",
    [
        (torch.ones(4), torch.ones(4).long(), {}, "shape"),
        (torch.ones(4, 2), torch.ones(3).long(), {}, "4 integers"),
        (torch.ones(4, 2), torch.ones(4).long(), {"k": 0}, "^k must be"),
        (torch.ones(4, 2), torch.ones(4).long(), {"m": 1.0}, "^m must be"),
        (torch.full((4, 2), math.nan), torch.tensor([0, 0, 1, 1]), {}, "NaN"),
    ],
)
def test_a_whole_set_that_cannot_be_meant_is_refused(features, labels, options, told):
    with pytest.raises(ValueError, match=told):
        whole_set_neighbors(features, labels, **options)


# Vote


@pytest.mark.parametrize(
    "labels, distances, winner",
    [
        ([1, 0], [1, 2], 1),  # scikit-learn: 0
        ([0, 1], [2, 1], 1),  # not sorted
        ([2, 1, 1, 2], [1, 2, 3, 4], 2),  # scikit-learn: 1
        ([3, 1, 2, 2, 1], [1, 2, 3, 4, 5], 1),  # the nearest image has no say, its class is not tied
        ([3, 0, 0], [1, 8, 9], 0),  # more votes beat a nearer neighbour
        ([1, 0], [5, 5], 1),  # equally near: the first
    ],
)
def test_a_tie_goes_to_the_class_of_the_nearest_tied_neighbour(labels, distances, winner):
    assert majority_vote(torch.tensor([labels]), torch.tensor([distances]).float(), 4).tolist() == [winner]


def test_scikit_learn_gives_the_tie_to_the_smallest_label_instead():
    gallery, labels, query = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0]), torch.zeros(1, 1)
    distances, indices = nearest_neighbors(query, gallery, 2)
    theirs = KNeighborsClassifier(2, algorithm="brute").fit(gallery.numpy(), labels.numpy())
    assert (majority_vote(labels[indices], distances, 2).item(), theirs.predict(query.numpy())[0]) == (1, 0)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 9])
def test_vote_is_the_loop(k):
    generator = torch.Generator().manual_seed(k)
    labels = torch.randint(4, (200, k), generator=generator)
    distances = torch.rand(200, k, generator=generator)
    expected = [reference.vote(*row) for row in zip(labels, distances, strict=True)]
    assert majority_vote(labels, distances, 4).tolist() == expected
    assert majority_vote(labels, distances, 99).tolist() == expected
    assert majority_vote(labels.to(torch.uint8), distances, 4).tolist() == expected


@pytest.mark.parametrize(
    "labels, distances, told",
    [
        (torch.zeros(2, 3).long(), torch.zeros(2, 4), "K_p"),
        (torch.zeros(3).long(), torch.zeros(3), "K_p"),
        (torch.zeros(2, 0).long(), torch.zeros(2, 0), "K_p"),
        (torch.tensor([[0, 3]]), torch.zeros(1, 2), r"0\.\.2"),
        (torch.tensor([[0, -1]]), torch.zeros(1, 2), r"0\.\.2"),
    ],
)
def test_bad_votes_are_refused(labels, distances, told):
    with pytest.raises(ValueError, match=told):
        majority_vote(labels, distances, 3)
