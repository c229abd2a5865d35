"""Figures and notebooks: what is drawn where, readable colours, what is written, and the words of a reader's images."""

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from made_up import result
from PIL import Image
from sets import class_folders

from deepknn_lib.storage import figures_dir, repository
from deepknn_lib.study import figures, notebook, results
from deepknn_lib.study.runs import METHODS

matplotlib.use("Agg")


def test_a_comparison_draws_each_mean_and_interval_in_its_methods_row():
    pairs = [(split, m, q) for split in ("paper", "grouped") for m, q in (("knn", 0.5), ("deep-knn", 0.8))]
    table = results.summary(result(m, s, split=split, quality=q) for split, m, q in pairs for s in (0, 1))
    table["split"] = table["split"].replace("grouped", "dermamnist-c")  # one of Skin-7 alone
    axes = figures.comparison(table).axes
    assert axes[0].get_yticklabels()[3].get_text() == "deep kNN, $K_p$ = 5"
    assert {*figures.COLORS} == {*METHODS} and len({*figures.COLORS.values()}) == len(METHODS)
    for axis, score in zip(axes, results.SCORES, strict=True):
        drawn = {(round(line.get_ydata()[0]), tuple(line.get_xdata())) for line in axis.lines}
        for number, row in enumerate(table.to_dict("records")):
            interval = row[f"{score}_low"], row[f"{score}_high"]
            assert {(number % 4, (row[score],)), (number % 4, interval)} <= drawn


def test_convergence_draws_the_mean_over_runs_with_its_range_and_leaves_out_what_was_not_measured():
    history = pd.DataFrame({"method": "deep-knn", "epoch": [1, 2, 1, 2], "train_acc": [50.0, 60, 70, 100]})
    history["mean_pairwise_distance"] = np.nan
    figure = figures.convergence([("a", history, "train_acc"), ("b", history, "mean_pairwise_distance")])
    line, band = figure.axes[0].lines[0], figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert line.get_ydata().tolist() == [60, 80] and {50, 60, 70, 100} == set(band)
    assert not figure.axes[1].lines and figure.axes[0].get_ylabel() == "training accuracy, per cent"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["deep kNN"]


@pytest.fixture
def shown(monkeypatch):
    """What a notebook shows: texts, and the words of its pictures."""
    plt.close("all")
    items = []
    monkeypatch.setattr(notebook, "display", lambda one: items.append(getattr(one, "alt", None) or one.data))
    monkeypatch.setattr(notebook, "_session", notebook._session)
    return items


def test_a_shown_figure_is_kept_with_its_words_and_a_table_beside_it(shown):
    notebook.show_figure(plt.figure(), "f", "Title", "Caption.", "A line.")
    with Image.open(figures_dir() / "f.png") as image:
        words = {"Title": "Title", "Description": "Caption.", "Comment": "A line."}
        assert words.items() <= image.info.items()
    assert not plt.get_fignums() and (figures_dir() / "f.pdf").read_bytes().startswith(b"%PDF")
    notebook.show_table(pd.DataFrame({"n": [1], "seconds": [0.5]}), "t", "A table", pd.DataFrame({"n": [1]}))
    notebook.show_table(pd.DataFrame({"n": [1]}), "u", "This machine", folder="machine")
    written = (figures_dir() / "tables" / "t.md").read_text(encoding="utf-8")
    assert written == "**A table**\n\n| n |\n| ---: |\n| 1 |\n"
    assert shown[:3] == ["A line.", "**Title.** Caption.", written]
    files = {f"{path.parent.name}/{path.name}": path.read_text() for path in figures_dir().glob("*/*.csv")}
    only, both = "n\n1\n", "n,seconds\n1,0.5\n"
    assert files == {"tables/t.csv": only, "machine/t.csv": both, "machine/u.csv": only}


@pytest.mark.parametrize("grouped, split, word", [(0, "by image", "image"), (1, "by patient", "patient")])
def test_a_report_on_ones_own_images_has_their_words_and_no_other_set(shown, tmp_path, grouped, split, word):
    own = class_folders(tmp_path / "My set", groups=grouped)
    session = notebook.start("smoke", f"folder:{own}", device="cpu")
    figure, axis = plt.subplots()
    axis.set_title("split by lesion")
    title = f"UMAP of {session.dataset}"
    notebook.show_figure(figure, "f", title, "Whole lesions, `lesions`.", "Not a lesion.")
    notebook.show_figure(plt.figure(), "g", "Title", "Caption", "Alt", of="Skin-7")
    notebook.show_table(pd.DataFrame(), "g", "Title", of="Skin-7")
    for profile, of in (("smoke", "Skin-7"), ("demo", "Skin-7"), ("demo", "")):
        notebook._session = session._replace(profile=profile)
        notebook.answer("It is 3.", "t u", of=of)
    notebook.show_text("Skin-7 has lesions.\n\n**By lesion** is another.\n\n```\ndata = 'lesions'\n```")
    splits = ("paper", "grouped") if grouped else ("grouped",)  # Without groups the two are one.
    assert session.splits == splits
    assert axis.get_title() == f"split {split}" and not [*figures_dir().rglob("g.*")]
    assert shown == [
        f"> **{notebook.SMOKE}**",
        f"Not a{'' if grouped else 'n'} {word}.", f"**UMAP of My set.** Whole {word}s, `lesions`.",
        *["*Left out, for it shows Skin-7: Title.*"] * 2,
        "> No answer: one epoch of training is no result.",
        "> We answer this for Skin-7 only; the tables above have the numbers of your images.",
        "> It is 3.\n>\n> *Numbers from the tables `t`, `u`.*",
        f"Skin-7 has lesions.\n\n**{split.capitalize()}** is another.\n\n```\ndata = 'lesions'\n```",
    ]  # fmt: skip


def test_a_notebook_starts_with_what_was_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("DEEPKNN_PROFILE", "smoke")
    assert notebook.start(device="cpu")[:4] == ("smoke", "lesions", (0,), "cpu")
    assert "profile smoke, data set lesions, seeds 0, device cpu\npython 3" in capsys.readouterr().out
    assert notebook.start("demo", seeds="5,7", device="cpu").seeds == (5, 7)


def code_of(notebook):
    cells = nbformat.read(repository() / "notebooks" / f"{notebook}.ipynb", 4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_features_in_one_point_are_told_from_a_spread_whatever_their_scale(scale):
    exec(next(cell for cell in code_of("06_embeddings") if "def in_one_point" in cell), book := {"np": np})
    rng = np.random.default_rng(0)
    point = scale * rng.normal(size=8).astype(np.float32) + np.zeros((60, 1), np.float32)
    jitter = 1e-6 * scale * rng.normal(size=(60, 8))
    few = np.where(np.arange(60)[:, None] < 20, rng.normal(size=(60, 8)) * scale, point)
    told = map(book["in_one_point"], (point + jitter, few, 0 * point, point + 1e3 * jitter))
    assert [*told] == [True, True, True, False]


@pytest.mark.parametrize("profile", ["demo", "finetune", "paper"])
def test_notebook_04_shows_the_trials_of_each_profile(shown, profile):
    imports, parameters, start, runs, *others = code_of("04_train_and_compare")
    at = next(n for n, source in enumerate(others) if source.startswith("RESULTS ="))
    names = {}
    for source in [imports, parameters, f"profile = {profile!r}", start, runs, *others[at : at + 2]]:
        exec(source, names)
    assert len(names["shown"]) >= 3 and names["shown"]["trials"].min() >= 3


def test_notebook_11_draws_both_intervals_and_the_papers_difference_in_the_line_of_its_comparison(shown):
    code = code_of("11_tables")
    end = next(n for n, source in enumerate(code) if source.startswith("def draw_forest"))
    exec("\n".join(code[: end + 1]), names := {})
    acc, mcr, _ = names["draw_forest"]().axes
    labels = [text.get_text() for text in acc.get_yticklabels()]
    at = acc.get_yticks()[labels.index("MLP + deep kNN − LMNN  (Skin-7, ResNet-50, 256 px)")]
    drawn = [[*line.get_xdata()] for line in acc.lines if abs(line.get_ydata()[0] - at) < 0.4]
    rows = pd.read_csv(repository() / "data" / "results" / "skin7_evidence.csv")
    rows = rows[(rows["comparison"] == "MLP + deep kNN − LMNN") & (rows["measure"] == "Acc")]
    ends = rows[["low", "high"]].values.tolist() + rows[["low_95", "high_95"]].values.tolist()
    assert all(pair in drawn for pair in [*ends, [3.24]]) and mcr.get_xlabel() == "difference, points"
    assert len({*zip(names["lines"]["claim"], labels, strict=True)}) == len(labels)
