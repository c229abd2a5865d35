"""What a reader opens after a run: a page for each notebook, and the index over them. None needs a network."""

import html
import os
import re
from functools import partialmethod
from pathlib import Path

import nbformat
from jinja2 import Template
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from traitlets.config import Config

from deepknn_lib.study.experiments import versions
from deepknn_lib.study.notebook import SMOKE, reworded

# The index opens with these figures, of which a report on a folder of one's own has the last three.
MAIN = "claims_forest figure2_skin7 yourself_map table2_comparison recalls umap".split()
QUESTION = re.compile(r"# ([^\n]*)(?:.*?\*\*Question\.\*\* (.*?)(?=\n\n|\n- |\Z))?", re.S)


def page(executed: nbformat.NotebookNode, source: Path, target: Path, dataset: str) -> str:
    """The page at `target` of the notebook `source` that was run, in the words of its data set."""
    markdown = MarkdownWithMath(renderer=_Renderer(source.parent, target.parent))
    exporter = HTMLExporter(
        template_name="classic",
        template_file=str(Path(__file__).with_name("page.html")),
        filters={"markdown2html": lambda text: markdown(reworded(text, dataset))},
        config=Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-input"}}),
        log_level="ERROR",
    )
    return exporter.from_notebook_node(executed, {"metadata": {"name": source.stem}})[0]


class _Renderer(IPythonRenderer):
    """Markdown as HTML: formulas are MathML, and links lead on from where the page is."""

    def __init__(self, source: Path, target: Path):
        super().__init__(escape=False)
        self.source, self.target = source, target

    def _formula(self, tex: str, display: str) -> str:
        """A formula as MathML, which browsers draw by themselves; what is none, such as a class `a$b`, stays text."""
        try:
            return convert(re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", tex), display=display)
        except Exception:  # its own and those of the XML that it writes
            return html.escape(f"${tex}$")

    inline_math = partialmethod(_formula, display="inline")
    block_math = partialmethod(_formula, display="block")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        file, mark, anchor = url.partition("#")
        if re.fullmatch(r"\d\d_\w+\.ipynb", file):  # it has a page too
            file = file.replace(".ipynb", ".html")
        elif file and ":" not in file:
            file = os.path.relpath(self.source / file, self.target)
        return super().link(text, file + mark + anchor, title)


def index(out: Path, rows: list[tuple[str, str, str]], asked: dict[str, str], notebooks: Path) -> str:
    """`index.html` of `out`: what was asked for, each notebook with its question, the main figures; the rest is folded.

    `rows` are the name, minutes and result (`passed` or so) of notebooks that were run; solutions are left out.
    """
    books, figures = [], {}
    for name, minutes, state in (row for row in rows if "/" not in row[0]):
        first = nbformat.read(notebooks / f"{name}.ipynb", as_version=4).cells[0].source
        title, question = QUESTION.match(first).groups("")
        told = {"title": title, "question": reworded(question.replace("*", ""), asked["dataset"])}
        books.append(told | {"file": name, "state": state if state == "failed" else f"{minutes} min"})
    for path in sorted(out.glob("*.png")):
        with Image.open(path) as image:  # `notebook.show_figure` put these words into it
            words = {key: image.info.get(key, "") for key in ("Title", "Description", "Comment")}
        figures[path.stem] = words | {"file": path.stem}
    main = [figures.pop(name) for name in MAIN if name in figures]
    tables = [path.relative_to(out) for path in sorted(out.glob("*/*.md"))]  # tables/ and machine/
    told = {"main": main, "rest": figures.values(), "tables": tables, "versions": versions(), "smoke": SMOKE}
    template = Path(__file__).with_name("index.html").read_text(encoding="utf-8")
    return Template(template, autoescape=True).render(asked=asked, books=books, **told)
