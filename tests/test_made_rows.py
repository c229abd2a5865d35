"""The committed rows are those of the runs and trials that data/results/make.py and trials.py name."""

import importlib.util
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


def script(name):
    spec = importlib.util.spec_from_file_location(f"results_{name}", FOLDER / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


make, trials = script("make"), script("trials")
STUDIES, FILES, SEARCHES = make.studies(), make.files(), trials.TRIALS


def committed(name):
    return pd.read_csv(FOLDER / f"{name}.csv")


def made(run):
    """A made-up result of a run."""
    return replace(result(run.method), run=run)


def differing(table, runs, make_rows=results.results_table):
    """What the settings of a table's rows and of the runs do not have in common, in any order."""
    expected = make_rows(map(made, runs))
    columns = [*results.KEYS, *results.SETTINGS, "k_predict", "evaluate_on"]
    columns = [name for name in columns if name in table]  # old tables lack class_power
    both = [of[columns].astype(object).where(of[columns].notna(), "").values for of in (table, expected)]
    both = [sorted(str([v if type(v) is str else float(v) for v in row]) for row in rows) for rows in both]
    return [] if both[0] == both[1] and len(columns) > 15 else both


def test_every_table_is_made_by_one_of_the_scripts():
    named = {*(f"{name}.csv" for name in FILES), *(search["file"] for search in SEARCHES.values())}
    assert {path.name for path in FOLDER.glob("*.csv")} == named


@pytest.mark.parametrize("study", [name for name in STUDIES if f"{name}_runs" in FILES])
def test_committed_rows_have_the_settings_of_the_runs(study):
    assert not differing(committed(f"{study}_runs"), STUDIES[study], FILES[f"{study}_runs"][0])
    if f"{study}_history" in FILES:
        epochs = committed(f"{study}_history").groupby(["split", "method", "seed"])["epoch"].max().to_dict()
        runs = [run for run in STUDIES[study] if METHODS[run.method].loss not in (None, "nca", "lmnn")]
        assert not {(run.split, run.method, run.seed): run.epochs for run in runs}.items() - epochs.items()


def test_predictions_of_the_runs_on_a_gpu_give_their_scores_and_differences():
    told, found = committed("skin7_paper_predictions"), []
    arrays = {f"test_{name}s": told[name].values for name in ("group", "label")}
    arrays["test_ids"] = told["image"].values
    record = result("knn").record | {"class_names": list("abcdefg"), "smallest": 3}
    for run in STUDIES["skin7_paper"]:
        votes = {k: told[f"{run.method}:{k}"].values for k in METHODS[run.method].votes}
        logits = {"test_logits": np.eye(7)[votes.get(SOFTMAX, told["label"])], "train_labels": np.zeros(8011)}
        found.append(Result(run, arrays | logits, [], record, votes))
    assert [*results.predictions_table(found)] == [*told]
    for kind, columns in (("runs", ["acc", "mcr", "rs"]), ("differences", ["difference", "low", "high"])):
        table, wanted = FILES[f"skin7_paper_{kind}"][0](found), committed(f"skin7_paper_{kind}")
        assert list(table["method"]) == list(wanted["method"])
        np.testing.assert_allclose(table[columns], wanted[columns], rtol=1e-5, atol=1e-5)


@pytest.fixture
def trained(monkeypatch):
    """The runs that were asked for; on the lesions they are done at once, with made-up results."""
    runs, is_done = [], experiments.is_done

    def execute_all(wanted, **_):
        runs.extend(wanted)
        return [made(run) for run in wanted]

    monkeypatch.setattr(experiments, "execute_all", execute_all)
    monkeypatch.setattr(experiments, "is_done", lambda r: r in runs if r.dataset == "lesions" else is_done(r))
    return runs


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
    rows = pd.read_csv(tmp_path / "lesions_demo_runs.csv")
    assert not differing(rows, tiny) and rows["acc"].between(0, 100).all()
    with pytest.raises(SystemExit, match="2"):
        make.main(["--only", "skin8_demo"])
    assert "unknown study skin8_demo; choose of lesions_demo" in capsys.readouterr().err


def test_the_leak_is_what_images_of_the_own_lesion_are_worth():
    one, features = result("knn"), np.eye(len(LABELS), dtype=np.float32)  # near: only the own lesion's image
    arrays = one.arrays | dict.fromkeys(("train_features", "test_features"), features)
    arrays |= dict.fromkeys(("train_groups", "test_groups"), np.arange(len(LABELS)))
    table = make.leak([replace(one, arrays=arrays, _predicted={})]).set_index(["k_predict", "score"])
    assert table.loc[1, "difference"]["MCR"] == pytest.approx(200 / 3)  # without it, all are called class 0
    assert table.loc[1, "difference"]["RS"] == 100 and table.loc[5, "difference"]["RS"] == 0


@pytest.mark.parametrize("profile", SEARCHES)
def test_recorded_trials_are_those_of_the_script_and_chose_the_settings(profile):
    table = committed(SEARCHES[profile]["file"].removesuffix(".csv")).query("method != 'ce-knn'")
    if len(set(table["backbone"])) == 3:  # the table of two searches
        table = table[(table["backbone"] == "resnet18") == profile.startswith("finetune")]
    seeds = {m: (0, 1, 2) if METHODS[m].on_features else (0,) for m in SEARCHES[profile]["trials"]}
    runs = [run for m in seeds for seed in seeds[m] for run in trials.trials("skin7", profile, m, seed=seed)]
    if profile == "earlier":  # its table gives K and M to triplet too
        table = table.drop(columns=["k", "m"])
    else:  # a soft margin has no margin, and the first rows give it one
        table = table.assign(margin=table["margin"].mask(table["soft"].eq(True)))
    assert not differing(table, runs)
    assert {(run.split, run.evaluate_on) for run in runs} == {("grouped", "validation")}
    chosen = trials.best(table) if profile in PROFILES else table[:0]  # the first search chose nothing
    counts = {m: len(tried) for m, tried in SEARCHES[profile]["trials"].items()}
    assert profile not in PROFILES or min(counts.values()) >= counts["deep-knn"]  # no rival has fewer
    for row in chosen.to_dict("records"):
        run = make_run("lesions", row["method"], profile)
        given = {name: row[name] for name in trials.CHOSEN if name in row and pd.notna(row[name])}
        assert given == {name: getattr(run, name) for name in given}, row["method"]
    assert len(chosen) == len(seeds) * (profile in PROFILES)


def test_the_best_trial_has_the_highest_mean_of_acc_and_mcr_of_its_own_vote():
    def row(method, acc, mcr, lr, **changes):
        return result_row("skin7", method, acc=acc, mcr=mcr, lr=lr, **{"evaluate_on": "validation"} | changes)

    rows = [row("triplet", 70.0, 40.0, 0.1), row("triplet", 66.0, 46.0, 0.2), row("triplet", 61.0, 50.0, 0.3)]
    rows += [row("triplet", 90.0, 90.0, 0.4, collapsed=True), row("triplet", 95.0, 95.0, 0.5, k_predict=1)]
    rows += [row("triplet", 99.0, 99.0, 0.6, evaluate_on="test"), row("mlp-ce", 70.0, 70.0, 0.1, k_predict=5)]
    rows += [row("mlp-ce", 60.0, 60.0, 0.2, k_predict=0), row("deep-knn", 60.0, 60.0, 0.1, collapsed=True)]
    both = pd.concat([pd.DataFrame(rows), pd.DataFrame(rows).assign(dataset="lesions")])
    assert trials.best(both)["lr"].tolist() == [0.2, 0.2, 0.2, 0.2]  # deep kNN's one trial collapsed


def test_the_trials_command_adds_to_its_table(trained, monkeypatch, tmp_path, capsys):
    tried = {"triplet": [{"lr": 0.05, "soft": True, "warmup": 1}]}  # it has two votes
    tried |= {"weighted-ce": [{"lr": 0.02}, {"lr": 0.05}]}
    monkeypatch.setitem(SEARCHES, "smoke", {"all": {"epochs": 1}, "trials": tried})
    command, tables = ["--dataset", "lesions", "--profile", "smoke", "--out", str(tmp_path / "rows.csv")], []
    for methods in (["--methods", "weighted-ce"], [], []):
        assert trials.main([*command, *methods]) == 0
        tables.append(pd.read_csv(tmp_path / "rows.csv"))
    assert [len(table) for table in tables] == [2, 4, 4] and tables[1].equals(tables[2])
    with pytest.raises(SystemExit, match="2"):
        trials.main([*command, "--methods", "svm"])
    assert "no trials for 'svm' in profile 'smoke'; methods that have: triplet" in capsys.readouterr().err
