"""The whole of DG-Net on the embedded data, in minutes on a CPU: `make demo`, or `python demo.py`.

It draws the data set, trains a teacher and a DG-Net, evaluates both, measures the swaps, paints the swap grid and
writes the report. Finished steps are not repeated, and an interrupted one continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from config import load_config, read_yaml
from runs.folder import RunFolder, open_run
from utils import ROOT, UserError, pick_device, run_cli, set_threads

TEACHER = "demo-teacher"
DATA = "datasets/mannequins"
CONFIG = ROOT / "configs" / "demo.yaml"
MOST_THREADS = 4  # more have not been tried
ROWS = {
    "primary": "DG-Net, primary (beta 0)",
    "both (beta 0.5)": "DG-Net, both (beta 0.5)",
    "fine": "DG-Net, fine-grained only",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="demo", help="name of the DG-Net run (default: demo)")
    parser.add_argument("--teacher", default=TEACHER, help=f"name of the teacher (default: {TEACHER})")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings (default: 0)")
    parser.add_argument("--data", default=DATA, help=f"embedded data set, drawn if absent (default: {DATA})")
    parser.add_argument("--output_path", help="folder of outputs/, models/ and logs/ (default: the project's)")
    parser.add_argument("--threads", type=int, help=f"CPU threads (default: the cores, at most {MOST_THREADS})")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError now for what a later step would refuse."""
    for name in (args.name, args.teacher):
        open_run(args.output_path, name)
    if args.name == args.teacher:
        raise UserError(f"--name and --teacher {args.name}: the two runs need different names")
    load_config(CONFIG, [f"seed={args.seed}"])
    pick_device(args.device)
    set_threads(args.threads)


def call(title: str, *command: object) -> None:
    """Run one of the project's scripts; its failure ends the demo with its exit status."""
    print(f"\n== {title}\n   python {' '.join(map(str, command))}", flush=True)
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT) as process:
        while process.poll() is None:
            with contextlib.suppress(KeyboardInterrupt):  # the script received it too; a training saves its steps first
                process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def train(title: str, config: Path, run: RunFolder, common: list[object], settings: dict[str, object]) -> None:
    """Train or continue a run; one that is there must have been made with the same settings."""
    made = read_yaml(run.config_file) if run.config_file.is_file() else {}
    for key, value in settings.items():
        if made.get(key, value) != value:
            raise UserError(
                f"{run.path}: made with {key} {made[key]} instead of {value}; choose another --name and --teacher"
            )
    values = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    call(title, "train.py", "--config", config, "--name", run.name, "--resume", "auto", *common, "--set", *values)


def results_table(teacher: dict, run: dict) -> str:
    """Teacher against DG-Net by head, both AP conventions named, in percent."""
    lines = []
    for convention, explanation in run["conventions"].items():
        lines += ["", f"{convention}: {explanation}", f"  {'':28}{'Rank-1':>8}{'Rank-5':>8}{'Rank-10':>8}{'mAP':>8}"]
        rows = [("teacher", teacher["tables"]["single query"]["feature"])]
        rows += [(label, run["tables"]["single query"][key]) for key, label in ROWS.items()]
        for label, row in rows:
            values = [row[convention][key] for key in ("rank1", "rank5", "rank10", "mAP")]
            lines.append(f"  {label:28}" + "".join(f"{100 * value:8.1f}" for value in values))
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    check_args(args)
    began = time.perf_counter()
    output = Path(args.output_path).resolve() if args.output_path else ROOT
    teacher, run = RunFolder(output, args.teacher), RunFolder(output, args.name)
    threads = args.threads or min(MOST_THREADS, os.cpu_count() or 1)
    common: list[object] = ["--output_path", output, "--threads", threads]
    common += ["--device", args.device] if args.device else []
    settings: dict[str, object] = {"seed": args.seed, "data_root": args.data}
    grid = run.path / "swap_grid.png"

    call("embedded data", "-m", "mannequins.dataset", "--out", args.data, "--workers", threads)
    train("teacher", CONFIG.with_name("demo-teacher.yaml"), teacher, common, settings)
    train("DG-Net", CONFIG, run, common, settings | {"teacher": args.teacher})
    call("re-identification of the teacher", "test.py", "--teacher", args.teacher, *common)
    call("re-identification of DG-Net", "test.py", "--name", args.name, "--rank-figure", "4", *common)
    call("swaps against the truth", "-m", "mannequins.against_truth", "--name", args.name, *common)
    call("swap grid", "visual_tools/show_rainbow.py", "--name", args.name, "--out", grid, "--force", *common)
    call("report", "visual_tools/report.py", "--name", args.name, *common)

    print(f"\n== results after {(time.perf_counter() - began) / 60:.1f} minutes")
    print(results_table(*(json.loads((folder / "reid.json").read_text()) for folder in (teacher.model, run.path))))
    swaps = json.loads((run.path / "swaps.json").read_text())
    owner = {row: 100 * swaps["recognised"][row]["official"]["rank1"] for row in ("generated", "true")}
    print(
        f"\nswap error on the changed pixels (L1, grey levels): generated {swaps['generated']:.1f}, "
        f"copying the structure image {swaps['copy']:.1f}: {100 * swaps['reduction']:.1f} % below\n"
        f"Rank-1 of the teacher for the owner of the clothes: generated {owner['generated']:.1f}, "
        f"true swaps {owner['true']:.1f}"
    )
    print(f"\nswap grid (rows: appearance, columns: structure): {grid}")
    print(f"the run: {run.path}\neverything on one page: {run.path / 'report.html'}")
    elsewhere = f" --output_path {output}" if args.output_path else ""
    print(
        "\nnext:\n"
        f"  tensorboard --logdir {run.logs.parent}\n"
        f"  python test.py --name {args.name} --multi --rerank{elsewhere}\n"
        f"  python visual_tools/show_rainbow.py --name {args.name} --seed 1{elsewhere}\n"
        "  python train.py --config configs/latest.yaml     # Market-1501, see README.md"
    )


if __name__ == "__main__":
    run_cli(main)
