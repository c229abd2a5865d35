"""The notebook runner, on tiny notebooks made here."""

import os
import re
import signal
import subprocess
import sys

import nbformat
import pytest
from made_up import wait_for
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from sets import REFUSED, class_folders, put

from deepknn_lib import cli
from deepknn_lib.datasets import load
from deepknn_lib.study import runner

PARAMETERS = 'profile: str = ""\ndataset = "lesions"\nseeds = ""\ndevice = "auto"'
FIGURE = """
import os, pathlib, time
from IPython.display import Image as Shown, display
from PIL import Image, PngImagePlugin
out, about = pathlib.Path(os.environ["DEEPKNN_FIGURES"]), PngImagePlugin.PngInfo()
(out / "tables").mkdir(parents=True, exist_ok=True)
for key, text in {"Title": "Loss <1>", "Description": "a & b", "Comment": 'a "curve"'}.items():
    about.add_text(key, text)
Image.new("RGB", (8, 8)).save(out / "my loss.png", pnginfo=about)
(out / "tables" / "t.md").write_text("**Table 1**")
with open(os.environ["DEEPKNN_PROGRESS"], "a") as file:
    file.write("epoch 1/3\\n")
time.sleep(1)
print(profile, dataset, os.path.basename(os.getcwd()), os.environ["DEEPKNN_DATA"])
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


def main(*options):
    return cli.main(["notebooks", *options])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of its own, with spaces in its path."""
    root = tmp_path / "with spaces"
    for name in ("notebooks", "elsewhere"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(runner, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setenv("DEEPKNN_DATA", "../data")
    monkeypatch.setenv("DEEPKNN_FIGURES", str(root / "figures"))
    monkeypatch.delenv("DEEPKNN_PROFILE", raising=False)
    monkeypatch.chdir(root / "elsewhere")
    return root


def test_a_whole_run_and_the_next_one(place, capsys):
    notebooks, figures = place / "notebooks", place / "figures"
    failing, kept = write(notebooks, "10_last", "1/0"), write(notebooks, "02_figure", FIGURE)
    before, old = failing.read_text(), nbformat.read(kept, as_version=4)
    assert main("--save-outputs") == 1
    printed = capsys.readouterr().out
    said = ["02_figure: started", "    epoch 1/3\n", "02_figure: passed", "10_last: failed", "ZeroDivision"]
    assert sorted(map(printed.index, said)) == [printed.index(words) for words in said]
    assert re.search(r"\n02_figure .* passed\n10_last .* failed\n1 of 2 notebooks passed;", printed)
    assert "\x1b" not in printed

    pages = (figures / name for name in ("index.html", "notebooks/02_figure.html", "notebooks/10_last.html"))
    index, good, bad = (page.read_text(encoding="utf-8") for page in pages)
    for wanted in ('src="my%20loss.png"', 'alt="a &#34;curve&#34;"', "Loss &lt;1&gt;", "a &amp; b", "are synthetic",
                   "Is it so by lesion?", 'href="notebooks/10_last.html"', 'href="tables/t.md"'):  # fmt: skip
        assert wanted in index, wanted
    for wanted in ("a blue curve", "<msub><mi>K</mi><mi>p</mi></msub>", "<mfrac>", 'href="10_last.html"',
                   'href="../../elsewhere/README.md#a"'):  # fmt: skip
        assert wanted in good, wanted
    assert not re.search("<script|<link|K_p", good) and "ZeroDivisionError" in bad  # no network is needed

    # Outputs are stored, nothing else changes, and not of the notebook that failed. Kernels run in notebooks/.
    assert failing.read_text() == before
    new = nbformat.read(kept, as_version=4)
    assert [(c.source, c.metadata) for c in new.cells] == [(c.source, c.metadata) for c in old.cells]
    assert new.metadata == old.metadata and [c.get("execution_count") for c in new.cells] == [None, 1, 2]
    assert new.cells[2].outputs[0].text == f"demo lesions notebooks {place / 'data'}\n"

    # What passed is left alone until something changed; what failed is run again.
    assert main() == 1
    printed = capsys.readouterr().out
    assert "02_figure: unchanged since it passed" in printed and "10_last: started" in printed
    failing.unlink()
    (figures / "my loss.png").unlink()
    assert main() == 0 and (figures / "my loss.png").exists()


def test_a_page_is_made_again_when_what_it_was_made_from_changes(place, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "repository", lambda: tmp_path)
    write(place / "notebooks", "00_a", "1")
    own = "--dataset", f"folder:{class_folders(tmp_path / 'images')}"

    def marks(*options):
        asked = cli.build_parser().parse_args(["notebooks", "--device", "cpu", *options])
        return [*runner.plan(asked)[1].values()]

    seen = marks() + marks("--seeds", "1") + marks(*own)
    assert marks() == seen[:1]
    sources = (f"deepknn_lib/study/a.{kind}" for kind in ("py", "json", "html"))
    for name in ("data/results/rows.csv", *sources):
        put(tmp_path / name, "1")
        seen += marks()
    write(place / "notebooks", "00_a", "2")
    seen += marks() + marks(*own)
    put(tmp_path / "images/ill/1.png", "new")
    seen += marks(*own)
    patients = [f"{c}/{n}.png,{n // 2}" for c in ("healthy", "ill") for n in range(10)]
    put(tmp_path / "images/groups.csv", ["file,patient", *patients])
    seen += marks(*own)
    put(tmp_path / "images/groups.csv", ["file,lesion", *patients])
    seen += marks(*own)
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path / "weights"))
    for content in ("1", "other"):
        put(tmp_path / "weights/resnet18.safetensors", content)
        seen += marks()
    assert len({*seen}) == 14


def test_a_kernel_that_dies_fails_its_notebook_and_failfast_stops_there(place, capsys, monkeypatch):
    for name, source in {"00_dies": "import os; os._exit(3)", "01_good": "1", "02_not_asked": "1"}.items():
        write(place / "notebooks", name, source)
    monkeypatch.setenv("DEEPKNN_PROFILE", "smoke")  # another profile has a folder of its own
    assert main("--failfast", "--only", "1, 00") == 1  # in the notebooks' order
    printed = capsys.readouterr().out
    assert "DeadKernelError" in printed and "0 of 2 notebooks passed" in printed and "01_good" not in printed
    assert [path.name for path in (place / "figures").iterdir()] == ["lesions-smoke"]


@pytest.mark.parametrize(("options", "told"), REFUSED["notebooks"])
def test_options_that_cannot_be_meant_end_in_status_2(place, capsys, monkeypatch, options, told):
    for name in ("03_b", "03_b_old")[: 2 if "number" in told else 1]:
        write(place / "notebooks", name, "1")
    if not options:
        monkeypatch.setenv("DEEPKNN_PROFILE", "big")
    assert main(*options.split()) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "--help" in captured.err and not captured.out
    assert not (place / "figures").exists() and not (place / "data").exists()


def test_a_report_on_ones_own_images_has_their_words_and_leaves_the_lessons_out(place, capsys):
    for name in ("02_lesson", "04_own"):
        write(place / "notebooks", name, "print(dataset)")
    own = class_folders(place / "elsewhere" / "My set")
    assert main("--dataset", "folder:My set", "--profile", "smoke") == 0
    assert "1 of 1 notebooks passed" in capsys.readouterr().out
    folder = place / "figures" / f"{load.entry_of(f'folder:{own}').file_name}-smoke"  # My-set has another.
    index, page = ((folder / name).read_text("utf-8") for name in ("index.html", "notebooks/04_own.html"))
    assert "Is it so by image?" in index and "Its numbers are no results" in index
    assert "by lesion" not in page and f"folder:{own}" in page  # The kernel runs elsewhere.


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_ends_kernel_and_run(place):
    mark = place / "kernel"
    tell = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))"
    write(place / "notebooks", "00_long", tell, "time.sleep(60)")
    code = "import sys; from deepknn_lib import cli; cli.runner.NOTEBOOKS = cli.Path(sys.argv[1])\n"
    code += "sys.exit(cli.main(['notebooks']))"
    run = subprocess.Popen(
        [sys.executable, "-c", code, place / "notebooks"], stdout=-1, stderr=-2, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )  # fmt: skip
    wait_for(lambda: mark.exists() and mark.read_text(), 60)
    run.send_signal(signal.SIGINT)
    printed, _ = run.communicate(timeout=40)
    assert run.returncode == 130 and "Stopped" in printed and "Traceback" not in printed
    with pytest.raises(ProcessLookupError):  # It may take a moment to go.
        wait_for(lambda: os.kill(int(mark.read_text()), 0), 10)
    assert not [*(place / "figures").rglob("*.*")]
