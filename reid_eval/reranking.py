"""k-reciprocal re-ranking (Zhong et al., CVPR 2017) and multi-query features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array

from utils import UserError

_CHUNK_BYTES = 256 << 20
# Two readings of the method; their numbers do not compare.
VARIANTS = {
    "field": "as in the code that re-identification toolkits share",
    "paper": "by the formulas of the paper",
}


def multi_query(
    features: np.ndarray, pids: np.ndarray, camids: np.ndarray, q_pids: np.ndarray, q_camids: np.ndarray
) -> np.ndarray:
    """For every query the mean over all images of its identity and camera: (nq, heads, dim) float32.

    The plain mean of the normalised features, which is not normalised again: that is what DG-Net's published
    multi-query numbers use. A query's length scales its scores and cannot change their order within one head.

    `features` (n, heads, dim), `pids`, `camids` (n,) are of the multi-query images (Market-1501's `gt_bbox`), `q_pids`
    and `q_camids` (nq,) of the queries. Raises UserError if a query's identity and camera has no image.
    """
    pairs, owner = np.unique(np.stack([pids, camids], 1), axis=0, return_inverse=True)
    owner = owner.ravel()
    total = np.zeros((len(pairs), *features.shape[1:]))
    np.add.at(total, owner, features)
    mean = (total / np.bincount(owner).reshape(-1, *[1] * (features.ndim - 1))).astype(np.float32)
    position = {pair: i for i, pair in enumerate(map(tuple, pairs.tolist()))}
    wanted = list(zip(np.asarray(q_pids).tolist(), np.asarray(q_camids).tolist(), strict=True))
    if missing := next((pair for pair in wanted if pair not in position), None):
        raise UserError(
            f"multi-query: no image of identity {missing[0]} in camera {missing[1]}; the multi-query folder must hold "
            "every query's identity and camera"
        )
    return mean[[position[pair] for pair in wanted]]


def rerank(
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    weights: Sequence[float] | None = None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    variant: str = "field",
) -> np.ndarray:
    """Re-ranked distances (nq, ng) float32 in 0..1, smaller is better.

    Over the joint set of queries and gallery images:

    - N(p, k): p and its k nearest images (for the local query expansion: the k2 nearest, p being the first);
    - R(p, k) = {g in N(p, k) : p in N(g, k)};
    - R*(p, k1) = R(p, k1) and every R(q, k1 / 2), q in R(p, k1), of which R(p, k1) holds more than 2/3 (`variant`
      paper: at least 2/3);
    - V_p[g] = exp(-d(p, g)) for g in R*(p, k1), else 0; V_p is divided by its sum (paper: it is not); then V_p = mean
      of V_g over g in N(p, k2);
    - d_J(p, g) = 1 - sum min(V_p, V_g) / sum max(V_p, V_g);
    - the result is (1 - lambda) d_J + lambda d.

    d is the squared Euclidean distance of the (weighted) features divided by the greatest from p, which puts it on
    d_J's scale. Neighbour lists, V and the overlaps are sparse, so memory grows with n * k1 but for the result.

    `query` and `gallery` are (nq, heads, dim) and (ng, heads, dim) features without junk; `weights` of the heads are as
    in `ranking.rank`, none negative, all 1 when None; k1 and k2 are at least 1 and cut to the number of images; lambda
    is in 0..1. Raises UserError for values out of range.
    """
    if variant not in VARIANTS:
        raise UserError(f"re-ranking: variant {variant}; use one of {', '.join(VARIANTS)}")
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise UserError(f"re-ranking: k1 {k1}, k2 {k2}, lambda {lambda_value}; k must be >= 1, lambda in 0..1")
    heads = query.shape[1]
    weights = (1.0,) * heads if weights is None else weights
    if len(weights) != heads or min(weights) < 0 or max(weights) == 0:
        raise UserError(f"re-ranking: weights {tuple(weights)} for {heads} heads; one each, none negative")
    # Dot products of the rows of x are the weighted scores.
    parts = [np.concatenate([query[:, h], gallery[:, h]]) * np.float32(w**0.5) for h, w in enumerate(weights) if w > 0]
    x = np.concatenate(parts, 1)
    n, nq = len(x), len(query)
    norm = np.einsum("ij,ij->i", x, x)
    nearest, greatest = _neighbours(x, norm, min(max(k1 + 1, k2), n))

    reciprocal = _reciprocal(nearest[:, : k1 + 1])
    half = _reciprocal(nearest[:, : round(k1 / 2) + 1])
    shared = reciprocal.multiply(reciprocal @ half).tocoo()  # |R(p, k1) & R(q, k1 / 2)| for q in R(p, k1)
    size = half.sum(1)
    least = 2 * size[shared.col]
    taken = 3 * shared.data >= least if variant == "paper" else 3 * shared.data > least
    expansion = csr_array((np.ones(taken.sum(), np.float32), (shared.row[taken], shared.col[taken])), shape=(n, n))
    expanded = (reciprocal + expansion @ half).tocoo()

    weight = np.exp(-_distances_at(x, norm, greatest, expanded))
    if variant == "field":
        weight /= np.bincount(expanded.row, weights=weight, minlength=n)[expanded.row].astype(weight.dtype)
    v = csr_array((weight, (expanded.row, expanded.col)), shape=(n, n))
    if k2 > 1:
        v = _rows_of(nearest[:, :k2], 1 / min(k2, n)) @ v
    result = _jaccard(v[:nq], v[nq:])
    result *= 1 - lambda_value
    for rows in _chunks(nq, n):
        result[rows] += lambda_value * _squared(x, norm, rows, slice(nq, n)) / greatest[rows, None]
    return result


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_BYTES // (8 * columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _squared(x: np.ndarray, norm: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """Squared Euclidean distances (rows, columns), never negative."""
    d = x[rows] @ x[columns].T
    d *= -2
    d += norm[rows, None]
    d += norm[columns]
    return np.maximum(d, 0, out=d)


def _neighbours(x: np.ndarray, norm: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every image's k nearest, itself first: (n, k) indices; and its greatest distance (n,), at least tiny."""
    n = len(x)
    nearest, greatest = np.empty((n, k), np.int32), np.empty(n, x.dtype)
    for rows in _chunks(n, n):
        d = _squared(x, norm, rows, slice(0, n))
        greatest[rows] = np.maximum(d.max(1), 1e-12)
        d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = -1  # before its duplicates, if it has any
        for i, row in enumerate(d, rows.start):
            close = np.argpartition(row, k - 1)[:k]
            close.sort()
            nearest[i] = close[np.argsort(row[close], kind="stable")]
    return nearest, greatest


def _rows_of(nearest: np.ndarray, value: float) -> csr_array:
    """The matrix (n, n) that has `value` at the indices `nearest` (n, k) of every row."""
    n, k = nearest.shape
    return csr_array((np.full(n * k, value, np.float32), (np.repeat(np.arange(n), k), nearest.ravel())), shape=(n, n))


def _reciprocal(nearest: np.ndarray) -> csr_array:
    """The R(p, k) of all p as the rows of a 0/1 matrix."""
    neighbours = _rows_of(nearest, 1)
    return neighbours.multiply(neighbours.T).tocsr()


def _distances_at(x: np.ndarray, norm: np.ndarray, greatest: np.ndarray, at: coo_array) -> np.ndarray:
    """d(p, g) for the nonzero entries (p, g) of `at`, in their order."""
    result = np.empty(len(at.row), x.dtype)
    step = max(1, _CHUNK_BYTES // (8 * x.shape[1]))
    for start in range(0, len(result), step):
        p, g = at.row[start : start + step], at.col[start : start + step]
        squared = norm[p] + norm[g] - 2 * np.einsum("ij,ij->i", x[p], x[g])
        result[start : start + step] = np.maximum(squared, 0) / greatest[p]
    return result


def _jaccard(v_query: csr_array, v_gallery: csr_array) -> np.ndarray:
    """Jaccard distances (nq, ng) of the rows, from the columns that both have."""
    nq, ng = v_query.shape[0], v_gallery.shape[0]
    by_column = v_gallery.tocsc()
    total_query, total_gallery = v_query.sum(1), v_gallery.sum(1)
    result = np.empty((nq, ng), np.float32)
    for i in range(nq):
        entries = slice(v_query.indptr[i], v_query.indptr[i + 1])
        owners, shared = [], []
        for column, value in zip(v_query.indices[entries], v_query.data[entries], strict=True):
            those = slice(by_column.indptr[column], by_column.indptr[column + 1])
            owners.append(by_column.indices[those])
            shared.append(np.minimum(by_column.data[those], value))
        smaller = np.bincount(np.concatenate(owners), weights=np.concatenate(shared), minlength=ng)
        result[i] = 1 - smaller / (total_query[i] + total_gallery - smaller)
    return result
