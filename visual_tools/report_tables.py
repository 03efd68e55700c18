"""The tables of a run's report, made from the JSON files in its folder and from its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, DGNetConfig, changed_from_default
from files import read_json
from gen_eval.score import COLUMNS as SCORES
from gen_eval.score import PUBLISHED_NOTE, score_cells
from mannequins.against_truth import describe_shares, named_table, swap_table
from reid_eval.ranking import BOTH
from reid_eval.report import COLUMNS, ROW_LABELS
from runs.folder import RunFolder
from runs.load import find_teacher
from utils import UserError


@dataclass(frozen=True)
class Table:
    """A table of texts. `numbers` is the first column of numbers, `strong` are the indices of emphasised rows."""

    caption: str
    heads: list[str]
    rows: list[list[str]]
    numbers: int = 1
    notes: list[str] = field(default_factory=list)
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


# --------------------------------------------------------------------------------------- re-identification
class Row(NamedTuple):
    """The result of one head of one net in one convention, in percent by the keys of COLUMNS."""

    net: str
    is_teacher: bool
    head: str
    convention: str
    values: dict[str, float]


def reid_tables(run: RunFolder, cfg: Config) -> list[Table]:
    """A table per data set and kind of query, from `reid*.json` of the run and of its teachers."""
    generates = isinstance(cfg, DGNetConfig)
    nets = []
    for name in cfg.teachers if generates else [run.name]:
        try:
            nets.append((f"teacher {name}", True, find_teacher(name, run.output_path).folder))
        except UserError:
            continue  # a teacher whose files are gone has no row
    if generates:
        nets.append((run.name, False, run.path))
    rows: dict[tuple[str, str], list[Row]] = {}
    reports: dict[str, dict[str, Any]] = {}  # the last file about every data set, for captions and notes
    for name, is_teacher, folder in nets:
        for path, report in results(folder, "tables"):
            with read_from(path):
                net = name if report["iteration"] is None else f"{name}, {report['iteration']} steps"
                reports[report["tested_on"]] = {key: report[key] for key in ("queries", "gallery", "conventions")}
                for title, heads in report["tables"].items():
                    table = rows.setdefault((report["tested_on"], title), [])
                    for head, by_convention in heads.items():
                        for convention in report["conventions"]:
                            values = {key: 100 * by_convention[convention][key] for key in COLUMNS}
                            table.append(Row(net, is_teacher, head, convention, values))
    return [reid_table(data_set, title, table, reports[data_set]) for (data_set, title), table in rows.items()]


def reid_table(data_set: str, title: str, rows: list[Row], report: dict[str, Any]) -> Table:
    """The re-identification results of several nets on one data set, sorted by convention."""
    cells, strong = [], set()
    for convention in report["conventions"]:
        chosen = [row for row in rows if row.convention == convention]
        teacher = next((row for row in chosen if row.is_teacher), None)
        for row in chosen:
            if row.head == BOTH:
                strong.add(len(cells))
            label = "one head" if row.head == "feature" else ROW_LABELS.get(row.head, row.head)
            gain = "-" if row.is_teacher or teacher is None else f"{row.values['mAP'] - teacher.values['mAP']:+.2f}"
            cells.append([row.net, label, convention, *(f"{value:.2f}" for value in row.values.values()), gain])
    caption = f"{data_set}, {title}: {report['queries']} queries, {report['gallery']} gallery images"
    heads = ["net", "head", "AP", *COLUMNS.values(), "mAP - teacher"]
    notes = [f"{name}: {explanation}." for name, explanation in report["conventions"].items()]
    return Table(caption, heads, cells, 3, notes, frozenset(strong))


# ---------------------------------------------------------------------------------------------- generation
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
        "whether the teacher retrieves the owner of the clothes; top-1: whether its classifier names that person, for "
        "training images.",
        f"Clothes of the structure image and of the truth in them: {describe_shares(result['shares'])}.",
    ]
    return Table(caption, ["images", *heads], [[label, *row] for label, row in rows.items()], 1, notes, frozenset({0}))


def people_table(named: dict[str, dict[str, dict[str, float]]]) -> Table:
    """The people that the run's own heads name on generated and true swaps, from `swaps.json`."""
    heads, rows = named_table(named)
    note = (
        "How often a head names the structure image's person, and the owner of the clothes. What it names on generated "
        "but not on true swaps, it may read from errors of the generator."
    )
    cells = [[label, *row] for label, row in rows.items()]
    return Table("Whom the run's own heads name, swaps of training images, %", ["images", *heads], cells, 1, [note])


def scores_table(name: str, result: dict[str, Any]) -> Table:
    """The table of a result file `name` of `gen_eval.score`, with the published scores."""
    rows = [[images, *score_cells(row)] for images, row in result["scores"].items()]
    rows += [[f"{images} (published)", *score_cells(row)] for images, row in result["published"].items()]
    keys = ("drawn", "preparation", "fid", "kid", "ssim, lpips", "seed")
    protocol = "; ".join(f"{key}: {result['protocol'][key]}" for key in keys)
    notes = [f"(published): {PUBLISHED_NOTE}.", *result["not_computed"], protocol]
    strong = frozenset(range(len(result["scores"])))
    return Table(f"Scores of {name}", ["images", *SCORES.values()], rows, 1, notes, strong)


def generation_tables(run: RunFolder) -> list[Table]:
    """The tables of the JSON files that `mannequins.against_truth` and `gen_eval.score` left in the run's folder."""
    tables = []
    for path, result in results(run.path, "reduction"):
        with read_from(path):
            tables.append(swaps_table(result))
            if "named" in result:
                tables.append(people_table(result["named"]))
    for path, result in results(run.path, "scores"):
        with read_from(path):
            tables.append(scores_table(path.name, result))
    return tables


# ------------------------------------------------------------------------------------------------- the run
def settings_table(cfg: Config) -> Table:
    """The settings that differ from the default."""
    rows = [
        [key, show(value), "required" if default is None and key == "data_root" else show(default)]
        for key, (value, default) in changed_from_default(cfg).items()
    ]
    return Table(f"{len(rows)} settings differ from the default", ["key", "here", "default"], rows, 3)


def highlights(tables: list[Table], swaps: dict[str, Any] | None, rate: float | None) -> list[tuple[str, str, str]]:
    """The run in a few numbers, as (name, value, remark).

    tables  those of `reid_tables`, of which the first counts
    swaps   the content of `swaps.json`
    rate    images per second
    """
    tiles = []
    if tables:
        official = [i for i, row in enumerate(tables[0].rows) if row[2] == "official"]
        best = next((i for i in official if i in tables[0].strong), official[-1])
        teacher = next((i for i in official if tables[0].rows[i][0].startswith("teacher ") and i != best), None)
        for name in ("Rank-1", "mAP"):
            column = tables[0].heads.index(name)
            remark = "" if teacher is None else f"teacher {tables[0].rows[teacher][column]}"
            tiles.append((f"{name}, official", f"{tables[0].rows[best][column]} %", remark))
    if swaps is not None:
        remark = f"{swaps['generated']:.1f} against {swaps['copy']:.1f} grey levels"
        tiles.append(("swap error below copying", f"{100 * swaps['reduction']:.1f} %", remark))
    if rate is not None:
        tiles.append(("images per second", f"{rate:.1f}", "median of the training"))
    return tiles
