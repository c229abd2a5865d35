"""Neighbours: mined inside a batch for the loss, searched in the gallery for the vote.

Both searches return indices and carry no gradient; the paper puts it so: "the search process is not involved
in the derivative of extractor parameters" (Section 2.2).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepknn_lib.search import OVERFLOW, exact_products, measure, nearest, slack, square_norms, underflow

LARGE = 1024  # images from which on a batch is mined in float32
BLOCK = 2**20  # scores at a time on a CPU


class Neighbors(NamedTuple):
    """The K nearest positives and M nearest negatives of every anchor, nearest first.

    Attributes
    ----------
    positive : Tensor, int64, (B, K)
        Row i: batch indices of the images of i's class nearest to i, without i itself (the paper's y_k).
    negative : Tensor, int64, (B, M)
        Row i: batch indices of the images of other classes nearest to i (the paper's z_m).
    positive_valid, negative_valid : Tensor, bool, (B, K) and (B, M)
        False where the batch holds fewer than K positives or M negatives; the index there is 0 and means nothing.
    """

    positive: Tensor
    negative: Tensor
    positive_valid: Tensor
    negative_valid: Tensor


@torch.no_grad()
def batch_distances(features: Tensor) -> Tensor:
    """Euclidean distances between all pairs of a batch, to rank them by: float64 (B, B), no gradient.

    From one matrix product, centred and in float64, so that near-duplicates keep their order. The losses measure
    the few distances they need again, from differences.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.double()
        if len(features) <= 25:
            return torch.cdist(features, features)  # from differences
        features = features - features.mean(0)
        norms = features.square().sum(1)
        return torch.addmm(norms, features, features.T, alpha=-2).add_(norms[:, None]).clamp_(min=0).sqrt_()


def check_batch(features: Tensor, labels: Tensor, **counts: int) -> None:
    """Raise ValueError when a batch of features, its labels or a neighbour count cannot be meant."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point of shape (B, D), got {features.dtype} {tuple(features.shape)}; "
            "flatten feature maps first, e.g. by global average pooling"
        )
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(features):
        raise ValueError(
            f"labels must be {len(features)} integers, one a feature row, got {labels.dtype} {tuple(labels.shape)}"
        )
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _nearest(scores: Tensor, labels: Tensor, rows: Tensor, k: int, m: int) -> list[tuple[Tensor, Tensor]]:
    """The k least scores of a row's own class, the m least of others, and their columns; infinite where there are fewer.

    Row i of `scores` is that of image `rows[i]`, which is not its own positive.
    """
    excluded, size = labels[rows, None] == labels, len(labels)
    negative = scores.masked_fill(excluded, torch.inf).topk(min(m, size), largest=False)
    excluded = excluded.logical_not_()
    excluded[torch.arange(len(rows), device=rows.device), rows] = True
    return [scores.masked_fill(excluded, torch.inf).topk(min(k, size), largest=False), negative]


def _ranked(features: Tensor, norms: Tensor, labels: Tensor, k: int, m: int) -> list[list[Tensor]]:
    """`_nearest` by `norms` − 2 x_i·x_j, for as many anchors at a time as stay in a cache."""
    size, blocks = max(1, BLOCK // max(len(labels), 1)), []
    for rows in torch.arange(len(labels)).split(size):
        scores = torch.addmm(norms, features[rows[0] : rows[-1] + 1], features.T, alpha=-2)
        blocks.append(_nearest(scores, labels, rows, k, m))
    if len(blocks) == 1:
        return blocks[0]
    return [[torch.cat(parts) for parts in zip(*side, strict=True)] for side in zip(*blocks, strict=True)]


def _neighbors(sides: list, k: int, m: int) -> Neighbors:
    """Of the values and columns of both sides; an infinite value is no neighbour."""
    indices, valid = [], []
    for (values, columns), count in zip(sides, (k, m), strict=True):
        real, padding = values < torch.inf, (0, count - values.shape[1])
        for part, found in ((columns * real, indices), (real, valid)):
            found.append(torch.nn.functional.pad(part, padding) if padding[1] else part)
    return Neighbors(*indices, *valid)


@torch.no_grad()
def mine(distances: Tensor, labels: Tensor, k: int, m: int, rows: Tensor | None = None) -> Neighbors:
    """Neighbours of every anchor (of the anchors `rows`) from its row of distances; see `batch_neighbors`."""
    if distances.device.type != "cpu" or not math.isfinite(distances.sum()):  # slow on a CPU; asking first stalls a GPU
        distances = distances.nan_to_num(torch.finfo(distances.dtype).max)  # after all numbers; the loss is NaN then too
    rows = torch.arange(len(labels), device=labels.device) if rows is None else rows
    return _neighbors(_nearest(distances, labels, rows, k, m), k, m)


@torch.no_grad()
def mine_batch(features: Tensor, labels: Tensor, k: int, m: int) -> Neighbors:
    """As `mine` with `batch_distances`; a large batch on a CPU in float32, save the anchors where that proves nothing.

    A GPU would have to wait for the proof; to a small batch float64 costs nothing, and tells distances from 1e-8 |x| on.
    """
    size, dim = features.shape
    if features.device.type != "cpu" or size <= 25:
        return mine(batch_distances(features), labels, k, m)
    exactly = size < LARGE or not exact_products(features.device)
    with torch.autocast("cpu", enabled=False):
        exact = features.to(torch.promote_types(features.dtype, torch.float64 if exactly else torch.float32))
        centered = (exact - exact.mean(0)).to(torch.float64 if exactly else torch.float32)
        norms = square_norms(centered)
        if not norms.max() < OVERFLOW:  # or NaN
            return mine(batch_distances(features), labels, k, m)
        if exactly:
            return _neighbors(_ranked(centered, norms, labels, k, m), k, m)
        keep, sure = 1 - slack(dim), True
        sides = _ranked(centered, (norms * keep).float(), labels, k + 3, m + 3)
        for side, count in enumerate((k, m)):
            low, index = sides[side]
            low = low.double() + (norms * keep - underflow(dim))[:, None]
            *sides[side], proven = measure(exact, exact, low, index, min(count, size))
            sure = proven & sure
        near, rows = _neighbors(sides, k, m), (~sure).nonzero().squeeze(1)
        if len(rows):
            distances = torch.cdist(exact[rows].double(), exact.double(), compute_mode="donot_use_mm_for_euclid_dist")
            for part, again in zip(near, mine(distances, labels, k, m, rows), strict=True):
                part[rows] = again
    return near


@torch.no_grad()
def batch_neighbors(features: Tensor, labels: Tensor, k: int = 5, m: int = 5) -> Neighbors:
    """K nearest images of the same class and M nearest of other classes, inside a batch (Fig. 1, right).

    Parameters
    ----------
    features : Tensor, floating point, (B, D)
    labels : Tensor, integer, (B,)
    k, m : int
        The paper's K and M; at least 1.

    Returns
    -------
    Neighbors
        Indices into the batch, nearest first, with masks where there are too few.

    Raises
    ------
    ValueError
        If a shape, a dtype or a count is off.
    """
    check_batch(features, labels, k=k, m=m)
    return mine_batch(features, labels, k, m)


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor, gallery: Tensor, k: int, *, chunk: int = 1024, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Exact Euclidean k-nearest-neighbour search.

    Candidates come from a matrix product in float32 and are measured again, from differences in float64, so the
    distances returned are true ones. Where the product's rounding may have hidden a neighbour (in a tight class), the
    query is searched again in float64; see `search`.

    Parameters
    ----------
    queries : Tensor, floating point, (Q, D)
    gallery : Tensor, floating point, (G, D)
    k : int
        Neighbours a query; 1 <= k <= G (G − 1 with `exclude_self`).
    chunk : int
        Queries at a time, and at most 16 times as many gallery rows: at most chunk · 16 · chunk distances are in memory,
        beside a copy of 16 · chunk queries and of those gallery rows. FAISS, which finds the candidates of a large search
        where it is installed, takes 2²⁴ numbers of the gallery at a time instead.
    exclude_self : bool
        For leave-one-out search: `queries` is `gallery`, and row i is not its own neighbour.

    Returns
    -------
    distances : Tensor, float32 or float64, (Q, k)
        Ascending. Equal distances keep the order of the gallery; where more than k + 8 rows tie, it is not said
        which of them come.
    indices : Tensor, int64, (Q, k)
        Rows of the gallery.

    Raises
    ------
    ValueError
        If the shapes do not fit, a feature is not finite, or the gallery holds fewer than k rows.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries (Q, D) and gallery (G, D) must share D, got {tuple(queries.shape)}, {tuple(gallery.shape)}"
        )
    available = len(gallery) - int(exclude_self)
    if not 1 <= k <= available:
        raise ValueError(f"k={k} neighbours asked of a gallery that has {available}; choose 1 <= k <= {available}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if exclude_self and len(queries) != len(gallery):
        raise ValueError(f"exclude_self needs queries to be the gallery, got {len(queries)} and {len(gallery)} rows")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    rows = torch.arange(len(queries), device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        squares, indices = nearest(queries, gallery, rows if exclude_self else rows.fill_(-1), k, available, chunk)
    return squares.sqrt().to(dtype), indices


@torch.no_grad()
def whole_set_neighbors(features: Tensor, labels: Tensor, k: int = 5, m: int = 5) -> Neighbors:
    """K nearest images of the same class and M nearest of other classes in a whole training set (Fig. 1, left).

    Class by class with `nearest_neighbors`, so that memory is bounded whatever the size of the set.

    Parameters
    ----------
    features : Tensor, floating point, (N, D)
    labels : Tensor, integer, (N,)
        On the device of the features.
    k, m : int
        The paper's K and M; at least 1.

    Returns
    -------
    Neighbors
        As of `batch_neighbors`, with indices into the set.

    Raises
    ------
    ValueError
        If a shape, a dtype or a count is off, or a feature is not finite.
    """
    check_batch(features, labels, k=k, m=m)
    shape = len(features)
    found = [torch.zeros(shape, count, dtype=torch.int64, device=features.device) for count in (k, m)]
    valid = [torch.zeros_like(index, dtype=torch.bool) for index in found]
    for c in labels.unique():
        inside = labels == c
        members, others = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        for side, (gallery, wanted, itself) in enumerate(((members, k, True), (others, m, False))):
            count = min(wanted, len(gallery) - itself)
            if count < 1:
                continue
            _, nearest = nearest_neighbors(features[members], features[gallery], count, exclude_self=itself)
            found[side][members, :count] = gallery[nearest]
            valid[side][members, :count] = True
    return Neighbors(found[0], found[1], valid[0], valid[1])


@torch.no_grad()
def majority_vote(labels: Tensor, distances: Tensor, n_classes: int) -> Tensor:
    """The class most frequent among a query's neighbours; a tie goes to the class of the nearest tied neighbour.

    (The paper does not say how ties are broken. scikit-learn gives them to the smallest label instead.)

    Parameters
    ----------
    labels : Tensor, integer, (Q, K_p)
        Classes of each query's neighbours, 0 <= label < n_classes.
    distances : Tensor, floating point, (Q, K_p)
        Their distances; they need not be sorted.
    n_classes : int

    Returns
    -------
    Tensor, int64, (Q,)

    Raises
    ------
    ValueError
        If the shapes differ, there is no neighbour, or a label is out of range.
    """
    if labels.shape != distances.shape or labels.ndim != 2 or labels.shape[1] < 1:
        raise ValueError(
            f"labels and distances must both be (Q, K_p), got {tuple(labels.shape)} and {tuple(distances.shape)}"
        )
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < n_classes):
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    labels = labels.long().gather(1, distances.sort(dim=1, stable=True).indices)
    counts = torch.zeros(len(labels), n_classes, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(1, labels, torch.ones_like(labels))
    votes = counts.gather(1, labels)  # for each neighbour, how many share its class
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    nearest = position.masked_fill(votes < votes.amax(1, keepdim=True), labels.shape[1]).amin(1, keepdim=True)
    return labels.gather(1, nearest).squeeze(1)
