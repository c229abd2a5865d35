"""How features lie: measured (compactness, silhouette, purity, hubs), and drawn (UMAP, t-SNE)."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from deepknn_lib.neighbors import nearest_neighbors
from deepknn_lib.storage import data_dir, whole_file


def compactness(features: np.ndarray, labels: np.ndarray, *, k: int = 5, sample: int = 3000) -> dict[str, float]:
    """Three answers to "how tightly are the classes packed?".

    Parameters
    ----------
    features : ndarray, float, (N, D)
    labels : ndarray, integer, (N,)
        At least two classes.
    k : int
        Neighbours for the purity.
    sample : int
        Of more images than this a random part is measured (seed 0): the distances of all pairs are needed.

    Returns
    -------
    dict
        `ratio`: mean distance within a class over mean distance between classes, every pair of images counted;
        smaller is tighter. `silhouette`: mean over the classes of their images' mean silhouette, −1..1, larger is
        tighter. `purity`: mean over the classes of the share of an image's `k` nearest images that are of its
        class, per cent.
    """
    from sklearn.metrics import silhouette_samples

    chosen = random_rows(len(labels), sample, 0)
    features, labels = features[chosen], labels[chosen]
    points = torch.from_numpy(np.ascontiguousarray(features))
    distances = torch.cdist(points, points).double().numpy()
    same = labels[:, None] == labels[None, :]
    between = distances[~same].mean()
    within = distances[same & ~np.eye(len(labels), dtype=bool)].mean()
    classes, counts = np.unique(labels, return_counts=True)
    silhouettes = silhouette_samples(features, labels)
    _, near = nearest_neighbors(points, points, k, exclude_self=True)
    pure = (labels[near.numpy()] == labels[:, None]).mean(1)
    # a class mean first: otherwise the largest class answers for all
    several = classes[counts > 1]
    return {
        "ratio": float(within / between) if between > 0 else np.nan,
        "silhouette": float(np.mean([silhouettes[labels == c].mean() for c in several])),
        "purity": 100 * float(np.mean([pure[labels == c].mean() for c in several])),
    }


def hubness(neighbors: np.ndarray, n_gallery: int) -> dict[str, float]:
    """Do a few gallery images serve as neighbours of many? Statistics of the *k-occurrence*.

    The k-occurrence of a gallery image is how many queries have it among their k nearest. Its skewness is the
    usual measure of hubness (Radovanović, Nanopoulos & Ivanović, JMLR 11, 2010).

    Parameters
    ----------
    neighbors : ndarray, integer, (Q, k)
        Gallery rows, as from `nearest_neighbors`.
    n_gallery : int
        Images in the gallery.

    Returns
    -------
    dict
        `skewness` (0 when all occur equally often); `largest`, the highest k-occurrence; `unused`, the share of
        gallery images that are nobody's neighbour, per cent; `top`, the share of all neighbours that the most used
        hundredth of the gallery (at least one image) provides, per cent.
    """
    counts = np.sort(np.bincount(np.ravel(neighbors), minlength=n_gallery))
    away = counts - counts.mean()
    spread = counts.std()
    most_used = counts[-max(n_gallery // 100, 1) :]
    return {
        "skewness": float(np.mean(away**3) / spread**3) if spread > 0 else 0.0,
        "largest": int(counts[-1]),
        "unused": 100 * float(np.mean(counts == 0)),
        "top": 100 * float(most_used.sum() / counts.sum()),
    }


def random_rows(n: int, sample: int, seed: int) -> np.ndarray:
    """At most `sample` of `n` rows, drawn at random whatever their class; all of them, in order, when there are few."""
    return np.random.default_rng(seed).permutation(n)[:sample] if n > sample else np.arange(n)


def umap_points(train: np.ndarray, test: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """UMAP maps (N, 2) of training and test features; fitted on the training part, kept on disk.

    UMAP differs between machines and versions even with a seed: the map is to look at, never to compare.
    """

    def make() -> dict[str, np.ndarray]:
        import umap

        # one seed means one thread: UMAP says so in a warning that is not news to us
        reducer = umap.UMAP(random_state=seed, n_jobs=1)
        return {"train": reducer.fit_transform(train), "test": reducer.transform(test)}

    points = _kept("umap", (train, test), f"{seed}", make)
    return points["train"], points["test"]


def tsne_points(features: np.ndarray, seed: int = 0, *, sample: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """t-SNE map of features, begun from their principal components; kept on disk.

    t-SNE cannot place new points into a map, so a training and a test part each get their own. As UMAP's, the map is
    to look at.

    Parameters
    ----------
    features : ndarray, float, (N, D)
        At least four images.
    seed : int
    sample : int
        Of more images than this a random part is drawn, whatever their class (seed `seed`).

    Returns
    -------
    points : ndarray, float32, (n, 2)
        n is the smaller of N and `sample`.
    chosen : ndarray, int64, (n,)
        The rows of `features` that the points stand for.
    """

    def make() -> dict[str, np.ndarray]:
        from sklearn.manifold import TSNE

        chosen = random_rows(len(features), sample, seed)
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features[chosen])
        return {"points": points, "chosen": chosen}

    kept = _kept("tsne", (features,), f"{sample}-{seed}", make)
    return kept["points"], kept["chosen"]


def _kept(kind: str, features: tuple[np.ndarray, ...], settings: str, make: Callable) -> dict[str, np.ndarray]:
    """What `make` gives for these very features, made once: `maps/<kind>-<digest of the features>-<settings>.npz`."""
    digest = hashlib.sha256()
    for part in features:
        digest.update(f"{part.shape} {part.dtype}".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    path = data_dir() / "maps" / f"{kind}-{digest.hexdigest()[:16]}-{settings}.npz"
    if not path.is_file():
        made = make()
        with whole_file(path) as temporary:
            np.savez(temporary, **made)
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
