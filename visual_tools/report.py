"""Everything about a run on one page that can be sent by mail: `python -m visual_tools.report --name latest`.

The page holds its images, needs no network and no server, and shows what there is; what there is not yet is one line
that says which command makes it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import ROOT, UserError, own_command, run_cli, write_whole
from visual_tools.figure import add_figure_arguments, check_arguments, new_file

if TYPE_CHECKING:
    import numpy as np

    from config import Config
    from reid_eval.features import Features
    from runs import RunFolder
    from visual_tools.swapper import Swapper

T = TypeVar("T")
COUNT, STEPS, LISTS = 6, 7, 4  # images of the swap matrix; points of an interpolation; retrievals of each kind
HEIGHT = 192  # pixels of an image of a ranked list, at most
DIFFERENCE = "mAP - teacher"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].partition(":")[0] + ".")
    add_figure_arguments(
        parser,
        count=f"images of the swap matrix, 2 to 12 (default: {COUNT}, or all there are)",
        out="HTML file to write (default: report.html in the run's folder, replaced)",
    )
    parser.add_argument(
        "--features", metavar="FILE", help="features of `test.py --save-features` (.npz) instead of computing them"
    )
    parser.add_argument("--no-retrievals", action="store_true", help="leave the ranked lists and their features out")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------- what a page shows
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


class Picture(NamedTuple):
    """An image within the page and what it shows; `mark` as in `page.Hit`."""

    src: str
    caption: str
    mark: str = ""


def number(text: str) -> Cell:
    """A cell that is sorted by the number it shows."""
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text, None)


def words(text: str) -> Cell:
    return Cell(text, text)


def command(*words: object) -> str:
    """A command line of the project, run in its folder."""
    own = [str(word.relative_to(ROOT) if isinstance(word, Path) and word.is_relative_to(ROOT) else word) for word in words]
    return "python " + shlex.join(own)


def data_uri(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as the address of a JPEG that is its own content."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def show(value: object) -> str:
    """A setting's value as YAML has it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------- result files
def results(folder: Path, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The JSON files of a folder that hold `key`. Raises UserError for one that cannot be read."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:80]}); make it again") from None
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
    from config import DGNetConfig
    from reid_eval.evaluate import COLUMNS
    from runs import find_teacher

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
    from reid_eval.evaluate import COLUMNS, ROW_LABELS

    rows, strong = [], set()
    for convention in nets[-1].conventions:
        teacher = next((v["mAP"] for net in nets if net.is_teacher for v in net.values[convention].values()), None)
        for net in nets:
            for head, values in net.values[convention].items():
                gain = None if net.is_teacher or teacher is None else values["mAP"] - teacher
                if head == "both (beta 0.5)":
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


def generation_tables(run: RunFolder) -> list[Table]:
    """What `gen_eval` has left in the run's folder."""
    from gen_eval.against_truth import swap_table
    from gen_eval.score import COLUMNS, PUBLISHED_NOTE, score_cells

    tables = []
    for path, result in results(run.path, "reduction"):
        heads, rows = as_expected(path, lambda result=result: swap_table(result))
        caption = f"Swaps against the renderer's own, {result['pairs']} swaps of test images, {result['iteration']} steps"
        note = (
            f"Error on the pixels that the true swap changes: generated {result['generated']:.1f} grey levels, copying "
            f"the structure image {result['copy']:.1f}, that is {100 * result['reduction']:.1f} % below. Rank-1 and mAP: "
            "does the teacher find the owner of the clothes; top-1: does its classifier say so, for training images."
        )
        cells = [[words(label), *map(number, row)] for label, row in rows.items()]
        tables.append(Table(caption, ["images", *heads], cells, 1, [note], frozenset({0})))
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
        tables.append(Table(f"Scores of {path.name}", ["images", *COLUMNS.values()], cells, 1, notes, own))
    return tables


# ------------------------------------------------------------------------------------------------- pictures
@dataclass(frozen=True)
class Matrix:
    """N originals and the N x N swaps: `rows[i][j]` has the clothes of i on the person of j."""

    originals: list[Picture]
    rows: list[list[Picture]]


@dataclass(frozen=True)
class Strip:
    """A line of images between two codes, after the image whose other code all of it has."""

    kept: Picture
    points: list[Picture]


def draw_pictures(model: Swapper, args: argparse.Namespace) -> tuple[Matrix, dict[str, list[Strip]]]:
    """The swap matrix and the interpolations of appearance and of structure, of the images that `args` choose."""
    from visual_tools.figure import choose_images, labels, read_input
    from visual_tools.smooth import interpolate

    images = choose_images(read_input(args, model), args.count or COUNT, args.seed, asked=args.count is not None)
    originals, s, f = model.read(images.paths, args.batchsize)
    n, people = len(originals), labels(images)
    drawn = [data_uri(image) for image in model.compose(f, s, list(product(range(n), range(n))), args.batchsize)]
    border = [Picture(data_uri(image), who) for image, who in zip(originals, people, strict=True)]
    rows = [
        [Picture(drawn[i * n + j], f"clothes of {people[i]}, pose and body of {people[j]}") for j in range(n)]
        for i in range(n)
    ]
    strips: dict[str, list[Strip]] = {}
    shown = [0, n - 1] if n > 2 else [0]
    for code in ("appearance", "structure"):
        clothes, poses = f, s
        if code == "appearance":
            clothes = interpolate(f[0], f[-1], STEPS)
        else:
            poses = interpolate(s[0], s[-1], STEPS)
        for k in shown:
            pairs = [(t, k) if code == "appearance" else (k, t) for t in range(STEPS)]
            points = [
                Picture(data_uri(image), f"{t / (STEPS - 1):.2f}")
                for t, image in enumerate(model.compose(clothes, poses, pairs, args.batchsize))
            ]
            strips.setdefault(code, []).append(Strip(border[k], points))
    return Matrix(border, rows), strips


@dataclass(frozen=True)
class RankedList:
    """A query, and the first entries of its list."""

    kind: str
    caption: str
    query: Picture
    hits: list[Picture]


def ranked_lists(query: Features, gallery: Features) -> tuple[str, list[RankedList]]:
    """The worst and the best queries by `standard` AP, and which score ranks them. Raises as `rank`."""
    from reid_eval.evaluate import rankings
    from reid_eval.top import first_entries, main_setting
    from visual_tools.rank_figure import choose_queries, entry_caption

    setting, _ = main_setting(query.features.shape[1])
    ranking = rankings(query, gallery)["single query"][setting]["standard"]
    chosen = [(kind, i) for kind, i in choose_queries(ranking, LISTS) if kind != "random"]
    lists = first_entries(query, gallery)
    return setting, [
        RankedList(
            kind,
            f"identity {query.pids[i]}, camera {query.camids[i]}: AP {100 * ranking.ap[i]:.1f} %, first match at rank "
            f"{ranking.first[i]}",
            Picture(thumbnail(query.paths[i]), "query"),
            [Picture(thumbnail(gallery.paths[e.index]), entry_caption(e), e.mark) for e in lists[i]],
        )
        for kind, i in chosen
    ]


def thumbnail(path: str) -> str:
    import numpy as np
    from PIL import Image

    from data.pairs import load_image

    image = load_image(path)
    image.thumbnail((4 * HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    return data_uri(np.asarray(image))


def read_features(path: str, data_root: Path) -> tuple[Features, Features]:
    """Query and gallery of a feature file, with the images of `data_root` that they belong to."""
    from dataclasses import replace

    import numpy as np

    from data.folders import read_split
    from reid_eval.features import load_features

    file, sides = load_features(path), []
    for split, side in (("query", file.query), ("gallery", file.gallery)):
        paths = {image.name: str(image) for image in read_split(data_root, split).paths}
        if side.keys is None or not set(side.keys.tolist()) <= paths.keys():
            raise UserError(
                f"--features {path}: its {split} images are not those of {data_root}; give the file that "
                "test.py --save-features wrote for this data set"
            )
        sides.append(replace(side, paths=np.array([paths[key] for key in side.keys.tolist()])))
    return sides[0], sides[1]


def retrievals(
    args: argparse.Namespace, run: RunFolder, cfg: Config, model: Swapper | None
) -> tuple[str, list[RankedList]]:
    """`ranked_lists` of the run's test images. Raises UserError where there is no model or no data."""
    from reid_eval.features import extract_data_set
    from runs import load_run_for_test, load_teacher_for_test, resolve_data_root
    from utils import pick_device

    root, device = resolve_data_root(cfg.data_root), pick_device(args.device)
    if args.features:
        return ranked_lists(*read_features(args.features, root))
    if model is not None:
        net, size = model.id_net, model.size
    else:
        teacher = cfg.task == "teacher"
        tested = load_teacher_for_test(run, device) if teacher else load_run_for_test(run, args.which_epoch, device)
        net, size = tested.net, tested.size
    sides = extract_data_set(net, root, size=size, batch_size=args.batchsize, device=device)
    return ranked_lists(sides.query, sides.gallery)


# ----------------------------------------------------------------------------------------- run and machine
def settings_tables(cfg: Config) -> tuple[Table, Table]:
    """What differs from the default, and all settings."""
    from config import changed_from_default, flat_settings

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


def history(run: RunFolder, cfg: Config) -> tuple[int | None, dict[str, str], list[str]]:
    """Steps of the newest snapshot, what it was made with, and the commands that made the snapshots, in their order."""
    from checkpoint import Damaged, read_manifest, snapshots
    from runs import NETWORKS

    found, newest, commands = snapshots(run.checkpoints, NETWORKS[cfg.task]), {}, {}
    for iteration in found:
        try:
            manifest = read_manifest(run.checkpoints, iteration)
        except Damaged:
            continue
        if manifest:
            newest = {name: show(value) for name, value in manifest["circumstances"].items()}
            commands[str(manifest.get("command") or "")] = None
    return (found[-1] if found else None), newest, [command for command in commands if command]


def machine() -> dict[str, str]:
    """This machine and the code's version."""
    from benchmarks.machine import describe_machine

    found = {key: show(value) for key, value in describe_machine().items() if key not in ("date", "load")}
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        found["code"] = f"commit {commit[:12]}" + (", with changes" if changed.stdout else "")
    except (OSError, subprocess.CalledProcessError):
        pass  # a copy without its history
    return found


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


# ---------------------------------------------------------------------------------------------------- the page
@dataclass
class Missing:
    """Why sections are empty, by their names."""

    reasons: dict[str, str] = field(default_factory=dict)

    def attempt(self, section: str, build: Callable[[], T], *, asked: bool = False) -> T | None:
        """What `build` returns; None with a reason where it raises UserError, unless the user `asked` for it."""
        try:
            return build()
        except UserError as error:
            if asked:
                raise
            self.reasons[section] = str(error)
            return None


def gather(args: argparse.Namespace, run: RunFolder, cfg: Config) -> dict[str, Any]:
    """Everything that the template shows."""
    import numpy as np

    from config import DGNetConfig
    from visual_tools.curves import draw_panels, read_scalars
    from visual_tools.rank_figure import LEGEND
    from visual_tools.swapper import open_swapper

    missing = Missing()
    generates = isinstance(cfg, DGNetConfig)
    where = ["--output_path", args.output_path] if args.output_path else []
    truth = command("-m", "gen_eval.against_truth", "--name", run.name, *where)
    score = command("-m", "gen_eval.score", "--real", "DATA", "--fake", "DIR", "--out", run.path / "score.json")
    commands = {
        "train": command("train.py", "--config", run.config_file, "--name", "NEW", *where),
        "reid": command("test.py", "--name" if generates else "--teacher", run.name, *where),
        "generation": f"{truth} (embedded data), or {score}",
    }
    scalars = read_scalars(run.logs)
    tables = missing.attempt("reid", lambda: reid_tables(run, cfg)) or []
    generation = (missing.attempt("generation", lambda: generation_tables(run)) or []) if generates else []
    swaps = None if "generation" in missing.reasons else next((r for _, r in results(run.path, "reduction")), None)
    rates = scalars.get("images_per_second")
    model = pictures = lists = None
    if generates:
        model = missing.attempt("pictures", lambda: open_swapper(args), asked=args.which_epoch is not None)
        if model is not None:
            asked = args.input is not None or args.count is not None
            pictures = missing.attempt("pictures", lambda: draw_pictures(model, args), asked=asked)
    if not args.no_retrievals:
        asked = args.features is not None
        lists = missing.attempt("retrievals", lambda: retrievals(args, run, cfg, model), asked=asked)
    steps, circumstances, trained_by = history(run, cfg)
    changed, every = settings_tables(cfg)
    return {
        "name": run.name,
        "kind": "DG-Net" if generates else "teacher",
        "generates": generates,
        "date": date.today().isoformat(),
        "steps": model.iteration if model is not None else steps,
        "max_steps": cfg.max_iter if generates else None,
        "data_root": cfg.data_root,
        "highlights": highlights(tables, swaps if generates else None, None if rates is None else np.median(rates[1])),
        "panels": draw_panels(scalars),
        "reid_tables": tables,
        "generation_tables": generation,
        "matrix": pictures and pictures[0],
        "strips": pictures and pictures[1],
        "lists": lists and lists[1],
        "setting": lists and lists[0],
        "legend": LEGEND,
        "no_retrievals": args.no_retrievals,
        "changed": changed,
        "every": every,
        "circumstances": circumstances,
        "machine": machine(),
        "trained_by": trained_by,
        "made_by": own_command(),
        "commands": commands,
        "missing": missing.reasons,
    }


def render(context: dict[str, Any]) -> str:
    """The page. Everything in `context` is text to the template, never markup, but for the panels' SVG."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    folder = Path(__file__).parent
    # Hashes in the page's policy let the browser run this script and no other.
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(
        loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    panels = [(panel.title, Markup(panel.svg), panel.legend) for panel in context["panels"]]
    return template.render(context | {"panels": panels, "script": Markup(script), "script_hash": digest})


def main() -> None:
    args = parse_args()
    check_arguments(args, count=(2, 12))

    from runs import open_run, run_config
    from utils import set_threads

    run = open_run(args.output_path, args.name)
    cfg = run_config(run)
    set_threads(args.threads)
    out = new_file(Path(args.out), suffix=".html", force=args.force) if args.out else run.path / "report.html"
    page = render(gather(args, run, cfg)).encode("utf-8", "replace")
    write_whole(out, lambda file: file.write(page))
    print(f"report written to {out} ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_cli(main)
