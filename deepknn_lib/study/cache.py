"""The cache of runs: what is known of a run that was executed, and the folder that keeps it."""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from deepknn_lib import metrics, storage
from deepknn_lib.datasets import dataset_digest
from deepknn_lib.models import preprocessing, weights_file
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.storage import data_dir, digest
from deepknn_lib.study.runs import METHODS, SOFTMAX, Run

FILES = ("features.npz", "history.csv", "model.safetensors")  # of a run, besides run.json


@dataclass(frozen=True)
class Result:
    """A run that was executed.

    `arrays` holds `train_features` (N, D), `train_labels`, `train_ids`, `train_groups`, the same of the test part, and
    `test_logits` (N, C) where there is a classifier. `history` is that of `training.fit`, empty when nothing was
    trained. `record` has settings, scores, class names and counts, data digest, seconds, device, versions and commit.
    """

    run: Run
    arrays: dict[str, np.ndarray]
    history: list[dict]
    record: dict
    _predicted: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def learnt(self) -> bool:
        """Whether the vote is more accurate on training images than calling all the largest class, by a point."""
        counts = self.record["class_counts"]["train"]
        return not self.history or self.history[-1]["train_acc"] > 100 * max(counts) / sum(counts) + 1

    @property
    def votes(self) -> tuple[int, ...]:
        """The values of K_p that are reported: those of the method, and the run's own."""
        return tuple(dict.fromkeys((*METHODS[self.run.method].votes, self.run.k_predict)))

    def predict(self, k_predict: int | None = None) -> np.ndarray:
        """Predicted classes of the test images, int64 (N,), by the vote of K_p neighbours or by the `SOFTMAX`."""
        k_predict = self.run.k_predict if k_predict is None else k_predict
        if k_predict == SOFTMAX:
            return self.arrays["test_logits"].argmax(1)
        if k_predict not in self._predicted:
            names = ("test_features", "train_features", "train_labels")
            queries, gallery, labels = (torch.from_numpy(self.arrays[name]) for name in names)
            distances, indices = nearest_neighbors(queries, gallery, k_predict)
            votes = majority_vote(labels[indices], distances, len(self.record["class_names"]))
            self._predicted[k_predict] = votes.numpy()
        return self._predicted[k_predict]

    def scores(self, k_predict: int | None = None) -> dict[str, float]:
        """`acc`, `mcr`, `rs` and the `recall_<class>` of every class, in per cent; NaN where a class has no images."""
        names, labels, votes = self.record["class_names"], self.arrays["test_labels"], self.predict(k_predict)
        recalls = (100 * metrics.class_recalls(labels, votes, len(names))).tolist()
        of_classes = {f"recall_{name}": recall for name, recall in zip(names, recalls, strict=True)}
        return metrics.scores(labels, votes, len(names), self.record["smallest"]) | of_classes

    def reported_scores(self) -> list[dict]:
        """The scores for each K_p of the method and of the run, as JSON has them: None for what is no number."""
        rows = ({"k_predict": k} | self.scores(k) for k in self.votes)
        return [{name: None if np.isnan(value) else value for name, value in row.items()} for row in rows]


def write_run(folder: Path, result: Result, state: dict[str, torch.Tensor]) -> None:
    """Write the files of a run with the tensors of its network; `run.json` has digests of itself and of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "features.npz", **result.arrays)
    save_file({n: t.contiguous().cpu() for n, t in state.items()}, folder / "model.safetensors")
    pd.DataFrame(result.history or {"epoch": []}).to_csv(folder / "history.csv", index=False)
    record = result.record | {"run": asdict(result.run), "scores": result.reported_scores()}
    record["checksums"] = _checksums(folder, record)
    (folder / "run.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")


def read_run(folder: Path) -> Result:
    """The run that lies in a folder; an error, of whatever kind, if its files are not those that were written."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    written = record.pop("checksums")  # A run of an earlier version has none.
    if changed := [name for name, now in _checksums(folder, record).items() if now != written[name]]:
        raise ValueError(f"{', '.join(changed)} changed since")
    base = record["run"]["base"]
    run = Run(**record["run"] | {"base": base and Run(**base)})
    with np.load(folder / "features.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    history = pd.read_csv(folder / "history.csv", float_precision="round_trip").to_dict("records")
    return Result(run, arrays, history, record)


def _checksums(folder: Path, record: dict) -> dict[str, str]:
    return {name: digest(folder / name) for name in FILES} | {"run.json": digest(json.dumps(record))}


@cache
def content_digest(dataset, split, fold, image_size, backbone, weights) -> str:
    """Digest of images, labels, groups, split and a file of weights; once a process."""
    how, file = preprocessing(backbone, weights)["interpolation"], weights_file(backbone, weights)
    content = dataset_digest(dataset, split, fold, image_size, how)
    return digest(content, file) if file and file.is_file() else content


@dataclass(frozen=True)
class Entry:
    """A training in the cache, done or not. Runs that share their training, and their data, have equal entries."""

    name: str
    run: Run = field(compare=False)
    data: str = field(compare=False)  # their digest
    base: "Entry | None" = field(compare=False)

    @classmethod
    def of(cls, run: Run) -> "Entry":
        """The entry of what `run` uses, on the data that are there now."""
        run = run.trained
        data = content_digest(run.dataset, run.split, run.fold, run.image_size, run.backbone, run.weights)
        return cls(f"{run.key}-{data}", run, data, run.base and cls.of(run.base))

    @property
    def folder(self) -> Path:
        """Where the files are, or will be: `run.json`, `history.csv`, `features.npz` and `model.safetensors`."""
        return data_dir() / "runs" / self.name

    @property
    def checkpoint(self) -> Path:
        """The file of a training that was begun."""
        return data_dir() / "runs" / f"{self.name}.checkpoint.pt"

    def result(self) -> Result | None:
        """The result, if there is one; what is there but not whole is set aside, with a warning."""
        return storage.read_whole(self.folder, read_run)
