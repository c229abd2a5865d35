"""The deep kNN loss with its gradient, next to pytorch-metric-learning's triplet loss, which is given the triplets."""

import pytest
import torch
from pytorch_metric_learning import distances, losses, reducers

from deepknn_lib.losses import deep_knn_loss
from deepknn_lib.neighbors import batch_neighbors

pytest.importorskip("pytest_benchmark")
K = M = 5


def batch(size, width):
    features = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(features, dim=1).requires_grad_(), torch.arange(size) % 7


def ours(features, labels):
    return lambda: deep_knn_loss(features, labels, K, M, 0.2)


def pytorch_metric_learning(features, labels):
    euclidean = distances.LpDistance(normalize_embeddings=False)
    loss = losses.TripletMarginLoss(0.2, distance=euclidean, reducer=reducers.MeanReducer())
    near = batch_neighbors(features, labels, K, M)
    anchor = torch.arange(len(labels)).repeat_interleave(K * M)
    positive = near.positive.repeat_interleave(M, dim=1).flatten()
    negative = near.negative.repeat(1, K).flatten()
    return lambda: loss(features, labels, indices_tuple=(anchor, positive, negative))


@pytest.mark.parametrize("width", [128, 512, 2048])
@pytest.mark.parametrize("size", [96, 512, 2048])
@pytest.mark.parametrize("contender", [ours, pytorch_metric_learning])
def bench_loss(benchmark, contender, size, width):
    benchmark.group = f"loss and gradient, B={size}, D={width}, K=M={K}"
    features, labels = batch(size, width)
    loss = contender(features, labels)
    assert loss().item() == pytest.approx(ours(features, labels)().item(), rel=1e-4)
    benchmark(lambda: torch.autograd.grad(loss(), features))
