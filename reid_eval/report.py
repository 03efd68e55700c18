"""Report of a feature file under both conventions: `python -m reid_eval.report FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import write_json
from utils import UserError, run_cli

if TYPE_CHECKING:
    from reid_eval.features import Features
    from reid_eval.ranking import Ranking

ROW_LABELS = {"primary": "primary (beta 0)", "fine": "fine-grained only"}
COLUMNS = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}


def report(
    query: Features,
    gallery: Features,
    *,
    multi: Features | None = None,
    rerank: bool = False,
    remove_same_camera: bool = True,
) -> dict[str, Any]:
    """Rank and summarise: `summary` of `rankings`, which have the same arguments."""
    results = rankings(query, gallery, multi=multi, rerank=rerank, remove_same_camera=remove_same_camera)
    return summary(results, query, gallery, remove_same_camera=remove_same_camera)


def summary(
    results: dict[str, dict[str, dict[str, Ranking]]], query: Features, gallery: Features, *, remove_same_camera: bool
) -> dict[str, Any]:
    """Everything the table shows, ready for JSON; values are fractions in 0..1. `results` are those of `rankings`.

    `{"queries", "without_match", "gallery", "remove_same_camera", "query_known_by_name", "conventions":
    {name: explanation}, "tables": {title: {setting: {convention: {"rank1", "rank5", "rank10", "mAP", "mINP"}}}}}`,
    where the titles are "single query" and, as asked for, "multi-query" and either with ", re-ranked" after it.
    """
    from reid_eval.ranking import CONVENTIONS

    some = next(iter(next(iter(results["single query"].values())).values()))
    return {
        "queries": some.queries,
        "without_match": some.without_match,
        "gallery": len(gallery),
        "remove_same_camera": remove_same_camera,
        "query_known_by_name": query.keys is not None and gallery.keys is not None,
        "conventions": dict(CONVENTIONS),
        "tables": {
            title: {
                setting: {name: _numbers(ranking) for name, ranking in by_convention.items()}
                for setting, by_convention in by_setting.items()
            }
            for title, by_setting in results.items()
        },
    }


def rankings(
    query: Features,
    gallery: Features,
    *,
    multi: Features | None = None,
    rerank: bool = False,
    remove_same_camera: bool = True,
) -> dict[str, dict[str, dict[str, Ranking]]]:
    """The full results behind `report`, per-query values included, as `[title][setting][convention]`.

    Several processes share the rankings, each of which takes a process by itself, and all return all.

    Args:
        query, gallery: features and labels of both sides.
        multi: multi-query images; adds the tables with their means in the queries' place.
        rerank: adds the k-reciprocal re-ranked tables (k1 20, k2 6, lambda 0.3).
        remove_same_camera: False is for data without cameras (see `ranking.rank`).

    Raises:
        UserError: as `ranking.rank`, `reranking.multi_query` and `reranking.rerank`.
    """
    from parallel import collectives
    from reid_eval import ranking, reranking
    from reid_eval.features import without_junk

    def rank(scores_or_query, gallery_features, side, settings=None):
        return ranking.rank(
            scores_or_query,
            gallery_features,
            query.pids,
            side.pids,
            query.camids,
            side.camids,
            settings=settings,
            remove_same_camera=remove_same_camera,
            q_keys=query.keys,
            g_keys=side.keys,
        )

    queries = {"single query": query.features}
    if multi is not None:
        queries["multi-query"] = reranking.multi_query(
            multi.features, multi.pids, multi.camids, query.pids, query.camids
        )
    # What to rank, as (title, name of the setting or None for all of them at once).
    tasks: list[tuple[str, str | None]] = [(title, None) for title in queries]
    settings = ranking.default_settings(query.features.shape[1])
    # Junk would be among the neighbours; without cameras it counts as wrong answers and so takes part.
    side = without_junk(gallery) if rerank and remove_same_camera else gallery
    if rerank:
        tasks += [(title, name) for title in queries for name in settings]

    own = {}
    for title, name in tasks[collectives.rank() :: collectives.world_size()]:
        features = queries[title]
        if name is None:
            own[title, name] = rank(features, gallery.features, gallery)
        else:
            scores = -reranking.rerank(features, side.features, weights=settings[name])
            own[title, name] = {name: rank(scores, None, side)["scores"]}
    done = {task: found for share in collectives.gather(own) for task, found in share.items()}
    results: dict[str, dict[str, dict[str, Ranking]]] = {}
    for title, name in tasks:
        results.setdefault(title if name is None else f"{title}, re-ranked", {}).update(done[title, name])
    return results


def format_table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal, values in percent; no line break at the end."""
    missing = report["without_match"]
    lines = [f"{report['queries']} queries ({missing} without a match), {report['gallery']} gallery images"]
    if not report["remove_same_camera"]:
        itself = " but the query image itself" if report["query_known_by_name"] else "; no names tell the query image"
        lines.append(f"no cameras: nothing is left out{itself}")
    for title, rows in report["tables"].items():
        labels = {setting: ROW_LABELS.get(setting, setting) for setting in rows}
        wide = max(len(label) for label in labels.values())
        for convention, explanation in report["conventions"].items():
            lines += ["", f"{title}, {convention}: {explanation}"]
            lines.append("  " + " " * wide + "".join(f"{column:>9}" for column in COLUMNS.values()))
            for setting, label in labels.items():
                lines.append(f"  {label:{wide}}{_cells(rows[setting][convention])}")
    return "\n".join(lines)


def format_comparison(reports: dict[str, dict[str, Any]]) -> str:
    """Reports of one model by data set as lines for a terminal: a row per data set and head, in percent."""
    first = next(iter(reports.values()))
    lines = []
    for title, rows in first["tables"].items():
        labels = {setting: ROW_LABELS.get(setting, setting) for setting in rows}
        names, heads = max(map(len, reports)), max(map(len, labels.values()))
        for convention, explanation in first["conventions"].items():
            lines += ["", f"{title}, {convention}: {explanation}"]
            lines.append(" " * (names + heads + 4) + "".join(f"{column:>9}" for column in COLUMNS.values()))
            for data_set, report in reports.items():
                for setting, label in labels.items():
                    cells = _cells(report["tables"][title][setting][convention])
                    lines.append(f"  {data_set:{names}}  {label:{heads}}{cells}")
    return "\n".join(lines)


def _cells(values: dict[str, float]) -> str:
    return "".join(f"{100 * values[key]:9.2f}" for key in COLUMNS)


def _numbers(ranking: Ranking) -> dict[str, float]:
    at = {f"rank{k}": float(ranking.cmc[k - 1]) for k in (1, 5, 10)}
    return at | {"mAP": ranking.mAP, "mINP": ranking.mINP}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="reid_eval.report", description="Rank-1/5/10, mAP and mINP of a feature file, under both conventions."
    )
    parser.add_argument("file", metavar="FILE", help=".npz of test.py --save-features, or a pytorch_result.mat")
    parser.add_argument("--multi", action="store_true", help="also multi-query (for a .mat: multi_query.mat beside it)")
    parser.add_argument("--rerank", action="store_true", help="also k-reciprocal re-ranking (k1 20, k2 6, lambda 0.3)")
    parser.add_argument(
        "--no-cameras", action="store_true", help="data without cameras: only the query image itself is left out"
    )
    parser.add_argument("--json", metavar="OUT", help="write the report here too, as JSON with fractions in 0..1")
    args = parser.parse_args()
    if args.json and Path(args.json).suffix in (".npz", ".mat"):
        raise UserError(f"--json {args.json}: is the name of a feature file; give one that ends in .json")

    from reid_eval.features import load_features

    file = load_features(args.file, multi=args.multi)
    try:
        result = report(
            file.query,
            file.gallery,
            multi=file.multi,
            rerank=args.rerank,
            remove_same_camera=not args.no_cameras,
        )
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from None
    print(format_table(result))
    if args.json:
        write_json(Path(args.json), {"file": str(args.file)} | result)


if __name__ == "__main__":
    run_cli(main)
