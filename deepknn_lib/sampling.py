"""How a batch is drawn, so that every anchor finds its K positives in it.

The paper: "the stratified sampling was adopted, i.e., forming batches by randomly sampling 9 classes and then
randomly sampling 10 images for each" (SD-198). It does not say how 96 images of 7 classes were drawn on Skin-7.
"""

import torch
from torch import Tensor

MODES = ("proportional", "balanced", "random")


class BatchSampler:
    """Batches of indices into `labels`; each class deals its images from a shuffled pack that lasts over epochs.

    Parameters
    ----------
    labels : Tensor or ndarray, integer, (N,)
    batch_size : int
        The paper's B; every batch has this size (`random`: the last of an epoch has 2 to B + 1 images).
    mode : {"proportional", "balanced", "random"}
        `proportional`: at least `min_per_class` of each class in the batch, the rest in the data's proportions.
        `balanced`: equally many of each, the paper's rule for SD-198. `random`: a plain shuffle, for cross-entropy.
    min_per_class : int
        K + 1, so that an anchor finds K positives. A class with fewer images gives some of them twice.
    classes_per_batch : int, optional
        Classes in one batch (SD-198: 9). Default: as many as fit at `min_per_class` each. ValueError for a batch too
        small for two classes, for labels of another kind or none, and for an unknown mode.
    """

    def __init__(self, labels, batch_size, mode="proportional", min_per_class=6, classes_per_batch=None):
        labels = torch.as_tensor(labels).cpu()
        if len(labels) and (labels.ndim != 1 or labels.is_floating_point()):  # NaN is no class
            raise ValueError(f"labels must be integers (N,), got {labels.dtype} {tuple(labels.shape)}")
        if mode not in MODES:
            raise ValueError(f"unknown sampling mode {mode!r}; choose one of {', '.join(MODES)}")
        if min(len(labels), batch_size, min_per_class) < 1:
            given = f"{len(labels)}, {batch_size} and {min_per_class}"
            raise ValueError(f"images, batch_size and min_per_class must be at least 1, got {given}")
        classes, self.counts = labels.unique(return_counts=True)
        fitting = batch_size if mode == "random" else batch_size // min_per_class
        self.wanted = min(classes_per_batch or fitting, len(classes))
        if self.wanted > fitting or self.wanted < min(2, len(classes)):
            needed = f"{max(self.wanted, 2)} classes with {min_per_class} images each"
            fix = "raise batch_size, or lower classes_per_batch or K"
            raise ValueError(f"a batch of {batch_size} cannot hold {needed}; {fix}")
        self.batch_size, self.mode, self.floor, self.size = batch_size, mode, min_per_class, len(labels)
        self.members = [(labels == c).nonzero().squeeze(1) for c in classes]
        self.packs = {}

    def epoch(self, generator: torch.Generator) -> list[Tensor]:
        """The batches of the next epoch, int64 (batch_size,): about N / B, and enough to meet every class."""
        if self.mode == "random":
            batches = list(torch.randperm(self.size, generator=generator).split(self.batch_size))
            if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot take a single image
                batches[-2:] = [torch.cat(batches[-2:])]
            return batches
        classes, batches = torch.arange(len(self.members)), []
        for _ in range(max(-(-self.size // self.batch_size), -(-len(classes) // self.wanted))):
            some = self.wanted < len(classes)  # then classes are dealt from a pack too
            chosen = self._deal("classes", classes, self.wanted, generator) if some else classes
            quotas = zip(chosen.tolist(), self._quotas(chosen), strict=True)
            batches.append(torch.cat([self._deal(c, self.members[c], n, generator) for c, n in quotas]))
        return batches

    def _quotas(self, chosen: Tensor) -> list[int]:
        """Images of each chosen class in one batch: the floor, and above it by class size or evenly."""
        share = self.counts[chosen].double() if self.mode == "proportional" else torch.ones(len(chosen))
        quota = torch.full((len(chosen),), self.floor)
        for _ in range(self.batch_size - self.floor * len(chosen)):
            lagging = (share / (quota + 0.5)).argmax()  # Webster's method of dividing seats
            quota[lagging] += 1
        return quota.tolist()

    def _deal(self, name, cards: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The next `count` of a pack; shuffled cards go under it, those that still wait in it last."""
        pack = self.packs.get(name, cards[:0])
        while len(pack) < count:
            fresh = cards[torch.randperm(len(cards), generator=generator)]
            waiting = (fresh[:, None] == pack).sum(1)
            pack = torch.cat([pack, fresh[waiting.argsort(stable=True)]])
        self.packs[name] = pack[count:]
        return pack[:count]
