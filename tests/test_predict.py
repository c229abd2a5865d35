"""Predicting images with a finished run: its own test images, bad files, far images, and folders that are no run."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import draw_classes
from PIL import Image
from safetensors.torch import save_file
from sets import REFUSED, put

from deepknn_lib import cli
from deepknn_lib.models import build_network
from deepknn_lib.study import experiments
from deepknn_lib.study.predict import predict
from deepknn_lib.study.runs import make_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set of 3 × 12 images, runs of several kinds on it, one with pretrained weights, and its test images alone."""
    root = tmp_path_factory.mktemp("predict")
    name, weights = draw_classes(root / "set", ("a", "=b", "c"), size=(40, 30)), root / "w.safetensors"
    save_file(build_network("resnet18", seed=5).backbone.state_dict(), weights)
    kinds = ("deep-knn", "weighted-ce", "knn", "mlp-deep-knn")
    runs = {kind: make_run(name, kind, "smoke") for kind in kinds}
    other = {"backbone": "resnet18", "weights": str(weights), "precision": "bf16"}
    runs["pretrained"] = make_run(name, "knn", "smoke", **other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKNN_DATA", str(root / "data"))
        results = experiments.execute_all(runs.values(), "cpu", 1)
        done = {kind: (r, experiments.Entry.of(r.run).folder) for kind, r in zip(runs, results, strict=True)}
    weights.unlink()  # predicting needs no weights but the run's
    for image in done["knn"][0].arrays["test_ids"]:
        put(root / "test" / image, (root / "set" / image).read_bytes())
    return root, done


@pytest.mark.parametrize("kind", ["deep-knn", "weighted-ce", "pretrained"])
def test_a_runs_own_test_images_have_its_features_and_predictions(place, kind):
    root, done = place
    (result, folder), arrays = done[kind], done[kind][0].arrays
    found = predict(folder, root / "test")
    table, names = found.table, np.array(result.record["class_names"])
    order = [[*arrays["test_ids"]].index(image.split("/test/")[1]) for image in table["image"]]
    np.testing.assert_allclose(found.features, arrays["test_features"][order], rtol=1e-5, atol=1e-5)
    assert table["class"].tolist() == names[result.predict()[order]].tolist()
    shares = table.filter(regex="^class_").eq(table["class"], axis=0).mean(axis=1)
    if kind == "weighted-ce":
        shares = torch.from_numpy(arrays["test_logits"][order]).softmax(1).max(1).values.numpy()
    np.testing.assert_allclose(table["share"], shares, rtol=1e-4)
    first = arrays["train_features"][[[*arrays["train_ids"]].index(name) for name in table["neighbour_1"]]]
    assert np.allclose(table["distance_1"], np.linalg.norm(first - found.features, axis=1), atol=1e-4)
    assert [name.split("/")[0] for name in table["neighbour_1"]] == table["class_1"].tolist()
    # Far is further than 99 per cent of the test images.
    away = np.linalg.norm(arrays["test_features"][:, None] - arrays["train_features"], axis=2)
    limit = np.percentile(np.sort(away, axis=1)[:, 4], 99)
    assert table["far"].tolist() == (table["distance_5"] > limit).tolist() and table["far"].sum() == 1
    assert f"1 of {len(table)} images are far" in found.told and f"further than {limit:.3g}," in found.told


def test_the_command_judges_by_a_run_as_it_was_asked_for_and_names_bad_files(place, capsys, tmp_path):
    root, done = place
    words = f"run --method ce-knn --profile smoke --device cpu --k-predict 3 --out {tmp_path / 'run'}".split()
    assert cli.main([*words, "--dataset", done["weighted-ce"][0].run.dataset]) == 0
    images = shutil.copytree(root / "test", tmp_path / "some")
    put(images / "broken.png", b"no picture")
    command = ["predict", "--run", str(tmp_path / "run"), "--images", str(images)]
    files = ["--out", str(tmp_path / "t.csv"), "--figure", str(tmp_path / "t.png")]
    assert cli.main([*command, *files]) == 1
    told, table = capsys.readouterr().err, pd.read_csv(tmp_path / "t.csv")
    assert "broken.png cannot be read" in told and "images are far from" in told
    assert len(table) == len([*(root / "test").rglob("*.png")]) and table.columns[-1] == "distance_3"
    votes = table[["class_1", "class_2", "class_3"]].eq(table["class"], axis=0).mean(axis=1)
    assert np.allclose(table["share"], votes, atol=1e-5)
    assert "'=b" in {*table["class_1"]}  # No table runs a formula.
    with Image.open(tmp_path / "t.png") as drawn:
        assert drawn.width > 4 * 150 and drawn.height > 2 * 150 * len(table)
    (root / "set").rename(root / "away")  # without the run's images there is a table, and no picture
    status = [cli.main([*command, *figure]) for figure in ([], files)]
    (root / "away").rename(root / "set")
    assert status == [1, 2] and "there is no folder" in capsys.readouterr().err
    first, other = sorted((root / "set").rglob("*.png"))[:2]
    kept = first.read_bytes()
    put(first, other.read_bytes())
    status = cli.main([*command, *files])
    put(first, kept)
    assert status == 2 and "has other images or labels than the run had" in capsys.readouterr().err


def test_a_scan_of_12_bits_is_shown_as_those_of_the_run_were(data, tmp_path):
    rng = np.random.default_rng(0)
    for n in range(36):
        grey = 900 + 700 * (n % 3 - 1) + rng.integers(0, 1600 if n == 35 else 200, (32, 32))
        put(tmp_path / "set" / "abc"[n % 3] / f"{n}.png", grey.astype(np.uint16))
    run = make_run(f"folder:{tmp_path / 'set'}", "knn", "smoke")
    result = experiments.execute(run, "cpu")
    own = result.arrays["train_ids"][0]  # alone it is darker than the whole set
    found = predict(experiments.Entry.of(run).folder, tmp_path / "set" / own)
    np.testing.assert_allclose(found.features[0], result.arrays["train_features"][0], atol=1e-5)
    assert found.table["neighbour_1"].tolist() == [own] and result.record["white"] == 4095
    put(tmp_path / "bright.png", np.full((32, 32), 5000, np.uint16))
    with pytest.raises(ValueError, match="go up to 5000, those of the set to 4095"):
        predict(experiments.Entry.of(run).folder, tmp_path / "bright.png")


def test_no_image_depends_on_those_beside_it(place, tmp_path):
    folder, grey = place[1]["knn"][1], np.arange(900, dtype=np.uint16).reshape(30, 30)
    put(tmp_path / "b.png", grey // 8)
    alone = predict(folder, tmp_path).features[0]
    put(tmp_path / "a.png", grey // 4)
    put(tmp_path / "c.png", 4 * grey)  # 12 bits, which a run on images of 8 bits has no white for
    found = predict(folder, tmp_path)
    assert np.array_equal(found.features[1], alone) and len(found.table) == 2
    assert (
        "c.png cannot be read (ValueError: its greys go up to 3596, those of the set to 255" in found.bad[0]
    )


@pytest.mark.parametrize(("option", "value", "said"), REFUSED["predict"])
def test_what_cannot_be_meant_is_said_and_writes_nothing(place, capsys, tmp_path, option, value, said):
    root, done = place
    shutil.copytree(done["knn"][1], tmp_path / "cut")
    put(tmp_path / "cut" / "model.safetensors", b"cut")
    put(tmp_path / "bad" / "x.png", b"x")
    options = {"--run": done["deep-knn"][1], "--images": root / "test", "--out": tmp_path / "t.csv"}
    options[option] = done[value][1] if value in done else tmp_path / value
    assert cli.main(["predict", *(str(part) for pair in options.items() for part in pair)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: ") and re.search(said, told[-1]) and not (tmp_path / "t.csv").exists()
