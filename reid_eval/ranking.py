"""Ranking: CMC, mAP and mINP under both conventions from the ranks of the matches (spec section 9).

For every query these gallery entries are dropped: those of the query's identity seen by the query's camera,
and all of identity -1 (junk). The rest is ranked by score, highest first; equal scores keep the gallery's
order. Distractors (identity 0) are images that no query asks for, so they stay, as wrong answers.

Every number here is a function of the ranks of a query's matches. They are counted, the row is not sorted (but
for a query of very many matches), so the cost per query is a few passes over its row of scores; one product serves
all score settings and conventions, and the next queries' product is computed while these queries' are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from utils import UserError

CONVENTIONS = {
    "official": "trapezoidal AP; AP and CMC divided by all queries (what DG-Net published)",
    "standard": "AP = mean precision at the hits; only queries that have a match (torchreid, fast-reid, TransReID)",
}
"""The conventions by name, each with its explanation. mINP is the same in both: the mean over valid queries."""

BOTH = "both (beta 0.5)"  # what the paper compares by
SETTINGS = {"primary": (1.0, 0.0), BOTH: (1.0, 0.5), "fine": (0.0, 1.0)}
"""Score settings of the two-headed net: a name and the weight of each head's dot product."""

JUNK = -1
_CHUNK_BYTES = 384 << 20  # of scores; two chunks exist at a time
_CHUNK_QUERIES = 700
_TILE = 32768  # gallery images in one product
_COUNT_AT_MOST = 200  # matches of a query; with more, sorting the whole row costs less
_SORT_AT_MOST = 1024  # entries from a query's first match in the gallery to its last
_COMPARE_BYTES = 1 << 18  # of comparisons at a time, to stay in the cache


@dataclass(frozen=True)
class Ranking:
    """The result for one score setting under one convention. All values are fractions in 0..1.

    `ap`, `inp` and `first` have one entry per query; a query without a match has 0 in all three.
    """

    convention: str
    cmc: np.ndarray  # (max_rank,) float64: cmc[k - 1] is Rank-k
    mAP: float
    mINP: float
    ap: np.ndarray  # (nq,) float64
    inp: np.ndarray  # (nq,) float64: number of matches / rank of the last one
    first: np.ndarray  # (nq,) int64: rank of the first match, from 1, after the dropped entries are gone
    queries: int
    without_match: int


@dataclass(frozen=True)
class MatchRanks:
    """Ranks of every query's matches: `ranks[offsets[i] : offsets[i + 1]]`, ascending from 1, for query i."""

    ranks: np.ndarray  # (total matches,) int64
    offsets: np.ndarray  # (nq + 1,) int64


def default_settings(heads: int) -> dict[str, tuple[float, ...]]:
    """The score settings to report for a net with that many heads (2: `SETTINGS`; else one, all weights 1)."""
    if heads == 2:
        return dict(SETTINGS)
    return {"feature" if heads == 1 else "all parts": (1.0,) * heads}


def rank(
    query: np.ndarray,
    gallery: np.ndarray | None,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray | None,
    g_camids: np.ndarray | None,
    *,
    settings: Mapping[str, Sequence[float]] | None = None,
    remove_same_camera: bool = True,
    q_keys: np.ndarray | None = None,
    g_keys: np.ndarray | None = None,
    max_rank: int = 50,
    progress: bool = True,
) -> dict[str, dict[str, Ranking]]:
    """Rank the gallery for every query; the result is `[setting][convention]`.

    Args:
        query: (nq, heads, dim) or (nq, dim) features; or, when `gallery` is None, the (nq, ng) scores
            themselves, greater is better, and the one setting is called "scores".
        gallery: (ng, heads, dim) or (ng, dim) features.
        q_pids, g_pids: (nq,), (ng,) integer identities. A query of identity -1 has no match.
        q_camids, g_camids: (nq,), (ng,) integer cameras of any size. Unused without `remove_same_camera`.
        settings: name to weights (one per head); score = sum over h of weights[h] * query[:, h] . gallery[:, h].
            `default_settings(heads)` when None.
        remove_same_camera: False is for data without cameras: nothing is dropped but the query image itself,
            and junk stays as wrong answers.
        q_keys, g_keys: (nq,), (ng,) names of the images, read only without `remove_same_camera`: the query image
            itself is the gallery entry that has its identity and its name. Without names nothing is dropped.
        max_rank: length of the CMC.
        progress: a progress bar on stderr when it takes more than a few seconds, where that is a terminal.

    Raises:
        UserError: arrays that do not fit together, an empty side, values that are not finite, or no query
            with a match.
    """
    q_pids, g_pids = np.asarray(q_pids), np.asarray(g_pids)
    if gallery is None:
        scores = _checked_scores(query, q_pids, g_pids)
        heads, settings = 1, {"scores": (1.0,)}
    else:
        query, gallery = _checked_features(query, gallery)
        heads = query.shape[1]
        settings = default_settings(heads) if settings is None else settings
        _check_settings(settings, heads)
    for what, labels, n in (("query", (q_pids, q_camids, q_keys), len(query)),) + (
        () if gallery is None else (("gallery", (g_pids, g_camids, g_keys), len(gallery)),)
    ):
        if any(values is not None and len(values) != n for values in labels):
            raise UserError(f"{n} {what} features, but another number of {what} identities, cameras or names")
    if remove_same_camera and (q_camids is None or g_camids is None):
        raise UserError("no camera of the images is given; use --no-cameras for data without cameras")

    kept = np.flatnonzero(g_pids != JUNK) if remove_same_camera else np.arange(len(g_pids))
    g_pids = g_pids[kept]
    if remove_same_camera:
        lists = _QueryLists(q_pids, g_pids, np.asarray(q_camids), np.asarray(g_camids)[kept])
    elif q_keys is not None and g_keys is not None:
        lists = _QueryLists(q_pids, g_pids, np.asarray(q_keys), np.asarray(g_keys))
    else:
        lists = _QueryLists(q_pids, g_pids)

    def chunk_scores(rows: slice) -> list[np.ndarray | None]:
        """Per head (None for one of no weight) the products (rows, kept)."""
        if gallery is None:
            return [scores[rows][:, kept]]
        return [
            _products(query[rows, h], gallery[:, h], kept) if any(w[h] for w in settings.values()) else None
            for h in range(heads)
        ]

    step = max(1, min(_CHUNK_QUERIES, _CHUNK_BYTES // (4 * heads * max(1, len(kept)))))
    chunks = [slice(start, min(start + step, len(q_pids))) for start in range(0, len(q_pids), step)]
    ranks = _all_ranks(chunk_scores, chunks, lists, settings, progress)
    return {
        name: {convention: summarise(found, convention, max_rank=max_rank) for convention in CONVENTIONS}
        for name, found in ranks.items()
    }


def _checked_scores(scores: np.ndarray, q_pids: np.ndarray, g_pids: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.shape != (len(q_pids), len(g_pids)):
        raise UserError(f"scores have shape {scores.shape}, but the labels say {len(q_pids)} x {len(g_pids)}")
    _check_sides(q_pids, g_pids)
    scores = scores if scores.dtype.kind == "f" else scores.astype(np.float64)
    _check_finite(scores, "score matrix")
    return scores


def _checked_features(query: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _check_sides(query, gallery)
    query, gallery = _as_heads(query, "query"), _as_heads(gallery, "gallery")
    if query.shape[1:] != gallery.shape[1:]:
        raise UserError(
            f"query features are {_shape(query)} but gallery features are {_shape(gallery)}; "
            "extract both with the same model"
        )
    _check_finite(query, "query features")
    _check_finite(gallery, "gallery features")
    # The products are summed in fp32; beyond its range they would be infinite, or NaN, and still be ranked.
    largest = [float(max(side.max(), -side.min())) for side in (query, gallery)]
    if query[0].size * largest[0] * largest[1] > float(np.finfo(np.float32).max):
        raise UserError(f"features as large as {max(largest):.2g} have no products in fp32; divide them by their norm")
    return query, gallery


def _check_settings(settings: Mapping[str, Sequence[float]], heads: int) -> None:
    for name, weights in settings.items():
        if len(weights) != heads:
            raise UserError(f"score setting {name!r} has {len(weights)} weights; the features have {heads} heads")
        if not any(weights):
            raise UserError(f"score setting {name!r} has only weights of 0, which rank nothing")


def summarise(found: MatchRanks, convention: str, *, max_rank: int = 50) -> Ranking:
    """CMC, mAP, mINP and the per-query values from the ranks of the matches (section 9), by `CONVENTIONS` name.

    Raises:
        UserError: no query has a match, so nothing is defined.
    """
    ranks, counts = found.ranks.astype(np.float64), np.diff(found.offsets)
    nq, owner = len(counts), np.repeat(np.arange(len(counts)), counts)
    valid = counts > 0
    if not valid.any():
        raise UserError(
            "no query has a match: no identity of the query is in the gallery under another camera; check that "
            "both are of one data set, or use --no-cameras for data without cameras"
        )
    hit = np.arange(len(ranks)) - found.offsets[owner] + 1.0  # 1 for a query's first match, 2 for its second, ...
    precision = hit / ranks
    if convention == "official":
        before = np.divide(hit - 1, ranks - 1, out=np.ones_like(ranks), where=ranks > 1)
        precision = (before + precision) / 2
        denominator = nq
    elif convention == "standard":
        denominator = int(valid.sum())
    else:
        raise ValueError(f"unknown convention {convention!r}; one of {', '.join(CONVENTIONS)}")
    ap = np.bincount(owner, weights=precision, minlength=nq) / np.maximum(counts, 1)
    first, inp = np.zeros(nq, np.int64), np.zeros(nq)
    first[valid] = found.ranks[found.offsets[:-1][valid]]
    inp[valid] = counts[valid] / found.ranks[found.offsets[1:][valid] - 1]
    hits_at = np.bincount(first[valid & (first <= max_rank)], minlength=max_rank + 1)[1:]
    return Ranking(
        convention=convention,
        cmc=np.cumsum(hits_at) / denominator,
        mAP=float(ap.sum() / denominator),
        mINP=float(inp[valid].mean()),
        ap=ap,
        inp=inp,
        first=first,
        queries=nq,
        without_match=int(nq - valid.sum()),
    )


class _QueryLists:
    """For a query, the gallery's indices (ascending) that are its matches and those that are dropped.

    Dropped are entries of the query's identity with the query's `mark`: its camera, or its name.
    """

    def __init__(self, q_pids, g_pids, q_marks=None, g_marks=None):
        self.q_pids, self.q_marks, self.g_marks = q_pids, q_marks, g_marks
        self.order = np.argsort(g_pids, kind="stable")  # stable, so that every identity's indices ascend
        in_order = g_pids[self.order]
        self.begin = np.searchsorted(in_order, q_pids, "left")
        self.end = np.searchsorted(in_order, q_pids, "right")

    def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        same = self.order[self.begin[i] : self.end[i]]
        marked = self.g_marks[same] == self.q_marks[i] if self.g_marks is not None else np.zeros(len(same), bool)
        matches = same[~marked] if self.q_pids[i] != JUNK else same[:0]
        return matches, same[marked]


def _products(query: np.ndarray, gallery: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """query @ gallery[kept].T for (n, dim), (ng, dim), kept ascending; no copy of more than a tile of the gallery."""
    scores = np.empty((len(query), len(kept)), np.result_type(query, gallery))
    for start in range(0, len(kept), _TILE):
        part = kept[start : start + _TILE]
        in_one_piece = part[-1] - part[0] + 1 == len(part)  # where nothing is junk, and where files are sorted by name
        side = gallery[part[0] : part[-1] + 1] if in_one_piece else gallery[part]
        np.matmul(query, side.T, out=scores[:, start : start + len(part)])
    return scores


def _all_ranks(
    chunk_scores: Callable[[slice], list[np.ndarray | None]],
    chunks: list[slice],
    lists: _QueryLists,
    settings: Mapping[str, Sequence[float]],
    progress: bool,
) -> dict[str, MatchRanks]:
    from tqdm import tqdm

    found: dict[str, list[np.ndarray]] = {name: [] for name in settings}
    bar = tqdm(total=chunks[-1].stop, desc="ranking", unit="query", delay=3, disable=None if progress else True)
    with bar, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(chunk_scores, chunks[0])
        for k, rows in enumerate(chunks):
            products = following.result()
            if rows is not chunks[-1]:
                following = ahead.submit(chunk_scores, chunks[k + 1])
            for i in range(rows.start, rows.stop):
                matches, dropped = lists(i)
                for name, weights in settings.items():
                    if len(matches) == 0:
                        found[name].append(matches)
                        continue
                    row = _weighted_sum([p if p is None else p[i - rows.start] for p in products], weights)
                    row[dropped] = -np.inf
                    found[name].append(match_ranks(row, matches))
            bar.update(rows.stop - rows.start)
    return {
        name: MatchRanks(np.concatenate(parts), np.cumsum([0] + [len(part) for part in parts]))
        for name, parts in found.items()
    }


def _weighted_sum(rows: Sequence[np.ndarray | None], weights: Sequence[float]) -> np.ndarray:
    """A new row: the sum of the rows times their weights, in their dtype."""
    terms = [row * row.dtype.type(w) for row, w in zip(rows, weights, strict=True) if w != 0]
    for term in terms[1:]:
        terms[0] += term
    return terms[0]


def match_ranks(row: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Ranks (int64, ascending, from 1) of the entries `matches` of a row of scores.

    The rank of a match is 1 + the entries with a greater score + those with an equal score and a smaller index.
    `row` is (ng,) with -inf for dropped entries; `matches` is (m,), at least one, of ascending indices whose scores
    are finite.
    """
    scores = row[matches]
    first, last = (0, len(row)) if len(matches) > _COUNT_AT_MOST else (matches[0], matches[-1] + 1)
    between = row[first:last]
    if len(matches) <= _COUNT_AT_MOST and len(between) > _SORT_AT_MOST:
        count, each = np.count_nonzero, zip(matches.tolist(), scores, strict=True)
        return np.sort(np.array([count(row[:g] >= score) + count(row[g:] > score) + 1 for g, score in each]))
    position = np.empty(len(between), np.int64)
    position[np.argsort(-between, kind="stable")] = np.arange(1, len(between) + 1)
    ranks = position[matches - first]
    # The entries before all matches precede them with an equal score, those behind all do not. In a gallery sorted
    # by identity nearly every entry is one of these, and one call compares it with several matches.
    outside = len(row) - len(between)
    step = max(1, _COMPARE_BYTES // max(1, outside))
    for start in range(0, len(matches) if outside else 0, step):
        some = scores[start : start + step, None]
        above = np.empty((len(some), outside), bool)
        np.greater_equal(row[:first], some, out=above[:, :first])
        np.greater(row[last:], some, out=above[:, first:])
        ranks[start : start + step] += [np.count_nonzero(entries) for entries in above]
    ranks.sort()
    return ranks


def _as_heads(features: np.ndarray, what: str) -> np.ndarray:
    features = np.asarray(features)
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float32)
    if features.ndim == 2:
        features = features[:, None]
    if features.ndim != 3:
        raise UserError(f"{what} features have shape {features.shape}; expected (images, heads, dim)")
    return features


def _shape(features: np.ndarray) -> str:
    return f"{features.shape[1]} x {features.shape[2]} (heads x dim)"


def _check_sides(query: np.ndarray, gallery: np.ndarray) -> None:
    for what, side in (("query", query), ("gallery", gallery)):
        if len(side) == 0:
            raise UserError(f"the {what} is empty; nothing can be ranked: check the {what} folder or file")


def _check_finite(values: np.ndarray, what: str) -> None:
    for start in range(0, len(values), 4096):
        finite = np.isfinite(values[start : start + 4096])
        if not finite.all():
            row = start + int(np.flatnonzero(~finite.reshape(len(finite), -1).all(1))[0])
            raise UserError(f"{what}: NaN or infinity in row {row}; extract the features again with a sound model")
