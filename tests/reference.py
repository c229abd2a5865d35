"""What the library computes, written again as plain loops over one image at a time; slow and in float64."""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def random_batch(seed, size=24, dim=6, classes=5, normalised=False):
    """Features and labels of a long-tailed batch: each class is about half as frequent as the one before."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 0.5 ** torch.arange(classes, dtype=torch.float64)
    labels = frequency.multinomial(size, replacement=True, generator=generator)
    centers = torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    features = centers[labels] + torch.randn(size, dim, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(features, dim=1) if normalised else features, labels


def search(queries, gallery, k, exclude_self=False):
    """Indices of the k nearest gallery rows of each query; equal distances in the gallery's order."""
    rows = []
    for q, query in enumerate(queries):
        ranked = sorted((float(torch.dist(query, other)), g) for g, other in enumerate(gallery))
        rows.append([g for _, g in ranked if not (exclude_self and g == q)][:k])
    return torch.tensor(rows)


def neighbors(features, labels, i):
    """Images of i's class without i, and images of the other classes, each nearest first."""
    (ranked,) = search(features.detach()[i : i + 1], features.detach(), None).tolist()
    return [[j for j in ranked if j != i and (labels[j] == labels[i]) == same] for same in (True, False)]


def deep_knn_hinges(features, labels, k, m, margin):
    """Eq. 2 for every triplet that exists; Eq. 3 is their mean."""
    hinges = []
    for i, anchor in enumerate(features):
        same, other = neighbors(features, labels, i)
        for y, z in itertools.product(same[:k], other[:m]):
            gap = torch.dist(anchor, features[y]) + margin - torch.dist(anchor, features[z])
            hinges.append(gap if gap > 0 else 0 * gap)
    return torch.stack(hinges)


def vote(labels, distances):
    """The most frequent label of one query; of those tied, the one whose nearest neighbour is nearest."""
    labels, distances = labels.tolist(), distances.tolist()
    most = max(map(labels.count, labels))
    tied = [(d, place) for place, d in enumerate(distances) if labels.count(labels[place]) == most]
    return labels[min(tied)[1]]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return result
