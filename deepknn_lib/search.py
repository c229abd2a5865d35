"""Exact search for nearest rows: candidates in float32, true distances in float64, and a proof that none is missing.

Let q and x be two rows after centring and rounding to float32, and u = 2⁻²⁴. In whatever order a matrix product of D terms
is summed, its 2q·x is off by at most γ_D (|q|² + |x|²), γ_D = D·u / (1 − D·u) (Higham, *Accuracy and Stability of Numerical
Algorithms*, 3.1). Rounding the rows, the norms and the sums adds less than 15 u (|q|² + |x|²), and underflow less than
D·2⁻¹²⁰. With `slack` a a little above the sum of both,

    |x|² (1 − a) − 2q·x + |q|² (1 − a) − D·2⁻¹²⁰

is therefore never above the true squared distance. Rows are ranked by it. When the k-th true distance of those kept is below
the least bound of those left out, the answer is certain; where it is not (near-duplicates, ties), it is searched again in
float64.

FAISS, where it is installed, ranks a large search's candidates faster on a CPU. It rounds |q|² + |x|² − 2q·x, or sums
squared differences: either is off by less than 2 a (|q|² + |x|²), so that its values less 2 a (|q|² + max |x|²) are bounds
as well. They are weaker; what they leave open goes on to torch's float32.
"""

import sys

import torch
from torch import Tensor

SPARE = 27  # candidates above k: ranking more costs next to nothing, and only those that may be near are measured
GALLERY = 2**22  # elements of the gallery at a time: few enough to stay in a cache, and in memory that is used again
FAISS_FROM = 2**32  # multiplications from which on loading FAISS pays
FAISS_GALLERY = 2**24  # elements of the gallery at a time for FAISS, which has its own blocks
OVERFLOW = 1e30  # squared norms above it are left to float64


def slack(dim: int) -> float:
    """The a of the bound above."""
    return 1.01 * (dim + 16) * 2.0**-24


def underflow(dim: int) -> float:
    """What squares too small for float32 can add to a bound."""
    return dim * 2.0**-120


def _rows_at_a_time(rows: Tensor) -> int:
    """How many rows to raise to float64 at a time: what a processor's cache holds; much more on a GPU."""
    return max(1, (2**17 if rows.device.type == "cpu" else 2**24) // max(rows.shape[1], 1))


def column_means(rows: Tensor) -> Tensor:
    """About the mean row, float64; ValueError when a feature is not finite. No copy of all rows is made."""
    means = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(16384):
        means += part.sum(0, dtype=torch.promote_types(part.dtype, torch.float32)) / max(len(rows), 1)
    if means.isfinite().all():
        return means
    if not all(part.isfinite().all() for part in rows.split(16384)):
        raise ValueError("features hold NaN or infinity; a run that diverged has no neighbours (lower its lr)")
    return torch.zeros_like(means)  # their sum overflows; any centre is a right one


def square_norms(rows: Tensor) -> Tensor:
    """|x|² of every row, summed in float64."""
    parts = [(part * part).sum(1, dtype=torch.float64) for part in rows.split(_rows_at_a_time(rows))]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float64)


def pair_squares(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """True squared distances of the pairs (a[i], b[j]), from differences in float64."""
    size = _rows_at_a_time(a)
    found = torch.empty(len(i), dtype=torch.float64, device=a.device)
    for start in range(0, len(i), size):
        part = slice(start, start + size)
        difference = a.index_select(0, i[part]).double().sub_(b.index_select(0, j[part]))
        found[part] = difference.square_().sum(1)
    return found


def measure(queries: Tensor, gallery: Tensor, low: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest k of a query's candidates, and whether they are proven to be the nearest of all.

    Parameters
    ----------
    queries, gallery : Tensor, (Q, D) and (G, D)
    low : Tensor, float64, (Q, C)
        Bounds of the candidates' squared distances from below, ascending; infinite where there is no candidate. All
        rows that are no candidates have the last bound or a higher one.
    index : Tensor, int64, (Q, C)
    k : int
        At most C.

    Returns
    -------
    squares, indices : Tensor, float64 and int64, (Q, k)
        Ascending; equal ones in the gallery's order.
    sure : Tensor, bool, (Q,)
    """
    squares = torch.full_like(low, torch.inf)

    def fill(wanted: Tensor) -> None:
        row, column = wanted.nonzero(as_tuple=True)
        squares[row, column] = pair_squares(queries, row, gallery, index[row, column])

    real = low != torch.inf
    fill(real & (torch.arange(low.shape[1], device=low.device) < k))
    limit = squares[:, :k].masked_fill(~real[:, :k], 0).amax(1) * (1 + 1e-9)  # above float64's own rounding
    fill(real & squares.isinf() & (low <= limit[:, None]))
    index, place = index.sort(1)  # so that the stable sort below keeps the gallery's order in a tie
    squares, order = squares.gather(1, place).sort(dim=1, stable=True)
    return squares[:, :k], index.gather(1, order[:, :k]), limit < low[:, -1]


def exact_products(device: torch.device) -> bool:
    """Whether float32 matrix products there are float32's own, not those of TF32 or bfloat16."""
    probe = torch.full((64, 64), 1 + 2.0**-12, dtype=torch.float32, device=device)
    return bool(((probe @ probe) / 64 - probe[0, 0] ** 2).abs().max() < 1e-6)


def _faiss_pays(queries: Tensor, gallery: Tensor) -> bool:
    """Whether FAISS is there and faster: a large search on a CPU under Linux (a Mac's own products are the faster ones)."""
    if len(queries) * gallery.numel() < FAISS_FROM or gallery.device.type != "cpu" or sys.platform != "linux":
        return False
    try:
        import faiss  # noqa: F401
    except ImportError:  # not installed, or built for another numpy
        return False
    return True


def _rank_faiss(queries: Tensor, gallery: Tensor, skip: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances as FAISS rounds them, and gallery rows, of a query's nearest; row `skip[i]` is not for query i."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        values, indices = map(torch.from_numpy, faiss.knn(queries.numpy(), gallery.numpy(), min(count + 1, len(gallery))))
    finally:
        faiss.omp_set_num_threads(threads)
    lost = (indices < 0) | (indices == skip[:, None])  # below 0: of a query whose distances overflow
    return values.masked_fill_(lost, torch.inf), indices.clamp_(min=0)


def _rank(queries: Tensor, gallery: Tensor, norms: Tensor, skip: Tensor, count: int, space: Tensor) -> tuple[Tensor, Tensor]:
    """Values `norms` − 2q·x and gallery rows of each query's `count` least; row `skip[i]` is not for query i."""
    scores = space[: len(queries) * len(gallery)].view(len(queries), len(gallery))
    torch.addmm(norms, queries, gallery.T, alpha=-2, out=scores)
    inside = (skip >= 0) & (skip < len(gallery))
    scores[inside.nonzero().squeeze(1), skip[inside]] = torch.inf
    return scores.topk(min(count, len(gallery)), largest=False)


def _candidates(
    queries: Tensor, gallery: Tensor, center: Tensor, keep: float, rows: Tensor, count: int, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Of each query the `count` gallery rows of least |x|² · keep − 2q·x, in `dtype`: values, rows, and a bound of all |x|².

    With `keep` 0 FAISS finds them; the values are its squared distances. Gallery row `rows[i]` is not for query i. The
    gallery is centred once, block by block.
    """
    values = torch.full((len(queries), count), torch.inf, dtype=dtype, device=gallery.device)
    indices = torch.zeros(len(queries), count, dtype=torch.int64, device=gallery.device)
    queries, largest, fast, dim = (queries - center).to(dtype), 0.0, keep == 0, max(gallery.shape[1], 1)
    wide = min(len(gallery), max(1, FAISS_GALLERY // dim) if fast else min(16 * chunk, max(chunk, GALLERY // dim)))
    copy = torch.empty(wide, gallery.shape[1], dtype=center.dtype, device=gallery.device)
    space = torch.empty(0 if fast else min(chunk, len(queries)) * wide, dtype=dtype, device=gallery.device)
    for start in range(0, len(gallery), wide):
        block = gallery[start : start + wide]
        block = torch.sub(block, center, out=copy[: len(block)]).to(dtype)
        if fast:
            ranked = [(slice(None), *_rank_faiss(queries, block, rows - start, count))]
            largest = max(largest, 1.01 * float(torch.linalg.vector_norm(block, dim=1).max()) ** 2)
        else:
            norms = square_norms(block)
            largest, norms = max(largest, float(norms.max())), (norms * keep).to(dtype)
            parts = [slice(first, first + chunk) for first in range(0, len(queries), chunk)]
            ranked = ((part, *_rank(queries[part], block, norms, rows[part] - start, count, space)) for part in parts)
        for part, value, index in ranked:
            value, index = torch.cat([values[part], value], 1), torch.cat([indices[part], index + start], 1)
            values[part], order = value.topk(count, largest=False)
            indices[part] = index.gather(1, order)
    return values, indices, largest


def nearest(queries: Tensor, gallery: Tensor, rows: Tensor, k: int, available: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Squared distances (float64) and gallery rows of each query's k nearest; arguments as `neighbors` checked them.

    Gallery row `rows[i]` is not for query i, so that `available` rows are. ValueError when a feature is not finite.
    """
    means = column_means(gallery)
    column_means(queries)  # only to check them
    squares = torch.empty(len(queries), k, dtype=torch.float64, device=gallery.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=gallery.device)
    precise = exact_products(gallery.device)
    for block in torch.arange(len(queries), device=gallery.device).split(16 * chunk):
        _settle(queries, gallery, means, rows, available, chunk, precise, block, squares, indices)
    return squares, indices


def _settle(queries, gallery, means, rows, available, chunk, precise, left, squares, indices) -> None:
    """Fill in `squares` and `indices` of the queries `left`; arguments as of `nearest`."""
    dim, k = gallery.shape[1], squares.shape[1]
    a, fast = slack(dim), _faiss_pays(queries, gallery)
    for dtype, keep in ((torch.float32, 0), (torch.float32, 1 - a), (torch.float64, 1)):
        proof = dtype == torch.float32
        if len(left) == 0 or proof and not precise or keep == 0 and not fast:
            continue
        asked, skipped = (queries, rows) if len(left) == len(queries) else (queries[left], rows[left])
        center = means.to(torch.promote_types(dtype, gallery.dtype))  # near the origin a matrix product cancels least
        count = min(k + (SPARE if proof else 8), available)
        values, found, largest = _candidates(asked, gallery, center, keep, skipped, count, chunk, dtype)
        unsure = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        for first in range(0, len(asked), chunk):
            part = slice(first, first + chunk)
            norm = square_norms((asked[part] - center).to(dtype))
            rest = norm * keep if keep else -2 * a * (norm + largest)
            low = values[part].double() + (rest - underflow(dim))[:, None]
            if not proof:
                low = low.masked_fill(low != torch.inf, 0)  # all are measured
            squares[left[part]], indices[left[part]], sure = measure(asked[part], gallery, low, found[part], k)
            if proof:
                unsure[part] = ~((sure | (count == available)) & (norm < OVERFLOW) & (largest < OVERFLOW))
        left = left[unsure]
