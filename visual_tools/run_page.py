"""The page of `visual_tools.report`: what a run has left on disk, new swaps, and the template that shows them."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import shlex
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from config import Config
from data.images import load_image
from data.listing import in_words
from files import Damaged, read_json
from runs.folder import RunFolder, open_run, run_config
from runs.load import find_teacher
from runs.snapshot import read_manifest, snapshots
from runs.swapper import Swapper, open_swapper
from utils import UserError, own_command, set_threads
from visual_tools.curves import draw_panels, read_log
from visual_tools.figure import check_free, choose_input, labels, swap_matrix
from visual_tools.ranked_lists import write_html
from visual_tools.tables import generation_tables, read_from, reid_tables, settings_table, show

T = TypeVar("T")
COUNT = 6  # images of the swap matrix by default
LISTS, HEIGHT = 4, 192  # ranked lists of each kind; pixels of their images at most


# ---------------------------------------------------------------------------------------------- pictures
class Picture(NamedTuple):
    """An image within the page and what it shows; `mark` as in `ranked_lists.Hit`."""

    src: str
    caption: str
    mark: str = ""


def data_uri(content: bytes, kind: str) -> str:
    """The address of an image of MIME type `image/kind` that is its own content."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(image: np.ndarray | Image.Image) -> str:
    """An image, as PIL has it or (H, W, 3) uint8, as the address of a JPEG."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "JPEG", quality=90)
    return data_uri(buffer.getvalue(), "jpeg")


def thumbnail(path: str) -> str:
    """An image file, at most HEIGHT pixels high, as the address of a JPEG."""
    image = load_image(path)
    image.thumbnail((4 * HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    return jpeg(image)


def draw_swaps(model: Swapper, args: argparse.Namespace) -> dict[str, Any]:
    """Swaps of the images that the options choose, as the template shows them. Raises UserError without images.

    `originals` are N pictures; `matrix[i][j]` has the clothes of i on the person of j.
    """
    images = choose_input(args, model, COUNT)
    pixels, s, f = model.read(images.paths, args.batchsize)
    people = labels(images)
    originals = [Picture(jpeg(image), who) for image, who in zip(pixels, people, strict=True)]
    matrix = [
        [Picture(jpeg(swap), f"clothes of {clothes}, pose and body of {people[j]}") for j, swap in enumerate(row)]
        for clothes, row in zip(people, swap_matrix(model, s, f, args.batchsize), strict=True)
    ]
    return {"originals": originals, "matrix": matrix}


def read_lists(folder: Path) -> dict[str, Any] | None:
    """The best and worst retrievals in `rank_lists.json` of `folder`; None without that file.

    `kinds` holds, by "best" and "worst", queries with the beginnings of their lists as (caption, query, hits). Raises
    UserError for a damaged file and for images that are gone.
    """
    path = folder / "rank_lists.json"
    if not path.exists():
        return None
    content, kinds = read_json(path, "create it again"), {}
    with read_from(path):
        for kind in ("best", "worst"):
            queries = [query for query in content["lists"] if query["kind"] == kind][:LISTS]
            kinds[kind] = [
                (
                    query["caption"],
                    Picture(thumbnail(query["path"]), "query"),
                    [Picture(thumbnail(hit["path"]), hit["caption"], hit["mark"]) for hit in query["hits"]],
                )
                for query in queries
            ]
        return {"setting": content["setting"], "legend": content["legend"], "kinds": kinds}


# ---------------------------------------------------------------------------------------------- the page
def commands(run: RunFolder, generates: bool, output_path: str | None) -> dict[str, str]:
    """The command that creates the data of each section, to be run in the project's folder."""
    where = f" --output_path {shlex.quote(output_path)}" if output_path else ""
    name, config, score = map(shlex.quote, (run.name, str(run.config_file), str(run.path / "score.json")))
    test = f"python test.py {'--name' if generates else '--teacher'} {name}"
    return {
        "train": f"python train.py --config {config} --name NEW{where}",
        "reid": f"{test}{where}",
        "retrievals": f"{test} --rank-figure {LISTS}{where}",
        "generation": f"python -m mannequins.against_truth --name {name}{where} (embedded data), or "
        f"python -m gen_eval.score --real DATA --fake DIR --out {score}",
    }


def gather(args: argparse.Namespace, run: RunFolder, cfg: Config) -> dict[str, Any]:
    """Everything that the template shows."""
    missing: dict[str, str] = {}  # why sections are empty

    def attempt(section: str, build: Callable[[], T], *, asked: bool = False) -> T | None:
        """The result of `build`, or None and a reason if it raises UserError and the user has not `asked` for it."""
        try:
            return build()
        except UserError as error:
            if asked:
                raise
            missing[section] = str(error)
            return None

    generates = cfg.generates
    scalars, trained_by = read_log(run.logs)
    reid = attempt("reid", lambda: reid_tables(run, cfg)) or []
    lists = None
    if not args.no_retrievals:
        folder = run.path if generates else find_teacher(run.name, run.output_path).folder
        lists = attempt("retrievals", lambda: read_lists(folder))
    steps, circumstances = next(reversed(snapshots(run.checkpoints)), None), {}
    if steps is not None:
        with contextlib.suppress(Damaged):  # the report can do without
            circumstances = (read_manifest(run.checkpoints, steps) or {}).get("circumstances", {})
    circumstances = reading_of(run, cfg) | circumstances
    generation, swaps = [], None
    if generates:
        generation = attempt("generation", lambda: generation_tables(run)) or []
        model = attempt("swaps", lambda: open_swapper(args), asked=args.which_epoch is not None)
        if model is not None:
            steps, asked = model.iteration, args.input is not None or args.count is not None
            swaps = attempt("swaps", lambda: draw_swaps(model, args), asked=asked)
    return {
        "name": run.name,
        "generates": generates,
        "date": date.today().isoformat(),
        "steps": steps,
        "cfg": cfg,
        "panels": {title: data_uri(svg, "svg+xml") for title, svg in draw_panels(scalars).items()},
        "reid_tables": reid,
        "generation_tables": generation,
        "swaps": swaps,
        "lists": lists,
        "no_retrievals": args.no_retrievals,
        "changed": settings_table(cfg),
        "config": run.config_file.read_text(encoding="utf-8", errors="replace"),
        "circumstances": {name: show(value) for name, value in circumstances.items()},
        "trained_by": list(dict.fromkeys(trained_by)),
        "made_by": own_command(),
        "commands": commands(run, generates, args.output_path),
        "missing": missing,
    }


def reading_of(run: RunFolder, cfg: Config) -> dict[str, str]:
    """What training and test.py read and left out, and what the run was too short for, by title."""
    sections = {}
    for title, file in (("training", "reading.json"), ("test", "reid.json")):
        with contextlib.suppress(UserError, KeyError, TypeError):  # absent, damaged, or of an earlier version
            content = read_json(run.path / file, "")
            read, left_out = in_words(content.get("reading", content))
            sections |= {f"read for {title}": read, f"left out or assumed in {title}": left_out}
    sections["too short for"] = "; ".join(cfg.unreached())
    return {title: words for title, words in sections.items() if words}


def write_report(args: argparse.Namespace) -> None:
    """Write the report that the options of `visual_tools.report` ask for. Raises UserError for bad options."""
    run = open_run(args.output_path, args.name)
    cfg = run_config(run)
    if not cfg.generates:
        for key in ("which_epoch", "input", "split", "count"):
            if getattr(args, key) is not None:
                raise UserError(f"--{key}: {run.name} is a teacher's run, which has no swaps; omit the option")
    set_threads(args.threads)
    out = check_free(Path(args.out), suffix=".html", force=args.force) if args.out else run.path / "report.html"
    write_html(out, "report.html", **gather(args, run, cfg))
    print(f"report written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
