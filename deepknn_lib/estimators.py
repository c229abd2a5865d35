"""The six methods of the paper's Table 3, on fixed feature vectors, with scikit-learn's interface.

Each learns a space from the training vectors X (N, D) and their labels y (N,), in which the nearest training vectors
vote: ``DeepKNNClassifier().fit(X, y).predict(X_test)``.
"""

import warnings
from dataclasses import dataclass, fields, make_dataclass
from typing import get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.utils import check_random_state, check_scalar, resample
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits
from torch import Tensor

from deepknn_lib.criteria import whole_set_neighbors
from deepknn_lib.models import build_network, extract_features
from deepknn_lib.neighbors import Neighbors, majority_vote, nearest_neighbors
from deepknn_lib.training import TrainingConfig, fit

# Class attributes become the keyword parameters of __init__, as scikit-learn asks.
_KEYWORDS = {"eq": False, "repr": False, "kw_only": True}
RandomState = int | np.random.RandomState | None
FEW = 1_000_000  # numbers in X; below, threads of torch wait for one another longer than they work


def from_run(run) -> "KNNClassifier":
    """The unfitted estimator of a `Run` of Table 3, with its settings (epochs: iterations); else ValueError."""
    if run.method not in ESTIMATORS:
        raise ValueError(f"no estimator for {run.method!r}; there are {', '.join(ESTIMATORS)}")
    estimator = ESTIMATORS[run.method]()
    settings = vars(run) | {"n_neighbors": run.k_predict, "random_state": run.seed, "max_iter": run.epochs}
    return estimator.set_params(**{n: settings[n] for n in estimator.get_params() if n in settings})


def _threads_for(inputs: Tensor) -> threadpool_limits:
    """A context in which torch has one thread where the inputs are `FEW`, and after which it has as many as before."""
    return threadpool_limits(1 if inputs.numel() < FEW else None, "openmp")


@dataclass(**_KEYWORDS)
class KNNClassifier(ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """kNN-basic: the vote of the `n_neighbors` (the paper's K_p) nearest training rows, in the space of X itself.

    X becomes float32, which keeps seven digits: take off a large offset first, as StandardScaler does.

    The other methods inherit from it. They learn their space with random numbers that come from `random_state`.
    """

    n_neighbors: int = 5
    _least = {"n_neighbors": 1}  # the least value of each parameter that has one

    def fit(self, X, y, on_epoch=None):
        """Learn the space: ValueError if X or y does not fit or y has one class; or TypeError for a wrong parameter.

        `history_` then holds the rows of `training.fit`, each given to `on_epoch` too, and `state_` what was learnt:
        nothing (kNN), the linear map's `mean` and `components`, or the network's weights.
        """
        self._params()
        X, y = validate_data(self, X, y, dtype=np.float32, order="C", ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class only, {self.classes_[0]}; at least two are needed")
        if self.n_neighbors > len(X):
            raise ValueError(f"n_neighbors is {self.n_neighbors}, but X has only {len(X)} rows to vote")
        inputs, self._labels, self.history_ = torch.from_numpy(X), torch.from_numpy(codes), []
        with _threads_for(inputs):
            self.state_ = self._learn(inputs, self._labels, on_epoch)
            self._gallery = self._embed(inputs)
        self._n_features_out = self._gallery.shape[1]
        return self

    def transform(self, X) -> np.ndarray:
        """The learnt space: float32 (N, D')."""
        return self._queries(X).numpy()

    def kneighbors(self, X=None, n_neighbors=None, return_distance=True):
        """Distances to the nearest training rows and their indices, nearest first: (N, n_neighbors) each.

        Without X they are those of the training rows, of which none is its own neighbour.
        """
        check_is_fitted(self)
        queries = self._gallery if X is None else self._queries(X)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        with _threads_for(queries):
            found = nearest_neighbors(queries, self._gallery, int(k), exclude_self=X is None)
        return tuple(part.numpy() for part in found) if return_distance else found[1].numpy()

    def predict(self, X) -> np.ndarray:
        """The class that most of the K_p nearest training rows have: (N,); of tied classes that of the nearest row."""
        best = self.predict_proba(X).argmax(1)  # It checks first that there are classes.
        return self.classes_[best]

    def predict_proba(self, X) -> np.ndarray:
        """The share of the votes that each class has, in the order of `classes_`: (N, C).

        The class that `predict` gives has a millionth of a vote more, so that it is the largest also where two tie.
        """
        distances, indices = map(torch.from_numpy, self.kneighbors(X))
        labels, n_classes = self._labels[indices], len(self.classes_)
        votes = torch.nn.functional.one_hot(labels, n_classes).sum(1).double()
        winners = majority_vote(labels, distances, n_classes)[:, None]
        votes.scatter_add_(1, winners, votes.new_full(winners.shape, 1e-6))
        return (votes / votes.sum(1, keepdim=True)).numpy()

    def _params(self) -> dict:
        """The parameters, NumPy's numbers as Python's, checked against the types of their fields and `_least`."""
        params = {}
        for field in fields(self):
            value = getattr(self, field.name)
            value = value.item() if isinstance(value, np.generic) else value
            kinds = (float, int) if field.type is float else get_args(field.type) or field.type
            least = None if value is None else self._least.get(field.name)
            params[field.name] = check_scalar(value, field.name, kinds, min_val=least)
        return params

    def _queries(self, X) -> Tensor:
        check_is_fitted(self)
        inputs = torch.from_numpy(validate_data(self, X, dtype=np.float32, order="C", reset=False))
        with _threads_for(inputs):
            return self._embed(inputs)

    def _learn(self, inputs: Tensor, labels: Tensor, on_epoch) -> dict[str, Tensor]:
        return {}

    def _embed(self, inputs: Tensor) -> Tensor:
        return inputs

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


@dataclass(**_KEYWORDS)
class NCAClassifier(KNNClassifier):
    """Neighbourhood components analysis (the paper's reference 14) of scikit-learn, behind PCA to `n_components`.

    It learns from at most `max_samples` rows, as an iteration costs N². It stops after `max_iter` iterations with a
    ConvergenceWarning, or where an iteration changes less than `tol`. The vote searches all rows.
    """

    n_components: int | None = 128
    max_samples: int | None = 3000
    max_iter: int = 200
    tol: float = 1e-5
    random_state: RandomState = 0
    _least = {"n_neighbors": 1, "n_components": 1, "max_samples": 1, "max_iter": 1, "tol": 0}

    def _learn(self, inputs: Tensor, labels: Tensor, on_epoch) -> dict[str, Tensor]:
        size = min(self.n_components or inputs.shape[1], *inputs.shape)
        pca = PCA(size, random_state=self.random_state).fit(inputs.numpy())
        mean, axes = torch.from_numpy(pca.mean_).float(), torch.from_numpy(pca.components_).float()
        reduced = (inputs - mean) @ axes.T
        near = whole_set_neighbors(reduced, labels, 1, 1)
        gaps = (reduced - reduced[near.positive[:, 0]]).square().sum(1)[near.positive_valid[:, 0]]
        gaps = gaps[gaps > 0]
        if len(gaps):  # The median distance to the nearest row of the class becomes LMNN's margin, 1.
            axes = axes * gaps.median().rsqrt()
        options = {"stratify": labels, "replace": False, "random_state": self.random_state}
        n = min(self.max_samples or len(labels), len(labels))
        rows = resample(torch.arange(len(labels)), n_samples=n, **options)
        linear, self.n_iter_ = self._fit_map((inputs[rows] - mean) @ axes.T, labels[rows])
        if self.n_iter_ >= self.max_iter:
            text = f"{type(self).__name__} did not converge in max_iter={self.max_iter} iterations"
            warnings.warn(text, ConvergenceWarning, stacklevel=3)
        return {"mean": mean, "components": linear @ axes}

    def _embed(self, inputs: Tensor) -> Tensor:
        return (inputs - self.state_["mean"]) @ self.state_["components"].T

    def _fit_map(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        settings = {"max_iter": self.max_iter, "tol": self.tol, "random_state": self.random_state}
        nca = NeighborhoodComponentsAnalysis(init="identity", **settings).fit(inputs.numpy(), labels.numpy())
        return torch.from_numpy(nca.components_).float(), nca.n_iter_


def lmnn_parts(z: Tensor, labels: Tensor, near: Neighbors, mu: float, chunk: int = 256):
    """LMNN's objective (Weinberger and Saul 2009, Eqs. 11-13) at z (N, D), as parts of `chunk` rows i to add up.

    (1 − μ) Σ_ij |z_i − z_j|² + μ Σ_ijl [1 + |z_i − z_j|² − |z_i − z_l|²]₊, where j runs over the positives of i in
    `near`, and l over all rows of other classes.
    """
    norms = z.square().sum(1)
    for i in torch.arange(len(z)).split(chunk):
        # `index_select` has a gradient that several threads add up in one order; that of z[...] has not.
        positives = z.index_select(0, near.positive[i].flatten()).view(len(i), -1, z.shape[1])
        pull = (z.index_select(0, i)[:, None] - positives).square().sum(2)
        to_all = norms.index_select(0, i)[:, None] + norms - 2 * z.index_select(0, i) @ z.T
        to_others = to_all.masked_fill(labels[i, None] == labels, torch.inf)
        push = (1 + pull[:, :, None] - to_others[:, None]).relu().sum(2)
        yield (((1 - mu) * pull + mu * push) * near.positive_valid[i]).sum()


@dataclass(**_KEYWORDS)
class LMNNClassifier(NCAClassifier):
    """Large margin nearest neighbours (the paper's reference 15), behind PCA: `lmnn_parts` by L-BFGS.

    The `k` positives of a row are fixed where it starts from; `mu` weighs the push against the pull.
    """

    max_iter: int = 500
    tol: float = 1e-4
    k: int = 5
    mu: float = 0.5

    def _fit_map(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        check_scalar(self.mu, "mu", object, min_val=0, max_val=1, include_boundaries="neither")
        near = whole_set_neighbors(inputs, labels, int(self.k), 1)
        linear = torch.eye(inputs.shape[1], requires_grad=True)
        limits = {"max_iter": self.max_iter, "max_eval": 25 * self.max_iter, "tolerance_change": self.tol}
        optimizer = torch.optim.LBFGS([linear], tolerance_grad=0, line_search_fn="strong_wolfe", **limits)
        # The objective is divided by its first value, so that `tol` is a share of it.
        start = max(sum(part.item() for part in lmnn_parts(inputs, labels, near, self.mu)), 1e-12)

        def closure() -> float:
            optimizer.zero_grad()
            value = 0.0
            for part in lmnn_parts(inputs @ linear.T, labels, near, self.mu):
                (part / start).backward(retain_graph=True)
                value += part.item() / start
            return value

        optimizer.step(closure)
        return linear.detach(), optimizer.state[linear]["n_iter"]


# The loss is that of the class, and the seed is `random_state`.
_settings = [(f.name, f.type, f.default) for f in fields(TrainingConfig) if f.name not in ("loss", "seed")]
_Settings = make_dataclass("_Settings", _settings, **_KEYWORDS)


@dataclass(**_KEYWORDS)
class DeepKNNClassifier(KNNClassifier, _Settings):
    """The three-layer MLP with the deep kNN loss; the other parameters are those of `training.TrainingConfig`."""

    normalize: str = "batch-l2"
    epochs: int = 30
    lr: float = 0.1
    lr_decay_every: int = 10
    random_state: RandomState = 0
    _loss = "deep-knn"

    def _learn(self, inputs: Tensor, labels: Tensor, on_epoch) -> dict[str, Tensor]:
        params = self._params()
        seed = params["random_state"]
        if not isinstance(seed, int):
            seed = check_random_state(seed).randint(2**31)
        settings = {field.name: params[field.name] for field in fields(_Settings)}
        config = TrainingConfig(**settings, loss=self._loss, seed=seed)
        n_classes = len(self.classes_) if self._loss == "weighted-ce" else None
        options = {"n_inputs": inputs.shape[1], "n_classes": n_classes, "normalize": self.normalize}
        self.network_ = build_network("mlp", **options, seed=seed)
        self.history_ = fit(self.network_, inputs, labels, config, on_epoch=on_epoch)
        return self.network_.state_dict()

    def _embed(self, inputs: Tensor) -> Tensor:
        # A product of a few rows is summed in another order than one of many, so that few rows are made more.
        padded = torch.nn.functional.pad(inputs, (0, 0, 0, max(32 - len(inputs), 0)))
        return extract_features(self.network_, padded)[: len(inputs)]


class TripletClassifier(DeepKNNClassifier):
    """The same MLP with batch-hard triplets."""

    _loss = "triplet"


@dataclass(**_KEYWORDS)
class CrossEntropyClassifier(DeepKNNClassifier):
    """The same MLP with class-weighted cross-entropy. With `n_neighbors=0` its softmax decides, no vote."""

    normalize: str = "none"
    sampling: str = "random"
    lr: float = 0.01
    _loss = "weighted-ce"
    _least = {"n_neighbors": 0}

    @torch.no_grad()
    def logits(self, X) -> np.ndarray:
        """What the softmax gets, in the order of `classes_`: float32 (N, C), also for two classes."""
        features = self._queries(X)
        return self.network_.classifier(features).numpy()

    def predict_proba(self, X) -> np.ndarray:
        """The share of the votes, or the softmax with `n_neighbors=0`: (N, C)."""
        if self.n_neighbors:
            return super().predict_proba(X)
        return torch.from_numpy(self.logits(X)).double().softmax(1).numpy()


ESTIMATORS = {
    "knn": KNNClassifier,
    "nca": NCAClassifier,
    "lmnn": LMNNClassifier,
    "mlp-triplet": TripletClassifier,
    "mlp-ce": CrossEntropyClassifier,
    "mlp-deep-knn": DeepKNNClassifier,
}
