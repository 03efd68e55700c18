"""The whole of DG-Net on the embedded data, in minutes on a CPU: `make demo`, or `python demo.py`.

It draws the data set, trains a teacher and a DG-Net, evaluates both, measures the swaps, paints the swap grid and
writes the report. Finished steps are not repeated, and an interrupted one continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from config import load_config, read_yaml
from files import Damaged
from runs.folder import open_run
from utils import ROOT, UserError, pick_device, run_cli, set_threads

TEACHER = "demo-teacher"
DATA = "datasets/mannequins"
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
    parser.add_argument(
        "--threads", type=int, help=f"CPU threads (default: what is quickest now, at most {MOST_THREADS})"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError now for what a later step would refuse."""
    for name in (args.name, args.teacher):
        open_run(args.output_path, name)
    if args.name == args.teacher:
        raise UserError(f"--name and --teacher {args.name}: the two runs need different names")
    load_config(ROOT / "configs" / "demo.yaml", [f"seed={args.seed}"])
    pick_device(args.device)
    if args.threads is not None:
        set_threads(args.threads)


def call(title: str, *command: str) -> None:
    """Run one of the project's scripts; its failure ends the demo with its exit status."""
    print(f"\n== {title}\n   python {' '.join(command)}", flush=True)
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                pass  # the script received it too; a training saves its steps first
    if process.returncode:
        sys.exit(process.returncode)


def train(
    title: str, config: str, run: Path, name: str, finished: bool, common: list[str], settings: dict[str, Any]
) -> None:
    """Train, continue an interrupted training, or say that it is done. Raises UserError if its settings differ."""
    if finished:
        check_settings(run, settings)
        print(f"\n== {title}: done already, in {run}", flush=True)
        return
    values = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    call(title, "train.py", "--config", config, "--name", name, "--resume", "auto", *common, "--set", *values)


def check_settings(run: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if a finished run was made with different settings."""
    made = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    for key, value in settings.items():
        if made.get(key, value) != value:
            raise UserError(
                f"{run}: finished with {key} {made[key]} instead of {value}; choose another --name and --teacher"
            )


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
    data = Path(args.data) if Path(args.data).is_absolute() else ROOT / args.data
    teacher, run = output / "models" / args.teacher, output / "outputs" / args.name
    threads = args.threads
    if threads is None:
        before = threads_before(run) or threads_before(output / "outputs" / args.teacher)
        threads = before or quickest_threads(MOST_THREADS)
    where = ["--threads", str(threads)] + (["--device", args.device] if args.device else [])
    common = ["--output_path", str(output), *where]
    settings: dict[str, Any] = {"seed": args.seed, "data_root": args.data}
    max_iter = demo_length()

    call("embedded data", "-m", "mannequins.dataset", "--out", str(data), "--workers", str(threads))
    trained = (teacher / "net_last.pth").is_file()
    train(
        "teacher",
        "configs/demo-teacher.yaml",
        output / "outputs" / args.teacher,
        args.teacher,
        trained,
        common,
        settings,
    )
    trained = (run / "checkpoints" / f"{max_iter:08d}").is_dir()
    settings["teacher"] = args.teacher
    train("DG-Net", "configs/demo.yaml", run, args.name, trained, common, settings)
    call("re-identification of the teacher", "test.py", "--teacher", args.teacher, *common)
    call("re-identification of DG-Net", "test.py", "--name", args.name, "--rank-figure", "4", *common)
    call("swaps against the truth", "-m", "mannequins.against_truth", "--name", args.name, *common)
    grid = run / "swap_grid.png"
    call("swap grid", "visual_tools/show_rainbow.py", "--name", args.name, "--out", str(grid), "--force", *common)
    call("report", "visual_tools/report.py", "--name", args.name, *common)

    swaps = json.loads((run / "swaps.json").read_text())
    print(f"\n== results after {(time.perf_counter() - began) / 60:.1f} minutes")
    print(results_table(json.loads((teacher / "reid.json").read_text()), json.loads((run / "reid.json").read_text())))
    print(
        f"\nswap error on the changed pixels (L1, grey levels): generated {swaps['generated']:.1f}, "
        f"copying the structure image {swaps['copy']:.1f}: {100 * swaps['reduction']:.1f} % below"
    )
    seen = {"true swap": "true", "generated": "generated", "copy": "copy", "the image itself": "appearance"}
    print(
        "against the true swap: "
        + ", ".join(
            f"{row} PSNR {swaps['images'][row]['psnr']:.1f} dB, SSIM {swaps['images'][row]['ssim']:.3f}"
            for row in ("generated", "copy")
        )
        + "\nRank-1 of the teacher for the appearance identity: "
        + ", ".join(f"{label} {100 * swaps['recognised'][row]['official']['rank1']:.1f}" for label, row in seen.items())
    )
    print(f"\nswap grid (rows: appearance, columns: structure): {grid}")
    elsewhere = f" --output_path {output}" if args.output_path else ""
    print(f"the run: {run}\neverything on one page: {run / 'report.html'}")
    print(
        "\nnext:\n"
        f"  tensorboard --logdir {output / 'logs' if args.output_path else 'logs'}\n"
        f"  python test.py --name {args.name} --multi --rerank{elsewhere}\n"
        f"  python visual_tools/show_rainbow.py --name {args.name} --seed 1{elsewhere}\n"
        f"  python train.py --config configs/demo.yaml --name look --dry-run{elsewhere}\n"
        "  python train.py --config configs/latest.yaml     # Market-1501, see README.md"
    )


def quickest_threads(most: int) -> int:
    """CPU threads with which convolutions like the demo's are quickest now: one if other programs use the cores."""
    import torch

    net, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(48, 32, 32, 16)
    best, least = 1, float("inf")
    for threads in range(1, min(most, os.cpu_count() or 1) + 1):
        torch.set_num_threads(threads)
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            net(x).sum().backward()
            seconds.append(time.perf_counter() - began)
        if (median := statistics.median(seconds)) < 0.85 * least:
            best, least = threads, median
    return best


def threads_before(run: Path) -> int | None:
    """The CPU threads that an interrupted run has used so far; with a different number its results would differ."""
    from runs.snapshot import own_snapshots, read_manifest

    for iteration in reversed(own_snapshots(run / "checkpoints")):
        with contextlib.suppress(Damaged):
            manifest = read_manifest(run / "checkpoints", iteration)
            if found := re.search(r"threads (\d+)", manifest["circumstances"]["device"]):
                return int(found[1])
    return None


def demo_length() -> int:
    return load_config(ROOT / "configs" / "demo.yaml").max_iter


if __name__ == "__main__":
    run_cli(main)
