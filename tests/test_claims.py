"""The rule that judges the claims, flipped each way by made-up results, and what stands beside a comparison."""

from dataclasses import replace

import made_up
import numpy as np
import pandas as pd
import pytest
from made_up import LABELS
from sets import refused

from deepknn_lib.storage import repository
from deepknn_lib.study import claims, results
from deepknn_lib.study.claims import CLAIMS, evidence, setting, verdicts

# The share of the test images that each method gets right, and more; in this world every claim holds.
WORLD = {
    **{name: {"quality": 0.5} for name in ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce")},
    "ce-knn": {"quality": 0.6}, "triplet": {"quality": 0.6, "arrives": 12, "ratios": (0.4, 0.9)},
    **{name: {"quality": 0.8} for name in ("deep-knn-global", "mlp-deep-knn")},
    "deep-knn": {"quality": 0.8, "arrives": 3}, "deep-knn-ft": {"quality": 0.99},
    "weighted-ce": {"quality": (0.8, 0.8, 0.5)},
}  # fmt: skip
SMALL, LARGE = "resnet18", "vgg11"
DEAD, ABOVE = {"stuck": True}, {"quality": 0.9}  # a method that learns nothing; a rival better than deep kNN
PLACE = "resnet18, imagenet weights, 48 px"


@pytest.fixture(autouse=True)
def made_up_compactness(monkeypatch):
    """The ratio stands in the made-up features."""
    monkeypatch.setattr(claims.metrics, "compactness", lambda features, _: {"ratio": features[0, 0]})


def world(methods=tuple(WORLD), backbones=(SMALL, LARGE), seeds=(0, 1, 2), **changes):
    """Results of all methods; `changes`, such as `triplet=DEAD`, are given to a method by its name."""
    return [
        made_up.result(method, seed, backbone=backbone, **WORLD[method] | changes.get(method, {}))
        for backbone in backbones for seed in seeds for method in methods
    ]  # fmt: skip


def large(**changes):
    """A second backbone on which something is otherwise."""
    return world(backbones=[SMALL]) + world(backbones=[LARGE], **changes)


def variants(settings=((3, 5), (5, 9)), quality=0.8, **changes):
    runs = [{"seed": seed, "k": k, "m": m} for k, m in settings for seed in (0, 1, 2)]
    return [made_up.result("deep-knn", quality=quality, **changes | run) for run in runs]


@pytest.mark.parametrize("claim, found, verdict, said", [
    ("C1", lambda: world(knn=ABOVE), "contradicted (4 of 4)", "the hardest: deep kNN − kNN (resnet18"),
    ("C2", lambda: world(triplet=ABOVE), "contradicted (4 of 4)", "0 of 4 comparisons hold"),
    ("C3", lambda: world(**{"weighted-ce": {"quality": 0.8}}), "holds in part (4 of 6)", "2 undecided"),
    ("C4", lambda: world(**{"deep-knn-ft": {"quality": 0.8}}), "holds in part (4 of 8)", "deep kNN* − deep kNN ("),
    ("C5", lambda: world(triplet={"arrives": 6}), "undecided", "the hardest: deep kNN / triplet"),
    ("C5", lambda: world(triplet={"arrives": 4}), "contradicted (1 of 1)", "needed < 0.5"),
    ("C6", lambda: world(lmnn=ABOVE), "contradicted (4 of 20)", "the hardest: MLP + deep kNN − LMNN"),
    ("C7", lambda: large(**{"ce-knn": ABOVE}), "contradicted (2 of 4)", "deep kNN − kNN on CE features (vgg11"),
    ("C8", lambda: world(**{"deep-knn-global": {"quality": 0.95}}), "contradicted (4 of 4)", "needed > -2.4"),
    ("C10", lambda: world(triplet={"ratios": (0.4, 0.5)}), "contradicted (2 of 4)", "2 of 4 comparisons hold"),
    ("C1", lambda: world(**dict.fromkeys(WORLD, {"weights": "none"})), "not tested", "missing: deep kNN − kNN: Acc, "),
    ("C2", lambda: world(triplet=DEAD), "not tested", "left out: triplet learnt nothing"),
    ("C2", lambda: large(triplet=DEAD), "holds", "left out: triplet learnt nothing (vgg11"),
    ("C2", lambda: large(**{"deep-knn": DEAD}), "not tested", "deep-knn itself learnt nothing"),
    ("C5", lambda: large(triplet=DEAD), "holds", "left out: triplet learnt nothing (vgg11"),
    ("C6", lambda: large(**{"deep-knn": DEAD}), "holds", "20 of 20"),  # It asks nothing of that network.
    ("C7", lambda: world(backbones=[SMALL]), "not tested", "a second backbone"),
    ("C2", lambda: world(seeds=[1]), "not tested", "a single seed"),
    ("C10", lambda: world(seeds=(0, 1)), "not tested", "two runs"),
    # Robustness needs another K and another M that work.
    ("C9", lambda: variants(quality=0.6), "contradicted (4 of 12)", "K = 3, M = 5 − K = 5, M = 5"),
    ("C9", lambda: variants(quality=0.4, stuck=True), "contradicted (4 of 12)", "learnt nothing), "),  # against it
    ("C9", lambda: variants(settings=((3, 5), (7, 5))), "not tested", "missing: another M"),
    ("C9", lambda: [], "not tested", "missing: K_p = 1 − K_p = 5: Acc"),
])  # fmt: skip
def test_made_up_numbers_flip_the_verdict_and_it_says_why(claim, found, verdict, said):
    rows = evidence(world(), variants=found()) if claim == "C9" else evidence(found(), variants=variants())
    row = verdicts(rows).set_index("claim").loc[claim]
    assert row["verdict"] == verdict and said in row["why"]


def test_groups_of_runs_backbones_validation_and_two_settings_of_a_method():
    pair = world(methods=["deep-knn", "triplet"], backbones=[SMALL])
    held = [replace(r, run=replace(r.run, evaluate_on="validation")) for r in pair]
    assert evidence(held, variants=held).empty and verdicts(evidence([])).empty
    other = replace(pair[0], run=replace(pair[0].run, lr=0.7, seed=9))
    twice = variants(settings=[(5, 9)])
    for more, said in ((twice, "not unique"), ([other], "several settings of a method")):
        refused(said, evidence, pair + more)
    short = [made_up.result(r.run.method, r.run.seed, epochs=8) for r in pair]
    rows = evidence(pair + short)  # a shorter training is a group of its own
    assert {*rows.query("claim == 'C2'")["setting"]} == {f"{PLACE}, {epochs} epochs" for epochs in (8, 12)}
    own = made_up.result("knn", weights="somewhere/else/own.safetensors", fold=2).run
    assert setting(own) == "resnet18, own.safetensors weights, 48 px, fold 2"
    # C1 takes the main network against kNN on every pretrained backbone.
    rows, main = evidence(world(methods=["knn", "deep-knn"])).query("claim == 'C1'"), f"{PLACE}, 12 epochs"
    assert [*rows["setting"].unique()] == [main, f"{main} against vgg11, imagenet weights, 48 px"]


def test_in_a_world_where_all_holds_rows_have_paired_differences_and_bounds_decide():
    rows = evidence(world(), variants=variants())
    assert (verdicts(rows)["verdict"] == "holds").all()
    row = rows.query("claim == 'C2' and measure == 'MCR'").iloc[0]
    pair = [results.select(world(), method=method, backbone=SMALL) for method in ("deep-knn", "triplet")]
    for level, names in ((0.995, ["value", "low", "high"]), (0.95, ["value", "low_95", "high_95"])):
        assert [*row[names]] == pytest.approx([*results.paired(*pair, level=level).loc[1][1:]])
    assert (row["seeds"], row["test_images"], row["side"], row["bound"]) == (3, len(LABELS), ">", 0)
    bounds = rows.query("measure == 'Acc'").groupby("claim")["bound"].unique().map(list).to_dict()
    assert bounds.items() >= {"C1": [0], "C3": [-2.4], "C8": [-2.4], "C9": [-3.4]}.items()
    cases = (-2.39, 3, "holds"), (-3, -2.39, "undecided"), (-5, -2.41, "contradicted (4 of 4)")
    for low, high, verdict in cases:
        judged = verdicts(rows.assign(low=low, high=high)).set_index("claim")
        assert judged.loc["C8", "verdict"] == verdict


def test_each_method_votes_as_its_claim_says():
    """K_p = 5 for all, cross-entropy's softmax, and the K_p of C9: each of these predicts a class of its own."""
    found, tried = world(methods=["deep-knn", "weighted-ce", "triplet"], backbones=[SMALL]), variants()
    for r in found + tried:
        r._predicted.update({k: np.full(len(LABELS), {5: 0, 7: 1}.get(k, 2)) for k in (1, 3, 5, 7, 9)})
        r.arrays["test_logits"] = np.tile([0, 1, 0], (len(LABELS), 1))
    rows = evidence(found, variants=tried).query("measure == 'Acc'").set_index(["claim", "comparison"])
    share = 100 * np.bincount(LABELS) / len(LABELS)  # the accuracy of always predicting class 0, 1, 2
    assert rows["value"].to_dict() == pytest.approx({
        ("C2", "deep kNN − triplet"): 0, ("C3", "deep kNN − weighted CE"): share[0] - share[1],
        **{("C9", f"{name} − K = 5, M = 5"): 0 for name in ("K = 3, M = 5", "K = 5, M = 9")},
        **{("C9", f"K_p = {k} − K_p = 5"): share[1 if k == 7 else 2] - share[0] for k in (1, 3, 7, 9)},
    })  # fmt: skip


@pytest.mark.parametrize("arrives, ratios, note", [
    ((8, 12, 8), (2 / 8, 4 / 12, 2 / 8), ""),
    ((8, 900, 8), (2 / 8, 4 / 17, 2 / 8), ", never by 1 of 3 triplet runs: last epoch + 1"),  # 16 epochs; low is 0
])  # fmt: skip
def test_epochs_by_hand(arrives, ratios, note):
    deep = [made_up.result("deep-knn", seed, arrives=epochs) for seed, epochs in enumerate((2, 4, 2))]
    rival = [made_up.result("triplet", seed, arrives=epochs) for seed, epochs in enumerate(arrives)]
    row, logs = evidence(deep + rival).query("claim == 'C5'").iloc[0], np.log(ratios)
    students_t = np.array([14.0890, 4.30265])  # at 99.5 and 95 %, two degrees
    half = students_t * logs.std(ddof=1) / np.sqrt(3)
    assert [*row[["value", "high", "high_95"]]] == pytest.approx(np.exp(logs.mean() + [0, *half]), rel=1e-4)
    assert [*row[["low", "low_95"]]] == pytest.approx(np.exp(logs.mean() - half) * (not note), rel=1e-4)
    assert row["setting"] == f"{PLACE}, 12 epochs, to 90 %{note}"


@pytest.mark.parametrize("dataset, low, paper, inside", [
    ("skin7", 4.7, 4.8, "yes"), ("skin7", 4.9, 4.8, "no"), ("sd198", 4.7, np.nan, ""),
])  # fmt: skip
def test_the_papers_difference_stands_beside_ours_on_its_own_images_only(dataset, low, paper, inside):
    rows = evidence(world(methods=["deep-knn", "triplet"], backbones=[SMALL]))
    rows = rows.query("claim == 'C2' and measure == 'Acc'").assign(dataset=dataset, low_95=low, high_95=9.0)
    np.testing.assert_equal([*claims.comparisons(rows).iloc[0][["paper", "inside"]]], [paper, inside])


def test_verdicts_on_the_committed_evidence():
    wanted = pd.read_csv(repository() / "tests" / "verdicts.csv", index_col="claim", keep_default_na=False)
    assert [*wanted.index] == [*CLAIMS]
    for place in wanted:
        name, split = place.split(", ")
        rows = verdicts(pd.read_csv(repository() / "data" / "results" / f"{name}_evidence.csv"))
        shown = pd.read_csv(repository() / "figures" / "tables" / "claims.csv").query("file == @name")
        for table in (rows, shown):
            assert [*table[table["split"] == split]["verdict"]] == [*wanted[place]]
