"""How tightly classes are packed, against plain loops; hubs by hand; maps that are kept."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deepknn_lib import embeddings
from deepknn_lib.embeddings import compactness, hubness, random_rows, tsne_points, umap_points


@pytest.fixture
def points():
    """Forty points of three overlapping classes in five dimensions."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20, 14, 6])
    return (rng.normal(size=(40, 5)) + labels[:, None]).astype(np.float32), labels


# Compactness


def loops(features, labels, k):
    """The three measures as their definitions say, pair by pair."""
    n, classes = len(labels), sorted(set(labels.tolist()))
    away = [[math.dist(a, b) for b in features.tolist()] for a in features.tolist()]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = np.mean([away[i][j] for i, j in pairs if labels[i] == labels[j]])
    between = np.mean([away[i][j] for i, j in pairs if labels[i] != labels[j]])
    silhouettes, pure = [], []
    for i in range(n):
        mean_to = {c: np.mean([away[i][j] for j in range(n) if labels[j] == c and j != i]) for c in classes}
        own, nearest = mean_to[labels[i]], min(v for c, v in mean_to.items() if c != labels[i])
        silhouettes.append((nearest - own) / max(nearest, own))
        near = sorted((j for j in range(n) if j != i), key=lambda j, i=i: away[i][j])[:k]
        pure.append(np.mean([labels[j] == labels[i] for j in near]))

    def over_classes(values):
        return np.mean([np.mean([v for v, label in zip(values, labels, strict=True) if label == c]) for c in classes])

    return {"ratio": within / between, "silhouette": over_classes(silhouettes), "purity": 100 * over_classes(pure)}


@pytest.mark.parametrize("k", [1, 5])
def test_compactness_is_what_its_definitions_say(points, k):
    assert compactness(*points, k=k) == pytest.approx(loops(*points, k), rel=1e-5)


def test_compactness_does_not_depend_on_scale_place_or_order(points):
    features, labels = points
    order = np.random.default_rng(1).permutation(len(labels))
    expected = compactness(features, labels)
    assert compactness(100 * features + 3, labels) == pytest.approx(expected, rel=1e-4)
    assert compactness(features[order], labels[order]) == pytest.approx(expected, rel=1e-5)


def test_separated_classes_are_pure_and_tight():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 10)
    features = np.eye(3)[labels] + 1e-3 * rng.normal(size=(30, 3))
    found = compactness(features, labels)
    assert found["purity"] == 100 and found["ratio"] < 0.01 and found["silhouette"] > 0.99


def test_a_class_in_two_far_islands_is_pure_but_not_tight():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 0], 10)
    features = np.repeat([[-9.0], [0.0], [9.0]], 10, axis=0) + 1e-3 * rng.normal(size=(30, 1))
    found = compactness(features, labels)
    assert found["purity"] == 100
    assert found["ratio"] > 0.5 and found["silhouette"] < 0.5


def test_one_image_alone_in_its_class_is_left_out(points):
    features, labels = points
    alone = np.append(labels, 3)
    found = compactness(np.concatenate([features, features[:1] + 50]), alone)
    assert found["purity"] == pytest.approx(compactness(*points)["purity"])
    assert all(math.isfinite(value) for value in found.values())


def test_of_many_images_a_part_is_measured(points):
    features, labels = points
    chosen = random_rows(len(labels), 25, 0)
    assert compactness(features, labels, sample=25) == compactness(features[chosen], labels[chosen])


def test_random_rows_are_all_or_a_sample_without_repeats():
    np.testing.assert_array_equal(random_rows(5, 5, 0), np.arange(5))
    rows = random_rows(1000, 50, 0)
    assert len(set(rows.tolist())) == 50 and rows.max() > 500
    assert (random_rows(1000, 50, 1) != rows).any()


# Hubs


def test_hubness_by_hand():
    # rows 0..3 occur 4, 1, 1 and 0 times: mean 1.5, deviations 2.5, -0.5, -0.5, -1.5
    found = hubness(np.array([[0, 1], [0, 2], [0, 0]]), 4)
    third, second = np.mean([2.5**3, -0.125, -0.125, -3.375]), np.mean([6.25, 0.25, 0.25, 2.25])
    assert found["skewness"] == pytest.approx(third / second**1.5)
    assert (found["largest"], found["unused"]) == (4, 25)
    assert found["top"] == pytest.approx(100 * 4 / 6)  # a hundredth of four images is one


def test_when_all_serve_equally_often_there_is_no_hub():
    assert hubness(np.arange(200).reshape(40, 5), 200) == {"skewness": 0, "largest": 1, "unused": 0, "top": 1}


# Maps


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """An empty data folder, and how often t-SNE was computed."""
    from sklearn.manifold import TSNE

    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "own"))
    calls, real = [], TSNE.fit_transform

    def fit_transform(self, features, *rest):
        calls.append(len(features))
        return real(self, features, *rest)

    monkeypatch.setattr(TSNE, "fit_transform", fit_transform)
    return calls


def test_tsne_is_made_once_for_the_same_features(points, counted):
    features = points[0]
    first, rows = tsne_points(features)
    again, _ = tsne_points(features.copy())
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(rows, np.arange(40))
    assert first.shape == (40, 2) and np.isfinite(first).all() and counted == [40]
    tsne_points(features, seed=1)
    tsne_points(features[:-1])
    tsne_points(features + np.float32(0.1))
    assert counted == [40, 40, 39, 40]


def test_tsne_takes_a_random_part_of_many(points, counted):
    map_of, rows = tsne_points(points[0], sample=30)
    assert map_of.shape == (30, 2) and len(set(rows.tolist())) == 30 and counted == [30]
    assert set(points[1][rows]) == {0, 1, 2}
    assert len(tsne_points(points[0], sample=20)[0]) == 20  # another sample is another map


def test_a_map_that_failed_leaves_nothing_behind(points, counted, tmp_path, monkeypatch):
    def torn(path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(embeddings.np, "savez", torn)
    with pytest.raises(OSError, match="disk full"):
        tsne_points(points[0])
    monkeypatch.undo()
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "own"))
    assert not list((tmp_path / "own" / "maps").iterdir())
    assert tsne_points(points[0])[0].shape == (40, 2)


def test_umap_is_kept_too_and_places_the_test_part(points, tmp_path, monkeypatch):
    class Halves:  # the real one takes half a minute to compile; notebook 05 runs it
        def __init__(self, **settings):
            assert settings["random_state"] == 3

        def fit_transform(self, features):
            self.fitted = True
            return features[:, :2] / 2

        def transform(self, features):
            assert self.fitted
            return features[:, :2] / 2

    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / "own"))
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Halves))
    train, test = points[0][:30], points[0][30:]
    first = umap_points(train, test, seed=3)
    np.testing.assert_array_equal(first[1], test[:, :2] / 2)
    assert [path.name.split("-")[0] for path in (tmp_path / "own" / "maps").iterdir()] == ["umap"]
    monkeypatch.setitem(sys.modules, "umap", None)  # an import would now fail
    for part, again in zip(first, umap_points(train, test, seed=3), strict=True):
        np.testing.assert_array_equal(part, again)
