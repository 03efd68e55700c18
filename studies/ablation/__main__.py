"""The paper's claims in small, with seeds and spread: `python -m studies.ablation --preset small --seeds 3`

Trains every cell with every seed, scores the runs on identities that were held out of training (--evaluate val) or,
once, on the test identities (--evaluate test), and writes results-WHERE.json, table-WHERE.md and figure-WHERE.png into
--out. If it is interrupted, the same command continues and repeats nothing. Commands that are started at the same time
share the runs. studies/ablation/notebook.md says what is compared.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks.machine import describe_machine
from files import hold_folder, make_folder, read_json, write_json, write_text
from precision import pick_precision
from studies.ablation import table
from studies.ablation.cells import CELLS, PRESETS, cell_config, is_both, needs
from studies.ablation.runs import Run, Study, prepare_data, score, train, trained
from utils import ROOT, UserError, between, pick_device, run_cli, set_threads

NOTE = "ablation.json"  # what a result folder is for
POLL = 2.0  # seconds between looks at what other processes are doing


def parse_args() -> argparse.Namespace:
    cells = "\n".join(f"  {name:18}{cell.about}" for name, cell in CELLS.items())
    presets = "\n".join(f"  {name:18}{preset.about}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="studies.ablation",
        description=__doc__,
        epilog=f"presets:\n{presets}\n\ncells:\n{cells}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="data, networks and lengths (default: small)")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data_root", help="data set with identities and cameras in its names (default: drawn)")
    data.add_argument("--data_seed", type=between(0), metavar="N", help="draw the preset's data from another seed")
    add("--seeds", type=between(1), default=3, metavar="N", help="train every cell with seeds 0 to N-1 (default: 3)")
    add(
        "--cells",
        nargs="+",
        choices=CELLS,
        metavar="NAME",
        help="these cells and those that they need (default: the preset's)",
    )
    add("--out", type=Path, metavar="DIR", help="result folder (default: outputs/ablation/PRESET[-data-N])")
    add("--evaluate", choices=("val", "test"), default="val", help="identities to score (default: val)")
    add("--again", action="store_true", help="score finished runs once more, on test too")
    add("--long_epochs", type=between(1), metavar="N", help="length of the long teachers (default: by measured time)")
    add("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args()


def choose_runs(study: Study, names: list[str] | None, seeds: int) -> list[Run]:
    """The chosen runs and those that they need, seed by seed: the whole table stands after the first seed."""
    chosen = set(names or study.preset.cells)
    if same := {name for name in chosen if is_both(study.preset, name)}:
        chosen = chosen - same | {"both"}
        if names:
            print(f"{', '.join(sorted(same))}: the preset's setting, so this is the cell `both`")
    if study.factors is None and "oracle" in chosen:
        if names:
            raise UserError("--cells oracle: needs embedded data, whose true swaps can be drawn; leave it out")
        chosen.remove("oracle")
        print("oracle is left out: only embedded data have true swaps")
    wanted = {(name, seed) for name in chosen for seed in range(seeds)}
    while more := set().union(*(needed(study, run) for run in wanted)) - wanted:
        wanted |= more
    order = ["teacher", "both", *CELLS]  # most cells start from `both`
    return sorted(wanted, key=lambda run: (run[1], order.index(run[0])))


def needed(study: Study, run: Run) -> set[Run]:
    return needs(run[0], study.config(*run), run[1])


def result_file(study: Study, run: Run, where: str) -> Path:
    return study.run(*run).path / f"result-{where}.json"


def work(study: Study, runs: list[Run], where: str, *, again: bool) -> set[Run]:
    """Train and score the unfinished runs; returns those that failed, and those that needed one that did.

    Raises SystemExit with 128 and the signal's number when a signal stops training.
    """
    left = [run for run in runs if again or not result_file(study, run, where).is_file()]
    for run in left if where == "test" and not again else ():
        if dates := test_dates(study, run)[1]:
            raise UserError(
                f"{run[0]}-{run[1]}: was scored on the test identities on {dates[-1]}, and the result is gone; choose "
                "settings with --evaluate val, or score once more with --again"
            )
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
    failed: set[Run] = set()
    while left:
        done = next((run for run in left if settle(study, run, where, failed, again=again)), None)
        if done is None:
            time.sleep(POLL)  # another process makes what the rest needs
        else:
            left.remove(done)
            print(f"{len(left)} runs left", flush=True)
    return failed


def settle(study: Study, run: Run, where: str, failed: set[Run], *, again: bool) -> bool:
    """Make a run unless it has to wait for another run or is made by another process; whether it is settled.

    A run that cannot be made is added to `failed`, and so is one that needs a failed run.
    """
    if needed(study, run) & failed:
        failed.add(run)
        return True
    if not all(result_file(study, before, where).is_file() for before in needed(study, run)):
        return False
    with hold_folder(study.run(*run).path) as mine:
        if mine and (again or not result_file(study, run, where).is_file()):
            print(f"\n{run[0]}-{run[1]}", flush=True)
            try:
                make(study, run, where)
            except UserError as error:
                print(f"{run[0]}-{run[1]} failed: {error}", file=sys.stderr)
                failed.add(run)
        return mine


def make(study: Study, run: Run, where: str) -> None:
    """Train a run unless it is trained, and score it."""
    if not trained(study, run) and (status := train(study, run)):
        print(f"{run[0]}-{run[1]} is not finished; the same command continues", file=sys.stderr)
        sys.exit(status)
    gc.collect()  # the trainer's memory
    result = score(study, run, where)
    if where == "test":
        # Noted before the result, in a folder that stays when the run's is removed: these identities have been seen.
        path, dates = test_dates(study, run)
        dates.append(date.today().isoformat())
        write_json(path, {"scored_on_test": dates})
        result["times_scored_on_test"] = len(dates)
    write_json(result_file(study, run, where), result)
    print(f"written to {result_file(study, run, where)}", flush=True)


def test_dates(study: Study, run: Run) -> tuple[Path, list[str]]:
    """The dates on which a run was scored on the test identities, and the file that holds them."""
    path = study.out / "scored-on-test" / f"{run[0]}-{run[1]}.json"
    if not path.is_file():
        return path, []
    return path, read_json(path, "put it back, or remove it if the run is new")["scored_on_test"]


def write_results(study: Study, args: argparse.Namespace, runs: list[Run]) -> None:
    """Write what is finished of the chosen runs: JSON, table and figure."""
    where, files = args.evaluate, [result_file(study, run, args.evaluate) for run in runs]
    results = [read_json(path, "remove it, and the run is scored again") for path in files if path.is_file()]
    if not results:
        return
    rows, sweep = table.rows(results), table.sweep(results)
    claims = table.claims(rows)
    content = {
        "preset": args.preset,
        "evaluated_on": where,
        "device": str(study.device),
        "data": study.preset.data if args.data_root is None else Path(args.data_root).resolve().name,
        "precision": study.config("both", 0).precision,
        "machine": describe_machine(),
        "runs": results,
        "table": rows,
        "sweep": sweep,
        "claims": [{"claim": text, "holds": holds} for text, holds in claims],
    }
    write_json(study.out / f"results-{where}.json", content)
    again = sum(result.get("times_scored_on_test", 1) > 1 for result in results)
    text = [f"Preset {args.preset}, {where} identities, {len(results)} of {len(runs)} runs.", table.format_table(rows)]
    text += [table.format_sweep(sweep)] if sweep else []
    text += [table.format_claims(claims), table.NOTE]
    text += [f"{again} runs were scored on the test identities more than once."] if again else []
    whole = "\n\n".join(text) + "\n"
    write_text(study.out / f"table-{where}.md", whole)
    table.draw_figure(study.out / f"figure-{where}.png", results, f"preset {args.preset}, {where} identities")
    print(f"\n{whole}\nwritten to {study.out}: results-{where}.json, table-{where}.md, figure-{where}.png", flush=True)


def main() -> None:
    args = parse_args()
    set_threads(args.threads)
    device, preset, name = pick_device(args.device), PRESETS[args.preset], args.preset
    if args.data_seed is not None:
        if preset.data is None:
            raise UserError(f"--data_seed: preset {name} draws no data; leave it out")
        preset, name = replace(preset, data=preset.data | {"seed": args.data_seed}), f"{name}-data-{args.data_seed}"
    out = make_folder((args.out or ROOT / "outputs" / "ablation" / name).expanduser().resolve())
    with hold_folder(out, wait=True):
        precision = pick_precision(device, cell_config(preset, "both", 0, data_root="").precision)
        settings = {"preset": args.preset, "data_root": args.data_root, "precision": precision}
        require_same_study(out, settings)
        data, held, factors = prepare_data(preset, args.data_root, out)
        write_json(out / NOTE, settings)
    study = Study(preset, out, data, held, factors, device, args.threads, args.long_epochs)
    runs = choose_runs(study, args.cells, args.seeds)
    try:
        failed = work(study, runs, args.evaluate, again=args.again)
    finally:
        write_results(study, args, runs)
    if failed:
        names = ", ".join(f"{name}-{seed}" for name, seed in sorted(failed))
        raise UserError(f"not made: {names}; the reasons stand above, the same command tries again")


def require_same_study(out: Path, settings: dict[str, str | None]) -> None:
    """Raise UserError if a folder was begun with other settings, or holds anything but data."""
    path = out / NOTE
    if not path.is_file():
        if strangers := sorted(p.name for p in out.iterdir() if p.name != "data"):
            raise UserError(f"--out {out}: holds other files ({strangers[0]}); choose a new or empty folder")
        return
    for key, value in read_json(path, "choose a new --out").items():
        if settings.get(key) != value:
            raise UserError(f"--out {out}: was begun with {key} {value}, not {settings.get(key)}; choose another --out")


if __name__ == "__main__":
    # Training steps catch this signal and save a snapshot first; all other files are written whole or not at all.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_cli(main)
