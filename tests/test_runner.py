"""The notebook runner, on tiny notebooks made here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from sets import class_folders

from deepknn_lib.datasets import load
from deepknn_lib.study import runner

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'profile: str = ""\ndataset = "lesions"\nseeds = ""\ndevice = "auto"'
FIGURE = """
import json, os, pathlib, time
from IPython.display import Image as Shown, display
from PIL import Image, PngImagePlugin
out = pathlib.Path(os.environ["DEEPKNN_FIGURES"])
(out / "tables").mkdir(parents=True, exist_ok=True)
about = PngImagePlugin.PngInfo()
for key, text in {"Title": "Loss <1>", "Description": "a & b", "Comment": 'a "curve"'}.items():
    about.add_text(key, text)
Image.new("RGB", (8, 8)).save(out / "my loss.png", pnginfo=about)
(out / "tables" / "t.md").write_text("**Table 1**")
with open(os.environ["DEEPKNN_PROGRESS"], "a") as file:
    file.write(json.dumps({"event": "epoch", "text": "epoch 1/3"}) + "\\n" + json.dumps({"event": "run"}) + "\\n")
time.sleep(1)
print(profile, dataset, os.path.basename(os.getcwd()))
display(Shown(str(out / "my loss.png"), alt="a blue curve"))
"""


def write(folder, name, *sources):
    """A notebook of code cells; the first is the one of the parameters."""
    head = f"# {name}\n\n**Question.** Is it *so* by lesion?\n\n**Makes.** Nothing; $K_p$, and $$\\frac{{1}}{{2}}$$."
    head += "\n\n[Next](10_last.ipynb), [more](../elsewhere/README.md#a)"
    cells = [new_markdown_cell(head), *map(new_code_cell, (PARAMETERS, *sources))]
    cells[1].metadata["tags"] = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def asked(*options):
    parser = runner.argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser.parse_args(options)


def main(*options):
    return runner.run(asked(*options))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of its own, with spaces in its path."""
    root = tmp_path / "with spaces"
    for name in ("notebooks", "elsewhere"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(runner, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setenv("DEEPKNN_DATA", str(root / "data"))
    monkeypatch.setenv("DEEPKNN_FIGURES", str(root / "figures"))
    monkeypatch.delenv("DEEPKNN_PROFILE", raising=False)
    monkeypatch.chdir(root / "elsewhere")
    return root


def test_a_whole_run_and_the_next_one(place, capsys):
    notebooks, figures = place / "notebooks", place / "figures"
    failing = write(notebooks, "10_last", "1/0", "print('not reached')")
    kept = write(notebooks, "02_figure", FIGURE)
    before = {path: path.read_text() for path in (failing, kept)}

    assert main("--save-outputs") == 1
    printed = capsys.readouterr().out
    assert "DEEPKNN_PROGRESS" not in os.environ and "\x1b" not in printed
    assert os.environ["DEEPKNN_FIGURES"] == str(figures)
    said = ["02_figure: started", "    epoch 1/3\n", "02_figure: passed", "10_last: failed", "ZeroDivision"]
    assert sorted(map(printed.index, said)) == [printed.index(words) for words in said]
    table = [line.split() for line in printed[printed.index("\nnotebook ") :].splitlines()[1:]]
    assert [(row[0], row[-1]) for row in table[1:3]] == [("02_figure", "passed"), ("10_last", "failed")]
    assert table[3][:5] == "1 of 2 notebooks passed;".split()

    page = (figures / "index.html").read_text(encoding="utf-8")
    for wanted in ('src="my%20loss.png"', 'alt="a &#34;curve&#34;"', "Loss &lt;1&gt;", "a &amp; b", "are synthetic",
                   "Is it so by lesion?", 'href="notebooks/10_last.html"',
                   'href="my%20loss.pdf"', 'href="tables/t.md"'):  # fmt: skip
        assert wanted in page, wanted
    good, bad = ((figures / f"notebooks/{name}.html").read_text("utf-8") for name in ("02_figure", "10_last"))
    for wanted in ("a blue curve", "<msub><mi>K</mi><mi>p</mi></msub>", "<mfrac>", 'href="10_last.html"',
                   'href="../../elsewhere/README.md#a"'):  # fmt: skip
        assert wanted in good, wanted
    assert not re.search("<script|<link|K_p", good) and "ZeroDivisionError" in bad  # no network is needed
    assert not [path for path in place.rglob("*") if ".tmp" in path.name]

    # Outputs are stored, nothing else changes, and not of the notebook that failed.
    assert failing.read_text() == before[failing]
    old, new = nbformat.reads(before[kept], as_version=4), nbformat.read(kept, as_version=4)
    assert [(c.source, c.metadata) for c in new.cells] == [(c.source, c.metadata) for c in old.cells]
    assert new.metadata == old.metadata and [c.get("execution_count") for c in new.cells] == [None, 1, 2]
    assert new.cells[2].outputs[0].text == "demo lesions notebooks\n"

    # What passed is left alone until something changed; what failed is run again.
    assert main() == 1
    printed = capsys.readouterr().out
    assert "02_figure: unchanged since it passed" in printed and "10_last: started" in printed
    failing.unlink()
    assert main("--failfast") == 0
    (figures / "my loss.png").unlink()
    assert main() == 0 and (figures / "my loss.png").exists()


def test_what_a_page_was_made_from(place, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "repository", lambda: tmp_path)
    own, seen = f"folder:{class_folders(tmp_path / 'images')}", []
    for folder in ("data/results/__pycache__", "deepknn_lib/study"):
        (tmp_path / folder).mkdir(parents=True)

    def mark(*options, source="1"):
        write(place / "notebooks", "00_a", source)
        seen.extend(runner.plan(asked("--device", "cpu", *options))[1].values())

    mark()
    mark()
    assert seen[0] == seen.pop()
    for name in ("data/results/rows.csv", "deepknn_lib/study/runs.py", "deepknn_lib/study/profiles.json"):
        (tmp_path / name).write_text("1")
        mark()
    mark(source="2")
    mark("--seeds", "1")
    mark("--dataset", own)
    (tmp_path / "images/ill/1.png").write_text("new")
    mark("--dataset", own)
    (tmp_path / "images/groups.csv").write_text(
        "file,patient\n" + "".join(f"{c}/{n}.png,{n // 2}\n" for c in ("healthy", "ill") for n in range(10))
    )
    mark("--dataset", own)
    monkeypatch.setenv("DEEPKNN_WEIGHTS", "elsewhere")
    mark()
    assert len(set(seen)) == len(seen) == 10


def test_a_kernel_that_dies_fails_its_notebook_and_failfast_stops_there(place, capsys, monkeypatch):
    write(place / "notebooks", "00_dies", "import os; os._exit(3)")
    write(place / "notebooks", "01_good", "1")
    monkeypatch.setenv("DEEPKNN_PROFILE", "smoke")  # another profile has a folder of its own
    assert main("--failfast") == 1
    printed = capsys.readouterr().out
    assert "DeadKernelError" in printed and "0 of 2 notebooks passed" in printed and "01_good" not in printed
    assert [path.name for path in (place / "figures").iterdir()] == ["lesions-smoke"]


@pytest.mark.parametrize("options, told", [
    ("--only 77", "no notebook 77"),
    ("--seeds 1,", "whole numbers"),
    ("--dataset nope", "unknown data set 'nope'"),
    ("--dataset folder:nowhere", "there is no folder"),
    ("--save-outputs --profile smoke", "--save-outputs is for"),
    ("", "DEEPKNN_PROFILE is 'big'"),
    ("--profile demo", "03_b.ipynb and 03_b_old.ipynb have one number"),
])  # fmt: skip
def test_options_that_cannot_be_meant_end_in_status_2(place, capsys, monkeypatch, options, told):
    for name in ("03_b", "03_b_old")[: 2 if "number" in told else 1]:
        write(place / "notebooks", name, "1")
    if not options:
        monkeypatch.setenv("DEEPKNN_PROFILE", "big")
    assert main(*options.split()) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "--help" in captured.err and not captured.out
    assert not (place / "figures").exists() and not (place / "data").exists()


def test_only_takes_numbers_in_any_order_and_a_folder_becomes_absolute(place, monkeypatch):
    for name in ("00_a", "03_b", "10_c"):
        write(place / "notebooks", name, "1")
    class_folders(place / "elsewhere")
    parameters, marks = runner.plan(asked("--only", "10, 3", "--dataset", "folder:."))
    assert [path.stem for path in marks] == ["03_b", "10_c"]
    assert parameters["dataset"] == f"folder:{place / 'elsewhere'}"
    monkeypatch.setenv("DEEPKNN_DATA", "some")
    with runner._kernels_write_to(place):  # Kernels run in notebooks/.
        assert os.environ["DEEPKNN_DATA"] == str(place / "elsewhere" / "some")


def test_a_report_on_ones_own_images_has_their_words_and_leaves_the_lessons_out(place, capsys):
    for name in ("02_lesson", "04_own"):
        write(place / "notebooks", name, "1")
    own = class_folders(place / "My set")
    assert main("--dataset", f"folder:{own}", "--profile", "smoke") == 0
    assert "1 of 1 notebooks passed" in capsys.readouterr().out
    (index,) = (place / "figures").glob("*/index.html")
    assert (
        index.parent.name == f"{load.entry_of(f'folder:{own}').file_name}-smoke"
    )  # It tells My-set from My set.
    text = index.read_text("utf-8")
    assert "Is it so by image?" in text and "Its numbers are no results" in text
    assert "by lesion" not in (index.parent / "notebooks" / "04_own.html").read_text("utf-8")


def test_help_needs_no_packages(tmp_path):
    command = [sys.executable, "-S", "-E", ROOT / "deepknn_lib" / "study" / "runner.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--save-outputs" in done.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_ends_kernel_and_run(place):
    mark = place / "kernel"
    tell = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))"
    write(place / "notebooks", "00_long", tell, "time.sleep(60)")
    code = ("import argparse, sys, deepknn_lib.study.runner as r; r.NOTEBOOKS = r.Path(sys.argv[1]); "
            "p = argparse.ArgumentParser(); r.add_arguments(p); sys.exit(r.run(p.parse_args([])))")  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-c", code, place / "notebooks"], stdout=-1, stderr=-2, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    printed, _ = run.communicate(timeout=40)
    assert run.returncode == 130 and "Stopped" in printed and "Traceback" not in printed
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # it may take a moment to go
            os.kill(int(mark.read_text()), 0)
            time.sleep(0.1)
    assert not [*(place / "figures").rglob("*.*")]
