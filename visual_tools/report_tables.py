"""The report's tables: what the result files of a run say, its settings, and the run in a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from config import Config, DGNetConfig, changed_from_default, flat_settings
from files import read_json
from gen_eval.score import COLUMNS as SCORES
from gen_eval.score import PUBLISHED_NOTE, score_cells
from mannequins.against_truth import describe_shares, named_table, swap_table
from reid_eval.ranking import BOTH
from reid_eval.report import COLUMNS, ROW_LABELS
from runs.folder import RunFolder
from runs.load import find_teacher
from utils import UserError

T = TypeVar("T")
DIFFERENCE = "mAP - teacher"


class Cell(NamedTuple):
    """A cell of a table: what it shows, and what the column is sorted by; None comes last."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Table:
    """A table that the page can sort. `strong`: rows to stand out; `numbers`: the first column of numbers."""

    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    numbers: int = 1
    notes: list[str] = field(default_factory=list)
    strong: frozenset[int] = frozenset()


def number(text: str) -> Cell:
    """A cell that is sorted by the number it shows."""
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text, None)


def words(text: str) -> Cell:
    return Cell(text, text)


def show(value: object) -> str:
    """A setting's value as YAML has it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------- result files
def results(folder: Path, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The JSON files of a folder that hold `key`. Raises UserError for one that cannot be read."""
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, "make it again")
        if isinstance(content, dict) and key in content:
            yield path, content


def as_expected(path: Path, build: Callable[[], T]) -> T:
    """What `build` makes of a result file. Raises UserError where the file is not what its name says."""
    try:
        return build()
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not as this version writes it; make it again") from None


@dataclass(frozen=True)
class Tested:
    """A net on one data set with one kind of query: `values[convention][head][column]` in percent."""

    net: str
    is_teacher: bool
    queries: int
    gallery: int
    conventions: dict[str, str]
    values: dict[str, dict[str, dict[str, float]]]


def reid_tables(run: RunFolder, cfg: Config) -> list[Table]:
    """A table per data set and kind of query: teachers and run, by head and convention."""
    generates = isinstance(cfg, DGNetConfig)
    folders: list[tuple[str, bool, Path]] = []
    for name in cfg.teachers if generates else [run.name]:
        try:
            folders.append((f"teacher {name}", True, find_teacher(name, run.output_path).folder))
        except UserError:
            continue  # a teacher that is gone has no row
    if generates:
        folders.append((run.name, False, run.path))
    found: dict[tuple[str, str], list[Tested]] = {}
    own = set()  # data sets that a config names: their files are called reid.json
    for name, is_teacher, folder in folders:
        for path, report in results(folder, "tables"):

            def read(name: str = name, is_teacher: bool = is_teacher, report: dict[str, Any] = report) -> None:
                net = name if report["iteration"] is None else f"{name}, {report['iteration']} steps"
                for title, heads in report["tables"].items():
                    values = {
                        convention: {
                            head: {key: 100 * row[convention][key] for key in COLUMNS} for head, row in heads.items()
                        }
                        for convention in report["conventions"]
                    }
                    tested = Tested(
                        net, is_teacher, report["queries"], report["gallery"], dict(report["conventions"]), values
                    )
                    found.setdefault((report["tested_on"], title), []).append(tested)

            as_expected(path, read)
            if path.name == "reid.json":
                own.add(report["tested_on"])
    order = sorted(found, key=lambda key: key[0] not in own)
    return [reid_table(data_set, title, found[data_set, title]) for data_set, title in order]


def reid_table(data_set: str, title: str, nets: list[Tested]) -> Table:
    """The re-identification results of several nets, the teachers first, in percent."""
    rows, strong = [], set()
    for convention in nets[-1].conventions:
        teacher = next((v["mAP"] for net in nets if net.is_teacher for v in net.values[convention].values()), None)
        for net in nets:
            for head, values in net.values[convention].items():
                gain = None if net.is_teacher or teacher is None else values["mAP"] - teacher
                if head == BOTH:
                    strong.add(len(rows))
                label = "one head" if head == "feature" else ROW_LABELS.get(head, head)
                rows.append(
                    [words(net.net), words(label), words(convention)]
                    + [number(f"{value:.2f}") for value in values.values()]
                    + [Cell("-", None) if gain is None else Cell(f"{gain:+.2f}", gain)]
                )
    caption = f"{data_set}, {title}: {nets[-1].queries} queries, {nets[-1].gallery} gallery images"
    heads = ["net", "head", "AP", *COLUMNS.values(), DIFFERENCE]
    notes = [f"{name}: {explanation}." for name, explanation in nets[-1].conventions.items()]
    return Table(caption, heads, rows, 3, notes, frozenset(strong))


def swaps_table(result: dict[str, Any]) -> Table:
    """What `mannequins.against_truth` has written."""
    heads, rows = swap_table(result)
    caption = (
        f"Swaps against the renderer's own, {result['pairs']} swaps of test images of {result['tested_on']}, "
        f"{result['iteration']} steps"
    )
    note = (
        f"Error on the pixels that the true swap changes: generated {result['generated']:.1f} grey levels, copying "
        f"the structure image {result['copy']:.1f}, that is {100 * result['reduction']:.1f} % below. Rank-1, mAP: "
        "does the teacher find the owner of the clothes; top-1: does its classifier say so, for training images."
    )
    notes = [note]
    if "shares" in result:  # not in a file of an earlier version
        notes.append(f"Clothes of the structure image and of the truth in them: {describe_shares(result['shares'])}.")
    cells = [[words(label), *map(number, row)] for label, row in rows.items()]
    return Table(caption, ["images", *heads], cells, 1, notes, frozenset({0}))


def people_table(named: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Whom the run's own heads name of generated and true swaps, by `mannequins.against_truth`."""
    heads, rows = named_table(named)
    note = (
        "How often a head gives the class of the structure image's person, and of the clothes' owner. What it names on "
        "generated swaps but not on true ones, it may read from what the generator does wrong."
    )
    cells = [[words(label), *map(number, row)] for label, row in rows.items()]
    return Table("Whom the run's own heads name, swaps of training images, %", ["images", *heads], cells, 1, [note])


def generation_tables(run: RunFolder) -> list[Table]:
    """What `gen_eval` has left in the run's folder."""
    tables = []
    for path, result in results(run.path, "reduction"):
        tables.append(as_expected(path, lambda result=result: swaps_table(result)))
        if "named" in result:
            tables.append(as_expected(path, lambda named=result["named"]: people_table(named)))
    for path, result in results(run.path, "scores"):

        def build(result: dict[str, Any] = result) -> tuple[dict[str, list[str]], list[str]]:
            rows = {name: score_cells(row) for name, row in result["scores"].items()}
            published = {f"{name} (published)": score_cells(row) for name, row in result["published"].items()}
            keys = ("drawn", "preparation", "fid", "kid", "ssim, lpips", "seed")
            return rows | published, [f"{key}: {result['protocol'][key]}" for key in keys]

        rows, notes = as_expected(path, build)
        cells = [[words(name), *map(number, row)] for name, row in rows.items()]
        notes = [f"(published): {PUBLISHED_NOTE}.", *result["not_computed"], "; ".join(notes)]
        own = frozenset(range(len(result["scores"])))
        tables.append(Table(f"Scores of {path.name}", ["images", *SCORES.values()], cells, 1, notes, own))
    return tables


# ------------------------------------------------------------------------------------------------- the run
def settings_tables(cfg: Config) -> tuple[Table, Table]:
    """What differs from the default, and all settings."""
    changed = changed_from_default(cfg)
    rows = [
        [words(key), words(show(value)), words("required" if default is None and key == "data_root" else show(default))]
        for key, (value, default) in changed.items()
    ]
    every = flat_settings(cfg.model_dump())
    listing = [[words(key), words(show(value))] for key, value in every.items()]
    return (
        Table(f"{len(changed)} of {len(every)} settings differ from the default", ["key", "here", "default"], rows, 3),
        Table(f"All {len(every)} settings", ["key", "value"], listing, 2),
    )


def highlights(tables: list[Table], swaps: dict[str, Any] | None, rate: float | None) -> list[tuple[str, str, str]]:
    """The run in a few numbers: (what, value, remark)."""
    found = []
    if tables:
        table = tables[0]
        official = [row for row in table.rows if row[2].text == "official"]
        own = [row for i, row in enumerate(table.rows) if row in official and i in table.strong] or official[-1:]
        for name in ("Rank-1", "mAP"):
            column, remark = table.heads.index(name), ""
            teacher = next((row for row in official if row[0].text.startswith("teacher ")), None)
            if teacher is not None and teacher is not own[0]:
                remark = f"teacher {teacher[column].value:.1f}"
            found.append((f"{name}, official", f"{own[0][column].value:.1f} %", remark))
    if swaps is not None:
        remark = f"{swaps['generated']:.1f} against {swaps['copy']:.1f} grey levels"
        found.append(("swap error below copying", f"{100 * swaps['reduction']:.1f} %", remark))
    if rate is not None:
        found.append(("images per second", f"{rate:.1f}", "median of the training"))
    return found
