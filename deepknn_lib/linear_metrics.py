"""The two linear methods of the paper's Table 3: a matrix learnt on vectors by NCA or by LMNN.

Both begin with principal components (`principal_axes`), scaled by one number, and end with a square matrix on them.
"""

import torch
from torch import Tensor

from deepknn_lib.neighbors import nearest_neighbors


def target_neighbors(inputs: Tensor, labels: Tensor, k: int) -> Tensor:
    """The k nearest of each row's own class, nearest first: int64 (N, k); −1 where the class has no more."""
    targets = torch.full((len(labels), k), -1)
    for c in labels.unique():
        rows = (labels == c).nonzero().squeeze(1)
        found = min(k, len(rows) - 1)
        if found:
            members = inputs[rows]
            targets[rows, :found] = rows[nearest_neighbors(members, members, found, exclude_self=True)[1]]
    return targets


@torch.no_grad()
def lmnn_objective(
    embedded: Tensor, labels: Tensor, targets: Tensor, mu: float = 0.5, chunk: int = 512
) -> tuple[float, Tensor]:
    r"""LMNN's objective at an embedding z, and its gradient (Weinberger and Saul 2009, Eqs. 11-13).

    .. math:: (1-\mu) \sum_{ij} \|z_i - z_j\|^2
              + \mu \sum_{ij} \sum_{l: y_l \ne y_i} [\,1 + \|z_i - z_j\|^2 - \|z_i - z_l\|^2\,]_+

    j runs over the target neighbours of i, l over *all* rows of other classes.

    Parameters
    ----------
    embedded : Tensor, floating point, (N, D)
    labels : Tensor, integer, (N,)
    targets : Tensor, int64, (N, K)
        See `target_neighbors`; −1 stands for none.
    mu : float
        Weight of the push against the pull.
    chunk : int
        Rows i at a time: chunk · N distances are in memory.

    Returns
    -------
    value : float
    gradient : Tensor, (N, D)
    """
    z, gradient, value = embedded, torch.zeros_like(embedded), 0.0
    norms = z.square().sum(1)
    for first in range(0, len(z), chunk):
        rows = slice(first, first + chunk)
        block, target = z[rows], targets[rows]
        there = target >= 0
        to_target = block[:, None] - z[target.clamp(min=0)]  # (b, K, D)
        pull = to_target.square().sum(2)
        to_all = torch.addmm(norms, block, z.T, alpha=-2).add_(norms[rows, None]).clamp_(min=0)
        to_all[labels[rows, None] == labels] = torch.inf
        pushes = torch.zeros_like(to_all)  # how many targets of i the impostor l comes too near to
        pulls = (1 - mu) * there.to(z.dtype)
        for j in range(targets.shape[1]):
            hinge = (1 + pull[:, j, None] - to_all).clamp_(min=0).mul_(there[:, j, None])
            value += mu * hinge.sum(dtype=torch.float64).item()
            active = hinge.gt_(0)
            pulls[:, j] += mu * active.sum(1)
            pushes += active
        value += (1 - mu) * (pull * there).sum(dtype=torch.float64).item()
        to_target *= 2 * pulls[:, :, None]
        gradient[rows] += to_target.sum(1) - 2 * mu * (pushes.sum(1, keepdim=True) * block - pushes @ z)
        gradient.index_add_(0, target[there], -to_target[there])
        gradient += 2 * mu * (pushes.T @ block - pushes.sum(0)[:, None] * z)
    return value, gradient


def fit_lmnn(
    inputs: Tensor, labels: Tensor, k: int = 5, mu: float = 0.5, max_iter: int = 200, tol: float = 1e-4
) -> tuple[Tensor, int]:
    """Minimise `lmnn_objective` over linear maps of the inputs, from the identity, by L-BFGS.

    Parameters
    ----------
    inputs : Tensor, float32, (N, D)
        Scaled so that LMNN's margin of 1 is of the size of their squared distances, as `principal_axes` does.
    labels : Tensor, int64, (N,)
    k : int
        Target neighbours of a row, fixed in the input space.
    mu : float
        0 < mu < 1.
    max_iter : int
    tol : float
        It stops when an iteration changes the objective by less than this share of where it began.

    Returns
    -------
    linear : Tensor, float32, (D, D)
        The embedding is inputs · linearᵀ.
    n_iter : int
        Iterations taken; `max_iter` when it did not converge.

    Raises
    ------
    ValueError
        If k or mu is out of range.
    """
    if k < 1 or not 0 < mu < 1:
        raise ValueError(f"LMNN needs k of at least 1 and 0 < mu < 1, got k={k!r}, mu={mu!r}")
    targets = target_neighbors(inputs, labels, k)
    weight = 1 / max(lmnn_objective(inputs, labels, targets, mu)[0], 1e-12)  # the objective begins at 1
    linear = torch.eye(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [linear], max_iter=max_iter, tolerance_change=tol, tolerance_grad=0, line_search_fn="strong_wolfe"
    )

    def closure():
        value, gradient = lmnn_objective(inputs @ linear.detach().T, labels, targets, mu)
        linear.grad = weight * gradient.T @ inputs
        return torch.tensor(weight * value, dtype=torch.float64)

    optimizer.step(closure)
    return linear.detach(), optimizer.state[linear]["n_iter"]


def fit_nca(inputs: Tensor, labels: Tensor, max_iter: int = 100, tol: float = 1e-5, seed: int = 0) -> tuple[Tensor, int]:
    """Neighbourhood components analysis, scikit-learn's, from the identity; see `fit_lmnn`. Memory grows with N²."""
    from sklearn.neighbors import NeighborhoodComponentsAnalysis

    nca = NeighborhoodComponentsAnalysis(init="identity", max_iter=max_iter, tol=tol, random_state=seed)
    nca.fit(inputs.numpy(), labels.numpy())
    return torch.from_numpy(nca.components_).float(), nca.n_iter_


def principal_axes(inputs: Tensor, labels: Tensor, n_components: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean (D,) and principal axes (D', D) of the inputs (N, D), scaled by one number.

    That number makes the median squared distance to the nearest row of the same class 1, so that NCA's exponentials
    and LMNN's margin of 1 meet distances of their own size.
    """
    from sklearn.decomposition import PCA

    if n_components is not None and n_components < 1:
        raise ValueError(f"n_components must be at least 1, or None for all, got {n_components!r}")
    limit = min(inputs.shape)
    pca = PCA(min(n_components or limit, limit), random_state=seed).fit(inputs.numpy())
    mean, axes = torch.from_numpy(pca.mean_).float(), torch.from_numpy(pca.components_).float()
    reduced = (inputs - mean) @ axes.T
    nearest = target_neighbors(reduced, labels, 1).squeeze(1)
    has = nearest >= 0
    gaps = (reduced[has] - reduced[nearest[has]]).square().sum(1)
    return mean, axes * gaps[gaps > 0].median().rsqrt() if (gaps > 0).any() else axes


def stratified_rows(labels: Tensor, limit: int | None, seed: int = 0) -> Tensor:
    """About `limit` rows in the classes' proportions, at least 10 of a class that has them: int64, ascending."""
    if limit is not None and limit < 1:
        raise ValueError(f"max_samples must be at least 1, or None for all, got {limit!r}")
    if limit is None or len(labels) <= limit:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for c in labels.unique():
        rows = (labels == c).nonzero().squeeze(1)
        quota = max(10, round(len(rows) * limit / len(labels)))
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:quota]])
    return torch.cat(kept).sort().values
