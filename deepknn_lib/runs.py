"""What a run is: a method on a data set with all its settings, frozen and hashable; and the grids of a comparison."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from deepknn_lib.models import PAPER_BACKBONES, SMALL, SMALL_BACKBONES
from deepknn_lib.training import Recipe

CODE = 2  # raise when a change to the library changes what a Run gives: old cache entries are then left alone


@dataclass(frozen=True)
class Method:
    """What sets a method apart; `loss=None`: nothing is trained.

    `base`: the method whose network it starts from or, `on_features`, whose features it is trained on (Table 3).
    """

    title: str
    loss: str | None
    votes: tuple[int, ...] = (1, 5)  # the values of K_p reported; 0 is the network's own softmax classifier
    base: str | None = None
    on_features: bool = False


METHODS = {
    "knn": Method("kNN, untrained or pretrained features", None),
    "triplet": Method("kNN, batch-hard triplet", "triplet"),
    "deep-knn": Method("deep kNN", "deep-knn"),
    "weighted-ce": Method("weighted cross-entropy", "weighted-ce", votes=(0,)),
    "ce-knn": Method("kNN, cross-entropy features", None, base="weighted-ce"),
    "deep-knn-ft": Method("deep kNN*, from cross-entropy", "deep-knn", base="weighted-ce"),
    "triplet-ft": Method("kNN, batch-hard triplet, from cross-entropy", "triplet", base="weighted-ce"),
    "deep-knn-global": Method("deep kNN, whole-set search", "deep-knn"),
    "nca": Method("NCA", "nca", base="knn", on_features=True),
    "lmnn": Method("LMNN", "lmnn", base="knn", on_features=True),
    "mlp-triplet": Method("MLP + triplet", "triplet", base="knn", on_features=True),
    "mlp-ce": Method("MLP + cross-entropy", "weighted-ce", votes=(0, 1, 5), base="knn", on_features=True),
    "mlp-deep-knn": Method("MLP + deep kNN", "deep-knn", base="knn", on_features=True),
}
TABLE2 = ("knn", "triplet", "deep-knn", "weighted-ce", "ce-knn", "deep-knn-ft")
TABLE3 = ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce", "mlp-deep-knn")
TABLE4 = ("ce-knn", "deep-knn")

# Settings a profile gives to all its methods ("all"), then to one data set, then to one method. Learning rates, margins and
# samplings of `demo` were chosen on a validation part of skin7's training images, those of the MLPs on features of them, by
# the same number of trials each: data/results/skin7_tuning.csv.
_MLP = {"epochs": 30, "lr_decay_every": 10}
_DEEP = {"lr": 0.4, "margin": 0.5, "sampling": "balanced"}
_SCRATCH = {
    "triplet": {"lr": 0.1, "margin": 0.5, "warmup": 2},
    "triplet-ft": {"lr": 0.02, "margin": 0.2, "warmup": 1},
    "deep-knn": _DEEP,
    "deep-knn-ft": _DEEP | {"lr": 0.2},
    "deep-knn-global": _DEEP,
    "weighted-ce": {"lr": 0.05},
    "mlp-triplet": _MLP | {"lr": 0.1},
    "mlp-ce": _MLP | {"lr": 0.003, "warmup": 2},
    "mlp-deep-knn": _MLP | {"lr": 0.01, "margin": 0.5},
}
_ON_FEATURES = {method: _SCRATCH[method] for method in ("mlp-triplet", "mlp-ce", "mlp-deep-knn")}
_TUNED = {"lr": 0.3, "margin": 0.5, "sampling": "balanced"}
_FINETUNE = {  # what starts from cross-entropy, and whole-set search, had no trials of their own
    "triplet": {"lr": 0.005, "soft": True, "normalize": "none", "warmup": 2},
    "triplet-ft": {"lr": 0.005, "soft": True, "normalize": "none", "warmup": 1},
    "deep-knn": _TUNED,
    "deep-knn-ft": _TUNED,
    "deep-knn-global": _TUNED,
    "weighted-ce": {"lr": 0.01, "warmup": 1},
}
_SD198 = {"batch_size": 90, "classes_per_batch": 9, "sampling": "balanced"}  # as published: 9 classes × 10 images
PROFILES = {
    "smoke": {
        "all": {"image_size": 32, "epochs": 1, "lr_decay_every": 1},
        "seeds": (0, 1),
        "short": {"epochs": 1},
        "backbones": SMALL_BACKBONES,
    }
    | {method: settings | {"epochs": 1} for method, settings in _SCRATCH.items()},
    "demo": {
        "all": {"image_size": 48, "epochs": 12, "lr_decay_every": 3},
        "seeds": (0, 1, 2),
        "short": {"epochs": 6, "lr_decay_every": 2},
        "backbones": SMALL_BACKBONES,
        "sd198": _SD198,
    }
    | _SCRATCH
    | {method: _SCRATCH[method] | {"epochs": 6, "lr_decay_every": 2} for method in ("deep-knn-ft", "triplet-ft")},
    # the paper's setting made small enough for two cores: pretrained, fine-tuned; the vote on its features and the softmax
    "finetune": {
        "all": {"image_size": 64, "epochs": 8, "lr_decay_every": 2, "backbone": "resnet18", "weights": "imagenet"},
        "seeds": (0, 1, 2),
        "short": {"epochs": 3, "lr_decay_every": 1},
        "backbones": ("vgg11", "resnet18", "densenet121", "legacy_seresnet18"),
        "sd198": _SD198,
    }
    | _FINETUNE
    | _ON_FEATURES
    | {method: _FINETUNE[method] | {"epochs": 4, "lr_decay_every": 1} for method in ("deep-knn-ft", "triplet-ft")},
    "paper": {
        "all": {"image_size": 256, "epochs": 60, "backbone": "resnet50", "weights": "imagenet"},
        "seeds": (0, 1, 2),
        "short": {"epochs": 30, "lr_decay_every": 10},
        "backbones": PAPER_BACKBONES,
        "sd198": _SD198 | {"epochs": 90, "lr_decay_every": 30},
        "triplet": {"soft": True, "warmup": 2},
    }
    | _ON_FEATURES,
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
        The paper's K_p, neighbours that vote; 0 is the network's own classifier (cross-entropy only).
    normalize : str
        See `models.Network`; the same in training and in the search afterwards.
    evaluate_on : {"test", "validation"}
        `validation`: a fifth of the training part is held out and judged instead; for choosing settings.
    base : Run, optional
        The run whose network this one starts from (`deep-knn-ft`) or searches with (`ce-knn`), or whose features it
        is trained on (Table 3).
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
    soft: bool = False
    search_every: int = 0
    normalize: str = "batch-l2"
    epochs: int = 12
    batch_size: int = 96
    sampling: str = "proportional"
    classes_per_batch: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0
    lr_decay_every: int = 20
    evaluate_on: str = "test"
    base: "Run | None" = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.k_predict < 0 or (self.k_predict == 0 and METHODS[self.method].loss != "weighted-ce"):
            raise ValueError(f"k_predict must be at least 1, got {self.k_predict} (0 is for cross-entropy's own classifier)")
        if self.search_every and (METHODS[self.method].loss != "deep-knn" or METHODS[self.method].on_features):
            raise ValueError(f"{self.method} cannot search the whole set while it trains; leave search_every at 0")
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
        loss = METHODS[run.method].loss
        what = asdict(run) | {"k_predict": None, "code": CODE}
        if run.base:
            what["base"] = run.base.key
        if loss is None:  # nothing is trained: its settings do not matter, and the seed only where weights are drawn
            what = {n: v for n, v in what.items() if n not in {f.name for f in fields(Recipe)} - {"seed"}}
            what["seed"] = run.seed if run.weights == "none" else 0
        elif loss == "weighted-ce":
            what = {n: v for n, v in what.items() if n not in {"k", "m", "margin", "soft", "search_every"}}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        return f"{run.dataset.split(':')[0]}-{run.method}-{run.split}-s{what['seed']}-{digest}"

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
    own = PROFILES[profile]
    settings = own["all"] | own.get(dataset, {}) | own.get(method, {})
    base = METHODS[method].base
    if METHODS[method].loss is None:
        settings = {"normalize": "none"} | settings
    if METHODS[method].loss == "weighted-ce":  # its features are not searched in training; batches need no positives
        settings = {"normalize": "none"} | settings | {"sampling": "random", "classes_per_batch": None}
    if method == "deep-knn-global":
        settings = {"search_every": 20} | settings
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
    methods: Iterable[str] = TABLE2,
    split_names: Iterable[str] = ("paper", "grouped"),
    seeds: Iterable[int] | None = None,
    **changes,
) -> list[Run]:
    """The runs of a comparison, ordered so that every seed finished is a whole comparison; `changes` as in `make_run`."""
    seeds = PROFILES[profile]["seeds"] if seeds is None else seeds
    return [
        make_run(dataset, method, profile, split=split, seed=seed, **changes)
        for seed in seeds
        for split in split_names
        for method in methods
    ]


def sweeps(dataset: str, profile: str = "demo", seeds: Iterable[int] = (0, 1), **given) -> dict[str, list[Run]]:
    """Deep kNN with its settings changed, split by lesion: the runs of notebook 08.

    `K and M`: the grid of Table S3, K_p = K, in full length, K = M = 5 among them. `search`: neighbours from the whole
    training set. `margin` and `batches`: with the profile's short training, the default among them.
    """
    short = PROFILES[profile]["short"]

    def runs(method: str = "deep-knn", **changes) -> list[Run]:
        return [make_run(dataset, method, profile, split="grouped", seed=seed, **given, **changes) for seed in seeds]

    normal = [{"normalize": "batch-l2", "margin": margin} for margin in (0.05, 0.2, 0.5, 1.0)]
    raw = [{"normalize": "none", "margin": margin} for margin in (0.2, 1.0, 5.0)]
    margins = [*normal, {"normalize": "l2", "margin": 0.5}, *raw]
    return {
        "K and M": [r for k in (3, 5, 7) for m in (1, 5, 9) for r in runs(k=k, m=m, k_predict=k)],
        "search": runs("deep-knn-global"),
        "margin": [r for settings in margins for r in runs(**short, **settings)],
        "batches": [r for mode in ("balanced", "proportional", "random") for r in runs(**short, sampling=mode)],
    }
