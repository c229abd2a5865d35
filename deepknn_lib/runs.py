"""What a run is: a method on a data set with all its settings, frozen and hashable; and the grids of a comparison."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from deepknn_lib.models import SMALL
from deepknn_lib.training import Recipe

CODE = 1  # raise when a change to the library changes what a Run gives: old cache entries are then left alone


@dataclass(frozen=True)
class Method:
    """What sets a method apart; `loss=None`: nothing is trained. `base`: the method whose network it starts from."""

    title: str
    loss: str | None
    votes: tuple[int, ...] = (1, 5)  # the values of K_p reported; 0 is the network's own softmax classifier
    base: str | None = None


METHODS = {
    "knn": Method("kNN, untrained or pretrained features", None),
    "triplet": Method("kNN, batch-hard triplet", "triplet"),
    "deep-knn": Method("deep kNN", "deep-knn"),
    "weighted-ce": Method("weighted cross-entropy", "weighted-ce", votes=(0,)),
    "ce-knn": Method("kNN, cross-entropy features", None, base="weighted-ce"),
    "deep-knn-ft": Method("deep kNN*, from cross-entropy", "deep-knn", base="weighted-ce"),
}

# Settings a profile gives to all its methods ("all"), and then to one. The learning rates, margins and samplings of `demo`
# were chosen on a validation part of skin7's training images: the trials are in data/results/skin7_tuning.csv.
_SCRATCH = {
    "triplet": {"lr": 0.1, "margin": 0.5},
    "deep-knn": {"lr": 0.4, "sampling": "balanced"},
    "deep-knn-ft": {"lr": 0.1, "sampling": "balanced"},
    "weighted-ce": {"lr": 0.05},
}
PROFILES = {
    "smoke": {"all": {"image_size": 32, "epochs": 1, "lr_decay_every": 1}, "seeds": (0, 1)} | _SCRATCH,
    "demo": {"all": {"image_size": 48, "epochs": 16, "lr_decay_every": 4}, "seeds": (0, 1, 2)}
    | _SCRATCH
    | {"deep-knn-ft": _SCRATCH["deep-knn-ft"] | {"epochs": 8, "lr_decay_every": 2}},
    "paper": {
        "all": {"image_size": 256, "epochs": 60, "backbone": "resnet50", "weights": "imagenet"},
        "seeds": (0, 1, 2),
    },
}


@dataclass(frozen=True)
class Run:
    """One training and how it is judged: hashable, and the same wherever it is executed.

    The fields that `training.Recipe` has too mean the same here.

    Attributes
    ----------
    dataset, split, fold, image_size
        See `datasets.load_dataset`.
    method : str
        One of `METHODS`.
    backbone, weights
        See `models.build_network`.
    seed : int
        Of initialisation, batches and crops.
    k_predict : int
        The paper's K_p, neighbours that vote; 0 is the network's own classifier (`weighted-ce` only).
    normalize : str
        See `models.Network`; the same in training and in the search afterwards.
    evaluate_on : {"test", "validation"}
        `validation`: a fifth of the training part is held out and judged instead; for choosing settings.
    base : Run, optional
        The run whose network this one starts from (`deep-knn-ft`) or searches with (`ce-knn`).
    """

    dataset: str = "lesions"
    method: str = "deep-knn"
    split: str = "paper"
    fold: int = 1
    backbone: str = SMALL
    weights: str = "none"
    image_size: int = 48
    seed: int = 0
    k: int = 5
    m: int = 5
    k_predict: int = 5
    margin: float = 0.2
    normalize: str = "batch-l2"
    epochs: int = 12
    batch_size: int = 96
    sampling: str = "proportional"
    classes_per_batch: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_decay_every: int = 20
    evaluate_on: str = "test"
    base: "Run | None" = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.k_predict < 0 or (self.k_predict == 0 and self.method != "weighted-ce"):
            raise ValueError(f"k_predict must be at least 1, got {self.k_predict} (0 is for weighted-ce's own classifier)")
        if self.evaluate_on not in ("test", "validation"):
            raise ValueError(f"evaluate_on is 'test' or 'validation', got {self.evaluate_on!r}")
        if (METHODS[self.method].base is None) != (self.base is None):
            raise ValueError(f"{self.method} {'needs a' if self.base is None else 'takes no'} base run; see make_run()")

    @property
    def recipe(self) -> Recipe:
        """The training settings of this run."""
        own = {f.name: getattr(self, f.name) for f in fields(Recipe) if f.name != "loss"}
        return Recipe(loss=METHODS[self.method].loss or "", **own)

    @property
    def trained(self) -> "Run":
        """The run whose training this one uses: itself, or its base when it trains nothing of its own."""
        return self.base if METHODS[self.method].loss is None and self.base else self

    @property
    def key(self) -> str:
        """Name of the cache entry: the same for runs that differ only in how many neighbours vote."""
        run = self.trained
        what = asdict(run) | {"k_predict": None, "code": CODE}
        if run.base:
            what["base"] = run.base.key
        if METHODS[run.method].loss is None:  # nothing is trained: its settings do not matter
            what = {n: v for n, v in what.items() if n not in {f.name for f in fields(Recipe)} - {"seed"}}
        elif METHODS[run.method].loss == "weighted-ce":
            what = {n: v for n, v in what.items() if n not in {"k", "m", "margin"}}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        return f"{run.dataset.split(':')[0]}-{run.method}-{run.split}-s{run.seed}-{digest}"

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.method} · {self.dataset} · {self.split} split · seed {self.seed}"


def make_run(dataset: str, method: str, profile: str = "demo", **changes) -> Run:
    """The run of a method under a profile, with any field changed by name.

    Raises
    ------
    ValueError
        If the method, the profile or a field is unknown.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    unknown = set(changes) - {f.name for f in fields(Run)}
    if unknown:
        raise ValueError(f"a Run has no field {', '.join(sorted(unknown))}; it has {', '.join(f.name for f in fields(Run))}")
    settings = PROFILES[profile]["all"] | PROFILES[profile].get(method, {})
    base = METHODS[method].base
    if METHODS[method].loss is None:
        settings = {"normalize": "none"} | settings
    if method == "weighted-ce":  # its features are not searched while it trains, and its batches need no positives
        settings = {"normalize": "none", "sampling": "random"} | settings
    if base:
        shared = {
            n: v
            for n, v in changes.items()
            if n in ("split", "fold", "seed", "image_size", "evaluate_on", "backbone", "weights", "epochs")
        }
        settings = settings | {"base": make_run(dataset, base, profile, **shared)}
    settings |= {"k_predict": METHODS[method].votes[-1]}
    return Run(dataset=dataset, method=method, **(settings | changes))


def grid(
    dataset: str,
    profile: str = "demo",
    methods: Iterable[str] = tuple(METHODS),
    split_names: Iterable[str] = ("paper", "grouped"),
    seeds: Iterable[int] | None = None,
) -> list[Run]:
    """The runs of a comparison, ordered so that every seed finished is a whole comparison."""
    seeds = PROFILES[profile]["seeds"] if seeds is None else seeds
    return [
        make_run(dataset, method, profile, split=split, seed=seed)
        for seed in seeds
        for split in split_names
        for method in methods
    ]
