"""What a network is trained with: the deep kNN loss, cross-entropy, and metric losses of pytorch-metric-learning.

A criterion maps features (B, D), labels (B,) and logits of a batch to the loss and the share of its terms that are
active (a hinge above 0), which is NaN for a loss without triplets. It may hold parameters to train (proxies).
"""

import math

import torch
from torch import Tensor, nn

from deepknn_lib.losses import class_weights, deep_knn_terms, hinges, mean_term
from deepknn_lib.models import Network, extract_features
from deepknn_lib.neighbors import Neighbors, check_batch, nearest_neighbors

# Hermans et al. (2017), the paper's reference 16, and FaceNet, its reference 17
TRIPLETS = ("triplet", "semi-hard")
LOSSES = ("deep-knn", "weighted-ce", *TRIPLETS, "supcon", "proxy-anchor", "multi-similarity", "nca-loss")


def criterion_of(config, network: Network, inputs, labels: Tensor) -> nn.Module:
    """The criterion of a `training.TrainingConfig`, on the network's device; `inputs` are for whole-set search."""
    if config.loss == "weighted-ce":
        if network.classifier is None:
            raise ValueError("weighted-ce needs a network with a classifier; give build_network n_classes")
        weights = class_weights(labels.cpu(), network.classifier.out_features, config.class_power)
        return _CrossEntropy(weights).to(network.device)
    if config.loss == "deep-knn":
        return _DeepKNN(config, network, inputs, labels)
    with torch.random.fork_rng(devices=[]):  # the proxies' first values come from the seed
        torch.manual_seed(config.seed)
        return _Rival(config, int(labels.max()) + 1, network.n_features).to(network.device)


def collapsed(history: list[dict], config) -> bool:
    """Whether a triplet loss drew (nearly) all features into one point.

    The mean distance between two images of a batch then ends below a tenth of what it was before the first step, and
    the loss at its value for one point: each hinge equals α (a soft one ln 2), and nearly all triplets are active.
    """
    if config.loss not in ("deep-knn", *TRIPLETS) or not history:
        return False
    last, settled = history[-1], math.log(2) if config.soft else config.margin
    return last["mean_pairwise_distance"] < last["start_distance"] / 10 and last["loss"] > 0.8 * settled


class _DeepKNN(nn.Module):
    """The deep kNN loss with neighbours from the batch (`losses.deep_knn_loss`), or from the whole training set.

    The whole set (Fig. 1, left) is searched every few steps; `extend` then brings the neighbours into the batch.
    """

    def __init__(self, config, network: Network, inputs, labels: Tensor):
        super().__init__()
        self.config, k, m = config, config.k, config.m
        self.search = lambda: whole_set_neighbors(extract_features(network, inputs), labels, k, m)

    def extend(self, step: int, anchors: Tensor) -> Tensor:
        """The batch: indices of the anchors, then of each anchor's K positives, then of each one's M negatives."""
        if step % self.config.search_every == 0:
            self.whole = [part.cpu() for part in self.search()]
        self.near = Neighbors(*(part[anchors] for part in self.whole))
        return torch.cat([anchors, self.near.positive.flatten(), self.near.negative.flatten()])

    def forward(self, features: Tensor, labels: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.search_every:
            terms, valid = whole_set_terms(features, self.near, config.margin)
        else:
            terms, valid = deep_knn_terms(features, labels, config.k, config.m, config.margin)
        return mean_term(terms, valid), mean_term((terms > 0).double(), valid)


class _CrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of the logits with a weight for each class."""

    def forward(self, _: Tensor, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(logits, labels), torch.tensor(math.nan)


class _Rival(nn.Module):
    """A loss of pytorch-metric-learning, at its defaults, except for the triplet losses."""

    def __init__(self, config, n_classes: int, n_features: int):
        super().__init__()
        from pytorch_metric_learning import distances, losses, miners, reducers

        self.triplets, self.active_above = config.loss in TRIPLETS, math.log(2) if config.soft else 0
        euclidean = {"distance": distances.LpDistance(normalize_embeddings=False)}
        margin = {"margin": 0 if config.soft else config.margin, "smooth_loss": config.soft}
        triplet = losses.TripletMarginLoss(**margin, **euclidean, reducer=reducers.DoNothingReducer())
        self.loss, self.miner = {
            "triplet": (triplet, miners.BatchHardMiner(**euclidean)),
            "semi-hard": (triplet, miners.TripletMarginMiner(config.margin, "semihard", **euclidean)),
            "supcon": (losses.SupConLoss(), None),
            "proxy-anchor": (losses.ProxyAnchorLoss(n_classes, n_features), None),
            "multi-similarity": (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
            "nca-loss": (losses.NCALoss(), None),
        }[config.loss]

    def forward(self, features: Tensor, labels: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = self.loss(features, labels, self.miner(features, labels) if self.miner else None)
        nothing = 0 * features.sum()  # a gradient also where the batch holds no pair
        if not self.triplets:
            return found + nothing, torch.tensor(math.nan)
        terms = found["loss"]["losses"]
        if not isinstance(terms, Tensor) or not terms.numel():
            return nothing, torch.tensor(0.0)
        return terms.mean(), (terms > self.active_above).double().mean()


def whole_set_terms(features: Tensor, near: Neighbors, margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """Eq. 2 with neighbours from the whole training set: (A, K, M) hinges, and which of them exist.

    `features` (A·(1 + K + M), D) holds the A anchors, then each anchor's K positives, then each anchor's M negatives.
    Only the masks of `near`, the anchors' rows of `whole_set_neighbors`, are read.
    """
    (a, k), m = near.positive.shape, near.negative.shape[1]
    anchors, positives, negatives = features.float().split([a, a * k, a * m])
    to_positives = torch.linalg.vector_norm(anchors[:, None] - positives.view(a, k, -1), dim=2)
    to_negatives = torch.linalg.vector_norm(anchors[:, None] - negatives.view(a, m, -1), dim=2)
    masks = [mask.to(features.device) for mask in (near.positive_valid, near.negative_valid)]
    return hinges(to_positives, to_negatives, *masks, margin)


def whole_set_neighbors(features: Tensor, labels: Tensor, k: int = 5, m: int = 5) -> Neighbors:
    """As `neighbors.batch_neighbors`, in a whole training set: class by class, so that memory is bounded."""
    check_batch(features, labels, k=k, m=m)
    labels = labels.to(features.device)
    # -1 stands for a neighbour that does not exist.
    positive, negative = (torch.full((len(labels), n), -1, device=labels.device) for n in (k, m))
    for c in labels.unique():
        members, others = (labels == c).nonzero().squeeze(1), (labels != c).nonzero().squeeze(1)
        for found, gallery, itself in ((positive, members, True), (negative, others, False)):
            count = min(found.shape[1], len(gallery) - itself)
            if count >= 1:
                _, near = nearest_neighbors(features[members], features[gallery], count, exclude_self=itself)
                found[members, :count] = gallery[near]
    return Neighbors(positive.clamp(min=0), negative.clamp(min=0), positive >= 0, negative >= 0)
