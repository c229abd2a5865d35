"""A data folder of its own for every test session, so that nobody's cache is read or written."""

import os

import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that no worker of pytest is left alone with it at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_workers", "test_repository"))


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory):
    """One folder for the whole session; the synthetic images are drawn once, also for pytest's workers together."""
    folder, all_workers = tmp_path_factory.mktemp("data"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        all_workers = all_workers.parent
    (all_workers / "drawn").mkdir(exist_ok=True)
    (folder / "cache").symlink_to(all_workers / "drawn")
    return folder


@pytest.fixture(autouse=True)
def own_folders(shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPKNN_DATA", str(shared_data))
    monkeypatch.setenv("DEEPKNN_FIGURES", str(tmp_path / "figures"))
    monkeypatch.delenv("DEEPKNN_WEIGHTS", raising=False)
    monkeypatch.delenv("DEEPKNN_SKIN7_FOLDS", raising=False)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of this test's own."""
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def toy():
    """Uint8 images (60, 3, 32, 32) of three classes that differ in brightness, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [30, 20, 10])
    images = rng.integers(0, 90, (60, 3, 32, 32)) + 80 * labels[:, None, None, None]
    return images.astype(np.uint8), labels.astype(np.int64)
