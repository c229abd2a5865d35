"""Accuracy, mean class recall and the recall of one class; how sure we are of them; and of a difference.

All are plain numpy. Where a test set holds several images of one lesion or patient, these are not independent:
the bootstrap draws whole groups.
"""

from functools import lru_cache

import numpy as np


def class_recalls(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """Share of each class's images that were predicted right: float64 (n_classes,), NaN for a class without any."""
    hits = np.bincount(labels[labels == predictions], minlength=n_classes)
    counts = np.bincount(labels, minlength=n_classes)
    return np.divide(hits, counts, out=np.full(n_classes, np.nan), where=counts > 0)


def scores(labels: np.ndarray, predictions: np.ndarray, n_classes: int, smallest: int) -> dict[str, float]:
    """The paper's three measures, in per cent.

    Parameters
    ----------
    labels, predictions : ndarray, integer, (N,)
    n_classes : int
    smallest : int
        The class whose recall is RS: the one with the fewest images in the whole set.

    Returns
    -------
    dict
        `acc` (overall accuracy), `mcr` (mean class recall over the classes present), `rs`.

    Raises
    ------
    ValueError
        If the arrays differ in shape or are empty.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"need as many predictions as labels and at least one, got {labels.shape}, {predictions.shape}"
        )
    recalls = class_recalls(labels, predictions, n_classes)
    return {
        "acc": 100 * float(np.mean(labels == predictions)),
        "mcr": 100 * float(np.nanmean(recalls)),
        "rs": 100 * float(recalls[smallest]),
    }


def bootstrap(
    labels: np.ndarray,
    correct: np.ndarray,
    n_classes: int,
    smallest: int,
    groups: np.ndarray | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Bootstrap distribution of Acc, MCR and RS over test sets (and seeds) that could have been drawn.

    Within each class whole groups (lesions, patients) are drawn with replacement, so that every class stays
    present and the views of one lesion stay together. With a row for each of S seeds, every draw also takes S − 1
    of the seeds with replacement: S of them would give a spread too small by (S − 1)/S, which matters for few.

    Parameters
    ----------
    labels : ndarray, integer, (N,)
    correct : ndarray, float, (N,) or (S, N)
        1 where the prediction is right, else 0; the mean over seeds for a method run several times; the
        difference of two methods' values, image by image, for a *paired* comparison. (S, N): one row a seed.
    n_classes, smallest : int
    groups : ndarray, (N,), optional
        The lesion or patient of each image; default: every image its own.
    draws, seed : int

    Returns
    -------
    dict of ndarray, float64, (draws,)
        `acc`, `mcr`, `rs` in per cent (or in points, for a difference).
    """
    labels, correct = np.asarray(labels, dtype=np.int64), np.asarray(correct, dtype=np.float64)
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
    hits, sizes = np.zeros((n_classes, draws)), np.zeros((n_classes, draws))
    rows, shares = np.atleast_2d(correct), _seed_shares(len(correct), draws, seed) if correct.ndim == 2 else [[1.0]]
    drawn = _resamples(labels.tobytes(), groups.astype(np.int64).tobytes(), n_classes, draws, seed)
    for c, (members, group, times) in drawn.items():
        times = times.astype(np.float64)
        for row, share in zip(rows, shares, strict=True):
            hits[c] += share * (times @ np.bincount(group, weights=row[members], minlength=times.shape[1]))
        sizes[c] = times @ np.bincount(group, minlength=times.shape[1])
    recalls = np.divide(hits, sizes, out=np.full_like(hits, np.nan), where=sizes > 0)
    return {
        "acc": 100 * hits.sum(0) / sizes.sum(0),
        "mcr": 100 * np.nanmean(recalls, axis=0),
        "rs": 100 * recalls[smallest],
    }


@lru_cache(maxsize=4)  # every method is judged on the same test images, and a draw is the slow part
def _resamples(labels: bytes, groups: bytes, n_classes: int, draws: int, seed: int) -> dict[int, tuple]:
    """For each class: its images, the group of each, and how often each group is drawn, uint16 (draws, groups)."""
    labels, groups = np.frombuffer(labels, np.int64), np.frombuffer(groups, np.int64)
    rng = np.random.default_rng(seed)
    drawn = {}
    for c in range(n_classes):
        members = np.flatnonzero(labels == c)
        if len(members):
            _, group = np.unique(groups[members], return_inverse=True)
            n_groups = group.max() + 1
            times = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=draws)
            drawn[c] = members, group, times.astype(np.uint16)  # kept: a quarter of the memory
    return drawn


def _seed_shares(n_seeds: int, draws: int, seed: int) -> np.ndarray:
    """The share of each seed in each draw, float64 (n_seeds, draws); never the images' random numbers."""
    taken = max(n_seeds - 1, 1)
    rng = np.random.default_rng((seed, n_seeds))
    return rng.multinomial(taken, np.full(n_seeds, 1 / n_seeds), size=draws).T / taken


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central `level` of a bootstrap distribution (percentile interval)."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of independent runs; NaN where fewer than two leave the spread unknown."""
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return np.nan, np.nan
    half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def arrival(history: list[dict], level: float) -> int:
    """First epoch with this training accuracy in per cent; one more than there were if it never came."""
    reached = [row["epoch"] for row in history if row["train_acc"] >= level]
    return reached[0] if reached else len(history) + 1
