"""The published numbers in data/paper: every cell against the tables as they are printed, typed here a second time.

Tables 1 to 4 stand in the paper, S1 to S4 in its supplement, and Figure 2 was read by eye. To check what is typed here
against the paper itself, let DEEPKNN_PAPER_TEXT name a copy of it as plain text (it is not ours to ship).
"""

import os
from itertools import product
from pathlib import Path

import pytest

from deepknn_lib.study import claims
from deepknn_lib.study.results import paper
from deepknn_lib.study.runs import METHODS

SCORES = ["acc", "mcr", "rs"]
BACKBONES = ("vgg19", "resnet50", "densenet121", "seresnet50")

TABLE1 = """
Pneumonia | 3 21345 5339 1024 × 1024 6012 11821
SD-198    | 198 5,206 1377 [260, 4752] 9 60
Skin-7    | 7 8005 2005 600 × 450 115 6705
"""
# Skin-7, Pneumonia, SD-198: Acc MCR RS
TABLE2 = """
knn vgg19 1            | 71.4 42.0 37.9 | 52.7 52.4 43.1 | 24.5 24.4 20.8
knn resnet50 1         | 75.6 49.9 55.2 | 52.4 51.2 38.9 | 27.6 28.4 29.2
triplet resnet50 1     | 82.9 64.2 63.2 | 67.8 66.3 65.2 | 60.0 60.1 47.3
deep-knn resnet50 1    | 88.2 77.4 77.0 | 71.0 69.3 67.3 | 64.5 64.1 48.3
knn vgg19 5            | 70.7 30.8 10.3 | 55.4 55.7 45.0 | 15.1 13.3 4.2
knn resnet50 5         | 74.4 37.5 34.5 | 55.5 54.7 39.7 | 19.1 17.5 12.5
triplet resnet50 5     | 84.3 68.3 67.3 | 70.0 68.7 66.3 | 60.2 60.0 47.2
deep-knn resnet50 5    | 89.1 78.9 77.3 | 71.1 69.4 69.0 | 65.1 64.3 48.3
weighted-ce resnet50 0 | 88.0 80.2 76.6 | 71.1 69.1 70.1 | 61.9 62.4 47.7
deep-knn-ft resnet50 5 | 90.3 81.0 80.4 | 71.6 71.1 70.9 | 66.4 66.4 51.5
"""
# kNN-basic, NCA, LMNN, MLP+triplets, MLP+CE, MLP+deep-kNN
TABLE3 = """
Acc | 64.53 75.06 81.85 77.13 78.85 85.09
MCR | 34.49 36.39 61.78 62.22 63.11 66.08
RS  | 10.34 27.59 62.07 63.43 64.21 67.30
"""
# kNN and deep kNN for each of VGG19, ResNet50, Dense121, SE-ResNet50
TABLE4 = """
Acc | 59.16 61.51 60.17 65.12 60.54 64.02 61.85 62.79
MCR | 56.33 61.93 57.35 64.34 60.12 65.11 59.32 62.27
RS  | 43.12 45.43 46.01 48.31 50.42 52.21 50.01 53.12
"""
TABLE_S1 = """
STL10         | 10 5,000 8,000 96 × 96 500 500
Tiny-ImageNet | 200 100,000 10,000 64 × 64 - -
CUB200-2011   | 200 5,994 5,794 - 29 30
"""
# kNN, triplet, deep kNN with K_p = 1; the same with 5; weighted-CE; deep kNN*
TABLE_S2 = """
STL10   | 92.39 69.31 95.21 | 93.32 70.52 96.91 | 94.06 | 95.00
CUB200  | 40.75 65.34 74.95 | 42.47 66.20 75.32 | 79.3  | 81.10
Tiny200 | 58.82 67.32 74.32 | 62.44 73.03 75.32 | 79.30 | 80.52
"""
# a row for each M; K = 3, 5, 7: Acc MCR
TABLE_S3 = """
1 | 63.7 64.5 | 62.4 61.6 | 63.4 62.6
5 | 65.0 65.0 | 65.1 64.3 | 64.2 64.0
9 | 64.8 63.9 | 63.4 62.2 | 64.8 63.6
"""
# a row for each K_p; SD-198, Skin-7, Pneumonia: Acc MCR
TABLE_S4 = """
1 | 64.5 64.1 | 88.2 77.4 | 71.0 69.4
3 | 64.7 64.3 | 88.2 76.4 | 71.0 69.4
5 | 65.1 64.3 | 89.1 78.9 | 71.1 69.4
7 | 65.0 64.3 | 88.3 76.5 | 71.0 69.4
9 | 65.0 64.3 | 88.3 76.4 | 71.0 69.4
"""
SETS = ("Skin-7", "Pneumonia", "SD-198")
METHODS3 = ("knn", "nca", "lmnn", "mlp-triplet", "mlp-ce", "mlp-deep-knn")
COLUMNS_S2 = [*product((1, 5), ("knn", "triplet", "deep-knn")), (0, "weighted-ce"), (5, "deep-knn-ft")]


def printed(table):
    """Row by row: the words before the first bar, and what is printed after it, bars left out."""
    rows = [line.split("|") for line in table.strip().splitlines()]
    return [(head.split(), " ".join(" ".join(cells).split())) for head, *cells in rows]


@pytest.mark.parametrize("name, text", [("table1", TABLE1), ("table_s1", TABLE_S1)])
def test_statistics_are_those_printed(name, text):
    table = paper(name).convert_dtypes().astype("string").fillna("-")
    assert list(table)[1:] == ["classes", "train", "test", "image_size", "smallest_class", "largest_class"]
    rows = [" ".join(row).replace(",", "") for row in table.itertuples(index=False)]
    assert rows == [" ".join([*head, cells]).replace(",", "") for head, cells in printed(text)]


@pytest.mark.parametrize("name, row, column, columns, text", [
    ("table2", ["method", "backbone", "k_predict"], ["dataset", "measure"], product(SETS, SCORES), TABLE2),
    ("table3", ["measure"], ["method"], product(METHODS3), TABLE3),
    ("table4", ["measure"], ["backbone", "method"], product(BACKBONES, ("ce-knn", "deep-knn")), TABLE4),
    ("table_s2", ["dataset"], ["k_predict", "method"], COLUMNS_S2, TABLE_S2),
    ("table_s3", ["m"], ["k", "measure"], product((3, 5, 7), SCORES[:2]), TABLE_S3),
    ("table_s4", ["k_predict"], ["dataset", "measure"], product(("SD-198", *SETS[:2]), SCORES[:2]), TABLE_S4),
])  # fmt: skip
def test_scores_are_those_printed(name, row, column, columns, text):
    table, columns = paper(name), list(columns)
    measures = [score for score in SCORES if score in table]
    long = table.melt([n for n in table if n not in measures], measures, "measure")
    found = long[[*row, *column, "value"]].astype({name: str for name in (*row, *column)})
    wanted = []
    for head, cells in printed(text):
        head = [word.lower() if word in ("Acc", "MCR", "RS") else word for word in head]
        pairs = zip(columns, map(float, cells.split()), strict=True)
        wanted += [(*head, *map(str, words), number) for words, number in pairs]
    assert sorted(found.itertuples(index=False, name=None)) == sorted(wanted)


@pytest.mark.skipif("DEEPKNN_PAPER_TEXT" not in os.environ, reason="DEEPKNN_PAPER_TEXT names no file")
@pytest.mark.parametrize("text", [TABLE1, TABLE2, TABLE3, TABLE4])
def test_what_is_printed_here_is_printed_in_the_paper(text):
    text_of = " ".join(Path(os.environ["DEEPKNN_PAPER_TEXT"]).read_text(encoding="utf-8").split())
    assert not [cells for _, cells in printed(text) if cells not in text_of]


def test_tables_agree_where_they_show_the_same_run():
    table2 = paper("table2").query("method == 'deep-knn'").set_index(["dataset", "k_predict"])
    resnet = paper("table4").query("backbone == 'resnet50' and method == 'deep-knn'").iloc[0]
    assert (abs(resnet[SCORES] - table2.loc["SD-198", 5][SCORES]) <= 0.051).all()
    chosen = paper("table_s3").query("k == 5 and m == 5").iloc[0]
    assert (chosen[["acc", "mcr"]] == table2.loc["SD-198", 5][["acc", "mcr"]]).all()
    differ = []
    for row in paper("table_s4").query("k_predict in (1, 5)").to_dict("records"):
        other = table2.loc[row["dataset"], row["k_predict"]]
        differ += [(row["dataset"], row[s], other[s]) for s in ("acc", "mcr") if row[s] != other[s]]
    assert differ == [("Pneumonia", 69.4, 69.3)]  # The paper differs from its supplement, as printed.


def test_readings_of_figure_2_say_that_they_are_readings():
    table = paper("figure2")
    assert (table.pop("reading") == "by eye").all() and (table["epoch"] <= table["epochs_drawn"]).all()
    assert table.to_csv(index=False, sep=" ").splitlines() == [
        "dataset backbone method epoch train_acc epochs_drawn",
        "SD-198 resnet50 deep-knn 30 87 180", "SD-198 resnet50 triplet 90 55 180",
        "Skin-7 densenet121 deep-knn 20 90 110", "Skin-7 densenet121 triplet 110 95 110",
    ]  # fmt: skip


def test_the_claims_have_their_texts_and_comparisons_of_known_methods():
    table, rule, bounds = paper("claims"), paper("comparisons"), paper("bounds")
    assert list(table) == ["claim", "text"] and tuple(table["claim"]) == claims.CLAIMS
    assert table["text"].str.len().between(20, 140).all()
    assert list(rule["claim"].unique()) == list(claims.CLAIMS) and set(rule["needed"]) == set(
        bounds["needed"]
    )
    assert set(rule["method"]) | set(rule["rival"]) <= set(METHODS) and set(rule["side"]) == {"<", ">"}
    assert not rule.duplicated(["claim", "comparison", "measure"]).any()
