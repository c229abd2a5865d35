"""Checks of the exercises of 11 · All tables, and a verdict on every claim."""

import numpy as np
import pandas as pd
from exercises.compare import compare

from deepknn_lib.storage import repository
from deepknn_lib.study import claims, results


def check_images_of_rare_class(n) -> bool:
    """The smallest number of test images that gives every RS of the paper's kNN rows on Skin-7, to one decimal.

    One whole number.
    """
    table = results.paper("table2").query("dataset == 'Skin-7' and method == 'knn'")
    return compare(n, _smallest(table["rs"].to_numpy()))


def _smallest(values: np.ndarray) -> int:
    """The smallest n of which each value is a share k / n, in per cent to one decimal."""
    for n in range(1, 1000):
        shares = 100 * np.arange(n + 1) / n
        if (np.abs(values[:, None] - shares).min(1) <= 0.05 + 1e-9).all():
            return n
    raise ValueError("no number of images up to 999 gives these values")


def check_rule(rule) -> bool:
    """A function that gives one comparison its word, as the notebook's rule does.

    `rule(low, high, bound, side)` says `"holds"`, `"contradicted"` or `"undecided"`. The claim wants the whole interval
    above `bound` if `side` is `>`, and below it if `side` is `<`.
    """
    simple = {(1, 2, 0, ">"): "holds", (-2, -1, 0, ">"): "contradicted", (-1, 1, 0, ">"): "undecided"}
    simple |= {(1, 2, 3, "<"): "holds", (4, 5, 3, "<"): "contradicted", (2, 4, 3, "<"): "undecided"}
    simple |= {(-3, -1, -3.4, ">"): "holds"}
    for (low, high, bound, side), right in simple.items():
        if (given := rule(low, high, bound, side)) != right:
            told = f"{low} to {high}, where the claim wants it {side} {bound}"
            print(f"not yet: {given!r} is not it for {told}")
            return False
    judged = claims.comparisons(_evidence()).query("aside == ''")
    rows = judged[["low", "high", "bound", "side"]].itertuples(index=False, name=None)
    off = sum(rule(*row) != right for row, right in zip(rows, judged["says"], strict=True))
    print(f"not yet: {off} of {len(judged)} comparisons on Skin-7 get another word" if off else "right")
    return not off


def check_bound(points) -> bool:
    """The highest bound, in points and right to a tenth, at which no comparison contradicts C9 on Skin-7."""
    rows = claims.comparisons(_evidence()).query("claim == 'C9' and aside == ''")
    right = float(rows["high"].min())
    return compare(points, right, 0.06 / abs(right))


def _evidence() -> pd.DataFrame:
    """The committed comparisons on Skin-7."""
    return pd.read_csv(repository() / "data" / "results" / "skin7_evidence.csv")
