"""The tables of a run's report, made from the JSON files in its folder and from its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, changed_from_default
from files import read_json
from gen_eval.score import COLUMNS as SCORES
from gen_eval.score import PROTOCOL_KEYS, ratio_cells, score_cells
from mannequins.against_truth import describe_shares, swap_table
from reid_eval.ranking import BOTH
from reid_eval.report import COLUMNS, ROW_LABELS
from runs.folder import RunFolder
from runs.load import find_teacher
from utils import UserError


class Table(NamedTuple):
    """A table of texts. `numbers` is the first column of numbers, `strong` are the indices of emphasised rows."""

    caption: str
    heads: list[str]
    rows: list[list[str]]
    numbers: int = 1
    notes: list[str] = []
    strong: frozenset[int] = frozenset()


def show(value: object) -> str:
    """A setting's value as YAML has it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def results(folder: Path, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The JSON files of a folder that hold `key`, shortest names first, so that reid.json precedes reid-OTHER.json.

    Raises UserError for a file that cannot be read.
    """
    for path in sorted(folder.glob("*.json"), key=lambda path: (len(path.name), path.name)):
        content = read_json(path, "create it again")
        if isinstance(content, dict) and key in content:
            yield path, content


@contextmanager
def read_from(path: Path) -> Iterator[None]:
    """Turn errors about the content of a result file into a UserError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not in the format of this version; create it again") from None


class Row(NamedTuple):
    """The result of one head of one net in one convention; `values` are in percent by the keys of COLUMNS."""

    net: str
    is_teacher: bool
    head: str
    convention: str
    values: dict[str, float]


def reid_tables(run: RunFolder, cfg: Config) -> list[Table]:
    """A table per data set and kind of query, from `reid*.json` of the run and of its teachers."""
    nets = [] if not cfg.generates else [(run.name, False, run.path)]
    for name in reversed(cfg.teachers if nets else [run.name]):
        with suppress(UserError):  # a teacher whose files are gone has no row
            nets.insert(0, (f"teacher {name}", True, find_teacher(name, run.output_path).folder))
    rows: dict[tuple[str, str], list[Row]] = {}
    about: dict[tuple[str, str], tuple[str, list[str]]] = {}  # caption and notes
    for name, is_teacher, folder in nets:
        for path, report in results(folder, "tables"):
            with read_from(path):
                net = name if report["iteration"] is None else f"{name}, {report['iteration']} steps"
                counts = f"{report['queries']} queries, {report['gallery']} gallery images"
                notes = [f"{convention}: {explanation}." for convention, explanation in report["conventions"].items()]
                for task, heads in report["tables"].items():
                    key = report["tested_on"], task
                    about[key] = f"{', '.join(key)}: {counts}", notes
                    for head, by_convention in heads.items():
                        for convention in report["conventions"]:
                            values = {column: 100 * by_convention[convention][column] for column in COLUMNS}
                            rows.setdefault(key, []).append(Row(net, is_teacher, head, convention, values))
    return [reid_table(*about[key], rows[key]) for key in rows]


def reid_table(caption: str, notes: list[str], rows: list[Row]) -> Table:
    """The re-identification results of several nets on one data set, sorted by convention."""
    conventions = list(dict.fromkeys(row.convention for row in rows))
    rows = sorted(rows, key=lambda row: conventions.index(row.convention))
    cells = []
    for row in rows:
        teacher = next((r for r in rows if r.is_teacher and r.convention == row.convention), None)
        gain = "-" if row.is_teacher or teacher is None else f"{row.values['mAP'] - teacher.values['mAP']:+.2f}"
        label = "one head" if row.head == "feature" else ROW_LABELS.get(row.head, row.head)
        cells.append([row.net, label, row.convention, *(f"{value:.2f}" for value in row.values.values()), gain])
    strong = frozenset(i for i, row in enumerate(rows) if row.head == BOTH)
    return Table(caption, ["net", "head", "AP", *COLUMNS.values(), "mAP - teacher"], cells, 3, notes, strong)


def swaps_table(result: dict[str, Any]) -> Table:
    """The table of `swaps.json` of `mannequins.against_truth`."""
    heads, rows = swap_table(result)
    caption = (
        f"Swaps against the renderer's own, {result['pairs']} swaps of test images of {result['tested_on']}, "
        f"{result['iteration']} steps"
    )
    notes = [
        f"Error on the pixels that the true swap changes: generated {result['generated']:.1f} grey levels, copying "
        f"the structure image {result['copy']:.1f}, a reduction of {100 * result['reduction']:.1f} %. Rank-1, mAP: "
        "whether the teacher retrieves the owner of the clothes.",
        f"Clothes of the structure image and of the truth in them: {describe_shares(result['shares'])}.",
    ]
    return Table(caption, ["images", *heads], [[k, *row] for k, row in rows.items()], 1, notes, frozenset({0}))


def generation_tables(run: RunFolder) -> list[Table]:
    """The tables of the JSON files that `mannequins.against_truth` and `gen_eval.score` left in the run's folder."""
    tables = []
    for path, result in results(run.path, "reduction"):
        with read_from(path):
            tables.append(swaps_table(result))
    for path, result in results(run.path, "scores"):
        with read_from(path):
            rows = [[images, *score_cells(row)] for images, row in result["scores"].items()]
            rows += [["fake / real", *ratio_cells(result["ratio_to_real"])]] if result["ratio_to_real"] else []
            protocol = "; ".join(f"{key}: {result['protocol'][key]}" for key in PROTOCOL_KEYS)
            notes = [*result["not_computed"], protocol]
            strong = frozenset(range(len(result["scores"])))
            tables.append(Table(f"Scores of {path.name}", ["images", *SCORES.values()], rows, 1, notes, strong))
    return tables


def settings_table(cfg: Config) -> Table:
    """The settings that differ from the default."""
    rows = [
        [key, show(value), "required" if default is None and key == "data_root" else show(default)]
        for key, (value, default) in changed_from_default(cfg).items()
    ]
    return Table(f"{len(rows)} settings differ from the default", ["key", "here", "default"], rows, 3)
