"""What every notebook's first cells need: where things are, which runs were asked for, one style, and how to show."""

import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepknn_lib import plots, tables
from deepknn_lib.execution import pick_device, versions
from deepknn_lib.runs import PROFILES
from deepknn_lib.storage import figures_dir


@dataclass(frozen=True)
class Session:
    """What a notebook was asked to do.

    Attributes
    ----------
    profile, dataset : str
    seeds : tuple of int
    device : str
        `cpu` or `cuda`.
    figures : Path
        Where figures and tables go.
    """

    profile: str
    dataset: str
    seeds: tuple[int, ...]
    device: str
    figures: Path


def start(profile: str = "", dataset: str = "lesions", seeds: str = "", device: str = "auto") -> Session:
    """Set style and seeds, print what this notebook runs with.

    Parameters
    ----------
    profile : str
        `smoke`, `demo`, `finetune` or `paper`; empty: `DEEPKNN_PROFILE`, else `demo`.
    dataset : str
        See `datasets.load_dataset`.
    seeds : str
        Comma-separated, `"0,1,2"`; empty: the profile's.
    device : {"auto", "cpu", "cuda"}

    Raises
    ------
    ValueError
        If one of them cannot be meant.
    """
    profile = profile or os.environ.get("DEEPKNN_PROFILE") or "demo"
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    try:
        chosen = tuple(int(seed) for seed in seeds.split(",")) if seeds else PROFILES[profile]["seeds"]
    except ValueError as error:
        raise ValueError(f"seeds must be whole numbers with commas between, like '0,1,2', got {seeds!r}") from error
    warnings.filterwarnings("ignore", message="IProgress not found")  # timm's; it names this machine's folders
    plots.use_style()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    where = pick_device(device).type
    print(f"profile {profile}, data set {dataset}, seeds {', '.join(map(str, chosen))}, device {where}")
    print(versions())
    return Session(profile, dataset, chosen, where, figures_dir())


def show_figure(figure, name: str, title: str, caption: str, alt: str) -> None:
    """Save a figure as PNG and PDF and show it with its caption and alt text."""
    from IPython.display import Image, Markdown, display

    png = plots.save_figure(figure, name, title, caption, alt)
    display(Image(png, alt=alt))
    display(Markdown(f"**{title}.** {caption}"))


def show_table(table: pd.DataFrame, name: str, caption: str, shown: pd.DataFrame | None = None) -> None:
    """Save a table as CSV and Markdown and show the Markdown."""
    from IPython.display import Markdown, display

    display(Markdown(tables.save_table(table, name, caption, shown)))


def show_text(markdown: str) -> None:
    """Show sentences that were computed."""
    from IPython.display import Markdown, display

    display(Markdown(markdown))
