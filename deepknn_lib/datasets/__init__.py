"""Data sets: from a name to images, labels, ids, groups and a split; knows neither the method nor the study."""

from deepknn_lib.datasets import verify
from deepknn_lib.datasets.decode import ImageSet, Rows
from deepknn_lib.datasets.download import download
from deepknn_lib.datasets.load import (
    CATALOG,
    Dataset,
    available,
    dataset_digest,
    load_dataset,
    validation_part,
)

__all__ = [
    "CATALOG",
    "Dataset",
    "ImageSet",
    "Rows",
    "available",
    "dataset_digest",
    "download",
    "load_dataset",
]
__all__ += ["validation_part", "verify"]
