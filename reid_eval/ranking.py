"""Ranking of a gallery for every query: CMC, mAP and mINP under both conventions, and the lists themselves.

Every query leaves out the gallery images that show its identity under its own camera, and those of identity -1 (junk).
The rest is ranked by score, highest first; images with equal scores keep the gallery's order. Distractors (identity 0)
stay, as wrong answers.

All numbers are functions of the ranks of a query's matches. These ranks are counted and the row of scores is not sorted
(unless a query has very many matches), so a query costs a few passes over its row. One product serves all settings and
conventions, and the product for the next queries is computed while the matches of these are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from utils import UserError

if TYPE_CHECKING:
    from reid_eval.features import Features

CONVENTIONS = {
    "official": "trapezoidal AP; AP and CMC divided by all queries (what DG-Net published)",
    "standard": "AP = mean precision at the hits; only queries that have a match (torchreid, fast-reid, TransReID)",
}
"""The conventions and what they mean. mINP is the same in both: the mean over the queries that have a match."""

BOTH = "both (beta 0.5)"  # the setting that the paper compares by
SETTINGS = {"primary": (1.0, 0.0), BOTH: (1.0, 0.5), "fine": (0.0, 1.0)}
"""Score settings of the two-headed net: the weight of the dot product of each head."""

JUNK = -1
_CHUNK_BYTES = 384 << 20  # of scores; two chunks exist at a time
_CHUNK_QUERIES = 700
_LIST_BYTES = 64 << 20  # of scores, for the lists
_TILE = 32768  # gallery images in one product
_COUNT_AT_MOST = 200  # matches of a query; with more, sorting the whole row costs less
_SORT_AT_MOST = 1024  # entries from a query's first match in the gallery to its last
_COMPARE_BYTES = 1 << 18  # of comparisons at a time, to stay in the cache


@dataclass(frozen=True)
class Ranking:
    """The result for one score setting under one convention; values are fractions in 0..1.

    A query without a match has 0 in `ap`, `inp` and `first`.
    """

    cmc: np.ndarray  # (max_rank,) float64: cmc[k - 1] is Rank-k
    mAP: float
    mINP: float
    ap: np.ndarray  # (nq,) float64
    inp: np.ndarray  # (nq,) float64: number of matches / rank of the last one
    first: np.ndarray  # (nq,) int64: rank of the first match, from 1, after the dropped entries are gone
    queries: int
    without_match: int


def default_settings(heads: int) -> dict[str, tuple[float, ...]]:
    """The score settings to report for a net with so many heads: `SETTINGS` for 2, otherwise one with weights of 1."""
    return dict(SETTINGS) if heads == 2 else {"feature" if heads == 1 else "all parts": (1.0,) * heads}


def main_setting(heads: int) -> tuple[str, tuple[float, ...]]:
    """Name and weights of the setting that a net with so many heads is used with: `BOTH`, or all heads alike."""
    settings = default_settings(heads)
    return (BOTH, settings[BOTH]) if heads == 2 else next(iter(settings.items()))


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
    """Rank the gallery for every query; returns `{setting: {convention: Ranking}}`.

    Args:
        query: (nq, heads, dim) or (nq, dim) features. If `gallery` is None: the (nq, ng) scores themselves, where
            greater is better; the only setting is then called "scores".
        gallery: (ng, heads, dim) or (ng, dim) features.
        q_pids, g_pids: integer identities. A query of identity -1 has no match.
        q_camids, g_camids: integer cameras. Not used without `remove_same_camera`.
        settings: weights of the heads by name (default: `default_settings`). The score is the sum over h of
            weights[h] * query[:, h] . gallery[:, h].
        remove_same_camera: False leaves out only the query image itself, which the gallery shows under the query's
            identity and name (`q_keys`, `g_keys`), and counts junk as wrong.

    Raises UserError for arrays that do not fit together, an empty side, values that are not finite, and if no query has
    a match.
    """
    q_pids, g_pids = np.asarray(q_pids), np.asarray(g_pids)
    scores = None
    if gallery is None:
        scores = query = _checked(query, "scores", "query")
        if query.shape != (len(q_pids), len(g_pids)):
            raise UserError(f"scores have shape {query.shape}, but there are {len(q_pids)} x {len(g_pids)} labels")
        gallery, heads, settings = g_pids, 1, {"scores": (1.0,)}
    else:
        query, gallery = _checked_features(query, gallery)
        heads = query.shape[1]
        settings = default_settings(heads) if settings is None else settings
        for name, weights in settings.items():
            if len(weights) != heads or not any(weights):
                raise UserError(
                    f"score setting {name!r}: weights {tuple(weights)} for {heads} heads, not all 0, needed"
                )
    for side, n, *labels in (
        ("query", len(query), q_pids, q_camids, q_keys),
        ("gallery", len(gallery), g_pids, g_camids, g_keys),
    ):
        if any(values is not None and len(values) != n for values in labels):
            raise UserError(f"{n} {side} features, but a different number of {side} identities, cameras or names")
    if remove_same_camera and (q_camids is None or g_camids is None):
        raise UserError("the images have no cameras; use --no-cameras for data without cameras")

    # A gallery image of the query's identity with the query's mark is left out.
    q_marks, g_marks = (q_camids, g_camids) if remove_same_camera else (q_keys, g_keys)
    marked = q_marks is not None and g_marks is not None
    q_marks, g_marks = (
        (np.asarray(q_marks), np.asarray(g_marks)) if marked else (q_pids, np.full(len(g_pids), JUNK - 1))
    )
    kept = np.flatnonzero(g_pids != JUNK) if remove_same_camera else np.arange(len(g_pids))
    g_pids, g_marks = g_pids[kept], g_marks[kept]
    order = np.argsort(g_pids, kind="stable")  # stable, so that every identity's indices ascend
    begin, end = (np.searchsorted(g_pids[order], q_pids, side) for side in ("left", "right"))
    weighed = [any(weights[h] for weights in settings.values()) for h in range(heads)]

    def products(rows: slice) -> list[np.ndarray | None]:
        """The scores (rows, kept) for each head; None for a head that has no weight."""
        if scores is not None:
            return [scores[rows][:, kept]]
        return [_products(query[rows, h], gallery[:, h], kept) if weighed[h] else None for h in range(heads)]

    step = max(1, min(_CHUNK_QUERIES, _CHUNK_BYTES // (4 * heads * max(1, len(kept)))))
    chunks = [slice(start, min(start + step, len(q_pids))) for start in range(0, len(q_pids), step)]
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in settings}
    bar = tqdm(total=len(q_pids), desc="ranking", unit="query", delay=3, disable=None if progress else True)
    with bar, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(products, chunks[0])
        for k, rows in enumerate(chunks):
            by_head = following.result()
            if rows is not chunks[-1]:
                following = ahead.submit(products, chunks[k + 1])
            for i in range(rows.start, rows.stop):
                same = order[begin[i] : end[i]]
                left_out = g_marks[same] == q_marks[i]
                matches = same[~left_out] if q_pids[i] != JUNK else same[:0]
                for name, weights in settings.items():
                    if len(matches):
                        row = _weighted_sum([p if p is None else p[i - rows.start] for p in by_head], weights)
                        row[same[left_out]] = -np.inf
                    ranks[name].append(match_ranks(row, matches) if len(matches) else matches)
            bar.update(rows.stop - rows.start)
    return {
        name: {convention: _summarise(of_queries, convention, max_rank) for convention in CONVENTIONS}
        for name, of_queries in ranks.items()
    }


def _checked_features(query: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    query, gallery = _checked(query, "query features", "query"), _checked(gallery, "gallery features", "gallery")
    query, gallery = (side[:, None] if side.ndim == 2 else side for side in (query, gallery))
    if query.ndim != 3 or query.shape[1:] != gallery.shape[1:]:
        raise UserError(
            f"query features have shape {query.shape} and gallery features {gallery.shape}, expected (images, heads, "
            "dim); extract both with the same model"
        )
    # Products are summed in fp32. Beyond its range they would be infinite or NaN, and still be ranked.
    largest = [float(max(side.max(), -side.min())) for side in (query, gallery)]
    if query[0].size * largest[0] * largest[1] > float(np.finfo(np.float32).max):
        raise UserError(f"features as large as {max(largest):.2g} overflow in fp32; divide them by their norm")
    return query, gallery


def _checked(values: np.ndarray, name: str, side: str) -> np.ndarray:
    """The values as floats. Raises UserError if there are none, or if they are not finite."""
    values = np.asarray(values)
    if values.size == 0:
        raise UserError(f"the {side} is empty, so there is nothing to rank; check the {side} folder or file")
    check_finite(values, name)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def check_finite(values: np.ndarray, name: str) -> None:
    """Raise UserError, which names the first bad row, if `values` hold NaN or infinity."""
    for start in range(0, len(values), 4096):  # in parts: half a million images fill gigabytes
        finite = np.isfinite(values[start : start + 4096])
        if not finite.all():
            row = start + int(np.flatnonzero(~finite.reshape(len(finite), -1).all(1))[0])
            raise UserError(f"{name}: NaN or infinity in row {row}; extract the features again with a sound model")


def _products(query: np.ndarray, gallery: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """query @ gallery[kept].T of (n, dim) and (ng, dim), kept ascending; copies at most a tile of the gallery."""
    scores = np.empty((len(query), len(kept)), np.result_type(query, gallery))
    for start in range(0, len(kept), _TILE):
        part = kept[start : start + _TILE]
        in_one_piece = part[-1] - part[0] + 1 == len(part)  # where nothing is junk, and where files are sorted by name
        side = gallery[part[0] : part[-1] + 1] if in_one_piece else gallery[part]
        np.matmul(query, side.T, out=scores[:, start : start + len(part)])
    return scores


def _summarise(of_queries: list[np.ndarray], convention: str, max_rank: int) -> Ranking:
    """CMC, mAP, mINP and the values per query from the ranks of every query's matches, ascending from 1.

    Raises UserError if no query has a match, since nothing is defined then.
    """
    nq, counts = len(of_queries), np.array([len(ranks) for ranks in of_queries])
    valid = counts > 0
    if not valid.any():
        raise UserError(
            "no query has a match: the gallery shows no query identity under another camera; check that both belong to "
            "one data set, or use --no-cameras for data without cameras"
        )
    ranks, owner, end = np.concatenate(of_queries), np.repeat(np.arange(nq), counts), np.cumsum(counts)
    hit = np.arange(len(ranks)) - (end - counts)[owner] + 1.0  # 1 for a query's first match, 2 for its second, ...
    precision, denominator = hit / ranks, int(valid.sum())
    if convention == "official":
        before = np.divide(hit - 1, ranks - 1, out=np.ones_like(hit), where=ranks > 1)
        precision, denominator = (before + precision) / 2, nq
    ap = np.bincount(owner, weights=precision, minlength=nq) / np.maximum(counts, 1)
    first, inp = np.zeros(nq, np.int64), np.zeros(nq)
    first[valid] = ranks[(end - counts)[valid]]
    inp[valid] = counts[valid] / ranks[end[valid] - 1]
    hits_at = np.bincount(first[valid & (first <= max_rank)], minlength=max_rank + 1)[1:]
    return Ranking(
        cmc=np.cumsum(hits_at) / denominator,
        mAP=float(ap.sum() / denominator),
        mINP=float(inp[valid].mean()),
        ap=ap,
        inp=inp,
        first=first,
        queries=nq,
        without_match=int(nq - valid.sum()),
    )


def _weighted_sum(rows: Sequence[np.ndarray | None], weights: Sequence[float]) -> np.ndarray:
    """A new row: the sum of the rows times their weights, in their dtype."""
    terms = [row * row.dtype.type(w) for row, w in zip(rows, weights, strict=True) if w != 0]
    for term in terms[1:]:
        terms[0] += term
    return terms[0]


def match_ranks(row: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Ranks (int64, ascending, from 1) of the entries `matches` in a row of scores.

    The rank of a match is 1 + the number of entries with a greater score, or with an equal score and a smaller index.
    `row` is (ng,) with -inf for entries that are left out; `matches` is (m,), m >= 1, of ascending indices whose scores
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
    # With an equal score, the entries before all matches precede them and the entries behind all matches do not. In a
    # gallery sorted by identity nearly every entry is one of these, and one call compares it with several matches.
    outside = len(row) - len(between)
    step = max(1, _COMPARE_BYTES // max(1, outside))
    for start in range(0, len(matches) if outside else 0, step):
        part = scores[start : start + step, None]
        above = np.empty((len(part), outside), bool)
        np.greater_equal(row[:first], part, out=above[:, :first])
        np.greater(row[last:], part, out=above[:, first:])
        ranks[start : start + step] += [np.count_nonzero(entries) for entries in above]
    ranks.sort()
    return ranks


# ------------------------------------------------------------------------------------------ the lists
class Entry(NamedTuple):
    """A gallery image in the list of a query."""

    index: int  # in the gallery
    score: float
    mark: str  # "right", "wrong", or "junk", which the evaluation does not count
    rank: int | None  # from 1 among the images that count; None for junk


def first_entries(
    query: Features, gallery: Features, *, top: int = 10, remove_same_camera: bool = True
) -> list[list[Entry]]:
    """The list of every query down to the `top`-th image that counts, with the junk in between; at most 2 * `top` long.

    Junk is what `rank` leaves out: identity -1, and the query's identity under the query's camera; without
    `remove_same_camera` only the query image itself. Scores are those of `main_setting`; images with equal scores keep
    the gallery's order.
    """
    _, weights = main_setting(query.features.shape[1])
    q_marks, g_marks = (query.camids, gallery.camids) if remove_same_camera else (query.keys, gallery.keys)
    count, lists = min(2 * top, len(gallery)), []
    step = max(1, _LIST_BYTES // (4 * max(1, len(gallery))))
    for start in range(0, len(query), step):
        products = query.features[start : start + step].transpose(1, 0, 2) @ gallery.features.transpose(1, 2, 0)
        scores = sum(np.float32(w) * product for w, product in zip(weights, products, strict=True) if w != 0)
        for i, row in enumerate(scores, start):
            best = np.flatnonzero(row >= np.partition(row, -count)[-count])  # more than `count` if scores are equal
            best = best[np.argsort(-row[best], kind="stable")[:count]]
            right = (gallery.pids[best] == query.pids[i]) & (query.pids[i] != JUNK)
            marked = (
                g_marks[best] == q_marks[i] if q_marks is not None and g_marks is not None else np.zeros_like(right)
            )
            junk = right & marked | (gallery.pids[best] == JUNK) & remove_same_camera
            entries, ranked = [], 0
            for g, is_right, is_junk in zip(best.tolist(), right, junk, strict=True):
                if ranked == top:
                    break
                ranked += not is_junk
                mark = "junk" if is_junk else "right" if is_right else "wrong"
                entries.append(Entry(g, float(row[g]), mark, None if is_junk else ranked))
            lists.append(entries)
    return lists
