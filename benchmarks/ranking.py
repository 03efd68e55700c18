"""Speed and memory of ranking and re-ranking: `python -m benchmarks.ranking [speed | memory | rerank]`.

speed   Market-1501's size: all score settings and both conventions in one pass, against one bare product of all
        features, which no ranking can avoid, and against the plain reference below, timed on a sample of the queries
        and scaled. With good features, and with features at chance level, whose matches lie deep.
memory  500,000 gallery images: the peak memory of a process, less the features.
rerank  k-reciprocal re-ranking of Market-1501's size (23,100 images): seconds and peak memory of a process.

The features are random; sizes, counts of labels and order are those of the data set.
"""

from __future__ import annotations

import statistics
from functools import partial

import numpy as np

from benchmarks.machine import alternate, benchmark_parser, describe_machine, median_ratio, resident_bytes, write_result
from reid_eval.features import Features
from reid_eval.ranking import BOTH, SETTINGS, rank
from reid_eval.reranking import rerank
from utils import between, run_cli

HEADS, DIM = 2, 1024  # numbers per image, of both heads together
REPEATS, SAMPLE = 5, 100  # rounds of the speed part, queries of the plain reference
KINDS = {"good": 1.0, "chance": 0.0}  # how strongly an image shows its identity
# Shares of Market-1501's gallery: 3,819 junk and 2,793 distractors of 19,732.
JUNK_SHARE, DISTRACTOR_SHARE = 3819 / 19732, 2793 / 19732


def make_problem(nq: int, ng: int, dim: int = DIM, *, signal: float, seed: int = 0) -> tuple[Features, Features]:
    """Query and gallery with two heads of `dim` / 2 numbers; about 17.5 gallery images per identity, six cameras.

    An image's features are its identity's, weighted with `signal` and a long-tailed random factor, plus noise. So most
    matches come first and some lie deep, as with real features.
    """
    rng = np.random.default_rng(seed)
    junk, distractors = round(ng * JUNK_SHARE), round(ng * DISTRACTOR_SHARE)
    ids = max(1, round((ng - junk - distractors) / 17.5))
    centers = rng.standard_normal((ids + 1, HEADS, dim // HEADS), dtype=np.float32)
    known = rng.integers(1, ids + 1, ng - junk - distractors)
    g_pids = np.sort(np.concatenate([np.full(junk, -1), np.zeros(distractors, np.int64), known]))
    q_pids = np.sort(rng.integers(1, ids + 1, nq))

    def side(pids: np.ndarray) -> Features:
        features = np.empty((len(pids), HEADS, dim // HEADS), np.float32)
        for start in range(0, len(pids), 8192):  # in place: half a million images fill gigabytes
            part = features[start : start + 8192]
            rng.standard_normal(part.shape, dtype=np.float32, out=part)
            people = pids[start : start + 8192]
            strength = signal * rng.lognormal(0, 0.8, len(people)).astype(np.float32) * (people > 0)
            part += centers[np.maximum(people, 0)] * strength[:, None, None]
            part /= np.linalg.norm(part, axis=-1, keepdims=True)
        return Features(features, pids, rng.integers(1, 7, len(pids)))

    return side(q_pids), side(g_pids)


def plain_reference(query: Features, gallery: Features, weights: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Rank query by query, as evaluation scripts usually do, with set operations on indices and a loop over the hits.

    Returns (nq,) arrays of one score setting: `official` and `standard` (AP), `inp` and `first` (rank of the first
    match); all are 0 without a match.
    """
    rows = []
    for i in range(len(query)):
        parts = zip(weights, query.features[i], gallery.features.transpose(1, 0, 2), strict=True)
        scores = sum(np.float32(w) * (of_gallery @ of_query) for w, of_query, of_gallery in parts)
        same_pid = np.argwhere(gallery.pids == query.pids[i])
        same_camera = np.argwhere(gallery.camids == query.camids[i])
        matches = np.setdiff1d(same_pid, same_camera, assume_unique=True)
        dropped = np.append(np.argwhere(gallery.pids == -1), np.intersect1d(same_pid, same_camera))
        order = np.argsort(-scores, kind="stable")
        order = order[np.isin(order, dropped, invert=True)]
        positions = np.flatnonzero(np.isin(order, matches)).tolist()
        official = standard = 0.0
        for n, r in enumerate(positions):
            precision, before = (n + 1) / (r + 1), n / r if r else 1.0
            official += (before + precision) / 2 / len(positions)
            standard += precision / len(positions)
        inp, first = (len(positions) / (positions[-1] + 1), positions[0] + 1) if positions else (0.0, 0)
        rows.append((official, standard, inp, first))
    return dict(zip(("official", "standard", "inp", "first"), np.array(rows).T, strict=True))


def rank_sides(q: Features, g: Features, *, progress: bool = False) -> dict:
    return rank(q.features, g.features, q.pids, g.pids, q.camids, g.camids, progress=progress)


def measure_speed(nq: int, ng: int) -> dict:
    """Seconds and ratios for every kind of features in `KINDS`."""
    result, sample = {}, min(SAMPLE, nq)
    for kind, signal in KINDS.items():
        query, gallery = make_problem(nq, ng, signal=signal)
        chosen = np.random.default_rng(1).choice(nq, sample, replace=False)
        sampled = Features(query.features[chosen], query.pids[chosen], query.camids[chosen])
        results = rank_sides(query, gallery)
        seconds = alternate(
            {
                "bare product": partial(np.matmul, query.features.reshape(nq, -1), gallery.features.reshape(ng, -1).T),
                "ranking": partial(rank_sides, query, gallery),
                "plain reference, one setting, sample": partial(plain_reference, sampled, gallery, SETTINGS[BOTH]),
            },
            REPEATS,
        )
        product, ours, plain = seconds.values()
        plain = [s * nq / sample for s in plain]
        result[kind] = {
            "mAP": {name: by["official"].mAP for name, by in results.items()},
            "median": {name: statistics.median(values) for name, values in seconds.items()},
            "ranking / bare product": median_ratio(ours, product),
            "plain reference of all settings / ranking of all": len(SETTINGS) * median_ratio(plain, ours),
        }
    return result | {"settings": list(SETTINGS), "sampled queries": sample, "repeats": REPEATS}


def measure_memory(nq: int, ng: int) -> dict:
    """Peak memory of this process in bytes, less the features, and seconds of the ranking."""
    query, gallery = make_problem(nq, ng, signal=KINDS["good"])
    features = query.features.nbytes + gallery.features.nbytes
    (seconds,) = alternate({"ranking": partial(rank_sides, query, gallery, progress=True)}, 1)["ranking"]
    return {"features": features, "beyond_features": resident_bytes("VmHWM") - features, "seconds": seconds}


def measure_rerank(nq: int, ng: int) -> dict:
    """Peak memory of this process in bytes, and seconds of one re-ranking; junk counts as images here."""
    query, gallery = make_problem(nq, ng, signal=KINDS["good"])
    (seconds,) = alternate({"rerank": partial(rerank, query.features, gallery.features)}, 1)["rerank"]
    return {"images": nq + ng, "seconds": seconds, "peak": resident_bytes("VmHWM")}


MEASURES = {"speed": measure_speed, "memory": measure_memory, "rerank": measure_rerank}


def main() -> None:
    parser = benchmark_parser("ranking", __doc__, device=False)
    parser.add_argument("part", choices=MEASURES, nargs="?", default="speed", help="what to measure (default: speed)")
    parser.add_argument("--queries", type=between(1), default=3368, help="number of queries (default: 3368)")
    parser.add_argument("--gallery", type=between(20), help="gallery images (default: 19732; memory: 500000)")
    args = parser.parse_args()
    nq, ng = args.queries, args.gallery or (500_000 if args.part == "memory" else 19_732)
    result = {"machine": describe_machine(), "sizes": {"queries": nq, "gallery": ng, "dim": DIM}}
    write_result(args.results, f"ranking-{args.part}", result | MEASURES[args.part](nq, ng))


if __name__ == "__main__":
    run_cli(main)
