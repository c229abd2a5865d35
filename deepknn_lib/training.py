"""The one training loop.

Images stay uint8 where the network is; crops and flips are made there. Everything random in epoch e is drawn from
a generator seeded with (seed, e), so that a killed run resumes at its last saved epoch.
"""

import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepknn_lib.augment import crop_size, normalize, random_crop_flip
from deepknn_lib.criteria import LOSSES, TRIPLETS, collapsed, criterion_of
from deepknn_lib.models import Network, extract_features, rows_of
from deepknn_lib.neighbors import majority_vote, nearest_neighbors, pairwise_distances
from deepknn_lib.sampling import MODES, BatchSampler
from deepknn_lib.storage import digest, load_state, unknown, whole_file

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD, for every method; the paper names neither


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: the paper's values where it gives one, else our choice (docs/CHOICES.md).

    `loss` is one of `criteria.LOSSES`; `k`, `m` and `margin` are the paper's K, M and α (deep kNN, triplets), `soft`
    takes ln(1 + exp(d)) in place of [d + α]₊ (triplets), `class_power` is the exponent of cross-entropy's weights.
    With `search_every` the deep kNN loss takes its neighbours from the whole training set, searched again after so many
    steps; a batch then is `batch_size` // (1 + K + M) anchors with their neighbours, so that a step costs the same.
    `sampling`, `classes_per_batch`: see `sampling.BatchSampler`. The learning rate `lr` of SGD rises over `warmup`
    epochs and is halved after every `lr_decay_every` (0: never). `seed` is that of batches and crops.
    `precision` is that of the backbone, `float32` or `bf16` (where the device has it).
    """

    loss: str = "deep-knn"
    k: int = 5
    m: int = 5
    margin: float = 0.2
    soft: bool = False
    class_power: float = 1.0
    search_every: int = 0
    epochs: int = 60
    batch_size: int = 96
    sampling: str = "proportional"
    classes_per_batch: int | None = None
    lr: float = 0.01
    warmup: int = 0
    lr_decay_every: int = 20
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self):
        names = {"precision": ("float32", "bf16"), "loss": LOSSES, "sampling": MODES}
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if (self.soft and self.loss not in TRIPLETS) or (self.search_every and self.loss != "deep-knn"):
            told = "soft is for triplet losses, search_every for deep-knn"
            raise ValueError(f"{told}; the loss is {self.loss}")
        least = dict.fromkeys(("k", "m", "epochs", "classes_per_batch"), 1) | {"batch_size": 2}
        least |= dict.fromkeys(("warmup", "search_every", "lr_decay_every", "seed"), 0)
        for name, count in least.items():
            if (value := getattr(self, name)) is not None and value < count:
                raise ValueError(f"{name} must be at least {count}, got {value}")
        finite = math.isfinite(self.lr + self.margin + self.class_power)
        if self.lr <= 0 or self.margin < 0 or not finite or self.seed >= 1 << 43:
            told = f"{self.lr}, {self.margin}, {self.class_power} and {self.seed}"
            needed = "lr must be above 0, margin at least 0, both and class_power finite, and seed below 2^43"
            raise ValueError(f"{needed}; got {told}")

    def lr_at(self, epoch: int, progress: float = math.inf) -> float:
        """Learning rate in an epoch, counted from 1, when `progress` epochs of the training are done."""
        halvings = (epoch - 1) // self.lr_decay_every if self.lr_decay_every else 0
        return self.lr * 0.5**halvings * min(progress / max(self.warmup, 1e-9), 1)

    def sampler(self, labels: Tensor) -> BatchSampler:
        """What draws the batches; of anchors only, when their neighbours come from the whole set."""
        if self.search_every:
            return BatchSampler(labels, max(self.batch_size // (1 + self.k + self.m), 2), self.sampling, 1)
        return BatchSampler(labels, self.batch_size, self.sampling, self.k + 1, self.classes_per_batch)


def fit(network: Network, inputs, labels: Tensor, config: TrainingConfig, *, checkpoint=None, on_epoch=None):
    """Train `network`, which needs a classifier for `weighted-ce`, in place, and return its history.

    Parameters
    ----------
    inputs : Tensor or array-like
        Images, uint8 (N, C, H, W), cropped and flipped at random; or feature vectors, float32 (N, n), as they are.
    labels : Tensor, int64, (N,)
    checkpoint : Path, optional
        File for the state after an epoch. If it exists, training resumes there, whatever weights `network` has, and
        on a CPU ends with the same weights as if it had never stopped. Other images are told by eight of them.
    on_epoch : callable, optional
        Gets each row of the history, the dict of an epoch: `loss`, `active` share of triplets (see `criteria`) and
        `mean_pairwise_distance` of a batch's features are means over batches, `start_distance` is that of the first
        batch, before any step; `train_acc` is leave-one-out kNN on the training set, K_p = 5, per cent; `lr` of the
        last step; `seconds` of training, `eval_seconds` of measuring `train_acc`. ValueError if the batches cannot be
        drawn or the checkpoint is of another training, FloatingPointError if the loss diverges.
    """
    device, network.precision = network.device, config.precision
    if inputs.ndim == 4:
        network.to(memory_format=torch.channels_last)
    criterion = criterion_of(config, network, inputs, labels)
    groups = [{"params": list(part.parameters()), "scale": s} for part, s in ((network, 1), (criterion, 10))]
    groups = [group for group in groups if group["params"]]  # proxies learn ten times as fast as the network
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    parts, history = {"network": network, "criterion": criterion, "optimizer": optimizer}, []
    few = rows_of(inputs, torch.linspace(0, len(labels) - 1, 8).long(), torch.device("cpu")).numpy()
    about = f"{sorted(asdict(config).items())} {inputs.shape} {network.normalize}"
    training, checkpoint = digest(about, labels.cpu().numpy(), few), checkpoint and Path(checkpoint)
    if checkpoint and checkpoint.is_file():
        state = load_state(checkpoint)
        if state["training"] != training:
            raise ValueError(f"{checkpoint} is of another training (settings or images differ); remove it")
        history = state["history"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    sampler, labels, saved = config.sampler(labels.cpu()), labels.to(device), time.monotonic()
    start = history[0]["start_distance"] if history else None
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        batches = sampler.epoch(generator)
        if epoch <= len(history):  # done before; the batches were drawn because the sampler's packs go on
            continue
        if config.search_every:
            batches = batches[: -(-len(labels) // config.batch_size)]
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # read once an epoch: that stalls a GPU
        for step, index in enumerate(batches):
            if config.search_every:
                index = criterion.extend(step, index)
            network.train()
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * config.lr_at(epoch, epoch - 1 + (step + 1) / len(batches))
            rows = rows_of(inputs, index, device)
            if rows.ndim == 4:
                rows = random_crop_flip(rows, crop_size(rows.shape[-1]), generator)
                rows = normalize(rows, network.mean, network.std)
            features = network(rows)
            logits = network.classifier(features) if network.classifier else None
            loss, active = criterion(features, labels[index.to(device)], logits)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            n_pairs = max(len(index) * (len(index) - 1), 1)
            distance = pairwise_distances(features.detach()).sum() / n_pairs
            start, found = distance if start is None else start, (loss, active, distance)
            totals += torch.stack([value.detach().double().to(device) for value in found])
        mean_loss, active, mean_distance = (totals / len(batches)).tolist()
        if not math.isfinite(mean_loss):
            at = f"in epoch {epoch} at lr {config.lr_at(epoch):g}"
            raise FloatingPointError(f"the {config.loss} loss is {mean_loss} {at}; choose a lower lr")
        trained = time.perf_counter()
        accuracy = leave_one_out_accuracy(extract_features(network, inputs), labels)
        row = {"epoch": epoch, "loss": mean_loss, "active": active, "mean_pairwise_distance": mean_distance}
        row |= {"start_distance": float(start), "train_acc": accuracy, "lr": optimizer.param_groups[0]["lr"]}
        history.append(row | {"seconds": trained - started, "eval_seconds": time.perf_counter() - trained})
        if on_epoch:
            on_epoch(history[-1])
        if checkpoint and epoch < config.epochs and (epoch == 1 or time.monotonic() - saved > 20):
            state = {name: part.state_dict() for name, part in parts.items()}
            with whole_file(checkpoint) as temporary:
                torch.save(state | {"history": history, "training": training}, temporary)
            saved = time.monotonic()
    if collapsed(history, config):
        what = f"{config.loss}: the embedding collapsed (mean distance {history[-1]['mean_pairwise_distance']:.2g})"
        advice = "use normalised features, a margin nearer to the features' distances, or a lower lr"
        warnings.warn(f"{what}; {advice}", stacklevel=2)
    return history


def leave_one_out_accuracy(features: Tensor, labels: Tensor, k_predict: int = 5) -> float:
    """Per cent of the training images whose K_p nearest *other* training images vote for their class."""
    k_predict = min(k_predict, len(features) - 1)
    distances, indices = nearest_neighbors(features, features, k_predict, exclude_self=True)
    votes = majority_vote(labels[indices], distances, int(labels.max()) + 1)
    return 100 * (votes == labels).float().mean().item()
