"""The published numbers in data/paper: every cell against the tables as they are printed, typed in printed.json again.

Tables 1 to 4 stand in the paper, S1 to S4 in its supplement, and Figure 2 was read by eye.
"""

import json
from itertools import product
from pathlib import Path

import pytest

from deepknn_lib.study.results import paper

PRINTED = json.loads(Path(__file__).with_name("printed.json").read_text(encoding="utf-8"))
SCORES, SETS = ["acc", "mcr", "rs"], ("Skin-7", "Pneumonia", "SD-198")
BACKBONES = ("vgg19", "resnet50", "densenet121", "seresnet50")
METHODS3 = ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce", "mlp-deep-knn")
COLUMNS_S2 = [*product((1, 5), ("knn", "triplet", "deep-knn")), (0, "weighted-ce"), (5, "deep-knn-ft")]


def printed(name):
    """Row by row: the words before the first bar, and the words after it, bars left out."""
    rows = [line.split("|") for line in PRINTED[name]]
    return [(head.split(), " ".join(cells).split()) for head, *cells in rows]


@pytest.mark.parametrize("name", ["table1", "table_s1", "figure2"])
def test_statistics_and_readings_are_those_printed(name):
    table = paper(name).convert_dtypes().astype("string").fillna("-")
    rows = [" ".join(row).replace(",", "") for row in ([*table], *table.to_numpy())]
    assert rows == [" ".join([*head, *cells]).replace(",", "") for head, cells in printed(name)]


@pytest.mark.parametrize("name, row, column, columns", [
    ("table2", ["method", "backbone", "k_predict"], ["dataset", "measure"], product(SETS, SCORES)),
    ("table3", ["measure"], ["method"], product(METHODS3)),
    ("table4", ["measure"], ["backbone", "method"], product(BACKBONES, ("ce-knn", "deep-knn"))),
    ("table_s2", ["dataset"], ["k_predict", "method"], COLUMNS_S2),
    ("table_s3", ["m"], ["k", "measure"], product((3, 5, 7), SCORES[:2])),
    ("table_s4", ["k_predict"], ["dataset", "measure"], product(("SD-198", *SETS[:2]), SCORES[:2])),
])  # fmt: skip
def test_scores_are_those_printed(name, row, column, columns):
    table, columns, wanted = paper(name), list(columns), []
    measures = [score for score in SCORES if score in table]
    long = table.melt([n for n in table if n not in measures], measures, "measure")
    found = long[[*row, *column, "value"]].astype({name: str for name in (*row, *column)})
    for head, cells in printed(name):
        head = [word.lower() if word in ("Acc", "MCR", "RS") else word for word in head]
        pairs = zip(columns, map(float, cells), strict=True)
        wanted += [(*head, *map(str, words), number) for words, number in pairs]
    assert sorted(found.itertuples(index=False, name=None)) == sorted(wanted)


def test_the_papers_differences_are_those_of_its_tables():
    tables = dict.fromkeys(("C1", "C2", "C3", "C4"), paper("table2").query("backbone == 'resnet50'"))
    tables |= {"C6": paper("table3").assign(dataset="Skin-7", k_predict=5)}
    tables |= {"C9": paper("table_s4").assign(method="deep-knn")}
    theirs = paper("our_sets").query("differs.isna()").set_index("ours")["dataset"]
    rule = paper("differences").merge(paper("comparisons"), on=["claim", "comparison", "measure"])
    for row in rule.to_dict("records"):
        scores = tables[row["claim"]].set_index(["dataset", "method", "k_predict"])[row["measure"].lower()]
        of = scores[theirs[row["dataset"]]]
        gap = of[row["method"], row["k_method"]] - of[row["rival"], row["k_rival"]]
        assert row["paper"] == pytest.approx(gap, abs=0.005)
    assert len(rule) == len(paper("differences")) == 48
