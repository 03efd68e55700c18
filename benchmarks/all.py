"""Every benchmark of speed on this machine, in under 8 minutes: `python -m benchmarks.all`.

On a GPU the training step is measured in full; everything else, and everything on a CPU, in quick sizes. Results go to
--results, so that the project's figures stay until you copy these over them. Ends with one table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import benchmark_parser
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
    """The figures of each result in a line or a few: (what, figures)."""
    rows = []
    for path in files:
        result = json.loads(path.read_text())
        if path.stem.startswith("train_step"):
            for name, step in result["variants"].items():
                speed = f"{step['median']:.3f} s, {step['plain / this']:.2f} times plain"
                memory = f"{step['peak_memory'] / 1e9:.2f} GB, {step['memory / plain']:.0%} of plain"
                rows.append((f"training step, {name}", f"{speed}, {memory}"))
        elif path.stem == "loader":
            rows += rates("training images", result["speed"])
            for name, share in result["share"].items():
                waited = f"{share['share waited']:.2%} of a step of {share['step']:.3f} s"
                rows.append((f"waited for images, {name}", waited))
        elif path.stem == "features":
            for net, speed in result["speed"].items():
                rows += rates(f"features, {net}", speed)
        elif path.stem.startswith("generate"):
            rate, ratio = result["images/s, whole command"][0], result["whole command / nets alone"]
            rows.append(("generate.py", f"{rate:,.1f}/s, {ratio:.2f} of the nets alone"))
        elif path.stem == "ranking-speed":
            for kind in ("good", "chance"):
                rows.append(
                    (f"ranking, {kind} features", f"{result[kind]['ranking / bare product']:.2f} bare products")
                )
    return rows


def rates(what: str, speed: dict) -> list[tuple[str, str]]:
    return [
        (f"{what}, {name}", f"{speed['images/s'][name]:,.1f}/s, {ratio:.2f} times plain")
        for name, ratio in speed["times plain"].items()
    ]


def main() -> None:
    parser = benchmark_parser("all", __doc__)
    parser.set_defaults(results=ROOT / "outputs/benchmarks")  # not over the project's figures
    parser.add_argument(
        "--only", nargs="+", choices=commands("cpu"), default=list(commands("cpu")), help="some of them"
    )
    args = parser.parse_args()
    options = commands(str(pick_device(args.device)))
    start, failed = time.time(), []
    for module in args.only:
        command = [sys.executable, "-m", f"benchmarks.{module}", *options[module], "--results", str(args.results)]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(f"benchmarks.{module}")
    # The folder may also hold figures of another day.
    rows = table([path for path in sorted(args.results.glob("*.json")) if path.stat().st_mtime >= start])
    width = max((len(name) for name, _ in rows), default=0)
    print("\n".join(f"{name:{width}}  {figures}" for name, figures in rows))
    print(f"{time.time() - start:.0f} s in all; written to {args.results}")
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, see above; the other results are in {args.results}")


if __name__ == "__main__":
    run_cli(main)
