"""What the library computes, written again as plain loops over one image at a time; slow and in float64."""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def random_batch(seed, size=24, dim=6, classes=5, normalised=False):
    """Features and labels of a long-tailed batch: each class is about half as frequent as the one before."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 0.5 ** torch.arange(classes, dtype=torch.float64)
    labels = frequency.multinomial(size, replacement=True, generator=generator)
    centers = torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    features = centers[labels] + torch.randn(size, dim, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(features, dim=1) if normalised else features, labels


def distance(a, b):
    return ((a - b) ** 2).sum().sqrt()


def neighbors(features, labels, i):
    """Images of i's class without i, and images of the other classes, each nearest first."""
    features = features.detach()
    ranked = sorted((float(distance(features[i], features[j])), j) for j in range(len(labels)) if j != i)
    return [[j for _, j in ranked if (labels[j] == labels[i]) == same] for same in (True, False)]


def deep_knn_hinges(features, labels, k, m, margin):
    """Eq. 2 for every triplet that exists; Eq. 3 is their mean."""
    hinges = []
    for i, anchor in enumerate(features):
        same, other = neighbors(features, labels, i)
        for y, z in itertools.product(same[:k], other[:m]):
            gap = distance(anchor, features[y]) + margin - distance(anchor, features[z])
            hinges.append(gap if gap > 0 else 0 * gap)
    return torch.stack(hinges)


def deep_knn_loss(*batch):
    return deep_knn_hinges(*batch).mean()


def search(queries, gallery, k, exclude_self=False):
    """Indices of the k nearest gallery rows of each query; equal distances in the gallery's order."""
    rows = []
    for q, query in enumerate(queries):
        others = [g for g in range(len(gallery)) if not (exclude_self and g == q)]
        rows.append([g for _, g in sorted((float(distance(query, gallery[g])), g) for g in others)[:k]])
    return torch.tensor(rows)


def vote(labels, distances):
    """The most frequent label of one query; of those tied, the one whose nearest neighbour is nearest."""
    labels, distances = labels.tolist(), distances.tolist()
    most = max(labels.count(label) for label in labels)
    tied = [(d, place) for place, d in enumerate(distances) if labels.count(labels[place]) == most]
    return labels[min(tied)[1]]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            self.numel = max(self.numel, value.numel() if isinstance(value, torch.Tensor) else 0)
        return result
