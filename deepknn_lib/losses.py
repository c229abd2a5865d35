"""The deep kNN loss, Eqs. 1-3 of the paper, and the class weights of cross-entropy.

The other losses that are compared come from pytorch-metric-learning; `criteria.LOSSES` lists them.
"""

import torch
from torch import Tensor

from deepknn_lib.neighbors import check_batch, nearest_in_batch, pairwise_distances


def deep_knn_terms(features: Tensor, labels: Tensor, k=5, m=5, margin=0.2) -> tuple[Tensor, Tensor]:
    """Eq. 2 for every anchor i, positive k and negative m of a batch: (B, K, M) hinges, and which of them exist."""
    check_batch(features, labels, k=k, m=m)
    distances = pairwise_distances(features)
    near = nearest_in_batch(distances.detach(), labels, k, m)  # Eq. 1: the search has no part in the gradient
    to_positives = distances.gather(1, near.positive)  # |f(x_i) − f(y_k)|
    to_negatives = distances.gather(1, near.negative)  # |f(x_i) − f(z_m)|
    return hinges(to_positives, to_negatives, near.positive_valid, near.negative_valid, margin)


def hinges(to_positives, to_negatives, positive_valid, negative_valid, margin) -> tuple[Tensor, Tensor]:
    """Eq. 2 from the anchors' distances to their positives (B, K) and negatives (B, M), and the masks of both."""
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be a finite number of at least 0, got {margin!r}")
    valid = positive_valid[:, :, None] & negative_valid[:, None, :]
    terms = (to_positives[:, :, None] + margin - to_negatives[:, None, :]).relu()  # [d]₊ = max(0, d)
    return terms.masked_fill(~valid, 0), valid


def mean_term(terms: Tensor, valid: Tensor) -> Tensor:
    """Eq. 3: the mean of the valid terms; 0, still with a gradient, when there is none."""
    return terms.sum() / valid.sum().clamp(min=1)


def deep_knn_loss(features: Tensor, labels: Tensor, k: int = 5, m: int = 5, margin: float = 0.2) -> Tensor:
    r"""The deep kNN loss of a batch, Eq. 3 with neighbours searched inside the batch (Section 2.2).

    .. math:: L = \frac{1}{NKM} \sum_i \sum_k \sum_m
              [\,\|f(x_i) - f(y_k^i)\| + \alpha - \|f(x_i) - f(z_m^i)\|\,]_+

    y_k are the K nearest images of i's class, z_m the M nearest images of all other classes. The mean is over *all*
    (i, k, m) that exist, also those whose hinge is 0. Where a class has fewer than K + 1 images in the batch, the
    missing terms are left out.

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
        0 with a gradient when the batch holds no triplet (empty, one class, or one image a class). ValueError if a
        shape, a dtype, a count or the margin is off.
    """
    return mean_term(*deep_knn_terms(features, labels, k, m, margin))


def class_weights(labels: Tensor, n_classes: int, power: float = 1.0) -> Tensor:
    r"""Weights for the cross-entropy of an imbalanced set, :math:`w_c \propto ((N - n_c) / n_c)^p`: float32 (C,).

    `labels` are those of the training set, integer (N,). p = 1 is the rule of the authors' group's public Skin-7 code
    (the paper only says "class-weighted"), 0.5 its square root; 0 weighs all classes alike. The weights sum to 1.
    ValueError if there are fewer than two classes, or one has no image.
    """
    counts = torch.bincount(labels, minlength=n_classes).double()
    if n_classes < 2 or len(counts) != n_classes or bool((counts == 0).any()):
        found = f"{n_classes} classes with {counts.long().tolist()} images"
        raise ValueError(f"class weights need at least 2 classes with an image each, got {found}")
    weights = ((len(labels) - counts) / counts) ** power
    return (weights / weights.sum()).float()
