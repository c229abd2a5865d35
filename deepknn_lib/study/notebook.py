"""What every notebook's first cells need: what was asked for, one style, and how to show figures and tables."""

import io
import json
import os
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
import seaborn as sns
import torch
from IPython.display import Image, Markdown, display
from PIL.PngImagePlugin import PngInfo

from deepknn_lib.datasets.load import SPLITS, entry_of, index_of
from deepknn_lib.storage import figures_dir, repository, whole_file
from deepknn_lib.study import results
from deepknn_lib.study.experiments import pick_device, versions
from deepknn_lib.study.runs import PROFILES, make_run

# What the notebook that runs was asked to do: `seeds` are a tuple, `device` is `cpu` or `cuda`, `figures` the folder to
# write to, `own` says whether the data set is a folder of the reader's, and `splits` are those to show.
Session = namedtuple("Session", "profile dataset seeds device figures own splits")
_session = Session("demo", "lesions", (), "cpu", figures_dir(), own=False, splits=SPLITS)
SMOKE = "The smoke profile: one epoch, a test of the machinery. Its numbers are no results."


def start(profile: str = "", dataset: str = "lesions", seeds: str = "", device: str = "auto") -> Session:
    """Set style and random numbers, print what this notebook runs with, and make `exercises` of notebooks/ importable.

    An empty `profile` is `DEEPKNN_PROFILE`, else `demo`. `seeds` have commas between (`"0,1,2"`); empty: the profile's.
    ValueError for a profile, seed or device that there is not.
    """
    global _session
    profile = profile or os.environ.get("DEEPKNN_PROFILE") or "demo"
    dataset = make_run(dataset, "knn", profile).dataset  # A ValueError names the profiles.
    chosen = tuple(map(int, seeds.split(","))) if seeds else tuple(PROFILES[profile]["seeds"])
    own = dataset.startswith("folder:")
    splits = SPLITS[own and group_of(dataset) == "image" :]  # In a folder without groups the two are one.
    _session = Session(profile, dataset, chosen, pick_device(device).type, figures_dir(), own, splits)
    style = json.loads(Path(__file__).with_name("style.json").read_text(encoding="utf-8"))
    sns.set_theme(context="notebook", style="ticks", font="DejaVu Sans", rc=style)
    sys.path.append(str(repository() / "notebooks"))
    np.random.seed(0)
    torch.manual_seed(0)
    told = f"profile {profile}, data set {dataset}, seeds {', '.join(map(str, chosen))}"
    print(f"{told}, device {_session.device}\n{versions()}")
    if profile == "smoke":
        show_text(f"> **{SMOKE}**")
    return _session


@cache
def group_of(dataset: str) -> str:
    """What several images of a set share: a `lesion` or a `patient`; `image` where no groups are known."""
    try:
        index = index_of(entry_of(dataset))
    except (ValueError, OSError):  # the notebook says what is wrong when it loads the set
        return "image"
    named = any("lesion" in name.lower() for name in index.class_names)  # a class keeps its name
    return "lesion" if named else index.unit or "image"


def reworded(text: str, dataset: str = "") -> str:
    """A text of the notebooks, which say lesion, in the words of a set; and a folder's name in place of its path.

    Code between backticks is kept, and so is a piece of a paragraph, from code to code, that speaks of Skin-7. The set
    is that of the notebook that runs, if none is named.
    """
    dataset = dataset or _session.dataset
    group = group_of(dataset)
    split, article = f"by {group}", "an" if group == "image" else "a"
    if group == "image" and not dataset.startswith("folder:"):
        split = "in other folds"  # There is a split by image besides.
    words = {"by lesion or patient": split, "by lesion": split}
    words |= {"a lesion": f"{article} {group}", "lesion": group}

    def own(found: re.Match) -> str:
        word = words[found[0].lower()]
        return word.capitalize() if found[0][0].isupper() else word

    if dataset.startswith("folder:"):
        text = text.replace(dataset, Path(dataset).name)
    pieces = re.split(r"(```.*?```|`[^`\n]*`|\n\n)", text, flags=re.S)
    for number, piece in enumerate(pieces):
        if not piece.startswith("`") and "Skin-7" not in piece:
            pieces[number] = re.sub(rf"\b({'|'.join(words)})", own, piece, flags=re.I)
    return "".join(pieces)


def show_figure(figure: plt.Figure, name: str, title: str, caption: str, alt: str, of: str = "") -> None:
    """Write `<name>.png` and `.pdf` to the figures folder, close the figure, and show it with its caption.

    Title, caption and `alt` (what the figure shows, for those who cannot see it) are kept inside the PNG. `of` names
    the set that it shows where that is not the notebook's: a report on a set of one's own leaves it out.
    """
    plt.close(figure)
    if of and _session.own:
        return show_text(f"*Left out, for it shows {of}: {title}.*")
    if _session.dataset in title:  # a picture that is copied elsewhere still says what it shows
        told = _session.dataset + ", synthetic" * (_session.dataset == "lesions")
        told += ", smoke profile: no result" * (_session.profile == "smoke")
        figure.text(1, 0, told, ha="right", va="top", fontsize=7, color="0.5")
    for text in figure.findobj(plt.Text):
        text.set_text(reworded(text.get_text()))
    title, caption, alt = map(reworded, (title, caption, alt))
    path, drawn, small, words = figures_dir() / f"{name}.png", io.BytesIO(), io.BytesIO(), PngInfo()
    for key, text in {"Title": title, "Description": caption, "Comment": alt}.items():
        words.add_text(key, text)
    figure.savefig(drawn)
    # 256 colours take a third of the room, and the notebook shows half the size.
    with PIL.Image.open(drawn) as image, whole_file(path) as target:
        image.convert("RGB").quantize(256).save(target, pnginfo=words)
        image.convert("RGB").reduce(2).quantize(256).save(small, "png")
    with whole_file(path.with_suffix(".pdf")) as target:
        figure.savefig(target, metadata={"Title": title, "Subject": caption, "CreationDate": None})
    display(Image(small.getvalue(), alt=alt))
    show_text(f"**{title}.** {caption}")


def show_table(table: pd.DataFrame, name: str, caption: str, shown=None, of="", folder="tables") -> None:
    """Write `tables/<name>.csv` (every digit) and `.md` (`shown`, to read), and show the Markdown; `of`: as above.

    In the `folder` `machine`, which git ignores, are tables of this machine and its seconds.
    """
    if of and _session.own:
        return show_text(f"*Left out, for it shows {of}: {caption}.*")
    text = f"**{caption}**\n\n{results.markdown(table if shown is None else shown)}\n"
    results.save_rows(table, name, folder)
    with whole_file(figures_dir() / folder / f"{name}.md") as target:
        target.write_text(reworded(text), encoding="utf-8")
    show_text(text)


def show_text(markdown: str) -> None:
    """Show sentences that were computed."""
    display(Markdown(reworded(markdown)))


def answer(sentences: str, tables: str, of: str = "") -> None:
    """Show the answer to the notebook's question: at most three sentences, with numbers of these tables, by name."""
    names = ", ".join(f"`{name}`" for name in tables.split())
    text = f"> {' '.join(sentences.split())}\n>\n> *Numbers from the tables {names}.*"
    if _session.profile == "smoke":
        text = "> No answer: one epoch of training is no result."
    elif of and _session.own:
        text = f"> We answer this for {of} only; the tables above have the numbers of your images."
    show_text(text)


def sliders(draw: Callable, **choices) -> None:
    """In JupyterLab, let a reader choose the arguments of `draw`; elsewhere show nothing: a page holds no widget."""
    if "JPY_SESSION_NAME" in os.environ:  # set by the server of JupyterLab, not where notebooks run headless
        import ipywidgets

        ipywidgets.interact(draw, **choices)
