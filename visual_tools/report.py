"""Everything about a run on one page that can be sent by mail: `python -m visual_tools.report --name latest`.

The page holds its images, needs no network and no server, and shows what there is; what there is not yet is one line
that says which command makes it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import make_folder, write_whole
from utils import ROOT, UserError, own_command, run_cli
from visual_tools.figure import add_figure_arguments, check_arguments, new_file

if TYPE_CHECKING:
    from config import Config
    from runs.folder import RunFolder

T = TypeVar("T")
COUNT = 6  # images of the swap matrix


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


def newest_snapshot(run: RunFolder, cfg: Config) -> tuple[int | None, dict[str, str]]:
    """Steps of the newest snapshot, and what besides the config decided its numbers; None and nothing without one."""
    from files import Damaged
    from runs.folder import NETWORKS
    from runs.snapshot import read_manifest, snapshots
    from visual_tools.report_tables import show

    found = snapshots(run.checkpoints, NETWORKS[cfg.task])
    if not found:
        return None, {}
    try:
        manifest = read_manifest(run.checkpoints, found[-1])
    except Damaged:
        manifest = None
    return found[-1], {name: show(value) for name, value in manifest["circumstances"].items()} if manifest else {}


def machine() -> dict[str, str]:
    """This machine and the code's version."""
    from benchmarks.machine import describe_machine
    from visual_tools.report_tables import show

    found = {key: show(value) for key, value in describe_machine().items() if key not in ("date", "load")}
    git = ["git", "-C", str(ROOT)]
    if not (ROOT / ".git").exists():
        return found  # a copy without its history, perhaps within somebody else's
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        found["code"] = f"commit {commit[:12]}" + (", with changes" if changed.stdout else "")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git
    return found


def command(*words: object) -> str:
    """A command line of the project, run in its folder."""
    own = [
        str(word.relative_to(ROOT) if isinstance(word, Path) and word.is_relative_to(ROOT) else word) for word in words
    ]
    return "python " + shlex.join(own)


def gather(args: argparse.Namespace, run: RunFolder, cfg: Config) -> dict[str, Any]:
    """Everything that the template shows."""
    import numpy as np

    from config import DGNetConfig
    from runs.swapper import open_swapper
    from visual_tools.curves import draw_panels, read_log
    from visual_tools.rank_figure import LEGEND
    from visual_tools.report_pictures import draw_pictures, retrievals
    from visual_tools.report_tables import generation_tables, highlights, reid_tables, results, settings_tables

    missing: dict[str, str] = {}  # why sections are empty

    def attempt(section: str, build: Callable[[], T], *, asked: bool = False) -> T | None:
        """What `build` returns; None, with a reason, where it raises UserError about what the user has not `asked`."""
        try:
            return build()
        except UserError as error:
            if asked:
                raise
            missing[section] = str(error)
            return None

    generates = isinstance(cfg, DGNetConfig)
    where = ["--output_path", args.output_path] if args.output_path else []
    truth = command("-m", "mannequins.against_truth", "--name", run.name, *where)
    score = command("-m", "gen_eval.score", "--real", "DATA", "--fake", "DIR", "--out", run.path / "score.json")
    commands = {
        "train": command("train.py", "--config", run.config_file, "--name", "NEW", *where),
        "reid": command("test.py", "--name" if generates else "--teacher", run.name, *where),
        "generation": f"{truth} (embedded data), or {score}",
    }
    scalars, trained_by = read_log(run.logs)
    tables = attempt("reid", lambda: reid_tables(run, cfg)) or []
    generation = (attempt("generation", lambda: generation_tables(run)) or []) if generates else []
    swaps = None if "generation" in missing else dict(results(run.path, "reduction")).get(run.path / "swaps.json")
    rates = scalars.get("images_per_second")
    model = pictures = lists = None
    if generates:
        model = attempt("pictures", lambda: open_swapper(args), asked=args.which_epoch is not None)
        if model is not None:
            asked = args.input is not None or args.count is not None
            pictures = attempt("pictures", lambda: draw_pictures(model, args, COUNT), asked=asked)
    if not args.no_retrievals:
        asked = args.features is not None
        lists = attempt("retrievals", lambda: retrievals(args, run, cfg, model), asked=asked)
    steps, circumstances = newest_snapshot(run, cfg)
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
        "trained_by": list(dict.fromkeys(trained_by)),
        "made_by": own_command(),
        "commands": commands,
        "missing": missing,
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
    if args.features and args.no_retrievals:
        raise UserError("--features and --no-retrievals: give one of the two")

    from config import TeacherConfig
    from runs.folder import open_run, run_config
    from utils import set_threads

    run = open_run(args.output_path, args.name)
    cfg = run_config(run)
    if isinstance(cfg, TeacherConfig):
        given = [key for key in ("which_epoch", "input", "split", "count") if getattr(args, key) is not None]
        if given:
            raise UserError(f"--{given[0]}: {run.name} is a teacher's run, of which no swaps are shown; leave it out")
    set_threads(args.threads)
    out = new_file(Path(args.out), suffix=".html", force=args.force) if args.out else run.path / "report.html"
    make_folder(out.parent)
    page = render(gather(args, run, cfg)).encode("utf-8", "replace")
    write_whole(out, lambda file: file.write(page))
    print(f"report written to {out} ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_cli(main)
