"""Executing runs: once each, bases first, from a cache that knows its data, under faults; and the command line."""

import json
import os
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import digits, draw_classes, same, wait_for
from safetensors.torch import load_file, save_file

from deepknn_lib import cli
from deepknn_lib.models import build_network, extract_features
from deepknn_lib.storage import claim, whole_file
from deepknn_lib.study import experiments, results
from deepknn_lib.study.runs import METHODS, make_run

ROOT = Path(__file__).resolve().parent.parent


def texts(path):
    """What the library told whoever follows it."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data folder with two methods, the vote on one's features and one that starts from it; and what was told."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [digits(), *map(digits, ("deep-knn", "weighted-ce", "ce-knn", "deep-knn-ft"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKNN_DATA", str(folder))
        patch.setenv("DEEPKNN_PROGRESS", str(folder / "progress"))
        done = experiments.execute_all(runs, "cpu", 1)
    return folder, {result.run.method: result for result in done}, texts(folder / "progress")


@pytest.fixture
def again(made, data):
    """A copy of that data folder, as the data folder of a test."""
    shutil.copytree(made[0], data)
    return data, made[1]


# Executing


def test_each_training_is_carried_out_once_and_a_base_before_what_starts_from_it(made):
    folder, found, told = made
    begun = [text.split(": epoch 1/1, ")[0] for text in told]
    trained = [found[method].run.label for method in ("weighted-ce", "deep-knn", "deep-knn-ft")]
    assert sorted(begun) == sorted(trained) and begun[-1] == trained[-1]
    ce, votes, deep = (found[m].arrays["train_features"] for m in ("weighted-ce", "ce-knn", "deep-knn"))
    assert np.array_equal(ce, votes) and not np.array_equal(ce, deep)
    assert not list((folder / "runs").glob(".*.tmp*")) and not list((folder / "runs").glob("*.checkpoint*"))


def test_a_second_execute_reads_the_cache(again, monkeypatch, tmp_path):
    first = again[1]["deep-knn"]
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(tmp_path / "progress"))
    second = experiments.execute(replace(first.run, k_predict=1), "cpu")
    assert same(first, second) and second.history == first.history and not (tmp_path / "progress").exists()
    assert second.record == first.record and second.run.k_predict == 1
    assert [row["k_predict"] for row in first.record["scores"]] == [1, 5]
    right = (first.predict(5) == first.arrays["test_labels"]).mean()
    assert first.record["scores"][1]["acc"] == pytest.approx(100 * right)
    assert len([name for name in first.record["scores"][0] if name.startswith("recall_")]) == 10


def test_deep_knn_from_cross_entropy_starts_with_its_backbone_alone(again, monkeypatch):
    run, begun = again[1]["deep-knn-ft"].run, []
    trained, base = (load_file(experiments.folder_of(one) / "model.safetensors") for one in (run, run.base))
    monkeypatch.setattr(
        experiments, "fit", lambda network, *_, **__: begun.append(network.state_dict()) or []
    )
    experiments.execute(replace(run, lr=0.5), "cpu")
    backbone = {name for name in base if name.startswith("backbone.")}
    assert backbone == {name for name in begun[0] if name.startswith("backbone.")}
    assert all(torch.equal(begun[0][name], base[name]) for name in backbone)
    assert not [name for name in begun[0] if name.startswith("classifier.")]  # dropped, as in the paper
    assert not torch.equal(trained["backbone.conv1.0.weight"], base["backbone.conv1.0.weight"])


@pytest.mark.parametrize("what", ["pixels", "another folder", "groups", "weights"])
def test_other_data_under_the_same_name_are_another_run(data, tmp_path, monkeypatch, what):
    squares, weights = tmp_path / "squares", {"backbone": "resnet18", "weights": "imagenet"}
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))

    def put_weights(seed):
        state = build_network("resnet18", seed=seed).backbone.state_dict()
        save_file(state, tmp_path / "resnet18.safetensors")

    put_weights(0)
    given = weights if what == "weights" else {}
    run = make_run(draw_classes(squares), "knn", "smoke", split="grouped", **given)
    first = experiments.execute(run, "cpu")
    if what == "pixels":
        draw_classes(squares, seed=1, turned=1)
    elif what == "another folder":
        run = replace(run, dataset=draw_classes(tmp_path / "elsewhere" / "squares", seed=1))
    elif what == "groups":
        rows = [f"{c}/{n}.png,{c}{n // 2}" for c in "abc" for n in range(12)]
        (squares / "groups.csv").write_text("\n".join(["file,patient_id", *rows]))
    else:
        put_weights(1)
    second = experiments.execute(run, "cpu")
    assert second.record["data"] != first.record["data"]
    key = "test_groups" if what == "groups" else "test_features"
    assert not np.array_equal(first.arrays[key], second.arrays[key])
    network = build_network(run.backbone, seed=run.seed, weights=run.weights)
    direct = extract_features(network, torch.from_numpy(experiments.parts(run).test.images)).numpy()
    np.testing.assert_allclose(second.arrays["test_features"], direct, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("names, votes", [("ab", METHODS["mlp-ce"].votes), ("abc", (1, 5))])
def test_a_method_on_features_learns_from_those_of_its_base(data, tmp_path, names, votes):
    run = make_run(draw_classes(tmp_path / "set", names), "mlp-ce", "smoke", epochs=8, lr=0.05)
    result, base = experiments.execute_all([run, run.base], "cpu", 1)
    assert len(result.history) == 8 and result.record["class_names"] == [*names]
    assert result.arrays["test_logits"].shape == (len(base.arrays["test_labels"]), len(names))
    assert not np.array_equal(result.arrays["test_features"], base.arrays["test_features"])
    assert "classifier.weight" in load_file(experiments.folder_of(run) / "model.safetensors")
    assert all(result.scores(k_predict)["acc"] > 60 for k_predict in votes)


def test_a_collapsed_run_says_so_to_whoever_follows_it_and_not_in_a_cell(
    monkeypatch, data, tmp_path, recwarn
):
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(tmp_path / "progress"))
    said, run = "the embedding collapsed", digits("deep-knn")
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: warnings.warn(said, stacklevel=1) or [])
    experiments.execute(run, "cpu")
    assert texts(tmp_path / "progress") == [f"{run.label}: {said}"]
    assert not [one for one in recwarn if said in str(one.message)]


@pytest.mark.parametrize("changes, device, kind, said", [
    ({"method": "deep-knn", "batch_size": 8}, "cpu", ValueError, "raise batch_size"),
    ({"backbone": "resnet18", "weights": "imagenet"}, "cpu", FileNotFoundError, "resnet18.safetensors.*, or unset"),
    ({}, "cuda", ValueError, "no GPU"), ({"k_predict": 9999}, "cpu", ValueError, "only 1436 training images can vote"),
    ({"method": "weighted-ce", "lr": 1e30, "epochs": 3}, "cpu", FloatingPointError, "loss is nan"),
])  # fmt: skip
def test_nothing_is_left_behind_by_a_run_that_fails(monkeypatch, data, tmp_path, changes, device, kind, said):
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(kind, match=said):
        experiments.execute(digits(**changes), device)
    assert not list(data.glob("runs/[!.]*"))


def test_what_learns_on_features_says_that_it_did_so_on_the_cpu(data, monkeypatch):
    experiments.execute(digits(), "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert experiments.execute(digits("mlp-deep-knn"), "auto").record["device"].startswith("cpu")


def test_a_run_that_fails_leaves_the_others_going_and_is_named(data, tmp_path, capsys):
    wide = digits("weighted-ce", lr=1e30)
    runs = [wide, replace(digits("deep-knn-ft"), base=wide), digits()]
    with pytest.raises(FloatingPointError, match="loss is nan.*which it starts from, failed: .*loss is nan"):
        experiments.execute_all(runs, "cpu", 1)
    failed = {}
    done = experiments.execute_all(runs, "cpu", 1, failed=failed)
    assert [*failed] == runs[:2] and done[:2] == [None, None] and done[2].run == runs[2]
    out = tmp_path / "rows.csv"
    command = "grid --profile smoke --methods knn,weighted-ce --splits grouped --device cpu --seeds 0 --dataset digits"
    assert cli.main(f"{command} --lr 1e30 --jobs 1 --out {out}".split()) == 1
    assert "failed: weighted-ce · digits" in capsys.readouterr().err and len(pd.read_csv(out)) == 2


@pytest.mark.parametrize(
    "accuracy, learnt", [(None, True), (75.0, True), (61.5, True), (60.5, False), (20.0, False)]
)
def test_learnt_is_better_than_the_largest_class_which_has_60_of_100(accuracy, learnt):
    record = {"class_counts": {"train": [60, 30, 10]}}
    history = [{"train_acc": 90.0}, {"train_acc": accuracy}] if accuracy else []  # Nothing was trained.
    assert experiments.Result(make_run("lesions", "triplet"), {}, history, record).learnt == learnt


# Faults


def spoil(path, change):
    """Put in place what `change` makes of the arrays of an npz, or of the bytes of another file; None removes it."""
    if change is None:
        path.unlink()
    elif path.suffix == ".npz":
        with np.load(path) as stored:
            arrays = dict(stored)
        np.savez(path, **change(arrays))
    else:
        path.write_bytes(change(path.read_bytes()))


def reversed_rows(arrays):
    return arrays | {"train_features": arrays["train_features"][::-1]}


KNN, FROM_CE, CE = (f"runs/digits-{name}-*" for name in ("knn", "deep-knn-ft", "weighted-ce"))
# What is damaged and how; and a run that is gone besides, so that what is damaged is needed.
DAMAGES = {
    "half of run.json": (f"{KNN}/run.json", lambda text: text[: len(text) // 2], None),
    "no run.json": (f"{KNN}/run.json", None, None),
    "another smallest class": (f"{KNN}/run.json", lambda text: text.replace(b'"smallest": ', b'"smallest": 1'), None),
    "of an earlier version": (f"{KNN}/run.json", lambda text: text.replace(b'"checksums"', b'"sums"'), None),
    "rows reversed": (f"{KNN}/features.npz", reversed_rows, None),
    "no features.npz": (f"{KNN}/features.npz", None, None),
    "an edited history": (f"{KNN}/history.csv", lambda text: text + b"9\n", None),
    "a base": (f"{CE}/model.safetensors", lambda content: content[:-4] + b"0000", FROM_CE),
    "a checkpoint": ("runs/*.checkpoint.pt", lambda _: b"garbage", FROM_CE),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_named_set_aside_and_made_again(again, capsys, recwarn, damage):
    (data, found), (pattern, change, gone) = again, DAMAGES[damage]
    asked = [found["knn"].run, found["deep-knn-ft"].run]
    if damage == "a checkpoint":
        Path(f"{experiments.folder_of(asked[1])}.checkpoint.pt").touch()
    (path,) = data.glob(pattern)
    spoil(path, change)
    for folder in data.glob(gone) if gone else ():
        shutil.rmtree(folder) if folder.is_dir() else None
    made = experiments.execute_all(asked, "cpu", 1)
    named = path.parent if path.parent.parent == data / "runs" else path
    told = capsys.readouterr().err + "".join(str(one.message) for one in recwarn)
    assert f"{named} is not whole" in told
    assert len([*named.parent.glob(f".damaged-{named.name}-*")]) == 1
    for result in made:
        before = found[result.run.method]
        assert same(before, result) and result.record["smallest"] == before.record["smallest"]
        assert experiments.is_done(result.run)


def test_what_another_process_is_at_comes_last_and_is_not_done_twice(data, tmp_path):
    runs, done = [digits(seed=0), digits(seed=1)], []
    first, (one, other) = experiments.execute(runs[0], "cpu"), map(experiments.folder_of, runs)
    one.rename(tmp_path / "elsewhere")
    thread = threading.Thread(target=lambda: done.extend(experiments.execute_all(runs, "cpu", 1)))
    with claim(one):
        thread.start()
        wait_for(other.is_dir, 60)
        assert not one.exists() and not done
        (tmp_path / "elsewhere").rename(one)
    thread.join(60)
    assert [result.run for result in done] == runs and done[0].record == first.record


def test_what_killed_processes_left_is_swept(data):
    folder = experiments.folder_of(digits())
    old, new, own = (folder.with_name(f".{name}.{'0f' * 16}.tmp") for name in ("old", "new", folder.name))
    for left in (old, new, own):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    experiments.execute(digits(), "cpu")  # The claim on its own was free, so that its owner is gone.
    assert new.exists() and not old.exists() and not own.exists()


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672]"),
])  # fmt: skip
def test_a_full_disk_is_named_and_nothing_remains(tmp_path, error):
    with pytest.raises(OSError, match="cannot write to .*x.csv .*make room.*DEEPKNN_DATA"):
        with whole_file(tmp_path / "x.csv") as one, whole_file(tmp_path / "x.csv") as two:
            assert one != two and one.parent == two.parent
            one.touch()
            raise error
    assert not list(tmp_path.iterdir())


# The command line


def test_the_command_line_runs_and_ends_with_json(capsys, tmp_path):
    out = tmp_path / "out"
    assert cli.main(f"run --method knn --profile smoke --device cpu --normalize l2 --out {out}".split()) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["k_predict"] for row in last["scores"]} == {1, 5}
    assert {p.name for p in out.iterdir()} == {"run.json", "history.csv", "features.npz", "model.safetensors"}
    recorded = json.loads((out / "run.json").read_text(encoding="utf-8"))["run"]
    assert (recorded["method"], recorded["normalize"]) == ("knn", "l2")


@pytest.mark.parametrize("options, said", [
    ("run --method deep-knn --dataset skin8", "unknown data set 'skin8', did you mean skin7"),
    ("run --method deep-knn --dataset {}", "unknown data set '{}'; did you mean folder:{}?"),
    ("run --method deep-knn --epochs 0", "epochs must be at least 1"),
    ("run --method deep-knn --normalize l3", "unknown normalize 'l3'"),
    ("run --method deep-knn --k-predict 0", "k_predict must be at least 1"),
    ("run --method deep-nn", "unknown method 'deep-nn', did you mean deep-knn"),
    ("run --method knn --backbone resnet81", "unknown backbone 'resnet81'"),
    ("run --method knn --out {}/file/out", "cannot write to {}/file/out"),
    ("grid --epochs -3", "epochs must be at least 1, got -3"),
    ("grid --splits both", "unknown split 'both'"),
    ("grid --methods knn,typo", "unknown method 'typo'"),
    ("grid --profile smok", "unknown profile 'smok', did you mean smoke"),
    ("grid --jobs 0", "jobs must be at least 1"),
    ("grid --out {}", "{} is a folder; name a file"),
    ("grid --out {}/file/out.csv", "cannot write to {}/file/out.csv"),
    ("grid --device cuda", "device 'cuda' was asked for, but torch sees no GPU"),
    ("grid --cluster tcp://127.0.0.1:1", "no Dask scheduler with workers answers at tcp://127.0.0.1:1"),
    ("grid --seeds 0,x", "argument --seeds: '0,x': give whole numbers"),
    ("grid --methods ,", "argument --methods: it is empty"),
    ("WORLD_SIZE=2 grid", "torchrun or its like"),
])  # fmt: skip
def test_what_cannot_be_meant_is_said_in_a_line_before_anything_starts(
    capsys, monkeypatch, tmp_path, options, said
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(experiments, "_train", mock.Mock(side_effect=AssertionError))  # nothing may start
    (tmp_path / "file").touch()
    if options.startswith("WORLD_SIZE=2"):
        monkeypatch.setenv("WORLD_SIZE", "2")
    if "--cluster" in options:  # Dask tries again for as long as it may.
        from distributed import Client

        monkeypatch.setattr(
            "distributed.Client", lambda to, timeout, **other: Client(to, timeout="1s", **other)
        )
    words = options.removeprefix("WORLD_SIZE=2 ").format(tmp_path).split()
    try:
        status = cli.main([words[0], "--profile", "smoke", *words[1:]])
    except SystemExit as ended:  # argparse
        status = ended.code
    told = capsys.readouterr().err
    assert status == 2 and "error: " in told and "Traceback" not in told
    assert said.format(tmp_path, tmp_path) in told


GRID = "grid --profile smoke --methods knn,deep-knn --splits grouped --device cpu"


def test_grid_writes_rows_and_epochs(capsys, tmp_path):
    out, epochs, votes = (tmp_path / f"{name}.csv" for name in ("rows", "epochs", "votes"))
    files = f"--out {out} --history {epochs} --predictions {votes}"
    assert cli.main(f"{GRID} --seeds 0 --dataset digits {files}".split()) == 0
    told = pd.read_csv(votes)
    assert [*told][4:] == ["image", "group", "label", "knn:1", "knn:5", "deep-knn:1", "deep-knn:5"]
    accuracies = [100 * (told[name] == told["label"]).mean() for name in [*told][-4:]]
    assert accuracies == pytest.approx(pd.read_csv(out)["acc"].tolist(), abs=1e-3)
    assert len(pd.read_csv(out)) == 4 and len(pd.read_csv(epochs)) == 1  # two values of K_p each; one epoch
    assert "| grouped | kNN" in capsys.readouterr().out


def test_grid_goes_in_an_order_that_makes_every_run_count(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "execute_all", lambda runs, *_: asked.extend(runs) or [])
    monkeypatch.setattr(results, "readable", lambda table: table)
    assert cli.main(f"{GRID} --seeds 0,1 --dataset lesions,digits --sweeps".split()) == 0
    order = [(s, d, m) for s in (0, 1) for d in ("lesions", "digits") for m in ("knn", "deep-knn")]
    assert [(run.seed, run.dataset, run.method) for run in asked[:8]] == order
    searched, swept = asked[8:12], asked[12:]
    assert {run.method for run in searched} == {"deep-knn-global"} and {run.k for run in swept} == {3, 5, 7}
