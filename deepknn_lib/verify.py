"""What `python -m deepknn_lib verify` looks at before anyone trains: bad files, duplicates, classes, groups, leaks."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from deepknn_lib.images import Listing, open_image
from deepknn_lib.splits import N_FOLDS

if TYPE_CHECKING:
    import pandas as pd

PAIRS = ("exact duplicates", "near duplicates", "duplicates across classes", "duplicates across the split")
GROUPS, SAME = ("groups of several classes", "groups across the split"), "the same pixels"
THUMBNAIL = 36  # pixels a side; of chest X-rays of 28 pixels 40 wrong pairs were found, of the larger ones none
SIMILAR = 0.65  # different images of three real sets stay below 0.59; 99.7 % of copies at JPEG quality 40 are above
CONTRAST = 1.0  # grey levels; keeps the noise of smooth skin from counting as texture
FLAT = 0.2  # thumbnails with less texture than this tell nothing; in real images it is 0.46 and more
TINY = 8  # pixels of the shorter side
ROWS, COLUMNS = 1024, 8192  # thumbnails compared at a time: 32 MB of similarities
SHOWN = 20  # errors on the screen
MANY = 1_000_000  # pairs kept before they are thinned to those that join images


class _Look(NamedTuple):
    """What is kept of one image: a digest of its pixels, its shorter side, whether it has one colour, a grey copy."""

    digest: bytes
    side: int
    constant: bool
    thumbnail: np.ndarray


def verify(listing: Listing, expected: dict[str, int] | None, folds: dict[str, np.ndarray]) -> "pd.DataFrame":
    """Everything that is wrong, doubtful or worth knowing in a data set; every image is opened fully.

    Parameters
    ----------
    listing : Listing
    expected : dict, optional
        How many images each class should have, by its name.
    folds : dict of ndarray, int64, (N,)
        By the split's name ("paper", "grouped"), the fold that tests on each row; pairs are looked at for fold 1.

    Returns
    -------
    DataFrame
        The columns `severity` ("error", "warning" or "note"), `check`, `item`, `other` (a pair's second image) and
        `detail`, in the order of the checks and then of the rows. Of k images that are alike, k - 1 pairs are given.
    """
    import pandas as pd

    rows = [("error", problem.check, problem.item, "", problem.reason) for problem in listing.problems]
    looks, reason = [], "get the set again"
    try:
        looks.extend(_looks(listing))  # keeps what came before an error
    except Exception as error:  # of arrays, by NumPy, zipfile or zlib; a file that cannot be read gives a string
        reason = f"{type(error).__name__}: {error}"
    bad = {row: look for row, look in enumerate(looks[: len(listing)]) if isinstance(look, str)}
    rows += [("error", "unreadable images", listing.ids[row], "", look) for row, look in bad.items()]
    if len(looks) != len(listing):
        rows.append(("error", "unreadable images", "", "", f"{len(looks)} images came for {len(listing)} rows: {reason}"))
    images = {row: look for row, look in enumerate(looks[: len(listing)]) if isinstance(look, _Look)}
    rows += _classes(listing, expected)
    detail = f"its shorter side has fewer than {TINY} pixels; is it an icon?"
    rows += [("warning", "tiny images", listing.ids[row], "", detail) for row, look in images.items() if look.side < TINY]
    detail = "all its pixels have one colour; replace or remove it"
    rows += [("warning", "constant images", listing.ids[row], "", detail) for row, look in images.items() if look.constant]
    rows += _duplicates(listing, images, folds) + _groups(listing, folds)
    return pd.DataFrame([map(str, row) for row in rows], columns=["severity", "check", "item", "other", "detail"])


def of_dataset(name: str) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """`verify` and `summary` of a set by its name, against what the catalogue says it should hold.

    Raises
    ------
    ValueError, OSError
        If the set is unknown, not there, or in no layout that can be listed.
    """
    import pandas as pd

    from deepknn_lib.datasets import SPLITS, entry_of, fingerprint, folds_of, listing_of, write_folds

    entry, listing, folds, rows = entry_of(name)[0], listing_of(name), {}, []
    contents = {"labels": np.array(listing.class_names)[listing.labels], "groups": listing.groups}
    small = len(listing) and np.bincount(listing.labels, minlength=len(listing.class_names)).min() < N_FOLDS
    for split in SPLITS:
        if small or not len(listing):
            continue  # an error already, and nothing to cut
        try:
            contents[split] = folds[split] = folds_of(name, listing, split)
            write_folds(name, listing, split, 1, folds[split])
        except FileNotFoundError as error:
            rows.append(("warning", f"split: {split}", "", "", str(error)))
        except ValueError as error:
            rows.append(("error", f"split: {split}", "", "", str(error)))
    for what in (entry.pins or {}).keys() & contents.keys():
        if fingerprint(listing.ids, contents[what]) != entry.pins[what]:
            detail = "these are not the ones that the results of this repository rest on; compare with the set's home"
            rows.append(("warning", "pinned contents", what, "", detail))
    table = verify(listing, entry.counts, folds)
    table = pd.concat([pd.DataFrame(rows, columns=table.columns, dtype=str), table], ignore_index=True)
    return table, summary(table, listing, folds)


def report(name: str, out: Path | None = None) -> int:
    """Check a set, print what was found and write it to a CSV; 1 if there is an error in it, else 0."""
    from deepknn_lib.datasets import cache_name, tell
    from deepknn_lib.storage import data_dir, whole_file

    tell(name)
    table, found = of_dataset(name)
    out = out or data_dir() / "verify" / f"{cache_name(name)}.csv"
    with whole_file(out) as temporary:
        table.to_csv(temporary, index=False)
    for check, looked_at, *counts, first in found.itertuples(index=False):
        kinds = ", ".join(f"{n} {kind}" for n, kind in zip(counts, ("errors", "warnings", "notes"), strict=True) if n)
        print(f"{check} ({looked_at}): {kinds or 'ok'}{f'. {first}' if kinds else ''}")
    errors = table[table["severity"] == "error"]
    for row in errors.head(SHOWN).itertuples(index=False):
        print(f"ERROR {row.check}: {' '.join(filter(None, (row.item, row.other, row.detail)))}")
    more = f" ({len(errors) - SHOWN} more)" if len(errors) > SHOWN else ""
    print(f"{name}: {len(errors)} errors{more}, {(table['severity'] == 'warning').sum()} warnings; all of it: {out}")
    return int(failed(table))


def failed(table: "pd.DataFrame") -> bool:
    """Whether `verify` found an error."""
    return bool((table["severity"] == "error").any())


def summary(table: "pd.DataFrame", listing: Listing, folds: dict[str, np.ndarray]) -> "pd.DataFrame":
    """One row a check, also of those that found nothing.

    Returns
    -------
    DataFrame
        The columns `check`, `looked at`, `errors`, `warnings`, `notes` and `the first`: the check's first row in words,
        which for a split says how many test images are concerned.
    """
    import pandas as pd

    images, classes = f"{len(listing)} images", f"{len(listing.class_names)} classes"
    bad = (table["check"] == "unreadable images") & (table["item"] != "")
    read = f"{len(listing) - int(bad.sum())} images"
    groups, rows = f"{len(set(listing.groups))} groups", "tables and folders"
    checks = dict.fromkeys([c for c in table["check"] if c.startswith(("split: ", "pinned"))], "the splits and contents")
    checks |= dict.fromkeys([problem.check for problem in listing.problems] or [rows], f"{len(listing)} rows")
    checks |= {"unreadable images": images, "class counts": classes, "small classes": classes}
    checks |= dict.fromkeys(("tiny images", "constant images", *PAIRS[:3], *(f"{PAIRS[3]}: {name}" for name in folds)), read)
    checks |= dict.fromkeys((GROUPS[0], *(f"{GROUPS[1]}: {name}" for name in folds)), groups)
    out = []
    for check, looked_at in checks.items():
        found = table[table["check"] == check]
        counts = [int((found["severity"] == severity).sum()) for severity in ("error", "warning", "note")]
        first = "; ".join(text for text in found.iloc[:1, 2:].to_numpy().flat if text)
        out.append((check, looked_at, *counts, first or "nothing found"))
    return pd.DataFrame(out, columns=["check", "looked at", "errors", "warnings", "notes", "the first"])


def _looks(listing: Listing) -> Iterator[_Look | str]:
    """A `_Look` of each image in turn, or what is wrong with it."""
    from PIL import Image
    from tqdm import tqdm

    def look(source) -> _Look | str:
        try:
            if isinstance(source, np.ndarray):
                image = Image.fromarray(source[0] if len(source) == 1 else np.ascontiguousarray(source.transpose(1, 2, 0)))
            else:
                image = open_image(source)
            digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
        except (ValueError, MemoryError) as error:
            return f"{source} {str(error) or 'is larger than the memory'}"
        grey = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return _Look(digest, min(image.size), not np.ptp(np.atleast_2d(image.getextrema()), axis=1).any(), np.asarray(grey))

    bar = tqdm(total=len(listing), desc="verifying", disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding, shrinking, hashing let go of Python's lock
        for block in listing.blocks() if listing.blocks else [listing.files]:
            for result in pool.map(look, block):
                bar.update()
                yield result


def _classes(listing: Listing, expected: dict[str, int] | None) -> list[tuple]:
    counts = np.bincount(listing.labels, minlength=len(listing.class_names)).tolist()
    found = dict(zip(listing.class_names, counts, strict=True))
    expected = found if expected is None else expected
    rows = []
    for name in dict.fromkeys([*found, *expected]):
        has, wanted = found.get(name, 0), expected.get(name, 0)
        if has != wanted:
            rows.append(("error", "class counts", name, "", f"has {has} images instead of {wanted}; get the set again"))
    detail = f"images: {N_FOLDS} folds need {N_FOLDS}; add some or leave the class out"
    return rows + [("error", "small classes", name, "", f"has {n} {detail}") for name, n in found.items() if n < N_FOLDS]


def _duplicates(listing: Listing, images: dict[int, _Look], folds: dict[str, np.ndarray]) -> list[tuple]:
    first: dict[bytes, int] = {}
    exact = [(first.setdefault(look.digest, row), row) for row, look in images.items()]
    kept = np.array([row for row in first.values() if images[row].side >= THUMBNAIL], dtype=np.int64)
    thumbnails = np.array([images[row].thumbnail for row in kept], np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL)
    near, rows = _near_pairs(thumbnails), []
    pairs = [(i, j, SAME) for i, j in sorted(exact) if i != j]
    pairs += [(*kept[[int(i), int(j)]], f"similarity {similarity:.2f}") for i, j, similarity in near]
    if small := sum(look.side < THUMBNAIL for look in images.values()):
        detail = f"{small} images are smaller than {THUMBNAIL} pixels: of these only exact duplicates were looked for"
        rows.append(("note", PAIRS[1], "", "", detail))
    ends = [i for i, _, _ in pairs], [j for _, j, _ in pairs]
    clusters = connected_components(csr_matrix((np.ones(len(pairs)), ends), shape=(len(listing),) * 2), directed=False)[1]
    for name, fold in folds.items():
        rows += _leak("note", f"{PAIRS[3]}: {name}", clusters, "a duplicate (or its duplicate)", fold)
    for i, j, kind in pairs:
        ids, known, is_exact = (listing.ids[i], listing.ids[j]), listing.groups[i] == listing.groups[j], kind == SAME
        kind += ", in one group" if known else ", in different groups; remove one, or give both one group"
        severity = "note" if known else "warning"  # views of one lesion are what a group is for
        rows.append(("warning", PAIRS[0], *ids, kind) if is_exact else (severity, PAIRS[1], *ids, kind))
        classes = [listing.class_names[listing.labels[row]] for row in (i, j)]
        if classes[0] != classes[1]:
            detail = f"{classes[0]} and {classes[1]}; correct or remove one ({kind})"
            rows.append(("error" if is_exact else "warning", PAIRS[2], *ids, detail))
        for name, fold in folds.items():
            if (fold[i] == 1) != (fold[j] == 1):
                detail = f"the {'first' if fold[i] == 1 else 'second'} is in the test part; {kind}"
                rows.append((severity, f"{PAIRS[3]}: {name}", *ids, detail))
    order = [*PAIRS[:3], *(f"{PAIRS[3]}: {name}" for name in folds)]
    return sorted(rows, key=lambda row: order.index(row[1]))


def _near_pairs(thumbnails: np.ndarray) -> np.ndarray:
    """Pairs of images that are copies by their looks: all pairs are compared, and of k alike k - 1 are given.

    What is compared is fine texture, each pixel's difference from its neighbours divided by how much these differ: by
    grey levels alone all chest X-rays are alike, and so are all brown spots in the middle of pink skin. From uint8
    (N, side, side) comes float64 (n, 3): first and second row, similarity; sorted by rows.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    textures = torch.empty(len(thumbnails), (thumbnails.shape[1] - 4) ** 2)
    for start in range(0, len(thumbnails), ROWS):
        grey = torch.from_numpy(thumbnails[start : start + ROWS])[:, None].float()
        fine = grey[..., 1:-1, 1:-1] - avg_pool2d(grey, 3, 1)  # no padding: its traces would be alike in all images
        local = fine[..., 1:-1, 1:-1] / (avg_pool2d(fine**2, 3, 1) + CONTRAST**2).sqrt()
        flat = local.flatten(1) - local.flatten(1).mean(1, keepdim=True)
        textures[start : start + ROWS] = flat / flat.norm(dim=1, keepdim=True).clamp(min=FLAT * flat.shape[1] ** 0.5)
    pairs = np.empty((0, 3))
    for a in range(0, len(textures), ROWS):
        for b in range(a, len(textures), COLUMNS):
            similarity = textures[a : a + ROWS] @ textures[b : b + COLUMNS].T
            i, j = (similarity >= SIMILAR).nonzero(as_tuple=True)
            found = np.stack([i.numpy() + a, j.numpy() + b, similarity[i, j].numpy()], axis=1)
            pairs = np.concatenate([pairs, found[found[:, 0] < found[:, 1]]])
            pairs = _forest(pairs, len(textures)) if len(pairs) > MANY else pairs
    return _forest(pairs, len(textures))


def _forest(pairs: np.ndarray, n: int) -> np.ndarray:
    """Of pairs (i, j, similarity), the most similar ones that still join all that were joined; sorted."""
    i, j = pairs[:, :2].astype(np.int64).T
    tree = minimum_spanning_tree(csr_matrix((2 - pairs[:, 2], (i, j)), shape=(n, n))).tocoo()
    return np.stack([tree.row, tree.col, 2 - tree.data], axis=1)[np.lexsort((tree.col, tree.row))]


def _groups(listing: Listing, folds: dict[str, np.ndarray]) -> list[tuple]:
    classes: dict[str, list[str]] = {}
    for group, label in sorted(set(zip(listing.groups.tolist(), listing.labels.tolist(), strict=True))):
        classes.setdefault(group, []).append(listing.class_names[label])
    detail = "; check that they show one patient or lesion"
    several = {group: f"its images are of {', '.join(names)}" for group, names in classes.items() if len(names) > 1}
    rows = [("warning", GROUPS[0], group, "", words + detail) for group, words in several.items()]
    for name, fold in folds.items():
        severity = "error" if name == "grouped" else "note"
        rows += _leak(severity, f"{GROUPS[1]}: {name}", listing.groups, "their group", fold)
    return rows


def _leak(severity: str, check: str, keys: np.ndarray, what: str, fold: np.ndarray) -> list[tuple]:
    """How many test images share their key with a training image: one row, or none."""
    number = np.unique(keys, return_inverse=True)[1]
    crossing = np.bincount(np.unique([number, fold], axis=1)[0])[number] > 1  # a key that is in several folds
    if not crossing.any():
        return []
    test = crossing[fold == 1]
    words = f"{test.sum()} of {len(test)} test images ({test.sum() / max(len(test), 1):.1%}) have {what} in training"
    if len(np.unique(fold)) > 2:  # else the other part is never tested on
        words += f"; over all folds {crossing.sum()} of {len(fold)} ({crossing.mean():.1%})"
    return [(severity, check, "", "", words)]
