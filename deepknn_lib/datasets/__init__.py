"""Data sets: from a name to images, labels, ids, groups and a split; knows neither the method nor the study."""

from deepknn_lib.datasets import verify
from deepknn_lib.datasets.decode import ImageSet, Rows
from deepknn_lib.datasets.download import download
from deepknn_lib.datasets.load import Dataset, available, dataset_digest, load_dataset, validation_part
from deepknn_lib.datasets.readers import CATALOG

__all__ = ["CATALOG", "Dataset", "ImageSet", "Rows", "available", "dataset_digest", "download"]
__all__ += ["load_dataset", "validation_part", "verify"]
