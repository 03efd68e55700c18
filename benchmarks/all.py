"""Every benchmark of speed on this machine, in one go and under 8 minutes: `python -m benchmarks.all`.

On a GPU the training step is measured in full; the other parts, and everything on a CPU, in their quick sizes. Results
go to a folder of their own (--results), so that the project's figures stay until you copy these over them. Ends with
one table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from utils import ROOT, UserError, pick_device, run_cli

RANKING = "--only speed --queries 500 --gallery 5000 --repeats 3 --sample 20".split()
GENERATE = "--backbone resnet10w16 --size 128 64 --count 128".split()


def commands(device: str) -> dict[str, list[str]]:
    """Module to options."""
    step = ["--rounds", "10"] if device.startswith("cuda") else ["--short", "--rounds", "2"]
    return {
        "train_step": [*step, "--device", device],
        "loader": ["--quick", "--device", device],
        "features": ["--quick", "--device", device],
        "generate": [*GENERATE, "--device", device],
        "ranking": RANKING,
    }


def table(files: list[Path]) -> list[tuple[str, str]]:
    """What each result says in a line or two."""
    rows = []
    for path in files:
        found = json.loads(path.read_text())
        if path.stem.startswith("train_step"):
            for name, variant in found["variants"].items():
                speed = f"{variant['median']:.3f} s, {variant['plain / this']:.2f} times plain"
                memory = f"{variant['peak_memory'] / 1e9:.2f} GB, {variant['memory / plain']:.0%} of plain"
                rows.append((f"training step, {name}", f"{speed}, {memory}"))
        elif path.stem == "loader":
            for name, ratio in found["speed"]["times plain"].items():
                rows.append(
                    (f"training images, {name}", f"{found['speed']['images/s'][name]:,.0f}/s, {ratio:.2f} times plain")
                )
            for name, share in found["share"].items():
                rows.append(
                    (f"waited for images, {name}", f"{share['share waited']:.2%} of a step of {share['step']:.3f} s")
                )
        elif path.stem == "features":
            for net, speed in found["speed"].items():
                for name, ratio in speed["times plain"].items():
                    rows.append(
                        (f"features, {net}, {name}", f"{speed['images/s'][name]:,.1f}/s, {ratio:.2f} times plain")
                    )
        elif path.stem.startswith("generate"):
            ratio = found["whole command / nets alone"]
            rows.append(("generate.py", f"{found['images/s, whole command'][0]:,.1f}/s, {ratio:.2f} of the nets alone"))
        elif path.stem == "ranking-speed":
            for kind in ("good", "chance"):
                bare = found[kind]["ranking / bare product"]
                rows.append((f"ranking, {kind} features", f"{bare:.2f} bare products"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "outputs/benchmarks", help="(default: outputs/benchmarks)"
    )
    parser.add_argument("--only", nargs="+", choices=commands("cpu"), help="some of them")
    args = parser.parse_args()
    device = str(pick_device(args.device))
    start, failed = time.time(), []
    for module, options in commands(device).items():
        if args.only is None or module in args.only:
            command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--results", str(args.results)]
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(f"benchmarks.{module}")
    # A folder that was there before may hold figures of another day.
    rows = table([path for path in sorted(args.results.glob("*.json")) if path.stat().st_mtime >= start])
    width = max((len(name) for name, _ in rows), default=0)
    print("\n".join(f"{name:{width}}  {figures}" for name, figures in rows))
    print(f"{time.time() - start:.0f} s in all; written to {args.results}")
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, see above; the other results are in {args.results}")


if __name__ == "__main__":
    run_cli(main)
