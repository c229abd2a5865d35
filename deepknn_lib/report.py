"""What a run of the notebooks leaves: `figures/index.html`, a page for each notebook, and stored outputs."""

import datetime
import functools
import hashlib
import html
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import nbformat
import pandas as pd
import torch
from nbconvert import HTMLExporter
from PIL import Image

from deepknn_lib.runs import PROFILES
from deepknn_lib.storage import repository, whole_file

INJECTED = "injected-parameters"  # papermill's tag on the cell it adds

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.2rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 3rem; border-bottom: 1px solid #d5dae1 }
a { color: #0b5cad } .small { color: #5a6472; font-size: .88rem } .failed { color: #a3131e; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem } dt { color: #5a6472 }
dd { margin: 0; overflow-wrap: anywhere } .scroll { overflow-x: auto }
.note { background: #fff6dd; border-left: 4px solid #c58b00; padding: .6rem 1rem }
figure, section { margin: 2.2rem 0; break-inside: avoid } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .9rem } th { background: #f4f6f8 }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #e3e7ec; text-align: left; white-space: nowrap }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>
<h1>{title}</h1>{note}
<dl>{facts}</dl>
<h2>Notebooks</h2><div class="scroll"><table>
<tr><th>Notebook</th><th>Minutes</th><th>Runs</th><th>Result</th></tr>{rows}</table></div>
<h2>Figures</h2>{figures}
<h2>Tables</h2>{tables}
</body></html>
"""
NOTE = """<p class="note"><strong>Synthetic data.</strong> A program drew these images: the numbers are
a stand-in, they show that the code works and say nothing about patients.</p>"""
FIGURE = """
<figure><img src="{source}" alt="{alt}"><figcaption><strong>{title}.</strong> {caption}
<span class="small">{links}</span></figcaption></figure>"""
TABLE = """
<section><p><strong>{caption}</strong>{cut} <span class="small">{links}</span></p>
<div class="scroll">{body}</div></section>"""


@functools.cache
def _exporter():
    return HTMLExporter(log_level="ERROR")


def keep(executed, page: Path) -> None:
    """Write an executed notebook as HTML at `page`, and as a notebook beside it."""
    body, _ = _exporter().from_notebook_node(executed, {"metadata": {"name": page.stem}})
    # nbconvert writes the same words for every image and leaves the alt text in the notebook unread
    for output in [o for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs]:
        if "image/png" in output.get("data", {}):
            alt = output.metadata.get("image/png", {}).get("alt", "figure")
            body = body.replace("No description has been provided for this image", html.escape(alt), 1)
    for path, text in ((page, body), (page.with_suffix(".ipynb"), nbformat.writes(executed) + "\n")):
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def stamp(notebook, parameters: dict[str, str]) -> str:
    """Fingerprint of all a notebook's outputs come from: its cells, the library, the data, options and versions."""
    from deepknn_lib.datasets import available
    from deepknn_lib.execution import versions

    root = repository()
    digest = hashlib.sha256(repr([(c.cell_type, c.source) for c in notebook.cells]).encode())
    for path in sorted([*root.glob("deepknn_lib/*.py"), *root.glob("data/paper/*.*"), *root.glob("data/results/*.*")]):
        digest.update(path.read_bytes())
    kind, _, folder = parameters["dataset"].partition(":")
    files = sorted(Path(folder).rglob("*")) if kind == "folder" else []
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    given = {name: os.environ.get(name) for name in ("DEEPKNN_DATA", "DEEPKNN_WEIGHTS", "DEEPKNN_SKIN7_FOLDS")}
    digest.update(repr([parameters, seen, given, available(), versions(), torch.cuda.is_available()]).encode())
    return digest.hexdigest()


def remember(page: Path, mark: str, out: Path, began: float) -> None:
    """Note beside `page` what it was made from and which files in `out` were made with it."""
    made = [str(file.relative_to(out)) for file in out.glob("**/*.*") if file.stat().st_mtime >= began]
    with whole_file(page.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"stamp": mark, "began": began, "files": made}), encoding="utf-8")


def unchanged(page: Path, mark: str, out: Path) -> float:
    """When `page` was begun, if it was made from the same and all its files are still there; else 0."""
    try:
        note = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        good = note["stamp"] == mark and page.exists() and all((out / name).exists() for name in note["files"])
        return float(note["began"]) if good else 0.0
    except (OSError, ValueError, KeyError, TypeError):  # absent or spoilt: the notebook is run
        return 0.0


def store_outputs(path: Path, executed) -> None:
    """Put the outputs of `executed` into the notebook at `path`; nothing else in it changes."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    ran = [cell for cell in executed.cells if INJECTED not in cell.metadata.get("tags", [])]
    pairs = [(cell, new) for cell, new in zip(notebook.cells, ran, strict=True) if cell.cell_type == "code"]
    for count, (cell, new) in enumerate(pairs, start=1):
        cell.execution_count, cell.outputs = count, new.outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    with whole_file(path) as temporary:
        nbformat.write(notebook, temporary)


def write_index(out: Path, outcomes: list, parameters: dict[str, str], began: float) -> None:
    """Write `index.html`: what was run, each notebook, and every figure and table in `out`."""
    gpu = parameters["device"] != "cpu" and torch.cuda.is_available()
    names = ("torch", "torchvision", "timm", "numpy", "scikit-learn")
    facts = {
        "Profile": parameters["profile"], "Data set": parameters["dataset"],
        "Seeds": parameters["seeds"] or ",".join(map(str, PROFILES[parameters["profile"]]["seeds"])),
        "Device": torch.cuda.get_device_name() if gpu else "CPU",
        "Finished": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Versions": ", ".join([f"Python {sys.version.split()[0]}", *(f"{n} {version(n)}" for n in names)]),
    }
    rows = ""
    for outcome in outcomes:
        name, *cells = map(html.escape, outcome.row())
        cells = "".join(f"<td>{cell}</td>" for cell in (_link(outcome.page, out, name), *cells))
        rows += f'<tr class="{outcome.state}">{cells}</tr>'
    figures = "".join(_figure(path, out, began) for path in sorted(out.glob("*.png")))
    tables = "".join(_table(path, out, began) for path in sorted(out.glob("tables/*.csv")))
    text = PAGE.format(
        title="Deep kNN for medical image classification", style=STYLE, rows=rows,
        note=NOTE if parameters["dataset"] == "lesions" else "",
        facts="".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()),
        figures=figures or "<p>None.</p>", tables=tables or "<p>None.</p>",
    )
    with whole_file(out / "index.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _link(path: Path, out: Path, text: str) -> str:
    return f'<a href="{quote(path.relative_to(out).as_posix())}">{text}</a>' if path.exists() else text


def _made(path: Path, began: float) -> str:
    return "" if path.stat().st_mtime >= began else " (from an earlier run)"


def _figure(path: Path, out: Path, began: float) -> str:
    with Image.open(path) as image:
        texts = [str(image.info.get(key, "")) for key in ("Title", "Description", "Comment")]
    title, caption, alt = map(html.escape, texts)
    title = title or html.escape(path.stem)
    links = _link(path.with_suffix(".pdf"), out, "PDF") + _made(path, began)
    return FIGURE.format(source=quote(path.name), alt=alt or title, title=title, caption=caption, links=links)


def _table(path: Path, out: Path, began: float, most: int = 60) -> str:
    table, notes = pd.read_csv(path), path.with_suffix(".md")
    first = notes.read_text(encoding="utf-8").partition("\n")[0] if notes.exists() else ""
    caption = first.strip("*") if first.startswith("**") else path.stem.replace("_", " ")
    body = table.head(most).to_html(index=False, border=0, na_rep="–", float_format="{:.4g}".format)
    cut = f" The first {most} of {len(table)} rows." if len(table) > most else ""
    links = f"{_link(path, out, 'CSV')} {_link(notes, out, 'Markdown')}{_made(path, began)}"
    return TABLE.format(caption=html.escape(caption), cut=cut, links=links, body=body)
