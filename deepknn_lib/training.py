"""The one training loop, and the features of a trained network.

Images stay uint8 where the network is; crops and flips are made there. Everything random in epoch e is drawn from
a generator seeded with (seed, e), so a run that was killed resumes at its last epoch with nothing else to restore.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepknn_lib.augment import center_crop, crop_size, normalize, random_crop_flip
from deepknn_lib.checkpoint import restore, save
from deepknn_lib.images import Rows
from deepknn_lib.losses import batch_hard_terms, class_weights, deep_knn_terms, mean_term, whole_set_terms
from deepknn_lib.models import Network
from deepknn_lib.neighbors import Neighbors, batch_distances, majority_vote, nearest_neighbors, whole_set_neighbors
from deepknn_lib.sampling import epoch_batches

LOSSES = ("deep-knn", "triplet", "weighted-ce")


@dataclass(frozen=True)
class Recipe:
    """How to train; the paper's values where it gives one, else our choice (see README, "What the paper leaves open").

    Attributes
    ----------
    loss : {"deep-knn", "triplet", "weighted-ce"}
    k, m : int
        The paper's K and M (deep kNN only).
    margin : float
        The paper's α, in units of the feature distance.
    soft : bool
        Softplus in place of hinge and margin (triplet only); see `losses.batch_hard_triplet_loss`.
    search_every : int
        0: neighbours are searched inside the batch. Else the deep kNN loss takes them from the whole training set,
        and that is searched again after so many steps; a batch then is `batch_size` // (1 + K + M) anchors with their
        neighbours, so that a step costs the same.
    epochs, batch_size : int
    sampling : str
        See `sampling.epoch_batches`.
    classes_per_batch : int or None
    lr, momentum, weight_decay : float
        Of SGD.
    warmup : int
        Epochs over which the learning rate rises to `lr`, step by step.
    lr_decay_every : int
        Epochs after which the learning rate is halved; 0: never.
    seed : int
        Of batches and crops.
    """

    loss: str = "deep-knn"
    k: int = 5
    m: int = 5
    margin: float = 0.2
    soft: bool = False
    search_every: int = 0
    epochs: int = 60
    batch_size: int = 96
    sampling: str = "proportional"
    classes_per_batch: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0
    lr_decay_every: int = 20
    seed: int = 0

    def __post_init__(self):
        if self.soft and self.loss != "triplet":
            raise ValueError(f"soft is the triplet loss's; {self.loss} has a margin")
        if self.search_every and self.loss != "deep-knn":
            raise ValueError(f"search_every is for the deep kNN loss, not for {self.loss}")
        if self.warmup < 0 or self.search_every < 0:
            raise ValueError(f"warmup and search_every are 0 or more, got {self.warmup} and {self.search_every}")

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1."""
        return self.lr * 0.5 ** ((epoch - 1) // self.lr_decay_every) if self.lr_decay_every else self.lr


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _autocast(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _augmented(inputs: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """A batch as the network takes it: images cropped and flipped at random; feature vectors as they are."""
    if inputs.ndim == 2:
        return inputs[index]
    return _prepare(random_crop_flip(_rows(inputs, index), crop_size(inputs.shape[-1]), generator))


def _rows(inputs: Tensor | Rows, index: Tensor) -> Tensor:
    """The images at `index`, where that is; the others may be there, in pinned memory, or on disk."""
    if isinstance(inputs, Rows):
        return torch.from_numpy(inputs[index.cpu().numpy()]).to(index.device)
    return inputs[index.to(inputs.device)].to(index.device, non_blocking=True)


def device_of(network: Network) -> torch.device:
    """Where its weights are."""
    return next(network.parameters()).device


def on_device(images: np.ndarray | Rows, device: torch.device) -> Tensor | Rows:
    """Images as a tensor there; on pinned pages if they would take more than half of a GPU; `Rows` stay on disk."""
    if isinstance(images, Rows):
        return images
    tensor = torch.from_numpy(images)
    if device.type == "cuda" and tensor.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return tensor.pin_memory()
    return tensor.to(device)


def _prepare(images: Tensor) -> Tensor:
    return normalize(images).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract_features(network: Network, inputs: Tensor | Rows, batch_size: int = 256) -> Tensor:
    """Features float32 (N, D) of uint8 images (N, C, H, W), from their central crop, or of float vectors (N, n)."""
    network.eval()
    device, parts = device_of(network), []
    for start in range(0, len(inputs), batch_size):
        index = torch.arange(start, min(start + batch_size, len(inputs)), device=device)
        block = inputs[start : start + batch_size] if inputs.ndim == 2 else _rows(inputs, index)
        if block.ndim == 4:
            block = _prepare(center_crop(block, crop_size(block.shape[-1])))
        with _autocast(device):
            parts.append(network(block).float())
    return torch.cat(parts)


def leave_one_out_accuracy(features: Tensor, labels: Tensor, k_predict: int = 5) -> float:
    """Per cent of the training images whose K_p nearest *other* training images vote for their class."""
    k_predict = min(k_predict, len(features) - 1)
    distances, indices = nearest_neighbors(features, features, k_predict, exclude_self=True)
    votes = majority_vote(labels[indices], distances, int(labels.max()) + 1)
    return 100 * (votes == labels).float().mean().item()


def _draw(labels: Tensor, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """The batches of an epoch; of anchors only when their neighbours come from the whole set."""
    size, least, classes = recipe.batch_size, recipe.k + 1, recipe.classes_per_batch
    if recipe.search_every:
        size, least, classes = max(size // (1 + recipe.k + recipe.m), 2), 1, None
    batches = epoch_batches(
        labels, size, mode=recipe.sampling, min_per_class=least, classes_per_batch=classes, generator=generator
    )
    return batches[: -(-len(labels) // recipe.batch_size)] if recipe.search_every else batches


def _terms(recipe: Recipe, features: Tensor, labels: Tensor, near: Neighbors | None) -> tuple[Tensor, Tensor]:
    if near is not None:
        return whole_set_terms(features, near, recipe.margin)
    if recipe.loss == "deep-knn":
        return deep_knn_terms(features, labels, recipe.k, recipe.m, recipe.margin)
    return batch_hard_terms(features, labels, recipe.margin, recipe.soft)


def fit(
    network: Network,
    inputs: Tensor | Rows,
    labels: Tensor,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train `network` in place.

    Parameters
    ----------
    network : Network
        On the device of the inputs; with a classifier for `weighted-ce`.
    inputs : Tensor or Rows
        Images, uint8 (N, C, H, W), cropped and flipped at random; or feature vectors, float32 (N, n), taken as they are.
    labels : Tensor, int64, (N,)
    recipe : Recipe
    checkpoint : Path, optional
        File for the state after an epoch. If it exists, training resumes there, and on a CPU ends with the
        same weights as if it had never stopped.
    on_epoch : callable, optional
        Gets each epoch's row of the history.

    Returns
    -------
    list of dict
        One row an epoch. `loss`: mean over batches. `active`: share of triplets whose hinge is above 0 (soft triplet:
        whose positive is not the nearer one; NaN for cross-entropy). `spread`: mean distance between two images of a
        batch. `train_acc`: leave-one-out kNN on the training set, K_p = 5, per cent. `lr` of the last step;
        `seconds` of training, `eval_seconds` of measuring `train_acc`.

    Raises
    ------
    ValueError
        If the loss is unknown or the batches cannot be drawn.
    FloatingPointError
        If the loss is no longer finite.
    """
    if recipe.loss not in LOSSES:
        raise ValueError(f"unknown loss {recipe.loss!r}; choose one of {', '.join(LOSSES)}")
    device = device_of(network)
    if inputs.ndim == 4:
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    labels_cpu, labels = labels.cpu(), labels.to(device)
    if recipe.loss == "weighted-ce":
        weights = class_weights(labels_cpu, network.classifier.out_features).to(device)
    history = restore(checkpoint, network, optimizer) if checkpoint else []
    saved = time.monotonic()
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        started = time.perf_counter()
        generator = _generator(recipe.seed, epoch)
        batches = _draw(labels_cpu, recipe, generator)
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # stays there: reading it would stall a GPU
        for step, index in enumerate(batches):
            index, near = index.to(device), None
            if recipe.search_every:
                if step % recipe.search_every == 0:
                    whole = whole_set_neighbors(extract_features(network, inputs), labels, recipe.k, recipe.m)
                near = Neighbors(*(part[index] for part in whole))
                index = torch.cat([index, near.positive.flatten(), near.negative.flatten()])
            network.train()
            for group in optimizer.param_groups:
                rising = ((epoch - 1) * len(batches) + step + 1) / max(recipe.warmup * len(batches), 1)
                group["lr"] = recipe.lr_at(epoch) * min(rising, 1)
            with _autocast(device):
                features = network(_augmented(inputs, index, generator))
                if recipe.loss == "weighted-ce":
                    logits = network.classifier(features)
            if recipe.loss == "weighted-ce":
                loss = torch.nn.functional.cross_entropy(logits.float(), labels[index], weight=weights)
                active = torch.tensor(math.nan)
            else:
                terms, valid = _terms(recipe, features, labels[index], near)
                loss = mean_term(terms, valid)
                active = mean_term((terms > (math.log(2) if recipe.soft else 0)).double(), valid)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            spread = batch_distances(features.detach()).sum() / max(len(index) * (len(index) - 1), 1)
            totals += torch.stack([value.detach().double().to(device) for value in (loss, active, spread)])
        mean_loss, active, spread = (totals / len(batches)).tolist()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"the {recipe.loss} loss is {mean_loss} in epoch {epoch} at lr {recipe.lr_at(epoch):g}; lower lr"
            )
        trained = time.perf_counter()
        train_acc = leave_one_out_accuracy(extract_features(network, inputs), labels)
        row = {"epoch": epoch, "loss": mean_loss, "active": active, "spread": spread, "train_acc": train_acc}
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": trained - started}
        row["eval_seconds"] = time.perf_counter() - trained
        history.append(row)
        if on_epoch:
            on_epoch(row)
        if checkpoint and epoch < recipe.epochs and (epoch == 1 or time.monotonic() - saved > 20):
            save(checkpoint, network, optimizer, history)
            saved = time.monotonic()
    if collapsed(history, recipe):
        warnings.warn(
            f"{recipe.loss}: the loss settled at {history[-1]['loss']:.3g}, its value when all distances are 0, and the "
            f"features shrank to a mean distance of {history[-1]['spread']:.2g}: the embedding collapsed. Use "
            "normalised features, a margin nearer to the features' distances, or a lower lr",
            stacklevel=2,
        )
    return history


def collapsed(history: list[dict], recipe: Recipe) -> bool:
    """Whether a triplet loss ended at its value for one point, with (nearly) all features in one point.

    When every distance is 0 each hinge equals α (a soft one ln 2): all triplets are active and nothing is learnt.
    """
    if recipe.loss == "weighted-ce" or not history:
        return False
    last, settled = history[-1], math.log(2) if recipe.soft else recipe.margin
    return last["spread"] < settled / 2 and last["loss"] > 0.8 * settled
