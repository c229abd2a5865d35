"""The numbers of README and docs/RESULTS.md are those of the committed rows, and the code in README runs."""

import json
import re

import pandas as pd
import pytest
from sets import class_folders
from test_repository import ROOT, commands

from deepknn_lib import cli
from deepknn_lib.study import claims, results
from deepknn_lib.study.runs import METHODS, SOFTMAX

FOLDER = ROOT / "data" / "results"
README, RESULTS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/RESULTS.md"))
SKIN7 = [("skin7", "paper"), ("skin7", "grouped")]
OTHERS = [("chestxray3", "paper"), ("chestxray3", "grouped"), ("sd198", "paper")]
ACC_MCR, ALL = ("acc", "mcr"), ("acc", "mcr", "rs")
DIFFERENCE = ["difference", "low", "high"]


def rows(*names: str, query: str = "seed >= 0") -> pd.DataFrame:
    tables = [pd.read_csv(FOLDER / f"{name}_runs.csv").fillna({"weights": "none"}) for name in names]
    return pd.concat(tables).query(query)


def cells(row, scores=ACC_MCR, between=" / ") -> str:
    return between.join(f"{row[score]:.1f}" for score in scores)


def of_methods(names, columns, scores):
    """Lines of a table with a method each, and a data set and split a column."""
    table = results.over_seeds(rows(*names, query=f"k_predict in (5, {SOFTMAX})"))
    shown = map(" / ".join, zip(*(results.with_sd(table, score) for score in scores), strict=True))
    keys = table[["dataset", "split", "method", "k_predict"]].values
    found = dict(zip(map(tuple, keys), shown, strict=True))
    assert len(found) == len(table)
    votes = [(method, k) for method in METHODS for k in (SOFTMAX, 5) if (*columns[-1], method, k) in found]
    lines = [[found.pop((*column, *vote), "not run") for column in columns] for vote in votes]
    assert not found  # Each row has its place.
    return [[results.method_title(*vote), *line] for vote, line in zip(votes, lines, strict=True)]


def of_the_ladder():
    words = {"image_size": (64, "{:g} pixels"), "epochs": (8, "{:g} epochs"), "margin": (0.5, "α = {:g}")}
    words |= {"backbone": ("resnet18", "ResNet-50"), "weights": ("pqf", "no pretrained weights")}
    words |= {"split": ("paper", "split by lesion")}
    query = "method == 'deep-knn' and seed == 0 and k_predict == 5"
    for row in rows("skin7_ladder", query=query).to_dict("records"):
        changed = [text.format(row[name]) for name, (start, text) in words.items() if row[name] != start]
        nothing = "nothing: ResNet-18, 64 pixels, 8 epochs, α = 0.5, by image"
        yield [" and ".join(changed) or nothing, cells(row, ALL, " | ")]


def of_every_rival():
    table = rows("skin7_128", query=f"seed == 0 and k_predict in (5, {SOFTMAX})")
    for _, own in table.groupby(["method", "k_predict"]):
        found = [own[own["split"] == split] for split in ("grouped", "paper", "dermamnist-c")]
        yield ["", *("".join(cells(row, ALL) for _, row in part.iterrows()) for part in found)]
    fitted = pd.read_csv(FOLDER / "skin7_logistic.csv").drop_duplicates("split")
    yield ["logistic regression, pretrained features", *(cells(row, ALL) for _, row in fitted.iterrows())]


def of_the_run_on_a_gpu():
    table = rows("skin7_paper").to_dict("records")
    titles = [results.method_title(row["method"], row["k_predict"]) for row in table]
    yield from zip(titles, (cells(row, (*ALL, "recall_vasc"), " | ") for row in table), strict=True)
    gaps = pd.read_csv(FOLDER / "skin7_paper_differences.csv")
    for (method, minus), gap in gaps.groupby(["method", "minus"], sort=False):
        points = ("{} [{}, {}]".format(*rounded(row)) for row in gap[DIFFERENCE].values)
        yield [f"{METHODS[method].title} − {METHODS[minus].title}", *points]


def rounded(values):
    return tuple(f"{value + 0:.1f}".replace("-", "−") for value in values)


def of_frozen_features():
    names = ("skin7_table3", "sd198_pretrained", "chestxray3_pretrained")
    for row in rows(*names, query="method == 'knn' and seed == 0").to_dict("records"):
        group = "patient" if row["dataset"] == "chestxray3" else "lesion"
        split = "by image" if row["split"] == "paper" else f"by {group}"
        yield [row["dataset"], str(row["k_predict"]), split, cells(row, between=" | ")]


def of_k_m_and_search():
    deep = rows("skin7_sweeps", query="method == 'deep-knn'")
    for k in (3, 5, 7):
        means = [deep.query(f"k == k_predict == {k} and m == {m}").mean(numeric_only=True) for m in (1, 5, 9)]
        yield [str(k), *map(cells, means)]
    votes = deep.query("k == m == 5").groupby("k_predict")[["acc", "mcr"]].mean()
    yield ["Acc / MCR", *(cells(row) for _, row in votes.iterrows())]
    parts = {
        "ResNet-18 with ImageNet weights": [rows("skin7_search"), rows("skin7_64", query="method == 'knn'")]
    }
    for words, tables in (
        parts | {"small network from scratch": [rows("skin7_demo", "skin7_sweeps")]}
    ).items():
        found = pd.concat(tables).query("split == 'grouped' and k_predict == 5 and seed < 2")
        found = found.query("method != 'deep-knn' or k == m == 5").groupby("method")[["acc", "mcr"]].mean()
        yield [words, *(cells(found.loc[method]) for method in ("knn", "deep-knn", "deep-knn-global"))]


def of_commits():
    for path in FOLDER.glob("*_runs.csv"):
        yield [f"`{path.name}`", ", ".join(sorted(set(pd.read_csv(path)["commit"].astype(str))))]


def of_verdicts():
    found = claims.verdicts(pd.read_csv(FOLDER / "skin7_evidence.csv"))
    words = found.pivot(index="claim", columns="split", values="verdict")
    for claim, text in results.paper("claims").itertuples(index=False):
        yield [claim, text, words.loc[claim, "paper"], words.loc[claim, "grouped"]]


DEMO = ["skin7_demo", "chestxray3_demo", "sd198_demo"]


@pytest.mark.parametrize("make, arguments, least", [
    (of_methods, (["skin7_table3"], SKIN7, ALL), 7),
    (of_methods, (DEMO, SKIN7 + OTHERS, ACC_MCR), 7), (of_the_ladder, (), 10), (of_frozen_features, (), 10),
    (of_methods, (["skin7_64"], SKIN7, ALL), 7), (of_methods, (["sd198_128"], OTHERS[2:], ACC_MCR), 4),
    (of_methods, (["chestxray3_128"], OTHERS[1:2], ACC_MCR), 4), (of_methods, (["skin7_160"], SKIN7[:1], ALL), 4),
    (of_methods, (["skin7_128_cpu"], SKIN7, ALL), 5), (of_k_m_and_search, (), 6), (of_every_rival, (), 13),
    (of_the_run_on_a_gpu, (), 13 + 7), (of_commits, (), 15), (of_verdicts, (), 10),
])  # fmt: skip
def test_tables_are_those_of_the_committed_rows(make, arguments, least):
    lines = [f"| {' | '.join(parts)} |".removeprefix("|  ") for parts in make(*arguments)]
    assert len(lines) >= least and not [line for line in lines if line not in RESULTS]


def test_counts_of_comparisons_in_readme_are_those_of_the_verdicts():
    names = ("skin7", "skin7_64", "chestxray3", "chestxray3_128")
    found = [pd.read_csv(FOLDER / f"{name}_evidence.csv") for name in names]
    known = "; ".join(pd.concat(map(claims.verdicts, found))[["verdict", "why"]].values.ravel())
    said = re.findall(r"(?:holds in part|contradicted) \(\d+ of \d+\)|\d+ of \d+ comparisons hold", README)
    assert len(said) >= 8 and not [words for words in said if words not in known]


def test_intervals_are_those_of_the_committed_differences():
    paths = [*FOLDER.glob("*_differences.csv"), FOLDER / "skin7_leak.csv", FOLDER / "skin7_logistic.csv"]
    known = {rounded(row) for row in pd.concat(map(pd.read_csv, paths))[DIFFERENCE].values}
    number = r"([−+]?\d+(?:\.\d+)?)"
    for text, least in ((README, 8), (RESULTS, 41)):
        said = re.findall(rf"{number}[^\[\d]{{0,40}}\s\[{number}, {number}\]", text)
        assert len(said) == len(re.findall(r"\[[−+]?\d+\.\d, ", text)) >= least
        assert not {tuple(value.replace("+", "") for value in triple) for triple in said} - known


def test_pairs_of_acc_and_mcr_are_of_some_rows_or_of_the_paper():
    each = [rows(path.stem.removesuffix("_runs")) for path in FOLDER.glob("*_runs.csv")]
    tables = [*each, *map(results.over_seeds, each), results.over_seeds(pd.concat(each).query("seed < 2"))]
    tables += [results.paper("table2"), results.paper("table3"), pd.read_csv(FOLDER / "skin7_logistic.csv")]
    known = {cells(row) for table in tables for row in table.to_dict("records")}
    text = "\n".join(line for line in (README + RESULTS).splitlines() if "±" not in line)
    said = re.findall(r"(\d+\.\d / \d+\.\d)(?: / \d+\.\d)?", text)
    assert len(said) >= 25 and not set(said) - known
    acc = results.paper("table3").set_index("method")["acc"]
    ahead = [f"{acc['mlp-deep-knn'] - acc[rival]:.1f}" for rival in ("lmnn", "mlp-ce")]
    assert re.search("{} points of Acc ahead of LMNN .* and {} ahead of MLP".format(*ahead), RESULTS)


def test_reading_path_names_every_notebook_with_its_minutes():
    taught = (ROOT / "docs" / "TEACHING.md").read_text(encoding="utf-8")
    taught = re.search(r"^\| minutes, profile `demo` \| (.*) \|$", taught, re.M)[1].split(" | ")
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        minutes = json.loads(path.read_text(encoding="utf-8"))["metadata"]["deepknn"]["minutes"]["demo"]
        assert taught[int(path.name[:2])] == str(minutes)
        said = "< 1" if minutes < 0.75 else f"{minutes:.0f}"
        assert re.search(rf"^\| \[{path.name[:2]}\]\(notebooks/{path.name}\) \|.*\| {said} \|$", README, re.M)


def test_python_blocks_run():
    exec("".join(re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)), names := {})
    assert names["predicted"].shape == names["labels"].shape and names["features"].grad.isfinite().all()
    assert (names["kinds_again"] == names["kinds"]).mean() > 0.9 and names["embedding"].shape == (569, 128)


def test_command_for_ones_own_images_runs(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "path/to/my_images", range(12))
    monkeypatch.chdir(tmp_path)
    lines = map(str.split, commands(ROOT / "README.md"))
    (arguments,) = [words[3:] for words in lines if words[2:4] == ["deepknn_lib", "run"]]
    assert cli.main([*arguments, "--profile", "smoke", "--device", "cpu"]) == 0
    assert (tmp_path / arguments[arguments.index("--out") + 1] / "model.safetensors").is_file()
    assert '"k_predict": 5' in capsys.readouterr().out.splitlines()[-1]
