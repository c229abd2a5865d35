"""The synthetic lesions: what they promise about classes, looks, views and nuisances."""

import hashlib

import numpy as np
import pytest

from deepknn_lib.datasets import CATALOG, synthetic
from deepknn_lib.datasets.synthetic import CLASS_NAMES, CONFUSABLE, LOOKS

LABELS, IDS, GROUPS = synthetic.describe()
# sha256 of images (16 pixels), labels, ids and groups, as the first version of this repository drew them
SHA256 = "f968e35fc39dd0f2a996e02bd6a3f6f21a281b896ba44ff320ff0ef8f0035dbb"


def drawn(names, key, size=48):
    """Images of the given classes from one fixed set of draws, whatever the class."""
    rng, noise = np.random.default_rng(key), np.zeros((len(names), 3, size, size))
    draws = rng.random((len(names), 400)), rng.random((len(names), 120))
    return synthetic._render(names, *draws, noise).astype(float)


def test_every_byte_is_as_it_always_was():
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
    assert views.max() <= 4 and 0.68 < len(unique) / 3000 < 0.82  # 7,470 / 10,015 = 0.746 in HAM10000
    middle = np.flatnonzero(LABELS == CLASS_NAMES.index("nv")).mean()
    assert abs(middle - 1499.5) < 60  # the order says nothing


def test_views_of_a_lesion_are_different_photographs_that_resemble_each_other():
    blocks = synthetic.draw(48)
    images = np.concatenate([next(blocks) for _ in range(50)]).astype(float)
    nv, groups, axis = LABELS[:400] == CLASS_NAMES.index("nv"), GROUPS[:400], np.arange(48) - 23.5
    radius = np.hypot(*np.meshgrid(axis, axis))
    rings = [images[nv][:, :, (radius >= r) & (radius < r + 4)].mean(2) for r in range(0, 20, 4)]
    distance = np.linalg.norm(np.concatenate(rings, 1)[:, None] - np.concatenate(rings, 1), axis=2)
    same = groups[nv][:, None] == groups[nv]
    assert np.median(distance[same & ~np.eye(len(same), dtype=bool)]) < 0.6 * np.median(distance[~same])
    again = np.flatnonzero(groups[1:] == groups[:-1])
    assert np.abs(images[again] - images[again + 1]).mean((1, 2, 3)).min() > 3


def test_a_class_has_looks_that_differ_and_some_are_nearer_to_another_class(monkeypatch):
    monkeypatch.setattr(synthetic, "AMBIGUOUS_SHARE", 0.0)
    seen = {}
    for name, looks in LOOKS.items():
        assert 2 <= len(looks) <= 4 and sum(look.share for look in looks) == pytest.approx(1)
        assert name not in CONFUSABLE[name] and {*CONFUSABLE[name]} <= {*LOOKS}
        for look in looks:
            with monkeypatch.context() as patch:
                patch.setitem(LOOKS, name, (look._replace(share=1.0),))
                seen[look.name] = drawn([name] * 12, 1)
            middle = (seen[look.name] - seen[looks[0].name])[:, :, 16:32, 16:32]
            assert look is looks[0] or np.abs(middle).mean() > 8, (name, look.name)
    gap = {other: np.abs(seen["nevus-like"] - images).mean() for other, images in seen.items()}
    assert min(gap[look.name] for look in LOOKS["nv"]) < min(gap["multi-coloured"], gap["amelanotic pink"])


def test_nuisances_do_not_know_the_class():
    """The same draws under two class names give the same surroundings: hair, ruler, light, corner, skin."""
    nv, margin = drawn(["nv"] * 40, 2), np.pad(np.zeros((44, 44), bool), 2, constant_values=True)
    for name in ("vasc", "df", "akiec"):
        other = np.abs(nv - drawn([name] * 40, 2)) <= 2
        assert other[:, :, margin].mean() > 0.95 and other[:, :, 20:28, 20:28].mean() < 0.3
    assert 4 < (nv[:, :, :2, :2].mean((1, 2, 3)) < 60).sum() < 25  # some have the dermoscope's black corner
