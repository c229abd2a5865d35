"""The paper's tables cell by cell (data/paper/), and what of ours stands beside each cell."""

import numpy as np
import pandas as pd

from deepknn_lib import tables
from deepknn_lib.models import PAPER_BACKBONES, SMALL_BACKBONES
from deepknn_lib.runs import PROFILES

# The paper's data sets and ours of the same images; what differs all the same is said in each row.
SAME_IMAGES = {"Skin-7": "skin7", "Pneumonia": "pneumonia", "SD-198": "sd198", "STL10": "stl10"}
STAND_INS = {"Skin-7": ("lesions",), "Pneumonia": ("chestxray3",), "SD-198": (), "STL10": ("digits",)}
NOT_TO_BE_HAD = {
    "Pneumonia": "the RSNA images need a Kaggle account; not run by us",
    "Tiny200": "Tiny-ImageNet is not among our data sets",
    "CUB200": "CUB200-2011 is not among our data sets",
}
CAVEATS = {
    "sd198": "27 of the 198 classes", "lesions": "synthetic images", "chestxray3": "another chest X-ray set",
    "digits": "scikit-learn's digits",
}  # fmt: skip
# Which of our backbones stand for which of the paper's.
_NAMES = ("vgg19", "resnet50", "densenet121", "seresnet50")
_RELATIVES = {
    names[0]: set(names)
    for names in zip(_NAMES, PAPER_BACKBONES, SMALL_BACKBONES, PROFILES["finetune"]["backbones"], strict=True)
}
_OURS = ("dataset", "split", "backbone", "weights", "image_size", "epochs", "margin")
_KEYS = ["table", "dataset", "method", "backbone", "k_predict", "k", "m"]


def cells() -> pd.DataFrame:
    """Every score the paper reports, one row a cell.

    Returns
    -------
    DataFrame
        `table` (`2`, `3`, `4`, `S2`, `S3`, `S4`), `dataset`, `method`, `backbone`, `k_predict`, `k`, `m`, `measure` (`acc`,
        `mcr`, `rs`) and `published`, per cent. K = M = 5 where the paper's caption says nothing else.
    """
    skin7 = {"dataset": "Skin-7", "backbone": "resnet50", "k_predict": 5}
    vote = tables.paper("table_s3")
    parts = {
        "2": tables.paper("table2"),
        "3": tables.paper("table3").assign(**skin7),
        "4": tables.paper("table4").assign(dataset="SD-198", k_predict=5),
        "S2": tables.paper("table_s2"),
        "S3": vote.assign(dataset="SD-198", method="deep-knn", backbone="resnet50", k_predict=vote["k"]),
        "S4": tables.paper("table_s4").assign(method="deep-knn", backbone="resnet50"),
    }
    wide = pd.concat([part.assign(table=name) for name, part in parts.items()], ignore_index=True)
    wide = wide.fillna({"k": 5, "m": 5}).astype({"k": int, "m": int})
    long = wide.melt(_KEYS, ["acc", "mcr", "rs"], "measure", "published").dropna(subset=["published"])
    order = long["table"].map(list(parts).index)
    return long.assign(order=order).sort_values("order", kind="stable").drop(columns="order").reset_index(drop=True)


def beside(ours: pd.DataFrame) -> pd.DataFrame:
    """Each published cell with each of our results for it; where there is none, one row that says why.

    Parameters
    ----------
    ours : DataFrame
        Of `tables.over_seeds`; all data sets, splits and settings together. Trials judged on validation images are left out.

    Returns
    -------
    DataFrame
        The columns of `cells`; `our_row` (in `ours`), `our_dataset`, `our_split`, `our_backbone`, `our_weights`,
        `our_image_size`, `our_epochs`, `our_margin`, `ours`, `sd`, `seeds`, `collapsed` (runs); `difference` (ours −
        published, only on the paper's own images); `remark`: what differs, or why there is nothing.
    """
    out, ours = [], ours[ours["evaluate_on"] != "validation"]
    for cell in cells().to_dict("records"):
        names = [SAME_IMAGES.get(cell["dataset"]), *STAND_INS.get(cell["dataset"], ())]
        fits = ours[ours["dataset"].isin(names) & (ours["method"] == cell["method"])]
        fits = fits[(fits["k_predict"] == cell["k_predict"]) & fits["backbone"].isin(_RELATIVES[cell["backbone"]])]
        for name in ("k", "m"):
            fits = fits[fits[name].isna() | (fits[name] == cell[name])]
        fits = fits[fits[cell["measure"]].notna()]
        out += [cell | {"our_row": i} | _our_side(cell, row) for i, row in fits.to_dict("index").items()]
        if not len(fits):
            why = NOT_TO_BE_HAD.get(cell["dataset"], "not run: no result with this method, backbone and setting yet")
            out.append(cell | {"remark": why})
    columns = [*_KEYS, "measure", "published", "our_row", *(f"our_{name}" for name in _OURS)]
    return pd.DataFrame(out).reindex(columns=[*columns, "ours", "sd", "seeds", "collapsed", "difference", "remark"])


def _our_side(cell: dict, row: dict) -> dict:
    same = row["dataset"] == SAME_IMAGES.get(cell["dataset"])
    differs = [CAVEATS[row["dataset"]]] if row["dataset"] in CAVEATS else []
    if row["backbone"] not in (cell["backbone"], *PAPER_BACKBONES):
        differs.append(f"{row['backbone']} in place of {cell['backbone']}")
    differs.append({"none": "from scratch", "imagenet": "ImageNet weights"}.get(row["weights"], f"weights {row['weights']}"))
    differs.append(f"{row['image_size']:.0f} px")
    if row["collapsed"]:
        differs.append(f"{row['collapsed']:.0f} of {row['seeds']:.0f} runs collapsed")
    value = row[cell["measure"]]
    comparable = same and row["dataset"] not in CAVEATS
    return {f"our_{name}": row[name] for name in _OURS} | {
        "ours": value, "sd": row[f"{cell['measure']}_sd"], "seeds": row["seeds"], "collapsed": row["collapsed"],
        "difference": value - cell["published"] if comparable else np.nan,
        "remark": ", ".join(differs) + ("" if comparable else "; no difference taken"),
    }  # fmt: skip


def readable(side: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables, a row each, the paper's numbers and ours (mean ± sd over seeds) in columns of their own.

    Parameters
    ----------
    side : DataFrame
        Of `beside`.
    table : str
        `2`, `3`, `4`, `S2`, `S3` or `S4`.
    """
    part = side[side["table"] == table]
    rows = []
    for keys, of_row in part.groupby(["dataset", "backbone", "method", "k_predict", "k", "m"], sort=False):
        values = dict(zip(("dataset", "backbone", "method", "k_predict", "k", "m"), keys, strict=True))
        row = {"paper's data": values["dataset"], "method": tables.method_title(values["method"], values["k_predict"])}
        row |= {"backbone": values["backbone"]} if table in ("2", "4") else {}
        row |= {"K, M": f"{values['k']}, {values['m']}"} if table == "S3" else {}
        row["paper"] = " / ".join(f"{v:.1f}" for v in of_row.drop_duplicates("measure")["published"])
        had = of_row[of_row["ours"].notna()]
        for _, ours in had.groupby("our_row", sort=False):  # runs of other settings or another fold stay apart
            names = ours[[f"our_{name}" for name in _OURS]].iloc[0]
            text = tables.with_sd(ours.rename(columns={"sd": "ours_sd"}), "ours")
            dataset, split, backbone, weights, size, epochs, margin = names
            setting = f"{backbone}, {weights}, {size:.0f} px"
            setting += f", {epochs:.0f} epochs" * pd.notna(epochs) + f", α = {margin:g}" * pd.notna(margin)
            gap = [] if ours["difference"].isna().any() else [f"{v:+.1f}" for v in ours["difference"]]
            rows.append(row | {
                "ours": " / ".join(text), "ours − paper": " / ".join(gap) or "–", "seeds": str(int(ours["seeds"].max())),
                "our data": f"{dataset}, {split} split", "our setting": setting,
                "remark": ours["remark"].iloc[0],
            })  # fmt: skip
        if not len(had):
            none = {name: "–" for name in ("ours", "ours − paper", "seeds", "our data", "our setting")}
            rows.append(row | none | {"remark": of_row["remark"].iloc[0]})
    return pd.DataFrame(rows)
