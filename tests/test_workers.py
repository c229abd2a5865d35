"""Many runs at once: processes of this machine that are stopped or killed, and a cluster whose worker dies."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from made_up import digits, draw_classes, same, wait_for
from threadpoolctl import threadpool_limits

from deepknn_lib.study import experiments
from deepknn_lib.study.runs import make_run


def processes(data):
    """The processes with this data folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path] if f"DEEPKNN_DATA={data}\0".encode() in path.read_bytes() else []
    return found


def test_processes_that_are_used_again_see_files_that_were_replaced(data, tmp_path):
    runs = [make_run(draw_classes(tmp_path / "set"), "knn", "smoke", seed=seed) for seed in (0, 1)]
    before = experiments.execute_all(runs, "cpu", 2)
    draw_classes(tmp_path / "set", seed=1, turned=1)
    for old, new in zip(before, experiments.execute_all(runs, "cpu", 2), strict=True):
        assert not np.array_equal(old.arrays["test_features"], new.arrays["test_features"])


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("number, patience", [(signal.SIGINT, 2), (signal.SIGKILL, 10)])
def test_a_grid_that_is_stopped_leaves_no_process_and_its_runs_resume(data, monkeypatch, number, patience):
    grid = "grid --profile smoke --dataset digits --methods deep-knn --splits grouped --seeds 0,1"
    command = [sys.executable, "-m", "deepknn_lib", *grid.split(), "--epochs", "900"]
    options = {"env": os.environ | {"LOKY_MAX_CPU_COUNT": "2"}, "stderr": subprocess.PIPE, "text": True}
    ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # A shell's background jobs ignore it.
    options |= {"start_new_session": True, "preexec_fn": ctrl_c}
    with subprocess.Popen(command, **options) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        wait_for(lambda: len(list(data.glob("runs/*.checkpoint.pt"))) == 2, 120)
        assert len(processes(data)) >= 3
        began = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: the workers get it too
            said = process.communicate(timeout=30)[1]
            assert process.returncode == 130 and time.monotonic() - began < 2
            assert "stopped, 0 of 2 done" in said and "Traceback" not in said
        process.kill()
        wait_for(lambda: not processes(data), patience)
    there = []  # Is fit given the checkpoint that the process left?
    fit = mock.Mock(side_effect=lambda *_, checkpoint, **__: there.append(checkpoint.is_file()) or [])
    monkeypatch.setattr(experiments, "fit", fit)
    experiments.execute(digits("deep-knn", epochs=900), "cpu")
    assert there == [True]


def test_a_cluster_gives_the_same_when_a_worker_dies_and_needs_no_shared_disk(monkeypatch, tmp_path):
    from distributed import LocalCluster

    runs, killed = [digits("deep-knn-ft", epochs=6)], []
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "here"))
    root = Path(__file__).resolve().parent.parent
    told = {"DEEPKNN_DATA": str(tmp_path / "there"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, env=told) as cluster:

        def kill():  # the worker that is in the middle of a training
            wait_for(lambda: list(tmp_path.glob("there/runs/*.checkpoint.pt")), 120)
            busy = [worker.address for worker in cluster.scheduler.workers.values() if worker.processing]
            (nanny,) = [one for one in cluster.workers.values() if one.worker_address in busy]
            os.kill(nanny.pid, signal.SIGKILL)
            killed.extend(tmp_path.glob("there/runs/*.checkpoint.pt"))

        thread = threading.Thread(target=kill)
        thread.start()
        (found,) = experiments.execute_all(runs, "cpu", cluster=cluster.scheduler_address)
        thread.join()
    assert len(killed) == 1
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "alone"))
    with threadpool_limits(1, "openmp"):  # as the workers of the cluster have
        (alone,) = experiments.execute_all(runs, "cpu", 1)
    assert same(found, alone)
    assert found.record["device"] == alone.record["device"] == "cpu (1 threads a run)"
