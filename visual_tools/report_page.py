"""The page of `visual_tools.report`: it collects what a run has left on disk, draws swaps, and fills the template."""

from __future__ import annotations

import argparse
import base64
import hashlib
import shlex
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from config import Config, DGNetConfig
from files import Damaged, make_folder, write_whole
from runs.folder import RunFolder, open_run, run_config
from runs.load import find_teacher
from runs.snapshot import read_manifest, snapshots
from runs.swapper import open_swapper
from utils import UserError, own_command, set_threads
from visual_tools.curves import draw_panels, read_log
from visual_tools.figure import check_free
from visual_tools.page import template
from visual_tools.report_pictures import LISTS, data_uri, draw_swaps, read_lists
from visual_tools.report_tables import generation_tables, highlights, reid_tables, results, settings_table, show

T = TypeVar("T")


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


def newest_snapshot(run: RunFolder, cfg: Config) -> tuple[int | None, dict[str, str]]:
    """Steps and recorded circumstances of the newest snapshot; None and nothing without one."""
    iterations = snapshots(run.checkpoints)
    if not iterations:
        return None, {}
    try:
        manifest = read_manifest(run.checkpoints, iterations[-1]) or {}
    except Damaged:
        manifest = {}
    return iterations[-1], {name: show(value) for name, value in manifest.get("circumstances", {}).items()}


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

    generates = isinstance(cfg, DGNetConfig)
    scalars, trained_by = read_log(run.logs)
    reid = attempt("reid", lambda: reid_tables(run, cfg)) or []
    lists = None
    if not args.no_retrievals:
        folder = run.path if generates else find_teacher(run.name, run.output_path).folder
        lists = attempt("retrievals", lambda: read_lists(folder))
    steps, circumstances = newest_snapshot(run, cfg)
    generation, swaps, truth = [], None, None
    if generates:
        generation = attempt("generation", lambda: generation_tables(run)) or []
        if "generation" not in missing:
            truth = dict(results(run.path, "reduction")).get(run.path / "swaps.json")
        model = attempt("swaps", lambda: open_swapper(args), asked=args.which_epoch is not None)
        if model is not None:
            steps = model.iteration
            asked = args.input is not None or args.count is not None
            swaps = attempt("swaps", lambda: draw_swaps(model, args), asked=asked)
    rates = scalars.get("images_per_second")
    return {
        "name": run.name,
        "kind": "DG-Net" if generates else "teacher",
        "generates": generates,
        "date": date.today().isoformat(),
        "steps": steps,
        "max_steps": cfg.max_iter if generates else None,
        "data_root": cfg.data_root,
        "highlights": highlights(reid, truth, None if rates is None else np.median(rates[1])),
        "panels": {title: data_uri(svg, "svg+xml") for title, svg in draw_panels(scalars).items()},
        "reid_tables": reid,
        "generation_tables": generation,
        "swaps": swaps,
        "lists": lists,
        "no_retrievals": args.no_retrievals,
        "changed": settings_table(cfg),
        "config": run.config_file.read_text(encoding="utf-8", errors="replace"),
        "circumstances": circumstances,
        "trained_by": list(dict.fromkeys(trained_by)),
        "made_by": own_command(),
        "commands": commands(run, generates, args.output_path),
        "missing": missing,
    }


def render(context: dict[str, Any]) -> str:
    """The page. The template escapes everything in `context`."""
    # The hash in the page's policy lets the browser run this script and no other.
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template("report.html").render(context | {"script": Markup(script), "script_hash": digest})


def write_report(args: argparse.Namespace) -> None:
    """Write the report that the options of `visual_tools.report` ask for. Raises UserError for bad options."""
    run = open_run(args.output_path, args.name)
    cfg = run_config(run)
    if not isinstance(cfg, DGNetConfig):
        for key in ("which_epoch", "input", "split", "count"):
            if getattr(args, key) is not None:
                raise UserError(f"--{key}: {run.name} is a teacher's run, which has no swaps; omit the option")
    set_threads(args.threads)
    out = check_free(Path(args.out), suffix=".html", force=args.force) if args.out else run.path / "report.html"
    make_folder(out.parent)
    page = render(gather(args, run, cfg)).encode("utf-8", "replace")
    write_whole(out, lambda file: file.write(page))
    print(f"report written to {out} ({len(page) / 1e6:.1f} MB)")
