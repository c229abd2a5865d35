"""Tables of results: rows, summaries, paired differences and their coverage, and how they are written."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, result, result_row
from sets import refused

from deepknn_lib.storage import figures_dir, repository
from deepknn_lib.study import results as tables
from deepknn_lib.study.runs import SOFTMAX


@pytest.fixture(scope="module")
def results():
    """Two seeds of three methods."""
    quality = {"deep-knn": 0.8, "weighted-ce": (0.9, 0.7, 0.5), "triplet": 0.6}
    return [result(method, seed, quality=q) for seed in (0, 1) for method, q in quality.items()]


@pytest.fixture(scope="module")
def pair(results):
    return [tables.select(results, method=method) for method in ("deep-knn", "weighted-ce")]


def test_a_run_learnt_if_it_is_a_point_better_than_calling_all_the_largest_class():
    ends = [replace(result("triplet"), history=[{"train_acc": accuracy}]) for accuracy in (50.9, 51.1)]
    assert [end.learnt for end in ends] == [False, True]


def test_rows_have_the_columns_of_the_committed_ones_and_a_vote_that_was_asked_for_beside_the_usual():
    asked = [result("deep-knn", k=3, k_predict=3)]
    rows, committed = tables.results_table(asked), repository() / "data" / "results" / "skin7_paper_runs.csv"
    of = [[n for n in t if "recall" not in n and n != "precision"] for t in (rows, pd.read_csv(committed))]
    assert of[0] == of[1] and rows["k_predict"].tolist() == [1, 5, 3] and rows["recall_c"].equals(rows["rs"])
    assert [*tables.predictions_table(asked)][-3:] == ["deep-knn:1", "deep-knn:5", "deep-knn:3"]


def test_a_summary_to_read_has_mean_sd_and_an_interval_around_them(results):
    table = tables.summary(results).assign(collapsed=[1, 0, 0, 0, 0])
    assert table.eval("acc_low < acc < acc_high and seeds == 2").all()
    shown = tables.readable(table)
    assert list(shown) == ["split", "method", "Acc", "MCR", "RS", "seeds"]
    assert [*shown["method"][[0, 2]]] == ["deep kNN, K_p = 1 (collapsed)", "weighted cross-entropy"]
    words = "{mcr:.1f} ± {mcr_sd:.1f} [{mcr_low:.1f}, {mcr_high:.1f}]"
    assert shown.loc[2, "MCR"] == words.format(**table.loc[2])
    assert tables.with_sd(pd.DataFrame({"acc": [70.05], "acc_sd": [np.nan]}), "acc") == ["70.0"]


@pytest.mark.parametrize("share, ends", [(0.0, (0, 11.57)), (1.0, (88.43, 100))])
def test_a_recall_of_0_or_100_per_cent_has_the_exact_interval_of_its_30_lesions(share, ends):
    seeds = [result("deep-knn", seed, quality=(0.9, 0.9, share * 1.5)) for seed in (0, 1)]
    row = tables.summary(seeds).iloc[0]
    assert row["rs"] == 100 * share and tuple(row[["rs_low", "rs_high"]]) == pytest.approx(ends, abs=0.01)


def test_a_paired_difference_is_that_of_the_means_and_0_against_itself(results, pair):
    deep, ce = pair
    assert (tables.paired(deep, deep)[["difference", "low", "high"]] == 0).all(axis=None)
    means = tables.summary(results).set_index(["method", "k_predict"])[[*tables.SCORES]]
    gap = tables.paired(deep, ce[::-1], 5, SOFTMAX)  # seeds in any order
    wanted = means.loc["deep-knn", 5] - means.loc["weighted-ce", SOFTMAX]
    assert [*gap["difference"]] == pytest.approx([*wanted])
    assert gap.eval("low <= difference <= high").all()
    strict = tables.paired(deep, ce, 5, SOFTMAX, level=0.995)
    assert (strict["low"] < gap["low"]).all() and (strict["high"] > gap["high"]).all()


def test_each_k_p_is_judged_by_the_runs_that_have_it():
    both = [result("deep-knn", seed, seed + 0.3, k_predict=3 + 2 * seed) for seed in (0, 1)]
    alone, with_other = (tables.summary(found).set_index("k_predict").loc[3] for found in (both[:1], both))
    assert alone.equals(with_other)


def test_differences_are_refused_between_other_seeds_or_images(pair):
    deep, ce = pair
    moved = [replace(r, arrays=r.arrays | {"test_ids": r.arrays["test_ids"][::-1]}) for r in ce]
    for one, other in ((deep, ce[:-1]), (deep, ce[:1] * 2), ([], [])):
        refused("same seeds", tables.paired, one, other)
    refused("not the same test images", tables.paired, deep, moved)
    refused("not the same test images", tables.summary, [ce[0], moved[1]])
    triplets = [result("triplet"), result("triplet", 1, k=9)]
    for several in ([*ce, result("weighted-ce", 9, lr=0.7)], [*ce, ce[0]], triplets):
        refused("several settings of a method", tables.summary, several)


def test_a_paired_interval_answers_for_the_seeds_too():
    none, every = (LABELS + 1) % 3, LABELS
    first = [replace(result("deep-knn", seed), _predicted={5: p}) for seed, p in enumerate((every, none))]
    second = [replace(result("triplet", seed), _predicted={5: none}) for seed in (0, 1)]
    # The gain is 100 points with one seed and 0 with the other: images tell nothing, the seeds do.
    assert tables.paired(first, second).iloc[0].tolist() == ["Acc", 50, 0, 100]


def test_a_paired_interval_covers_the_true_difference_where_views_of_a_lesion_go_together():
    rng, inside, truth = np.random.default_rng(0), [], 100 * (0.7 - 0.6)
    base = result("deep-knn")
    apart = base.arrays | {"test_groups": np.arange(len(LABELS))}

    def drawn(share):
        right = np.repeat(rng.random(len(LABELS) // 2) < share, 2)  # both views of a lesion alike
        return replace(base, _predicted={5: np.where(right, LABELS, (LABELS + 1) % 3)})

    for _ in range(120):
        pair = [drawn(0.7)], [drawn(0.6)]
        both = pair, [[replace(r, arrays=apart) for r in side] for side in pair]
        rows = [tables.paired(*sides).iloc[0] for sides in both]
        inside.append([row["low"] <= truth <= row["high"] for row in rows])
    lesions, images = np.mean(inside, axis=0)
    assert 0.90 <= lesions <= 1 and images < 0.88  # 95 %; image by image it would be 83 %


def test_tables_to_read_have_a_star_where_the_interval_excludes_0_and_text_is_no_html_and_no_formula():
    rows = [("b", "Acc", 2.06, 0.3, 4.0), ("b", "MCR", -3.0, -5.5, -0.1), ("b", "RS", 1.0, 0.0, 2.0)]
    table = pd.DataFrame(rows, columns=["method", "score", "difference", "low", "high"])
    shown = tables.points(table, ["method"])  # 0 itself is not excluded
    assert shown.values.tolist() == [["b", "+2.1 [+0.3, +4.0] *", "-3.0 [-5.5, -0.1] *", "+1.0 [+0.0, +2.0]"]]
    table = pd.DataFrame({"a|b": ["x|y"], "n": [1.25], "none": [np.nan]})
    assert tables.markdown(table).splitlines()[1:] == ["| --- | ---: | ---: |", "| x\\|y | 1.2 | – |"]
    bad = ['=HYPERLINK("x")', "-ve", "-2+3+cmd|'x'!A0", "-2 +cmd|'x'!A0", "\t=1"]
    names = ["<img src=x onerror=alert(1)>", "-1.5 [-2, -1]", "+.5", *bad]
    table = pd.DataFrame({"n": 1.25, "class": names, "=x": 1})
    assert "<" not in tables.markdown(table)
    tables.save_rows(table, "t")
    stored = pd.read_csv(figures_dir() / "tables" / "t.csv")
    assert [*stored["class"]] == [*names[:3], *(f"'{name}" for name in bad)] and stored["n"][0] == 1.25
    assert [*stored] == ["n", "class", "'=x"]


def test_over_seeds_is_the_mean_and_sd_of_runs_that_agree_in_every_setting():
    ce = {"method": "weighted-ce", "columns": {"margin": None, "soft": None, "k": None}}
    given = [
        {"acc": 70.0, "mcr": 50.0}, {"acc": 73.0, "mcr": 52.0, "seed": 1, "collapsed": True},
        {"acc": 76.0, "mcr": 57.0, "seed": 2}, {"acc": 1.0, "split": "grouped"}, {"acc": 2.0, "margin": 0.7},
        {"acc": 3.0, "k_predict": 1}, {"acc": 4.0, "evaluate_on": "validation"},
        {"acc": 5.0} | ce, {"acc": 7.0, "seed": 1} | ce,
    ]  # fmt: skip
    rows = pd.DataFrame([result_row("skin7", **{"method": "deep-knn", "seed": 0} | row) for row in given])
    table = tables.over_seeds(rows)
    assert table["acc"].tolist() == [73, 1, 2, 3, 4, 6] and table["seeds"].tolist() == [3, 1, 1, 1, 1, 2]
    assert tuple(table.loc[0, ["mcr", "collapsed", "acc_sd"]]) == (53, 1, 3)
    old = tables.over_seeds(rows.drop(columns=["soft", "warmup"]))  # rows from before a column was added
    assert old["acc"].tolist() == table["acc"].tolist()
