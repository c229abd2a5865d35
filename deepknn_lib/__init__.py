"""Deep kNN for medical image classification (Zhuang et al., MICCAI 2020), reproduced.

The method is in four short modules: `losses`, `neighbors`, `sampling`, `training`; how it is judged is in
`metrics`. Importing the package needs torch and numpy only; everything heavier is imported where it is used.
"""

from deepknn_lib.losses import batch_hard_triplet_loss, class_weights, deep_knn_loss
from deepknn_lib.neighbors import Neighbors, batch_neighbors, majority_vote, nearest_neighbors
from deepknn_lib.sampling import epoch_batches

__version__ = "0.1.0"

__all__ = [
    "Neighbors",
    "batch_hard_triplet_loss",
    "batch_neighbors",
    "class_weights",
    "deep_knn_loss",
    "epoch_batches",
    "majority_vote",
    "nearest_neighbors",
]
