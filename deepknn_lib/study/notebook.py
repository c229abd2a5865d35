"""What every notebook's first cells need: what was asked for, one style, and how to show figures and tables."""

import io
import os
import random
import re
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import torch
from IPython.display import Image, Markdown, display
from PIL.PngImagePlugin import PngInfo

from deepknn_lib.datasets.load import entry_of, index_of
from deepknn_lib.storage import figures_dir, repository, whole_file
from deepknn_lib.study import figures, results
from deepknn_lib.study.experiments import pick_device, versions
from deepknn_lib.study.runs import PROFILES, make_run

# What a notebook was asked to do: `seeds` are a tuple, `device` is `cpu` or `cuda`, `figures` the folder to write to,
# and `own` says whether the data set is a folder of the reader's.
Session = namedtuple("Session", "profile dataset seeds device figures own")
_asked = {"profile": "demo", "dataset": "lesions"}  # of the notebook that runs; `start` fills it in
SMOKE = "The smoke profile: one epoch, a test of the machinery. Its numbers are no results."


def start(profile: str = "", dataset: str = "lesions", seeds: str = "", device: str = "auto") -> Session:
    """Set style and seeds, print what this notebook runs with, and make `exercises` of notebooks/ importable.

    An empty `profile` is `DEEPKNN_PROFILE`, else `demo`. `seeds` have commas between (`"0,1,2"`); empty: the profile's.
    ValueError for a profile, seed or device that there is not.
    """
    profile = profile or os.environ.get("DEEPKNN_PROFILE") or "demo"
    make_run(dataset, "knn", profile)  # A ValueError names the profiles.
    chosen = tuple(map(int, seeds.split(","))) if seeds else tuple(PROFILES[profile]["seeds"])
    figures.use_style()
    sys.path.append(str(repository() / "notebooks"))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    where = pick_device(device).type
    _asked.update(profile=profile, dataset=dataset)
    print(f"profile {profile}, data set {dataset}, seeds {', '.join(map(str, chosen))}, device {where}")
    print(versions())
    if profile == "smoke":
        show_text(f"> **{SMOKE}**")
    return Session(profile, dataset, chosen, where, figures_dir(), _own())


@cache
def group_of(dataset: str) -> str:
    """What several images of a set share: a `lesion` or a `patient`; `image` where no groups are known."""
    try:
        index = index_of(entry_of(dataset))
    except (ValueError, OSError):  # the notebook says what is wrong when it loads the set
        return "image"
    named = any("lesion" in name.lower() for name in index.class_names)  # a class keeps its name
    return "lesion" if named else index.unit or "image"


def reworded(text: str, dataset: str) -> str:
    """A text of the notebooks, which say lesion, in the words of a set; and a folder's name in place of its path.

    What stands between backticks is kept, and so is a paragraph that speaks of Skin-7.
    """
    group = group_of(dataset)
    split, article = ("in other folds", "an") if group == "image" else (f"by {group}", "a")
    words = {"by lesion or patient": split, "by lesion": split, "By lesion": split.capitalize()}
    words |= {" a lesion": f" {article} {group}", "lesion": group, "Lesion": group.capitalize()}
    text = text.replace(dataset, Path(dataset).name) if ":" in dataset else text
    parts = re.split(r"(\n\n|`[^`\n]*`)", text)
    for number, part in enumerate(parts):
        if "Skin-7" not in part and not part.startswith("`"):
            for word, own in words.items():
                parts[number] = parts[number].replace(word, own)
    return "".join(parts)


def _own(of: str = "another set") -> bool:
    """Whether the report is on a set of the reader's own, and what shows `of` has no place in it."""
    return bool(of) and _asked["dataset"].startswith("folder:")


def show_figure(figure: plt.Figure, name: str, title: str, caption: str, alt: str, of: str = "") -> None:
    """Write `<name>.png` and `.pdf` to the figures folder, close the figure, and show it with its caption.

    Title, caption and `alt` (what the figure shows, for those who cannot see it) are kept inside the PNG. `of` names
    the set that it shows where that is not the notebook's: a report on a set of one's own leaves it out.
    """
    plt.close(figure)
    if _own(of):
        return show_text(f"*Left out, for it shows {of}: {title}.*")
    if _asked["dataset"] in title:  # a picture that is copied elsewhere still says what it shows
        told = _asked["dataset"] + ", synthetic" * (_asked["dataset"] == "lesions")
        told += ", smoke profile: no result" * (_asked["profile"] == "smoke")
        figure.text(1, 0, told, ha="right", va="top", fontsize=7, color="0.5")
    title, caption, alt = (reworded(text, _asked["dataset"]) for text in (title, caption, alt))
    for text in figure.findobj(plt.Text):
        text.set_text(reworded(text.get_text(), _asked["dataset"]))
    path, drawn, small, about = figures_dir() / f"{name}.png", io.BytesIO(), io.BytesIO(), PngInfo()
    for key, words in {"Title": title, "Description": caption, "Comment": alt}.items():
        about.add_text(key, words)
    figure.savefig(drawn)
    with PIL.Image.open(drawn) as image, whole_file(path) as target:  # 256 colours take a third of the room
        image.convert("RGB").quantize(256).save(target, pnginfo=about)
        image.convert("RGB").reduce(2).quantize(256).save(small, "png")  # a page wants half the size
    with whole_file(path.with_suffix(".pdf")) as target:
        figure.savefig(target, metadata={"Title": title, "Subject": caption, "CreationDate": None})
    display(Image(small.getvalue(), alt=alt))
    show_text(f"**{title}.** {caption}")


def show_table(table: pd.DataFrame, name: str, caption: str, shown=None, of="", folder="tables") -> None:
    """Write `tables/<name>.csv` (every digit) and `.md` (`shown`, to read), and show the Markdown; `of`: as above.

    In the `folder` `machine`, which git ignores, are tables of this machine and its seconds.
    """
    if _own(of):
        return show_text(f"*Left out, for it shows {of}: {caption}.*")
    text = f"**{caption}**\n\n{results.markdown(table if shown is None else shown)}\n"
    results.save_rows(table, name, folder)
    with whole_file(figures_dir() / folder / f"{name}.md") as target:
        target.write_text(reworded(text, _asked["dataset"]), encoding="utf-8")
    show_text(text)


def show_text(markdown: str) -> None:
    """Show sentences that were computed."""
    display(Markdown(reworded(markdown, _asked["dataset"])))


def answer(sentences: str, of: str = "") -> None:
    """Show the answer to the notebook's question: at most three sentences, with numbers of the notebook's tables."""
    if _asked["profile"] == "smoke":
        sentences = "No answer: one epoch of training is no result."
    elif _own(of):
        sentences = f"We answer this for {of} only; the tables above have the numbers of your images."
    show_text(f"> {' '.join(sentences.split())}")


def sliders(draw: Callable, **choices) -> None:
    """In JupyterLab, let a reader choose the arguments of `draw`; elsewhere show nothing: a page holds no widget."""
    if "JPY_SESSION_NAME" in os.environ:  # set by the server of JupyterLab, not where notebooks run headless
        import ipywidgets

        ipywidgets.interact(draw, **choices)
