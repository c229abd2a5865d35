"""The synthetic lesions: what they promise about classes, looks, views and nuisances."""
import hashlib
from dataclasses import replace

import numpy as np
import pytest

from deepknn_lib import synthetic
from deepknn_lib.looks import CLASS_NAMES, CONFUSABLE, LOOKS, SKIN7_COUNTS
from deepknn_lib.synthetic import make_lesions

# sha256 of make_lesions(70, 32, 3).images and of make_lesions(400).images
SHA256_SMALL = "186008ed878ccbd7c28251be278deec447cd33db1d5f5195c6aab3f2346052fa"
SHA256_SET_OF_400 = "8130eaa7616d49331df12449b1e5e682f15093d3b32fdefb7c86b0d94fd41342"


def _sha256(images):
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def lesions():
    return make_lesions(400)


def _draw(names, key, size=48):
    """Images of the given classes from one fixed set of draws, whatever the class."""
    n = len(names)
    rng = np.random.default_rng(key)
    noise = np.zeros((n, 3, size, size))
    return synthetic._render(names, rng.random((n, 400)), rng.random((n, 120)), noise).astype(float)


def test_shapes_and_types(lesions):
    assert lesions.images.shape == (400, 3, 48, 48) and lesions.images.dtype == np.uint8
    assert lesions.labels.shape == (400,) and lesions.labels.dtype == np.int64
    assert len(set(lesions.ids)) == 400 and lesions.ids.shape == lesions.groups.shape == (400,)
    assert all(i.rsplit("_", 1)[0] == g for i, g in zip(lesions.ids, lesions.groups, strict=True))
    assert len({image.tobytes() for image in lesions.images}) == 400


@pytest.mark.parametrize("n_images", [56, 57, 400, 3000, 10015])
def test_counts_follow_skin7(n_images):
    counts = synthetic._class_counts(n_images)
    skin7 = np.array([SKIN7_COUNTS[name] for name in CLASS_NAMES])
    assert counts.sum() == n_images and counts.min() >= 8
    if n_images >= 3000:
        assert np.abs(counts - n_images * skin7 / skin7.sum()).max() < 1
    if n_images == 10015:
        assert (counts == skin7).all()


def test_labels_have_these_counts(lesions):
    assert (np.bincount(lesions.labels) == synthetic._class_counts(400)).all()


def test_one_lesion_has_one_class_and_a_few_views(lesions):
    groups, first, views = np.unique(lesions.groups, return_index=True, return_counts=True)
    assert (lesions.labels[first][np.searchsorted(groups, lesions.groups)] == lesions.labels).all()
    assert views.max() <= 4
    assert 0.68 < len(groups) / 400 < 0.82          # 7,470 / 10,015 = 0.746 in HAM10000


def test_order_says_nothing_about_the_class(lesions):
    place = np.arange(400)[lesions.labels == CLASS_NAMES.index("nv")].mean()
    assert abs(place - 199.5) < 20


def _rings(images):
    """Mean colour in rings around the middle: turning and flipping do not change it much."""
    axis = np.arange(48) - 23.5
    radius = np.hypot(*np.meshgrid(axis, axis))
    rings = [images[:, :, (radius >= r) & (radius < r + 4)].mean(2) for r in range(0, 20, 4)]
    return np.concatenate(rings, 1)


def test_views_of_a_lesion_resemble_each_other(lesions):
    nv = lesions.labels == CLASS_NAMES.index("nv")
    rings, groups = _rings(lesions.images[nv].astype(float)), lesions.groups[nv]
    distance = np.linalg.norm(rings[:, None] - rings, axis=2)
    same = groups[:, None] == groups
    others = np.median(distance[~same])
    np.fill_diagonal(same, False)
    assert np.median(distance[same]) < 0.6 * others
    np.fill_diagonal(distance, np.inf)
    rows = np.flatnonzero(same.any(1))
    assert same[rows, distance[rows].argmin(1)].mean() > 5 * (same[rows].sum(1) / (nv.sum() - 1)).mean()


def test_views_of_a_lesion_are_different_photographs(lesions):
    again = np.flatnonzero(lesions.groups[1:] == lesions.groups[:-1])
    images = lesions.images.astype(float)
    assert np.abs(images[again] - images[again + 1]).mean((1, 2, 3)).min() > 3


def test_classes_have_looks_that_differ(monkeypatch):
    monkeypatch.setattr("deepknn_lib.looks.AMBIGUOUS_SHARE", 0.0)
    for name, looks in LOOKS.items():
        assert 2 <= len(looks) <= 4 and sum(look.share for look in looks) == pytest.approx(1)
        seen = []
        for look in looks:
            monkeypatch.setitem(LOOKS, name, (replace(look, share=1.0),))
            seen.append(_draw([name] * 12, 1)[:, :, 16:32, 16:32])
        monkeypatch.setitem(LOOKS, name, looks)
        for i in range(1, len(seen)):
            assert np.abs(seen[i] - seen[0]).mean() > 8, (name, looks[i].name)


def test_some_looks_are_nearer_to_another_class(monkeypatch):
    """From the same draws, the nevus-like melanoma looks more like a nevus than like another melanoma."""
    monkeypatch.setattr("deepknn_lib.looks.AMBIGUOUS_SHARE", 0.0)
    drawn = {}
    for name in ("mel", "nv"):
        for look in LOOKS[name]:
            with monkeypatch.context() as patch:
                patch.setitem(LOOKS, name, (replace(look, share=1.0),))
                drawn[look.name] = _draw([name] * 12, 1)
    gap = {other: np.abs(drawn["nevus-like"] - drawn[other]).mean() for other in drawn}
    assert min(gap[look.name] for look in LOOKS["nv"]) < min(gap["multi-coloured"], gap["amelanotic pink"])
    assert all(name not in others and set(others) <= set(LOOKS) for name, others in CONFUSABLE.items())


def test_nuisances_do_not_know_the_class():
    """The same draws under two class names give the same surroundings: hair, ruler, light, corner, skin."""
    margin = np.ones((48, 48), dtype=bool)
    margin[2:-2, 2:-2] = False
    nv = _draw(["nv"] * 40, 2)
    for name in ("vasc", "df", "akiec"):
        other = _draw([name] * 40, 2)
        assert np.mean(np.abs(nv - other)[:, :, margin] <= 2) > 0.95
        assert np.mean(np.abs(nv - other)[:, :, 20:28, 20:28] <= 2) < 0.3
    corner = nv[:, :, :2, :2].mean((1, 2, 3))
    assert 4 < (corner < 60).sum() < 25             # some have the dermoscope's black corner, most have not


def test_same_arguments_same_bytes(lesions):
    assert _sha256(make_lesions(70, 32, 3).images) == SHA256_SMALL
    assert _sha256(lesions.images) == SHA256_SET_OF_400
    other = make_lesions(70, 32, 4)
    assert _sha256(other.images) != SHA256_SMALL and (other.labels != make_lesions(70, 32, 3).labels).any()


@pytest.mark.parametrize("arguments, word", [
    (dict(n_images=55), "56"), (dict(n_images=100.0), "n_images"), (dict(n_images=True), "n_images"),
    (dict(size=15), "16"), (dict(size=513), "512"), (dict(seed=-1), "seed"), (dict(seed=None), "seed")])
def test_bad_arguments_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        make_lesions(**{"n_images": 56, **arguments})
