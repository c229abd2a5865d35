"""The synthetic lesions: what they promise about classes, looks, views and nuisances."""

import hashlib
from itertools import islice

import numpy as np

from deepknn_lib.datasets import CATALOG, load, synthetic

LABELS, IDS, GROUPS = synthetic.describe()
SHA256 = "19f0ef9dc7f572ffbd245ccb2acac90b86f346a3e34f9def05e52d3394c494c4"


def test_every_byte_is_the_same_on_every_machine():
    images = np.concatenate(list(synthetic.draw(16)))
    parts = (images.tobytes(), LABELS.tobytes(), "\n".join(IDS).encode(), "\n".join(GROUPS).encode())
    assert hashlib.sha256(b"".join(parts)).hexdigest() == SHA256
    folds = np.append(load.image_folds(LABELS), load.group_folds(LABELS, GROUPS))
    assert hashlib.sha256(folds.tobytes()).hexdigest()[:12] == "340f3ade165d"


def test_classes_have_skin7s_proportions_and_some_views_of_a_lesion_are_nearly_the_same():
    counts, skin7 = np.bincount(LABELS), np.array(list(CATALOG["skin7"].counts.values()))
    assert np.abs(counts - 3000 * skin7 / skin7.sum()).max() < 1 and len({*GROUPS}) == 2228
    views = [block[:2].astype(float) for block in islice(synthetic.draw(48), 300) if len(block) > 1]
    gaps = np.array([np.abs(first - second).mean() for first, second in views])
    assert gaps.min() > 1 and 0.05 < (gaps < 8).mean() < 0.2 and np.median(gaps) > 15


def test_looks_differ_and_the_surroundings_do_not_know_the_class(monkeypatch):
    monkeypatch.setattr(synthetic, "AMBIGUOUS", 0.0)

    def photographs(name):
        return np.array([synthetic._photograph(name, n, 0, 48).astype(float) for n in range(40)])

    for name in ("vasc", "df", "akiec"):
        gap = np.abs(photographs("nv") - photographs(name))
        assert np.median(gap[..., :2, :2]) < 2 < 20 < np.median(gap[..., 20:28, 20:28])
