"""`verify`: each check finds what it is for and nothing else, in files and in arrays."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from deepknn_lib import verify as module
from deepknn_lib.images import Listing, Problem
from deepknn_lib.verify import failed, summary, verify

SPLITS = ("paper", "grouped")


def texture(seed, side=96, colour=True):
    """A picture with structure at several scales and a mean look that all share: uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for size, weight in ((4, 25), (12, 20), (24, 15), (48, 10)):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += weight * (np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 128.0 - 1)
    return np.clip(total + (170, 120, 110), 0, 255).astype(np.uint8)


def folds(n):
    """Both splits alike, row by row: 1, 2, 3, 4, 5, 1, ..."""
    return dict.fromkeys(SPLITS, np.arange(n) % 5 + 1)


@pytest.fixture
def make(tmp_path):
    """A listing of images uint8 (H, W, 3), as PNG files or arrays; the classes a and b take turns by five."""

    def build(images, arrays=False, **changes):
        n = len(images)
        ids = np.array([f"image{row:02d}" for row in range(n)])
        known = {"labels": np.arange(n) // 5 % 2, "ids": ids, "groups": ids, "class_names": ("a", "b")}
        if arrays:
            known["blocks"] = lambda: (np.stack(images[s : s + 4]).transpose(0, 3, 1, 2) for s in range(0, n, 4))
        else:
            known["files"] = [tmp_path / f"{image}.png" for image in ids]
            for path, image in zip(known["files"], images, strict=True):
                Image.fromarray(image).save(path, compress_level=1)
        return Listing(**(known | changes))

    return build


@pytest.fixture
def ten():
    return [texture(seed) for seed in range(10)]


def rows(table, check=None):
    """The rows of a check (or all) without their details."""
    found = table if check is None else table[table["check"] == check]
    return [tuple(row) for row in found[["severity", "check", "item", "other"]].itertuples(index=False)]


def pairs(table, check):
    return [(severity, item, other) for severity, _, item, other in rows(table, check)]


def jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized(image, share):
    side = round(len(image) * share)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def brighter(image, factor):
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


COPIES = {
    "re-encoded": lambda image: jpeg(image, 40),
    "smaller": lambda image: resized(image, 0.8),
    "larger": lambda image: resized(image, 2),
    "brighter": lambda image: brighter(image, 1.1),
    "darker": lambda image: brighter(image, 0.9),
    "grey": lambda image: np.asarray(Image.fromarray(image).convert("L").convert("RGB")),
    "cut": lambda image: image[1:-1, 1:-1],
    "all of it": lambda image: jpeg(resized(brighter(image, 1.1), 0.8), 40),
}


@pytest.mark.parametrize("arrays", [False, True])
def test_a_clean_set_gives_no_rows_and_a_full_summary(make, ten, arrays):
    listing = make(ten, arrays)
    table = verify(listing, {"a": 5, "b": 5}, folds(10))
    assert rows(table) == [] and not failed(table)
    assert list(table.columns) == ["severity", "check", "item", "other", "detail"]
    told = summary(table, listing, folds(10))
    assert list(told["check"]) == [
        "tables and folders", "unreadable images", "class counts", "small classes", "tiny images", "constant images",
        "exact duplicates", "near duplicates", "duplicates across classes",
        "duplicates across the split: paper", "duplicates across the split: grouped", "groups of several classes",
        "groups across the split: paper", "groups across the split: grouped",
    ]  # fmt: skip
    assert not told[["errors", "warnings", "notes"]].to_numpy().any()
    assert set(told["the first"]) == {"nothing found"}


def test_problems_of_the_tables_are_errors(make, ten):
    problem = Problem("row without image", "image99", "is in x.csv, but no file is")
    listing = make(ten, problems=[problem, problem._replace(item="image98")])
    table = verify(listing, None, folds(10))
    assert rows(table) == [("error", "row without image", f"image{n}", "") for n in (99, 98)] and failed(table)
    assert summary(table, listing, {}).iloc[0].tolist() == [
        "row without image", "10 rows", 2, 0, 0, "image99; is in x.csv, but no file is",
    ]  # fmt: skip


def test_every_bad_file_is_named(make, ten):
    listing = make(ten)
    listing.files[1].write_bytes(b"")
    listing.files[4].write_bytes(listing.files[4].read_bytes()[:2000])  # the header is whole
    listing.files[8].unlink()
    listing.files[9].write_text("<html>")
    table = verify(listing, None, folds(10))
    assert rows(table) == [("error", "unreadable images", f"image0{n}", "") for n in (1, 4, 8, 9)] and failed(table)
    assert all(str(listing.files[n]) in table["detail"][row] for row, n in enumerate((1, 4, 8, 9)))
    assert "cut off" in table["detail"][1] and "cannot be opened" in table["detail"][2]
    told = summary(table, listing, folds(10)).set_index("check")["looked at"]
    assert told["unreadable images"] == "10 images" and told["near duplicates"] == "6 images"


@pytest.mark.parametrize("n", [9, 11])
def test_arrays_that_are_not_one_a_row(make, ten, n):
    listing = dataclasses.replace(make(ten, arrays=True), blocks=make([*ten, ten[0]][:n], arrays=True).blocks)
    table = verify(listing, None, folds(10))
    assert rows(table) == [("error", "unreadable images", "", "")]
    assert table["detail"][0].startswith(f"{n} images came for 10 rows")
    assert summary(table, listing, folds(10)).set_index("check")["looked at"]["tiny images"] == "10 images"


def test_arrays_that_break_off_keep_what_came_before(make, ten):
    def broken():
        yield np.stack([*ten[:3], ten[0]]).transpose(0, 3, 1, 2)
        raise EOFError("the archive is cut off")

    table = verify(make(ten, arrays=True, blocks=broken), None, {})
    assert rows(table)[0] == ("error", "unreadable images", "", "")
    assert table["detail"][0] == "4 images came for 10 rows: EOFError: the archive is cut off"
    assert pairs(table, "exact duplicates") == [("warning", "image00", "image03")]


def test_class_counts(make, ten):
    table = verify(make(ten), {"a": 5, "b": 6, "c": 7}, folds(10))
    assert rows(table) == [("error", "class counts", "b", ""), ("error", "class counts", "c", "")] and failed(table)
    assert "5 images instead of 6" in table["detail"][0] and "0 images instead of 7" in table["detail"][1]


def test_classes_that_five_folds_cannot_share(make, ten):
    labels = np.array([0] * 6 + [1] * 4)
    table = verify(make(ten, labels=labels, class_names=("a", "b", "c")), None, folds(10))
    assert rows(table) == [("error", "small classes", "b", ""), ("error", "small classes", "c", "")]
    assert table["detail"][0].startswith("has 4 images")


@pytest.mark.parametrize("arrays", [False, True])
def test_tiny_images(make, arrays):
    def of(side):
        rng = np.random.default_rng(0)
        return verify(make([rng.integers(0, 256, (side, 40, 3), dtype=np.uint8) for _ in range(10)], arrays), None, {})

    assert pairs(of(7), "tiny images") == [("warning", f"image{n:02d}", "") for n in range(10)]
    assert pairs(of(8), "tiny images") == []
    assert pairs(of(8), "near duplicates") == [("note", "", "")] and "10 images are smaller" in of(8)["detail"][0]


def test_small_images_are_only_compared_exactly(make, ten):
    small = [resized(image, 34 / 96) for image in ten]
    small[1], small[2] = brighter(small[0], 1.1), small[0]
    table = verify(make([*small[:3], *ten[3:]]), None, {})
    assert rows(table) == [
        ("warning", "exact duplicates", "image00", "image02"),
        ("note", "near duplicates", "", ""),
    ] and table["detail"][1].startswith("3 images")


@pytest.mark.parametrize("arrays", [False, True])
def test_constant_images(make, ten, arrays):
    ten[3] = np.full_like(ten[3], (10, 20, 30))
    ten[4] = ten[3].copy()
    ten[4][0, 0, 2] += 1  # not quite
    ten[5] = np.full_like(ten[3], 7)
    table = verify(make(ten, arrays), None, folds(10))
    assert rows(table) == [("warning", "constant images", f"image0{n}", "") for n in (3, 5)] and not failed(table)


def test_grey_arrays(make, ten):
    grey = np.stack(ten)[:, None, :, :, 0]
    grey[3], grey[5] = 9, grey[0]
    table = verify(make(ten, blocks=lambda: iter([grey]), channels=1), None, {})
    assert rows(table) == [
        ("warning", "constant images", "image03", ""),
        ("warning", "exact duplicates", "image00", "image05"),
        ("error", "duplicates across classes", "image00", "image05"),
    ]


@pytest.mark.parametrize("arrays", [False, True])
def test_exact_duplicates_in_one_class_and_on_one_side(make, ten, arrays):
    ten[2] = ten[1]
    table = verify(make(ten, arrays), None, folds(10))
    assert rows(table)[0] == ("warning", "exact duplicates", "image01", "image02") and not failed(table)
    assert pairs(table, "near duplicates") == pairs(table, "duplicates across classes") == []
    for split in SPLITS:  # folds 2 and 3: both train when fold 1 is tested, but not in the others
        found = table[table["check"] == f"duplicates across the split: {split}"]
        assert list(found["severity"]) == ["note"]
        assert found["detail"].iloc[0].startswith("0 of 2 test images (0.0%)")
        assert "over all folds 2 of 10 (20.0%)" in found["detail"].iloc[0]


def test_exact_means_the_pixels_not_the_bytes(make, ten):
    ten[2] = ten[1]
    listing = make(ten)
    Image.fromarray(ten[2]).save(listing.files[2], compress_level=9)
    assert listing.files[1].read_bytes() != listing.files[2].read_bytes()
    assert pairs(verify(listing, None, {}), "exact duplicates") == [("warning", "image01", "image02")]


def test_the_same_pixels_in_another_shape_are_no_duplicate(make):
    image = np.arange(3 * 40 * 80, dtype=np.uint32).astype(np.uint8).reshape(40, 80, 3)
    images = [texture(seed) for seed in range(9)] + [image]
    images[0] = image.reshape(80, 40, 3)
    assert pairs(verify(make(images), None, {}), "exact duplicates") == []


def test_k_alike_give_k_minus_1_rows(make, ten):
    ten[1:5] = [ten[0]] * 4
    ten += [jpeg(ten[0], quality) for quality in (90, 80, 70, 60, 50)]
    table = verify(make(ten), None, {})
    assert pairs(table, "exact duplicates") == [("warning", "image00", f"image0{n}") for n in (1, 2, 3, 4)]
    near = pairs(table, "near duplicates")
    assert len(near) == 5
    joined = {"image00"}
    for _ in near:  # every one hangs together with the others
        joined |= {end for _, *ends in near for end in ends if set(ends) & joined}
    assert joined == {"image00", *(f"image{n}" for n in range(10, 15))}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_near_duplicates(make, ten, kind):
    for first in (0, 5):  # in one class
        ten[first + 1] = COPIES[kind](ten[first])
    table = verify(make(ten), None, {})
    assert rows(table) == [("warning", "near duplicates", f"image0{n}", f"image0{n + 1}") for n in (0, 5)]
    assert not failed(table)


def test_copies_among_arrays(make, ten):
    ten[1] = COPIES["re-encoded"](ten[0])
    assert rows(verify(make(ten, True), None, {})) == [("warning", "near duplicates", "image00", "image01")]


def test_different_images_with_the_same_look_are_no_duplicates():
    """Spots of one size in the middle, or lungs, correlate highly as plain grey thumbnails."""
    y, x = np.mgrid[-1 : 1 : 96j, -1 : 1 : 96j]
    shade = 150 - 90 * np.exp(-3 * (x**2 + y**2))[..., None]
    images = [np.clip(shade + 0.25 * (texture(seed) - 128.0), 0, 255).astype(np.uint8) for seed in range(100)]
    shrunk = [Image.fromarray(i).convert("L").resize((36, 36), Image.Resampling.BOX) for i in images]
    thumbnails = np.stack([np.asarray(i) for i in shrunk])
    assert np.corrcoef(thumbnails.reshape(100, -1)).min() > 0.8
    assert len(module._near_pairs(thumbnails)) == 0


def test_what_all_images_have_in_common_makes_no_duplicates():
    """One sharp outline, as of a lens or a marker, around different textures."""
    y, x = np.mgrid[-1:1:36j, -1:1:36j]
    outline = np.where(x**2 + y**2 < 0.8, 160, 20)
    rng = np.random.default_rng(0)
    images = (outline + rng.integers(-15, 16, (50, 36, 36))).astype(np.uint8)
    assert len(module._near_pairs(images)) == 0


def test_hardly_any_texture_tells_nothing():
    images = np.full((4, 36, 36), 9, np.uint8)
    images[:2, :, 18:] = 10  # one grey level
    images[2:, :, 18:] = 90
    assert module._near_pairs(images)[:, :2].tolist() == [[2, 3]]


def test_all_pairs_are_compared_whatever_the_blocks(monkeypatch):
    """Against every pair one by one; the forest joins what the pairs join, by the most similar."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(60, 180, (40, 36, 36)).astype(np.int64)
    for first, others in ((0, (7, 21, 39)), (3, (38,)), (17, (18,))):
        for other in others:
            thumbnails[other] = thumbnails[first] + rng.integers(-12, 13, (36, 36))
    thumbnails = thumbnails.astype(np.uint8)
    whole = module._near_pairs(thumbnails)
    assert {tuple(pair) for pair in whole[:, :2]} >= {(3, 38), (17, 18)} and len(whole) == 5
    assert set(whole[:, :2][whole[:, 0] < 40].ravel()) == {0, 3, 7, 17, 18, 21, 38, 39}
    assert (whole[:, 2] >= module.SIMILAR).all() and (whole[:, 2] <= 1 + 1e-6).all()
    for a in range(40):
        for b in range(a + 1, 40):
            together = a in (0, 7, 21, 39) and b in (0, 7, 21, 39) or (a, b) in ((3, 38), (17, 18))
            assert len(module._near_pairs(thumbnails[[a, b]])) == together
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "COLUMNS", 9)
    monkeypatch.setattr(module, "MANY", 1)
    np.testing.assert_allclose(module._near_pairs(thumbnails), whole, atol=1e-5)


def test_no_images_and_one_image(make):
    assert len(module._near_pairs(np.empty((0, 36, 36), np.uint8))) == 0
    assert len(module._near_pairs(np.zeros((1, 36, 36), np.uint8))) == 0
    listing = make([])
    table = verify(listing, None, {})
    assert rows(table) == [("error", "small classes", "a", ""), ("error", "small classes", "b", "")]
    assert len(summary(table, listing, {})) == 10


def test_duplicates_with_two_labels_contradict_each_other(make, ten):
    ten[5], ten[6] = ten[0], COPIES["re-encoded"](ten[1])
    listing = make(ten)
    table = verify(listing, None, {})
    assert pairs(table, "duplicates across classes") == [("error", "image00", "image05"), ("warning", "image01", "image06")]
    assert failed(table) and all("a and b" in d for d in table[table["check"] == "duplicates across classes"]["detail"])
    near_only = verify(make([texture(77), *ten[1:]]), None, {})
    assert pairs(near_only, "duplicates across classes") == [("warning", "image01", "image06")] and not failed(near_only)


def test_duplicates_across_the_split(make, ten):
    """Fold 1 holds the images 0 and 5."""
    ten[1], ten[6] = ten[0], COPIES["smaller"](ten[5])
    ten[3] = ten[2]  # both in training
    listing = make(ten)
    table = verify(listing, None, {"paper": folds(10)["paper"]})
    check = "duplicates across the split: paper"
    assert pairs(table, check) == [("note", "", ""), ("warning", "image00", "image01"), ("warning", "image05", "image06")]
    told = summary(table, listing, {"paper": folds(10)["paper"]}).set_index("check").loc[check]
    assert told.tolist()[:4] == ["10 images", 0, 2, 1]
    assert told["the first"].startswith("2 of 2 test images (100.0%)") and "over all folds 6 of 10" in told["the first"]
    details = table[table["check"] == check]["detail"].tolist()
    assert "the first is in the test part" in details[1] and "different groups" in details[2]


def test_the_second_of_a_pair_may_be_the_tested_one(make, ten):
    ten[5] = ten[4]
    table = verify(make(ten, labels=np.zeros(10, int), class_names=("a",)), None, folds(10))
    found = table[table["check"] == "duplicates across the split: grouped"]
    assert "the second is in the test part" in found["detail"].tolist()[1]


def test_a_test_part_that_is_fixed_has_no_other_folds(make, ten):
    ten[1] = ten[0]
    table = verify(make(ten), None, {"paper": np.array([1, 0, 0, 0, 0] * 2)})
    told = table[table["check"] == "duplicates across the split: paper"]["detail"].iloc[0]
    assert told == "1 of 2 test images (50.0%) have a duplicate (or its duplicate) in training"


def test_views_of_one_group_are_what_groups_are_for(make, ten):
    ten[1], ten[6] = COPIES["re-encoded"](ten[0]), COPIES["re-encoded"](ten[5])
    groups = np.array([f"g{n}" for n in range(10)])
    groups[1] = "g0"
    together = np.arange(10) % 5 + 1
    together[1] = 1  # of the same group as image00
    table = verify(make(ten, groups=groups), None, {"paper": folds(10)["paper"], "grouped": together})
    assert pairs(table, "near duplicates") == [("note", "image00", "image01"), ("warning", "image05", "image06")]
    assert pairs(table, "duplicates across the split: paper")[1:] == [
        ("note", "image00", "image01"), ("warning", "image05", "image06"),
    ]  # fmt: skip
    assert pairs(table, "duplicates across the split: grouped")[1:] == [("warning", "image05", "image06")]
    assert pairs(table, "groups across the split: paper") == [("note", "", "")]
    assert pairs(table, "groups across the split: grouped") == [] and not failed(table)


def test_exact_duplicates_in_one_group_count_twice_all_the_same(make, ten):
    ten[1] = ten[0]
    table = verify(make(ten, groups=np.array(["x", "x", *"abcdefgh"])), None, {})
    assert rows(table) == [("warning", "exact duplicates", "image00", "image01")]
    assert "in one group" in table["detail"][0]


def test_groups_across_the_split_are_told_in_numbers(make, ten):
    """Image 0 of fold 1 has its group in fold 2; so do the images 2 and 3 of folds 3 and 4."""
    groups = np.array(["g", "g", "h", "h", *"abcdef"])
    listing = make(ten, groups=groups)
    table = verify(listing, None, folds(10))
    assert rows(table) == [
        ("note", "groups across the split: paper", "", ""),
        ("error", "groups across the split: grouped", "", ""),
    ]
    assert failed(table) and not failed(verify(listing, None, {"paper": folds(10)["paper"]}))
    words = "1 of 2 test images (50.0%) have their group in training; over all folds 4 of 10 (40.0%)"
    assert set(table["detail"]) == {words}
    assert list(summary(table, listing, folds(10))["the first"][-2:]) == [words] * 2


def test_a_group_that_only_other_folds_tear_apart_is_an_error_too(make, ten):
    table = verify(make(ten, groups=np.array(["x", "g", "g", *"abcdefi"])), None, {"grouped": folds(10)["grouped"]})
    assert rows(table) == [("error", "groups across the split: grouped", "", "")]
    assert table["detail"][0].startswith("0 of 2 test images")


def test_groups_of_several_classes(make, ten):
    groups = np.array(["g0", "g1", "g1", "g3", "g4", "g0", "g6", "g7", "g8", "g9"])
    table = verify(make(ten, groups=groups), None, {})
    assert rows(table) == [("warning", "groups of several classes", "g0", "")] and not failed(table)
    assert "a, b" in table["detail"][0]


def test_rows_come_in_the_same_order_every_time(make, ten):
    ten[9], ten[8], ten[7], ten[3] = ten[0], ten[2], jpeg(ten[1], 50), np.zeros_like(ten[3])
    listing = make(ten, groups=np.array(list("ggaabbccdd")))
    listing.files[4].write_bytes(b"")
    tables = [verify(listing, {"a": 1}, folds(10)) for _ in range(4)]
    assert all(table.equals(tables[0]) for table in tables)
    checks = list(dict.fromkeys(tables[0]["check"]))
    told = [check for check in summary(tables[0], listing, folds(10))["check"] if check in checks]
    assert checks == told
    assert pairs(tables[0], "exact duplicates") == [("warning", "image00", "image09"), ("warning", "image02", "image08")]
