"""Deep kNN for medical image classification (Zhuang et al., MICCAI 2020), reproduced.

The method is in five short modules: `losses`, `neighbors`, `sampling`, `training` and `metrics`. `datasets` holds the
images, `study` the comparison. Importing the package needs torch and numpy only.
"""

import warnings

from deepknn_lib.losses import class_weights, deep_knn_loss
from deepknn_lib.neighbors import Neighbors, batch_neighbors, majority_vote, nearest_neighbors
from deepknn_lib.sampling import BatchSampler

__version__ = "0.2.0"

# In a notebook timm's progress bars say so when timm is imported, and name this machine's folders.
warnings.filterwarnings("ignore", message="IProgress not found")

__all__ = ["BatchSampler", "Neighbors", "batch_neighbors", "class_weights", "deep_knn_loss"]
__all__ += ["majority_vote", "nearest_neighbors"]
