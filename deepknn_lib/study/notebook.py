"""What every notebook's first cells need: what was asked for, one style, and how to show figures and tables."""

import os
import random
from collections import namedtuple

import numpy as np
import pandas as pd
import torch
from IPython.display import Image, Markdown, display

from deepknn_lib.storage import figures_dir
from deepknn_lib.study import figures, results
from deepknn_lib.study.experiments import pick_device, versions
from deepknn_lib.study.runs import PROFILES

# What a notebook was asked to do: `seeds` are a tuple, `device` is `cpu` or `cuda`, `figures` the folder to write to.
Session = namedtuple("Session", "profile dataset seeds device figures")


def start(profile: str = "", dataset: str = "lesions", seeds: str = "", device: str = "auto") -> Session:
    """Set style and seeds, print what this notebook runs with.

    An empty `profile` is `DEEPKNN_PROFILE`, else `demo`. `seeds` have commas between (`"0,1,2"`); empty: the profile's.
    ValueError for a profile, seed or device that there is not.
    """
    profile = profile or os.environ.get("DEEPKNN_PROFILE") or "demo"
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",") if seeds):
        raise ValueError(f"seeds are whole numbers with commas between, like '0,1,2'; got {seeds!r}")
    chosen = tuple(map(int, seeds.split(","))) if seeds else tuple(PROFILES[profile]["seeds"])
    # This warning of tqdm would print folders of this machine.
    figures.use_style()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    where = pick_device(device).type
    print(f"profile {profile}, data set {dataset}, seeds {', '.join(map(str, chosen))}, device {where}")
    print(versions())
    return Session(profile, dataset, chosen, where, figures_dir())


def show_figure(figure, name: str, title: str, caption: str, alt: str) -> None:
    """Save a figure as PNG and PDF and show it with its caption and alt text."""
    display(Image(figures.save_figure(figure, name, title, caption, alt), alt=alt))
    show_text(f"**{title}.** {caption}")


def show_table(table: pd.DataFrame, name: str, caption: str, shown: pd.DataFrame | None = None) -> None:
    """Save a table as CSV and Markdown and show the Markdown."""
    show_text(results.save_table(table, name, caption, shown))


def show_text(markdown: str) -> None:
    """Show sentences that were computed."""
    display(Markdown(markdown))
