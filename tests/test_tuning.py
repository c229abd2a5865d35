"""The trials behind the settings: as many for every method, on validation images only, and how one is chosen."""

from dataclasses import fields

import pandas as pd
import pytest

from deepknn_lib import cli, experiments, tables, tuning
from deepknn_lib.runs import METHODS, PROFILES, Run, make_run
from deepknn_lib.storage import repository
from deepknn_lib.training import Recipe
from deepknn_lib.tuning import N_TRIALS, TRIALS, best, trials

EVERY = [(profile, method) for profile in TRIALS for method in TRIALS[profile]]
each = pytest.mark.parametrize("profile, method", EVERY)


@each
def test_every_method_has_as_many_different_trials(profile, method):
    runs = trials("skin7", profile, method)
    assert len(runs) == len({run.key for run in runs}) == N_TRIALS
    tried = {name for trial in TRIALS[profile][method] for name in trial}
    assert tried <= {f.name for f in fields(Run)} - {"seed", "split", "fold", "epochs", "k_predict", "evaluate_on"}
    assert all("lr" in trial for trial in TRIALS[profile][method])  # else the one chosen before would be its default


@each
def test_test_images_and_shared_lesions_have_no_part_in_a_trial(profile, method):
    for run in trials("skin7", profile, method):
        for judged in (run, *([run.base] if run.base else [])):
            assert (judged.evaluate_on, judged.split, judged.seed) == ("validation", "grouped", 0)


@each
def test_a_trial_is_as_long_as_the_profiles_short_training_and_an_mlps_as_long_as_ever(profile, method):
    lengths = {(run.epochs, run.lr_decay_every) for run in trials("skin7", profile, method)}
    short, own = PROFILES[profile]["short"], PROFILES[profile]["all"] | PROFILES[profile][method]
    settings = own if METHODS[method].on_features else short
    assert lengths == {(settings["epochs"], settings["lr_decay_every"])}


@each
def test_trials_do_not_depend_on_what_an_earlier_search_chose(profile, method, monkeypatch):
    keys = [run.key for run in trials("skin7", profile, method)]
    chosen = {"lr": 7.0, "margin": 9.0, "sampling": "balanced", "normalize": "l2", "warmup": 3}
    chosen |= {"soft": True} if METHODS[method].loss == "triplet" else {}
    monkeypatch.setitem(PROFILES[profile], method, PROFILES[profile][method] | chosen)
    assert [run.key for run in trials("skin7", profile, method)] == keys


def test_the_rivals_remedies_are_tried():
    for method in ("triplet", "triplet-ft", "mlp-triplet"):
        runs = trials("skin7", "demo", method)
        for name, values in {"soft": {True, False}, "sampling": {"balanced", "proportional"}}.items():
            assert {getattr(run, name) for run in runs} == values
        assert {"none", "batch-l2"} <= {run.normalize for run in runs} and max(run.warmup for run in runs) > 0
    lrs = {run.lr for run in trials("skin7", "demo", "weighted-ce")}
    assert len(lrs) == 5  # and one of them with warm-up
    assert all(isinstance(run.recipe, Recipe) for profile, method in EVERY for run in trials("skin7", profile, method))


def test_changes_go_to_every_trial_and_its_base():
    runs = trials("skin7", "demo", "mlp-triplet", backbone="resnet50", weights="imagenet", seed=3)
    assert {(r.backbone, r.weights, r.seed) for run in runs for r in (run, run.base)} == {("resnet50", "imagenet", 3)}


@pytest.mark.parametrize("profile, method", [("demo", "knn"), ("demo", "svm"), ("fast", "triplet")])
def test_what_has_no_trials_is_named_with_what_has(profile, method):
    known = "triplet, triplet-ft, deep-knn" if profile == "demo" else "none"
    with pytest.raises(ValueError, match=f"no trials for '{method}' in profile '{profile}'; methods that have: {known}"):
        trials("skin7", profile, method)


# Choosing


@pytest.fixture
def trial_row(result_row):
    def make(method, acc, mcr, lr=0.1, **changes):
        return result_row("skin7", method, acc=acc, mcr=mcr, lr=lr, **({"evaluate_on": "validation"} | changes))

    return make


def test_the_best_has_the_highest_mean_of_acc_and_mcr_of_its_own_vote(trial_row):
    rows = pd.DataFrame([
        trial_row("triplet", 70.0, 40.0, lr=0.1),
        trial_row("triplet", 66.0, 46.0, lr=0.2),  # chosen: 56, against 55 and 55.5
        trial_row("triplet", 61.0, 50.0, lr=0.3),
        trial_row("triplet", 90.0, 90.0, lr=0.4, collapsed=True),  # called all images one class, say
        trial_row("triplet", 95.0, 95.0, lr=0.5, k_predict=1),  # another vote
        trial_row("triplet", 99.0, 99.0, lr=0.6, evaluate_on="test"),  # not to be looked at
        trial_row("weighted-ce", 50.0, 50.0, lr=0.1, k_predict=0),
        trial_row("weighted-ce", 60.0, 39.0, lr=0.2, k_predict=0),
        trial_row("mlp-ce", 70.0, 70.0, lr=0.1, k_predict=5),
        trial_row("mlp-ce", 60.0, 60.0, lr=0.2, k_predict=0),
    ])  # fmt: skip
    chosen = best(rows)
    assert dict(zip(chosen["method"], chosen["lr"], strict=True)) == {"triplet": 0.2, "weighted-ce": 0.1, "mlp-ce": 0.2}


def test_the_best_is_one_row_of_each_search_whatever_the_rows_are_called(trial_row):
    rows = pd.DataFrame([trial_row("triplet", 60.0, 40.0, lr=0.1), trial_row("triplet", 70.0, 50.0, lr=0.2),
                         trial_row("deep-knn", 50.0, 30.0, lr=0.3), trial_row("deep-knn", 40.0, 20.0, lr=0.4)])  # fmt: skip
    rows.index = [0, 1, 0, 1]  # as of two tables put together
    assert best(rows)["lr"].tolist() == [0.2, 0.3]
    other = rows.assign(dataset="lesions", acc=99.0, lr=rows["lr"] + 1)
    assert best(pd.concat([rows, other]))["lr"].tolist() == [0.2, 0.3, 1.2, 1.3]  # of another data set: another search


def test_a_method_all_of_whose_trials_collapsed_has_no_best(trial_row):
    rows = pd.DataFrame([trial_row("triplet", 60.0, 40.0, collapsed=True), trial_row("deep-knn", 50.0, 30.0)])
    assert best(rows)["method"].tolist() == ["deep-knn"]
    assert len(best(rows.iloc[:1])) == 0


# The command


def test_tune_writes_all_trials_down_and_adds_to_them(monkeypatch, tmp_path, capsys):
    tiny = {"triplet": [{"lr": 0.05, "soft": True, "warmup": 1}], "weighted-ce": [{"lr": 0.02}, {"lr": 0.05}]}
    monkeypatch.setattr(tuning, "TRIALS", {"smoke": tiny})
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: 1)  # starting workers would take longer than the trials
    out = tmp_path / "trials.csv"
    common = ["tune", "--profile", "smoke", "--device", "cpu", "--out", str(out)]
    assert cli.main([*common, "--methods", "weighted-ce"]) == 0
    first = pd.read_csv(out)
    assert first["lr"].tolist() == [0.02, 0.05] and (first["evaluate_on"] == "validation").all()
    said = capsys.readouterr().out
    assert said.startswith("| method | lr | margin | soft | warmup |") and said.count("\n") == 3
    assert cli.main(common) == 0  # all methods
    rows = pd.read_csv(out)
    assert len(rows) == 2 + 2  # triplet with two votes
    assert rows["method"].value_counts().to_dict() == {"triplet": 2, "weighted-ce": 2}
    pd.testing.assert_frame_equal(rows[rows["method"] == "weighted-ce"].reset_index()[list(first)][["lr", "acc", "mcr"]],
                                  first[["lr", "acc", "mcr"]])  # fmt: skip
    assert (rows.loc[rows["method"] == "triplet", "soft"].astype(str) == "True").all()
    before = out.read_text(encoding="utf-8")
    assert cli.main(common) == 0  # again: nothing new
    assert len(pd.read_csv(out)) == 4 and out.read_text(encoding="utf-8") == before


def test_tune_says_that_a_profile_has_no_trials(capsys, tmp_path):
    command = ["tune", "--profile", "paper", "--methods", "triplet", "--out", str(tmp_path / "rows.csv")]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.startswith("error: no trials for 'triplet' in profile 'paper'")
    assert cli.main([*command[:3], *command[5:]]) == 2
    assert "no trials in profile 'paper'; profiles that have: demo" in capsys.readouterr().err
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("profile", TRIALS)
def test_a_profile_has_the_settings_that_the_recorded_trials_chose(profile):
    rows = pd.read_csv(repository() / "data" / "results" / "skin7_tuning.csv")
    rows = rows[(rows["backbone"] == PROFILES["finetune"]["all"]["backbone"]) == (profile == "finetune")]
    assert set(rows["method"]) == set(tuning.TRIALS[profile]) and set(rows["evaluate_on"]) == {"validation"}
    settings = [name for name in tables.SETTINGS if name != "seed"]
    counts = rows.drop_duplicates(["method", *settings])["method"].value_counts()
    assert set(counts) == {tuning.N_TRIALS}
    for chosen in tuning.best(rows).to_dict("records"):
        run = make_run("lesions", chosen["method"], profile)
        for name in ("lr", "margin", "soft", "warmup", "normalize", "sampling"):
            assert pd.isna(chosen[name]) or chosen[name] == getattr(run, name), (chosen["method"], name)
