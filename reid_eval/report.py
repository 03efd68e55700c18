"""Rank-1/5/10, mAP and mINP of features under both conventions: `python -m reid_eval.report FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

import numpy as np

from files import write_json
from reid_eval import ranking
from utils import UserError, add_rerank_argument, run_cli

if TYPE_CHECKING:
    from reid_eval.features import Features

SINGLE = "single query"  # the task that is always there
ROW_LABELS = {"primary": "primary (beta 0)", "fine": "fine-grained only"}
COLUMNS = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}


class ReidResult(NamedTuple):
    """One row of a report.

    task        "single query" or "multi-query", either with ", re-ranked (field)" or "(paper)" after it
    setting     a name of `ranking.default_settings`
    convention  a name of `ranking.CONVENTIONS`
    """

    task: str
    setting: str
    convention: str
    ranking: ranking.Ranking

    @property
    def numbers(self) -> dict[str, float]:
        """The columns of the table, as fractions in 0..1."""
        at = {f"rank{k}": float(self.ranking.cmc[k - 1]) for k in (1, 5, 10)}
        return at | {"mAP": self.ranking.mAP, "mINP": self.ranking.mINP}


def evaluate_features(
    query: Features,
    gallery: Features,
    *,
    multi: Features | None = None,
    rerank: str | None = None,
    remove_same_camera: bool = True,
) -> list[ReidResult]:
    """Every task under every score setting and convention, in the order of the table.

    Args:
        query, gallery: features and labels of both sides.
        multi: multi-query images; adds the tasks in which their means replace the queries.
        rerank: adds the k-reciprocal re-ranked tasks (k1 20, k2 6, lambda 0.3) by this one of `reranking.VARIANTS`.
        remove_same_camera: False is for data without cameras (see `ranking.rank`).

    Several processes share the rankings, and each returns all results. Raises UserError as `ranking.rank`,
    `reranking.multi_query` and `reranking.rerank`.
    """
    from parallel import collectives
    from reid_eval import reranking

    queries = {SINGLE: query.features}
    if multi is not None:
        queries["multi-query"] = reranking.multi_query(
            multi.features, multi.pids, multi.camids, query.pids, query.camids
        )
    settings = ranking.default_settings(query.features.shape[1])
    # Junk would be among the neighbours. Without cameras it counts as wrong answers and takes part.
    neighbours = gallery.select(gallery.pids != ranking.JUNK) if rerank and remove_same_camera else gallery

    def rank(features: np.ndarray, side: Features, side_features: np.ndarray | None) -> dict[str, Any]:
        labels = query.pids, side.pids, query.camids, side.camids
        names = dict(q_keys=query.keys, g_keys=side.keys)
        return ranking.rank(features, side_features, *labels, remove_same_camera=remove_same_camera, **names)

    # What to rank: all settings of a task in one pass; re-ranked, one pass per setting.
    passes: list[tuple[str, str | None]] = [(task, None) for task in queries]
    passes += [(task, setting) for task in queries for setting in settings if rerank]
    share = []
    for task, setting in passes[collectives.rank() :: collectives.world_size()]:
        if setting is None:
            ranked = rank(queries[task], gallery, gallery.features)
        else:
            distances = reranking.rerank(queries[task], neighbours.features, weights=settings[setting], variant=rerank)
            task, ranked = f"{task}, re-ranked ({rerank})", {setting: rank(-distances, neighbours, None)["scores"]}
        share.append([ReidResult(task, s, c, result) for s, by in ranked.items() for c, result in by.items()])
    shares = collectives.gather(share)
    return [row for i in range(len(shares[0])) for rows in shares if i < len(rows) for row in rows[i]]


def summary(
    results: Sequence[ReidResult], query: Features, gallery: Features, *, remove_same_camera: bool = True
) -> dict[str, Any]:
    """The content of reid.json: everything that the table shows, as fractions in 0..1.

    `{"queries", "without_match", "gallery", "remove_same_camera", "query_known_by_name", "conventions":
    {name: explanation}, "tables": {task: {setting: {convention: {"rank1", "rank5", "rank10", "mAP", "mINP"}}}}}`
    """
    tables: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for row in results:
        tables.setdefault(row.task, {}).setdefault(row.setting, {})[row.convention] = row.numbers
    return {
        "queries": results[0].ranking.queries,
        "without_match": results[0].ranking.without_match,
        "gallery": len(gallery),
        "remove_same_camera": remove_same_camera,
        "query_known_by_name": query.keys is not None and gallery.keys is not None,
        "conventions": dict(ranking.CONVENTIONS),
        "tables": tables,
    }


def per_query(results: Sequence[ReidResult]) -> dict[str, np.ndarray]:
    """The results per query as arrays, a row per result.

    "results"  (r, 3) strings: task, setting, convention
    "ap"       (r, nq) float64, 0 for a query without a match
    "first"    (r, nq) int64: rank of the first match, from 1; 0 for a query without a match
    """
    return {
        "results": np.array([row[:3] for row in results]),
        "ap": np.stack([row.ranking.ap for row in results]),
        "first": np.stack([row.ranking.first for row in results]),
    }


def format_table(report: dict[str, Any]) -> str:
    """A `summary` as lines for a terminal, values in percent; no line break at the end."""
    missing = report["without_match"]
    line = f"{report['queries']} queries ({missing} without a match), {report['gallery']} gallery images"
    if not report["remove_same_camera"]:
        itself = " but the query image itself" if report["query_known_by_name"] else "; no names identify the query"
        line += f"\nno cameras: nothing is left out{itself}"
    return f"{line}\n{format_comparison({'': report})}"


def format_comparison(reports: dict[str, dict[str, Any]]) -> str:
    """Summaries of one model by data set as lines for a terminal: a row per data set and setting, in percent.

    A data set called "" has no column for its name.
    """
    first, names = next(iter(reports.values())), max(map(len, reports))
    lines = []
    for task, settings in first["tables"].items():
        labels = {
            (data_set, setting): f"{data_set:{names + 2 if names else 0}}{ROW_LABELS.get(setting, setting)}"
            for data_set in reports
            for setting in settings
        }
        wide = max(map(len, labels.values()))
        for convention, explanation in first["conventions"].items():
            lines += ["", f"{task}, {convention}: {explanation}"]
            lines.append("  " + " " * wide + "".join(f"{column:>9}" for column in COLUMNS.values()))
            for (data_set, setting), label in labels.items():
                numbers = reports[data_set]["tables"][task][setting][convention]
                lines.append(f"  {label:{wide}}" + "".join(f"{100 * numbers[key]:9.2f}" for key in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="reid_eval.report", description="Rank-1/5/10, mAP and mINP of a feature file, under both conventions."
    )
    parser.add_argument("file", metavar="FILE", help="reid.npz of test.py, or another .npz of features")
    parser.add_argument("--multi", action="store_true", help="also multi-query")
    add_rerank_argument(parser)
    parser.add_argument("--no-cameras", action="store_true", help="leave out only the query image itself")
    parser.add_argument("--json", metavar="OUT", help="write the report here too, as JSON with fractions in 0..1")
    args = parser.parse_args()
    if args.json and Path(args.json).suffix in (".npz", ".mat"):
        raise UserError(f"--json {args.json}: is the name of a feature file; give one that ends in .json")

    from reid_eval.features import load_features

    query, gallery, multi = load_features(args.file, multi=args.multi)
    cameras = not args.no_cameras
    try:
        results = evaluate_features(query, gallery, multi=multi, rerank=args.rerank, remove_same_camera=cameras)
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from None
    report = summary(results, query, gallery, remove_same_camera=cameras)
    print(format_table(report))
    if args.json:
        write_json(Path(args.json), {"file": str(args.file)} | report)


if __name__ == "__main__":
    run_cli(main)
