"""What `python -m deepknn_lib verify` looks at before anyone trains: bad files, duplicates, classes, groups, leaks."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from deepknn_lib.datasets.decode import open_image
from deepknn_lib.datasets.load import (
    N_FOLDS,
    SPLITS,
    entry_of,
    file_name,
    folds_of,
    index_of,
    tell,
    write_folds,
)
from deepknn_lib.datasets.readers import Index
from deepknn_lib.storage import data_dir, whole_file

COLUMNS = ["severity", "check", "item", "other", "detail"]
CHECKS = ("unreadable images", "class counts", "small classes", "tiny images", "constant images")
CHECKS += ("exact duplicates", "near duplicates", "duplicates across classes", "duplicates across the split")
CHECKS += ("groups of several classes", "groups across the split")
THUMBNAIL = (
    36  # pixels a side; of chest X-rays of 28 pixels 40 wrong pairs were found, of the larger ones none
)
SIMILAR = (
    0.65  # different images of three real sets stay below 0.59; 99.7 % of copies at JPEG quality 40 are above
)
CONTRAST = 1.0  # grey levels; keeps the noise of smooth skin from counting as texture
FLAT = 0.2  # thumbnails with less texture than this tell nothing; in real images it is 0.46 and more
TINY = 8  # pixels of the shorter side
ROWS = 1024  # thumbnails compared at a time


def report(name: str, out: Path | None = None) -> int:
    """Check a set; print the summary, write all findings as CSV and the summary as Markdown; 1 if there is an error."""
    tell(name)
    found, checks = of_dataset(name)
    out = out or data_dir() / "verify" / f"{file_name(name)}.csv"
    rows = [checks.columns, ["---"] * len(checks.columns), *checks.itertuples(index=False)]
    lines = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    for path, text in ((out, found.to_csv(index=False)), (out.with_suffix(".md"), f"{lines}\n")):
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    errors = found[found["severity"] == "error"]
    print(lines)
    for row in errors.head(20).itertuples(index=False):
        print(f"ERROR {row.check}: {row.item} {row.other} {row.detail}")
    print(
        f"{name}: {len(errors)} errors, {(found['severity'] == 'warning').sum()} warnings; all of it: {out}"
    )
    return int(failed(found))


def failed(found: pd.DataFrame) -> bool:
    """Whether `verify` found an error."""
    return bool((found["severity"] == "error").any())


def of_dataset(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `verify` finds in a set, against what the catalogue says it should hold, and a summary of it.

    Returns
    -------
    found : DataFrame
        As of `verify`, with what is wrong with the splits and the pinned contents.
    checks : DataFrame
        One row a check, also of those that found nothing: `check`, `errors`, `warnings`, `notes` and `the first`.
    """
    entry, index, folds, rows = entry_of(name)[0], index_of(name), {}, []
    contents = {"labels": np.array(index.class_names)[index.labels], "groups": index.groups}
    small = np.bincount(index.labels, minlength=len(index.class_names)).min() < N_FOLDS
    for split in () if small else SPLITS:
        try:
            contents[split] = folds[split] = folds_of(name, index, split)
            write_folds(name, index, split, 1, folds[split])
        except (FileNotFoundError, ValueError) as error:
            severity = "error" if isinstance(error, ValueError) else "warning"
            rows.append((severity, f"split: {split}", "", "", str(error)))
    for what in entry.pins.keys() & contents.keys():
        if fingerprint(index.ids, contents[what]) != entry.pins[what]:
            detail = "these are not the ones that the results of this repository rest on; compare with the set's home"
            rows.append(("warning", "pinned contents", what, "", detail))
    found = verify(index, entry.counts, folds)
    found = pd.concat([pd.DataFrame(rows, columns=COLUMNS, dtype=str), found], ignore_index=True)
    checks = [
        c if "across the split" not in c else f"{c}: {split}" for c in CHECKS for split in (folds or [""])
    ]
    counts = []
    for check in dict.fromkeys([*(c for c in found["check"] if c not in checks), *checks]):
        of_check = found[found["check"] == check]
        n = [(of_check["severity"] == severity).sum() for severity in ("error", "warning", "note")]
        counts.append(
            (check, *n, "; ".join(filter(None, of_check.iloc[:1, 2:].to_numpy().flat)) or "nothing found")
        )
    return found, pd.DataFrame(counts, columns=["check", "errors", "warnings", "notes", "the first"])


def fingerprint(ids: np.ndarray, values: np.ndarray) -> str:
    """Sha256 over the sorted lines `<id>,<value>`: the same for any layout, order and line endings of the files."""
    lines = sorted(f"{i},{v}" for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def verify(index: Index, expected: dict[str, int], folds: dict[str, np.ndarray]) -> pd.DataFrame:
    """Everything that is wrong, doubtful or worth knowing in a data set; every image is opened fully.

    Parameters
    ----------
    index : Index
    expected : dict
        How many images each class should have, by its name; empty if that is not known.
    folds : dict of ndarray, int64, (N,)
        By the split's name ("paper", "grouped"), the fold that tests on each row; pairs are looked at for fold 1.

    Returns
    -------
    DataFrame
        The columns `severity` ("error", "warning" or "note"), `check`, `item`, `other` (a pair's second image) and
        `detail`, in the order of the checks and then of the rows. Of k images that are alike, k - 1 pairs are given.
    """
    rows = [("error", problem.check, problem.item, "", problem.reason) for problem in index.problems]

    def add(severity: str, check: str, items, detail: str) -> None:
        rows.extend((severity, check, str(item), "", detail) for item in items)

    looks, reason = [], "get the set again"
    try:
        looks.extend(_looks(index))  # keeps what came before an error
    except (
        Exception
    ) as error:  # of arrays, by NumPy, zipfile or zlib; a file that cannot be read gives a string
        reason = f"{type(error).__name__}: {error}"
    images = {row: look for row, look in enumerate(looks[: len(index)]) if not isinstance(look, str)}
    for row, look in enumerate(looks):
        add("error", CHECKS[0], index.ids[row : row + 1] if isinstance(look, str) else [], str(look))
    if len(looks) != len(index):
        add("error", CHECKS[0], [""], f"{len(looks)} images came for {len(index)} rows: {reason}")
    counts = np.bincount(index.labels, minlength=len(index.class_names)).tolist()
    has = dict(zip(index.class_names, counts, strict=True))
    for name in [name for name in has | expected if expected and has.get(name, 0) != expected.get(name, 0)]:
        wanted = f"{expected.get(name, 0)}; get the set again"
        add("error", CHECKS[1], [name], f"has {has.get(name, 0)} images instead of {wanted}")
    for name in [name for name, n in has.items() if n < N_FOLDS]:
        add(
            "error",
            CHECKS[2],
            [name],
            f"has {has[name]} images: five folds need 5; add some or leave the class out",
        )
    tiny = [index.ids[row] for row, (_, side, *_) in images.items() if side < TINY]
    add("warning", CHECKS[3], tiny, f"its shorter side has fewer than {TINY} pixels; is it an icon?")
    constant = [index.ids[row] for row, (_, _, is_constant, _) in images.items() if is_constant]
    add("warning", CHECKS[4], constant, "all its pixels have one colour; replace or remove it")
    rows += _duplicates(index, images, folds)
    kinds = pd.Series(np.array(index.class_names)[index.labels]).groupby(index.groups).unique()
    for group in kinds.index[kinds.map(len) > 1]:
        detail = (
            f"its images are of {', '.join(sorted(kinds[group]))}; check that they show one patient or lesion"
        )
        add("warning", CHECKS[9], [group], detail)
    for name, fold in folds.items():
        severity = "error" if name == "grouped" else "note"
        rows += _leak(severity, f"{CHECKS[10]}: {name}", index.groups, "their group", fold)
    return pd.DataFrame(rows, columns=COLUMNS)


def _looks(index: Index) -> Iterator[tuple | str]:
    """Of each image a digest of its pixels, its shorter side, whether it is of one colour, a thumbnail; or an error."""

    def look(source: Path | np.ndarray) -> tuple | str:
        try:
            if isinstance(source, Path):
                image = open_image(source)
            else:
                image = Image.fromarray(np.ascontiguousarray(source.transpose(1, 2, 0)).squeeze())
        except (ValueError, MemoryError) as error:
            return f"{source} {str(error) or 'is larger than the memory'}"
        sha256 = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
        constant = not np.ptp(np.atleast_2d(image.getextrema()), axis=1).any()
        grey = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return sha256, min(image.size), constant, np.asarray(grey)

    with (
        tqdm(total=len(index), desc="verifying", disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for block in index.blocks(48) if index.blocks else [index.files]:
            for result in pool.map(look, block):
                bar.update()
                yield result


def _duplicates(index: Index, images: dict[int, tuple], folds: dict[str, np.ndarray]) -> list[tuple]:
    first, rows = {}, []
    pairs = [(first.setdefault(look[0], row), row, "the same pixels") for row, look in images.items()]
    pairs = sorted(pair for pair in pairs if pair[0] != pair[1])
    n_exact, small = len(pairs), sum(look[1] < THUMBNAIL for look in images.values())
    kept = np.array([row for row in first.values() if images[row][1] >= THUMBNAIL], dtype=np.int64)
    for i, j, similarity in near_pairs(np.array([images[row][3] for row in kept], np.uint8)):
        pairs.append((kept[int(i)], kept[int(j)], f"similarity {similarity:.2f}"))
    if small:
        detail = f"{small} images are smaller than {THUMBNAIL} pixels: of these only exact duplicates were looked for"
        rows.append(("note", CHECKS[6], "", "", detail))
    ends = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    joined = csr_matrix((np.ones(len(pairs)), ends), shape=(len(index), len(index)))
    clusters = connected_components(joined, directed=False)[1]
    for name, fold in folds.items():
        rows += _leak("note", f"{CHECKS[8]}: {name}", clusters, "a duplicate (or its duplicate)", fold)
    for number, (i, j, kind) in enumerate(pairs):
        ids, known, exact = (index.ids[i], index.ids[j]), index.groups[i] == index.groups[j], number < n_exact
        kind += ", in one group" if known else ", in different groups; remove one, or give both one group"
        severity = "note" if known else "warning"  # views of one lesion are what a group is for
        rows.append(("warning" if exact else severity, CHECKS[5 if exact else 6], *ids, kind))
        if index.labels[i] != index.labels[j]:
            names = " and ".join(index.class_names[index.labels[row]] for row in (i, j))
            detail = f"{names}; correct or remove one ({kind})"
            rows.append(("error" if exact else "warning", CHECKS[7], *ids, detail))
        for name in [name for name, fold in folds.items() if (fold[i] == 1) != (fold[j] == 1)]:
            detail = f"the {'first' if folds[name][i] == 1 else 'second'} is in the test part; {kind}"
            rows.append((severity, f"{CHECKS[8]}: {name}", *ids, detail))
    order = [*CHECKS[5:8], *(f"{CHECKS[8]}: {name}" for name in folds)]
    return sorted(rows, key=lambda row: order.index(row[1]))


def near_pairs(thumbnails: np.ndarray) -> np.ndarray:
    """Pairs of images that are copies by their looks: all pairs are compared, and of k alike k - 1 are given.

    What is compared is fine texture, each pixel's difference from its neighbours divided by how much these differ: by
    grey levels alone all chest X-rays are alike, and so are all brown spots in the middle of pink skin. From uint8
    (N, THUMBNAIL, THUMBNAIL) comes float64 (n, 3): first and second row, similarity; sorted by rows.
    """
    if len(thumbnails) == 0:
        return np.empty((0, 3))
    grey = torch.from_numpy(thumbnails)[:, None].float()
    fine = grey[..., 1:-1, 1:-1] - avg_pool2d(
        grey, 3, 1
    )  # no padding: its traces would be alike in all images
    local = (fine[..., 1:-1, 1:-1] / (avg_pool2d(fine**2, 3, 1) + CONTRAST**2).sqrt()).flatten(1)
    flat = local - local.mean(1, keepdim=True)
    textures, pairs = flat / flat.norm(dim=1, keepdim=True).clamp(min=FLAT * flat.shape[1] ** 0.5), []
    for a in range(0, len(textures), ROWS):
        similarity = (textures[a : a + ROWS] @ textures[a:].T).triu(1)
        i, j = (similarity >= SIMILAR).nonzero(as_tuple=True)
        pairs.append(np.stack([i.numpy() + a, j.numpy() + a, similarity[i, j].numpy()]))
    i, j, similarity = np.concatenate(pairs, axis=1)
    graph = csr_matrix((2 - similarity, (i.astype(int), j.astype(int))), shape=(len(textures), len(textures)))
    tree = minimum_spanning_tree(graph).tocoo()  # the most similar pairs that join all that are joined
    return np.stack([tree.row, tree.col, 2 - tree.data], axis=1)[np.lexsort((tree.col, tree.row))]


def _leak(severity: str, check: str, keys: np.ndarray, what: str, fold: np.ndarray) -> list[tuple]:
    """How many test images share their key with a training image: one row, or none."""
    crossing = (
        pd.Series(fold).groupby(keys).transform("nunique") > 1
    ).to_numpy()  # a key that is in several folds
    test = crossing[fold == 1]
    words = f"{test.sum()} of {len(test)} test images ({test.sum() / max(len(test), 1):.1%}) have {what} in training"
    if len(np.unique(fold)) > 2:  # else the other part is never tested on
        words += f"; over all folds {crossing.sum()} of {len(fold)} ({crossing.mean():.1%})"
    return [(severity, check, "", "", words)] if crossing.any() else []
