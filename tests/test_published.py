"""The paper's cells beside ours: which of our results stand beside which cell, and what is said where none does."""

import numpy as np
import pandas as pd
import pytest

from deepknn_lib import published, tables
from deepknn_lib.published import beside, cells, readable

CELLS = {"2": 30 * 3, "3": 6 * 3, "4": 8 * 3, "S2": 24, "S3": 9 * 2, "S4": 15 * 2}


@pytest.fixture
def ours(result_row):
    """What we have: a few made-up rows, two seeds of each, summarised."""

    def summarise(*rows):
        both = [result_row(*args, seed=s, **{"acc": 70.0 + s, **changes}) for args, changes in rows for s in (0, 1)]
        return tables.over_seeds(pd.DataFrame(both))

    return summarise


def at(side, table, dataset="Skin-7", **values):
    """Rows of one cell."""
    values |= {"table": table, "dataset": dataset}
    for name, value in values.items():
        side = side[side[name] == value]
    return side


# The cells


def test_there_are_as_many_cells_as_printed_and_each_once():
    table = cells()
    assert table["table"].value_counts().to_dict() == CELLS and table["table"].drop_duplicates().tolist() == list(CELLS)
    keys = ["table", "dataset", "method", "backbone", "k_predict", "k", "m", "measure"]
    assert list(table) == [*keys, "published"] and not table.duplicated(keys).any() and table.notna().all(axis=None)


@pytest.mark.parametrize("table, name, fixed", [
    ("2", "table2", {}),
    ("3", "table3", {"dataset": "Skin-7", "backbone": "resnet50", "k_predict": 5}),
    ("4", "table4", {"dataset": "SD-198", "k_predict": 5}),
    ("S2", "table_s2", {}),
    ("S3", "table_s3", {"dataset": "SD-198", "method": "deep-knn", "backbone": "resnet50"}),
    ("S4", "table_s4", {"method": "deep-knn", "backbone": "resnet50", "k": 5, "m": 5}),
])  # fmt: skip
def test_cells_are_those_of_the_files(table, name, fixed):
    part, seen = cells().query("table == @table"), 0
    for row in tables.paper(name).to_dict("records"):
        keys = fixed | {n: v for n, v in row.items() if n not in tables.SCORES}
        keys |= {"k_predict": row["k"]} if table == "S3" else {}
        for measure in set(tables.SCORES) & set(row):
            found = at(part, table, **({"measure": measure} | keys))
            assert found["published"].tolist() == [row[measure]]
            seen += 1
    assert seen == len(part)


# Beside them


def test_a_cell_stands_beside_the_same_method_vote_and_family_of_backbones(ours):
    side = beside(ours(
        (("skin7", "deep-knn"), {"backbone": "small-resnet"}),
        (("skin7", "deep-knn"), {"backbone": "resnet50", "weights": "imagenet"}),
        (("skin7", "deep-knn"), {"backbone": "resnet18"}),
        (("skin7", "deep-knn"), {"backbone": "small-vgg"}),
        (("skin7", "deep-knn"), {"backbone": "small-densenet"}),
        (("skin7", "knn"), {"backbone": "small-vgg", "k_predict": 1}),
        (("skin7", "triplet"), {"k_predict": 5, "columns": {"k": None, "m": None}}),
    ))  # fmt: skip
    acc = {"measure": "acc", "k_predict": 5}
    assert set(at(side, "2", method="deep-knn", **acc)["our_backbone"]) == {"small-resnet", "resnet50", "resnet18"}
    found = at(side, "2", method="knn", measure="acc", backbone="vgg19", k_predict=1)
    assert found["our_backbone"].tolist() == ["small-vgg"]
    for none in ({"backbone": "vgg19", "k_predict": 5}, {"backbone": "resnet50", "k_predict": 1}):
        assert at(side, "2", method="knn", measure="acc", **none)["ours"].isna().all()
    assert at(side, "2", method="deep-knn", measure="acc", k_predict=1)["ours"].isna().all()  # another vote
    assert at(side, "2", method="triplet", **acc)["ours"].tolist() == [70.5]  # knows no K and M
    assert at(side, "3", method="mlp-deep-knn", **acc)["ours"].isna().all()  # another method


def test_the_four_backbones_of_table_4_each_take_their_own_relatives(result_row):
    from deepknn_lib.models import PAPER_BACKBONES, SMALL_BACKBONES

    names = [*SMALL_BACKBONES, *PAPER_BACKBONES]
    rows = [result_row("sd198", "deep-knn", backbone=b, acc=float(n)) for n, b in enumerate(names)]
    side = at(beside(tables.over_seeds(pd.DataFrame(rows))), "4", "SD-198", method="deep-knn", measure="acc")
    found = side.groupby("backbone")["ours"].apply(sorted).to_dict()
    assert found == {"vgg19": [0, 4], "resnet50": [1, 5], "densenet121": [2, 6], "seresnet50": [3, 7]}
    assert at(side, "4", "SD-198", our_backbone="legacy_seresnet50")["remark"].str.contains("in place of").sum() == 0
    assert at(side, "4", "SD-198", our_backbone="small-seresnet")["remark"].str.contains("in place of seresnet50").all()


def test_neighbours_of_the_loss_and_of_the_vote_find_their_cell(ours):
    side = beside(ours(
        (("sd198", "deep-knn"), {"k": 3, "m": 9, "k_predict": 3, "acc": 41.0}),
        (("sd198", "deep-knn"), {"k": 5, "m": 5, "k_predict": 5, "acc": 42.0}),
        (("sd198", "deep-knn"), {"k": 5, "m": 5, "k_predict": 9, "acc": 43.0}),
        (("sd198", "deep-knn"), {"k": 7, "m": 5, "k_predict": 5, "acc": 44.0}),  # of no table
    ))  # fmt: skip
    s3 = at(side, "S3", "SD-198", measure="acc")
    had = s3[s3["ours"].notna()]
    assert had[["k", "m", "ours"]].values.tolist() == [[3, 9, 41], [5, 5, 42]]
    s4 = at(side, "S4", "SD-198", measure="acc").set_index("k_predict")["ours"]
    assert (s4[5], s4[9]) == (42, 43) and s4[[1, 3, 7]].isna().all()
    assert at(side, "2", "SD-198", measure="acc", method="deep-knn", k_predict=5)["ours"].tolist() == [42]
    assert 44 not in side["ours"].tolist()


def test_a_difference_is_taken_on_the_papers_own_images_only(ours):
    names = ("skin7", "lesions", "sd198", "chestxray3", "digits", "stl10")
    side = beside(ours(*(((name, "deep-knn"), {}) for name in names)))
    acc = {"method": "deep-knn", "measure": "acc", "k_predict": 5}
    skin = at(side, "2", **acc).set_index("our_dataset")
    assert set(skin.index) == {"skin7", "lesions"}
    assert skin.loc["skin7", "difference"] == pytest.approx(70.5 - 89.1) and skin.loc["skin7", "published"] == 89.1
    assert "no difference" not in skin.loc["skin7", "remark"]
    assert skin.loc["skin7", "remark"] == "small-resnet in place of resnet50, from scratch, 48 px"
    assert skin.loc["lesions", "ours"] == 70.5 and np.isnan(skin.loc["lesions", "difference"])
    for dataset, name, words in (
        ("Skin-7", "lesions", "synthetic images"), ("SD-198", "sd198", "27 of the 198 classes"),
        ("Pneumonia", "chestxray3", "another chest X-ray set"),
    ):  # fmt: skip
        row = at(side, "2", dataset, our_dataset=name, **acc).iloc[0]
        assert row["remark"].startswith(words) and row["remark"].endswith("; no difference taken")
        assert row["ours"] == 70.5 and np.isnan(row["difference"])
    stl = at(side, "S2", "STL10", **acc).set_index("our_dataset")
    assert np.isnan(stl.loc["digits", "difference"]) and stl.loc["stl10", "difference"] == pytest.approx(70.5 - 96.91)


def test_a_row_of_ours_comes_with_its_sd_seeds_and_collapsed_runs(ours):
    side = beside(ours((("skin7", "triplet"), {"collapsed": True, "rs": 12.0, "split": "grouped", "weights": "imagenet"})))
    row = at(side, "2", method="triplet", measure="acc", k_predict=5).iloc[0]
    assert (row["ours"], row["seeds"], row["collapsed"]) == (70.5, 2, 2) and row["sd"] == pytest.approx(np.sqrt(0.5))
    assert "ImageNet weights" in row["remark"] and "2 of 2 runs collapsed" in row["remark"]
    assert (row["our_split"], row["our_weights"], row["our_image_size"]) == ("grouped", "imagenet", 48)
    assert at(side, "2", method="triplet", measure="rs", k_predict=5).iloc[0]["ours"] == 12


def test_every_cell_comes_and_one_without_ours_says_why(ours):
    side = beside(ours((("skin7", "deep-knn"), {})))
    keys = ["table", "dataset", "method", "backbone", "k_predict", "k", "m", "measure", "published"]
    pd.testing.assert_frame_equal(side[keys], cells()[keys])  # one of ours at most: no row more
    empty = side[side["ours"].isna()]
    assert (empty["remark"].str.len() > 20).all() and empty[["difference", "seeds", "our_dataset"]].isna().all(axis=None)
    for dataset, words in (("Pneumonia", "RSNA"), ("CUB200", "CUB200-2011 is not"), ("Tiny200", "Tiny-ImageNet is not"),
                           ("SD-198", "not run")):  # fmt: skip
        part = empty[empty["dataset"] == dataset]
        assert len(part) and part["remark"].str.contains(words).all()
    assert side["ours"].notna().sum() == 3 + 2  # in tables 2 and S4


def test_trials_on_validation_images_never_stand_beside_the_paper(ours):
    rows = ((("skin7", "deep-knn"), {}), (("skin7", "deep-knn"), {"evaluate_on": "validation", "acc": 99.0}))
    assert at(beside(ours(*rows)), "2", method="deep-knn", measure="acc", k_predict=5)["ours"].tolist() == [70.5]


# To read


@pytest.mark.parametrize("table", CELLS)
def test_each_table_can_be_read_with_and_without_ours(ours, table):
    had = ours(
        (("skin7", "deep-knn"), {}), (("lesions", "mlp-ce"), {}), (("sd198", "deep-knn"), {"k": 3, "m": 1, "k_predict": 3}),
        (("sd198", "deep-knn"), {"backbone": "small-vgg"}), (("stl10", "ce-knn"), {}), (("stl10", "knn"), {"k_predict": 1}),
    )  # fmt: skip
    part = cells().query("table == @table")
    rows = len(part.drop_duplicates(["dataset", "method", "backbone", "k_predict", "k", "m"]))
    for side in (beside(had), beside(had.iloc[:0])):
        shown = readable(side, table)
        assert len(shown) == rows and shown.notna().all(axis=None)
        lines = tables.markdown(shown).splitlines()
        assert len(lines) == rows + 2 and all(line.startswith("| ") for line in lines[2:])
        assert ("backbone" in shown) == (table in ("2", "4")) and ("K, M" in shown) == (table == "S3")
    assert readable(beside(had), table)["ours"].str.contains("±").any()
    assert (readable(beside(had.iloc[:0]), table)["ours"] == "–").all()


def test_a_row_to_read_holds_the_papers_scores_and_ours_apart(ours):
    shown = readable(beside(ours((("skin7", "deep-knn"), {"mcr": 50.25, "rs": 30.0}))), "2")
    row = shown[(shown["paper's data"] == "Skin-7") & (shown["method"] == "deep kNN, K_p = 5")].iloc[0]
    assert row["paper"] == "89.1 / 78.9 / 77.3"
    assert row["ours"] == "70.5 ± 0.7 / 50.2 ± 0.0 / 30.0 ± 0.0"
    assert row["ours − paper"] == "-18.6 / -28.7 / -47.3"
    assert (row["our data"], row["seeds"]) == ("skin7, paper split", "2")
    assert row["our setting"] == "small-resnet, none, 48 px, 12 epochs, α = 0.5"


def test_runs_of_other_settings_get_rows_of_their_own(ours):
    had = ours((("skin7", "deep-knn"), {}), (("skin7", "deep-knn"), {"margin": 0.8, "acc": 60.0}),
               (("skin7", "deep-knn"), {"fold": 2, "acc": 50.0}))  # fmt: skip
    shown = readable(beside(had), "2")
    of_cell = shown[(shown["paper's data"] == "Skin-7") & (shown["method"] == "deep kNN, K_p = 5")]
    assert [text.split(" / ")[0] for text in of_cell["ours"]] == ["70.5 ± 0.7", "60.0 ± 0.0", "50.0 ± 0.0"]
    assert (of_cell["ours"].str.count("/") == 2).all()


def test_a_data_set_of_stand_ins_has_words_for_what_it_is():
    stand_ins = {name for names in published.STAND_INS.values() for name in names}
    assert stand_ins | {"sd198"} == set(published.CAVEATS)
    of_paper = set(cells()["dataset"])
    assert set(published.SAME_IMAGES) | set(published.NOT_TO_BE_HAD) == of_paper
