"""Neighbours: mined inside a batch for the loss, searched in the gallery for the vote.

The searches carry no gradient: "the search process is not involved in the derivative" (Section 2.2).
"""

import math
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor


class Neighbors(NamedTuple):
    """The K nearest positives and M nearest negatives of every anchor, nearest first.

    `positive` int64 (B, K) are the images of the anchor's class without the anchor (the paper's y_k), `negative`
    int64 (B, M) those of other classes (z_m). The masks, bool, are False where there are fewer than K or M.
    """

    positive: Tensor
    negative: Tensor
    positive_valid: Tensor
    negative_valid: Tensor


def check_batch(features: Tensor, labels: Tensor, **counts: int) -> None:
    """Raise ValueError when the features of a batch, its labels or a neighbour count cannot be meant."""
    if features.ndim != 2 or not features.is_floating_point():
        found = f"{features.dtype} {tuple(features.shape)}; flatten feature maps first, by average pooling"
        raise ValueError(f"features must be floating point of shape (B, D), got {found}")
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(features):
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels must be {len(features)} integers, one for each feature row, got {found}")
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def pairwise_distances(features: Tensor) -> Tensor:
    """Euclidean distances between all pairs of features (B, D): float32 or float64 (B, B), with a gradient.

    |a − b|² = |a|² + |b|² − 2 a·b, of centred features, so that the subtraction loses few digits. The least number
    under the root is above 0, so that the gradient is finite (0) where two features are equal.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        centered = features - features.mean(0)
        norms = centered.square().sum(1)
        squares = norms[:, None] + norms - 2 * centered @ centered.T
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


@torch.no_grad()
def nearest_in_batch(distances: Tensor, labels: Tensor, k: int, m: int) -> Neighbors:
    """The neighbours of every anchor, from its row of a batch's distances (B, B); see `batch_neighbors`."""
    # NaN and overflow stay neighbours, the furthest; without them the loss would be 0, as if it were perfect.
    distances = distances.nan_to_num(torch.finfo(distances.dtype).max)
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive, positive_valid = _least(distances.masked_fill(~same | itself, torch.inf), k)
    negative, negative_valid = _least(distances.masked_fill(same, torch.inf), m)
    return Neighbors(positive, negative, positive_valid, negative_valid)


def _least(distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns of the `count` least values of each row, and whether there are so many finite ones."""
    values, columns = distances.topk(min(count, len(distances)), largest=False)
    exists, padding = values != torch.inf, (0, count - values.shape[1])
    return tuple(torch.nn.functional.pad(part, padding) for part in (columns * exists, exists))


def batch_neighbors(features: Tensor, labels: Tensor, k: int = 5, m: int = 5) -> Neighbors:
    """K nearest images of the same class and M nearest of other classes, inside a batch (Fig. 1, right).

    `features` are floating point (B, D), `labels` integer (B,); the indices found are rows of the batch. ValueError
    if a shape, a dtype or a count is off.
    """
    check_batch(features, labels, k=k, m=m)
    return nearest_in_batch(pairwise_distances(features.detach()), labels, k, m)


@torch.no_grad()
def nearest_neighbors(queries: Tensor, gallery: Tensor, k: int, *, chunk=1024, exclude_self=False):
    """Euclidean search: a float32 product gives k + 8 candidates, which are measured again from differences.

    The product cannot tell two rows apart whose squared distances from a query differ by less than about 1e-6 of
    the squared distances from the gallery's median: where more than k + 8 rows lie so close, one can be missed.

    `queries` (Q, D) and `gallery` (G, D) are floating point, and 1 <= k <= G. With `exclude_self`, for leave-one-out
    search, `queries` is `gallery`, row i is not its own neighbour, and k < G. `chunk` queries at a time meet 16 times
    as many gallery rows, so that memory holds 16 · chunk² distances.

    Returned are the distances, float32 or float64 (Q, k), ascending, and rows of the gallery, int64 (Q, k); equal
    distances keep the order of the rows. ValueError if the shapes do not fit, a feature is not finite, or k is off.
    """
    shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries (Q, D) and gallery (G, D) must share D, got {shapes}")
    if exclude_self and len(queries) != len(gallery):
        raise ValueError(f"exclude_self needs queries to be the gallery, got {shapes}")
    available = len(gallery) - int(exclude_self)
    if not 1 <= k <= available or chunk < 1:
        raise ValueError(f"need 1 <= k <= {available} (the gallery) and chunk >= 1, got {k} and {chunk}")
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("a feature is not finite (NaN or infinite); look at the training's loss")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    # A power of two changes no digit, and keeps squares from becoming 0 or infinite.
    largest = max(map(abs, map(float, gallery.aminmax()))) if gallery.numel() else 0
    scale = math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))
    center, found = gallery[:: 1 + len(gallery) // 1024].to(dtype).median(0).values * scale, []
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, max(len(queries), 1), chunk):
            block = queries[first : first + chunk].to(dtype) * scale - center
            rows = torch.arange(first, first + len(block), device=block.device)[:, None]
            best, nearest = block[:, :0], rows[:, :0]
            for start in range(0, len(gallery), 16 * chunk):
                part = gallery[start : start + 16 * chunk].to(dtype) * scale - center
                scores = torch.addmm(part.float().square().sum(1), block.float(), part.float().T, alpha=-2)
                columns = scores.topk(min(k + 8, len(part)), largest=False).indices.sort(1).values
                distances = torch.linalg.vector_norm(part[columns] - block[:, None], dim=2)
                if exclude_self:
                    distances.masked_fill_(columns + start == rows, torch.inf)
                both = torch.cat([best, distances], 1)  # rows found before come first, so that they win ties
                best, order = (part[:, :k] for part in both.sort(dim=1, stable=True))
                nearest = torch.cat([nearest, columns + start], 1).gather(1, order)
            found.append((best / scale, nearest))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@torch.no_grad()
def majority_vote(labels: Tensor, distances: Tensor, n_classes: int) -> Tensor:
    """The class most frequent among a query's neighbours: int64 (Q,); a tie goes to the nearest tied neighbour.

    Where tied neighbours are equally far, the earlier column decides (the earlier gallery row, after
    `nearest_neighbors`). The paper does not say how ties are broken; scikit-learn takes the smallest label. `labels`
    (Q, K_p) and `distances` (Q, K_p) may be in any order; ValueError if they do not fit each other or `n_classes`.
    """
    if labels.shape != distances.shape or labels.ndim != 2 or labels.shape[1] < 1:
        shapes = f"{tuple(labels.shape)} and {tuple(distances.shape)}"
        raise ValueError(f"labels and distances must both be (Q, K_p), K_p of at least 1, got {shapes}")
    if labels.numel() and not (0 <= labels.min() and labels.max() < n_classes):
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
    labels = labels.long().gather(1, distances.sort(dim=1, stable=True).indices)
    votes = torch.nn.functional.one_hot(labels, n_classes).sum(1)  # (Q, n_classes)
    votes = votes.gather(1, labels)  # for the class of each neighbour
    first_tied = (votes == votes.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    return labels.gather(1, first_tied).squeeze(1)
