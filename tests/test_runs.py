"""Runs: their keys and their grids."""

from dataclasses import fields, replace

import pytest
import torch

from deepknn_lib.study.runs import METHODS, PROFILES, TABLE2, TABLE3, Run, grid, make_run, sweeps


def lesions(method="deep-knn", **changes):
    return make_run("lesions", method, **changes)


def test_the_key_is_the_same_on_every_machine_and_changes_with_every_setting_of_the_training():
    run = lesions()
    assert Run().key == "lesions-deep-knn-paper-s0-cef2e0dcb6c7"
    assert run.key == replace(run, k_predict=1).key
    other = {
        "dataset": "skin7", "split": "grouped", "fold": 2, "backbone": "resnet18", "weights": "imagenet",
        "image_size": 64, "seed": 1, "k": 3, "m": 3, "margin": 0.3, "normalize": "l2", "epochs": 3, "batch_size": 32,
        "sampling": "random", "classes_per_batch": 4, "lr": 0.5, "lr_decay_every": 7, "evaluate_on": "validation",
        "warmup": 1, "search_every": 9, "precision": "bf16",
    }  # fmt: skip
    apart = {"method", "loss", "k_predict", "base", "soft", "class_power"}
    assert set(other) == {f.name for f in fields(Run)} - apart
    keys = {replace(run, **{name: value}).key for name, value in other.items()}
    assert len(keys) == len(other) and run.key not in keys


PRETRAINED = {"weights": "imagenet"}


@pytest.mark.parametrize("method, given, changes, differs", [
    ("triplet", {}, {"soft": True}, True), ("weighted-ce", {}, {"class_power": 0.5}, True),
    ("deep-knn", {}, {"class_power": 0.5}, False),  # It has no class weights.
    ("weighted-ce", {}, {"k": 7, "m": 2, "margin": 0.9}, False),  # Cross-entropy knows none of them,
    ("weighted-ce", {"sampling": "balanced"}, {"k": 7}, True),  # but such batches hold K + 1 of a class.
    ("knn", {}, {"seed": 1}, True), ("knn", PRETRAINED, {"seed": 1}, False),  # No weights are drawn,
    ("knn", PRETRAINED, {"lr": 9.0, "k": 1, "epochs": 3, "sampling": "random"}, False),  # and nothing is trained.
    ("knn", PRETRAINED, {"normalize": "l2"}, True), ("deep-knn", PRETRAINED, {"seed": 1}, True),
    ("mlp-deep-knn", {}, {"base": lesions("knn", normalize="l2")}, True),
])  # fmt: skip
def test_the_key_changes_with_what_the_method_reads_only(method, given, changes, differs):
    run = lesions(method, **given)
    assert (replace(run, **changes).key != run.key) == differs


def test_methods_share_what_they_can():
    assert lesions("ce-knn").key == lesions("weighted-ce").key == lesions("deep-knn-ft").base.key
    assert lesions("deep-knn-ft").key != lesions().key
    assert {lesions(method).base.key for method in TABLE3[1:]} == {lesions("knn").key}
    assert all(lesions(method, profile=profile) for method in METHODS for profile in PROFILES)


def test_a_run_hands_what_was_given_to_its_base_and_no_setting_of_its_own():
    shared = {"split": "grouped", "fold": 2, "seed": 4, "image_size": 64, "evaluate_on": "validation"}
    shared |= {"weights": "imagenet", "backbone": "resnet18", "lr_decay_every": 7, "precision": "bf16"}
    base = lesions("deep-knn-ft", **shared).base
    assert base.method == "weighted-ce" and shared.items() <= vars(base).items()
    assert make_run("digits", "deep-knn-ft").base.lr_decay_every == 3  # not the 2 of deep-knn-ft
    given = {"lr": 0.7, "class_power": 0.5}
    trained = lesions("weighted-ce", **given)
    assert lesions("ce-knn", k_predict=3, **given).base == trained  # It trains nothing of its own.
    assert lesions("deep-knn-ft", **given).base == replace(trained, lr=lesions("weighted-ce").lr)


def test_a_folder_is_the_same_run_from_wherever_it_is_named(monkeypatch, tmp_path):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = [make_run(f"folder:{name}", "knn") for name in ("set", "set/", tmp_path / "set")]
    assert {run.dataset for run in runs} == {f"folder:{tmp_path / 'set'}"}
    (tmp_path / "set").rename(tmp_path / "moved")
    assert make_run("folder:moved", "knn").key == runs[0].key


def test_sd198_is_drawn_as_published_nine_classes_of_ten_images():
    run = make_run("sd198", "deep-knn", "paper")
    assert (run.config.batch_size, run.config.classes_per_batch, run.config.sampling) == (90, 9, "balanced")
    assert (run.config.epochs, run.config.lr_decay_every) == (90, 30)
    assert (run.backbone, run.image_size) == ("resnet50", 256)
    assert run.sampler(torch.arange(27).repeat_interleave(20)).wanted == 9
    assert make_run("sd198", "weighted-ce", "paper").classes_per_batch is None  # needs no positives


def test_the_grid_completes_one_seed_before_the_next():
    runs = grid("lesions", "demo", backbone="small-vgg")
    assert [run.seed for run in runs] == [seed for seed in PROFILES["demo"]["seeds"] for _ in range(12)]
    assert {run.method for run in runs} == {*TABLE2} and {run.backbone for run in runs} == {"small-vgg"}


@pytest.mark.parametrize("profile", PROFILES)
def test_sweeps_change_one_thing_about_the_reference(profile):
    groups = sweeps("skin7", profile, seeds=(0,))
    reference = make_run("skin7", "deep-knn", profile, split="grouped")
    short = make_run("skin7", "deep-knn", profile, split="grouped", **PROFILES[profile]["short"])
    assert reference.key in {run.key for run in groups["K and M"]}
    assert short.key in {run.key for run in groups["batches"]}
    counts = [(run.k, run.m, run.k_predict) for run in groups["K and M"]]
    assert counts == [(k, m, k) for k in (3, 5, 7) for m in (1, 5, 9)]
    same = {name: getattr(reference, name) for name in ("lr", "margin")}  # the search has trials of its own
    searched = replace(groups["search"][0], method="deep-knn", search_every=0, **same)
    assert searched.key == reference.key  # alike but for the search
