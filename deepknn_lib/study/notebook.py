"""What every notebook's first cells need: what was asked for, one style, and how to show figures and tables."""

import io
import os
import random
import sys
from collections import namedtuple
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import torch
from IPython.display import Image, Markdown, display

from deepknn_lib.storage import figures_dir, repository, whole_file
from deepknn_lib.study import figures, results
from deepknn_lib.study.experiments import pick_device, versions
from deepknn_lib.study.runs import PROFILES, make_run

# What a notebook was asked to do: `seeds` are a tuple, `device` is `cpu` or `cuda`, `figures` the folder to write to.
Session = namedtuple("Session", "profile dataset seeds device figures")


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
    print(f"profile {profile}, data set {dataset}, seeds {', '.join(map(str, chosen))}, device {where}")
    print(versions())
    return Session(profile, dataset, chosen, where, figures_dir())


def show_figure(figure: plt.Figure, name: str, title: str, caption: str, alt: str) -> None:
    """Write `<name>.png` and `.pdf` to the figures folder, close the figure, and show it with its caption.

    Title, caption and `alt` (what the figure shows, for those who cannot see it) are kept inside the PNG.
    """
    path, small = figures_dir() / f"{name}.png", io.BytesIO()
    with whole_file(path) as target:
        about = {"Title": title, "Description": caption, "Comment": alt, "Software": None}
        figure.savefig(target, metadata=about)
    with whole_file(path.with_suffix(".pdf")) as target:
        figure.savefig(target, metadata={"Title": title, "Subject": caption, "CreationDate": None})
    plt.close(figure)
    with PIL.Image.open(path) as image:  # On a page, half the size and 256 colours are enough.
        image.convert("RGB").reduce(2).quantize(256).save(small, "png")
    display(Image(small.getvalue(), alt=alt))
    show_text(f"**{title}.** {caption}")


def show_table(table: pd.DataFrame, name: str, caption: str, shown: pd.DataFrame | None = None) -> None:
    """Write `tables/<name>.csv` (every digit) and `.md` (`shown`, to read), and show the Markdown."""
    text = f"**{caption}**\n\n{results.markdown(table if shown is None else shown)}\n"
    results.save_rows(table, name)
    with whole_file(figures_dir() / "tables" / f"{name}.md") as target:
        target.write_text(text, encoding="utf-8")
    show_text(text)


def show_text(markdown: str) -> None:
    """Show sentences that were computed."""
    display(Markdown(markdown))


def answer(sentences: str) -> None:
    """Show the answer to the notebook's question: at most three sentences, with numbers of the notebook's tables."""
    show_text(f"> {' '.join(sentences.split())}")


def sliders(draw: Callable, **choices) -> None:
    """In JupyterLab, let a reader choose the arguments of `draw`; elsewhere show nothing: a page holds no widget."""
    if "JPY_SESSION_NAME" in os.environ:  # set by the server of JupyterLab, not where notebooks run headless
        import ipywidgets

        ipywidgets.interact(draw, **choices)


def compare(given, right, tolerance: float = 1e-6) -> bool:
    """Say whether the answer to an exercise is right, else how far off, and return it; what is right stays unsaid.

    Numbers and arrays (of one shape, or ValueError) may differ by `tolerance`, relative to the largest; anything else
    has to be equal.
    """
    try:
        one, other = np.asarray(given, float), np.asarray(right, float)
    except (TypeError, ValueError):
        told = "" if given == right else f"{given!r} is not it"
    else:
        if one.shape != other.shape:
            raise ValueError(f"the answer has shape {one.shape}; the exercise asks for {other.shape}")
        off = np.abs(one - other).max(initial=0) / max(np.abs(other).max(initial=0), 1e-12)
        told = "" if off <= tolerance else f"off by {100 * off:.3g} % (of the largest right value)"
    print(f"not yet: {told}" if told else "right")
    return not told
