"""Rates of a net that may also answer "nobody".

Scores are those of `ranking.main_setting`. Every query leaves out the gallery images that `ranking.rank` leaves out.

- Pairs: a query and a gallery image. Those of one person should lie above a threshold, those of two people below it.
- Searches: every query is searched for twice, with its person in the gallery and without. With it, the first hit should
  be right and lie above the threshold; without it, nothing should.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reid_eval.index import to_vectors
from reid_eval.ranking import JUNK, main_setting
from utils import UserError

if TYPE_CHECKING:
    from reid_eval.features import Features

RATES = (0.1, 0.01, 0.001, 0.0001)  # false alarm rates of the table
CURVE = tuple(float(rate) for rate in np.logspace(-5, 0, 26))  # and of the curve in reid.json
BINS = 15
_CHUNK = 1 << 24  # pairs at a time


@dataclass(frozen=True)
class Comparison:
    """The scores of nq queries and their gallery, float32.

    genuine   scores of the pairs that show one person
    impostor  scores of all other pairs, ascending
    hits      (nq, top) the best scores of each query, highest first; -inf where the gallery has fewer images
    right     (nq, top) whether these hits show the query's person
    absent    (nq, top) as `hits`, without the query's person in the gallery
    known     (nq,) whether the gallery shows the query's person
    """

    genuine: np.ndarray
    impostor: np.ndarray
    hits: np.ndarray
    right: np.ndarray
    absent: np.ndarray
    known: np.ndarray

    @property
    def images(self) -> float:
        """How many images of other people a query meets, on average."""
        return len(self.impostor) / len(self.known)


def compare(query: Features, gallery: Features, *, top: int = 1, remove_same_camera: bool = True) -> Comparison:
    """Compare every query with every gallery image; keeps 4 bytes for each pair.

    Of images with equal scores the first of the gallery is the better hit. Without `remove_same_camera` only the query
    image itself is left out, by its name. Raises UserError if no pair shows one person, or none shows two.
    """
    vectors, side = to_vectors(query.features), to_vectors(gallery.features)
    impostor, end = np.empty(len(query) * len(gallery), np.float32), 0
    parts = []
    for rows in _chunks(query, gallery):
        scores = vectors[rows] @ side.T
        one, two = one_or_two_people(query.select(rows), gallery, remove_same_camera)
        count = np.count_nonzero(two)
        impostor[end : end + count] = scores[two]
        end += count
        hits, right = _best(np.where(one | two, scores, -np.inf), one, top)
        absent, _ = _best(np.where(two, scores, -np.inf), one, top)
        parts.append((scores[one], hits, right, absent, one.any(1)))
    genuine, hits, right, absent, known = map(np.concatenate, zip(*parts, strict=True))
    if not len(genuine) or not end:
        raise UserError("rates need pairs that show one person and pairs that show two; check query and gallery")
    return Comparison(genuine, np.sort(impostor[:end]), hits, right, absent, known)


def find_known(query: Features, gallery: Features, *, remove_same_camera: bool = True) -> np.ndarray:
    """(nq,) whether the gallery shows the person of each query."""
    masks = (one_or_two_people(query.select(rows), gallery, remove_same_camera) for rows in _chunks(query, gallery))
    return np.concatenate([one.any(1) for one, _ in masks])


def _chunks(query: Features, gallery: Features) -> list[slice]:
    step = max(1, _CHUNK // max(1, len(gallery)))
    return [slice(start, start + step) for start in range(0, len(query), step)]


def one_or_two_people(query: Features, gallery: Features, remove_same_camera: bool) -> tuple[np.ndarray, np.ndarray]:
    """Masks (nq, ng) of the pairs that show one person and those that show two; what is left out is in neither."""
    same = query.pids[:, None] == gallery.pids
    left_out = np.zeros_like(same)
    q_marks, g_marks = (query.camids, gallery.camids) if remove_same_camera else (query.keys, gallery.keys)
    if q_marks is not None and g_marks is not None:
        left_out |= same & (q_marks[:, None] == g_marks)
    if remove_same_camera:
        left_out |= gallery.pids == JUNK
    same &= query.pids[:, None] != JUNK
    return same & ~left_out, ~same & ~left_out


def _best(scores: np.ndarray, right: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` highest scores of every row, and where they are right. Overwrites `scores`."""
    rows, found, marks = np.arange(len(scores)), [], []
    for _ in range(top):
        best = scores.argmax(1)
        found.append(scores[rows, best])
        marks.append(right[rows, best] & (found[-1] > -np.inf))
        scores[rows, best] = -np.inf
    return np.stack(found, 1), np.stack(marks, 1)


# ------------------------------------------------------------------------------------------------ rates
class Point(NamedTuple):
    """A threshold, the share of the true that it keeps (score >= threshold), and that of the false."""

    threshold: float
    kept: float
    false_alarms: float


@dataclass(frozen=True)
class Roc:
    """The curve of all thresholds: its corners (n,), from the highest threshold to the lowest.

    thresholds    the different scores of the true
    kept          share of the true that score this or more
    false_alarms  share of the false that score this or more
    above         share of the false that score more
    """

    thresholds: np.ndarray
    kept: np.ndarray
    false_alarms: np.ndarray
    above: np.ndarray

    def at(self, rate: float) -> Point:
        """The lowest threshold with at most this rate of false alarms; an infinite one if there is none."""
        n = np.searchsorted(self.false_alarms, rate, side="right")
        if n == 0:
            return Point(float("inf"), 0.0, 0.0)
        return Point(*(float(values[n - 1]) for values in (self.thresholds, self.kept, self.false_alarms)))

    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """False alarms and kept from (0, 0) to (1, 1). Between two corners the curve is straight."""
        before = np.append(0, self.kept[:-1])
        x = np.stack([self.above, self.false_alarms], 1).ravel()
        return np.r_[0, x, 1], np.r_[0, np.stack([before, self.kept], 1).ravel(), 1]

    @property
    def eer(self) -> float:
        """The equal error rate: where as many of the false are kept as of the true are not."""
        x, y = self.corners()
        return float(np.interp(0, x + y - 1, x))

    @property
    def auc(self) -> float:
        x, y = self.corners()
        return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)


def roc(true: np.ndarray, false: np.ndarray, count: int | None = None) -> Roc:
    """The curve for scores of the true, and of the false in ascending order.

    count  how many are true; more than `len(true)` if some are never kept
    """
    thresholds, counts = np.unique(true, return_counts=True)
    thresholds, kept = thresholds[::-1], np.cumsum(counts[::-1]) / (count or len(true))
    at_least, above = (
        (len(false) - np.searchsorted(false, thresholds, side)) / len(false) for side in ("left", "right")
    )
    return Roc(thresholds, kept, at_least, above)


def roc_of_searches(comparison: Comparison) -> Roc:
    """`kept` are the queries whose first hit is right; the false are the queries whose person is not in the gallery."""
    found = comparison.hits[:, 0][comparison.right[:, 0]]
    return roc(found, np.sort(comparison.absent[:, 0]), int(comparison.known.sum()))


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error: the mean of |share of right ones - mean probability| over `BINS` equal bins."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    surplus = np.bincount(bins, weights=probability - right, minlength=BINS)
    return float(np.abs(surplus).sum() / len(bins))


# ------------------------------------------------------------------------------------- what test.py shows
def measure_open_set(query: Features, gallery: Features, *, remove_same_camera: bool = True) -> dict[str, Any]:
    """The content of "open_set" in reid.json, rates as fractions in 0..1.

    `{"setting", "genuine", "impostor", "known", "searches", "eer", "auc", "roc": [[false alarm rate, share kept]],
    "tar": [{"rate", "threshold", "kept", "false_alarms"}], "dir": [the same]}`
    """
    comparison = compare(query, gallery, remove_same_camera=remove_same_camera)
    pairs, searches = roc(comparison.genuine, comparison.impostor), roc_of_searches(comparison)
    return {
        "setting": main_setting(query.features.shape[1])[0],
        "genuine": len(comparison.genuine),
        "impostor": len(comparison.impostor),
        "known": int(comparison.known.sum()),
        "searches": len(query),
        "eer": pairs.eer,
        "auc": pairs.auc,
        "roc": [[rate, pairs.at(rate).kept] for rate in CURVE],
        "tar": _points(pairs),
        "dir": _points(searches),
    }


def _points(curve: Roc) -> list[dict[str, float | None]]:
    points = {rate: curve.at(rate) for rate in RATES}
    # JSON has no infinity: no threshold keeps the rate.
    finite = {rate: point._replace(threshold=None) if point.kept == 0 else point for rate, point in points.items()}
    return [{"rate": rate} | point._asdict() for rate, point in finite.items()]


def format_open_set(report: dict[str, Any]) -> str:
    """What `measure_open_set` returns as lines for a terminal, values in percent; no line break at the end."""

    def row(label: str, points: list[dict[str, float | None]]) -> str:
        cells = (f"{'-' if p['threshold'] is None else format(100 * p['kept'], '.2f'):>10}" for p in points)
        return f"  {label:40}{''.join(cells)}"

    rates = "".join(f"{f'{100 * rate:g} %':>10}" for rate in RATES)
    return "\n".join(
        [
            f"open set, {report['setting']}: {report['genuine']} pairs of one person and {report['impostor']} of two; "
            f"{report['known']} searches for people in the gallery and {report['searches']} for people who are not",
            f"  EER {100 * report['eer']:.2f}, area under the ROC curve {100 * report['auc']:.2f}",
            f"  {'at a false alarm rate of':40}{rates}",
            row("TAR: pairs of one person accepted", report["tar"]),
            row("DIR: people found by the first hit", report["dir"]),
        ]
    )
