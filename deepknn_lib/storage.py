"""Where data lives, files that appear whole or not at all, and a short digest of contents."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def data_dir() -> Path:
    """The folder for downloads, caches and runs: `DEEPKNN_DATA`, else `data/` of this checkout."""
    return Path(os.environ.get("DEEPKNN_DATA") or repository() / "data").expanduser().resolve()


def figures_dir() -> Path:
    """The folder that figures and tables are written to: `DEEPKNN_FIGURES`, else `figures/` of this checkout."""
    return Path(os.environ.get("DEEPKNN_FIGURES") or repository() / "figures").expanduser().resolve()


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


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Let one process at a time make what is at `path`; the others wait for it."""
    from filelock import FileLock

    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def digest(*parts: bytes | str | Path | np.ndarray) -> str:
    """Twelve hexadecimal digits of the sha256 of the parts: bytes, text, the content of files, arrays."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        elif isinstance(part, Path):
            part = part.read_bytes()
        elif isinstance(part, str):
            part = part.encode(errors="surrogateescape")
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:12]


def load_state(path: Path) -> dict:
    """What `torch.save` wrote, read without unpickling code; ValueError if the file is not whole."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} cannot be read ({error!r:.200}); remove it to begin anew") from error
