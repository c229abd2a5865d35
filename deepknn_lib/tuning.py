"""The search that chose each method's settings: the same number of trials for every method that is trained.

A trial trains with one setting and is judged on a fifth of the *training* part (split by lesion, so that no lesion is on
both sides); test images have no part in it. `python -m deepknn_lib tune` runs the trials and writes them all down.
"""

import pandas as pd

from deepknn_lib.runs import METHODS, PROFILES, Run, make_run

N_TRIALS = 9  # for each method
CHOOSES = "(Acc + MCR) / 2"  # on the validation images, K_p = 5 (cross-entropy: its own softmax)


def _crossed(lrs: tuple, margins: tuple) -> list[dict]:
    return [{"lr": lr, "margin": margin} for lr in lrs for margin in margins]


# The remedies that are known for batch-hard triplet are in its budget: soft margin, warm-up, normalised features or raw
# ones, balanced batches or proportional ones. Cross-entropy has no margin: learning rates, and warm-up.
TRIALS = {
    "demo": {
        "triplet": [
            {"lr": 0.1, "margin": 0.5},
            {"lr": 0.1, "margin": 0.5, "warmup": 2},
            {"lr": 0.1, "soft": True, "warmup": 2},
            {"lr": 0.4, "soft": True, "warmup": 2, "sampling": "balanced"},
            {"lr": 0.02, "soft": True, "warmup": 2, "normalize": "none"},
            {"lr": 0.02, "soft": True, "warmup": 2, "normalize": "none", "sampling": "balanced"},
            {"lr": 0.1, "soft": True, "warmup": 2, "normalize": "none", "sampling": "balanced"},
            {"lr": 0.05, "margin": 0.2, "warmup": 2, "normalize": "l2", "sampling": "balanced"},
            {"lr": 0.02, "soft": True, "warmup": 2, "normalize": "l2"},
        ],
        "deep-knn": [{"sampling": "balanced"} | trial for trial in _crossed((0.1, 0.2, 0.4), (0.1, 0.2, 0.5))],
        "deep-knn-ft": [{"sampling": "balanced"} | trial for trial in _crossed((0.05, 0.1, 0.2), (0.1, 0.2, 0.5))],
        "weighted-ce": [{"lr": lr} for lr in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)]
        + [{"lr": lr, "warmup": 2} for lr in (0.02, 0.05, 0.1)],
    },
}
for _method in ("mlp-triplet", "mlp-deep-knn"):
    TRIALS["demo"][_method] = _crossed((0.02, 0.1, 0.4), (0.1, 0.2, 0.5))
TRIALS["demo"]["mlp-ce"] = [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)]


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


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each method's trials (rows of `tables.results_table`) the one that was chosen; collapsed ones never are."""
    judged = rows[(rows["evaluate_on"] == "validation") & ~rows["collapsed"].astype(bool)]
    votes = judged["method"].map(lambda method: 0 if METHODS[method].loss == "weighted-ce" else 5)
    judged = judged[judged["k_predict"] == votes]
    score = (judged["acc"] + judged["mcr"]) / 2
    return judged.loc[score.groupby(judged["method"], sort=False).idxmax()]
