"""Executing runs: once each, bases first, from a cache that knows its data; and the command line."""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deepknn_lib import cli
from deepknn_lib.models import build_network, extract_features
from deepknn_lib.study import experiments, results
from deepknn_lib.study.runs import METHODS, grid, make_run

COMPARED = ("deep-knn", "weighted-ce", "ce-knn", "deep-knn-ft")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two methods, the vote on one's features and one that starts from it, on the synthetic images, and the events."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKNN_DATA", str(folder))
        patch.setenv("DEEPKNN_PROGRESS", str(folder / "progress"))
        done = experiments.execute_all(grid("lesions", "smoke", COMPARED, ("grouped",), (0,)), "cpu")
    events = [json.loads(line) for line in (folder / "progress").read_text(encoding="utf-8").splitlines()]
    return folder, {result.run.method: result for result in done}, events


@pytest.fixture
def squares(tmp_path):
    """Makes a folder of three classes of small noisy images that differ in colour."""

    def draw(seed, path=tmp_path / "squares", turned=False):
        rng = np.random.default_rng(seed)
        for c, name in enumerate("abc"):
            (path / name).mkdir(parents=True, exist_ok=True)
            for number in range(12):
                pixels = rng.integers(0, 120, (24, 24, 3))
                pixels[..., (c + turned) % 3] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{number}.png")
        return f"folder:{path}"

    return draw


def test_each_training_is_carried_out_once_and_a_base_before_what_starts_from_it(made):
    folder, found, events = made
    trained = [event["label"] for event in events if event.get("status") == "trained"]
    runs = {method: found[method].run for method in ("deep-knn", "weighted-ce", "deep-knn-ft")}
    assert Counter(trained) == Counter(run.label for run in runs.values())
    assert trained.index(runs["weighted-ce"].label) < trained.index(runs["deep-knn-ft"].label)
    assert sum(event["event"] == "epoch" for event in events) == 3
    ce, votes, deep = (found[m].arrays["train_features"] for m in ("weighted-ce", "ce-knn", "deep-knn"))
    assert np.array_equal(ce, votes) and not np.array_equal(ce, deep)
    assert not list((folder / "runs").glob(".*.tmp*")) and not list((folder / "runs").glob("*.checkpoint*"))


def test_a_second_execute_reads_the_cache(made, monkeypatch):
    folder, found, _ = made
    monkeypatch.setenv("DEEPKNN_DATA", str(folder))
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(folder / "again"))
    first = found["deep-knn"]
    second = experiments.execute(replace(first.run, k_predict=1), "cpu")
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    told = json.loads((folder / "again").read_text())
    assert told == {"event": "run", "status": "cached", "label": first.run.label}
    assert second.history == first.history and second.record["data"] == experiments.data_digest(first.run)


def test_deep_knn_from_cross_entropy_starts_with_its_backbone_alone(made, monkeypatch):
    folder, found, _ = made
    monkeypatch.setenv("DEEPKNN_DATA", str(folder))
    run, seen = found["deep-knn-ft"].run, []
    monkeypatch.setattr(experiments, "fit", lambda network, *_, **__: seen.append(network.state_dict()) or [])
    experiments._on_images(run, experiments.folder_of(run.base), None, torch.device("cpu"))
    base = load_file(experiments.folder_of(run.base) / "model.safetensors")
    backbone = {name for name in base if name.startswith("backbone.")}
    assert backbone == {name for name in seen[0] if name.startswith("backbone.")}
    assert all(torch.equal(seen[0][name], base[name]) for name in backbone)
    assert not [name for name in seen[0] if name.startswith("classifier.")]  # dropped, as in the paper
    trained = load_file(experiments.folder_of(run) / "model.safetensors")
    assert not torch.equal(trained["backbone.conv1.0.weight"], base["backbone.conv1.0.weight"])


@pytest.mark.parametrize("what", ["pixels", "another folder", "groups", "weights"])
def test_other_data_under_the_same_name_are_another_run(squares, tmp_path, monkeypatch, what):
    name, weights = squares(0), {"backbone": "resnet18", "weights": "imagenet"} if what == "weights" else {}
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))

    def put_weights(seed):
        state = build_network("resnet18", seed=seed).backbone.state_dict()
        save_file(state, tmp_path / "resnet18.safetensors")

    put_weights(0)
    run = make_run(name, "knn", "smoke", split="grouped", **weights)
    first = experiments.execute(run, "cpu")
    if what == "pixels":
        squares(1, turned=True)
    elif what == "another folder":
        run = replace(run, dataset=squares(1, tmp_path / "elsewhere" / "squares"))
    elif what == "groups":
        rows = [f"{c}/{n}.png,{c}{n // 2}" for c in "abc" for n in range(12)]
        (tmp_path / "squares" / "groups.csv").write_text("\n".join(["file,patient_id", *rows]))
    else:
        put_weights(1)
    second = experiments.execute(run, "cpu")
    assert second.record["data"] != first.record["data"]
    key = "test_groups" if what == "groups" else "test_features"
    assert not np.array_equal(first.arrays[key], second.arrays[key])
    network = build_network(run.backbone, seed=run.seed, weights=run.weights)
    direct = extract_features(network, torch.from_numpy(experiments.parts(run).test.images)).numpy()
    np.testing.assert_allclose(second.arrays["test_features"], direct, rtol=1e-3, atol=1e-4)


def test_features_that_are_not_trained_are_made_once_for_all_splits(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    made, run = [], make_run("digits", "knn", "smoke", seed=77)
    extract = mock.Mock(side_effect=lambda network, x: made.append(len(x)) or extract_features(network, x))
    monkeypatch.setattr(experiments, "extract_features", extract)
    first = experiments.execute(run, "cpu")
    data = experiments.parts(run)
    assert sum(made) == len(data.train) + len(data.test)
    validation = experiments.execute(replace(run, evaluate_on="validation"), "cpu").arrays
    experiments.execute(replace(run, split="grouped"), "cpu")
    assert sum(made) == len(data.train) + len(data.test)
    where = dict(zip(first.arrays["train_ids"].tolist(), first.arrays["train_features"], strict=True))
    assert np.array_equal([where[i] for i in validation["test_ids"]], validation["test_features"])
    other = experiments.execute(replace(run, seed=76), "cpu")  # other weights are drawn
    assert not np.allclose(other.arrays["test_features"], first.arrays["test_features"], atol=1e-3)


def test_a_collapsed_run_says_so_to_whoever_follows_it_and_not_in_a_cell(monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(tmp_path / "progress"))
    said = "the embedding collapsed"
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: warnings.warn(said, stacklevel=1) or [])
    run = make_run("digits", "deep-knn", "smoke")
    experiments.execute(run, "cpu")
    events = [json.loads(line) for line in (tmp_path / "progress").read_text(encoding="utf-8").splitlines()]
    assert {"event": "warning", "text": f"{run.label}: {said}"} in events
    assert not [one for one in recwarn if "collapsed" in str(one.message)]


def test_nothing_is_left_behind_by_a_run_that_fails(monkeypatch, tmp_path):
    run = make_run("lesions", "deep-knn", "smoke", batch_size=8)
    with pytest.raises(ValueError, match="raise batch_size"):
        experiments.execute(run, "cpu")
    assert not list((experiments.data_dir() / "runs").glob(f"{run.key}*"))
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    run = make_run("lesions", "knn", "smoke", backbone="resnet18", weights="imagenet")
    with pytest.raises(FileNotFoundError, match="resnet18.safetensors.*there, or unset"):
        experiments.execute(run, "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        experiments.execute(make_run("lesions", "knn", "smoke"), "cuda")


@pytest.mark.parametrize("classes", [2, 3])
def test_a_method_on_features_learns_from_those_of_its_base(tmp_path, classes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % classes
        arrays |= {f"{part}_labels": labels, f"{part}_ids": np.array([f"{part}{i}" for i in range(count)])}
        arrays[f"{part}_features"] = (rng.normal(size=(count, 8)) + 2 * labels[:, None]).astype(np.float32)
    record = {"class_names": list("abc")[:classes], "smallest": 1, "synthetic": False}
    record |= {"class_counts": {"train": [30, 30]}}
    run = make_run("lesions", "mlp-ce", "smoke", epochs=8, lr=0.05)
    base = experiments.Result(run.base, arrays, [], record | {"seconds": 1})
    experiments._write(tmp_path / "base", base, {})
    found, history, state, about = experiments._on_features(run, tmp_path / "base")
    assert about == record and len(history) == 8 and "classifier.weight" in state
    assert found["test_logits"].shape == (20, classes) and found["test_features"].shape == (20, 128)
    result = experiments.Result(run, found, history, record)
    for k_predict in METHODS["mlp-ce"].votes:
        assert (result.predict(k_predict) == arrays["test_labels"]).mean() > 0.6


def test_learnt_is_better_than_the_largest_class():
    def learnt(train_acc=None):
        record, history = (
            {"class_counts": {"train": [60, 30, 10]}},
            [{"train_acc": 90.0}, {"train_acc": train_acc}],
        )
        return experiments.Result(
            make_run("lesions", "triplet"), {}, history * bool(train_acc), record
        ).learnt

    assert learnt(75.0) and learnt(61.5) and learnt()  # the last: nothing was trained
    assert not learnt(60.5) and not learnt(
        20.0
    )  # Calling everything the largest class is right for 60 of 100.


KILLED = """
from deepknn_lib.study.experiments import execute_all
from deepknn_lib.study.runs import make_run
execute_all([make_run("digits", "deep-knn", "smoke", seed=s, split="grouped", epochs=400) for s in (0, 1)], "cpu")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_workers_end_with_their_parent_and_a_killed_run_resumes(tmp_path, monkeypatch):
    environment = os.environ | {"DEEPKNN_DATA": str(tmp_path), "DEEPKNN_PROGRESS": str(tmp_path / "progress")}
    environment["LOKY_MAX_CPU_COUNT"] = "2"
    parent = subprocess.Popen([sys.executable, "-c", KILLED], env=environment, stderr=subprocess.DEVNULL)

    def processes():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += [path] if f"DEEPKNN_DATA={tmp_path}".encode() in path.read_bytes() else []
        return found

    def wait_for(condition, seconds):
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.2)
        assert condition()

    wait_for(lambda: len(list(tmp_path.glob("runs/*.checkpoint.pt"))) == 2, 90)
    assert len(processes()) >= 3
    parent.kill()
    parent.wait()
    wait_for(lambda: not processes(), 10)
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    there = []  # Is fit given the checkpoint that the killed process left?
    fit = mock.Mock(side_effect=lambda *_, checkpoint, **__: there.append(checkpoint.is_file()) or [])
    monkeypatch.setattr(experiments, "fit", fit)
    experiments.execute(make_run("digits", "deep-knn", "smoke", seed=0, split="grouped", epochs=400), "cpu")
    assert there == [True]


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
    (["--dataset", "skin8"], "unknown data set 'skin8'"),
    (["--epochs", "0"], "epochs must be at least 1"),
    (["--normalize", "l3"], "unknown normalize 'l3'"),
])  # fmt: skip
def test_the_command_line_says_what_is_wrong_in_a_line(capsys, options, said):
    assert cli.main(["run", "--method", "deep-knn", "--profile", "smoke", *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}") and told.count("\n") == 1


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


def test_grid_goes_in_an_order_that_makes_every_run_count(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(experiments, "execute_all", lambda runs, *_: asked.extend(runs) or [])
    monkeypatch.setattr(results, "readable", lambda table: table)
    assert cli.main(f"{GRID} --seeds 0,1 --dataset lesions,digits --sweeps".split()) == 0
    order = [(s, d, m) for s in (0, 1) for d in ("lesions", "digits") for m in ("knn", "deep-knn")]
    assert [(run.seed, run.dataset, run.method) for run in asked[:8]] == order
    searched, swept = asked[8:12], asked[12:]
    assert {run.method for run in searched} == {"deep-knn-global"} and {run.k for run in swept} == {3, 5, 7}
