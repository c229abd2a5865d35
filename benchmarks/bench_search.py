"""Exact search of the five nearest: Q queries in a gallery of G rows of D features."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from deepknn_lib.neighbors import nearest_neighbors

pytest.importorskip("pytest_benchmark")


def ours(queries, gallery):
    return nearest_neighbors(torch.from_numpy(queries), torch.from_numpy(gallery), 5)[1].numpy()


def faiss(queries, gallery):
    from faiss import IndexFlatL2

    index = IndexFlatL2(gallery.shape[1])
    index.add(gallery)
    return index.search(queries, 5)[1]


def scikit_learn(queries, gallery):
    return NearestNeighbors(n_neighbors=5, algorithm="brute").fit(gallery).kneighbors(queries)[1]


@pytest.mark.parametrize("shape", [(2005, 8005, 2048), (2000, 200_000, 128)])
@pytest.mark.parametrize("contender", [ours, faiss, scikit_learn])
def bench_search(benchmark, contender, shape):
    if contender is faiss:  # skipped before anything is measured
        pytest.importorskip("faiss")
    benchmark.group = "search, Q={:,}, G={:,}, D={:,}".format(*shape)
    rng = np.random.default_rng(0)
    queries, gallery = (rng.standard_normal((n, shape[2]), dtype=np.float32) for n in shape[:2])
    found = benchmark.pedantic(contender, (queries, gallery), rounds=5, warmup_rounds=1)
    assert (found[:50] == ours(queries[:50], gallery)).mean() > 0.999
