"""The synthetic lesions: what they promise about classes, looks, views and nuisances."""

import hashlib
from itertools import islice

import numpy as np
import pytest
from numpy.random import RandomState

from deepknn_lib.datasets import CATALOG, synthetic
from deepknn_lib.datasets.synthetic import CLASS_NAMES, LOOKS

LABELS, IDS, GROUPS = synthetic.describe()
SHA256 = "19f0ef9dc7f572ffbd245ccb2acac90b86f346a3e34f9def05e52d3394c494c4"


def test_every_byte_is_the_same_on_every_machine():
    images = np.concatenate(list(synthetic.draw(16)))
    assert images.shape == (3000, 3, 16, 16) and images.dtype == np.uint8 and LABELS.dtype == np.int64
    parts = (images.tobytes(), LABELS.tobytes(), "\n".join(IDS).encode(), "\n".join(GROUPS).encode())
    assert hashlib.sha256(b"".join(parts)).hexdigest() == SHA256


def test_classes_have_skin7s_proportions_and_lesions_a_few_views():
    counts, skin7 = np.bincount(LABELS), np.array(list(CATALOG["skin7"].counts.values()))
    assert dict(zip(CLASS_NAMES, counts.tolist(), strict=True)) == CATALOG["lesions"].counts
    assert np.abs(counts - 3000 * skin7 / skin7.sum()).max() < 1
    unique, first, views = np.unique(GROUPS, return_index=True, return_counts=True)
    assert (LABELS[first][np.searchsorted(unique, GROUPS)] == LABELS).all()  # one lesion has one class
    assert len({*IDS}) == 3000 and all(i.rsplit("_", 1)[0] == g for i, g in zip(IDS, GROUPS, strict=True))
    assert views.max() == 4 and len(unique) == 2228  # 0.743 of the images; 7,470 / 10,015 = 0.746 in HAM10000
    middle = np.flatnonzero(LABELS == CLASS_NAMES.index("nv")).mean()
    assert abs(middle - 1499.5) < 60  # the order says nothing


def test_views_of_a_lesion_differ_and_some_are_near_duplicates():
    pairs = [block[:2].astype(float) for block in islice(synthetic.draw(48), 700) if len(block) > 1]
    gaps = np.array([np.abs(first - second).mean() for first, second in pairs])
    assert gaps.min() > 1 and 0.05 < (gaps < 8).mean() < 0.2 and np.median(gaps) > 15


def test_looks_differ_and_the_surroundings_do_not_know_the_class(monkeypatch):
    monkeypatch.setattr(synthetic, "AMBIGUOUS", 0.0)
    photographs = {}
    for name, looks in LOOKS.items():
        assert 2 <= len(looks) <= 4 and sum(look.share for look in looks) == pytest.approx(1)
        photographs[name] = [synthetic._photograph(name, n, 0, 48).astype(float) for n in range(40)]
    nv = np.array(photographs["nv"])
    corners = nv[:, :, :2, :2].mean((1, 2, 3))
    assert 4 < (corners < 60).sum() < 25  # some have the dermoscope's black corner
    for name in ("vasc", "df", "akiec"):
        gap = np.abs(nv - photographs[name])
        assert np.median(gap[..., :2, :2]) < 2 < 20 < np.median(gap[..., 20:28, 20:28])
    seen = [vars(synthetic._look("mel", RandomState(n)))["size"] for n in range(50)]
    assert np.std(seen) > 0.05  # lesions of one class differ
