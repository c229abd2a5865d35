"""The losses that are compared: deep kNN (Eqs. 1-3 of the paper), batch-hard triplet, class weights for CE.

Both triplet losses are a hinge on distances, [d(anchor, positive) + α − d(anchor, negative)]₊. They differ in the
positive: deep kNN takes the K *nearest* of the class, batch-hard the *furthest*. Each has two faces: `*_terms`
gives every hinge, so that training can say how many are active; `*_loss` is their mean.
"""

import functools

import torch
from torch import Tensor

from deepknn_lib.neighbors import Neighbors, batch_distances, check_batch, mine, mine_batch

CACHED = 2**17  # elements of differences at a time on a CPU


def _check(features: Tensor, labels: Tensor, margin: float, **counts: int) -> None:
    check_batch(features, labels, **counts)
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be a finite number of at least 0, got {margin!r}")


def _distances(features: Tensor, indices: Tensor) -> Tensor:
    """|x_i − x_j| of every anchor i, the first rows of `features`, and the j in row i of `indices` (A, n).

    From differences, as the short form |a|² + |b|² − 2ab would lose a near-duplicate's distance to cancellation.
    """
    found = features.new_empty(indices.shape)
    size = max(1, CACHED // max(indices.shape[1] * features.shape[1], 1)) if features.device.type == "cpu" else len(indices)
    for start in range(0, len(indices), max(size, 1)):
        part = indices[start : start + size]
        difference = features.index_select(0, part.flatten()).view(*part.shape, features.shape[1])
        difference -= features[start : start + len(part), None]
        found[start : start + size] = torch.linalg.vector_norm(difference, dim=2)
    return found


def _pull(features: Tensor, anchors: Tensor, others: Tensor, weight: Tensor, result: Tensor) -> Tensor:
    """Add w (x_i − x_j) to row i of `result`, and take it from row j: i, j and w of the pairs, (P,)."""
    size = max(1, CACHED // max(features.shape[1], 1)) if features.device.type == "cpu" else len(anchors)
    for pairs in zip(*(part.split(max(size, 1)) for part in (anchors, others, weight)), strict=True):
        i, j, w = pairs
        difference = (features[i] - features[j]).mul_(w[:, None])
        result.index_add_(0, i, difference).index_add_(0, j, difference, alpha=-1)
    return result


class _Terms(torch.autograd.Function):
    """Eq. 2 of all anchors, positives and negatives, and its gradient by hand: one node, where autograd would take fifteen.

    With g = dL/d|x_i − x_j| the pair pulls at x_i with w (x_i − x_j), w = g / |x_i − x_j|, and at x_j with its opposite; at
    distance 0 it does not. On a CPU the pulls at an image are summed as (Σ w) x_i − Σ w x_j, which needs no copy of x for
    every pair. Of centred float32 that is right to 1e-5 of each pull but for near-duplicates; theirs come from differences.
    """

    @staticmethod
    def forward(ctx, features: Tensor, indices: Tensor, valid: Tensor, margin: float | None) -> Tensor:
        found = _distances(features, indices)
        gap = found[:, : valid.shape[1], None] - found[:, None, valid.shape[1] :]
        terms = torch.nn.functional.softplus(gap) if margin is None else (gap + margin).relu_()  # [d]₊ = max(0, d), Eq. 2
        terms.masked_fill_(~valid, 0)
        ctx.soft = margin is None
        ctx.save_for_backward(features, indices, found, terms)
        return terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        features, indices, found, terms = ctx.saved_tensors
        share = gradient * (-torch.expm1(-terms) if ctx.soft else terms > 0)  # softplus' = sigmoid = 1 − exp(−softplus)
        weight = torch.cat([share.sum(2), -share.sum(1)], 1)
        weight = torch.where(found == 0, 0, weight / found)
        if features.device.type != "cpu":  # asking for near-duplicates would stall a GPU
            anchors = torch.arange(len(indices), device=features.device).repeat_interleave(indices.shape[1])
            pulls = _pull(features, anchors, indices.flatten(), weight.flatten(), torch.zeros_like(features))
            return pulls, None, None, None
        centered = features - features.mean(0)
        near = found < 1e-2 * torch.linalg.vector_norm(centered[: len(indices)], dim=1, keepdim=True)
        if not near.any():
            return _sum_pulls(centered, indices, weight), None, None, None
        pulls, pairs = _sum_pulls(centered, indices, weight.masked_fill(near, 0)), near.nonzero(as_tuple=True)
        return _pull(features, pairs[0], indices[pairs], weight[pairs], pulls), None, None, None


def _sum_pulls(features: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """(Σ w) x_i − Σ w x_j of every image i, over the pairs it is in as anchor and those it is in as neighbour: (B, D)."""
    other, order = indices.flatten().sort(stable=True)  # the pairs, by neighbour
    sums = functools.partial(torch.nn.functional.embedding_bag, weight=features, mode="sum")
    starts = torch.searchsorted(other, torch.arange(len(features)))
    flat = weight.flatten()
    result = features.new_zeros(len(features)).index_add_(0, indices.flatten(), flat)[:, None] * features
    result -= sums(order // indices.shape[1], offsets=starts, per_sample_weights=flat[order])
    anchors = features[: len(indices)]
    result[: len(indices)] += weight.sum(1, keepdim=True) * anchors - sums(indices, per_sample_weights=weight)
    return result


def _terms(features: Tensor, positive: Tensor, negative: Tensor, valid: Tensor, margin: float | None) -> Tensor:
    """Eq. 2 with the images `positive` (A, K) and `negative` (A, M) of the anchors, the first A: (A, K, M) hinges.

    In float32 or better also inside autocast; 0 where not `valid`. Without a margin a soft one, ln(1 + exp(d)).
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return _Terms.apply(features, torch.cat([positive, negative], 1), valid, margin)


def mean_term(terms: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid terms, all others being 0; 0, still with a gradient, when there is none."""
    return terms.sum() / valid.sum().clamp(min=1)


def deep_knn_terms(
    features: Tensor, labels: Tensor, k: int = 5, m: int = 5, margin: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Eq. 2 for every anchor i, positive k and negative m of a batch: (B, K, M) hinges, and which of them exist."""
    _check(features, labels, margin, k=k, m=m)
    near = mine_batch(features.detach(), labels, k, m)
    valid = near.positive_valid[:, :, None] & near.negative_valid[:, None, :]
    return _terms(features, near.positive, near.negative, valid, margin), valid


def whole_set_terms(features: Tensor, near: Neighbors, margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """Eq. 2 with neighbours from the whole training set (Fig. 1, left): (A, K, M) hinges, and which of them exist.

    `features` (A·(1 + K + M), D): the A anchors, then each anchor's K positives, then each one's M negatives. Of `near`, the
    anchors' rows of `neighbors.whole_set_neighbors`, only the masks are read.
    """
    (anchors, k), m = near.positive_valid.shape, near.negative_valid.shape[1]
    rows = torch.arange(anchors * k, device=features.device).view(anchors, k) + anchors
    columns = torch.arange(anchors * m, device=features.device).view(anchors, m) + anchors * (1 + k)
    valid = near.positive_valid[:, :, None] & near.negative_valid[:, None, :]
    return _terms(features, rows, columns, valid, margin), valid


def deep_knn_loss(features: Tensor, labels: Tensor, k: int = 5, m: int = 5, margin: float = 0.2) -> Tensor:
    r"""The deep kNN loss of a batch, Eq. 3 with neighbours searched inside the batch (Section 2.2).

    .. math:: L = \frac{1}{NKM} \sum_i \sum_k \sum_m
              [\,\|f(x_i) - f(y_k^i)\| + \alpha - \|f(x_i) - f(z_m^i)\|\,]_+

    y_k are the K nearest images of i's class, z_m the M nearest of all other classes. The mean is over *all*
    (i, k, m) that exist, also those whose hinge is 0; where a class has fewer than K + 1 images in the batch,
    the missing ones are left out.

    Parameters
    ----------
    features : Tensor, floating point, (B, D)
        Raw or L2-normalised; half precision is raised to float32, also inside autocast.
    labels : Tensor, integer, (B,)
    k, m : int
        The paper's K and M.
    margin : float
        The paper's α, in units of the features' Euclidean distance. The paper gives no value. It must be in
        proportion to the features' distances: far below them, shrinking all features solves the loss.

    Returns
    -------
    Tensor, float32 or float64, scalar
        0 with a gradient when the batch holds no triplet (empty, one class, or one image a class).

    Raises
    ------
    ValueError
        If a shape, a dtype, a count or the margin is off.
    """
    terms, valid = deep_knn_terms(features, labels, k, m, margin)
    return mean_term(terms, valid)


def batch_hard_terms(
    features: Tensor, labels: Tensor, margin: float = 0.2, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """One term an anchor, from its furthest positive and nearest negative: (B, 1, 1), and which of them exist."""
    _check(features, labels, margin)
    distances = batch_distances(features)
    near, far = mine(distances, labels, 1, 1), mine(-distances, labels, 1, 1)
    valid = (far.positive_valid & near.negative_valid)[:, :, None]
    return _terms(features, far.positive, near.negative, valid, None if soft else margin), valid


def batch_hard_triplet_loss(
    features: Tensor, labels: Tensor, margin: float = 0.2, soft: bool = False
) -> Tensor:
    r"""The traditional triplet loss the paper compares with: furthest positive, nearest negative, in the batch.

    .. math:: L = \frac{1}{N} \sum_i [\,\max_{p} \|f(x_i) - f(p)\| + \alpha - \min_{n} \|f(x_i) - f(n)\|\,]_+

    Source: Hermans, Beyer and Leibe, *In defense of the triplet loss* (2017), Eq. 5; the paper's reference 16.

    Parameters
    ----------
    features : Tensor, floating point, (B, D)
    labels : Tensor, integer, (B,)
    margin : float
        α, in units of the features' Euclidean distance; not used when `soft`.
    soft : bool
        Their soft margin: ln(1 + exp(d)) in place of [d + α]₊, which never stops pulling.

    Returns
    -------
    Tensor, float32 or float64, scalar
        0 with a gradient when no anchor has both a positive and a negative.

    Raises
    ------
    ValueError
        If a shape, a dtype or the margin is off.
    """
    terms, valid = batch_hard_terms(features, labels, margin, soft)
    return mean_term(terms, valid)


def class_weights(labels: Tensor, n_classes: int) -> Tensor:
    r"""Weights for the cross-entropy of an imbalanced set, :math:`w_c \propto (N - n_c) / n_c`, summing to 1.

    The rule is that of the authors' group's public Skin-7 code; the paper itself only says "class-weighted".

    Parameters
    ----------
    labels : Tensor, integer, (N,)
        The training labels.
    n_classes : int

    Returns
    -------
    Tensor, float32, (n_classes,)

    Raises
    ------
    ValueError
        If a class has no image, or there are fewer than two classes.
    """
    counts = torch.bincount(labels, minlength=n_classes).double()
    if n_classes < 2 or len(counts) != n_classes or bool((counts == 0).any()):
        raise ValueError(
            f"class weights need at least 2 classes with an image each, got {n_classes} classes with "
            f"{counts.long().tolist()} images"
        )
    weights = (len(labels) - counts) / counts
    return (weights / weights.sum()).float()
