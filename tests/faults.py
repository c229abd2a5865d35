"""What `./run_tests.sh --faults` does: runs are killed at random moments, and end as if nothing had happened.

A grid on digits is killed by SIGKILL again and again, in every stage: imports, decoding, training, checkpoints,
features, results. Whenever the command comes to its end, all it left is compared with a grid that nobody disturbed, bit
by bit, and it begins anew in an empty folder. A notebook is killed less often. `DEEPKNN_KILLS` is the number of kills
(50), `DEEPKNN_SEED` that of their moments (0). Linux only: processes are looked up in /proc.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from made_up import wait_for
from test_experiments import texts
from test_workers import processes

KILLS, SEED = int(os.environ.get("DEEPKNN_KILLS", 50)), int(os.environ.get("DEEPKNN_SEED", 0))
GRID = "grid --profile smoke --dataset digits --methods knn,deep-knn,deep-knn-ft,mlp-ce --splits grouped --seeds 0"
GRID += " --device cpu --epochs 2 --jobs 2"
RUNS = 5  # the four, and the cross-entropy that deep kNN* starts from; all but kNN train


def start(folder: Path, command: str, **told: str) -> subprocess.Popen:
    told |= {"DEEPKNN_DATA": str(folder), "DEEPKNN_FIGURES": str(folder / "figures"), "OMP_NUM_THREADS": "1"}
    with open(f"{folder}.log", "ab") as log:
        words = [sys.executable, "-m", "deepknn_lib", *command.split()]
        return subprocess.Popen(words, env=os.environ | told, stdout=log, stderr=log, start_new_session=True)


def killed_after(process: subprocess.Popen, seconds: float) -> bool:
    """Kill a process after so long; False if it came to its end before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return False
    process.kill()
    process.wait()
    return True


def ends_well(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(600) == 0, Path(f"{folder}.log").read_text(errors="replace")[-3000:]


def content(path: Path) -> object:
    """All of a file of a run but times."""
    if path.suffix == ".csv":
        return pd.read_csv(path).filter(regex="^(?!.*seconds)").to_csv()
    return json.loads(path.read_text("utf-8"))["scores"] if path.suffix == ".json" else path.read_bytes()


def kept(folder: Path) -> dict:
    """All that a grid left, by file."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.glob("runs/[!.]*/*"))}


def is_clean(folder: Path) -> bool:
    """Whether nothing half made is left, and soon no process."""
    wait_for(lambda: not processes(folder), 60)
    left = [path for path in folder.glob("*/*") if ".tmp" in path.name or path.name.startswith(".damaged")]
    return not left and not list(folder.glob("runs/*.checkpoint.pt"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a grid leaves that nobody disturbed, and the seconds it takes."""
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    ends_well(start(folder, GRID), folder)
    seconds, found = time.monotonic() - began, kept(folder)
    assert len(found) == 4 * RUNS and is_clean(folder)
    return found, seconds


def test_killed_at_any_moment_a_grid_ends_bit_by_bit_the_same(undisturbed, tmp_path, capsys):
    (expected, seconds), folder = undisturbed, tmp_path / "data"
    moments, number, whole = random.Random(SEED), 0, 0
    while number < KILLS:
        process, after = start(folder, GRID), moments.uniform(0, seconds)
        if killed_after(process, after):
            number += 1
            with capsys.disabled():
                print(f"kill {number}/{KILLS} after {after:.1f} s; {whole} grids ended", flush=True)
            wait_for(lambda: not processes(folder), 60)  # A worker that is still importing ends after it.
        else:
            ends_well(process, folder)
            assert kept(folder) == expected and is_clean(folder)
            shutil.rmtree(folder)
            whole += 1
    ends_well(start(folder, GRID), folder)
    assert kept(folder) == expected and is_clean(folder)


def test_a_killed_worker_is_named_and_the_same_command_ends_the_same(undisturbed, tmp_path):
    folder = tmp_path / "data"
    process = start(folder, GRID.replace("--epochs 2", "--epochs 30"))
    wait_for(lambda: list(folder.glob("runs/*.checkpoint.pt")), 120)
    others = [int(path.parent.name) for path in processes(folder) if int(path.parent.name) != process.pid]
    worker = next(p for p in others if b"popen_loky" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    assert process.wait(300) == 1 and "do fewer runs at once" in Path(f"{folder}.log").read_text()
    ends_well(start(folder, GRID), folder)
    found = kept(folder)
    assert all(found[name] == value for name, value in undisturbed[0].items())


def test_two_grids_at_once_train_nothing_twice(undisturbed, tmp_path):
    folder, events = tmp_path / "data", [tmp_path / f"events{n}" for n in (1, 2)]
    for process in [start(folder, GRID, DEEPKNN_PROGRESS=str(path)) for path in events]:
        ends_well(process, folder)
    told = [text for path in events if path.exists() for text in texts(path)]
    assert len([text for text in told if ": epoch 1/2, " in text]) == RUNS - 1
    assert kept(folder) == undisturbed[0] and is_clean(folder)


def test_a_notebook_that_was_killed_ends_when_it_is_run_again(tmp_path):
    folder, moments = tmp_path / "data", random.Random(SEED)
    notebook = {"command": "notebooks --profile smoke --only 04 --device cpu", "PYTHONPATH": os.getcwd()}
    for _ in range(max(KILLS // 10, 1)):
        killed_after(start(folder, **notebook), moments.uniform(2, 40))
        wait_for(lambda: not processes(folder), 60)
    ends_well(start(folder, **notebook), folder)
    assert list(folder.glob("figures/lesions-smoke/tables/*.csv"))
