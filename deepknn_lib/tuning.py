"""The search that chose the settings: the same number of trials for every method trained by steps on batches.

Whole-set search takes deep kNN's settings, so that the two differ in the search alone; NCA and LMNN keep their defaults.

A trial trains with one setting and is judged on a fifth of the *training* part (split by lesion, so that no lesion is on
both sides); test images have no part in it. `python -m deepknn_lib tune` runs the trials and writes them all down.
"""

from dataclasses import fields

import pandas as pd

from deepknn_lib.runs import METHODS, PROFILES, Run, make_run

N_TRIALS = 6  # for each method
CHOOSES = "(Acc + MCR) / 2"  # on the validation images, K_p = 5 (cross-entropy: its own softmax)


def _crossed(lrs: tuple, margins: tuple = (0.2, 0.5), **shared) -> list[dict]:
    return [{"lr": lr, "margin": margin} | shared for lr in lrs for margin in margins]


# The remedies that are known for batch-hard triplet are in its budget: warm-up, soft margin, features normalised or raw,
# batches balanced or proportional. Cross-entropy has no margin to choose: it gets learning rates, and warm-up.
_SOFT = {"soft": True, "warmup": 2}
TRIALS = {
    "demo": {
        "triplet": [
            {"lr": 0.1, "margin": 0.5},
            {"lr": 0.1, "margin": 0.5, "warmup": 2},
            {"lr": 0.02, "margin": 0.2, "warmup": 2, "normalize": "l2"},
            {"lr": 0.1} | _SOFT,
            {"lr": 0.02, "normalize": "none", "sampling": "balanced"} | _SOFT,
            {"lr": 0.005, "normalize": "none"} | _SOFT,
        ],
        "triplet-ft": [
            {"lr": 0.02, "margin": 0.2, "warmup": 1},
            {"lr": 0.1, "margin": 0.2, "warmup": 1},
            {"lr": 0.02, "margin": 0.5, "warmup": 1},
            {"lr": 0.02, "sampling": "balanced"} | _SOFT,
            {"lr": 0.02, "normalize": "none"} | _SOFT,
            {"lr": 0.02, "normalize": "l2", "sampling": "balanced"} | _SOFT,
        ],
        "deep-knn": _crossed((0.1, 0.2, 0.4), sampling="balanced"),
        "deep-knn-ft": _crossed((0.05, 0.1, 0.2), sampling="balanced"),
        "weighted-ce": [{"lr": lr} for lr in (0.01, 0.02, 0.05, 0.1, 0.2)] + [{"lr": 0.05, "warmup": 2}],
        "mlp-triplet": [
            {"lr": 0.01, "margin": 0.2},
            {"lr": 0.1, "margin": 0.2},
            {"lr": 0.1, "margin": 0.5},
            {"lr": 0.1, "sampling": "balanced"} | _SOFT,
            {"lr": 0.01, "normalize": "none"} | _SOFT,
            {"lr": 0.01, "normalize": "none", "sampling": "balanced"} | _SOFT,
        ],
        "mlp-deep-knn": _crossed((0.01, 0.1, 0.4)),
        "mlp-ce": [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03, 0.1)] + [{"lr": 0.003, "warmup": 2}],
    },
    "finetune": {
        "triplet": [
            {"lr": 0.02, "margin": 0.2, "warmup": 1},
            {"lr": 0.02, "margin": 0.5, "warmup": 1},
            {"lr": 0.005, "margin": 0.5, "warmup": 1},
            {"lr": 0.02} | _SOFT,
            {"lr": 0.02, "sampling": "balanced"} | _SOFT,
            {"lr": 0.005, "normalize": "none"} | _SOFT,
        ],
        "deep-knn": _crossed((0.02, 0.1, 0.3), sampling="balanced"),
        "weighted-ce": [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03, 0.1)] + [{"lr": 0.01, "warmup": 1}],
    },
}


def trials(dataset: str, profile: str, method: str, **changes) -> list[Run]:
    """The runs of a method's trials: half the epochs of the profile (an MLP all), judged on validation images.

    Parameters
    ----------
    dataset, profile : str
    method : str
        One that has trials.
    **changes
        Fields of `Run`, for every trial (`backbone`, `weights`, …).

    Raises
    ------
    ValueError
        If nothing is tried for the method under this profile.
    """
    if method not in TRIALS.get(profile, {}):
        known = ", ".join(TRIALS.get(profile, {})) or "none"
        raise ValueError(f"no trials for {method!r} in profile {profile!r}; methods that have: {known}")
    # every trial starts from the fields' defaults, not from what an earlier search has chosen
    plain = {"margin": Run.margin, "soft": False, "warmup": 0, "normalize": Run.normalize, "sampling": Run.sampling}
    if METHODS[method].loss == "weighted-ce":
        plain |= {"normalize": "none", "sampling": "random"}
    if not METHODS[method].on_features:
        plain |= PROFILES[profile]["short"]
    common = {"split": "grouped", "seed": 0, "evaluate_on": "validation"} | changes
    return [make_run(dataset, method, profile, **(plain | trial | common)) for trial in TRIALS[profile][method]]


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """Every trial among rows of `tables.results_table`: settings, `acc` and `mcr` averaged over `seeds`, and if `chosen`.

    A trial with a collapsed run is never chosen. Data sets, backbones and weights choose for themselves.
    """
    judged = rows[rows["evaluate_on"] == "validation"]
    votes = judged["method"].map(lambda method: 0 if METHODS[method].loss == "weighted-ce" else 5)
    judged = judged[judged["k_predict"] == votes]
    search = ["dataset", "backbone", "weights", "method"]
    settings = [f.name for f in fields(Run) if f.name in judged and f.name not in (*search, "seed", "k_predict")]
    over_seeds = judged.groupby([*search, *settings], sort=False, dropna=False)
    means = over_seeds[["acc", "mcr"]].mean().assign(seeds=over_seeds.size(), collapsed=over_seeds["collapsed"].sum())
    means = means.reset_index()
    alive = means[means["collapsed"] == 0]
    score = (alive["acc"] + alive["mcr"]) / 2
    first = score.groupby([alive[name] for name in search], sort=False).idxmax()
    return means.assign(chosen=means.index.isin(first))


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """The chosen trial of each method; see `scored`."""
    trials_of = scored(rows)
    return trials_of[trials_of["chosen"]]
