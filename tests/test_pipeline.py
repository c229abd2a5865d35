"""The notebook runner and the shell scripts, on tiny notebooks made here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from deepknn_lib import pipeline, report

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'profile: str = ""  # smoke, demo or paper\ndataset = "lesions"'
FIGURE = """
import os, pathlib
from PIL import Image, PngImagePlugin
out = pathlib.Path(os.environ["DEEPKNN_FIGURES"])
(out / "tables").mkdir(parents=True, exist_ok=True)
about = PngImagePlugin.PngInfo()
for key, text in {"Title": "Loss <1>", "Description": "a & b", "Comment": 'a "curve"'}.items():
    about.add_text(key, text)
Image.new("RGB", (8, 8)).save(out / "my loss.png", pnginfo=about)
(out / "tables" / "t.csv").write_text("method,acc\\n<script>,81.23456\\n")
(out / "tables" / "t.md").write_text("**Table 1 < 2**\\n\\n| method |\\n")
"""
PROGRESS = """
import json, os
with open(os.environ["DEEPKNN_PROGRESS"], "a") as file:
    file.write(json.dumps({"event": "epoch", "text": "epoch 1/3"}) + "\\n")
    for status in ("trained", "cached", "cached"):
        file.write(json.dumps({"event": "run", "status": status, "label": "x"}) + "\\n")
print(profile, dataset, os.path.basename(os.getcwd()), "seeds" in dir())
"""


def write(folder: Path, name: str, *sources: str, minutes: float = 0, parameters: bool = False) -> Path:
    """A notebook of code cells; with `parameters` the first one is tagged so."""
    cells = [new_markdown_cell(f"# {name}")] + [new_code_cell(source) for source in sources]
    if parameters:
        cells[1].metadata["tags"] = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    if minutes:
        metadata["deepknn"] = {"minutes": {"demo": minutes}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of its own, with spaces in its path."""
    root = tmp_path / "with spaces"
    for name in ("notebooks", "elsewhere"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(pipeline, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setenv("DEEPKNN_DATA", str(root / "data"))
    monkeypatch.setenv("DEEPKNN_FIGURES", str(root / "figures"))
    monkeypatch.chdir(root / "elsewhere")
    return root


def test_a_whole_run(place, capsys):
    notebooks, figures = place / "notebooks", place / "figures"
    write(notebooks, "10_last", "1/0", "print('not reached')")
    write(notebooks, "02_figure", FIGURE)
    kept = write(notebooks, "03_train", PARAMETERS, PROGRESS, minutes=9, parameters=True)
    before = {path: path.read_bytes() for path in notebooks.iterdir()}
    environment = dict(os.environ)

    assert pipeline.main(["--save-outputs"]) == 1

    printed = capsys.readouterr().out
    assert os.environ == environment
    # order, estimate, epoch lines, counts, traceback without colours, table
    assert printed.index("02_figure") < printed.index("03_train, ~9 min") < printed.index("    epoch 1/3")
    assert printed.index("1 trained, 2 cached") < printed.index("10_last")
    assert "ZeroDivisionError: division by zero" in printed and "\x1b" not in printed
    table = printed[printed.index("\nnotebook ") :].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["notebook", "02_figure", "03_train", "10_last", "2"]
    assert "failed" in table[4] and "passed" in table[3] and "../figures/notebooks/03_train.html" in table[3]

    # the page
    page = (figures / "index.html").read_text(encoding="utf-8")
    assert 'src="my%20loss.png"' in page and 'alt="a &quot;curve&quot;"' in page
    assert "Loss &lt;1&gt;" in page and "a &amp; b" in page and "Table 1 &lt; 2" in page
    assert "&lt;script&gt;" in page and "<script" not in page and "81.23<" in page
    assert "Synthetic data" in page and 'href="notebooks/10_last.html"' in page and "http" not in page
    assert "ZeroDivisionError" in (figures / "notebooks" / "10_last.html").read_text(encoding="utf-8")
    assert not [path for path in place.rglob("*") if ".tmp" in path.name]

    # stored outputs: only outputs changed, and not of the one that failed
    assert (notebooks / "10_last.ipynb").read_bytes() == before[notebooks / "10_last.ipynb"]
    old, new = (nbformat.reads(text, as_version=4) for text in (before[kept].decode(), kept.read_text()))
    assert [cell.source for cell in new.cells] == [cell.source for cell in old.cells]
    assert [cell.metadata for cell in new.cells] == [cell.metadata for cell in old.cells]
    assert new.metadata == old.metadata and [c.get("execution_count") for c in new.cells] == [None, 1, 2]
    assert new.cells[2].outputs[0].text == "demo lesions notebooks False\n"

    # the measured times are the next estimates
    assert set(json.loads((place / "data" / "timings.json").read_text())) == {
        "02_figure demo lesions", "03_train demo lesions"
    }
    assert 0 < pipeline.estimate(kept, new, "demo", "lesions") < 60
    assert pipeline.estimate(kept, new, "paper", "lesions") == 0


def test_failfast_stops_and_other_profiles_have_their_own_folder(place, capsys):
    write(place / "notebooks", "00_bad", "raise ValueError('no')")
    write(place / "notebooks", "01_good", "1")
    assert pipeline.main(["--failfast", "--profile", "smoke"]) == 1
    assert "01_good" not in capsys.readouterr().out
    assert [path.name for path in (place / "figures").iterdir()] == ["lesions-smoke"]


def test_a_kernel_that_dies_fails_its_notebook_only(place, capsys):
    write(place / "notebooks", "00_dies", "import os; os._exit(3)")
    write(place / "notebooks", "01_good", "1")
    assert pipeline.main([]) == 1
    printed = capsys.readouterr().out
    assert "DeadKernelError" in printed and "1 of 2 notebooks passed" in printed


def test_parameters_are_those_the_cell_assigns(place):
    path = write(place / "notebooks", "00_a", PARAMETERS + "\nprint(device)", "seeds = 3", parameters=True)
    assert pipeline.declared(nbformat.read(path, 4)) == {"profile", "dataset"}


@pytest.mark.parametrize(
    "options, told",
    [
        (["--only", "77"], "no notebook 77"),
        (["--only", "x"], "no notebook 0x"),
        (["--dataset", "nope"], "unknown data set 'nope'"),
        (["--dataset", "folder:"], "unknown data set 'folder:'"),
        (["--dataset", "folder:not there"], "there is no folder"),
        (["--save-outputs", "--profile", "smoke"], "--save-outputs is for"),
    ],
)
def test_bad_values_are_told_and_leave_nothing(place, capsys, options, told):
    write(place / "notebooks", "00_a", "1")
    assert pipeline.main(options) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "--help" in captured.err and not captured.out
    assert not (place / "figures").exists() and not (place / "data").exists()


@pytest.mark.parametrize(
    "options", [["--profile", "big"], ["--seeds", "a"], ["--seeds", "1,"], ["--device", "tpu"]]
)
def test_bad_choices_end_in_status_2(capsys, options):
    with pytest.raises(SystemExit) as ended:
        pipeline.main(options)
    assert ended.value.code == 2 and options[0] in capsys.readouterr().err


def test_a_spoilt_notebook_is_told_before_any_runs(place, capsys):
    write(place / "notebooks", "00_a", "1")
    (place / "notebooks" / "01_b.ipynb").write_text("{")
    assert pipeline.main([]) == 2
    assert "01_b.ipynb" in capsys.readouterr().err and not (place / "figures").exists()


def test_only_takes_numbers_in_any_order(place):
    for name in ("00_a", "03_b", "10_c"):
        write(place / "notebooks", name, "1")
    assert [path.stem for path in pipeline.choose("10, 3")] == ["03_b", "10_c"]
    assert len(pipeline.choose()) == 3


def test_relative_folder_becomes_absolute(place):
    args = pipeline.argparse.Namespace(dataset="folder:.", device="auto", save_outputs=False)
    assert pipeline._check(args) == f"folder:{place / 'elsewhere'}"


def test_spoilt_timings_cost_the_estimates_only(place):
    (place / "data").mkdir()
    for text in ("{", "[]", '{"a": null}'):
        (place / "data" / "timings.json").write_text(text)
        pipeline._remember("a", 2)
        assert pipeline._timings()[1] == {"a": 2.0}


@pytest.mark.parametrize("seconds, text", [(0, ""), (40, ", ~40 s"), (540, ", ~9 min")])
def test_estimates_read_well(seconds, text):
    assert pipeline._about(seconds) == text


@pytest.mark.parametrize("seconds, text", [(9.9, "0:09"), (135, "2:15"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert pipeline._clock(seconds) == text


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_ends_kernel_and_run(place):
    mark = place / "kernel"
    tell = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))"
    write(place / "notebooks", "00_long", tell, "time.sleep(60)")
    code = "import sys, deepknn_lib.pipeline as p; p.NOTEBOOKS = p.Path(sys.argv[1]); sys.exit(p.main([]))"
    run = subprocess.Popen(
        [sys.executable, "-c", code, place / "notebooks"], stdout=-1, stderr=-2, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    printed, _ = run.communicate(timeout=40)
    assert run.returncode == 130 and "stopped" in printed and "Traceback" not in printed
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # it may take a moment to go
            os.kill(int(mark.read_text()), 0)
            time.sleep(0.1)
    assert not (place / "figures").exists()


# The shell scripts


def sh(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run with the interpreter of these tests first on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PATH": path} | environment)


def test_help_from_anywhere(tmp_path):
    for script, word in (("run_all.sh", "--save-outputs"), ("run_tests.sh", "pytest options")):
        done = sh(f"'{ROOT / script}' --help", tmp_path)
        assert done.returncode == 0 and word in done.stdout, done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.sh looks at, with spaces in its path."""
    root = tmp_path / "a copy"
    (root / "deepknn_lib").mkdir(parents=True)
    for name in ("setup.sh", "run_all.sh", "pyproject.toml", "constraints.txt", "deepknn_lib/__init__.py"):
        shutil.copy(ROOT / name, root / name)
    return root


def test_setup_uses_an_environment_that_has_everything(checkout, tmp_path):
    command = "source 'a copy/setup.sh' && $DEEPKNN_PYTHON -c 'import sys; print(sys.executable)'"
    done = sh(command, tmp_path, PYTHONPATH=str(checkout))
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr
    assert not (checkout / ".venv").exists()


def test_a_notebook_is_marked_by_the_results_it_shows_whatever_folders_lie_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "repository", lambda: tmp_path)
    notebook, results = new_notebook(cells=[new_code_cell("1")]), tmp_path / "data" / "results"
    (results / "__pycache__").mkdir(parents=True)  # as an import of make.py there leaves behind
    marks = []
    for text in ("acc\n1\n", "acc\n1\n", "acc\n2\n"):
        (results / "rows.csv").write_text(text)
        marks.append(report.stamp(notebook, {"dataset": "lesions"}))
    assert marks[0] == marks[1] != marks[2]


def test_setup_installs_once_and_again_when_the_versions_change(checkout):
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"  # a stand-in that only notes what it is asked to install
    python.write_text('#!/bin/sh\n[ "$1" != -m ] || echo "$@" >> pip.txt\n')
    python.chmod(0o755)
    (venv / "bin" / "activate").write_text("echo activated")
    asked = checkout / "pip.txt"

    # the active environment has the library of another checkout, so it is not taken
    done = sh("source ./setup.sh", checkout, PYTHONPATH="")
    assert done.returncode == 0 and done.stdout.endswith("activated\n"), done.stderr
    assert "-c constraints.txt -e .[test]" in asked.read_text()
    asked.unlink()
    assert sh("source ./setup.sh", checkout, PYTHONPATH="").stdout == "activated\n"
    assert not asked.exists()

    (checkout / "constraints.txt").write_text("torch==0.0\n")
    python.write_text('#!/bin/sh\n[ "$1" != -m ] || { echo no such version; exit 1; }\n')
    done = sh("source ./setup.sh; echo status $?", checkout, PYTHONPATH="")
    assert "no such version" in done.stderr and done.stdout.endswith("status 1\n")
    assert (venv / ".unfinished").exists() and not (venv / ".deepknn-stamp").exists()


def test_setup_without_network_says_what_to_do(checkout):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": ""}
    done = sh("./run_all.sh", checkout, **offline)
    assert done.returncode != 0 and "check the network" in done.stderr, done.stderr
    assert (checkout / ".venv" / ".unfinished").exists() and not (checkout / ".venv" / ".deepknn-stamp").exists()


def test_a_notebook_runs_again_only_when_something_changed(place, capsys):
    path = write(place / "notebooks", "02_figure", FIGURE)

    def ran():
        assert pipeline.main([]) == 0
        return "unchanged since it passed" not in capsys.readouterr().out

    assert ran() and not ran()
    (place / "figures" / "my loss.png").unlink()
    assert ran() and not ran()
    write(place / "notebooks", "02_figure", FIGURE, "print('more')")
    assert ran() and not ran()
    assert pipeline.main(["--seeds", "5"]) == 0
    assert "unchanged since" not in capsys.readouterr().out
    path.unlink()
    write(place / "notebooks", "02_figure", "1/0")
    assert pipeline.main([]) == 1 and pipeline.main([]) == 1  # what failed is never taken for done
