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

from deepknn_lib import cli
from deepknn_lib.models import build_network
from deepknn_lib.study import experiments
from deepknn_lib.study.predict import predict
from deepknn_lib.study.runs import make_run

KINDS = ("deep-knn", "weighted-ce", "deep-knn-ft", "knn", "mlp-deep-knn", "pretrained")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set of 3 × 12 images, runs of several kinds on it, one with pretrained weights, and its test images alone."""
    root = tmp_path_factory.mktemp("predict")
    name, weights = draw_classes(root / "set", ("a", "=b", "c"), size=(40, 30)), root / "w.safetensors"
    save_file(build_network("resnet18", seed=5).backbone.state_dict(), weights)
    runs = {kind: make_run(name, kind, "smoke") for kind in KINDS[:-1]}
    runs["pretrained"] = make_run(name, "knn", "smoke", backbone="resnet18", weights=str(weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKNN_DATA", str(root / "data"))
        results = experiments.execute_all(runs.values(), "cpu", 1)
        done = {kind: (r, experiments.folder_of(r.run)) for kind, r in zip(runs, results, strict=True)}
    weights.unlink()  # predicting needs no weights but the run's
    for image in done["knn"][0].arrays["test_ids"]:
        (root / "test" / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "set" / image, root / "test" / image)
    return root, done


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mlp-deep-knn"])
def test_a_runs_own_test_images_have_its_features_and_predictions(place, kind):
    root, done = place
    (result, folder), arrays = done[kind], done[kind][0].arrays
    found = predict(folder, root / "test")
    table, names = found.table, np.array(result.record["class_names"])
    order = [[*arrays["test_ids"]].index(image.split("/test/")[1]) for image in table["image"]]
    np.testing.assert_allclose(found.features, arrays["test_features"][order], rtol=1e-5, atol=1e-5)
    assert table["class"].tolist() == names[result.predict()[order]].tolist()
    assert table.columns[-1] == "distance_5" and result.record["white"] is None
    if kind == "weighted-ce":
        shares = torch.from_numpy(arrays["test_logits"][order]).softmax(1).max(1).values.numpy()
    else:
        shares = table.filter(regex="^class_").eq(table["class"], axis=0).mean(axis=1)
    np.testing.assert_allclose(table["share"], shares, rtol=1e-4)
    first = arrays["train_features"][[[*arrays["train_ids"]].index(name) for name in table["neighbour_1"]]]
    assert np.allclose(table["distance_1"], np.linalg.norm(first - found.features, axis=1), atol=1e-4)
    assert [name.split("/")[0] for name in table["neighbour_1"]] == table["class_1"].tolist()


def test_far_is_further_than_99_per_cent_of_the_test_images(place):
    root, done = place
    result, folder = done["knn"]
    Image.new("RGB", (9, 9), "black").save(root / "far.png")
    found = predict(folder, root / "far.png")
    train, test = (result.arrays[f"{part}_features"] for part in ("train", "test"))
    fifth = np.sort(np.linalg.norm(test[:, None] - train, axis=2), axis=1)[:, 4]
    assert found.table["far"].tolist() == [True] and found.table["distance_5"][0] > fifth.max()
    told = "1 of 1 images are far from all that the run knows: their neighbour 5 is further than "
    assert told + f"{np.percentile(fifth, 99):.3g}, as it is for 1 %" in found.told
    assert predict(folder, root / "test").table["far"].sum() == 1  # of seven or eight, the furthest


def test_a_run_that_was_written_out_is_judged_as_it_was_asked_for(place, tmp_path):
    root, done = place
    run = done["weighted-ce"][0].run
    words = f"run --method ce-knn --profile smoke --device cpu --k-predict 3 --out {tmp_path}".split()
    assert cli.main([*words, "--dataset", run.dataset]) == 0
    found = predict(tmp_path, root / "test")
    assert found.result.run.method == "ce-knn" and found.table.columns[-1] == "distance_3"
    votes = found.table[["class_1", "class_2", "class_3"]].eq(found.table["class"], axis=0).mean(axis=1)
    assert np.allclose(found.table["share"], votes)


def test_the_command_writes_table_and_picture_and_names_bad_files(place, capsys):
    root, done = place
    images = shutil.copytree(root / "test", root / "some")
    (images / "broken.png").write_bytes(b"no picture")
    command = ["predict", "--run", str(done["weighted-ce"][1]), "--images", str(images)]
    assert cli.main([*command, "--out", str(root / "t.csv"), "--figure", str(root / "t.png")]) == 1
    told, table = capsys.readouterr().err, pd.read_csv(root / "t.csv")
    assert "broken.png cannot be read" in told and "images are far from" in told
    assert len(table) == len([*(root / "test").rglob("*.png")]) and "'=b" in {*table["class_1"]}
    with Image.open(root / "t.png") as drawn:
        assert drawn.width > 6 * 150 and drawn.height > 2 * 150 * len(table)
    (root / "set").rename(root / "away")  # without the run's images there is a table, and no picture
    assert cli.main(command) == 1 and capsys.readouterr().out.count("\n") == len(table) + 1
    status = cli.main([*command, "--figure", str(root / "f.png")])
    (root / "away").rename(root / "set")
    assert status == 2 and "there is no folder" in capsys.readouterr().err and not (root / "f.png").exists()


def test_a_scan_of_12_bits_is_shown_as_those_of_the_run_were(data, tmp_path):
    rng = np.random.default_rng(0)
    for n in range(36):
        (tmp_path / "set" / "abc"[n % 3]).mkdir(parents=True, exist_ok=True)
        grey = (900 + 700 * (n % 3 - 1) + rng.integers(0, 1600 if n == 35 else 200, (32, 32))).astype(
            np.uint16
        )
        Image.fromarray(grey).save(tmp_path / "set" / "abc"[n % 3] / f"{n}.png")
    run = make_run(f"folder:{tmp_path / 'set'}", "knn", "smoke")
    result = experiments.execute(run, "cpu")
    own = result.arrays["train_ids"][0]  # alone it is darker than the whole set
    found = predict(experiments.folder_of(run), tmp_path / "set" / own)
    np.testing.assert_allclose(found.features[0], result.arrays["train_features"][0], atol=1e-5)
    assert found.table["neighbour_1"].tolist() == [own] and result.record["white"] == 4095


@pytest.mark.parametrize("option, value, said", [
    ("--figure", "t", "a picture ends with one of .png"), ("--out", "bad", "bad is a folder; name a file"),
    ("--run", "empty", "empty is no run, .*run.json.*; give a folder that `run --out` wrote"),
    ("--run", "mlp-deep-knn", "learns on the feature vectors of another run.*predict with a run of knn"),
    ("--run", "cut", "cut is no run, or not whole .*: model.safetensors changed since"),
    ("--images", "nowhere", "there is no image at"),
    ("--images", "bad", "no image at .* can be read: .*x.png cannot be read"),
    ("--figure", "t.xyz", "xyz"),
])  # fmt: skip
def test_what_cannot_be_meant_is_said_in_a_line_and_writes_nothing(
    place, capsys, tmp_path, option, value, said
):
    root, done = place
    shutil.copytree(done["knn"][1], tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    options = {"--run": done["deep-knn"][1], "--images": root / "test", "--out": tmp_path / "t.csv"}
    options[option] = done[value][1] if value in done else tmp_path / value
    assert cli.main(["predict", *(str(part) for pair in options.items() for part in pair)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: ") and re.search(said, told[-1]) and not (tmp_path / "t.csv").exists()
