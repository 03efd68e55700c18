"""Swaps of a run against the truth, on the embedded data: `python -m gen_eval.against_truth --name demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, run_cli, write_json
from visual_tools.figure import add_run_arguments

if TYPE_CHECKING:
    from data.mannequins import Factors
    from gen_eval.swaps import Swaps
    from visual_tools.swapper import Swapper

TRAINING_SWAPS = 256  # at most, for top-1
LABELS = {
    "generated": "generated swap",
    "copy": "copy of the structure image",
    "recoloured": "copy in the true swap's colours",
    "other": "true swap, third person's clothes",
    "reconstruction": "reconstruction (truth: its input)",
    "true": "true swap",
    "appearance": "the appearance image itself",
}

# Columns of the table by the keys of `image_errors`, with their decimals.
ERRORS = {
    "changed": ("L1 changed", 1),
    "brightness": ("brightness", 1),
    "colour": ("colour", 1),
    "l1": ("L1", 1),
    "psnr": ("PSNR dB", 1),
    "ssim": ("SSIM", 3),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generated swaps against the renderer's own drawing (embedded data).")
    add_run_arguments(parser, name="demo")
    parser.add_argument("--data_root", help="embedded data set (default: the run's)")
    parser.add_argument("--count", type=int, default=512, help="swaps to draw (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of swaps")
    return parser.parse_args()


def ask_teacher(
    model: Swapper, root: Path, factors: Factors, swaps: Swaps, *, count: int, seed: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """What the run's first teacher recognises: re-identification of swaps of test images, top-1 of training ones.

    The second is empty where the teacher's classes are not the data set's training identities. Raises UserError for
    a run without a teacher, or one whose files are not there.
    """
    from data.folders import read_split
    from gen_eval.swaps import classify, draw_swaps, recognise
    from reid_eval.features import Features, extract_features
    from runs import find_teacher, load_teacher

    if not model.cfg.teachers:
        raise UserError("the run's config names no teacher")
    name = model.cfg.teachers[0]
    files = find_teacher(name, model.run.output_path)
    net = load_teacher(name, model.run.output_path).to(model.device)
    size = files.height, files.width
    gallery = read_split(root, "gallery")
    features = extract_features(net, gallery.paths, height=size[0], width=size[1], batch_size=64, device=model.device)
    known = Features(features, gallery.pids, gallery.camids)
    by_reid = recognise(net, size, swaps, read_split(root, "query"), known, device=model.device)
    train = read_split(root, "train_all")
    if train.num_classes != net.heads()[0].classifier[0].out_features:
        return by_reid, {}
    swaps = draw_swaps(model.swap, factors, train, size=model.size, count=min(count, TRAINING_SWAPS), seed=seed)
    return by_reid, classify(net, size, swaps, train.labels(), device=model.device)


def swap_table(result: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The table of `swaps.json`: heads of the columns, and the cells of each row by its label, "-" where empty."""
    asked = "recognised" in result
    heads = [head for head, _ in ERRORS.values()] + (["Rank-1", "mAP", "top-1"] if asked else [])
    rows = {}
    for row, label in LABELS.items():
        errors = result["images"].get(row, {})  # in a file of an earlier version without some
        cells = [f"{errors[key]:.{digits}f}" if key in errors else "-" for key, (_, digits) in ERRORS.items()]
        if asked:
            official = result["recognised"][row]["official"]
            top1 = result["top1"].get(row)
            cells += [f"{100 * official[key]:.1f}" for key in ("rank1", "mAP")]
            cells += [f"{100 * top1:.1f}" if top1 is not None else "-"]
        if errors or asked:
            rows[label] = cells
    return heads, rows


def format_swaps(result: dict[str, Any]) -> str:
    """The table of `swaps.json` for a terminal."""
    heads, rows = swap_table(result)
    lines = [" " * 35 + "".join(f"{head:>11}" for head in heads)]
    lines += [f"  {label:33}" + "".join(f"{cell:>11}" for cell in cells) for label, cells in rows.items()]
    return "\n".join(lines)


def describe_shares(shares: dict[str, dict[str, float]]) -> str:
    """What `clothes_shares` found, in words: "shade 39 and 48 %, pattern 71 and 3 %, colour 1 and 35 %"."""
    parts = ((name, *(round(100 * share[side]) for side in ("structure", "truth"))) for name, share in shares.items())
    return ", ".join(f"{name} {structure} and {truth} %" for name, structure, truth in parts)


def main() -> None:
    args = parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be at least 0")

    from data.folders import data_set_name, other_data_set, read_split
    from data.mannequins import load_factors
    from gen_eval.swaps import clothes_shares, draw_swaps, measure_swaps
    from runs import resolve_data_root
    from visual_tools.swapper import open_swapper

    model = open_swapper(args)
    run = model.run
    root = resolve_data_root(args.data_root or model.cfg.data_root)
    factors = load_factors(root)
    swaps = draw_swaps(
        model.swap, factors, read_split(root, "query"), size=model.size, count=args.count, seed=args.seed
    )
    rows = measure_swaps(swaps)
    generated, copy = rows["generated"]["changed"], rows["copy"]["changed"]
    result = {
        "name": run.name,
        "iteration": model.iteration,
        "tested_on": data_set_name(root),
        "seed": args.seed,
        "pairs": len(swaps.appearance),
        "generated": generated,
        "copy": copy,
        "reduction": 1 - generated / copy,
        "images": rows,
        "shares": clothes_shares(swaps),
    }
    try:
        result["recognised"], result["top1"] = ask_teacher(
            model, root, factors, swaps, count=args.count, seed=args.seed
        )
    except UserError as error:
        print(f"recognition by the teacher is left out: {error}")
    print(
        f"{run.name} after {model.iteration} steps, {len(swaps.appearance)} swaps of test images, L1 on the changed "
        f"pixels (grey levels): generated {generated:.1f}, copying the structure image {copy:.1f}, "
        f"reduction {100 * result['reduction']:.1f} %\n{format_swaps(result)}"
    )
    print(f"clothes of the structure image and of the truth in generated swaps: {describe_shares(result['shares'])}")
    if "recognised" in result:
        print(
            f"Rank-1, mAP: teacher {model.cfg.teachers[0]}, these images as queries for the appearance identity "
            "(official convention); top-1: its classes, swaps of training images"
        )
    # swaps.json is always about the data set that the config names.
    file = run.path / f"swaps{other_data_set(root, resolve_data_root(model.cfg.data_root))}.json"
    write_json(file, result)
    print(f"written to {file}")


if __name__ == "__main__":
    run_cli(main)
