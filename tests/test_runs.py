"""Runs: their keys, their cache, their grids; executing them; and the tables made of them."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from deepknn_lib import cli, execution, experiments, tables
from deepknn_lib.models import build_network
from deepknn_lib.runs import METHODS, PROFILES, TABLE2, TABLE3, TABLE4, Run, grid, make_run, sweeps
from deepknn_lib.training import extract_features

TINY = {"epochs": 1, "image_size": 32, "lr": 0.05}


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(runs_folder):
    """Two seeds of three methods on the synthetic images, split by lesion."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DEEPKNN_DATA", str(runs_folder))
    patch.setenv("DEEPKNN_PROGRESS", str(runs_folder / "progress"))
    runs = grid("lesions", "smoke", ("deep-knn", "weighted-ce", "ce-knn"), ("grouped",), (0, 1))
    made = experiments.execute_all(runs, "cpu")
    patch.undo()
    return made


def test_the_key_ignores_only_what_does_not_change_the_training():
    run = make_run("lesions", "deep-knn")
    assert run.key == make_run("lesions", "deep-knn").key == replace(run, k_predict=1).key
    other = {
        "dataset": "skin7", "split": "grouped", "fold": 2, "backbone": "resnet18", "weights": "imagenet", "image_size": 64,
        "seed": 1, "k": 3, "m": 3, "margin": 0.3, "normalize": "l2", "epochs": 3, "batch_size": 32, "sampling": "random",
        "classes_per_batch": 4, "lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, "lr_decay_every": 7,
        "evaluate_on": "validation", "soft": True, "warmup": 1, "search_every": 9,
    }  # fmt: skip
    assert set(other) == {f.name for f in fields(Run)} - {"method", "k_predict", "base"}
    keys = {replace(run, **{name: value}).key for name, value in other.items()}
    assert len(keys) == len(other) and run.key not in keys


def test_keys_are_the_same_on_every_machine():
    assert Run().key == "lesions-deep-knn-paper-s0-9a54658c1549"


def test_methods_share_what_they_can():
    ce = make_run("lesions", "weighted-ce")
    assert make_run("lesions", "ce-knn").key == ce.key
    assert make_run("lesions", "deep-knn-ft").base.key == ce.key
    assert make_run("lesions", "deep-knn-ft").key != make_run("lesions", "deep-knn").key
    assert replace(ce, k=7, m=2, margin=0.9).key == ce.key  # cross-entropy knows none of them
    three = {make_run("lesions", method).base.key for method in TABLE3[1:]}
    assert three == {make_run("lesions", "knn").key}  # the features are the same for all of Table 3


def test_the_papers_tables_are_made_of_known_methods():
    assert set(TABLE2) | set(TABLE3) | set(TABLE4) <= set(METHODS)
    for methods in (TABLE2, TABLE3, TABLE4):
        assert len(set(methods)) == len(methods)
        assert all(METHODS[make_run("lesions", m, p).method].title for m in methods for p in PROFILES)
    assert [m for m in METHODS if METHODS[m].on_features] == list(TABLE3[1:])


def test_the_seed_of_features_that_are_not_trained_matters_only_where_weights_are_drawn():
    def keys(**changes):
        return [make_run("lesions", "knn", seed=seed, **changes).key for seed in (0, 1)]

    drawn, pretrained = keys(), keys(weights="imagenet")
    assert drawn[0] != drawn[1] and pretrained[0] == pretrained[1] and "-s0-" in pretrained[0]
    assert drawn[1].startswith("lesions-knn-paper-s1-")
    first = make_run("lesions", "knn", weights="imagenet")
    assert replace(first, lr=9.0, k=1, epochs=3, sampling="random").key == first.key  # nothing is trained
    others = {replace(first, **{n: v}).key for n, v in (("normalize", "l2"), ("split", "grouped"), ("image_size", 64))}
    assert len(others) == 3 and first.key not in others
    trained = [make_run("lesions", "deep-knn", seed=seed, weights="imagenet").key for seed in (0, 1)]
    assert trained[0] != trained[1]


def test_a_run_on_features_hands_its_settings_to_its_base():
    shared = {"split": "grouped", "fold": 2, "seed": 4, "image_size": 64, "weights": "imagenet", "backbone": "resnet18"}
    run = make_run("lesions", "mlp-deep-knn", evaluate_on="validation", **shared)
    for name, value in (shared | {"evaluate_on": "validation"}).items():
        assert getattr(run.base, name) == getattr(run, name) == value
    assert run.base.method == "knn" and run.key != replace(run, base=replace(run.base, normalize="l2")).key


@pytest.mark.parametrize("wrong, said", [
    ({"method": "svm"}, "unknown method 'svm'"),
    ({"k_predict": 0}, "k_predict must be at least 1"),
    ({"evaluate_on": "train"}, "evaluate_on is"),
    ({"method": "deep-knn-ft"}, "needs a base run"),
    *[({"method": method}, f"{method} needs a base run") for method in TABLE3[1:]],
    ({"base": Run()}, "deep-knn takes no base run"),
    *[({"method": method, "search_every": 5}, "leave search_every at 0") for method in ("triplet", "weighted-ce", "knn")],
    ({"method": "mlp-deep-knn", "search_every": 5, "base": Run(method="knn")}, "leave search_every at 0"),
])  # fmt: skip
def test_a_run_that_cannot_be_meant_is_an_error(wrong, said):
    with pytest.raises(ValueError, match=said):
        Run(**wrong)


def test_make_run_names_what_is_unknown():
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        make_run("lesions", "knn", "fast")
    with pytest.raises(ValueError, match="no field colour"):
        make_run("lesions", "knn", colour=3)


def test_only_deep_knn_on_images_searches_the_whole_set():
    searching = {m for m in METHODS for p in PROFILES if make_run("lesions", m, p).search_every}
    assert searching == {"deep-knn-global"}
    assert make_run("lesions", "deep-knn-ft", search_every=3).recipe.search_every == 3
    assert make_run("lesions", "deep-knn-global").recipe.loss == "deep-knn"


def test_sd198_is_drawn_as_published_nine_classes_of_ten_images():
    run = make_run("sd198", "deep-knn", "paper")
    assert (run.batch_size, run.classes_per_batch, run.sampling) == (90, 9, "balanced")
    assert (run.epochs, run.lr_decay_every, run.backbone, run.image_size) == (90, 30, "resnet50", 256)
    from deepknn_lib.training import _draw

    labels = torch.arange(27).repeat_interleave(20)
    for batch in _draw(labels, run.recipe, torch.Generator().manual_seed(0)):
        assert sorted(labels[batch].bincount(minlength=27).tolist()) == [0] * 18 + [10] * 9
    assert make_run("sd198", "weighted-ce", "paper").classes_per_batch is None  # needs no positives
    assert make_run("skin7", "deep-knn", "paper").classes_per_batch is None


def test_the_grid_completes_one_seed_before_the_next():
    runs = grid("lesions", "demo")
    assert len(runs) == len(TABLE2) * 2 * len(PROFILES["demo"]["seeds"])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.backbone for run in grid("lesions", "demo", TABLE4, backbone="small-vgg")} == {"small-vgg"}


@pytest.mark.parametrize("profile", PROFILES)
def test_sweeps_change_one_thing_about_the_reference(profile):
    groups = sweeps("skin7", profile, seeds=(0, 1))
    counts = {name: len(runs) for name, runs in groups.items() if name != "margin"}
    assert counts == {"K and M": 18, "search": 2, "batches": 6}  # nine settings a seed, one, three
    for runs in groups.values():
        assert len({run.key for run in runs}) == len(runs) and {run.seed for run in runs} == {0, 1}
        assert {run.split for run in runs} == {"grouped"}
    reference = make_run("skin7", "deep-knn", profile, split="grouped")
    short = make_run("skin7", "deep-knn", profile, split="grouped", **PROFILES[profile]["short"])
    assert reference.key in {run.key for run in groups["K and M"]}
    assert all(short.key in {run.key for run in groups[name]} for name in ("margin", "batches"))
    counts = [(run.k, run.m, run.k_predict) for run in groups["K and M"] if run.seed == 0]
    assert counts == [(k, m, k) for k in (3, 5, 7) for m in (1, 5, 9)]
    searched = replace(groups["search"][0], method="deep-knn", search_every=0)
    assert searched.key == reference.key  # alike but for the search


# Executing


def test_a_second_execute_reads_the_cache(monkeypatch):
    run = make_run("lesions", "knn", "smoke")
    first = experiments.execute(run, "cpu")
    monkeypatch.setattr(experiments, "carry_out", lambda *_: pytest.fail("trained again"))
    second = experiments.execute(replace(run, k_predict=1), "cpu")
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert len(first.predict(5)) == len(first.arrays["test_labels"])


def test_progress_says_trained_once_then_cached(monkeypatch, tmp_path):
    progress = tmp_path / "progress"
    monkeypatch.setenv("DEEPKNN_PROGRESS", str(progress))
    runs = [make_run("lesions", "deep-knn", "smoke", seed=3, k_predict=k) for k in (1, 5)]
    experiments.execute_all(runs, "cpu")
    experiments.execute_all(runs, "cpu")
    events = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()]
    assert [e.get("status", "epoch") for e in events] == ["epoch", "trained", "cached"]
    assert "epoch 1/1" in events[0]["text"]


def test_nothing_is_left_behind_by_a_run_that_fails():
    run = make_run("lesions", "deep-knn", "smoke", batch_size=8)
    with pytest.raises(ValueError, match="raise batch_size"):
        experiments.execute(run, "cpu")
    assert not list((experiments.data_dir() / "runs").glob(f"*{run.key}*"))


def test_an_unknown_backbone_and_missing_weights_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown backbone 'resnet5000'"):
        experiments.execute(make_run("lesions", "knn", "smoke", backbone="resnet5000"), "cpu")
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="resnet18.safetensors.*there, or unset"):
        experiments.execute(make_run("lesions", "knn", "smoke", backbone="resnet18", weights="imagenet"), "cpu")


def test_local_weights_are_loaded_with_their_classifier_left_out(monkeypatch, tmp_path):
    import timm
    from safetensors.torch import save_file

    from deepknn_lib.models import build_network

    source = timm.create_model("resnet18", num_classes=11)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in source.state_dict().items()},
              tmp_path / "resnet18.safetensors")  # fmt: skip
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    network = build_network("resnet18", weights="imagenet", seed=9)
    loaded = network.backbone.conv1.weight
    assert loaded.dtype.is_floating_point and np.allclose(loaded.detach(), source.conv1.weight.detach(), atol=1e-3)


def test_validation_is_cut_from_the_training_part_and_shares_no_lesion():
    run = make_run("lesions", "knn", "smoke", split="grouped")
    test, validation = experiments.parts(run), experiments.parts(replace(run, evaluate_on="validation"))
    assert set(validation.test.ids) <= set(test.train.ids)
    assert set(validation.train.ids) == set(test.train.ids) - set(validation.test.ids)
    assert not set(validation.train.groups) & set(validation.test.groups)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        execution.pick_device("cuda")
    assert execution.pick_device("auto").type == "cpu"


def test_results_rows_carry_settings_scores_and_origin(results):
    rows = tables.results_table(results)
    assert len(rows) == 2 * (2 + 1 + 2)  # seeds × (two votes, softmax, two votes)
    by_hand = 100 * np.mean(results[0].predict(1) == results[0].arrays["test_labels"])
    assert rows.iloc[0]["acc"] == pytest.approx(by_hand)
    origin = ["dataset", "split", "fold", "seed", "device", "versions", "seconds"]
    assert rows[[*origin, "acc", "mcr", "rs"]].notna().all().all()
    assert rows.loc[rows["method"] == "weighted-ce", "margin"].isna().all()
    assert rows.loc[rows["method"] == "deep-knn", "margin"].notna().all()


def test_summary_holds_mean_sd_and_an_interval_around_them(results):
    table, rows = tables.summary(results), tables.results_table(results)
    own = rows[(rows["method"] == "deep-knn") & (rows["k_predict"] == 5)]
    row = table[(table["method"] == "deep-knn") & (table["k_predict"] == 5)].iloc[0]
    assert row["acc"] == pytest.approx(own["acc"].mean()) and row["acc_sd"] == pytest.approx(own["acc"].std())
    assert row["seeds"] == 2 and row["acc_low"] < row["acc"] < row["acc_high"]
    assert "±" in tables.readable(table).iloc[0]["Acc"]


def test_a_paired_difference_is_the_difference_of_the_means_and_0_against_itself(results):
    deep, ce, ce_knn = (tables.select(results, method=method) for method in ("deep-knn", "weighted-ce", "ce-knn"))
    itself = tables.paired(deep, deep)
    assert (itself[["difference", "low", "high"]] == 0).all().all()
    table = tables.summary(results).set_index(["method", "k_predict"])
    gap = tables.paired(deep, ce[::-1], 5, 0).set_index("score")  # matched by seed, in whatever order
    for score, name in tables.SCORES.items():
        expected = table.loc[("deep-knn", 5), score] - table.loc[("weighted-ce", 0), score]
        assert gap.loc[name, "difference"] == pytest.approx(expected)
    assert gap.loc["Acc", "low"] < gap.loc["Acc", "difference"] < gap.loc["Acc", "high"]
    pd.testing.assert_frame_equal(gap, tables.paired(deep, ce, 5, 0).set_index("score"))
    strict = tables.paired(deep, ce, 5, 0, level=0.995).set_index("score")
    assert strict.loc["Acc", "low"] < gap.loc["Acc", "low"] and strict.loc["Acc", "high"] > gap.loc["Acc", "high"]
    for first, second in ((deep, ce_knn[:-1]), (deep, ce_knn[:1] * 2), ([], [])):
        with pytest.raises(ValueError, match="same seeds"):
            tables.paired(first, second)
    moved = [replace(r, arrays=r.arrays | {"test_ids": r.arrays["test_ids"][::-1]}) for r in ce_knn]
    with pytest.raises(ValueError, match="not the same test images"):
        tables.paired(deep, moved)


def test_a_paired_interval_answers_for_the_seeds_too(results):
    first, second = tables.select(results, method="deep-knn")
    labels = first.arrays["test_labels"]
    alike = [replace(r, _predicted={5: labels, 1: (labels + 1) % 7}) for r in (first, second)]
    # the gain is 100 points with one seed and 0 with the other: no image tells, the seeds do
    apart = [replace(first, _predicted={5: labels}), replace(second, _predicted={5: (labels + 1) % 7})]
    gap = tables.paired(apart, alike, 5, 1).set_index("score").loc["Acc"]
    assert (gap["low"], gap["difference"], gap["high"]) == (0, 50, 100)


# What is trained once, and what it starts from


def test_a_difference_between_splits_is_that_of_the_means_and_not_paired(results):
    first, second = (tables.select(results, method=method) for method in ("deep-knn", "weighted-ce"))
    gap = tables.between_splits(first, first, 5).set_index("score").loc["Acc"]
    assert gap["difference"] == 0 and gap["low"] < 0 < gap["high"]  # other test images on each side, so never sure
    turned = [replace(r, _predicted={5: r.arrays["test_labels"]}) for r in second]  # as if on another split, all right
    table = tables.summary(first).query("k_predict == 5").iloc[0]
    gap = tables.between_splits(turned, first, 5).set_index("score")
    for score, name in tables.SCORES.items():
        assert gap.loc[name, "difference"] == pytest.approx(100 - table[score])
    assert 0 < gap.loc["Acc", "low"] < gap.loc["Acc", "difference"] < gap.loc["Acc", "high"]


def test_workers_train_a_base_once_for_those_that_need_it(results, runs_folder):
    events = [json.loads(line) for line in (runs_folder / "progress").read_text(encoding="utf-8").splitlines()]
    trained = Counter(e["label"] for e in events if e.get("status") == "trained")
    expected = {replace(r.run, k_predict=1).label for r in results if r.run.method != "ce-knn"}
    assert trained == dict.fromkeys(expected, 1)
    by_method = {(r.run.method, r.run.seed): r for r in results}
    for seed in (0, 1):
        features = [by_method[method, seed].arrays["train_features"] for method in ("weighted-ce", "ce-knn", "deep-knn")]
        assert np.array_equal(features[0], features[1]) and not np.array_equal(features[0], features[2])


@pytest.mark.parametrize("cores", [1, 4], ids=["one after the other", "side by side"])
def test_bases_come_first_and_each_training_is_carried_out_once(monkeypatch, tmp_path, cores):
    carried, decoded = [], []

    def carry_out(run, parts, folder, base, device):
        assert base is None or (base / "run.json").is_file()  # what it starts from is there
        time.sleep(0.05)  # so that who does not wait for a base would train it again
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text("{}", encoding="utf-8")
        carried.append(run.key)

    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    monkeypatch.setattr(experiments, "carry_out", carry_out)
    monkeypatch.setattr(experiments, "load", lambda run: run)
    monkeypatch.setattr(experiments, "parts", decoded.append)
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    methods = ("deep-knn-ft", "ce-knn", "mlp-deep-knn", "nca", "deep-knn", "weighted-ce", "triplet-ft", "knn", "ce-knn")
    runs = [make_run("lesions", method, "smoke") for method in methods]
    runs.append(replace(runs[4], k_predict=1))
    assert experiments.execute_all(runs, "cpu") == runs
    assert sorted(carried) == sorted({run.key for run in runs})
    assert len(carried) == 7  # of nine methods and a vote: ce-knn and the vote train nothing of their own
    assert len(decoded) == (0 if cores == 1 else 1)  # all have the same images
    assert experiments.execute_all(runs, "cpu") == runs and len(carried) == 7


def test_features_that_are_not_trained_are_made_once_for_all_splits(monkeypatch):
    made = []

    def counting(network, images):
        made.append(len(images))
        return extract_features(network, images)

    monkeypatch.setattr(execution, "extract_features", counting)
    run = make_run("lesions", "knn", "smoke", seed=77)
    first = experiments.execute(run, "cpu")
    data = experiments.parts(run)
    assert sum(made) == len(data.train) + len(data.test)
    count = len(made)
    second = experiments.execute(replace(run, split="grouped"), "cpu")
    experiments.execute(replace(run, evaluate_on="validation"), "cpu")
    assert len(made) == count
    network = build_network(run.backbone, normalize=run.normalize, seed=77)
    for result in (first, second):
        held = experiments.parts(result.run)
        for part, images in (("train", held.train), ("test", held.test)):
            assert (result.arrays[f"{part}_ids"] == images.ids).all()
            direct = extract_features(network, torch.from_numpy(images.images)).numpy()
            np.testing.assert_allclose(result.arrays[f"{part}_features"], direct, rtol=1e-4, atol=1e-5)
    assert set(first.arrays["test_ids"]) != set(second.arrays["test_ids"])
    other = experiments.execute(replace(run, seed=76), "cpu")  # other weights are drawn
    assert not np.allclose(other.arrays["test_features"], first.arrays["test_features"], atol=1e-3)
    made.clear()
    monkeypatch.setattr(execution, "CODE", execution.CODE + 1)  # a library that gives other features
    execution._frozen(network, run, data, torch.device("cpu"))
    assert len(made) == count


def test_validation_features_do_not_stand_for_those_of_the_test_images(monkeypatch):
    run = make_run("lesions", "knn", "smoke", seed=78)
    part = experiments.execute(replace(run, evaluate_on="validation"), "cpu").arrays
    whole = experiments.execute(run, "cpu").arrays
    assert len(whole["train_features"]) == len(part["train_features"]) + len(part["test_features"])
    where = {i: row for i, row in zip(whole["train_ids"], whole["train_features"], strict=True)}
    np.testing.assert_allclose([where[i] for i in part["test_ids"]], part["test_features"], rtol=1e-4, atol=1e-5)


def test_deep_knn_from_cross_entropy_starts_with_its_backbone(results, runs_folder, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setenv("DEEPKNN_DATA", str(runs_folder))
    run, seen = make_run("lesions", "deep-knn-ft", "smoke", split="grouped", epochs=1), []
    assert experiments.is_done(run.base)

    def looking(network, *arguments, **options):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return fit(network, *arguments, **options)

    fit = execution.fit
    monkeypatch.setattr(execution, "fit", looking)
    result = experiments.execute(run, "cpu")
    base = load_file(experiments.folder_of(run.base) / "model.safetensors")
    backbone = {name for name in base if name.startswith("backbone.")}
    assert len(seen) == 1 and backbone == {name for name in seen[0] if name.startswith("backbone.")}
    assert all(torch.equal(seen[0][name], base[name]) for name in backbone)
    assert not [name for name in seen[0] if name.startswith("classifier.")]  # dropped, as in the paper
    trained = load_file(experiments.folder_of(run) / "model.safetensors")
    assert not torch.equal(trained["backbone.conv1.0.weight"], base["backbone.conv1.0.weight"])
    assert len(result.history) == 1 and "test_logits" not in result.arrays


@pytest.mark.parametrize("classes", [2, 3])
def test_a_method_on_features_learns_from_those_of_its_base(tmp_path, classes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % classes
        arrays |= {f"{part}_labels": labels, f"{part}_ids": np.array([f"{part}{i}" for i in range(count)])}
        arrays[f"{part}_features"] = (rng.normal(size=(count, 8)) + 2 * labels[:, None]).astype(np.float32)
    np.savez(tmp_path / "features.npz", **arrays)
    record = {"class_names": list("abc")[:classes], "smallest": 1, "synthetic": False, "class_counts": {"train": [30, 30]}}
    (tmp_path / "run.json").write_text(json.dumps(record | {"seconds": 1}), encoding="utf-8")
    run = make_run("lesions", "mlp-ce", "smoke", epochs=8, lr=0.05)
    found, history, state, about = execution._on_features(run, tmp_path)
    assert about == record and len(history) == 8 and "classifier.weight" in state
    assert found["test_logits"].shape == (20, classes)
    assert found["train_features"].shape == (60, 128) and found["test_features"].shape == (20, 128)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays if not name.endswith("features"))
    result = experiments.Result(run, found, history, record)
    for k_predict in METHODS["mlp-ce"].votes:
        assert (result.predict(k_predict) == arrays["test_labels"]).mean() > 0.6


def test_learnt_is_better_than_the_largest_class_and_not_collapsed():
    def learnt(train_acc=None, collapsed=False):
        record = {"class_counts": {"train": [60, 30, 10]}, "collapsed": collapsed}
        history = [] if train_acc is None else [{"train_acc": 90.0}, {"train_acc": train_acc}]
        return experiments.Result(make_run("lesions", "triplet"), {}, history, record).learnt

    assert learnt(75.0) and learnt(61.5)
    assert not learnt(60.5) and not learnt(20.0)  # calling everything the largest class is right for 60 of 100
    assert not learnt(75.0, collapsed=True)
    assert learnt()  # nothing was trained


# Tables


def test_over_seeds_is_the_mean_and_sd_of_runs_that_agree_in_every_setting(result_row):
    rows = pd.DataFrame([
        result_row("skin7", "deep-knn", seed=0, acc=70.0, mcr=50.0, rs=10.0),
        result_row("skin7", "deep-knn", seed=1, acc=73.0, mcr=52.0, rs=30.0, collapsed=True),
        result_row("skin7", "deep-knn", seed=2, acc=76.0, mcr=57.0, rs=20.0),
        result_row("skin7", "deep-knn", seed=0, acc=1.0, split="grouped"),
        result_row("skin7", "deep-knn", seed=0, acc=2.0, margin=0.7),
        result_row("skin7", "deep-knn", seed=0, acc=3.0, k_predict=1),
        result_row("skin7", "deep-knn", seed=0, acc=4.0, evaluate_on="validation"),
        result_row("skin7", "weighted-ce", seed=0, acc=5.0, columns={"margin": None, "soft": None, "k": None}),
        result_row("skin7", "weighted-ce", seed=1, acc=7.0, columns={"margin": None, "soft": None, "k": None}),
    ])  # fmt: skip
    table = tables.over_seeds(rows)
    assert table["acc"].tolist() == [73, 1, 2, 3, 4, 6] and table["seeds"].tolist() == [3, 1, 1, 1, 1, 2]
    first = table.iloc[0]
    assert (first["mcr"], first["rs"], first["collapsed"]) == (53, 20, 1)
    assert first["acc_sd"] == pytest.approx(3) and first["mcr_sd"] == pytest.approx(np.std([50, 52, 57], ddof=1))
    assert table.loc[1:4, "acc_sd"].isna().all() and table.loc[5, "acc_sd"] == pytest.approx(np.sqrt(2))
    assert "seed" not in table and table.loc[0, "margin"] == make_run("skin7", "deep-knn").margin
    assert table["margin"].isna().tolist() == [False] * 5 + [True]


def test_over_seeds_takes_rows_of_before_a_column_was_added(result_row, tmp_path):
    rows = pd.DataFrame([result_row("skin7", m, seed=s, acc=50.0 + s) for m in ("deep-knn", "triplet") for s in (0, 1)])
    old = rows.drop(columns=["soft", "warmup", "search_every", "lr_decay_every"])
    assert tables.over_seeds(old)["acc"].tolist() == [50.5, 50.5]
    assert tables.over_seeds(old)["soft"].isna().all()
    path = tmp_path / "rows.csv"
    pd.concat([old, rows]).to_csv(path, index=False)
    both = tables.over_seeds(pd.read_csv(path))
    assert both["seeds"].tolist() == [2] * 4  # what the old ones did is not known: they stay apart


def test_mean_and_sd_as_people_read_them():
    table = pd.DataFrame({"acc": [72.44, 70.05], "acc_sd": [0.649, np.nan], "rs": [0.0, 100.0], "rs_sd": [0.0, 12.0]})
    assert tables.with_sd(table, "acc") == ["72.4 ± 0.6", "70.0"]
    assert tables.with_sd(table, "rs") == ["0.0 ± 0.0", "100.0 ± 12.0"]


def test_differences_as_people_read_them_have_a_star_where_the_interval_excludes_0():
    rows = [
        ("b", 1, "Acc", 2.06, 0.3, 4.0), ("b", 1, "MCR", -3.0, -5.5, -0.1), ("b", 1, "RS", 1.0, -2.0, 4.0),
        ("a", 1, "Acc", 0.0, 0.0, 0.0), ("a", 1, "MCR", -1.0, -2.0, 0.0), ("a", 1, "RS", 1.0, 0.0, 2.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "k", "score", "difference", "low", "high"])
    shown = tables.points(table, ["method"])
    assert list(shown) == ["method", "Acc", "MCR", "RS"] and shown["method"].tolist() == ["b", "a"]  # in their order
    assert shown.loc[0].tolist() == ["b", "+2.1 [+0.3, +4.0] *", "-3.0 [-5.5, -0.1] *", "+1.0 [-2.0, +4.0]"]
    assert not shown.loc[1, ["Acc", "MCR", "RS"]].str.endswith("*").any()  # 0 itself is not excluded
    pd.testing.assert_frame_equal(tables.points(table, ["method", "k"]).drop(columns="k"), shown)


def test_a_table_is_written_as_csv_and_markdown(own_folders):
    from deepknn_lib.storage import figures_dir

    text = tables.save_table(pd.DataFrame({"a|b": ["x|y"], "n": [1.25], "none": [np.nan]}), "t", "A caption")
    assert text == (figures_dir() / "tables" / "t.md").read_text(encoding="utf-8")
    assert text.startswith("**A caption**") and "| x\\|y | 1.2 | – |" in text
    assert pd.read_csv(figures_dir() / "tables" / "t.csv")["n"][0] == 1.25


def test_the_command_line_runs_and_ends_with_json(capsys, tmp_path):
    out = tmp_path / "out"
    code = cli.main(["run", "--method", "knn", "--profile", "smoke", "--device", "cpu", "--out", str(out)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and {row["k_predict"] for row in last["scores"]} == {1, 5}
    assert {p.name for p in out.iterdir()} == {"run.json", "history.csv", "features.npz", "model.safetensors"}
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["run"]["method"] == "knn"


def test_the_command_line_says_what_is_wrong_in_a_line(capsys):
    assert cli.main(["run", "--method", "knn", "--dataset", "skin8", "--profile", "smoke"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown data set 'skin8'") and said.count("\n") == 1


def test_grid_writes_rows(capsys, tmp_path):
    out = tmp_path / "rows.csv"
    arguments = ["grid", "--profile", "smoke", "--methods", "knn", "--seeds", "0", "--device", "cpu", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert len(pd.read_csv(out)) == 4  # two splits, two values of K_p
    assert "| grouped | kNN" in capsys.readouterr().out


def test_grid_takes_several_sets_and_sweeps_in_an_order_that_makes_every_run_count(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    monkeypatch.setattr(experiments, "execute_all", lambda runs, device: asked.extend(runs) or [])
    monkeypatch.setattr(tables, "summary", lambda results: pd.DataFrame())
    monkeypatch.setattr(tables, "readable", lambda table: table)
    options = ["--dataset", "lesions,digits", "--profile", "smoke", "--seeds", "0,1", "--sweeps", "--device", "cpu"]
    assert cli.main(["grid", *options, "--methods", "knn,deep-knn", "--splits", "grouped"]) == 0
    first, swept = asked[:8], asked[8:]
    assert [(r.seed, r.dataset, r.method) for r in first] == [
        (s, d, m) for s in (0, 1) for d in ("lesions", "digits") for m in ("knn", "deep-knn")
    ]
    assert [r.method for r in swept[:4]] == ["deep-knn-global"] * 4 and {r.k for r in swept[4:]} == {3, 5, 7}
    assert "runs: 0 done, " in capsys.readouterr().err


def test_the_outlook_says_what_is_left_and_how_long_it_will_take(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path))
    runs = grid("lesions", "smoke", ("knn", "deep-knn"), ("grouped",), (0, 1))
    assert experiments.outlook(runs) == "4 runs: 0 done, 4 to do, time not known yet"
    for run, seconds in zip(runs[:2], (60, 600), strict=True):
        folder = experiments.folder_of(run)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"run": vars(run), "seconds": seconds}))
    assert experiments.outlook(runs) == "4 runs: 2 done, 2 to do, about 11 minutes"
    assert experiments.outlook(runs, 2).endswith(("about 6 minutes", "about 5 minutes"))
    assert experiments.outlook(runs[:2]) == "2 runs: 2 done, 0 to do"
    starred = make_run("lesions", "deep-knn-ft", "smoke", split="grouped")
    assert experiments.outlook([starred]).startswith("2 runs: 0 done, 2 to do")  # it starts from cross-entropy


def test_a_backbone_is_compiled_on_request_and_its_weights_keep_their_names(monkeypatch, tmp_path):
    compiled, run = [], make_run("digits", "knn", "smoke", split="grouped")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module)))
    kept = []
    for name, wanted in (("plain", ""), ("compiled", "1")):
        monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / name))
        monkeypatch.setenv("DEEPKNN_COMPILE", wanted)
        experiments.execute(run, "cpu")
        kept.append(load_file(experiments.folder_of(run) / "model.safetensors"))
    assert len(compiled) == 1 and list(kept[0]) == list(kept[1])


def test_a_deterministic_run_is_one(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPKNN_DETERMINISTIC", "1")
    made = []
    for name in ("a", "b"):
        monkeypatch.setenv("DEEPKNN_DATA", str(tmp_path / name))
        try:
            made.append(experiments.execute(make_run("digits", "deep-knn", "smoke", split="grouped", epochs=1), "cpu"))
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
    assert np.array_equal(made[0].arrays["test_features"], made[1].arrays["test_features"])
