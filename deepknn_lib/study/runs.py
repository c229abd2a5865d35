"""What a run is: a method on a data set with all its settings, frozen and hashable; and the grids of a comparison."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from deepknn_lib.criteria import LOSSES
from deepknn_lib.datasets.load import check_split
from deepknn_lib.models import NORMALIZE, SMALL
from deepknn_lib.storage import digest, unknown
from deepknn_lib.training import TrainingConfig

CODE = 4  # raise when a change to the library changes what a Run gives: old cache entries are then left alone
SOFTMAX = 0  # the K_p of results rows that are judged by the network's own classifier


class Method(NamedTuple):
    """What sets a method apart; `loss` None: nothing is trained. `votes` are the values of K_p reported.

    `base` is the method whose network it starts from or, `on_features`, whose features it is trained on (Table 3).
    `settings` hold under every profile, whatever it says: the batches of cross-entropy need no positives, and features
    are not normalised where no training searches neighbours in them.
    """

    title: str
    color: str
    loss: str | None = None
    votes: Sequence[int] = (1, 5)
    base: str | None = None
    on_features: bool = False
    settings: dict[str, object] = {}


def _read(name: str) -> dict[str, dict]:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


METHODS = {name: Method(**about) for name, about in _read("methods.json").items()}
TABLE2 = ("knn", "triplet", "deep-knn", "weighted-ce", "ce-knn", "deep-knn-ft")
TABLE3 = ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce", "mlp-deep-knn")
TABLE4 = ("ce-knn", "deep-knn")

# Settings that a profile gives to all its methods ("all"), then to a data set, then to a method. docs/CHOICES.md says
# which of them were chosen by trials, as many for each method, on a validation part of skin7's training images.
PROFILES = _read("profiles.json")
# What a run shares with the base that it starts from, where it was given: every other field is one method's own.
_SHARED = ("split", "fold", "seed", "image_size", "evaluate_on", "backbone", "weights")
_SHARED += ("epochs", "lr_decay_every", "batch_size", "precision", "class_power")


@dataclass(frozen=True)
class Run(TrainingConfig):
    """One training and how it is judged: hashable, and the same wherever it is executed.

    `dataset`, `split`, `fold` and `image_size` are those of `datasets.load_dataset`, `backbone` and `weights` those of
    `models.build_network`, `normalize` is that of `models.Network`. `method` is one of `METHODS` and gives the `loss`;
    `seed` is also that of the initialisation. `k_predict` is the paper's K_p, or `SOFTMAX`. `evaluate_on` is `test`, or
    `validation` for a fifth of the training part. `base` is the run whose network or features this one starts from.
    """

    dataset: str = "lesions"
    method: str = "deep-knn"
    split: str = "paper"
    fold: int = 1
    backbone: str = SMALL
    weights: str = "none"
    image_size: int = 48
    k_predict: int = 5
    normalize: str = "batch-l2"
    evaluate_on: str = "test"
    base: "Run | None" = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        method = METHODS[self.method]
        object.__setattr__(self, "loss", method.loss if method.loss in LOSSES else "deep-knn")
        super().__post_init__()
        least = SOFTMAX if method.loss == "weighted-ce" else 1
        if self.k_predict < least:
            raise ValueError(f"k_predict must be at least {least} for {self.method}, got {self.k_predict}")
        if self.search_every and method.on_features:
            raise ValueError(f"{self.method} cannot search the whole set; leave search_every at 0")
        for name, known in (("normalize", NORMALIZE), ("evaluate_on", ("test", "validation"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if (method.base is None) != (self.base is None):
            wants = "takes no" if self.base else "needs a"
            raise ValueError(f"{self.method} {wants} base run; see make_run()")

    @property
    def config(self) -> TrainingConfig:
        """The training settings of this run."""
        return TrainingConfig(**{f.name: getattr(self, f.name) for f in fields(TrainingConfig)})

    @property
    def trained(self) -> "Run":
        """The run whose training this one uses: itself, or its base when it trains nothing of its own."""
        return self.base if METHODS[self.method].loss is None and self.base else self

    @property
    def key(self) -> str:
        """The same for runs that differ only in how many vote, what their method does not use, or a folder's place."""
        run, loss = self.trained, METHODS[self.trained.method].loss
        unused = {"class_power"}
        if loss == "weighted-ce":
            unused = {"m", "margin", "soft", "search_every", *["k"] * (run.sampling == "random")}
        elif loss is None:
            unused = {field.name for field in fields(TrainingConfig)}
        what = asdict(run) | {"base": run.base and run.base.key, "k_predict": CODE}
        what["dataset"] = "folder" if run.dataset.startswith("folder:") else run.dataset
        seed = run.seed if loss or run.weights == "none" else 0
        settings = digest(str(sorted((n, v) for n, v in what.items() if n not in unused)), str(seed))
        return f"{run.dataset.split(':')[0]}-{run.method}-{run.split}-s{seed}-{settings}"

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.method} · {self.dataset} · {self.split} split · seed {self.seed}"


def make_run(dataset: str, method: str, profile: str = "demo", **changes) -> Run:
    """The run of a method under a profile, with any field changed; ValueError for a name or field that there is not."""
    for what, name, known in (("profile", profile, PROFILES), ("method", method, METHODS)):
        if name not in known:
            raise unknown(what, name, known)
    names = [f.name for f in fields(Run)]
    if others := sorted(set(changes) - set(names)):
        raise unknown("field of a Run", others[0], names)
    entry = check_split(dataset, changes.get("split", Run.split), changes.get("fold", Run.fold))
    dataset = f"folder:{entry.root}" if entry.kind == "folder" else dataset  # the same from any folder
    own, kind = PROFILES[profile], METHODS[method]
    settings = own["all"] | own.get(dataset, {}) | own.get(method, {}) | kind.settings
    searches = kind.loss == "deep-knn" and not kind.on_features and (settings | changes).get("search_every")
    if changes.get("classes_per_batch") and (searches or changes.get("sampling") == "random"):
        why = "searches the whole set" if searches else "draws at random"
        raise ValueError(f"{method} {why}, from every class; give no classes_per_batch")
    if kind.base:
        known = _SHARED if kind.loss else {*names} - {"k_predict", "base"}  # Nothing is trained but the base.
        shared = {name: value for name, value in changes.items() if name in known}
        settings["base"] = make_run(dataset, kind.base, profile, **shared)
    return Run(**{"dataset": dataset, "method": method, "k_predict": kind.votes[-1]} | settings | changes)


def grid(dataset, profile="demo", methods=TABLE2, split_names=("paper", "grouped"), seeds=None, **changes):
    """The runs of a comparison, so ordered that every seed finished is a whole one; `changes` as in `make_run`."""
    seeds = PROFILES[profile]["seeds"] if seeds is None else seeds
    order = [(seed, split, method) for seed in seeds for split in split_names for method in methods]
    return [make_run(dataset, m, profile, split=split, seed=seed, **changes) for seed, split, m in order]


def sweeps(dataset: str, profile: str = "demo", seeds=(0, 1), **given) -> dict[str, list[Run]]:
    """Deep kNN with its settings changed, split by lesion: the runs of the notebook on sensitivity.

    `K and M`: the grid of Table S3, K_p = K, in full length, K = M = 5 among them. `search`: neighbours from the whole
    training set. `margin` and `batches`: with the profile's short training, the default among them.
    """
    short = PROFILES[profile]["short"]
    counts = [{"k": k, "m": m, "k_predict": k} for k in (3, 5, 7) for m in (1, 5, 9)]
    margins = [("batch-l2", margin) for margin in (0.05, 0.2, 0.5, 1.0)] + [("l2", 0.5)]
    margins += [("none", margin) for margin in (0.2, 1.0, 5.0)]

    def runs(changes: list[dict], method: str = "deep-knn") -> list[Run]:
        every = [given | change | {"seed": seed} for change in changes for seed in seeds]
        return [make_run(dataset, method, profile, split="grouped", **one) for one in every]

    return {
        "K and M": runs(counts),
        "search": runs([{}], "deep-knn-global"),
        "margin": runs([short | {"normalize": kind, "margin": margin} for kind, margin in margins]),
        "batches": runs([short | {"sampling": mode} for mode in ("balanced", "proportional", "random")]),
    }
