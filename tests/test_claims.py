"""The rule that judges the claims: made-up predictions of known quality must flip every verdict all three ways."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest

from deepknn_lib import tables
from deepknn_lib.claims import CLAIMS, K_PREDICT, LEVEL, evidence, setting, verdicts
from deepknn_lib.experiments import Result
from deepknn_lib.runs import METHODS, make_run

LABELS = np.repeat([0, 1, 2], [160, 80, 60])
# Share of the test images that each method gets right. All draw on the same luck, so a better one is right wherever a
# worse one is. In this world every claim holds.
QUALITY = {
    "knn": 0.5, "triplet": 0.6, "deep-knn": 0.8, "weighted-ce": (0.8, 0.8, 0.5), "ce-knn": 0.6, "deep-knn-ft": 0.99,
    "deep-knn-global": 0.8, "nca": 0.5, "lmnn": 0.5, "mlp-triplet": 0.5, "mlp-ce": 0.5, "mlp-deep-knn": 0.8,
}  # fmt: skip
ARRIVES = {"deep-knn": 3, "triplet": 12}
RATIOS = {("deep-knn", "train"): 0.6, ("deep-knn", "test"): 0.7, ("triplet", "train"): 0.4, ("triplet", "test"): 0.9}
SMALL, LARGE = "resnet18", "vgg11"


def luck(seed):
    return (np.random.default_rng(7).permutation(len(LABELS)) + 0.2 * seed) / len(LABELS)


def made(method, seed=0, *, quality=None, backbone=SMALL, arrives=None, stuck=False, collapsed=False, **changes):
    """A result that is right on the given share of the images, of each class if there are three."""
    run = make_run("lesions", method, "demo", seed=seed, **({"backbone": backbone, "weights": "imagenet"} | changes))
    quality = np.broadcast_to(QUALITY[method] if quality is None else quality, 3)
    right = luck(seed) < quality[LABELS]
    predictions = np.where(right, LABELS, (LABELS + 1) % 3)
    ids = np.array([f"image {n}" for n in range(len(LABELS))])
    arrays = {"test_labels": LABELS, "test_ids": ids, "test_groups": np.arange(len(LABELS)) // 2}
    arrives, epochs = arrives or ARRIVES.get(method, 4), range(1, 17)
    history = [{"epoch": e, "train_acc": 50 if stuck else 50 + 42 * min(e / arrives, 1)} for e in epochs]
    record = {"class_names": ["a", "b", "c"], "smallest": 2, "collapsed": collapsed, "class_counts": {"train": [50, 30, 20]}}
    votes = dict.fromkeys((0, 5, *K_PREDICT), predictions)
    return Result(run, arrays, history if METHODS[method].loss else [], record, votes)


def world(methods=tuple(QUALITY), backbones=(SMALL, LARGE), seeds=(0, 1, 2), quality=None, **changed):
    """Results of all methods; `changed`, e.g. `triplet={"stuck": True}`, is given to a method by its name."""
    return [
        made(method, seed, backbone=backbone, **{"quality": (quality or {}).get(method)} | changed.get(method, {}))
        for backbone in backbones for seed in seeds for method in methods
    ]  # fmt: skip


def variants(quality=0.8, settings=((3, 5), (5, 9)), seeds=(0, 1, 2), **changes):
    return [made("deep-knn", seed, quality=quality, k=k, m=m, **changes) for k, m in settings for seed in seeds]


def packing(ratios=()):
    """Compactness rows; `ratios` replace some of `RATIOS`."""
    rows = [
        {"dataset": "lesions", "split": "paper", "backbone": backbone, "method": method, "seed": seed, "part": part,
         "ratio": value + 0.002 * seed * (method == "triplet")}
        for (method, part), value in (RATIOS | dict(ratios)).items() for backbone in (SMALL, LARGE) for seed in (0, 1, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def judged(results=None, *, tried=None, packed=None):
    rows = evidence(
        world() if results is None else results,
        variants=variants() if tried is None else tried,
        packed=packing() if packed is None else packed,
    )
    return verdicts(rows).set_index("claim")


@lru_cache
def all_hold():
    return judged()


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_is_replicated_in_a_world_where_it_holds(claim):
    assert all_hold().loc[claim, "verdict"] == "replicated"
    why = all_hold().loc[claim, "why"]
    held, _, needed = why.split(" comparisons")[0].partition(" of ")
    assert held == needed and "; the closest: " in why and "left out" not in why


# The other two verdicts, claim by claim


@pytest.mark.parametrize("claim, change, said", [
    ("C1", {"results": lambda: world(quality={"knn": 0.9})}, "the other way: deep kNN − kNN (resnet18"),
    ("C2", {"results": lambda: world(quality={"triplet": 0.9})}, "the other way: deep kNN − triplet"),
    ("C2", {"results": lambda: world(quality={"triplet": 0.79})}, "undecided: deep kNN − triplet"),
    ("C3", {"results": lambda: world(quality={"weighted-ce": (0.8, 0.8, 0.8)})}, "4 of 6 comparisons hold; undecided"),
    ("C3", {"results": lambda: world(quality={"weighted-ce": (0.95, 0.95, 0.5)})}, "MCR"),
    ("C4", {"results": lambda: world(quality={"deep-knn-ft": 0.8})}, "deep kNN* − deep kNN"),
    ("C4", {"results": lambda: world(quality={"weighted-ce": 0.99, "deep-knn-ft": 0.9})},
     "the other way: deep kNN* − weighted CE"),
    ("C5", {"results": lambda: world(triplet={"arrives": 6})}, "undecided: deep kNN / triplet"),
    ("C5", {"results": lambda: world(triplet={"arrives": 4})}, "the other way: deep kNN / triplet"),
    ("C6", {"results": lambda: world(quality={"lmnn": 0.9})}, "the other way: MLP + deep kNN − LMNN"),
    ("C6", {"results": lambda: world(quality={"mlp-ce": 0.8})}, "undecided: MLP + deep kNN − MLP + CE"),
    ("C7", {"results": lambda: [*world(backbones=[SMALL]), *world(backbones=[LARGE], quality={"ce-knn": 0.9})]},
     "2 of 4 comparisons hold; the other way: deep kNN − kNN on CE features (vgg11"),
    ("C8", {"results": lambda: world(quality={"deep-knn-global": 0.95})}, "the other way: deep kNN − deep kNN with whole"),
    ("C9", {"tried": lambda: variants(settings=((3, 5), (5, 9)), quality=0.6)}, "the other way: K = 3, M = 5 − K = 5"),
    ("C10", {"packed": lambda: packing({("triplet", "test"): 0.5})},
     "2 of 4 comparisons hold; the other way: triplet − deep kNN"),
    ("C10", {"packed": lambda: packing({("deep-knn", "train"): 0.4})}, "undecided: triplet − deep kNN"),
])  # fmt: skip
def test_a_claim_that_fails_is_not_replicated_and_says_where(claim, change, said):
    found = judged(**{name: make() for name, make in change.items()}).loc[claim]
    assert found["verdict"] == "not replicated"
    assert said in found["why"] and "needed" in found["why"]


@pytest.mark.parametrize("claim, change, said", [
    ("C1", {"results": lambda: world(methods=set(QUALITY) - {"knn"})},
     "missing on pretrained backbones: deep kNN − kNN (Acc, MCR)"),
    ("C1", {"results": lambda: [made(m, s, weights="none") for m in ("knn", "deep-knn", "triplet") for s in (0, 1)]},
     "missing on pretrained backbones"),
    ("C2", {"results": lambda: world(triplet={"stuck": True})}, "triplet collapsed or learnt nothing"),
    ("C2", {"results": lambda: world(triplet={"collapsed": True})}, "triplet collapsed"),
    ("C2", {"results": lambda: world(seeds=[1])}, "a single seed"),
    ("C3", {"results": lambda: world(methods=["deep-knn", "ce-knn"])}, "missing: deep kNN − weighted CE (Acc, MCR, RS)"),
    ("C4", {"results": lambda: world(methods=["deep-knn", "deep-knn-ft"])}, "missing: deep kNN* − weighted CE (Acc, MCR)"),
    ("C4", {"results": lambda: world(**{"deep-knn-ft": {"collapsed": True}})}, "deep kNN* itself collapsed"),
    ("C5", {"results": lambda: world(triplet={"stuck": True})}, "triplet collapsed or learnt nothing"),
    ("C5", {"results": lambda: world(methods=["deep-knn", "knn"])}, "missing: deep kNN / triplet"),
    ("C6", {"results": lambda: world(methods=set(QUALITY) - {"lmnn"})}, "missing: MLP + deep kNN − LMNN (Acc, MCR)"),
    ("C6", {"results": lambda: world(**{"mlp-triplet": {"collapsed": True}})}, "MLP + triplet collapsed"),
    ("C7", {"results": lambda: world(backbones=[SMALL])}, "a single backbone"),
    ("C8", {"results": lambda: world(methods=["deep-knn", "ce-knn"])}, "whole-set search (Acc, MCR)"),
    ("C8", {"results": lambda: world(**{"deep-knn-global": {"stuck": True}})}, "whole-set search collapsed"),
    ("C9", {"tried": lambda: variants(settings=((3, 5), (7, 5)))}, "no run with another M"),
    ("C9", {"tried": lambda: []}, "missing: K_p = 1 − K_p = 5 (Acc, MCR)"),
    ("C10", {"results": lambda: world(triplet={"stuck": True})}, "triplet collapsed"),
    ("C10", {"packed": lambda: packing().query("part == 'train'")}, "missing: triplet − deep kNN (ratio, test)"),
    ("C10", {"packed": lambda: packing().query("seed == 0")}, "a single seed"),
])  # fmt: skip
def test_a_claim_without_a_fair_test_is_not_tested_and_says_why(claim, change, said):
    found = judged(**{name: make() for name, make in change.items()}).loc[claim]
    assert found["verdict"] == "not tested"
    assert said in found["why"]


def test_a_k_or_m_with_which_deep_knn_learns_nothing_counts_against_its_robustness():
    found = judged(tried=variants(quality=0.4, stuck=True)).loc["C9"]
    assert found["verdict"] == "not replicated" and "learnt nothing) Acc" in found["why"]


# What counts


def test_a_setting_with_a_dead_rival_is_left_out_but_not_one_where_deep_knn_died():
    living, dead = world(backbones=[SMALL]), {"stuck": True}
    rival = judged(living + world(backbones=[LARGE], triplet=dead))
    for claim in ("C2", "C5", "C10"):
        assert rival.loc[claim, "verdict"] == "replicated"
        assert "left out: triplet collapsed or learnt nothing (vgg11" in rival.loc[claim, "why"]
    own = judged(living + world(backbones=[LARGE], **{"deep-knn": dead}))
    assert (own.loc[["C2", "C5", "C7", "C10"], "verdict"] == "not tested").all()
    assert own.loc["C6", "verdict"] == "replicated"  # it asks nothing of that network


def test_more_backbones_than_two_are_not_needed_but_the_papers_four_are_named():
    assert "2 backbones, the paper has 4" in all_hold().loc["C7", "why"]


def test_every_claim_appears_for_every_data_set_and_split_that_has_evidence():
    other = [made(m, s, split="grouped") for m in ("deep-knn", "triplet") for s in (0, 1)]
    table = verdicts(evidence(world(methods=["deep-knn", "weighted-ce"]) + other, packed=packing()))
    assert table.groupby(["dataset", "split"])["claim"].apply(list).map(lambda c: c == list(CLAIMS)).all()
    chosen = table.set_index(["split", "claim"])["verdict"]
    assert chosen["paper", "C3"] == chosen["grouped", "C2"] == "replicated"
    assert chosen["grouped", "C3"] == chosen["paper", "C2"] == "not tested"
    assert verdicts(evidence([])).empty


def test_runs_judged_on_a_validation_part_do_not_count():
    held = [replace(r, run=replace(r.run, evaluate_on="validation")) for r in world(methods=["deep-knn", "triplet"])]
    assert evidence(held, variants=held, packed=packing()).empty


def test_two_settings_of_a_method_are_refused_and_a_shorter_training_is_a_group_of_its_own():
    results = world(methods=["deep-knn", "triplet"], backbones=[SMALL])
    with pytest.raises(ValueError, match="they differ in m.*variants"):
        evidence(results + variants(settings=[(5, 9)]))
    short = [made(m, s, epochs=8) for m in ("deep-knn", "triplet") for s in (0, 1)]
    rows = evidence(results + short, packed=packing())
    assert set(rows.loc[rows["claim"] == "C2", "setting"]) == {setting(r.run) for r in results + short}
    assert setting(short[0].run) == "resnet18, imagenet weights, 48 px, 8 epochs"


def test_a_weights_file_is_named_without_its_folder():
    assert setting(made("knn", weights="somewhere/else/own.safetensors").run) == "resnet18, own.safetensors weights, 48 px"


def test_c1_takes_the_main_network_against_knn_on_every_pretrained_backbone():
    results = world(methods=["knn", "deep-knn", "weighted-ce"], backbones=[SMALL])
    rows = evidence(results + world(methods=["knn", "deep-knn"], backbones=[LARGE]))
    found = rows[rows["claim"] == "C1"]["setting"].unique()
    assert len(found) == 2 and all(words.startswith("resnet18") for words in found)
    assert sum("against vgg11" in words for words in found) == 1


# The numbers


def test_rows_hold_the_paired_difference_at_the_bonferroni_level():
    assert LEVEL == pytest.approx(0.995)
    results = world(methods=["deep-knn", "triplet"], backbones=[SMALL])
    row = evidence(results, packed=packing()).query("claim == 'C2' and measure == 'MCR'").iloc[0]
    first, second = (tables.select(results, method=method) for method in ("deep-knn", "triplet"))
    strict, usual = (tables.paired(first, second, level=level).set_index("score").loc["MCR"] for level in (0.995, 0.95))
    assert (row["value"], row["low"], row["high"]) == pytest.approx(tuple(strict[["difference", "low", "high"]]))
    assert row["low"] < usual["low"] < row["value"] < usual["high"] < row["high"]
    assert (row["seeds"], row["test_images"], row["side"], row["bound"]) == (3, len(LABELS), ">", 0)


def test_close_allows_2_4_points_and_robust_3_4():
    rows = evidence(world(), variants=variants(), packed=packing())
    bounds = rows.groupby(["claim", "measure"])["bound"].unique()
    for claim, bound in {"C1": 0, "C3": -2.4, "C8": -2.4, "C9": -3.4}.items():
        assert bounds[claim, "Acc"] == bounds[claim, "MCR"] == [bound]
    assert bounds["C3", "RS"] == [0] and bounds["C5", "epochs ratio"] == [0.5]
    for low, high, verdict in ((-2.39, 3, "replicated"), (-2.41, 3, "not replicated"), (-5, -2.41, "not replicated")):
        moved = rows.assign(low=rows["low"].where(rows["claim"] != "C8", low), high=high)
        assert verdicts(moved).set_index("claim").loc["C8", "verdict"] == verdict
    for low, high, word in ((-2.41, -2.39, "undecided"), (-5, -2.41, "the other way")):
        moved = rows.query("claim == 'C8'").assign(low=low, high=high)
        why = verdicts(moved).set_index("claim").loc["C8", "why"]
        assert word in why and ("undecided" in why) != ("the other way" in why)


def test_each_method_votes_as_its_claim_says():
    """K_p = 5 for all, cross-entropy's own classifier, and C9's K_p: each of these predicts a class of its own."""
    results = world(methods=["deep-knn", "weighted-ce", "triplet"], backbones=[SMALL])
    tried = variants()
    for r in results + tried:
        r._predicted.update({k: np.full(len(LABELS), {0: 1, 5: 0, 7: 1}.get(k, 2)) for k in (0, 5, *K_PREDICT)})
    rows = evidence(results, variants=tried, packed=packing()).query("measure == 'Acc'").set_index(["claim", "comparison"])
    share = 100 * np.bincount(LABELS) / len(LABELS)  # the accuracy of always predicting class 0, 1, 2
    assert rows["value"].to_dict() == pytest.approx({
        ("C2", "deep kNN − triplet"): 0, ("C3", "deep kNN − weighted CE"): share[0] - share[1],
        **{("C9", f"{name} − K = 5, M = 5"): 0 for name in ("K = 3, M = 5", "K = 5, M = 9")},
        **{("C9", f"K_p = {k} − K_p = 5"): share[1 if k == 7 else 2] - share[0] for k in K_PREDICT},
    })  # fmt: skip


def test_epochs_by_hand():
    deep = [made("deep-knn", seed, arrives=epochs) for seed, epochs in enumerate((2, 4))]
    rival = [made("triplet", seed, arrives=epochs) for seed, epochs in enumerate((8, 900))]
    row = evidence(deep + rival, packed=packing()).query("claim == 'C5'").iloc[0]
    logs = np.log([2 / 8, 4 / 17])  # the second never arrives in 16 epochs
    assert row["value"] == pytest.approx(np.exp(logs.mean()))
    half = 127.321 * logs.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    assert row["low"] == 0 and row["high"] == pytest.approx(np.exp(logs.mean() + half), rel=1e-4)
    assert "to 90 %, never by 1 of 2 triplet runs: last epoch + 1" in row["setting"]


def test_epochs_of_rivals_that_all_arrive_by_hand():
    deep = [made("deep-knn", seed, arrives=epochs) for seed, epochs in enumerate((2, 4))]
    rival = [made("triplet", seed, arrives=epochs) for seed, epochs in enumerate((8, 12))]
    row = evidence(deep + rival, packed=packing()).query("claim == 'C5'").iloc[0]
    logs = np.log([2 / 8, 4 / 12])
    half = 127.321 * logs.std(ddof=1) / np.sqrt(2)
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.exp(logs.mean() + np.array([-half, half]))), rel=1e-4)


def test_a_triplet_that_never_arrives_leaves_its_claim_undecided():
    results = world(**{"deep-knn": {"arrives": 15}, "triplet": {"arrives": 17}})  # of 16 epochs
    found = verdicts(evidence(results, packed=packing())).query("claim == 'C5'").iloc[0]
    assert found["verdict"] == "not replicated" and "undecided: deep kNN / triplet" in found["why"]


def test_packing_is_measured_where_no_rows_are_given():
    rng = np.random.default_rng(0)
    results = world(methods=["deep-knn", "triplet"], backbones=[SMALL], seeds=(0, 1))
    for result in results:
        for part, loose in (("train", result.run.method == "deep-knn"), ("test", result.run.method == "triplet")):
            points = np.eye(3)[LABELS] + (0.5 if loose else 0.1) * rng.normal(size=(len(LABELS), 3))
            result.arrays.update({f"{part}_features": points.astype(np.float32), f"{part}_labels": LABELS})
    rows = evidence(results).query("claim == 'C10'").set_index("measure")
    assert rows.loc["ratio, train", "value"] < -0.2 and rows.loc["ratio, test", "value"] > 0.2
    assert list(rows["side"]) == ["<", ">"]


def test_a_score_without_an_interval_leaves_a_claim_untested():
    results = world(methods=["deep-knn", "weighted-ce"], backbones=[SMALL])
    for result in results:
        result.record.update(class_names=["a", "b", "c", "never seen"], smallest=3)
    with pytest.warns(RuntimeWarning):
        assert "missing: deep kNN − weighted CE (RS)" in judged(results).loc["C3", "why"]


def test_verdicts_from_committed_rows_are_those_of_the_live_ones(tmp_path):
    dead = world(backbones=[LARGE], triplet={"stuck": True})
    rows = evidence(world(backbones=[SMALL], quality={"lmnn": 0.9}) + dead, variants=variants(), packed=packing())
    rows.to_csv(tmp_path / "rows.csv", index=False, float_format="%.6g")
    back = pd.read_csv(tmp_path / "rows.csv")
    assert set(verdicts(rows)["verdict"]) == {"replicated", "not replicated"} and not rows["alive"].all()
    pd.testing.assert_frame_equal(verdicts(back), verdicts(rows))
    both = verdicts(pd.concat([rows.assign(dataset="live"), back]))  # live rows and committed rows in one table
    assert list(both["verdict"]) == 2 * list(verdicts(rows)["verdict"])


def test_the_claims_have_their_texts():
    assert list(tables.paper("claims")["claim"]) == list(CLAIMS)
