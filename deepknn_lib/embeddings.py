"""How features lie: measured (compactness, silhouette, purity), and drawn (UMAP)."""

import numpy as np
import torch

from deepknn_lib.experiments import Result
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

    if len(labels) > sample:
        chosen = np.random.default_rng(0).permutation(len(labels))[:sample]
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


def umap_points(result: Result, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """UMAP maps (N, 2) of a run's training and test features; fitted on the training part, kept on disk.

    UMAP differs between machines and versions even with a seed: the map is to look at, never to compare.
    """
    path = data_dir() / "umap" / f"{result.run.key}-{seed}.npz"
    if not path.is_file():
        import umap

        # one seed means one thread: UMAP says so in a warning that is not news to us
        reducer = umap.UMAP(random_state=seed, n_jobs=1)
        train = reducer.fit_transform(result.arrays["train_features"])
        test = reducer.transform(result.arrays["test_features"])
        with whole_file(path) as temporary:
            np.savez(temporary, train=train, test=test)
    with np.load(path, allow_pickle=False) as stored:
        return stored["train"], stored["test"]
