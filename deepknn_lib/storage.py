"""Where data lives, and files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def data_dir() -> Path:
    """The folder for downloads, caches and runs: `DEEPKNN_DATA`, else `data/` of this checkout."""
    given = os.environ.get("DEEPKNN_DATA")
    return Path(given).expanduser().resolve() if given else repository() / "data"


def figures_dir() -> Path:
    """The folder that figures and tables are written to: `DEEPKNN_FIGURES`, else `figures/` of this checkout."""
    given = os.environ.get("DEEPKNN_FIGURES")
    return Path(given).expanduser().resolve() if given else repository() / "figures"


def repository() -> Path:
    """Root of the checkout this library is imported from."""
    return Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it once the block has ended without an error.

    What was at `path` stays until then, also when the machine stops in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
