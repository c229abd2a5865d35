"""Runs: their keys, their cache, their grids; executing them; and the tables made of them."""

import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from deepknn_lib import cli, execution, experiments, tables
from deepknn_lib.runs import METHODS, PROFILES, Run, grid, make_run

TINY = {"epochs": 1, "image_size": 32, "lr": 0.05}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two seeds of three methods on the synthetic images, split by lesion."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DEEPKNN_DATA", str(tmp_path_factory.mktemp("runs")))
    runs = grid("lesions", "smoke", ("deep-knn", "weighted-ce", "ce-knn"), ("grouped",), (0, 1))
    made = experiments.execute_all(runs, "cpu")
    yield made
    patch.undo()


def test_the_key_ignores_only_what_does_not_change_the_training():
    run = make_run("lesions", "deep-knn")
    assert run.key == make_run("lesions", "deep-knn").key == replace(run, k_predict=1).key
    other = {
        "dataset": "skin7", "split": "grouped", "fold": 2, "backbone": "resnet18", "weights": "imagenet", "image_size": 64,
        "seed": 1, "k": 3, "m": 3, "margin": 0.3, "normalize": "l2", "epochs": 3, "batch_size": 32, "sampling": "random",
        "classes_per_batch": 4, "lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, "lr_decay_every": 7,
        "evaluate_on": "validation", "soft": True, "warmup": 1, "search_every": 9,
    }  # fmt: skip
    assert set(other) == {f.name for f in fields(Run)} - {"method", "k_predict", "base"}
    keys = {replace(run, **{name: value}).key for name, value in other.items()}
    assert len(keys) == len(other) and run.key not in keys


def test_keys_are_the_same_on_every_machine():
    assert Run().key == "lesions-deep-knn-paper-s0-786517dabec4"


def test_methods_share_what_they_can():
    ce = make_run("lesions", "weighted-ce")
    assert make_run("lesions", "ce-knn").key == ce.key
    assert make_run("lesions", "deep-knn-ft").base.key == ce.key
    assert make_run("lesions", "deep-knn-ft").key != make_run("lesions", "deep-knn").key
    assert replace(ce, k=7, m=2, margin=0.9).key == ce.key  # cross-entropy knows none of them


@pytest.mark.parametrize("wrong, said", [
    ({"method": "svm"}, "unknown method 'svm'"),
    ({"k_predict": 0}, "k_predict must be at least 1"),
    ({"evaluate_on": "train"}, "evaluate_on is"),
    ({"method": "deep-knn-ft"}, "needs a base run"),
])  # fmt: skip
def test_a_run_that_cannot_be_meant_is_an_error(wrong, said):
    with pytest.raises(ValueError, match=said):
        Run(**wrong)


def test_make_run_names_what_is_unknown():
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        make_run("lesions", "knn", "fast")
    with pytest.raises(ValueError, match="no field colour"):
        make_run("lesions", "knn", colour=3)


def test_the_grid_completes_one_seed_before_the_next():
    runs = grid("lesions", "demo")
    assert len(runs) == len(METHODS) * 2 * len(PROFILES["demo"]["seeds"])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_a_second_execute_reads_the_cache(monkeypatch):
    run = make_run("lesions", "knn", "smoke")
    first = experiments.execute(run, "cpu")
    monkeypatch.setattr(experiments, "carry_out", lambda *_: pytest.fail("trained again"))
    second = experiments.execute(replace(run, k_predict=1), "cpu")
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert len(first.predict(5)) == len(first.arrays["test_labels"])


def test_progress_says_trained_once_then_cached(monkeypatch, tmp_path):
    progress = tmp_path / "progress"
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(progress))
    runs = [make_run("lesions", "deep-knn", "smoke", seed=3, k_predict=k) for k in (1, 5)]
    experiments.execute_all(runs, "cpu")
    experiments.execute_all(runs, "cpu")
    events = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()]
    assert [e.get("status", "epoch") for e in events] == ["epoch", "trained", "cached"]
    assert "epoch 1/1" in events[0]["text"]


def test_nothing_is_left_behind_by_a_run_that_fails():
    run = make_run("lesions", "deep-knn", "smoke", batch_size=8)
    with pytest.raises(ValueError, match="raise batch_size"):
        experiments.execute(run, "cpu")
    assert not list((experiments.data_dir() / "runs").glob(f"*{run.key}*"))


def test_an_unknown_backbone_and_missing_weights_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown backbone 'resnet5000'"):
        experiments.execute(make_run("lesions", "knn", "smoke", backbone="resnet5000"), "cpu")
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="resnet18.safetensors.*there, or unset"):
        experiments.execute(make_run("lesions", "knn", "smoke", backbone="resnet18", weights="imagenet"), "cpu")


def test_local_weights_are_loaded_with_their_classifier_left_out(monkeypatch, tmp_path):
    import timm
    from safetensors.torch import save_file

    from deepknn_lib.models import build_network

    source = timm.create_model("resnet18", num_classes=11)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in source.state_dict().items()},
              tmp_path / "resnet18.safetensors")  # fmt: skip
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    network = build_network("resnet18", weights="imagenet", seed=9)
    loaded = network.backbone.conv1.weight
    assert loaded.dtype.is_floating_point and np.allclose(loaded.detach(), source.conv1.weight.detach(), atol=1e-3)


def test_validation_is_cut_from_the_training_part_and_shares_no_lesion():
    run = make_run("lesions", "knn", "smoke", split="grouped")
    test, validation = experiments.parts(run), experiments.parts(replace(run, evaluate_on="validation"))
    assert set(validation.test.ids) <= set(test.train.ids)
    assert set(validation.train.ids) == set(test.train.ids) - set(validation.test.ids)
    assert not set(validation.train.groups) & set(validation.test.groups)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        execution.pick_device("cuda")
    assert execution.pick_device("auto").type == "cpu"


def test_results_rows_carry_settings_scores_and_origin(results):
    rows = tables.results_table(results)
    assert len(rows) == 2 * (2 + 1 + 2)  # seeds × (two votes, softmax, two votes)
    by_hand = 100 * np.mean(results[0].predict(1) == results[0].arrays["test_labels"])
    assert rows.iloc[0]["acc"] == pytest.approx(by_hand)
    origin = ["dataset", "split", "fold", "seed", "device", "versions", "seconds"]
    assert rows[[*origin, "acc", "mcr", "rs"]].notna().all().all()
    assert rows.loc[rows["method"] == "weighted-ce", "margin"].isna().all()
    assert rows.loc[rows["method"] == "deep-knn", "margin"].notna().all()


def test_summary_holds_mean_sd_and_an_interval_around_them(results):
    table, rows = tables.summary(results), tables.results_table(results)
    own = rows[(rows["method"] == "deep-knn") & (rows["k_predict"] == 5)]
    row = table[(table["method"] == "deep-knn") & (table["k_predict"] == 5)].iloc[0]
    assert row["acc"] == pytest.approx(own["acc"].mean()) and row["acc_sd"] == pytest.approx(own["acc"].std())
    assert row["seeds"] == 2 and row["acc_low"] < row["acc"] < row["acc_high"]
    assert "±" in tables.readable(table).iloc[0]["Acc"]


def test_a_paired_difference_is_the_difference_of_the_means_and_0_against_itself(results):
    deep, ce, ce_knn = (tables.select(results, method=method) for method in ("deep-knn", "weighted-ce", "ce-knn"))
    itself = tables.paired(deep, deep)
    assert (itself[["difference", "low", "high"]] == 0).all().all()
    table = tables.summary(results).set_index(["method", "k_predict"])
    gap = tables.paired(deep, ce[::-1], 5, 0).set_index("score")  # matched by seed, in whatever order
    for score, name in tables.SCORES.items():
        expected = table.loc[("deep-knn", 5), score] - table.loc[("weighted-ce", 0), score]
        assert gap.loc[name, "difference"] == pytest.approx(expected)
    assert gap.loc["Acc", "low"] < gap.loc["Acc", "difference"] < gap.loc["Acc", "high"]
    pd.testing.assert_frame_equal(gap, tables.paired(deep, ce, 5, 0).set_index("score"))
    strict = tables.paired(deep, ce, 5, 0, level=0.995).set_index("score")
    assert strict.loc["Acc", "low"] < gap.loc["Acc", "low"] and strict.loc["Acc", "high"] > gap.loc["Acc", "high"]
    for first, second in ((deep, ce_knn[:-1]), (deep, ce_knn[:1] * 2), ([], [])):
        with pytest.raises(ValueError, match="same seeds"):
            tables.paired(first, second)
    moved = [replace(r, arrays=r.arrays | {"test_ids": r.arrays["test_ids"][::-1]}) for r in ce_knn]
    with pytest.raises(ValueError, match="not the same test images"):
        tables.paired(deep, moved)


def test_a_paired_interval_answers_for_the_seeds_too(results):
    first, second = tables.select(results, method="deep-knn")
    labels = first.arrays["test_labels"]
    alike = [replace(r, _predicted={5: labels, 1: (labels + 1) % 7}) for r in (first, second)]
    # the gain is 100 points with one seed and 0 with the other: no image tells, the seeds do
    apart = [replace(first, _predicted={5: labels}), replace(second, _predicted={5: (labels + 1) % 7})]
    gap = tables.paired(apart, alike, 5, 1).set_index("score").loc["Acc"]
    assert (gap["low"], gap["difference"], gap["high"]) == (0, 50, 100)


def test_the_paper_and_ours_stay_in_columns_of_their_own(results):
    published = tables.paper("table2").query("dataset == 'Skin-7' and backbone == 'resnet50'")
    side = tables.beside(published, tables.summary(results)).set_index("method")
    assert side.loc["deep kNN, K_p = 5", "paper"] == "89.1 / 78.9 / 77.3"
    assert side.loc["kNN, cross-entropy features, K_p = 5", "paper"] == "–"
    assert "±" in side.loc["deep kNN, K_p = 5", "ours, grouped split"]


def test_a_table_is_written_as_csv_and_markdown(own_folders):
    from deepknn_lib.storage import figures_dir

    text = tables.save_table(pd.DataFrame({"a|b": ["x|y"], "n": [1.25], "none": [np.nan]}), "t", "A caption")
    assert text == (figures_dir() / "tables" / "t.md").read_text(encoding="utf-8")
    assert text.startswith("**A caption**") and "| x\\|y | 1.2 | – |" in text
    assert pd.read_csv(figures_dir() / "tables" / "t.csv")["n"][0] == 1.25


def test_the_command_line_runs_and_ends_with_json(capsys, tmp_path):
    out = tmp_path / "out"
    code = cli.main(["run", "--method", "knn", "--profile", "smoke", "--device", "cpu", "--out", str(out)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and {row["k_predict"] for row in last["scores"]} == {1, 5}
    assert {p.name for p in out.iterdir()} == {"run.json", "history.csv", "features.npz", "model.safetensors"}
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["run"]["method"] == "knn"


def test_the_command_line_says_what_is_wrong_in_a_line(capsys):
    assert cli.main(["run", "--method", "knn", "--dataset", "skin8", "--profile", "smoke"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown data set 'skin8'") and said.count("\n") == 1


def test_grid_writes_rows(capsys, tmp_path):
    out = tmp_path / "rows.csv"
    arguments = ["grid", "--profile", "smoke", "--methods", "knn", "--seeds", "0", "--device", "cpu", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert len(pd.read_csv(out)) == 4  # two splits, two values of K_p
    assert "| grouped | kNN" in capsys.readouterr().out
