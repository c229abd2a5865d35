"""The paper's measures, intervals around them, and how tightly the classes lie."""

from functools import lru_cache

import numpy as np


def class_recalls(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """Share of each class's images predicted right: float64 (n_classes,), NaN for a class without images."""
    hits = np.bincount(labels[labels == predictions], minlength=n_classes)
    counts = np.bincount(labels, minlength=n_classes)
    return np.divide(hits, counts, out=np.full(n_classes, np.nan), where=counts > 0)


def scores(labels: np.ndarray, predictions: np.ndarray, n_classes: int, smallest: int) -> dict[str, float]:
    """The paper's three measures, in per cent, of integer labels (N,) and predictions (N,).

    `acc` is the accuracy, `mcr` the mean recall of the classes present, `rs` the recall of the class `smallest` (of the
    set's fewest images). ValueError if the shapes differ or there is no image.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"need a prediction for each label: got {predictions.shape}, {labels.shape}")
    recalls = class_recalls(labels, predictions, n_classes)
    acc, mcr, rs = np.mean(labels == predictions), np.nanmean(recalls), recalls[smallest]
    return {"acc": 100 * float(acc), "mcr": 100 * float(mcr), "rs": 100 * float(rs)}


def bootstrap(labels, correct, n_classes, smallest, groups=None, *, draws=2000, seed=0) -> dict:
    """Draws of Acc, MCR and RS (per cent, each float64 (draws,)) over test sets and seeds that could have been.

    Whole groups are drawn, of those that show the same classes: `labels` are the classes (N,), `groups` the lesions or
    patients (N,), by default each image alone. `correct`, (N,) or (S, N), is 1 where a prediction is right, else 0; for
    a paired comparison, the difference of two methods. With a row for each of S seeds, a draw takes S − 1 seeds: S
    would give (S − 1) / S of the variance. RS is NaN where the smallest class has one group: no draw would change it.
    """
    labels, correct = np.asarray(labels, dtype=np.int64), np.asarray(correct, dtype=np.float64)
    groups = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)[1]
    shares, n_seeds = [[1.0]], len(correct)
    if correct.ndim == 2:
        rng, taken = np.random.default_rng((seed, n_seeds)), max(n_seeds - 1, 1)
        shares = rng.multinomial(taken, np.full(n_seeds, 1 / n_seeds), size=draws).T / taken
    hits, sizes = np.zeros((2, n_classes, draws))
    for members, group, times in _resamples(labels.tobytes(), groups.tobytes(), draws, seed):
        times, classes = times.astype(np.float64), labels[members]
        for c in np.unique(classes):
            sizes[c] += times @ np.bincount(group, classes == c)
            for row, share in zip(np.atleast_2d(correct), shares, strict=True):
                hits[c] += share * (times @ np.bincount(group, row[members] * (classes == c)))
    recalls = np.divide(hits, sizes, out=np.full_like(hits, np.nan), where=sizes > 0)
    acc, mcr = hits.sum(0) / sizes.sum(0), np.nanmean(recalls, axis=0)
    alone = len(np.unique(groups[labels == smallest])) == 1
    return {"acc": 100 * acc, "mcr": 100 * mcr, "rs": 100 * np.where(alone, np.nan, recalls[smallest])}


@lru_cache(maxsize=4)  # Drawing is slow, and all methods share the test images.
def _resamples(labels: bytes, groups: bytes, draws: int, seed: int) -> list[tuple]:
    """Of the groups of each set of classes: images, the group of each, and how often it is drawn (draws, groups)."""
    labels, groups = np.frombuffer(labels, np.int64), np.frombuffer(groups, np.int64)
    shown = np.zeros((groups.max() + 1, labels.max() + 1), dtype=bool)
    shown[groups, labels] = True
    rng, drawn = np.random.default_rng(seed), []
    for kind in np.unique(shown, axis=0)[::-1]:
        members = np.flatnonzero((shown[groups] == kind).all(axis=1))
        names, group = np.unique(groups[members], return_inverse=True)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        drawn.append((members, group, times.astype(np.uint16)))
    return drawn


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval: the central `level` of bootstrap draws; NaN where all draws are one value but 0."""
    if len(seen := np.unique(values[~np.isnan(values)])) == 0 or (len(seen) == 1 and seen[0]):
        return np.nan, np.nan
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def epochs_to_accuracy(history: list[dict], level: float) -> int:
    """The first epoch with this training accuracy in per cent; one more than there were if none has it."""
    return next((row["epoch"] for row in history if row["train_acc"] >= level), len(history) + 1)


def compactness(features: np.ndarray, labels: np.ndarray, *, k: int = 5, sample: int = 3000) -> dict:
    """How tightly two or more classes lie in features (N, D); of more than `sample` images, a random part.

    `ratio`: mean distance within classes over that between classes, all pairs counted; smaller is tighter.
    `silhouette` (−1..1), `purity` (per cent of an image's `k` nearest with its class): means over classes, not images.
    """
    from sklearn.metrics import pairwise_distances, silhouette_samples

    chosen = np.random.default_rng(0).permutation(len(labels))[:sample]
    features, labels = features[chosen], labels[chosen]
    distances, same = pairwise_distances(features).astype(np.float64), labels[:, None] == labels
    within, between = distances[same & ~np.eye(len(labels), dtype=bool)].mean(), distances[~same].mean()
    images = {"silhouette": silhouette_samples(distances, labels, metric="precomputed")}
    np.fill_diagonal(distances, np.inf)
    near = np.argpartition(distances, k, axis=1)[:, :k]
    images["purity"] = 100 * (labels[near] == labels[:, None]).mean(axis=1)
    classes = [labels == c for c in np.flatnonzero(np.bincount(labels) > 1)]
    means = {name: float(np.mean([values[c].mean() for c in classes])) for name, values in images.items()}
    return {"ratio": float(within / between) if between > 0 else np.nan} | means
