"""Swaps of a run against the truth, on the embedded data: `python -m mannequins.against_truth --name demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.folders import data_set_name, other_data_set, read_split
from data.listing import say_reading
from files import write_json
from mannequins.dataset import load_factors
from mannequins.truth import Swaps, clothes_shares, draw_swaps, measure_swaps, recognise
from reid_eval.features import Features, extract_features
from runs.folder import find_data, resolve_data_root
from runs.load import find_teacher, load_teacher
from runs.swapper import Swapper, open_swapper
from utils import UserError, add_run_arguments, between, run_cli

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
Cells = tuple[list[str], dict[str, list[str]]]  # heads of the columns, and the cells of each row by its label


def ask_teacher(model: Swapper, root: Path, swaps: Swaps) -> dict[str, Any]:
    """Re-identification of `swaps` of test images by the run's first teacher.

    Raises UserError for a run without a teacher, and for a teacher whose files are missing.
    """
    if not model.cfg.teachers:
        raise UserError("the run's config names no teacher")
    name = model.cfg.teachers[0]
    files = find_teacher(name, model.run.output_path)
    net = load_teacher(name, model.run.output_path).to(model.device)
    size = files.height, files.width
    gallery = read_split(root, "gallery")
    features = extract_features(net, gallery.paths, height=size[0], width=size[1], batch_size=64, device=model.device)
    known = Features(features, gallery.pids, gallery.camids)
    return recognise(net, size, swaps, read_split(root, "query"), known, device=model.device)


def measure(model: Swapper, root: Path, *, count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """All of `swaps.json`, and notes on what is left out."""
    factors, notes = load_factors(root), []
    query = read_split(root, "query")
    say_reading({"query": query})
    swaps = draw_swaps(model.swap, factors, query, count=count, size=model.size, seed=seed)
    rows = measure_swaps(swaps)
    generated, copy = rows["generated"]["changed"], rows["copy"]["changed"]
    result = {
        "name": model.run.name,
        "iteration": model.iteration,
        "tested_on": data_set_name(root),
        "seed": seed,
        "pairs": len(swaps.appearance),
        "generated": generated,
        "copy": copy,
        "reduction": 1 - generated / copy,
        "images": rows,
        "shares": clothes_shares(swaps),
    }
    try:
        result["recognised"] = ask_teacher(model, root, swaps)
    except UserError as error:
        notes.append(f"recognition by the teacher is left out: {error}")
    return result, notes


# -------------------------------------------------------------------------------------------------- tables
def swap_table(result: dict[str, Any]) -> Cells:
    """The table of `swaps.json`; cells without a value are "-"."""
    asked = result.get("recognised", {})
    heads = [head for head, _ in ERRORS.values()] + (["Rank-1", "mAP"] if asked else [])
    rows = {}
    for row, label in LABELS.items():
        errors = result["images"].get(row, {})  # none of what is only recognised
        cells = [f"{errors[key]:.{digits}f}" if errors else "-" for key, (_, digits) in ERRORS.items()]
        if asked:
            values = [asked.get(row, {}).get("official", {}).get(key) for key in ("rank1", "mAP")]
            cells += ["-" if value is None else f"{100 * value:.1f}" for value in values]
        if errors or row in asked:
            rows[label] = cells
    return heads, rows


def describe_shares(shares: dict[str, dict[str, float]]) -> str:
    """What `clothes_shares` found, in words: "shade 39 and 48 %, pattern 71 and 3 %, colour 1 and 35 %"."""
    parts = {name: [round(100 * share[side]) for side in ("structure", "truth")] for name, share in shares.items()}
    return ", ".join(f"{name} {structure} and {truth} %" for name, (structure, truth) in parts.items())


def format_table(heads: list[str], rows: dict[str, list[str]]) -> str:
    """A table for a terminal."""
    lines = [["", *heads], *([label, *cells] for label, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"  {label:{widths[0]}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True))
        for label, *cells in lines
    )


def format_result(result: dict[str, Any], teacher: str) -> str:
    """What a terminal shows of `measure`'s result."""
    lines = [
        f"{result['name']} after {result['iteration']} steps, {result['pairs']} swaps of test images, L1 on the "
        f"changed pixels (grey levels): generated {result['generated']:.1f}, copying the structure image "
        f"{result['copy']:.1f}, reduction {100 * result['reduction']:.1f} %",
        format_table(*swap_table(result)),
        f"clothes of the structure image and of the truth in generated swaps: {describe_shares(result['shares'])}",
    ]
    if "recognised" in result:
        lines.append(
            f"Rank-1, mAP: teacher {teacher}, these images as queries for the appearance identity (official convention)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generated swaps against the renderer's own drawing (embedded data).")
    add_run_arguments(parser, name="demo")
    parser.add_argument("--data_root", help="embedded data set (default: the run's)")
    parser.add_argument("--count", type=between(1), default=512, help="swaps to draw (default: 512)")
    parser.add_argument("--seed", type=between(0), default=0, help="of the choice of swaps")
    args = parser.parse_args()
    model = open_swapper(args)
    root = find_data(args.data_root, "--data_root", model.cfg.data_root, model.run.config_file)
    suffix = other_data_set(root, resolve_data_root(model.cfg.data_root))
    result, notes = measure(model, root, count=args.count, seed=args.seed)
    print(*notes, format_result(result, "".join(model.cfg.teachers[:1])), sep="\n")
    file = model.run.path / f"swaps{suffix}.json"  # swaps.json is always about the data set that the config names
    write_json(file, result)
    print(f"written to {file}")


if __name__ == "__main__":
    run_cli(main)
