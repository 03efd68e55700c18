"""The first entries of every query's ranked list, each marked right, wrong or junk: what the figures show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reid_eval.features import Features
from reid_eval.ranking import BOTH, JUNK, default_settings

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """A gallery image in a query's list."""

    index: int  # in the gallery
    score: float
    mark: str  # "right", "wrong", or "junk": not counted by the evaluation
    rank: int | None  # from 1 among the images that count; None for junk


def main_setting(heads: int) -> tuple[str, tuple[float, ...]]:
    """The score setting that a net with so many heads is used with: both heads with beta 0.5, or all alike."""
    settings = default_settings(heads)
    name = BOTH if heads == 2 else next(iter(settings))
    return name, settings[name]


def best_scores(
    query: np.ndarray, gallery: np.ndarray, weights: Sequence[float], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gallery indices and scores, both (nq, min(count, ng)), of each query's highest scores, highest first.

    `query` is (nq, heads, dim), `gallery` (ng, heads, dim); equal scores keep the gallery's order, as in `ranking`.
    """
    count = min(count, len(gallery))
    indices, best = np.empty((len(query), count), np.int64), np.empty((len(query), count), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * max(1, len(gallery))))
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        scores = sum(np.float32(w) * (query[rows, h] @ gallery[:, h].T) for h, w in enumerate(weights) if w != 0)
        for i, row in enumerate(scores, start):
            least = np.partition(row, len(row) - count)[len(row) - count]
            candidates = np.flatnonzero(row >= least)  # more than `count` where scores are equal
            indices[i] = candidates[np.argsort(-row[candidates], kind="stable")[:count]]
            best[i] = row[indices[i]]
    return indices, best


def first_entries(
    query: Features, gallery: Features, *, top: int = 10, remove_same_camera: bool = True
) -> list[list[Entry]]:
    """Every query's list down to the `top`-th image that counts, junk in between included, 2 * `top` entries at most.

    Junk is what `ranking.rank` drops: identity -1 and the query's identity under the query's camera; without
    `remove_same_camera` only the query image itself. Scores are those of `main_setting`.
    """
    _, weights = main_setting(query.features.shape[1])
    indices, scores = best_scores(query.features, gallery.features, weights, 2 * top)
    same = (gallery.pids[indices] == query.pids[:, None]) & (query.pids[:, None] != JUNK)
    junk = np.zeros_like(same)
    if remove_same_camera:
        junk |= (gallery.pids[indices] == JUNK) | (same & (gallery.camids[indices] == query.camids[:, None]))
    elif query.keys is not None and gallery.keys is not None:
        junk |= same & (gallery.keys[indices] == query.keys[:, None])
    ranks = np.cumsum(~junk, axis=1)
    lists = []
    for i, entries in enumerate(indices):
        shown = len(entries) if ranks[i, -1] < top else int(np.searchsorted(ranks[i], top)) + 1
        lists.append(
            [
                Entry(int(entries[j]), float(scores[i, j]), "junk", None)
                if junk[i, j]
                else Entry(int(entries[j]), float(scores[i, j]), "right" if same[i, j] else "wrong", int(ranks[i, j]))
                for j in range(shown)
            ]
        )
    return lists
