"""`verify`: each check finds what it is for and nothing else, and the report says so."""

import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sets import class_folders, put, saved

from deepknn_lib.datasets import verify
from deepknn_lib.datasets.readers import Index


def texture(seed, side=96):
    """A picture with structure at several scales and a mean look that all share: uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for size, weight in ((4, 25), (12, 20), (24, 15), (48, 10)):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += weight * (np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 128.0 - 1)
    return np.clip(total + (170, 120, 110), 0, 255).astype(np.uint8)


TEN = [texture(seed) for seed in range(10)]
FOLDS = np.arange(10) % 5 + 1  # fold 1 tests the images 0 and 5


def index_of(changed, **known):
    """Ten different images but for the changed ones; five of class a, five of class b."""
    images = [changed.get(n, TEN[n % 10]) for n in range(max([9, *changed]) + 1)]
    blocks = [np.atleast_3d(image).transpose(2, 0, 1)[None] for image in images]
    ids = np.array([f"i{n}" for n in range(len(images))])
    index = {"labels": np.arange(len(ids)) // 5 % 2, "ids": ids, "groups": ids, "class_names": ("a", "b")}
    return Index(**(index | {"blocks": lambda _: blocks, "unit": "patient"} | known))


def jpeg(image, quality=40):
    return np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(image), "JPEG", quality=quality))))


def resized(image, side):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def brighter(image, factor=1.1):
    return np.minimum(image * factor, 255).astype(np.uint8)


COPIES = {
    "re-encoded": jpeg, "larger": lambda image: resized(image, 192), "darker": lambda image: brighter(image, 0.9),
    "cut": lambda image: image[1:-1, 1:-1], "all of it": lambda image: jpeg(resized(brighter(image), 77)),
    "grey": lambda image: np.asarray(Image.fromarray(image).convert("L").convert("RGB")),
}  # fmt: skip
TURNS = [(n, side) for n in range(4) for side in (1, -1)][1:]
SMALL, PAPER, BOTH = resized(TEN[3], 34), {"paper": FOLDS}, {"paper": FOLDS, "grouped": FOLDS}
VIEWS = PAPER | {"grouped": np.array([1, 1, *FOLDS[2:]])}  # this keeps the images 0 and 1 together
SAME, NEAR = "warning exact duplicates", "warning near duplicates"
APART, LEAK = "in different groups; remove one, or give both", r"1 of 2 test images \(50.0%\) have groups"
EXACT, ALIKE, ACROSS = f"the same pixels, {APART}", rf"similarity [01]\.\d\d, {APART}", "across the split"
# changed images; what else is known; how many of each class; the splits; the rows that are wanted, as patterns
CASES = {
    "nothing wrong": ({}, {}, {"a": 5, "b": 5}, BOTH, []),
    "exact": ({2: TEN[1], 5: TEN[0]}, {}, {}, BOTH, [
        f"{SAME} i1 i2 {EXACT}", f"{SAME} i0 i5 {EXACT}",
        f"error duplicates across classes i0 i5 a and b; correct or remove one .{EXACT}"]),
    **{f"copy: {kind}": ({1: copy(TEN[0]), 6: copy(TEN[5])}, {}, {}, {}, [
        f"{NEAR} i{n} i{n + 1} {ALIKE}" for n in (0, 5)]) for kind, copy in COPIES.items()},
    **{f"turned {n} times, {side}": ({1: np.rot90(TEN[0][:, ::side], n)}, {}, {}, {}, [
        rf"{NEAR} i0 i1 similarity [01]\.\d\d, turned or mirrored, {APART}"]) for n, side in TURNS},
    "k alike": ({n: TEN[0] for n in range(1, 5)} | {10 + n: jpeg(TEN[0], 90 - 10 * n) for n in range(5)}, {}, {}, {}, [
        *(f"{SAME} i0 i{n} {EXACT}" for n in range(1, 5)), *[rf"{NEAR} (i0|i1[0-4]) i1[0-4] "] * 5]),
    "small": ({0: SMALL, 1: brighter(SMALL), 2: SMALL}, {}, {}, {}, [f"{SAME} i0 i2 {EXACT}"]),
    "only in training": ({}, {}, {}, {"paper": np.array([0, 0, 0, 0, 0, 1, 1, 0, 0, 0])}, [
        "error parts split paper, fold 1: its test part has no images of a"]),
    "few values": ({n: image // 8 + 96 for n, image in enumerate(TEN)}, {}, {}, {}, [
        r"warning range of values all values are from 10\d to 12\d of 0 to 255"]),
    "views of one group": ({1: jpeg(TEN[0]), 6: jpeg(TEN[5])}, {"groups": np.array([*"ggabcdefhi"])}, {}, VIEWS, [
        "warning parts split grouped, fold 2: its test part has no images of a",
        r"note near duplicates i0 i1 similarity 0.\d\d, in one group$", f"{NEAR} i5 i6",
        f"note duplicates {ACROSS} paper 2 of 2", f"note duplicates {ACROSS} grouped 1 of 3",
        f"note groups {ACROSS} paper 1 of 2"]),
    "groups across": ({}, {"groups": np.array([*"gghhabcdef"])}, {}, BOTH, [
        f"note groups {ACROSS} paper {LEAK}", f"error groups {ACROSS} grouped {LEAK}"]),
    "a comma in a class": ({}, {"class_names": ("a, very", "b"), "groups": np.array([*"aabbccddef"])}, {}, {}, [
        "warning groups of several classes c a, very, b; do they show one patient"]),
    "counts": ({}, {}, {"a": 5, "b": 6, "c": 7}, {}, [
        "error class counts b has 5 images, not 6", "error class counts c has 0 images, not 7"]),
    "tiny and constant": ({3: 0 * TEN[3] + np.uint8([1, 2, 3]), 5: 0 * TEN[5] + 7, 7: TEN[7][:7]}, {}, {}, {}, [
        "warning tiny images i7 its shorter side has under 8", "warning constant images i3 all its pixels",
        "warning constant images i5 "]),
    "grey": ({n: TEN[n % 9][..., 0] for n in range(10)}, {"channels": 1}, {}, {}, [f"{SAME} i0 i9", "error .* i0 i9"]),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "known", "expected", "folds", "wanted"), CASES.values(), ids=list(CASES))
def test_each_check_finds_what_it_is_for(monkeypatch, changed, known, expected, folds, wanted):
    monkeypatch.setattr(verify, "ROWS", 3)  # Pairs lie in one block of thumbnails, and in two.
    found = verify.verify(index_of(changed, **known), expected, folds)
    assert len(found) == len(wanted)
    for row, pattern in zip(found.itertuples(index=False), wanted, strict=True):
        assert re.match(pattern, " ".join(filter(None, row))), (row, pattern)


def test_what_different_images_have_in_common_makes_no_duplicates():
    """Spots of one size in the middle, lungs, a sharp outline: all correlate highly as plain grey thumbnails."""
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    shade = 150 - 90 * np.exp(-3 * (x**2 + y**2))[..., None]
    spots = [np.clip(shade + 0.25 * (texture(seed) - 128.0), 0, 255).astype(np.uint8) for seed in range(100)]
    shrunk = [Image.fromarray(i).convert("L").resize((36, 36), Image.Resampling.BOX) for i in spots]
    thumbnails = np.stack([np.asarray(i) for i in shrunk])
    assert np.corrcoef(thumbnails.reshape(100, -1)).min() > 0.8 and len(verify.near_pairs(thumbnails)) == 0
    plain = np.full((4, 36, 36), 9, np.uint8)
    plain[:2, :, 18:], plain[2:, :, 18:] = 10, 90  # one grey level is hardly any texture and tells nothing
    assert [pair[:2] for pair in verify.near_pairs(plain)] == [(2, 3)]


def test_the_report_is_printed_and_written_and_its_status_says_whether_to_train(tmp_path, data, capsys):
    root, other = (class_folders(tmp_path / name / "set") for name in "ab")
    assert verify.report(f"folder:{other}") == verify.report(f"folder:{root}") == 0
    assert len([*(data / "verify").glob("folder-set-*.csv")]) == 2  # of two folders of one name
    said = capsys.readouterr().out
    assert said.count("not known: no groups are given") == 4
    assert re.search("no groups +0 +1 +0 +no groups are given", said)
    assert not re.search("across the split.*grouped", said)
    for file in ("healthy/3.png", "ill/4.png"):
        put(root / file, b"")
    assert verify.report(f"folder:{root}", tmp_path / "found.csv") == 1
    found = pd.read_csv(tmp_path / "found.csv", keep_default_na=False)
    assert found.query("severity == 'error'")["item"].tolist() == ["healthy/3.png", "ill/4.png"]
    assert re.search(r"unreadable images +2 .*\n.*2 errors, 1 warnings", capsys.readouterr().out, re.S)
