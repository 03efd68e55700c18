"""Swap error of a run on the embedded data: `python -m gen_eval.against_truth --name demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, add_machine_arguments, pick_device, run_cli, set_threads, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generated swaps against the renderer's own drawing (embedded data).")
    parser.add_argument("--name", default="demo", help="run under outputs/ (default: demo)")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--data_root", help="embedded data set (default: the run's)")
    parser.add_argument("--count", type=int, default=512, help="swaps to draw (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of swaps")
    add_machine_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")

    from data.mannequins import load_factors
    from gen_eval.swaps import measure_swaps
    from runs import open_run, resolve_data_root
    from visual_tools.swapper import load_swapper

    device = pick_device(args.device)
    set_threads(args.threads)
    run = open_run(args.output_path, args.name)
    model = load_swapper(run, device, args.which_epoch)
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
