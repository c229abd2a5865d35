"""The committed rows are those of the runs and trials that data/results/make.py and trials.py name."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import LABELS, result, result_row

from deepknn_lib.study import experiments, results
from deepknn_lib.study.experiments import Result
from deepknn_lib.study.runs import METHODS, PROFILES, SOFTMAX, grid, make_run

FOLDER = Path(__file__).resolve().parent.parent / "data" / "results"
sys.path.append(str(FOLDER))
make, trials = map(importlib.import_module, ("make", "trials"))
STUDIES, FILES, SEARCHES = make.studies(), make.files(), trials.TRIALS


def committed(name):
    return pd.read_csv(FOLDER / f"{name}.csv")


def made(runs):
    """Made-up results of these runs."""
    return [replace(result(run.method), run=run) for run in runs]


def assert_settings(table, rows):
    """The settings of a table, some of which old tables lack, are those of rows that are made now, in any order."""
    columns = [n for n in (*results.KEYS, *results.SETTINGS, "k_predict", "evaluate_on") if n in table]
    both = []
    for of in (table[columns], rows[columns]):
        values = of.astype(object).where(of.notna(), "").values
        both.append(sorted(str([v if type(v) is str else float(v) for v in row]) for row in values))
    assert both[0] == both[1] and len(columns) > 15


def test_every_table_is_made_by_one_of_the_scripts():
    named = {*(f"{name}.csv" for name in FILES), *(search["file"] for search in SEARCHES.values())}
    assert {path.name for path in FOLDER.glob("*.csv")} == named


@pytest.mark.parametrize("study", [name for name in STUDIES if f"{name}_runs" in FILES])
def test_committed_rows_have_the_settings_of_the_runs(study):
    assert_settings(committed(f"{study}_runs"), FILES[f"{study}_runs"][0](made(STUDIES[study])))
    if f"{study}_history" in FILES:
        epochs = committed(f"{study}_history").groupby(["split", "method", "seed"])["epoch"].max().to_dict()
        runs = [run for run in STUDIES[study] if METHODS[run.method].loss not in (None, "nca", "lmnn")]
        assert not {(run.split, run.method, run.seed): run.epochs for run in runs}.items() - epochs.items()


def test_predictions_of_the_runs_on_a_gpu_give_their_scores_and_differences():
    told, found = committed("skin7_paper_predictions"), []
    names = sorted({*told["label"]})
    numbers = told.map(lambda value: names.index(value) if value in names else value)
    arrays = {"test_groups": told["group"].values, "test_labels": numbers["label"].values}
    arrays |= {"test_ids": told["image"].values, "train_labels": np.zeros(8011)}
    record = result("knn").record | {"class_names": names, "smallest": names.index("df")}
    for run in STUDIES["skin7_paper"]:
        votes = {k: numbers[f"{run.method}:{k}"].values for k in METHODS[run.method].votes}
        logits = {"test_logits": np.eye(7)[votes.get(SOFTMAX, numbers["label"]).astype(int)]}
        found.append(Result(run, arrays | logits, [], record, votes))
    assert results.predictions_table(found).equals(told)
    for kind, columns in (("runs", ["acc", "mcr", "rs"]), ("differences", ["difference", "low", "high"])):
        table, wanted = FILES[f"skin7_paper_{kind}"][0](found), committed(f"skin7_paper_{kind}")
        assert list(table["method"]) == list(wanted["method"])
        np.testing.assert_allclose(table[columns], wanted[columns], rtol=1e-5, atol=1e-5)


@pytest.fixture
def trained(monkeypatch):
    """On the lesions, runs that were asked for are done at once, with made-up results."""
    done, is_done = set(), make.is_done
    monkeypatch.setattr(experiments, "execute_all", lambda runs, **_: done.update(runs) or made(runs))
    monkeypatch.setattr(make, "is_done", lambda r: r in done if r.dataset == "lesions" else is_done(r))


def test_a_study_is_made_and_one_without_its_data_is_named(trained, monkeypatch, tmp_path, capsys):
    tiny = grid("lesions", "smoke", ("knn", "weighted-ce", "deep-knn"), ("grouped",), (0,))
    known = {"lesions_demo": tiny, "sd198_demo": grid("sd198", "smoke", ("knn",), seeds=(0,)), "datasets": []}
    monkeypatch.setattr(make, "studies", lambda: known)
    assert make.main(["--out", str(tmp_path)]) == 0 and not list(tmp_path.iterdir())
    assert "lesions_demo: left as it is, 3 of its 3 runs are missing" in capsys.readouterr().err
    assert make.main(["--train", "--out", str(tmp_path)]) == 0
    assert "sd198_demo: left as it is. sd198 is not in" in capsys.readouterr().err
    names = ["lesions_demo_differences", "lesions_demo_history", "lesions_demo_runs", "lesions_evidence"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    assert_settings(pd.read_csv(tmp_path / "lesions_demo_runs.csv"), results.results_table(made(tiny)))


def test_the_leak_is_what_images_of_the_own_lesion_are_worth():
    one, features = result("knn"), np.eye(len(LABELS), dtype=np.float32)  # near: only the own lesion's image
    arrays = one.arrays | dict.fromkeys(("train_features", "test_features"), features)
    arrays |= dict.fromkeys(("train_groups", "test_groups"), np.arange(len(LABELS)))
    table = make.leak([replace(one, arrays=arrays, _predicted={})]).set_index(["k_predict", "score"])
    assert table.loc[1, "difference"]["MCR"] == pytest.approx(200 / 3)  # without it, all are called class 0
    assert table.loc[1, "difference"]["RS"] == 100 and table.loc[5, "difference"]["RS"] == 0


@pytest.mark.parametrize("profile", SEARCHES)
def test_recorded_trials_are_those_of_the_script_and_chose_the_settings(profile):
    table, tried = pd.read_csv(FOLDER / SEARCHES[profile]["file"]), SEARCHES[profile]["trials"]
    table = table.query("method != 'ce-knn'")
    if len(set(table["backbone"])) == 3:  # the table of two searches
        table = table[(table["backbone"] == "resnet18") == profile.startswith("finetune")]
    seeds = {m: (0, 1, 2) if METHODS[m].on_features else (0,) for m in tried}
    runs = [run for m in seeds for seed in seeds[m] for run in trials.trials("skin7", profile, m, seed=seed)]
    if profile == "earlier":  # its table gives K and M to triplet too
        table = table.drop(columns=["k", "m"])
    else:  # a soft margin has no margin, and the first rows give it one
        table = table.assign(margin=table["margin"].mask(table["soft"].eq(True)))
    assert_settings(table, results.results_table(made(runs)))
    assert {(run.split, run.evaluate_on) for run in runs} == {("grouped", "validation")}
    if profile not in PROFILES:  # the first search chose nothing
        return
    rivals = [tried[method] for method in tried if METHODS[method].loss]
    assert min(map(len, rivals)) >= len(tried["deep-knn"])  # no rival has fewer
    chosen = trials.best(table).to_dict("records")
    for row in chosen:
        run = make_run("lesions", row["method"], profile)
        given = {name: row[name] for name in trials.CHOSEN if name in row and pd.notna(row[name])}
        assert given == {name: getattr(run, name) for name in given}, row["method"]
    assert len(chosen) == len(seeds)


def test_the_best_trial_has_the_highest_mean_of_acc_and_mcr_of_its_own_vote():
    tried = [
        ("triplet", {"acc": 70.0, "mcr": 40.0, "lr": 0.1}), ("triplet", {"acc": 66.0, "mcr": 46.0, "lr": 0.2}),
        ("triplet", {"acc": 95.0, "lr": 0.3, "collapsed": True}), ("triplet", {"acc": 95.0, "lr": 0.4, "k_predict": 1}),
        ("triplet", {"acc": 95.0, "lr": 0.5, "evaluate_on": "test"}), ("deep-knn", {"collapsed": True}),
        ("mlp-ce", {"acc": 90.0, "lr": 0.1, "k_predict": 5}), ("mlp-ce", {"acc": 60.0, "lr": 0.2, "k_predict": 0}),
    ]  # fmt: skip
    every = [(name, *one) for name in ("skin7", "lesions") for one in tried]
    rows = [result_row(name, m, **{"evaluate_on": "validation"} | row) for name, m, row in every]
    assert trials.best(pd.DataFrame(rows))["lr"].tolist() == [0.2] * 4


def test_the_trials_command_adds_to_its_table(trained, monkeypatch, tmp_path):
    tried = {"triplet": [{"lr": 0.05, "soft": True, "warmup": 1}]}  # it has two votes
    tried |= {"weighted-ce": [{"lr": 0.02}, {"lr": 0.05}]}
    monkeypatch.setitem(trials.TRIALS, "smoke", {"all": {"epochs": 1}, "trials": tried})
    out, tables = tmp_path / "rows.csv", []
    for methods in (["--methods", "weighted-ce"], [], []):
        assert trials.main(["--dataset", "lesions", "--profile", "smoke", "--out", str(out), *methods]) == 0
        tables.append(pd.read_csv(out))
    assert [len(table) for table in tables] == [2, 4, 4] and tables[1].equals(tables[2])
