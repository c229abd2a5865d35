"""The synthetic lesions: what they promise about classes, looks, views and nuisances."""

import hashlib

import numpy as np
import pytest

from deepknn_lib.datasets import CATALOG, synthetic
from deepknn_lib.datasets.synthetic import CLASS_NAMES, CONFUSABLE, LOOKS

# sha256 of images (16 pixels), labels, ids and groups, as the first version of this repository drew them
SHA256 = "f968e35fc39dd0f2a996e02bd6a3f6f21a281b896ba44ff320ff0ef8f0035dbb"


@pytest.fixture(scope="module")
def lesions():
    return synthetic.describe()


def drawn(names, key, size=48):
    """Images of the given classes from one fixed set of draws, whatever the class."""
    n = len(names)
    rng = np.random.default_rng(key)
    noise = np.zeros((n, 3, size, size))
    return synthetic._render(names, rng.random((n, 400)), rng.random((n, 120)), noise).astype(float)


def test_every_byte_is_as_it_always_was(lesions):
    labels, ids, groups = lesions
    images = np.concatenate(list(synthetic.draw(16)))
    assert images.shape == (3000, 3, 16, 16) and images.dtype == np.uint8 and labels.dtype == np.int64
    parts = (images.tobytes(), labels.tobytes(), "\n".join(ids).encode(), "\n".join(groups).encode())
    assert hashlib.sha256(b"".join(parts)).hexdigest() == SHA256


def test_classes_have_skin7s_proportions(lesions):
    counts = dict(zip(CLASS_NAMES, np.bincount(lesions[0]).tolist(), strict=True))
    assert counts == CATALOG["lesions"].counts
    skin7 = np.array(list(CATALOG["skin7"].counts.values()))
    assert np.abs(np.array(list(counts.values())) - 3000 * skin7 / skin7.sum()).max() < 1


def test_one_lesion_has_one_class_and_a_few_views(lesions):
    labels, ids, groups = lesions
    unique, first, views = np.unique(groups, return_index=True, return_counts=True)
    assert (labels[first][np.searchsorted(unique, groups)] == labels).all()
    assert views.max() <= 4 and 0.68 < len(unique) / 3000 < 0.82  # 7,470 / 10,015 = 0.746 in HAM10000
    assert len(set(ids)) == 3000 and all(i.rsplit("_", 1)[0] == g for i, g in zip(ids, groups, strict=True))
    assert (
        abs(np.arange(3000)[labels == CLASS_NAMES.index("nv")].mean() - 1499.5) < 60
    )  # the order says nothing


def test_views_of_a_lesion_are_different_photographs_that_resemble_each_other(lesions):
    labels, _, groups = lesions
    images = np.concatenate([block for block, _ in zip(synthetic.draw(48), range(50), strict=False)]).astype(
        float
    )
    nv = labels[:400] == CLASS_NAMES.index("nv")
    axis = np.arange(48) - 23.5
    radius = np.hypot(*np.meshgrid(axis, axis))
    rings = [images[nv][:, :, (radius >= r) & (radius < r + 4)].mean(2) for r in range(0, 20, 4)]
    distance = np.linalg.norm(np.concatenate(rings, 1)[:, None] - np.concatenate(rings, 1), axis=2)
    same = groups[:400][nv][:, None] == groups[:400][nv]
    others = np.median(distance[~same])
    np.fill_diagonal(same, False)
    assert np.median(distance[same]) < 0.6 * others
    again = np.flatnonzero(groups[1:400] == groups[:399])
    assert np.abs(images[again] - images[again + 1]).mean((1, 2, 3)).min() > 3


def test_a_class_has_looks_that_differ_and_some_are_nearer_to_another_class(monkeypatch):
    monkeypatch.setattr(synthetic, "AMBIGUOUS_SHARE", 0.0)
    seen = {}
    for name, looks in LOOKS.items():
        assert 2 <= len(looks) <= 4 and sum(look.share for look in looks) == pytest.approx(1)
        assert name not in CONFUSABLE[name] and set(CONFUSABLE[name]) <= set(LOOKS)
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
    margin = np.ones((48, 48), dtype=bool)
    margin[2:-2, 2:-2] = False
    nv = drawn(["nv"] * 40, 2)
    for name in ("vasc", "df", "akiec"):
        other = drawn([name] * 40, 2)
        assert np.mean(np.abs(nv - other)[:, :, margin] <= 2) > 0.95
        assert np.mean(np.abs(nv - other)[:, :, 20:28, 20:28] <= 2) < 0.3
    corner = nv[:, :, :2, :2].mean((1, 2, 3))
    assert 4 < (corner < 60).sum() < 25  # some have the dermoscope's black corner, most have not


@pytest.mark.parametrize("size", [15, 513])
def test_a_size_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(ValueError, match="16 to 512"):
        next(synthetic.draw(size))
