"""Executing runs: once each, bases first, from a cache that knows its data; and the command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
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
from deepknn_lib.storage import claim, whole_file
from deepknn_lib.study import experiments, results
from deepknn_lib.study.runs import METHODS, grid, make_run

ROOT = Path(__file__).resolve().parent.parent
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


def processes(data):
    """The processes with this data folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path] if f"DEEPKNN_DATA={data}\0".encode() in path.read_bytes() else []
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    assert condition()


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
    assert [row["k_predict"] for row in first.record["scores"]] == [1, 5]
    right = (first.predict(5) == first.arrays["test_labels"]).mean()
    assert first.record["scores"][1]["acc"] == pytest.approx(100 * right)
    assert len([name for name in first.record["scores"][0] if name.startswith("recall_")]) == 7
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

    wait_for(lambda: len(list(tmp_path.glob("runs/*.checkpoint.pt"))) == 2, 90)
    assert len(processes(tmp_path)) >= 3
    parent.kill()
    parent.wait()
    wait_for(lambda: not processes(tmp_path), 10)
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    there = []  # Is fit given the checkpoint that the killed process left?
    fit = mock.Mock(side_effect=lambda *_, checkpoint, **__: there.append(checkpoint.is_file()) or [])
    monkeypatch.setattr(experiments, "fit", fit)
    experiments.execute(make_run("digits", "deep-knn", "smoke", seed=0, split="grouped", epochs=400), "cpu")
    assert there == [True]


# Faults


def digits(*seeds, method="knn"):
    return [make_run("digits", method, "smoke", seed=seed, split="grouped") for seed in seeds]


def spoil(path, change):
    """Write what `change` makes of the arrays of an npz, the text of a JSON, or the bytes of another file."""
    if path.suffix == ".npz":
        with np.load(path) as stored:
            arrays = {**stored}
        np.savez(path, **change(arrays))
    else:
        path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "half of run.json": ("run.json", lambda content: content[: len(content) // 2]),
    "no run.json": ("run.json", None),
    "another smallest class": (
        "run.json",
        lambda content: content.replace(b'"smallest": ', b'"smallest": 1'),
    ),
    "rows reversed": ("features.npz", lambda a: a | {"train_features": a["train_features"][::-1]}),
    "no features.npz": ("features.npz", None),
    "an edited history": ("history.csv", lambda content: content + b"9\n"),
    "of an earlier version": ("run.json", lambda content: content.replace(b'"checksums"', b'"sums"')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_set_aside_and_made_again(monkeypatch, tmp_path, capsys, damage):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    (run,), (name, change) = digits(0), DAMAGES[damage]
    first, folder = experiments.execute(run, "cpu"), experiments.folder_of(run)
    spoil(folder / name, change) if change else (folder / name).unlink()
    capsys.readouterr()
    again = experiments.execute(run, "cpu")
    assert f"{folder} is not whole" in capsys.readouterr().err
    assert len([*folder.parent.glob(f".damaged-{folder.name}-*")]) == 1
    assert all(np.array_equal(first.arrays[part], again.arrays[part]) for part in first.arrays)
    assert again.record["smallest"] == first.record["smallest"] and experiments.is_done(run)


def test_a_damaged_checkpoint_base_or_file_of_features_is_made_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    (knn,), (deep,) = digits(0), digits(0, method="deep-knn-ft")
    first = experiments.execute_all([knn, deep], "cpu", 1)
    checkpoint = Path(f"{experiments.folder_of(deep)}.checkpoint.pt")
    experiments.folder_of(deep).rename(tmp_path / "gone")
    experiments.folder_of(knn).rename(tmp_path / "gone too")
    checkpoint.write_bytes(b"garbage")
    spoil(experiments.folder_of(deep.base) / "model.safetensors", lambda content: content[:-4] + b"0000")
    (features,) = tmp_path.glob("features/*.npz")
    spoil(features, lambda arrays: arrays | {"features": arrays["features"][::-1]})
    again = experiments.execute_all([knn, deep], "cpu", 1)
    told = capsys.readouterr().err
    for path in (checkpoint, experiments.folder_of(deep.base), features):
        assert f"{path} is not whole" in told
    for before, after in zip(first, again, strict=True):
        assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in before.arrays)


def test_a_run_that_fails_leaves_the_others_going_and_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    wide = replace(digits(0, method="weighted-ce")[0], lr=1e30)
    (deep,) = digits(0, method="deep-knn-ft")
    runs = [wide, replace(deep, base=wide), *digits(0)]
    with pytest.raises(FloatingPointError, match="loss is nan.*which it starts from, failed: .*loss is nan"):
        experiments.execute_all(runs, "cpu", 1)
    failed = {}
    done = experiments.execute_all(runs, "cpu", 1, failed=failed)
    assert [*failed] == runs[:2] and done[:2] == [None, None] and done[2].run == runs[2]
    out = tmp_path / "rows.csv"
    command = "grid --profile smoke --methods knn,weighted-ce --splits grouped --device cpu --seeds 0 --dataset digits"
    assert cli.main(f"{command} --lr 1e30 --jobs 1 --out {out}".split()) == 1
    assert "failed: weighted-ce · digits" in capsys.readouterr().err and len(pd.read_csv(out)) == 2


def test_what_another_process_is_at_comes_last_and_is_not_done_twice(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(tmp_path / "progress"))
    (one, other), results = digits(0, 1), []
    experiments.execute(one, "cpu")
    at = [experiments.folder_of(run) for run in (one, other)]
    at[0].rename(tmp_path / "elsewhere")
    (tmp_path / "progress").unlink()
    thread = threading.Thread(target=lambda: results.extend(experiments.execute_all([one, other], "cpu", 1)))
    with claim(at[0]) as mine, claim(at[1], wait=False) as too:
        assert mine and too
    with claim(at[0]):
        thread.start()
        wait_for(at[1].is_dir, 60)
        assert not at[0].exists() and not results
        (tmp_path / "elsewhere").rename(at[0])
    thread.join(60)
    events = map(json.loads, (tmp_path / "progress").read_text(encoding="utf-8").splitlines())
    assert [(event["status"], event["label"]) for event in events] == [
        ("trained", other.label),
        ("cached", one.label),
    ]
    assert [result.run for result in results] == [one, other]


def test_what_killed_processes_left_is_swept_and_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    (run,) = digits(0)
    with (
        pytest.raises(ValueError),
        whole_file(tmp_path / "x.csv") as one,
        whole_file(tmp_path / "x.csv") as two,
    ):
        assert one != two and one.parent == two.parent
        raise ValueError
    (old, new) = (tmp_path / "runs" / f".{name}.{'0f' * 16}.tmp" for name in ("old", "new"))
    own = experiments.folder_of(run).with_name(f".{experiments.folder_of(run).name}.{'0f' * 16}.tmp")
    for left in (old, new, own):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    experiments.execute(run, "cpu")
    assert (
        new.exists() and not old.exists() and not own.exists()
    )  # of `own` the claim was free, so its owner is gone
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672]"),
    ):
        with pytest.raises(OSError, match="cannot write to .*x.csv .*make room.*DEEPKNN_DATA"):
            with whole_file(tmp_path / "x.csv"):
                raise error
    assert not list(tmp_path.glob(".x*"))


def test_ctrl_c_stops_a_grid_in_two_seconds_and_says_how_far_it_is(tmp_path):
    told = {"DEEPKNN_DATA": str(tmp_path), "LOKY_MAX_CPU_COUNT": "2", "PYTHONUNBUFFERED": "1"}
    command = (
        "grid --profile smoke --dataset digits --methods deep-knn --splits grouped --epochs 900 --device cpu"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "deepknn_lib", *command.split()],
        env=os.environ | told, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/*.checkpoint.pt")), 120)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    began = time.monotonic()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and time.monotonic() - began < 2
    assert "stopped, 0 of 2 done" in said and "Traceback" not in said
    wait_for(lambda: not processes(tmp_path), 2)


def test_a_cluster_gives_the_same_when_a_worker_dies_and_needs_no_shared_disk(monkeypatch, tmp_path):
    from distributed import LocalCluster

    runs = grid("digits", "smoke", ("deep-knn-ft",), ("grouped",), (0,), epochs=6)
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "here"))
    told = {"DEEPKNN_DATA": str(tmp_path / "there"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "env": told}
    with LocalCluster(**options) as cluster:

        def kill():  # the worker that is in the middle of a training
            wait_for(lambda: list(tmp_path.glob("there/runs/*.checkpoint.pt")), 120)
            busy = [worker.address for worker in cluster.scheduler.workers.values() if worker.processing]
            (nanny,) = [one for one in cluster.workers.values() if one.worker_address in busy]
            os.kill(nanny.pid, signal.SIGKILL)
            killed.extend(tmp_path.glob("there/runs/*.checkpoint.pt"))

        killed = []
        thread = threading.Thread(target=kill)
        thread.start()
        found = experiments.execute_all(runs, "cpu", cluster=cluster.scheduler_address)
        thread.join()
    assert len(killed) == 1
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "alone"))
    for result, alone in zip(found, experiments.execute_all(runs, "cpu", 2), strict=True):
        assert result.record["device"] == alone.record["device"] == "cpu (1 threads a run)"
        assert all(np.array_equal(result.arrays[name], alone.arrays[name]) for name in alone.arrays)


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
    ("grid --cluster tcp://127.0.0.1:1", "no Dask scheduler answers at tcp://127.0.0.1:1"),
    ("grid --seeds 0,x", "argument --seeds: '0,x': give whole numbers"),
    ("grid --methods ,", "argument --methods: it is empty"),
    ("WORLD_SIZE=2 grid", "torchrun or its like"),
])  # fmt: skip
def test_what_cannot_be_meant_is_said_in_a_line_before_anything_starts(
    capsys, monkeypatch, tmp_path, options, said
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(experiments, "_attempt", None)  # nothing may start
    (tmp_path / "file").touch()
    if options.startswith("WORLD_SIZE=2"):
        monkeypatch.setenv("WORLD_SIZE", "2")
    words = options.removeprefix("WORLD_SIZE=2 ").format(tmp_path).split()
    try:
        status = cli.main([words[0], "--profile", "smoke", *words[1:]])
    except SystemExit as ended:  # argparse
        status = ended.code
    told = capsys.readouterr().err
    assert (
        status == 2
        and "error: " in told
        and said.format(tmp_path, tmp_path) in told
        and "Traceback" not in told
    )


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
