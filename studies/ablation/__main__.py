"""The paper's claims in small, with seeds and spread: `python -m studies.ablation --preset small --seeds 3`

Trains every cell with every seed, scores the runs on identities that were held out of training (--evaluate val) or,
once, on the test identities (--evaluate test), and writes results-WHERE.json, table-WHERE.md and figure-WHERE.png into
--out. Interrupted, the same command continues; what is finished is not repeated. Started several times at once, the
commands share the runs. notebook.md says what is compared.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from files import make_folder, read_json, write_json, write_text
from precision import pick_precision
from studies.ablation import table
from studies.ablation.cells import CELLS, PRESETS, cell_config, is_both, needs, starts_as_both
from studies.ablation.runs import Run, Study, prepare_data, score, train, trained
from utils import ROOT, UserError, pick_device, run_cli, set_threads

POLL = 2.0  # seconds between looks at what other processes are doing


def parse_args() -> argparse.Namespace:
    listing = "\n".join(f"  {name:18}{cell.about}" for name, cell in CELLS.items())
    sizes = "\n".join(f"  {name:18}{preset.about}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="studies.ablation",
        description=__doc__,
        epilog=f"presets:\n{sizes}\n\ncells:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="small", help="data, networks and lengths (default: small)"
    )
    parser.add_argument(
        "--data_root", help="data set with identities and cameras in its names (default: drawn into --out)"
    )
    parser.add_argument(
        "--data_seed",
        type=int,
        metavar="N",
        help="draw the preset's data set from another seed: does a finding hold on other data?",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of every cell: seeds 0 to N-1 (default: 3)"
    )
    parser.add_argument(
        "--cells", nargs="+", metavar="NAME", help="some cells, and those that they need (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of everything (default: outputs/ablation/PRESET[-data-N])"
    )
    parser.add_argument("--evaluate", choices=("val", "test"), default="val", help="identities to score (default: val)")
    parser.add_argument("--again", action="store_true", help="score what is scored already once more, also on test")
    parser.add_argument(
        "--long_epochs",
        type=int,
        metavar="N",
        help="length of the long teachers (default: by the time that was measured)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    for name in args.cells or ():
        if name not in CELLS:
            raise UserError(f"--cells {name}: unknown cell; use some of {', '.join(CELLS)}")
    for option, value, least in (
        ("seeds", args.seeds, 1),
        ("long_epochs", args.long_epochs, 1),
        ("data_seed", args.data_seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"--{option} {value}: must be at least {least}")
    if args.data_root is not None and args.data_seed is not None:
        raise UserError("--data_seed: says how to draw data, --data_root that they are there; leave one out")


# ------------------------------------------------------------------------------------------------ what is left
def choose_runs(study: Study, names: list[str] | None, seeds: int) -> list[Run]:
    """The asked-for runs and those that they need, seed by seed: after the first, the whole table stands."""
    chosen = list(names or CELLS)
    for name in chosen:
        if is_both(study.preset, name):
            if names:
                print(f"{name} is both: that is the preset's own setting")
            chosen = [other for other in chosen if other not in (name, "both")] + ["both"]
    if study.factors is None and "oracle" in chosen:
        if names:
            raise UserError("--cells oracle: needs embedded data, whose true swaps can be drawn; leave it out")
        chosen.remove("oracle")
        print("oracle is left out: only embedded data have true swaps")
    wanted = {(name, seed) for name in chosen for seed in range(seeds)}
    while more := set().union(*(needed(study, run) for run in wanted)) - wanted:
        wanted |= more
    # `both` directly after the teacher: most others start from it.
    order = sorted(CELLS, key=lambda name: ("teacher", "both").index(name) if name in ("teacher", "both") else 2)
    return [(name, seed) for seed in range(seeds) for name in order if (name, seed) in wanted]


def needed(study: Study, run: Run) -> set[Run]:
    return needs(run[0], study.config(*run), run[1])


def result_file(study: Study, run: Run, where: str) -> Path:
    return study.run(*run).path / f"result-{where}.json"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the folder for itself inside; with `wait`, as soon as it has."""
    handle = os.open(make_folder(folder), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def estimate(study: Study, runs: list[Run], where: str) -> str:
    """How long the runs will take, by the finished ones of the same kind (of one process, without scoring)."""

    def kind(run: Run) -> tuple:
        name, cfg = run[0], study.config(*run)
        return (name,) if cfg.task == "teacher" else (cfg.task, starts_as_both(name, cfg))

    known: dict[tuple, list[float]] = {}
    for run in ((name, seed) for name in CELLS for seed in range(1 + max(seed for _, seed in runs))):
        if (path := result_file(study, run, where)).is_file():
            known.setdefault(kind(run), []).append(read_result(path)["time"]["wall"])
    seconds = [statistics.fmean(known[kind(run)]) for run in runs if kind(run) in known]
    return (
        f"about {sum(seconds) / 60:.0f} minutes for {len(seconds)} of {len(runs)} runs"
        if seconds
        else "no estimate yet"
    )


# ------------------------------------------------------------------------------------------------ working through it
def work(study: Study, runs: list[Run], where: str, *, again: bool) -> tuple[int, set[Run]]:
    """Train and score the runs that are not finished.

    Returns 0, or 128 and the number of the signal that ended it; and the runs that failed. The error of such a run is
    printed, and those that do not need it go on.
    """
    left = [run for run in runs if again or not result_file(study, run, where).is_file()]
    if where == "test" and not again:
        refuse_second_scoring(study, left)
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
    failed: set[Run] = set()
    waiting = False
    while left:
        done = None
        for run in left:
            if needed(study, run) & failed:
                failed.add(run)
                done = run
                break
            if not all(result_file(study, other, where).is_file() for other in needed(study, run)):
                continue
            with locked(study.run(*run).path) as mine:
                if not mine:
                    continue
                if again or not result_file(study, run, where).is_file():
                    place = len(runs) - len(left) + 1
                    print(
                        f"\n[{place}/{len(runs)}] {run[0]}-{run[1]}; left: {estimate(study, left, where)}", flush=True
                    )
                    try:
                        status = make(study, run, where)
                    except UserError as error:
                        print(f"{run[0]}-{run[1]} failed: {error}", file=sys.stderr)
                        status = 0
                        failed.add(run)
                    if status:
                        return status, failed
                done = run
            break
        if done:
            left.remove(done)
        else:
            if not waiting:
                print("waiting for the runs of another process", flush=True)
            time.sleep(POLL)
        waiting = done is None
    return 0, failed


def make(study: Study, run: Run, where: str) -> int:
    """Train a run as far as it is not, and score it."""

    if not trained(study, run) and (status := train(study, run)):
        print(f"{run[0]}-{run[1]} is not finished; the same command continues", file=sys.stderr)
        return status
    gc.collect()  # the trainer's memory
    result = score(study, run, where)
    if where == "test":
        # Before the result, and in a folder of its own: removing a run's folder does not make its test unseen.
        times = [*test_dates(study, run), date.today().isoformat()]
        write_json(scored_file(study, run), {"scored_on_test": times})
        result["times_scored_on_test"] = len(times)
    write_json(result_file(study, run, where), result)
    print(f"written to {result_file(study, run, where)}", flush=True)
    return 0


def read_result(path: Path) -> dict[str, Any]:
    return read_json(path, "remove it: the run is then scored again")


def scored_file(study: Study, run: Run) -> Path:
    return study.out / "scored-on-test" / f"{run[0]}-{run[1]}.json"


def test_dates(study: Study, run: Run) -> list[str]:
    """When a run's test identities were scored."""
    path = scored_file(study, run)
    return read_json(path, "put it back, or remove it if the run is new")["scored_on_test"] if path.is_file() else []


def refuse_second_scoring(study: Study, runs: list[Run]) -> None:
    """Raise UserError where test identities were scored before by runs that have no result any more."""
    if seen := [run for run in runs if test_dates(study, run)]:
        name = "{}-{}".format(*seen[0])
        raise UserError(
            f"{name} ({len(seen)} in all): its test identities were scored on {test_dates(study, seen[0])[-1]}, and "
            "that result is gone; choose settings with --evaluate val, or score once more with --again"
        )


def write_results(study: Study, args: argparse.Namespace, runs: list[Run]) -> None:
    """Everything that is finished of the chosen runs: JSON, table and picture."""

    where, files = args.evaluate, [result_file(study, run, args.evaluate) for run in runs]
    results = [read_result(path) for path in files if path.is_file()]
    if not results:
        return
    rows, sweep = table.rows(results), table.sweep(results)
    found = table.claims(rows)
    about = {"preset": args.preset, "evaluated_on": where, "device": str(study.device), "data": study.preset.data}
    about["precision"] = study.config("both", 0).precision
    if args.data_root is not None:
        about["data"] = study.data.name
    content: dict[str, Any] = about | {"machine": describe_machine(), "runs": results, "table": rows}
    content |= {"sweep": sweep, "claims": [{"claim": text, "holds": holds} for text, holds in found]}
    write_json(study.out / f"results-{where}.json", content)
    again = sum(result.get("times_scored_on_test", 1) > 1 for result in results)
    text = [f"Preset {args.preset}, {where} identities, {len(results)} of {len(runs)} runs.", table.format_table(rows)]
    text += [table.format_sweep(sweep)] if sweep else []
    text += [table.format_claims(found), table.NOTE]
    text += [f"The test identities of {again} runs were scored more than once."] if again else []
    whole = "\n\n".join(text) + "\n"
    write_text(study.out / f"table-{where}.md", whole)
    picture = study.out / f"figure-{where}.png"
    table.draw_figure(picture, results, f"preset {args.preset}, {where} identities")
    print(f"\n{whole}\nwritten to {study.out}: results-{where}.json, table-{where}.md, {picture.name}", flush=True)


def main() -> int:
    args = parse_args()
    check_args(args)

    set_threads(args.threads)
    device, preset, name = pick_device(args.device), PRESETS[args.preset], args.preset
    if args.data_seed is not None:
        preset, name = replace(preset, data=preset.data | {"seed": args.data_seed}), f"{name}-data-{args.data_seed}"
    out = make_folder((args.out or ROOT / "outputs" / "ablation" / name).expanduser().resolve())
    with locked(out, wait=True):
        precision = pick_precision(device, cell_config(preset, "both", 0, data_root="").precision)
        same_study(out, {"preset": args.preset, "data_root": args.data_root, "precision": precision})
        data, held, factors = prepare_data(preset, args.data_root, out)
    study = Study(preset, out, data, held, factors, device, args.threads, args.long_epochs)
    runs = choose_runs(study, args.cells, args.seeds)
    status, failed = work(study, runs, args.evaluate, again=args.again)
    write_results(study, args, runs)
    if failed and not status:
        names = ", ".join(f"{name}-{seed}" for name, seed in runs if (name, seed) in failed)
        raise UserError(f"not made: {names}; the reasons stand above, the same command tries again")
    return status


def same_study(out: Path, own: dict[str, str | None]) -> None:
    """Remember what a folder is for. Raises UserError for one begun with other values of `own`, or of other things."""
    path = out / "ablation.json"
    if not path.is_file():
        if others := sorted(p.name for p in out.iterdir()):
            raise UserError(f"--out {out}: holds other files ({others[0]}); choose a new or empty folder")
        write_json(path, own)
    for key, value in read_json(path, "choose a new --out").items():
        if own.get(key) != value:
            raise UserError(f"--out {out}: was begun with {key} {value}, not {own.get(key)}; choose another --out")


if __name__ == "__main__":
    # Outside of the training steps, which save themselves first: everything is written whole or not at all.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_cli(main)
