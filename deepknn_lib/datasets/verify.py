"""What `python -m deepknn_lib verify` looks at before anyone trains: bad files, duplicates, classes, groups, leaks."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from deepknn_lib.datasets import load
from deepknn_lib.datasets.decode import each, open_image
from deepknn_lib.datasets.readers import Index
from deepknn_lib.storage import data_dir, whole_file

COLUMNS = ["severity", "check", "item", "other", "detail"]
CHECKS = ["unreadable images", "class counts", "small classes", "tiny images", "constant images"]
CHECKS += ["exact duplicates", "near duplicates", "duplicates across classes", "duplicates across the split"]
CHECKS += ["groups of several classes", "groups across the split"]
THUMBNAIL = 36  # pixels a side; 40 wrong pairs were found in chest X-rays of 28 pixels, in larger ones none
SIMILAR = 0.65  # of three real sets, different images stay below 0.59, 99.7 % of copies at JPEG 40 are above
CONTRAST = 1.0  # grey levels; keeps the noise of smooth skin from counting as texture
FLAT = 0.2  # thumbnails with less texture than this tell nothing; in real images it is 0.46 and more
TINY = 8  # pixels of the shorter side
ROWS = 1024  # thumbnails compared at a time


def report(name: str, out: Path | None = None) -> int:
    """Check a set; print the summary, write all findings as CSV and the summary as Markdown; 1 if there is an error."""
    load.tell(name)
    found, checks = of_dataset(name)
    out = out or data_dir() / "verify" / f"{load.file_name(name)}.csv"
    rows = [checks.columns, ["---"] * len(checks.columns), *checks.itertuples(index=False)]
    lines = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    for path, text in ((out, found.to_csv(index=False)), (out.with_suffix(".md"), f"{lines}\n")):
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(lines)
    errors = found[found["severity"] == "error"]
    for _, check, item, other, detail in errors.head(20).itertuples(index=False):
        print(f"ERROR {check}: {item} {other} {detail}")
    warnings = (found["severity"] == "warning").sum()
    print(f"{name}: {len(errors)} errors, {warnings} warnings; all of it: {out}")
    return int(failed(found))


def failed(found: pd.DataFrame) -> bool:
    """Whether `verify` found an error."""
    return bool((found["severity"] == "error").any())


def of_dataset(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is wrong with a set, its splits and its pinned contents (as of `verify`), and a summary.

    The summary has one row a check, also of those that found nothing: `check`, `errors`, `warnings`, `notes` and
    `the first`.
    """
    entry, index, folds, parts = load.entry_of(name)[0], load.index_of(name), {}, []
    contents = {"labels": np.array(index.class_names)[index.labels], "groups": index.groups}
    small = np.bincount(index.labels, minlength=len(index.class_names)).min() < load.N_FOLDS
    for split in () if small else load.SPLITS:
        try:
            contents[split] = folds[split] = load.folds_of(name, index, split)
            load.write_folds(name, index, split, 1, folds[split])
        except (FileNotFoundError, ValueError) as error:
            severity = "error" if isinstance(error, ValueError) else "warning"
            parts.append(_rows(severity, f"split: {split}", [""], str(error)))
    for what in entry.pins.keys() & contents.keys():
        if fingerprint(index.ids, contents[what]) != entry.pins[what]:
            detail = "these are not the ones that the results of this repository rest on; compare with the set's home"
            parts.append(_rows("warning", "pinned contents", [what], detail))
    found = pd.concat([*parts, verify(index, entry.counts, folds)], ignore_index=True)
    every = [f"{c}: {split}" if "the split" in c else c for c in CHECKS for split in folds or [""]]
    order = list(dict.fromkeys([*(check for check in found["check"] if check not in every), *every]))
    counts = pd.crosstab(found["check"], found["severity"])
    checks = counts.reindex(index=order, columns=["error", "warning", "note"], fill_value=0)
    checks = checks.add_suffix("s").reset_index(names="check")
    first = {check: "; ".join(filter(None, told)) for _, check, *told in found[::-1].itertuples(index=False)}
    return found, checks.assign(**{"the first": [first.get(check, "nothing found") for check in order]})


def fingerprint(ids: np.ndarray, values: np.ndarray) -> str:
    """Sha256 over the sorted lines `<id>,<value>`: the same for any layout, order and line endings of the files."""
    lines = sorted(f"{i},{v}" for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def verify(index: Index, expected: dict[str, int], folds: dict[str, np.ndarray]) -> pd.DataFrame:
    """Everything that is wrong, doubtful or worth knowing in a data set; every image is opened fully.

    `expected` is how many images each class should have, empty if that is not known; `folds` holds by the name of a
    split the fold that tests on each row, int64 (N,); pairs are looked at for fold 1. The columns are `severity`
    ("error", "warning" or "note"), `check`, `item`, `other` (a pair's second image) and `detail`, in the order of the
    checks and then of the rows. Of k images that are alike, k - 1 pairs are given.
    """
    looks, stopped = _looks(index)
    came = [] if len(looks) == len(index) else [f"{len(looks)} images came for {len(index)} rows: {stopped}"]
    looks = looks[: len(index)]
    bad, looks = looks[looks["error"] != ""], looks[looks["error"] == ""]
    tiny, constant = (index.ids[looks.index[found]] for found in (looks["side"] < TINY, looks["constant"]))
    parts = [
        *(_rows("error", check, [item], reason) for check, item, reason in index.problems),
        _rows("error", "unreadable images", index.ids[bad.index], bad["error"]),
        _rows("error", "unreadable images", [""] * len(came), came),
        *_counts(index, expected),
        _rows("warning", "tiny images", tiny, f"its shorter side has fewer than {TINY} pixels: an icon?"),
        _rows("warning", "constant images", constant, "all its pixels have one colour; replace or remove it"),
        *_duplicates(index, looks, folds),
        *_groups(index, folds),
    ]
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def _rows(severity, check: str, items, details, others="") -> pd.DataFrame:
    """Findings of a check, one an item; what is the same for all may be given once."""
    columns = severity, check, np.asarray(items, dtype=object), others, details
    return pd.DataFrame(dict(zip(COLUMNS, np.broadcast_arrays(*columns), strict=True)), dtype=object)


def _looks(index: Index) -> tuple[pd.DataFrame, str]:
    """Of each image that came, why it cannot be read, or what it looks like; and why no more came."""

    def look(source: Path | np.ndarray) -> tuple:
        try:
            if isinstance(source, Path):
                image = open_image(source)
            else:
                image = Image.fromarray(np.ascontiguousarray(source.transpose(1, 2, 0)).squeeze())
        except (ValueError, MemoryError) as error:
            return f"{source} {str(error) or 'is larger than the memory'}", "", 0, False, b""
        pixels = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
        constant = not np.ptp(np.atleast_2d(image.getextrema()), axis=1).any()
        grey = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return "", pixels, min(image.size), constant, grey.tobytes()

    looks, stopped = [], "get the set again"
    try:
        looks.extend(each(index, 48, look, "verifying"))  # What came before an error stays in the list.
    except Exception as error:  # NumPy and zipfile raise many kinds
        stopped = f"{type(error).__name__}: {error}"
    return pd.DataFrame(looks, columns=["error", "pixels", "side", "constant", "thumbnail"]), stopped


def _counts(index: Index, expected: dict[str, int]) -> list[pd.DataFrame]:
    counts = np.bincount(index.labels, minlength=len(index.class_names)).tolist()
    has = dict(zip(index.class_names, counts, strict=True))
    off = [name for name in has | expected if expected and has.get(name, 0) != expected.get(name, 0)]
    told = [f"has {has.get(n, 0)} images instead of {expected.get(n, 0)}; get the set again" for n in off]
    small = [name for name, n in has.items() if n < load.N_FOLDS]
    need = [f"has {has[n]} images: five folds need 5; add some or leave the class out" for n in small]
    return [_rows("error", "class counts", off, told), _rows("error", "small classes", small, need)]


def _duplicates(index: Index, looks: pd.DataFrame, folds: dict[str, np.ndarray]) -> list[pd.DataFrame]:
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    row = looks.index.to_series()
    first = row.groupby(looks["pixels"]).transform("first")
    exact = pd.DataFrame({"i": first, "j": row, "how": "the same pixels", "exact": True})[first != row]
    large = looks[(first == row) & (looks["side"] >= THUMBNAIL)]
    thumbnails = np.frombuffer(b"".join(large["thumbnail"]), np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL)
    near = [
        (*large.index[[int(i), int(j)]], f"similarity {s:.2f}", False) for i, j, s in near_pairs(thumbnails)
    ]
    pairs = pd.concat([exact.sort_values(["i", "j"]), pd.DataFrame(near, columns=exact.columns)])
    i, j, exact = (pairs[column].to_numpy(kind) for column, kind in (("i", int), ("j", int), ("exact", bool)))
    known = index.groups[i] == index.groups[j]  # Views of one lesion are what a group is for.
    apart = ", in different groups; remove one, or give both one group"
    how = pairs["how"] + np.where(known, ", in one group", apart)
    severity = np.where(known, "note", "warning")
    pairs = pairs.assign(severity=severity, item=index.ids[i], other=index.ids[j], detail=how)
    names = np.array(index.class_names, dtype=object)[index.labels]
    across = pairs.assign(severity=np.where(exact, "error", "warning"), check="duplicates across classes")
    across["detail"] = names[i] + " and " + names[j] + "; correct or remove one (" + how + ")"
    small = (looks["side"] < THUMBNAIL).sum()
    what = f"images are smaller than {THUMBNAIL} pixels: of these only exact duplicates were looked for"
    found = [
        pairs[exact].assign(severity="warning", check="exact duplicates"),
        _rows("note", "near duplicates", [""] if small else [], f"{small} {what}"),
        pairs[~exact].assign(check="near duplicates"),
        across[names[i] != names[j]],
    ]
    joined = csr_matrix((np.ones(len(pairs)), (i, j)), shape=(len(index), len(index)))
    clusters = connected_components(joined, directed=False)[1]
    for name, fold in folds.items():
        check, tested = f"duplicates across the split: {name}", fold == 1
        side = np.where(tested[i], "the first", "the second").astype(object)
        detail = side + " is in the test part; " + how
        found.append(_leak("note", check, clusters, "a duplicate (or its duplicate)", fold))
        found.append(pairs.assign(check=check, detail=detail)[tested[i] != tested[j]])
    return found


def near_pairs(thumbnails: np.ndarray) -> np.ndarray:
    """Pairs of images that are copies by their looks: all pairs are compared, and of k alike k - 1 are given.

    What is compared is fine texture, each pixel's difference from its neighbours divided by how much these differ: by
    grey levels alone all chest X-rays are alike, and so are all brown spots in the middle of pink skin. From uint8
    (N, THUMBNAIL, THUMBNAIL) comes float64 (n, 3): first and second row, similarity; sorted by rows.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    grey, pairs = torch.from_numpy(thumbnails.astype(np.float32))[:, None], [np.empty((3, 0))]
    fine = grey[..., 1:-1, 1:-1] - avg_pool2d(grey, 3, 1)  # Traces of a padding would be alike in all images.
    local = (fine[..., 1:-1, 1:-1] / (avg_pool2d(fine**2, 3, 1) + CONTRAST**2).sqrt()).flatten(1)
    flat = local - local.mean(1, keepdim=True)
    textures = flat / flat.norm(dim=1, keepdim=True).clamp(min=FLAT * flat.shape[1] ** 0.5)
    for a in range(0, len(textures), ROWS):
        similarity = (textures[a : a + ROWS] @ textures[a:].T).triu(1)
        i, j = (similarity >= SIMILAR).nonzero(as_tuple=True)
        pairs.append(np.stack([i.numpy() + a, j.numpy() + a, similarity[i, j].numpy()]))
    i, j, similarity = np.concatenate(pairs, axis=1)
    graph = csr_matrix((2 - similarity, (i.astype(int), j.astype(int))), shape=(len(textures), len(textures)))
    tree = minimum_spanning_tree(graph).tocoo()  # the most similar pairs that join all that are joined
    return np.stack([tree.row, tree.col, 2 - tree.data], axis=1)[np.lexsort((tree.col, tree.row))]


def _groups(index: Index, folds: dict[str, np.ndarray]) -> list[pd.DataFrame]:
    kinds = pd.Series(np.array(index.class_names)[index.labels]).groupby(index.groups).unique()
    mixed = kinds[kinds.map(len) > 1]
    told = [f"its images are of {', '.join(sorted(of))}; do they show one patient or lesion?" for of in mixed]
    found = [_rows("warning", "groups of several classes", mixed.index, told)]
    for name, fold in folds.items():
        severity, check = "error" if name == "grouped" else "note", f"groups across the split: {name}"
        found.append(_leak(severity, check, index.groups, "their group", fold))
    return found


def _leak(severity: str, check: str, keys: np.ndarray, what: str, fold: np.ndarray) -> pd.DataFrame:
    """How many test images share their key with a training image: one row, or none."""
    crossing = pd.Series(fold).groupby(keys).transform("nunique").to_numpy() > 1
    test = crossing[fold == 1]
    words = f"{test.sum()} of {len(test)} test images ({test.sum() / max(len(test), 1):.1%}) have {what} in training"
    if len(np.unique(fold)) > 2:  # else the other part is never tested on
        words += f"; over all folds {crossing.sum()} of {len(fold)} ({crossing.mean():.1%})"
    return _rows(severity, check, [""] if crossing.any() else [], words)
