"""What `python -m deepknn_lib verify` looks at before anyone trains: bad files, duplicates, classes, groups, leaks."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from deepknn_lib.datasets import load
from deepknn_lib.datasets.decode import deep_greys, each
from deepknn_lib.datasets.load import Finding
from deepknn_lib.datasets.readers import Index
from deepknn_lib.storage import check_writable, data_dir, write_csv

CHECKS = ["no groups", "layout", "parts", "unreadable images", "class counts", "small classes"]
CHECKS += ["tiny images", "constant images", "range of values"]
CHECKS += ["exact duplicates", "near duplicates", "duplicates across classes", "groups of several classes"]
CHECKS += ["duplicates across the split", "groups across the split"]
THUMBNAIL = 36  # pixels a side; 40 wrong pairs were found in chest X-rays of 28 pixels, in larger ones none
SIMILAR = 0.65  # of three real sets, different images stay below 0.59, 99.7 % of copies at JPEG 40 are above
CONTRAST = 1.0  # grey levels; keeps the noise of smooth skin from counting as texture
FLAT = 0.2  # thumbnails with less texture than this tell nothing; in real images it is 0.46 and more
ROWS = 1024  # thumbnails compared at a time
LOOKS = ["unreadable", "content", "shorter side", "low", "high", "constant", "thumbnail"]


def report(name: str, out: Path | None = None) -> int:
    """Check a set, print the summary and write all findings as CSV; 1 if there is an error, else 0."""
    out = out or data_dir() / "verify" / f"{load.entry_of(name).file_name}.csv"
    check_writable(out)
    found, checks = of_dataset(name)
    write_csv(found, out)
    print(checks.to_string(index=False))
    print(f"{name}: {sum(checks['errors'])} errors, {sum(checks['warnings'])} warnings; all of it: {out}")
    return int("error" in {*found["severity"]})


def of_dataset(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is wrong with a set, its splits and pinned contents (as of `verify`), and a summary: one row a check."""
    entry = load.entry_of(name)
    index, folds, found = load.index_of(entry), {}, []
    for split in load.SPLITS if index.unit else load.SPLITS[:1]:
        try:
            folds[split] = load.folds_of(entry, index, split)
        except (FileNotFoundError, ValueError) as error:
            severity = "error" if isinstance(error, ValueError) else "warning"
            found.append(Finding(severity, "splits", split, "", str(error)))
    contents = {"labels": np.array(index.class_names)[index.labels], "groups": index.groups} | folds
    for what, pin in entry.pins.items():
        if what in contents and fingerprint(index.ids, contents[what]) != pin:
            detail = "these are not those of the results in this repository; compare with the set's home"
            found.append(Finding("warning", "pinned contents", what, "", detail))
    rows = pd.concat([pd.DataFrame(found, columns=Finding._fields), verify(index, entry.counts, folds)])
    first = dict.fromkeys([*(row.check for row in found), *CHECKS], "nothing found")
    if not index.unit:
        first |= {check: "not known: no groups are given" for check in first if "groups" in check}
    first |= {check: " ".join(filter(None, of)) for _, check, *of in rows[::-1].itertuples(index=False)}
    counts = pd.crosstab(rows["check"], rows["severity"])
    counts = counts.reindex(index=first, columns=["error", "warning", "note"], fill_value=0).add_suffix("s")
    counts["the first"] = first.values()
    return rows, counts.rename_axis("check").rename_axis(None, axis=1).reset_index()


def fingerprint(ids: np.ndarray, values: np.ndarray) -> str:
    """Sha256 over the sorted lines `<id>,<value>`: the same for any layout, order and line endings of the files."""
    lines = sorted(f"{i},{v}" for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def verify(index: Index, expected: dict[str, int], folds: dict[str, np.ndarray]) -> pd.DataFrame:
    """Everything that is wrong, doubtful or worth knowing in a data set, a `Finding` a row; opens every image fully.

    `expected` is how many images each class should have, empty if that is not known; `folds` holds by the name of a
    split the fold that tests on each row, int64 (N,).
    """
    ids, names, groups = index.ids, np.array(index.class_names)[index.labels], index.groups
    count, largest, white = deep_greys(index.files)
    looks = each(index, 48, _look, "verifying", white)
    looks = [(look, *[None] * 6) if isinstance(look, str) else look for look in looks]
    looks = pd.DataFrame(looks, ids, columns=LOOKS)
    tiny, plain = ids[looks["shorter side"] < 8], ids[looks["constant"] == 1]
    has, should = Counter(names.tolist()), Counter(expected or names.tolist())
    off = [name for name in {**has, **should} if has[name] != should[name]]
    kinds = pd.Series(names).groupby(groups).unique()
    mixed = kinds[kinds.str.len() > 1].map(sorted).str.join(", ")
    told = {  # of one image, class or group
        ("error", "unreadable images"): looks["unreadable"].dropna(),
        ("error", "class counts"): {n: f"has {has[n]} images, not {should[n]}" for n in off},
        ("warning", "tiny images"): dict.fromkeys(tiny, "its shorter side has under 8 pixels"),
        ("warning", "constant images"): dict.fromkeys(plain, "all its pixels have one colour"),
        ("warning", "groups of several classes"): mixed + "; do they show one patient or lesion?",
    }
    found = [*load.flaws(index, folds)]
    found += [Finding(*kind, item, "", detail) for kind, of in told.items() for item, detail in of.items()]
    if white < 65535:
        used = f"{count} images of 16 bits use values up to {largest}; {white} is shown as white"
        found.append(Finding("note", "range of values", detail=used))
    low, high = looks["low"].min(), looks["high"].max()
    if high - low < 64:
        used = f"all values are from {low:g} to {high:g} of 0 to 255; are they stored as they should be?"
        found.append(Finding("warning", "range of values", detail=used))
    copies, original = _copies(ids, names, groups, looks)
    found += copies
    for split, fold in folds.items():
        for what, key in (("duplicates", original), ("groups", groups)):
            leaks = (pd.Series(fold).groupby(key).transform("nunique").to_numpy() > 1)[fold == 1]
            if leaks.any():
                share = f"{leaks.sum()} of {len(leaks)} test images ({leaks.mean():.1%}) have {what}"
                severity = "note" if index.parts is None or what == "duplicates" else "warning"
                severity = "error" if (what, split) == ("groups", "grouped") else severity
                found.append(Finding(severity, f"{what} across the split", split, "", f"{share} in training"))
    found.sort(key=lambda row: CHECKS.index(row.check))
    return pd.DataFrame(found, columns=Finding._fields, dtype=object)


def _look(pixels: np.ndarray) -> tuple:
    """What an image (C, H, W) tells, as `LOOKS` names it."""
    picture = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    grey = Image.fromarray(picture).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    content = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    constant, ends = (pixels == pixels[:, :1, :1]).all(), (int(pixels.min()), int(pixels.max()))
    return None, content, min(pixels.shape[1:]), *ends, constant, np.asarray(grey)


def _copies(ids, names, groups, looks: pd.DataFrame) -> tuple[list[Finding], np.ndarray]:
    """What is told of each copy, and the row of each image's original, which is its own where there is none."""
    read = looks.reset_index().dropna(subset="content")
    first = read.index.to_series().groupby(read["content"]).transform("first")
    pairs = [(i, j, "exact", "the same pixels") for j, i in first.items() if i != j]
    large = read[(first == read.index) & (read["shorter side"] >= THUMBNAIL)]
    for i, j, alike, turned in near_pairs(np.stack(large["thumbnail"])) if len(large) else ():
        how = f"similarity {alike:.2f}{', turned or mirrored' * turned}"
        pairs.append((large.index[i], large.index[j], "near", how))
    found, original = [], np.arange(len(ids))
    for i, j, kind, how in sorted(pairs, key=lambda pair: pair[1]):
        original[j], known = original[i], groups[i] == groups[j]
        how += ", in one group" if known else ", in different groups; remove one, or give both one group"
        severity = "note" if known and kind == "near" else "warning"
        found.append(Finding(severity, f"{kind} duplicates", ids[i], ids[j], how))
        if names[i] != names[j]:
            severity = "error" if kind == "exact" else "warning"
            how = f"{names[i]} and {names[j]}; correct or remove one ({how})"
            found.append(Finding(severity, "duplicates across classes", ids[i], ids[j], how))
    return found, original


def near_pairs(thumbnails: np.ndarray) -> list[tuple[int, int, float, bool]]:
    """Each copy by its looks, after the earlier image that it resembles most; how much; and if it is turned.

    What is compared is fine texture, each pixel's difference from its neighbours divided by how much these differ: by
    grey levels alone all chest X-rays are alike, and so are all brown spots in the middle of pink skin. All pairs of
    thumbnails, uint8 (N, 36, 36), are compared, one of each in all eight orientations. What is not seen: copies shifted
    or cut by more than about 1 % of the side, and turned by other angles.
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
