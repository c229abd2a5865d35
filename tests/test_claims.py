"""The rule that judges the claims, flipped all three ways by made-up results; and the paper's cells beside ours."""

from dataclasses import replace
from functools import cache

import made_up
import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, result_row

from deepknn_lib.storage import repository
from deepknn_lib.study import claims, results
from deepknn_lib.study.claims import CLAIMS, cells, compare_with_paper, evidence, setting, verdicts
from deepknn_lib.study.runs import SOFTMAX

# The share of the test images that each method gets right, and more; in this world every claim holds.
WORLD = {
    **{name: {"quality": 0.5} for name in ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce")},
    "ce-knn": {"quality": 0.6},
    "triplet": {"quality": 0.6, "arrives": 12, "ratios": (0.4, 0.9)},
    **{name: {"quality": 0.8} for name in ("deep-knn-global", "mlp-deep-knn")},
    "deep-knn": {"quality": 0.8, "arrives": 3},
    "weighted-ce": {"quality": (0.8, 0.8, 0.5)},
    "deep-knn-ft": {"quality": 0.99},
}
SMALL, LARGE = "resnet18", "vgg11"
DEAD = {"stuck": True}


@pytest.fixture(autouse=True)
def made_up_compactness(monkeypatch):
    """The ratio stands in the made-up features, with some noise over seeds for the interval."""
    noise = np.random.default_rng(0)
    made = lambda features, _: {"ratio": features[0, 0] + 0.002 * noise.random()}  # noqa: E731
    monkeypatch.setattr(claims.metrics, "compactness", made)


def world(methods=tuple(WORLD), backbones=(SMALL, LARGE), seeds=(0, 1, 2), changes=None):
    """Results of all methods; `changes`, such as `{"triplet": DEAD}`, are given to a method by its name."""
    return [
        made_up.result(method, seed, backbone=backbone, **WORLD[method] | (changes or {}).get(method, {}))
        for backbone in backbones for seed in seeds for method in methods
    ]  # fmt: skip


def but(*names):
    return world(methods=[name for name in WORLD if name not in names])


def changed(**changes):
    return world(changes={name.replace("_", "-"): change for name, change in changes.items()})


def variants(settings=((3, 5), (5, 9)), seeds=(0, 1, 2), quality=0.8, **changes):
    made = [changes | {"seed": s, "k": k, "m": m} for k, m in settings for s in seeds]
    return [made_up.result("deep-knn", quality=quality, **each) for each in made]


def judged(found=None, tried=None):
    rows = evidence(found or world(), variants=variants() if tried is None else tried)
    return verdicts(rows).set_index("claim")


@cache
def all_hold():
    return judged()


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_is_replicated_in_a_world_where_it_holds(claim):
    assert all_hold().loc[claim, "verdict"] == "replicated"
    held, _, needed = all_hold().loc[claim, "why"].split(" comparisons")[0].partition(" of ")
    assert held == needed


YES, NO, OPEN = "replicated", "not replicated", "not tested"
SCRATCH = {name: {"weights": "none"} for name in WORLD}
ABOVE = {"quality": 0.9}  # a rival that is better than deep kNN


@pytest.mark.parametrize("claim, found, verdict, said", [
    ("C1", lambda: changed(knn=ABOVE), NO, "4 the other way; the hardest: deep kNN − kNN (resnet18"),
    ("C2", lambda: changed(triplet=ABOVE), NO, "0 of 4 comparisons hold, 4 the other way"),
    ("C3", lambda: changed(weighted_ce={"quality": 0.8}), NO, "4 of 6 comparisons hold, 2 undecided"),
    ("C4", lambda: changed(deep_knn_ft={"quality": 0.8}), NO, "deep kNN* − deep kNN (resnet18"),
    ("C5", lambda: changed(triplet={"arrives": 6}), NO, "1 undecided; the hardest: deep kNN / triplet"),
    ("C5", lambda: changed(triplet={"arrives": 4}), NO, "1 the other way"),
    ("C6", lambda: changed(lmnn=ABOVE), NO, "the other way; the hardest: MLP + deep kNN − LMNN"),
    ("C7", lambda: world(backbones=[SMALL]) + world(backbones=[LARGE], changes={"ce-knn": ABOVE}), NO,
     "2 of 4 comparisons hold, 2 the other way; the hardest: deep kNN − kNN on CE features (vgg11"),
    ("C8", lambda: changed(deep_knn_global={"quality": 0.95}), NO, "the other way"),
    ("C10", lambda: changed(triplet={"ratios": (0.4, 0.5)}), NO, "2 of 4 comparisons hold, 2 the other way"),
    ("C1", lambda: but("knn"), OPEN, "missing: deep kNN − kNN: Acc, deep kNN − kNN: MCR"),
    ("C1", lambda: world(changes=SCRATCH), OPEN, "missing: deep kNN − kNN"),
    ("C2", lambda: changed(triplet={"collapsed": True}), OPEN, "left out: triplet learnt nothing"),
    ("C2", lambda: world(seeds=[1]), OPEN, "a single seed"),
    ("C3", lambda: but("weighted-ce"), OPEN, "missing: deep kNN − weighted CE: Acc"),
    ("C4", lambda: changed(deep_knn_ft={"collapsed": True}), OPEN, "deep-knn-ft itself learnt nothing"),
    ("C5", lambda: changed(triplet=DEAD), OPEN, "triplet learnt nothing"),
    ("C6", lambda: changed(mlp_triplet={"collapsed": True}), OPEN, "mlp-triplet learnt nothing"),
    ("C7", lambda: world(backbones=[SMALL]), OPEN, "a second backbone"),
    ("C8", lambda: changed(deep_knn_global=DEAD), OPEN, "deep-knn-global learnt nothing"),
])  # fmt: skip
def test_made_up_numbers_flip_the_verdict_and_it_says_why(claim, found, verdict, said):
    row = judged(found()).loc[claim]
    assert row["verdict"] == verdict and said in row["why"] and ("needed" in row["why"]) == (verdict == NO)


@pytest.mark.parametrize("tried, verdict, said", [
    (lambda: variants(quality=0.6), NO, "K = 3, M = 5 − K = 5, M = 5"),
    (lambda: variants(quality=0.4, stuck=True), NO, "learnt nothing), "),  # counts against robustness
    (lambda: variants(settings=((3, 5), (7, 5))), OPEN, "missing: another M"),
    (lambda: [], OPEN, "missing: K_p = 1 − K_p = 5: Acc"),
])  # fmt: skip
def test_robustness_needs_another_k_and_another_m_that_work(tried, verdict, said):
    row = judged(tried=tried()).loc["C9"]
    assert row["verdict"] == verdict and said in row["why"]


def test_a_setting_with_a_dead_rival_is_left_out_but_not_one_where_deep_knn_died():
    rival = judged(world(backbones=[SMALL]) + world(backbones=[LARGE], changes={"triplet": DEAD}))
    for claim in ("C2", "C5", "C10"):
        assert rival.loc[claim, "verdict"] == "replicated"
        assert "left out: triplet learnt nothing (vgg11" in rival.loc[claim, "why"]
    own = judged(world(backbones=[SMALL]) + world(backbones=[LARGE], changes={"deep-knn": DEAD}))
    assert (own.loc[["C2", "C5", "C7", "C10"], "verdict"] == "not tested").all()
    assert own.loc["C6", "verdict"] == "replicated"  # it asks nothing of that network


def test_groups_of_runs_validation_and_two_settings_of_a_method():
    pair = world(methods=["deep-knn", "triplet"], backbones=[SMALL])
    held = [replace(r, run=replace(r.run, evaluate_on="validation")) for r in pair]
    assert evidence(held, variants=held).empty and verdicts(evidence([])).empty
    with pytest.raises(ValueError, match="they differ in m.*variants"):
        evidence(pair + variants(settings=[(5, 9)]))
    short = [made_up.result(m, s, epochs=8) for m in ("deep-knn", "triplet") for s in (0, 1)]
    rows = evidence(pair + short)  # a shorter training is a group of its own
    assert set(rows.loc[rows["claim"] == "C2", "setting"]) == {setting(r.run) for r in pair + short}
    assert setting(short[0].run) == "resnet18, imagenet weights, 48 px, 8 epochs"
    own = made_up.result("knn", weights="somewhere/else/own.safetensors", fold=2).run
    assert setting(own) == "resnet18, own.safetensors weights, 48 px, fold 2"


def test_c1_takes_the_main_network_against_knn_on_every_pretrained_backbone():
    main = world(methods=["knn", "deep-knn", "weighted-ce"], backbones=[SMALL])
    rows = evidence(main + world(methods=["knn", "deep-knn"], backbones=[LARGE])).query("claim == 'C1'")
    assert list(rows["setting"].unique()) == [
        "resnet18, imagenet weights, 48 px, 12 epochs",
        "resnet18, imagenet weights, 48 px, 12 epochs against vgg11, imagenet weights, 48 px",
    ]


def test_rows_hold_the_paired_difference_at_the_bonferroni_level_and_the_bounds_of_the_rule():
    rows = evidence(world(), variants=variants())
    row = rows.query("claim == 'C2' and measure == 'MCR'").iloc[0]
    pair = [results.select(world(), method=method, backbone=SMALL) for method in ("deep-knn", "triplet")]
    strict = results.paired(*pair, level=0.995).set_index("score").loc["MCR"]
    assert tuple(row[["value", "low", "high"]]) == pytest.approx(tuple(strict))
    assert (row["seeds"], row["test_images"], row["side"], row["bound"]) == (3, len(LABELS), ">", 0)
    bounds = rows.groupby(["claim", "measure"])["bound"].unique()
    wanted = {"C1": 0, "C3": -2.4, "C8": -2.4, "C9": -3.4}
    assert all(bounds[claim, score] == [bound] for claim, bound in wanted.items() for score in ("Acc", "MCR"))
    assert bounds["C3", "RS"] == [0] and bounds["C5", "epochs ratio"] == [0.5]
    for low, high, verdict, word in (
        (-2.39, 3, "replicated", "hold"), (-2.41, -2.39, "not replicated", "undecided"),
        (-5, -2.41, "not replicated", "the other way"),
    ):  # fmt: skip
        found = verdicts(rows.assign(low=low, high=high)).set_index("claim").loc["C8"]
        assert found["verdict"] == verdict and word in found["why"]


def test_each_method_votes_as_its_claim_says():
    """K_p = 5 for all, cross-entropy's softmax, and the K_p of C9: each of these predicts a class of its own."""
    found, tried = world(methods=["deep-knn", "weighted-ce", "triplet"], backbones=[SMALL]), variants()
    for r in found + tried:
        r._predicted.update({k: np.full(len(LABELS), {5: 0, 7: 1}.get(k, 2)) for k in (1, 3, 5, 7, 9)})
        r.arrays["test_logits"] = np.tile([0, 1, 0], (len(LABELS), 1))
    rows = evidence(found, variants=tried).query("measure == 'Acc'").set_index(["claim", "comparison"])
    share = 100 * np.bincount(LABELS) / len(LABELS)  # the accuracy of always predicting class 0, 1, 2
    assert SOFTMAX == 0 and rows["value"].to_dict() == pytest.approx({
        ("C2", "deep kNN − triplet"): 0, ("C3", "deep kNN − weighted CE"): share[0] - share[1],
        **{("C9", f"{name} − K = 5, M = 5"): 0 for name in ("K = 3, M = 5", "K = 5, M = 9")},
        **{("C9", f"K_p = {k} − K_p = 5"): share[1 if k == 7 else 2] - share[0] for k in (1, 3, 7, 9)},
    })  # fmt: skip


@pytest.mark.parametrize("arrives, logs, never", [
    ((8, 12), (2 / 8, 4 / 12), 0),
    ((8, 900), (2 / 8, 4 / 17), 1),  # never in 16 epochs: the ratio is the most it can be, so that low is 0
])  # fmt: skip
def test_epochs_by_hand(arrives, logs, never):
    deep = [made_up.result("deep-knn", seed, arrives=epochs) for seed, epochs in enumerate((2, 4))]
    rival = [made_up.result("triplet", seed, arrives=epochs) for seed, epochs in enumerate(arrives)]
    row, logs = evidence(deep + rival).query("claim == 'C5'").iloc[0], np.log(logs)
    half = 127.321 * logs.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom at 99.5 %
    low, high = np.exp(logs.mean() + np.array([-half, half]))
    assert (row["value"], row["high"]) == pytest.approx((np.exp(logs.mean()), high), rel=1e-4)
    assert row["low"] == pytest.approx(0 if never else low, rel=1e-4)
    note = ", never by 1 of 2 triplet runs: last epoch + 1" * never
    assert row["setting"] == f"resnet18, imagenet weights, 48 px, 12 epochs, to 90 %{note}"


@pytest.mark.parametrize("name, split, wanted", [
    ("skin7", "paper", [NO, NO, NO, NO, NO, NO, NO, OPEN, OPEN, NO]),
    ("skin7", "grouped", [YES, NO, NO, NO, NO, NO, OPEN, YES, NO, NO]),
    ("sd198", "paper", [OPEN, NO, NO, NO, NO, OPEN, OPEN, OPEN, OPEN, NO]),
    ("sd198", "grouped", [OPEN] * 8 + [NO, OPEN]),
    ("chestxray3", "paper", [OPEN, NO, NO, NO, NO, OPEN, OPEN, OPEN, OPEN, NO]),
    ("chestxray3", "grouped", [OPEN, NO, NO, NO, NO, OPEN, OPEN, OPEN, OPEN, NO]),
])  # fmt: skip
def test_verdicts_on_the_committed_evidence(name, split, wanted):
    rows = verdicts(pd.read_csv(repository() / "data" / "results" / f"{name}_evidence.csv"))
    assert list(rows[rows["split"] == split]["verdict"]) == wanted


def ours(*rows):
    """Two seeds of each row, summarised."""
    both = [result_row(*names, seed=s, **{"acc": 70.0 + s} | more) for *names, more in rows for s in (0, 1)]
    return results.over_seeds(pd.DataFrame(both))


def at(side, table, dataset="Skin-7", measure="acc", k_predict=5, **values):
    """Rows of one cell."""
    values |= {"table": table, "dataset": dataset, "measure": measure, "k_predict": k_predict}
    return side[(side[[*values]] == pd.Series(values)).all(axis=1)]


def test_there_are_as_many_cells_as_printed_each_once_and_with_its_number():
    table = cells()
    wanted = {"2": 90, "3": 18, "4": 24, "S2": 24, "S3": 18, "S4": 30}
    assert table["table"].value_counts(sort=False).to_dict() == wanted and table.notna().all(axis=None)
    assert not table.duplicated([*table.columns.drop("published")]).any()
    assert at(table, "3", method="nca")["published"].tolist() == [75.06]
    assert at(table, "4", "SD-198", backbone="vgg19", method="ce-knn")["published"].tolist() == [59.16]
    assert at(table, "S3", "SD-198", k=3, m=9, k_predict=3)["published"].tolist() == [64.8]


def test_a_cell_stands_beside_the_same_method_vote_neighbours_and_family_of_backbones():
    side = compare_with_paper(ours(
        *(("skin7", "deep-knn", {"backbone": name}) for name in ("small-resnet", "resnet50", "resnet18", "small-vgg")),
        ("sd198", "deep-knn", {"backbone": "legacy_seresnet50", "acc": 45.0}),
        ("skin7", "triplet", {"columns": {"k": None, "m": None}}),
        ("sd198", "deep-knn", {"k": 3, "m": 9, "k_predict": 3, "acc": 41.0}), ("sd198", "deep-knn", {"acc": 42.0}),
        ("sd198", "deep-knn", {"k": 7, "acc": 44.0}),  # of no table
        ("skin7", "deep-knn", {"evaluate_on": "validation", "acc": 99.0}),
    ))  # fmt: skip
    assert set(at(side, "2", method="deep-knn")["our_backbone"]) == {"small-resnet", "resnet50", "resnet18"}
    assert at(side, "2", method="deep-knn", k_predict=1)["ours"].isna().all()
    assert at(side, "3", method="mlp-deep-knn")["ours"].isna().all()
    assert at(side, "2", method="triplet")["ours"].tolist() == [70.5]  # knows no K and M
    assert at(side, "S3", "SD-198", k=3, m=9, k_predict=3)["ours"].tolist() == [41]
    assert at(side, "4", "SD-198", backbone="seresnet50", method="deep-knn")["ours"].tolist() == [45.0]
    assert at(side, "S4", "SD-198")["ours"].tolist() == [42] and not {44, 99} & set(side["ours"])


@pytest.mark.parametrize("table, dataset, name, published, words", [
    ("2", "Skin-7", "skin7", 89.1, "small-resnet in place of resnet50, from scratch, 48 px"),
    ("2", "Skin-7", "lesions", np.nan, "synthetic images"), ("S2", "STL10", "digits", np.nan, "scikit-learn's digits"),
    ("2", "SD-198", "sd198", np.nan, "27 of the 198 classes"), ("S2", "STL10", "stl10", 96.91, "small-resnet"),
    ("2", "Pneumonia", "chestxray3", np.nan, "another chest X-ray set"),
])  # fmt: skip
def test_a_difference_is_taken_on_the_papers_own_images_only(table, dataset, name, published, words):
    side = compare_with_paper(ours((name, "deep-knn", {})))
    row = at(side, table, dataset, our_dataset=name, method="deep-knn").iloc[0]
    assert (row["ours"], row["sd"]) == pytest.approx((70.5, np.sqrt(0.5))) and row["remark"].startswith(words)
    assert row["difference"] == pytest.approx(70.5 - published, nan_ok=True)
    assert row["remark"].endswith("no difference taken") == np.isnan(published)


def test_a_cell_without_ours_says_why():
    side = compare_with_paper(ours(("skin7", "deep-knn", {"collapsed": True})))
    empty = side[side["ours"].isna()].groupby("dataset")["remark"].first().to_dict()
    assert {name: empty[name] for name in ("Pneumonia", "Tiny200", "CUB200")} == claims.NOT_TO_BE_HAD
    assert empty["SD-198"].startswith("not run") and len(side) == len(cells())
    assert at(side, "2", method="deep-knn")["remark"].iloc[0].endswith("2 of 2 runs collapsed")


def test_a_row_to_read_holds_the_papers_scores_and_ours_apart_and_other_settings_have_rows_of_their_own():
    more = ({"mcr": 50.25}, {"margin": 0.8, "acc": 60.0}, {"fold": 2, "acc": 50.0})
    side = compare_with_paper(ours(*(("skin7", "deep-knn", changes) for changes in more)))
    shown = claims.readable_cells(side, "2")
    rows = shown[(shown["paper's data"] == "Skin-7") & (shown["method"] == "deep kNN, K_p = 5")]
    assert [text.split(" / ")[0] for text in rows["ours"]] == ["70.5 ± 0.7", "60.0 ± 0.0", "50.0 ± 0.0"]
    row = rows.iloc[0].to_dict()
    assert (row["paper"], row["ours"]) == ("89.1 / 78.9 / 77.3", "70.5 ± 0.7 / 50.2 ± 0.0 / 30.0 ± 0.0")
    assert (row["ours − paper"], row["seeds"]) == ("-18.6 / -28.7 / -47.3", "2")
    assert row["our data"] == "skin7, paper split"
    assert row["our setting"] == "small-resnet, none, 48 px, 12 epochs, α = 0.5"
    for table, extra in (("2", 2), ("3", 0), ("4", 0), ("S2", 0), ("S3", 0), ("S4", 2)):
        lines = cells().query("table == @table").drop(columns=["measure", "published"]).drop_duplicates()
        shown = claims.readable_cells(side, table)
        assert len(shown) == len(lines) + extra and shown.notna().all(axis=None)
        assert ("backbone" in shown) == (table in ("2", "4")) and ("K, M" in shown) == (table == "S3")


def test_students_interval_by_hand():
    half = 4.3027 / np.sqrt(3)  # t = 4.3027 with two degrees of freedom
    assert claims.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert claims.t_interval([2.0, 2.0]) == (2, 2)
    assert np.isnan(claims.t_interval([1.0])).all() and np.isnan(claims.t_interval([])).all()
