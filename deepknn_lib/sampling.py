"""How a batch is drawn, so that every anchor finds its K positives in it.

The paper: "the stratified sampling was adopted, i.e., forming batches by randomly sampling 9 classes and then
randomly sampling 10 images for each" (SD-198). It does not say how 96 images of 7 classes were drawn on Skin-7.
"""

import torch
from torch import Tensor

MODES = ("proportional", "balanced", "random")


def _quotas(counts: Tensor, batch_size: int, floor: int, mode: str) -> Tensor:
    """Images of each chosen class in one batch: the floor, and above it by class size or evenly."""
    share = counts.double() if mode == "proportional" else torch.ones(len(counts), dtype=torch.float64)
    quota = torch.full((len(counts),), floor)
    for _ in range(batch_size - floor * len(counts)):  # the next image goes where the class lags most (Webster)
        quota[(share / (quota + 0.5)).argmax()] += 1
    return quota


def _refill(pack: Tensor, cards: Tensor) -> Tensor:
    """Shuffled cards under what is left of a pack, those left in it last, so that none comes twice in a hand."""
    repeated = torch.isin(cards, pack)
    return torch.cat([pack, cards[~repeated], cards[repeated]])


def epoch_batches(
    labels: Tensor,
    batch_size: int,
    *,
    mode: str = "proportional",
    min_per_class: int = 6,
    classes_per_batch: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """The batches of one epoch, as indices into `labels`.

    Parameters
    ----------
    labels : Tensor, integer, (N,)
    batch_size : int
        The paper's B; every batch has exactly this size (`random`: the last may be smaller).
    mode : {"proportional", "balanced", "random"}
        `proportional`: at least `min_per_class` of each class in the batch, the rest in the data's proportions
        (our default). `balanced`: equally many of each, the paper's rule for SD-198. `random`: a plain shuffle,
        for cross-entropy, which needs no positives.
    min_per_class : int
        K + 1, so that an anchor finds K positives. A class with fewer images gives some of them twice.
    classes_per_batch : int, optional
        Classes in one batch (SD-198: 9). Default: as many as fit at `min_per_class` each.
    generator : torch.Generator
        The only source of randomness.

    Returns
    -------
    list of Tensor, int64, (batch_size,)
        About N / batch_size batches, and enough for every class to come up in the epoch. Each class deals its
        images from a shuffled pack and reshuffles it when it runs out, so no image waits long for its turn.

    Raises
    ------
    ValueError
        If there are no labels, the mode is unknown or the batch is too small for two classes.
    """
    if mode not in MODES:
        raise ValueError(f"unknown sampling mode {mode!r}; choose one of {', '.join(MODES)}")
    if len(labels) == 0:
        raise ValueError("there are no images to draw batches from")
    if batch_size < 1 or min_per_class < 1:
        raise ValueError(f"batch_size and min_per_class must be at least 1, got {batch_size} and {min_per_class}")
    if mode == "random":
        return list(torch.randperm(len(labels), generator=generator).split(batch_size))

    classes, counts = labels.unique(return_counts=True)
    fitting = batch_size // min_per_class
    wanted = min(fitting if classes_per_batch is None else classes_per_batch, len(classes))
    if wanted > fitting or wanted < min(2, len(classes)):
        raise ValueError(
            f"a batch of {batch_size} cannot hold {max(wanted, 2)} classes with {min_per_class} images each; raise "
            "batch_size, or lower classes_per_batch or K"
        )
    members = [(labels == c).nonzero().squeeze(1) for c in classes]
    packs = [torch.empty(0, dtype=torch.int64) for _ in classes]

    def deal(c: int, count: int) -> Tensor:
        while len(packs[c]) < count:
            packs[c] = _refill(packs[c], members[c][torch.randperm(len(members[c]), generator=generator)])
        dealt, packs[c] = packs[c][:count], packs[c][count:]
        return dealt

    n_batches = max(-(-len(labels) // batch_size), -(-len(classes) // wanted))
    turns = torch.empty(0, dtype=torch.int64)
    batches = []
    for _ in range(n_batches):
        if wanted == len(classes):
            chosen = torch.arange(len(classes))
        else:  # classes are dealt from a pack too
            if len(turns) < wanted:
                turns = _refill(turns, torch.randperm(len(classes), generator=generator))
            chosen, turns = turns[:wanted], turns[wanted:]
        quotas = _quotas(counts[chosen], batch_size, min_per_class, mode)
        batches.append(torch.cat([deal(int(c), int(q)) for c, q in zip(chosen, quotas, strict=True)]))
    return batches
