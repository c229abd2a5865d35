"""What is promised about the repository: packages, notebooks, links, commands, sizes."""

import argparse
import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from deepknn_lib import pipeline

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torchvision", "timm", "sklearn", "pandas", "matplotlib", "seaborn", "umap", "papermill", "IPython")
NOT_OURS = {".git", ".venv", "build", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache", "__pycache__"}
# Paths of one machine, in any spelling; a path in a URL is none.
MACHINE = re.compile(r"(?<![\w./:~-])(/home/\w|/root\b|/Users/\w|/mnt/\w|/tmp/\w)|\b[A-Z]:\\\\?Users\b")


def files(*patterns: str) -> list[Path]:
    """Tracked files, or those not ignored; outside git all but caches."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    if listed and listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        found = list(ROOT.rglob("*"))
    found = [path for path in found if path.is_file() and not NOT_OURS & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in found if any(path.match(pattern) for pattern in patterns))


def each(paths: list[Path]):
    """Parametrise a test with `path`, named as in the repository."""
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ALL_NOTEBOOKS = files("notebooks/*.ipynb", "notebooks/**/*.ipynb")
MODULES = sorted((ROOT / "deepknn_lib").glob("*.py"))


# Packages


def project() -> set[str]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = table["dependencies"] + table["optional-dependencies"]["test"]
    return {re.match(r"[\w.-]+", line).group().lower() for line in listed}


def test_environment_yml_lists_the_packages_of_pyproject_with_reasons():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    lines = re.findall(r"^      - ([\w.-]+)(.*)$", text, re.M)
    packages = {name: reason for name, reason in lines if not name.startswith("-")}
    assert set(packages) == project()
    assert not [name for name, reason in packages.items() if not re.match(r"  # \w+ \w+", reason)]
    assert "- -c constraints.txt" in text


def test_constraints_pin_every_package_exactly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    pins = dict(re.match(r"([\w.-]+)==([\w.]+)( ; .*)?$", line).group(1, 2) for line in lines)
    assert len(pins) == len(lines)
    assert project() <= set(pins)
    # the two are built for each other: 0.X belongs to 2.(X - 15)
    assert int(pins["torchvision"].split(".")[1]) - int(pins["torch"].split(".")[1]) == 15


# Files


@each(files("*.py", "*.sh", "*.txt", "*.toml", "*.yml", "*.yaml", "*.md", "*.cff", "*.csv", "*.ipynb", "*.html"))
def test_no_paths_of_a_machine_and_no_package_index(path):
    text = path.read_text(encoding="utf-8")
    if path != Path(__file__).resolve():  # this file holds the patterns
        assert not (found := MACHINE.search(text)), text[max(0, found.start() - 60) : found.end() + 60]
        assert str(ROOT) not in text
    assert not re.search(r"^\s*-*(extra-)?index[-]url|^\s*--find[-]links|^\s*--trusted-host", text, re.M)


@each(files("*.sh", ".ci/run"))
def test_shell_scripts_parse(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.name == "setup.sh" or path.stat().st_mode & 0o111, f"chmod +x {path.name}"


@each(MODULES)
def test_module_is_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"{lines} lines: it holds two jobs, split it"


def test_import_needs_torch_and_numpy_only():
    code = f"import sys, deepknn_lib; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_runner_can_say_its_options_without_any_package():
    command = [sys.executable, "-S", str(ROOT / "deepknn_lib" / "pipeline.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "--save-outputs" in done.stdout, done.stderr


# Notebooks (pre-commit runs these by `-k notebook`)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def test_notebooks_are_there():
    assert NOTEBOOKS, "no numbered notebooks in notebooks/"
    assert len({path.name[:2] for path in NOTEBOOKS}) == len(NOTEBOOKS), "two notebooks have one number"


@each(ALL_NOTEBOOKS)
def test_notebook_is_valid_small_and_without_widgets(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert "application/vnd.jupyter.widget" not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2_000_000


@each(NOTEBOOKS)
def test_notebook_opens_with_title_question_and_minutes(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    opening = first.source.lower()
    for word in ("question", "makes?", "(minutes?|seconds)"):
        assert re.search(rf"\b{word}\b", opening), f"the first cell does not say {word!r}"


@each(NOTEBOOKS)
def test_notebook_has_one_parameters_cell(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    assert not [cell for cell in read(path).cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert pipeline.declared(read(path)) <= {"profile", "dataset", "seeds", "device"}
    lines = [line for line in tagged[0].source.splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if not re.match(r"\w+: \w+ = .+  # \w", line)], "type and comment, please"


@each(NOTEBOOKS)
def test_notebook_closes_with_summary_exercises_and_next(path):
    closing = [cell.source for cell in read(path).cells[-4:] if cell.cell_type == "markdown"]
    headings = re.findall(r"^#+ (.+)$", "\n".join(closing), re.M)
    for word in ("Summary", "Exercises", "Next"):
        assert any(word.lower() in heading.lower() for heading in headings), f"no heading {word!r} at the end"


@each(NOTEBOOKS)
def test_notebook_cells_are_short_and_parse(path):
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))
            assert len(cell.source.splitlines()) <= 20, f"cell {number} is long; move work to the library"


@each(NOTEBOOKS)
def test_notebook_outputs_are_stored_and_without_errors(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run ./run_all.sh --save-outputs"
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


# Links and commands in prose

LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


@each(files("*.md") + ALL_NOTEBOOKS)
def test_relative_links_resolve_in_documents_and_notebooks(path):
    text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    targets = [(a or b).split("#")[0] for a, b in LINK.findall(text)]
    local = [target for target in targets if target and not re.match(r"[a-z][a-z+.-]*:", target)]
    assert not [target for target in local if not (path.parent / unquote(target)).exists()]


def commands(path: Path) -> list[str]:
    """Command lines in the bash blocks of a document, continued lines joined, comments dropped."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    blocks = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md")
COMMANDS = [(name, line) for name in DOCUMENTS for line in commands(ROOT / name)]


def test_readme_has_commands():
    first_words = {line.split()[0] for line in commands(ROOT / "README.md")}
    assert {"./run_all.sh", "./run_tests.sh"} <= first_words


@pytest.mark.parametrize("document, line", COMMANDS)
def test_commands_in_documents_exist(document, line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        assert not words[0].startswith("DEEPKNN_") or words[0].split("=")[0] in known_variables()
        words = words[1:]
    if not words:
        return
    program, rest = words[0], words[1:]
    if program == "./run_all.sh":
        parser = argparse.ArgumentParser(exit_on_error=False)
        pipeline.add_arguments(parser)
        args = parser.parse_args([word for word in rest if word not in ("-h", "--help")])
        assert pipeline.choose(args.only)
    elif program == "./run_tests.sh":
        files_named = [word for word in rest if word.endswith(".py")]
        assert all((ROOT / name).exists() for name in files_named)
    elif program in ("source", ".", "bash"):
        assert (ROOT / rest[0]).exists()
    elif program in ("python", "python3"):
        python(rest)
    elif program in ("jupyter", "papermill"):
        assert all((ROOT / word).exists() for word in rest if word.startswith("notebooks"))
    else:  # nothing of ours
        assert program in {"git", "cd", "conda", "pip", "pre-commit", "unzip", "mkdir"}, program
        assert all((ROOT / word).exists() for word in rest if word.endswith((".yml", "constraints.txt")))


def python(words: list[str]) -> None:
    """Check the words after `python`."""
    if words[:2] == ["-m", "deepknn_lib"]:
        from deepknn_lib.cli import build_parser

        if not {"-h", "--help"} & set(words):
            build_parser().parse_args(words[2:])  # argparse leaves with SystemExit if it does not know an option
    elif words[0] == "-m":
        assert words[1] in {"pip", "pytest", "ruff", "jupyter", "venv"}
    else:
        assert (ROOT / words[0]).exists()


def known_variables() -> set[str]:
    """The environment variables that the library and scripts read."""
    sources = [*MODULES, *ROOT.glob("*.sh"), *(ROOT / "tests").glob("*.py")]
    return set(re.findall(r"DEEPKNN_[A-Z0-9_]+", "\n".join(path.read_text(encoding="utf-8") for path in sources)))


def readme_rows(names, columns, scores):
    """Rows of a README table from committed rows: a method each, a data set and split a column; `scores` are in a cell."""
    import pandas as pd

    from deepknn_lib import tables
    from deepknn_lib.runs import METHODS

    table = tables.over_seeds(pd.concat([pd.read_csv(ROOT / "data" / "results" / f"{name}_runs.csv") for name in names]))
    table = table[table["k_predict"].isin([0, 5])]  # the README shows the vote of five
    cells = [" / ".join(values) for values in zip(*(tables.with_sd(table, score) for score in scores), strict=True)]
    keys = table[["dataset", "split", "method", "k_predict"]].itertuples(index=False, name=None)
    found = dict(zip(keys, cells, strict=True))
    assert len(found) == len(table)  # no two settings of one method
    voted = [(method, k) for method in METHODS for k in (0, 5) if (*columns[0], method, k) in found]
    assert len(found) == len(voted) * len(columns)
    return [[tables.method_title(*vote), *(found[(*column, *vote)] for column in columns)] for vote in voted]


SKIN7 = [("skin7", "paper"), ("skin7", "grouped")]
OTHERS = [("chestxray3", "paper"), ("chestxray3", "grouped"), ("sd198", "paper")]


@pytest.mark.parametrize(
    "names, columns, scores",
    [
        (["skin7_finetune"], SKIN7, ("acc", "mcr", "rs")),
        (["skin7_demo", "chestxray3_demo", "sd198_demo"], SKIN7 + OTHERS, ("acc", "mcr")),
        (["skin7_table3"], SKIN7, ("acc", "mcr", "rs")),
    ],
)
def test_results_in_the_readme_are_those_of_the_committed_rows(names, columns, scores):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = readme_rows(names, columns, scores)
    assert len(rows) >= 7
    for row in rows:
        assert f"| {' | '.join(row)} |" in text, row


def test_one_thing_changed_at_a_time_in_the_readme_is_that_of_the_committed_rows():
    import pandas as pd

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = pd.concat([pd.read_csv(ROOT / "data" / "results" / f"skin7_{n}_runs.csv") for n in ("finetune", "ladder")])
    rows = rows.query("method == 'deep-knn' and seed == 0 and k_predict == 5").fillna({"margin": 0, "weights": "none"})
    changed = {
        "nothing: ResNet-18, 64 pixels, 8 epochs, α = 0.5, by image": {},
        "96 pixels": {"image_size": 96}, "128 pixels": {"image_size": 128}, "16 epochs": {"epochs": 16},
        "96 pixels and 16 epochs": {"image_size": 96, "epochs": 16}, "α = 0.2": {"margin": 0.2},
        "α = 1": {"margin": 1.0}, "ResNet-50": {"backbone": "resnet50"}, "no pretrained weights": {"weights": "none"},
        "split by lesion": {"split": "grouped"},
    }  # fmt: skip
    assert len(rows) == len(changed)
    start = {"backbone": "resnet18", "weights": "pqf", "image_size": 64, "epochs": 8, "margin": 0.5, "split": "paper"}
    for words, change in changed.items():
        wanted = start | change
        (row,) = rows[(rows[list(wanted)] == list(wanted.values())).all(axis=1)].itertuples()
        assert f"| {words} | {row.acc:.1f} | {row.mcr:.1f} | {row.rs:.1f} |" in text, words


def test_votes_on_frozen_features_in_the_readme_are_those_of_the_committed_rows():
    import pandas as pd

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = ("skin7_table3_runs.csv", "sd198_pretrained_runs.csv", "chestxray3_pretrained_runs.csv")
    rows = pd.concat([pd.read_csv(ROOT / "data" / "results" / name) for name in names])
    rows = rows.query("method == 'knn' and seed == 0 and not (dataset == 'sd198' and split == 'grouped')")
    assert len(rows) == 10
    for row in rows.itertuples():
        of_group = "patient" if row.dataset == "chestxray3" else "lesion"
        split = {"paper": "by image", "grouped": f"by {of_group}"}[row.split]
        cells = f"| {row.dataset} | {row.k_predict} | {split} | {row.acc:.1f} | {row.mcr:.1f} |"
        assert cells in text, cells


def test_intervals_in_the_readme_are_those_of_the_committed_differences():
    import pandas as pd

    def rounded(*values):
        return tuple(f"{value + 0:.1f}".replace("-", "−") for value in values)

    results, known = ROOT / "data" / "results", set()
    for path in (*results.glob("*_differences.csv"), results / "skin7_leak.csv"):
        for row in pd.read_csv(path).itertuples():
            known |= {rounded(row.difference, row.low, row.high), rounded(-row.difference, -row.high, -row.low)}
    number = r"([−+]?\d+(?:\.\d+)?)"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(rf"{number}[^\[\d]{{0,40}}\s\[{number}, {number}\]", text)
    assert len(said) == text.count("[−") + len(re.findall(r"\[\+?\d+\.\d", text)) >= 15
    for triple in said:
        assert tuple(value.replace("+", "") for value in triple) in known, triple


def test_speed_in_the_readme_is_that_of_the_committed_benchmarks():
    import pandas as pd

    def shown(*ratios, between=" and "):
        return between.join(f"{ratio:.1f}" if ratio >= 0.995 else f"{ratio:.2f}" for ratio in ratios)

    folder = ROOT / "benchmarks" / "results"
    tables = {part: pd.read_csv(folder / f"{part}.csv") for part in ("images", "loss", "step", "search")}
    images, step = (tables[part]["ratio"].dropna().tolist() for part in ("images", "step"))
    loss = tables["loss"].dropna(subset="ratio").set_index("setting")["ratio"]
    search = {what: rows.reset_index() for what, rows in tables["search"].groupby("what")}
    alone = search["scikit-learn brute"]["median"] / search["deepknn_lib without FAISS"]["median"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for start, ratios in {
        "| crops into a training step": shown(images[0]),
        "| the same in the first epoch": shown(images[1]),
        "| loss with its search": shown(*(loss[f"B={size}, D=128, K=M=5"] for size in (96, 512, 2048, 8192)), between=" / "),
        "| the same, D = 2,048": shown(*(loss[f"B={size}, D=2048, K=M=5"] for size in (96, 512, 2048)), between=" / "),
        "| a training step": shown(step[0]),
        "| exact search with FAISS": shown(*search["FAISS IndexFlatL2"]["ratio"]),
        "| exact search, torch alone": shown(*alone),
    }.items():
        (line,) = (line for line in text.splitlines() if line.startswith(start))
        assert line.split("|")[2].strip() == ratios, line


def maker():
    """`data/results/make.py`, which makes the committed rows."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "data" / "results" / "make.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # the folder is for results
        spec.loader.exec_module(module)
    return module


def test_committed_rows_are_those_of_the_runs_that_the_command_names():
    import pandas as pd

    columns = ["dataset", "split", "method", "backbone", "weights", "image_size", "seed", "epochs", "margin", "k", "m"]
    studies = maker().studies()
    committed = {path.stem.removesuffix("_runs") for path in (ROOT / "data" / "results").glob("*_runs.csv")}
    assert committed == set(studies)
    for name, runs in studies.items():
        rows = pd.read_csv(ROOT / "data" / "results" / f"{name}_runs.csv").fillna({"weights": "none"})
        found = set(rows[columns].fillna("unused").itertuples(index=False, name=None))
        assert len(found) == len(runs), name
        for run in runs:  # a setting that the method does not use is empty in its row
            wanted = [*(getattr(run, name) for name in columns[:7]), *(getattr(run.trained, name) for name in columns[7:])]
            pairs = [list(zip(row, wanted, strict=True)) for row in found]
            assert sum(all(value in ("unused", ours) for value, ours in pair) for pair in pairs) == 1, (name, run)
        history = ROOT / "data" / "results" / f"{name}_history.csv"
        assert not history.is_file() or set(pd.read_csv(history)["seed"]) == {run.seed for run in runs}


def test_the_command_leaves_what_it_cannot_make_and_names_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    made = maker()
    monkeypatch.setattr(sys, "argv", ["make.py", "--only", "skin7_ladder,skin7_demo", "--out", str(tmp_path / "out")])
    assert made.main() == 0 and not (tmp_path / "out").exists()
    assert "skin7_demo: left as it is, 42 of its 42 runs are missing" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["make.py", "--only", "skin7_demos"])
    with pytest.raises(SystemExit):
        made.main()
    assert "skin7_demos" in capsys.readouterr().err


def test_the_command_makes_rows_histories_and_evidence_of_finished_runs(tmp_path, monkeypatch):
    import pandas as pd

    from deepknn_lib import experiments
    from deepknn_lib.runs import grid

    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    made, smoke = maker(), grid("lesions", "smoke", ("knn", "triplet", "deep-knn"), ("grouped",), (0, 1))
    monkeypatch.setattr(made, "studies", lambda: {"lesions_demo": smoke, "lesions_sweeps": smoke[2::3]})
    monkeypatch.setattr(made, "SPLITS", {"lesions": ("grouped",)})
    monkeypatch.setattr(sys, "argv", ["make.py", "--train", "--out", str(tmp_path)])
    assert made.main() == 0 and all(experiments.is_done(run) for run in smoke)
    tables = {path.stem: pd.read_csv(path) for path in tmp_path.glob("*.csv")}
    names = {f"lesions_demo_{what}" for what in ("runs", "history", "differences")}
    assert set(tables) == names | {"lesions_sweeps_runs", "lesions_evidence"}
    assert sorted(tables["lesions_sweeps_runs"]["k_predict"]) == sorted([1, 3, 5, 7, 9] * 2)
    assert set(tables["lesions_demo_history"]["method"]) == {"triplet", "deep-knn"}
    assert {"C2", "C5"} <= set(tables["lesions_evidence"]["claim"])
    pairs = set(tables["lesions_demo_differences"][["method", "minus"]].itertuples(index=False, name=None))
    assert pairs == {("deep-knn", "knn"), ("deep-knn", "triplet"), ("triplet", "knn")}


def test_verdicts_in_the_readme_are_those_of_the_committed_evidence():
    import pandas as pd

    from deepknn_lib import claims, tables

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = claims.verdicts(pd.read_csv(ROOT / "data" / "results" / "skin7_evidence.csv"))
    verdicts = found.pivot(index="claim", columns="split", values="verdict")
    for claim, words in tables.paper("claims").itertuples(index=False):
        assert f"| {claim} | {words} | {verdicts.loc[claim, 'paper']} | {verdicts.loc[claim, 'grouped']} |" in text, claim


def readme_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_python_in_the_readme_runs():
    loss, estimator = ({} for _ in range(2))
    for block, names in zip(readme_blocks("python"), (loss, estimator), strict=True):
        exec(block, names)
    assert loss["predicted"].shape == loss["labels"].shape and loss["features"].grad.isfinite().all()
    assert (estimator["kinds_again"] == estimator["kinds"]).mean() > 0.9 and estimator["embedding"].shape == (178, 128)


def test_the_readme_command_for_ones_own_images_runs(tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    from deepknn_lib import cli

    rng = np.random.default_rng(0)
    for name, level in (("healthy", 60), ("ill", 160)):
        (tmp_path / "path/to/my_images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = (level + rng.integers(0, 60, (40, 50, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "path/to/my_images" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    command = next(c for b in readme_blocks("bash") for c in b.splitlines() if c.startswith("python -m deepknn_lib run"))
    arguments = command.split()[3:]
    assert cli.main([*arguments, "--profile", "smoke", "--device", "cpu"]) == 0
    assert (tmp_path / arguments[arguments.index("--out") + 1] / "model.safetensors").is_file()
    assert '"k_predict": 5' in capsys.readouterr().out.splitlines()[-1]
