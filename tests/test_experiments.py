"""Executing runs: once each, bases first, from a cache that knows its data, under faults; and the command line."""

import errno
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
from sets import REFUSED
from test_bad_images import harm

from deepknn_lib import cli
from deepknn_lib.models import build_network
from deepknn_lib.storage import claim, read_whole, whole_file
from deepknn_lib.study import experiments
from deepknn_lib.study.runs import make_run


def texts(path):
    """What the library told whoever follows it."""
    return path.read_text(encoding="utf-8").splitlines()


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


def test_deep_knn_from_cross_entropy_starts_with_its_backbone_alone(again, monkeypatch):
    run, fit = again[1]["deep-knn-ft"].run, mock.Mock(return_value=[])
    base = load_file(experiments.Entry.of(run.base).folder / "model.safetensors")
    monkeypatch.setattr(experiments, "fit", fit)
    experiments.execute(replace(run, lr=0.5), "cpu")
    begun = fit.call_args.args[0].state_dict()
    backbone = [name for name in base if name.startswith("backbone.")]
    assert backbone and all(torch.equal(begun[name], base[name]) for name in backbone)
    assert not [name for name in begun if name.startswith("classifier.")]  # dropped, as in the paper


def test_other_weights_of_the_same_name_are_another_run(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    name, found = draw_classes(tmp_path / "set"), []
    for seed in (0, 1):
        state = build_network("resnet18", seed=seed).backbone.state_dict()
        save_file(state, tmp_path / "resnet18.safetensors")
        run = make_run(name, "knn", "smoke", backbone="resnet18", weights="imagenet")
        found.append(experiments.execute(run, "cpu").arrays["test_features"])
    assert not np.array_equal(*found)


def test_a_method_on_features_learns_from_those_of_its_base(data, tmp_path):
    run = make_run(draw_classes(tmp_path / "set", "ab"), "mlp-ce", "smoke", epochs=8, lr=0.05)
    result, base = experiments.execute_all([run, run.base], "cpu", 1)
    assert len(result.history) == 8
    assert not np.array_equal(result.arrays["test_features"], base.arrays["test_features"])
    assert all(result.scores(k_predict)["acc"] > 60 for k_predict in (0, 1, 5))


def test_a_collapse_is_told_to_who_follows_the_run_and_not_in_a_cell(monkeypatch, data, tmp_path, recwarn):
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(tmp_path / "progress"))
    said, run = "the embedding collapsed", digits("deep-knn")
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: warnings.warn(said, stacklevel=1) or [])
    experiments.execute(run, "cpu")
    assert texts(tmp_path / "progress") == [f"{run.label}: {said}"]
    assert not [one for one in recwarn if said in str(one.message)]


def test_what_learns_on_features_says_that_it_did_so_on_the_cpu(again, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert experiments.execute(digits("mlp-deep-knn"), "auto").record["device"].startswith("cpu")


def test_a_run_that_fails_leaves_the_others_going_and_is_named(data, tmp_path, capsys):
    wide = digits("weighted-ce", lr=1e30)
    runs = [wide, replace(digits("deep-knn-ft"), base=wide), digits("triplet", k_predict=9999)]
    runs += [digits(k_predict=2000), digits()]  # of one training, where too many shall vote for one
    said = "loss is nan.*which it starts from, failed: .*loss is nan.*9999.*2000, but only 1436 training images can"
    with pytest.raises(FloatingPointError, match=said):
        experiments.execute_all(runs, "cpu", 1)
    assert [path.name[:10] for path in data.glob("runs/[!.]*")] == ["digits-knn"]
    failed = {}
    done = experiments.execute_all(runs, "cpu", 1, failed=failed)
    assert [*failed] == runs[:4] and done[:4] == [None] * 4 and done[4].run == runs[4]
    out = tmp_path / "rows.csv"
    command = f"{GRID} --methods knn,weighted-ce --seeds 0 --dataset digits --lr 1e30 --jobs 1 --out {out}"
    assert cli.main(command.split()) == 1
    assert "failed: weighted-ce · digits" in capsys.readouterr().err and len(pd.read_csv(out)) == 2


@pytest.mark.parametrize("case", REFUSED["a damaged run"])
def test_what_is_not_whole_is_named_set_aside_and_made_again(again, capsys, recwarn, case):
    (data, found), (pattern, change, gone) = again, REFUSED["a damaged run"][case]
    asked = [found["knn"].run, found["deep-knn-ft"].run]
    for folder in [*data.glob(gone)]:  # so that what is damaged is needed
        shutil.rmtree(folder)
        if pattern.endswith(".pt"):
            Path(f"{folder}.checkpoint.pt").touch()
    (path,) = data.glob(pattern)
    harm(data, pattern, change)
    made = experiments.execute_all(asked, "cpu", 1)
    named = path.parent if path.parent.parent == data / "runs" else path
    told = capsys.readouterr().err + "".join(str(one.message) for one in recwarn)
    assert f"{named} is not whole" in told
    assert len([*named.parent.glob(f".damaged-{named.name}-*")]) == 1
    for result in made:
        before = found[result.run.method]
        assert same(before, result) and result.record["smallest"] == before.record["smallest"]
        assert experiments.Entry.of(result.run).result()


def test_what_cannot_be_read_now_is_left_where_it_is(tmp_path):
    def read(path):
        raise OSError(errno.EMFILE, "too many open files")

    with pytest.raises(OSError, match="too many"):
        read_whole(tmp_path, read)
    assert tmp_path.exists()


def test_what_another_process_is_at_comes_last_and_is_not_done_twice(data, tmp_path):
    runs, done = [digits(seed=0), digits(seed=1)], []
    first, (one, other) = experiments.execute(runs[0], "cpu"), [experiments.Entry.of(r).folder for r in runs]
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
    folder = experiments.Entry.of(digits()).folder
    old, new, own = (folder.with_name(f".{name}.{'0f' * 16}.tmp") for name in ("old", "new", folder.name))
    for left in (old, new, own):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    experiments.execute(digits(), "cpu")  # The claim on its own was free, so that its owner is gone.
    assert new.exists() and not old.exists() and not own.exists()


def test_a_full_disk_is_named_and_nothing_remains(tmp_path):
    with pytest.raises(OSError, match="cannot write to .*x.csv .*make room.*DEEPKNN_DATA"):
        with whole_file(tmp_path / "x.csv") as one, whole_file(tmp_path / "x.csv") as two:
            assert one != two and one.parent == two.parent
            one.touch()
            raise RuntimeError("[enforce fail at inline_container.cc:672]")  # as torch says it
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "said"), REFUSED["run and grid"])
def test_what_cannot_be_meant_is_said_before_anything_starts(capsys, monkeypatch, tmp_path, options, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(experiments, "_train", mock.Mock(side_effect=AssertionError))  # nothing may start
    (tmp_path / "file").touch()
    if options == "grid":
        monkeypatch.setenv("WORLD_SIZE", "2")
    if "--cluster" in options:  # Dask tries again for as long as it may.
        from distributed import Client

        monkeypatch.setattr("distributed.Client", lambda to, **_: Client(to, timeout="1s"))
    command, *words = options.format(tmp_path).split()
    try:
        status = cli.main([command, "--profile", "smoke", *words])
    except SystemExit as ended:  # argparse
        status = ended.code
    told = capsys.readouterr().err
    assert status == 2 and "error: " in told and "Traceback" not in told
    assert said.format(tmp_path, tmp_path) in told


GRID = "grid --profile smoke --splits grouped --device cpu"


def test_grid_writes_rows_and_epochs(capsys, tmp_path):
    out, epochs, votes = (tmp_path / f"{name}.csv" for name in ("rows", "epochs", "votes"))
    files = f"--out {out} --history {epochs} --predictions {votes}"
    assert cli.main(f"{GRID} --methods knn,deep-knn --seeds 0 --dataset digits {files}".split()) == 0
    told = pd.read_csv(votes)
    assert [*told][4:] == ["image", "group", "label", "knn:1", "knn:5", "deep-knn:1", "deep-knn:5"]
    accuracies = [100 * (told[name] == told["label"]).mean() for name in [*told][-4:]]
    assert accuracies == pytest.approx(pd.read_csv(out)["acc"].tolist(), abs=1e-3)
    assert len(pd.read_csv(epochs)) == 1 and "| grouped | kNN" in capsys.readouterr().out


def test_grid_goes_in_an_order_that_makes_every_run_count(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "execute_all", lambda runs, *_: asked.extend(runs) or [])
    command = f"{GRID} --methods knn,triplet --seeds 0,1,01 --dataset lesions,digits --sweeps"
    assert cli.main(command.split()) == 0
    order = [(s, d, m) for s in (0, 1) for d in ("lesions", "digits") for m in ("knn", "triplet")]
    assert [(run.seed, run.dataset, run.method) for run in asked[:8]] == order
    searched, swept = asked[8:12], asked[12:]
    assert {run.method for run in searched} == {"deep-knn-global"} and {run.k for run in swept} == {3, 5, 7}
