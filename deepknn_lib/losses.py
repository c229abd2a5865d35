"""The losses that are compared: deep kNN (Eqs. 1-3 of the paper), batch-hard triplet, class weights for CE.

Both triplet losses are a hinge on distances, [d(anchor, positive) + α − d(anchor, negative)]₊. They differ in the
positive: deep kNN takes the K *nearest* of the class, batch-hard the *furthest*. Each has two faces: `*_terms`
gives every hinge, so that training can say how many are active; `*_loss` is their mean.
"""

import torch
from torch import Tensor

from deepknn_lib.neighbors import Neighbors, batch_distances, check_batch, mine, mine_batch

CACHED = 2**17  # elements of differences at a time on a CPU


def _check(features: Tensor, labels: Tensor, margin: float, **counts: int) -> None:
    check_batch(features, labels, **counts)
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be a finite number of at least 0, got {margin!r}")


class _PairDistances(torch.autograd.Function):
    """|x_i − x_j| of all i and the j in row i of `indices`, with its gradient, some anchors' differences at a time.

    All differences at once would be K + M copies of the batch, read from memory in every step of the formula.
    """

    @staticmethod
    def _differences(features: Tensor, indices: Tensor):
        size = max(1, CACHED // max(indices.shape[1] * features.shape[1], 1))
        if features.device.type != "cpu":
            size = max(1, len(indices))
        for start in range(0, len(indices), size):
            rows = slice(start, min(start + size, len(indices)))
            others = features.index_select(0, indices[rows].flatten()).view(-1, indices.shape[1], features.shape[1])
            yield rows, features[rows, None] - others

    @staticmethod
    def forward(ctx, features: Tensor, indices: Tensor) -> Tensor:
        found = features.new_empty(indices.shape)
        for rows, difference in _PairDistances._differences(features, indices):
            found[rows] = torch.linalg.vector_norm(difference, dim=2)
        ctx.save_for_backward(features, indices, found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        features, indices, found = ctx.saved_tensors
        weight = torch.where(found == 0, 0, gradient / found)  # the gradient at distance 0 is 0
        result = torch.zeros_like(features)
        for rows, difference in _PairDistances._differences(features, indices):
            difference *= weight[rows, :, None]
            result[rows] += difference.sum(1)
            result.index_add_(0, indices[rows].flatten(), difference.flatten(0, 1), alpha=-1)
        return result, None


def distances_to(features: Tensor, indices: Tensor) -> Tensor:
    """Euclidean distance of every anchor to the batch's images `indices` (A, K): float32 or float64 (A, K).

    The first A images of the batch are the anchors.

    From differences, in float32 or better also inside autocast: the short form |a|² + |b|² − 2ab would lose a
    near-duplicate's distance to cancellation, and the gradient with it. The gradient at distance 0 is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        return _PairDistances.apply(features.to(torch.promote_types(features.dtype, torch.float32)), indices)


def masked_mean(terms: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid terms; 0, still with a gradient, when there is none."""
    return terms.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def deep_knn_terms(
    features: Tensor, labels: Tensor, k: int = 5, m: int = 5, margin: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Eq. 2 for every anchor i, positive k and negative m of a batch: (B, K, M) hinges, and which of them exist."""
    _check(features, labels, margin, k=k, m=m)
    near = mine_batch(features.detach(), labels, k, m)
    distances = distances_to(features, torch.cat([near.positive, near.negative], 1))
    positive, negative = distances.split([k, m], 1)  # ‖f(x_i) − f(y_k)‖ and ‖f(x_i) − f(z_m)‖
    terms = (positive[:, :, None] + margin - negative[:, None, :]).relu()  # [d]₊ = max(0, d), Eq. 2
    return terms, near.positive_valid[:, :, None] & near.negative_valid[:, None, :]


def whole_set_terms(features: Tensor, near: Neighbors, margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """Eq. 2 with neighbours from the whole training set (Fig. 1, left): (A, K, M) hinges, and which of them exist.

    `features` (A·(1 + K + M), D): the A anchors, then each anchor's K positives, then each one's M negatives. Of `near`, the
    anchors' rows of `neighbors.whole_set_neighbors`, only the masks are read.
    """
    (anchors, k), m = near.positive_valid.shape, near.negative_valid.shape[1]
    rows = torch.arange(anchors * k, device=features.device).view(anchors, k) + anchors
    columns = torch.arange(anchors * m, device=features.device).view(anchors, m) + anchors * (1 + k)
    positive, negative = distances_to(features, rows), distances_to(features, columns)
    terms = (positive[:, :, None] + margin - negative[:, None, :]).relu()
    return terms, near.positive_valid[:, :, None] & near.negative_valid[:, None, :]


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
    return masked_mean(terms, valid)


def batch_hard_terms(
    features: Tensor, labels: Tensor, margin: float = 0.2, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """One term an anchor, from its furthest positive and nearest negative: (B, 1, 1), and which of them exist."""
    _check(features, labels, margin)
    distances = batch_distances(features)
    near, far = mine(distances, labels, 1, 1), mine(-distances, labels, 1, 1)
    positive, negative = distances_to(features, far.positive), distances_to(features, near.negative)
    gap = positive - negative
    terms = torch.nn.functional.softplus(gap) if soft else (gap + margin).relu()
    return terms[:, :, None], (far.positive_valid & near.negative_valid)[:, :, None]


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
    return masked_mean(terms, valid)


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
