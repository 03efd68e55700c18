"""Every benchmark of speed in quick sizes, in a few minutes: `python -m benchmarks.all [--device cuda]`.

On a GPU the training step is measured in full. Results go to --results, not over the project's figures.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.machine import benchmark_parser
from utils import ROOT, UserError, pick_device, run_cli


def main() -> None:
    parser = benchmark_parser("all", __doc__)
    parser.set_defaults(results=ROOT / "outputs/benchmarks")
    args = parser.parse_args()
    device, failed = str(pick_device(args.device)), []
    commands = {
        "train_step": ["--device", device] + ([] if device.startswith("cuda") else ["--short", "--rounds", "2"]),
        "loader": ["--quick", "--device", device],
        "features": ["--quick", "--device", device],
        "generate": ["--backbone", "resnet10w16", "--size", "128", "64", "--count", "128", "--device", device],
        "ranking": ["--queries", "500", "--gallery", "5000"],
    }
    for module, options in commands.items():
        command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--results", str(args.results)]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(module)
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, see above; the other results are in {args.results}")


if __name__ == "__main__":
    run_cli(main)
