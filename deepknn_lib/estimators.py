"""The six methods of the paper's Table 3, on fixed feature vectors, with scikit-learn's interface.

    deep = DeepKNNClassifier().fit(X_train, y_train)
    deep.predict(X_test)

Each learns a space from the training vectors; all then predict alike: exact search and the vote of the K_p nearest.
A shift of all features, or one factor on all, changes none of them: not the neighbours, the MLPs begin with batch
normalisation, and the two linear methods centre and scale by one number. Features are not standardised one by one.
"""

import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from deepknn_lib.linear_metrics import fit_lmnn, fit_nca, principal_axes, stratified_rows
from deepknn_lib.models import build_network
from deepknn_lib.neighbors import majority_vote, nearest_neighbors
from deepknn_lib.training import Recipe, extract_features, fit

_parameters = dataclass(eq=False, repr=False, kw_only=True)  # an __init__ that stores, as scikit-learn asks


def from_run(run) -> "KNNClassifier":
    """The unfitted estimator of a `runs.Run` of Table 3, with the run's settings; ValueError for other methods."""
    if run.method not in ESTIMATORS:
        raise ValueError(f"no estimator for {run.method!r}; there are {', '.join(ESTIMATORS)}")
    made = ESTIMATORS[run.method]()
    settings = {name: getattr(run, name) for name in made.get_params() if hasattr(run, name)}
    settings |= {"random_state": run.seed} if "random_state" in made.get_params() else {}
    return made.set_params(n_neighbors=run.k_predict, **settings)


@_parameters
class KNNClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):
    """kNN-basic: the features as they are; and what the other methods inherit.

    Parameters
    ----------
    n_neighbors : int
        The paper's K_p. A tie in the vote goes to the class of the nearest tied neighbour.

    Attributes
    ----------
    history_ : list of dict
        See `training.fit`; empty where nothing is trained epoch by epoch.
    """

    n_neighbors: int = 5

    def fit(self, X, y, on_epoch=None):
        """Learn the space from X (N, D), finite numbers, and labels y (N,) of any kind; `on_epoch`: see `training.fit`.

        Raises
        ------
        ValueError
            If X or y cannot be meant, y has one class only, or there are fewer rows than neighbours.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"there is nothing to tell apart: y holds one class only, {self.classes_[0]}")
        if not self._fewest_neighbors <= self.n_neighbors <= len(X):
            raise ValueError(f"n_neighbors must lie in {self._fewest_neighbors}..{len(X)}, got {self.n_neighbors!r}")
        self.history_ = []
        inputs, self._labels = torch.from_numpy(X), torch.from_numpy(codes)
        self._learn(inputs, self._labels, on_epoch)
        self._gallery = self._embed(inputs)
        return self

    def transform(self, X) -> np.ndarray:
        """The learnt space: float32 (N, D')."""
        return self._embed(self._check(X)).numpy()

    def predict(self, X) -> np.ndarray:
        """The class that most of the K_p nearest training rows have: (N,)."""
        distances, indices = nearest_neighbors(self._embed(self._check(X)), self._gallery, self.n_neighbors)
        return self.classes_[majority_vote(self._labels[indices], distances, len(self.classes_)).numpy()]

    def state(self) -> dict[str, Tensor]:
        """What was learnt, to be stored; empty for kNN-basic."""
        check_is_fitted(self)
        return {}

    def _check(self, X) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(validate_data(self, X, dtype=np.float32, reset=False))

    _fewest_neighbors = 1

    def _learn(self, inputs: Tensor, labels: Tensor, on_epoch) -> None:
        pass

    def _embed(self, inputs: Tensor) -> Tensor:
        return inputs

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


@_parameters
class _Linear(KNNClassifier):
    n_components: int | None = 128
    max_samples: int | None = 3000
    max_iter: int = 200
    tol: float = 1e-5
    random_state: int = 0

    def _learn(self, inputs: Tensor, labels: Tensor, on_epoch) -> None:
        self._mean, axes = principal_axes(inputs, labels, self.n_components, self.random_state)
        rows = stratified_rows(labels, self.max_samples, self.random_state)
        linear, self.n_iter_ = self._fit_map((inputs[rows] - self._mean) @ axes.T, labels[rows])
        if self.n_iter_ >= self.max_iter:
            text = f"{type(self).__name__} had not converged after max_iter={self.max_iter} iterations"
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        self._components = linear @ axes

    def _embed(self, inputs: Tensor) -> Tensor:
        return (inputs - self._mean) @ self._components.T

    def state(self) -> dict[str, Tensor]:
        """The map: `mean` (D,) and `components` (D', D); the embedding is (x − mean) · componentsᵀ."""
        check_is_fitted(self)
        return {"mean": self._mean, "components": self._components}


@_parameters
class NCAClassifier(_Linear):
    """Neighbourhood components analysis (the paper's reference 14), scikit-learn's, behind PCA.

    Parameters
    ----------
    n_neighbors : int
        The paper's K_p.
    n_components : int or None
        Principal components that are kept; None: all.
    max_samples : int or None
        Rows the map is fitted on, in the classes' proportions, as an iteration costs N²; None: all. The vote always
        searches the whole training set.
    max_iter, tol
        When L-BFGS stops; a warning says that it had not converged.
    random_state : int
    """

    def _fit_map(self, reduced: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        return fit_nca(reduced, labels, self.max_iter, self.tol, self.random_state)


@_parameters
class LMNNClassifier(_Linear):
    """Large margin nearest neighbours (the paper's reference 15): `linear_metrics.lmnn_objective` behind PCA.

    Parameters
    ----------
    k : int
        Target neighbours of a row, fixed in the space it starts from.
    mu : float
        Weight of the push against the pull, 0 < mu < 1.
    n_neighbors, n_components, max_samples, max_iter, tol, random_state
        See `NCAClassifier`.
    """

    max_iter: int = 500
    tol: float = 1e-4
    k: int = 5
    mu: float = 0.5

    def _fit_map(self, reduced: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        return fit_lmnn(reduced, labels, self.k, self.mu, self.max_iter, self.tol)


@_parameters
class _MLP(KNNClassifier):
    """The paper's three-layer MLP (D-512-256-128), trained by `training.fit`."""

    normalize: str = "batch-l2"
    epochs: int = 30
    batch_size: int = 96
    sampling: str = "proportional"
    classes_per_batch: int | None = None
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0
    lr_decay_every: int = 10
    random_state: int = 0

    def _learn(self, inputs: Tensor, labels: Tensor, on_epoch) -> None:
        recipe = {f.name: getattr(self, f.name) for f in fields(Recipe) if hasattr(self, f.name)}
        while recipe["sampling"] == "random" and len(labels) % recipe["batch_size"] == 1:
            recipe["batch_size"] += 1  # the last batch would hold one row, which batch normalisation cannot take
        recipe = Recipe(**recipe, loss=self._loss, seed=self.random_state)
        classes = len(self.classes_) if self._loss == "weighted-ce" else None
        self.network_ = build_network(
            "mlp", n_inputs=inputs.shape[1], n_classes=classes, normalize=self.normalize, seed=recipe.seed
        )
        self.history_ = fit(self.network_, inputs, labels, recipe, on_epoch=on_epoch)

    def _embed(self, inputs: Tensor) -> Tensor:
        return extract_features(self.network_, inputs)

    def state(self) -> dict[str, Tensor]:
        """The network's weights, as `models.build_network("mlp", …)` loads them."""
        check_is_fitted(self)
        return self.network_.state_dict()


@_parameters
class TripletClassifier(_MLP):
    """MLP + triplets: batch-hard triplet loss.

    Parameters
    ----------
    n_neighbors : int
        The paper's K_p.
    normalize : str
        See `models.Network`.
    random_state : int
        Of weights and batches.
    k, margin, soft, epochs, batch_size, sampling, classes_per_batch, lr, momentum, weight_decay, warmup, lr_decay_every
        See `training.Recipe`; a batch holds at least k + 1 rows of each of its classes.
    """

    k: int = 5
    margin: float = 0.2
    soft: bool = False
    _loss = "triplet"


@_parameters
class DeepKNNClassifier(_MLP):
    """MLP + deep kNN: the paper's loss, Eq. 3.

    Parameters
    ----------
    n_neighbors, k, m, margin
        The paper's K_p, K, M and α; see `losses.deep_knn_loss`.
    normalize, epochs, ..., random_state
        See `TripletClassifier`.
    """

    k: int = 5
    m: int = 5
    margin: float = 0.2
    _loss = "deep-knn"


@_parameters
class CrossEntropyClassifier(_MLP):
    """MLP + CE: class-weighted cross-entropy, the weights of `losses.class_weights`.

    Parameters
    ----------
    n_neighbors : int
        The paper's K_p: the vote in the last features. 0: the network's own softmax decides.
    normalize, epochs, ..., random_state
        See `TripletClassifier`.
    """

    normalize: str = "none"
    sampling: str = "random"
    lr: float = 0.01
    _loss, _fewest_neighbors = "weighted-ce", 0

    @torch.no_grad()
    def logits(self, X) -> np.ndarray:
        """What the softmax gets, in the order of `classes_`: float32 (N, C), also for two classes."""
        inputs = self._check(X)
        return self.network_.classifier(self._embed(inputs)).numpy()

    def predict(self, X) -> np.ndarray:
        """The class of the vote, or of the largest logit with `n_neighbors=0`: (N,)."""
        if self.n_neighbors:
            return super().predict(X)
        largest = self.logits(X).argmax(1)
        return self.classes_[largest]


ESTIMATORS = {
    "knn": KNNClassifier,
    "nca": NCAClassifier,
    "lmnn": LMNNClassifier,
    "mlp-triplet": TripletClassifier,
    "mlp-ce": CrossEntropyClassifier,
    "mlp-deep-knn": DeepKNNClassifier,
}
