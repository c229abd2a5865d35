"""What `python -m deepknn_lib verify` looks at before anyone trains: bad files, duplicates, classes, groups, leaks."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from deepknn_lib.datasets import load
from deepknn_lib.datasets.decode import each, white
from deepknn_lib.datasets.readers import Index
from deepknn_lib.storage import data_dir, write_csv

CHECKS = ["no groups", "layout", "parts", "unreadable images", "class counts", "small classes"]
CHECKS += ["tiny images", "constant images", "range of values"]
CHECKS += ["exact duplicates", "near duplicates", "duplicates across classes", "groups of several classes"]
CHECKS += ["duplicates across the split", "groups across the split"]
COLUMNS = ["severity", "check", "item", "other", "detail"]
THUMBNAIL = 36  # pixels a side; 40 wrong pairs were found in chest X-rays of 28 pixels, in larger ones none
SIMILAR = 0.65  # of three real sets, different images stay below 0.59, 99.7 % of copies at JPEG 40 are above
CONTRAST = 1.0  # grey levels; keeps the noise of smooth skin from counting as texture
FLAT = 0.2  # thumbnails with less texture than this tell nothing; in real images it is 0.46 and more
BLANK = np.zeros((THUMBNAIL, THUMBNAIL), np.uint8)
ROWS = 1024  # thumbnails compared at a time


def report(name: str, out: Path | None = None) -> int:
    """Check a set, print the summary and write all findings as CSV; 1 if there is an error, else 0."""
    found, checks = of_dataset(name)
    out = out or data_dir() / "verify" / f"{load.file_name(name)}.csv"
    write_csv(found, out)
    counts = checks[["errors", "warnings"]].sum()
    print(checks.to_string(index=False))
    print(f"{name}: {counts['errors']} errors, {counts['warnings']} warnings; all of it: {out}")
    return int(failed(found))


def failed(found: pd.DataFrame) -> bool:
    """Whether `verify` found an error."""
    return bool((found["severity"] == "error").any())


def of_dataset(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is wrong with a set, its splits and pinned contents (as of `verify`), and a summary: one row a check."""
    entry, index, folds, found = load.entry_of(name)[0], load.index_of(name), {}, []
    for split in load.distinct_splits(name, load.SPLITS):
        try:
            folds[split] = load.folds_of(name, index, split)
        except (FileNotFoundError, ValueError) as error:
            severity = "error" if isinstance(error, ValueError) else "warning"
            found.append((severity, "splits", split, "", str(error)))
    contents = {"labels": np.array(index.class_names)[index.labels], "groups": index.groups} | folds
    for what in entry.pins.keys() & contents.keys():
        if fingerprint(index.ids, contents[what]) != entry.pins[what]:
            detail = "these are not those of the results in this repository; compare with the set's home"
            found.append(("warning", "pinned contents", what, "", detail))
    rows = pd.concat([pd.DataFrame(found, columns=COLUMNS), verify(index, entry.counts, folds)])
    order = list(dict.fromkeys([*rows["check"][~rows["check"].isin(CHECKS)], *CHECKS]))
    counts = pd.crosstab(rows["check"], rows["severity"])
    counts = counts.reindex(index=order, columns=["error", "warning", "note"], fill_value=0).add_suffix("s")
    first = {check: "nothing found" for check in order}
    if not index.unit:
        first |= {check: "not known: no groups are given" for check in order if "groups" in check}
    first |= {check: " ".join(filter(None, of)) for _, check, *of in rows[::-1].itertuples(index=False)}
    counts["the first"] = pd.Series(first)
    return rows, counts.rename_axis("check").rename_axis(None, axis=1).reset_index()


def fingerprint(ids: np.ndarray, values: np.ndarray) -> str:
    """Sha256 over the sorted lines `<id>,<value>`: the same for any layout, order and line endings of the files."""
    lines = sorted(f"{i},{v}" for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def verify(index: Index, expected: dict[str, int], folds: dict[str, np.ndarray]) -> pd.DataFrame:
    """Everything that is wrong, doubtful or worth knowing in a data set; every image is opened fully.

    `expected` is how many images each class should have, empty if that is not known; `folds` holds by the name of a
    split the fold that tests on each row, int64 (N,). The columns are `severity` ("error", "warning" or "note"),
    `check`, `item`, `other` (the second image of a pair) and `detail`.
    """
    names, ids, groups = np.array(index.class_names)[index.labels], index.ids, index.groups
    looks, deep = [None] * len(ids), {}
    for row, look in each(index, 48, _look, "verifying", deep):
        looks[row] = (look, "", 99, 0, 255, False, BLANK) if isinstance(look, str) else look
    bad, content, side, low, high, constant, thumbnails = map(np.array, zip(*looks, strict=True))
    found = [(severity, check, "", "", text) for severity, check, text in load.flaws(index, folds)]

    def add(severity: str, check: str, items, details) -> None:
        pairs = zip(items, details, strict=True)
        found.extend((severity, check, item, "", str(detail)) for item, detail in pairs if detail)

    has = {name: int((names == name).sum()) for name in index.class_names}
    off = [name for name in has | expected if expected and has.get(name, 0) != expected.get(name, 0)]
    kinds = pd.Series(names).groupby(groups).agg(lambda of: sorted(set(of)))
    add("error", "unreadable images", ids, bad)
    add("error", "class counts", off, [f"has {has.get(n, 0)} images, not {expected.get(n, 0)}" for n in off])
    add("warning", "tiny images", ids, np.where(side < 8, "its shorter side has under 8 pixels", ""))
    add("warning", "constant images", ids, np.where(constant, "all its pixels have one colour", ""))
    if (top := white(deep)) < 65535:
        told = f"{len(deep)} images of 16 bits use values up to {max(deep.values())}; {top} is shown as white"
        found.append(("note", "range of values", "", "", told))
    low, high = low[bad == ""].min(initial=255), high[bad == ""].max(initial=0)
    if 0 <= int(high) - int(low) < 64:
        told = f"all values are from {low} to {high} of 0 to 255; are the images stored as they should be?"
        found.append(("warning", "range of values", "", "", told))
    mixed = kinds[kinds.str.len() > 1].str.join(", ") + "; do they show one patient or lesion?"
    add("warning", "groups of several classes", mixed.index, mixed)
    cluster = np.arange(len(ids))
    first = pd.Series(cluster).groupby(content).transform("first").to_numpy()
    large = np.flatnonzero((first == cluster) & (side >= THUMBNAIL) & (bad == ""))
    pairs = [(i, j, "the same pixels") for j, i in enumerate(first) if i != j and bad[j] == ""]
    for i, j, alike, turned in near_pairs(thumbnails[large]):
        pairs.append((large[i], large[j], f"similarity {alike:.2f}{', turned or mirrored' * turned}"))
    for i, j, how in sorted(pairs, key=lambda pair: pair[1]):
        cluster[j], exact, known = cluster[i], how == "the same pixels", groups[i] == groups[j]
        how += ", in one group" if known else ", in different groups; remove one, or give both one group"
        severity = "note" if known and not exact else "warning"
        found.append((severity, f"{'exact' if exact else 'near'} duplicates", ids[i], ids[j], how))
        if names[i] != names[j]:
            told = f"{names[i]} and {names[j]}; correct or remove one ({how})"
            found.append(("error" if exact else "warning", "duplicates across classes", ids[i], ids[j], told))
    for split, fold in folds.items():
        for what, key in (("duplicates", cluster), ("groups", groups)):
            leaks = (pd.Series(fold).groupby(key).transform("nunique").to_numpy() > 1)[fold == 1]
            told = f"{leaks.sum()} of {len(leaks)} test images ({leaks.mean():.1%}) have {what} in training"
            severity = "error" if (what, split) == ("groups", "grouped") else "note"
            add(severity, f"{what} across the split", [split], [told * leaks.any()])
    found.sort(key=lambda row: CHECKS.index(row[1]))
    return pd.DataFrame(found, columns=COLUMNS, dtype=object)


def _look(pixels: np.ndarray) -> tuple:
    """Of an image (C, H, W) no error, content, shorter side, least, largest value, whether constant, thumbnail."""
    picture = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    grey = Image.fromarray(picture).convert("L").resize(BLANK.shape, Image.Resampling.BOX)
    content = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    ends = pixels.min(), pixels.max()
    return "", content, min(pixels.shape[1:]), *ends, (pixels == pixels[:, :1, :1]).all(), np.asarray(grey)


def near_pairs(thumbnails: np.ndarray) -> list[tuple[int, int, float, bool]]:
    """Each copy by its looks, after the earlier image that it resembles most; how much; and if it is turned.

    What is compared is fine texture, each pixel's difference from its neighbours divided by how much these differ: by
    grey levels alone all chest X-rays are alike, and so are all brown spots in the middle of pink skin. The thumbnails
    are uint8 (N, THUMBNAIL, THUMBNAIL); all pairs of them are compared, one of each in all eight orientations. What is
    not seen: copies shifted or cut by more than about 1 % of the side, and turned by other angles.
    """
    grey, pairs = torch.from_numpy(thumbnails.astype(np.float32))[:, None], []
    fine = grey[..., 1:-1, 1:-1] - avg_pool2d(grey, 3, 1)  # Traces of a padding would be alike in all images.
    local = (fine[..., 1:-1, 1:-1] / (avg_pool2d(fine**2, 3, 1) + CONTRAST**2).sqrt())[:, 0]
    flat = local - local.mean((1, 2), keepdim=True)
    textures = flat / flat.norm(dim=(1, 2), keepdim=True).clamp(min=FLAT * flat.shape[1])
    for start in range(0, len(textures), ROWS):
        block, before = textures[start : start + ROWS], textures[: start + ROWS].flatten(1)
        kinds = [turned.rot90(n, (1, 2)).flatten(1) for turned in (block, block.mT) for n in range(4)]
        best = [(kind @ before.T).tril(start - 1).max(1) for kind in kinds]
        alike, which = torch.stack([values for values, _ in best]).max(0)
        for row in (alike >= SIMILAR).nonzero()[:, 0].tolist():
            earlier = int(best[which[row]].indices[row])
            pairs.append((earlier, start + row, float(alike[row]), bool(which[row])))
    return pairs
