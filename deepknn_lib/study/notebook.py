"""What every notebook's first cells need: what was asked for, one style, and how to show figures and tables."""

import io
import os
import random
from collections import namedtuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import torch
from IPython.display import Image, Markdown, display

from deepknn_lib.storage import figures_dir, whole_file
from deepknn_lib.study import figures, results
from deepknn_lib.study.experiments import pick_device, versions
from deepknn_lib.study.runs import PROFILES, make_run

# What a notebook was asked to do: `seeds` are a tuple, `device` is `cpu` or `cuda`, `figures` the folder to write to.
Session = namedtuple("Session", "profile dataset seeds device figures")


def start(profile: str = "", dataset: str = "lesions", seeds: str = "", device: str = "auto") -> Session:
    """Set style and seeds, print what this notebook runs with.

    An empty `profile` is `DEEPKNN_PROFILE`, else `demo`. `seeds` have commas between (`"0,1,2"`); empty: the profile's.
    ValueError for a profile, seed or device that there is not.
    """
    profile = profile or os.environ.get("DEEPKNN_PROFILE") or "demo"
    make_run(dataset, "knn", profile)  # A ValueError names the profiles.
    chosen = tuple(map(int, seeds.split(","))) if seeds else tuple(PROFILES[profile]["seeds"])
    figures.use_style()
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
