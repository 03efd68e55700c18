"""Swap error of a run on the embedded data: `python -m gen_eval.against_truth --name demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, run_cli, write_json
from visual_tools.figure import add_run_arguments


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generated swaps against the renderer's own drawing (embedded data).")
    add_run_arguments(parser, name="demo")
    parser.add_argument("--data_root", help="embedded data set (default: the run's)")
    parser.add_argument("--count", type=int, default=512, help="swaps to draw (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of swaps")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")

    from data.mannequins import load_factors
    from gen_eval.swaps import measure_swaps
    from runs import resolve_data_root
    from visual_tools.swapper import open_swapper

    model = open_swapper(args)
    run = model.run
    root = resolve_data_root(args.data_root or model.cfg.data_root)
    error = measure_swaps(
        model.swap, load_factors(root), root / "query", size=model.size, count=args.count, seed=args.seed
    )
    print(
        f"{run.name} after {model.iteration} steps, {error.pairs} swaps of test images, L1 on the changed pixels "
        f"(grey levels): generated {error.generated:.1f}, copying the structure image {error.copy:.1f}, "
        f"reduction {100 * error.reduction:.1f} %"
    )
    write_json(run.path / "swaps.json", {"name": run.name, "iteration": model.iteration} | error.as_dict())
    print(f"written to {run.path / 'swaps.json'}")


if __name__ == "__main__":
    run_cli(main)
