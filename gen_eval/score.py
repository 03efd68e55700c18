"""Scores of generated images: `python -m gen_eval.score --real DIR --fake DIR`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

import torch

from data.folders import ImageList, read_people
from data.images import check_images
from data.listing import say_reading
from files import write_json
from gen_eval.metrics import KID_SUBSET_SIZE, KID_SUBSETS, Protocol, score, trunk_features
from runs.folder import open_run
from runs.load import TestNet, load_teacher_for_test
from utils import UserError, add_machine_arguments, between, pick_device, run_cli, set_threads

COLUMNS = {"fid": "FID", "kid": "KID x 1000", "ssim": "SSIM", "lpips": "LPIPS", "images": "images"}
PROTOCOL_KEYS = ("drawn", "preparation", "fid", "kid", "ssim, lpips", "seed")  # that are shown with the scores
INCEPTION = "Inception of 2015 by torch-fidelity, 2048 features, float64"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gen_eval.score",
        description="FID and KID between two folders of images, SSIM and LPIPS between images of one identity. Weights "
        "are looked for in PyTorch's cache, then downloaded; a score without its weights names the file.",
    )
    parser.add_argument("--real", required=True, metavar="DIR", help="data set, folder per person, or loose images")
    parser.add_argument("--fake", metavar="DIR", help="generated images, in any of these forms")
    parser.add_argument("--split", help="split of the real images' data set (default: query)")
    parser.add_argument("--real-vs-real", action="store_true", help="FID and KID between random halves of --real")
    parser.add_argument("--count", type=between(2), help="images to draw from each folder (default: all)")
    parser.add_argument("--pairs", type=between(1), default=2000, help="pairs for SSIM and LPIPS (default: 2000)")
    size = dict(type=between(32), nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--size", **size, help="every image is first resized to this (default: 128 64, or --teacher's)")
    parser.add_argument("--teacher", metavar="NAME", help="FID and KID by this teacher's trunk instead of Inception")
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0, help="of every random choice (default: 0)")
    parser.add_argument("--batchsize", type=between(1), default=32, help="images per pass (default: 32)")
    parser.add_argument("--out", metavar="FILE", help="write protocol and scores here too, as JSON")
    add_machine_arguments(parser)
    args = parser.parse_args()
    if args.fake is None and not args.real_vs_real:
        raise UserError("--fake is missing; give the generated images, or --real-vs-real for the floor alone")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder; give a file")
    return args


def describe(sides: dict[str, ImageList], protocol: Protocol, features: str = INCEPTION) -> dict[str, Any]:
    """The protocol as it applies to the images of "real" and possibly "fake", ready for JSON.

    features  what FID and KID are computed of
    """
    subset = min(KID_SUBSET_SIZE, *(protocol.count or len(images) for images in sides.values()))
    about = {
        name: {
            "images": len(images),
            "identities": len(set(images.pids.tolist())),
            "formats": dict(Counter(path.suffix.lower() for path in images.paths)),
        }
        for name, images in sides.items()
    }
    return about | {
        "drawn": f"{protocol.count} images of each at random" if protocol.count else "all images",
        "preparation": f"decoded, upright, RGB, resized to {protocol.size[0]} x {protocol.size[1]} (bicubic, 8 bit), "
        "not cropped, not compressed again",
        "fid": features,
        "kid": f"same features, polynomial kernel of degree 3, {KID_SUBSETS} subsets of {subset} images (of the halves "
        "of a folder: at most their size)",
        "ssim, lpips": f"mean over {protocol.pairs} random pairs of images of one identity; SSIM: window 11, sigma "
        "1.5, mean over RGB; LPIPS 0.1, AlexNet",
        "size": list(protocol.size),
        "pairs": protocol.pairs,
        "seed": protocol.seed,
    }


def ratios(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """FID, SSIM and LPIPS of "fake" over those of "real", by name; {} without "fake". Real has an FID if it was halved.

    KID is not among them: that of real halves is 0 on average.
    """
    real, fake = scores["real"], scores.get("fake", {})
    return {key: fake[key] / real[key] for key in ("fid", "ssim", "lpips") if key in fake and real.get(key)}


def ratio_cells(row: dict[str, float]) -> list[str]:
    """A row of `ratios` as cells in the order of COLUMNS, "-" for a ratio that is missing."""
    return [f"{row[key]:.2f}" if key in row else "-" for key in COLUMNS]


def score_cells(row: dict[str, float]) -> list[str]:
    """A row of scores as cells in the order of COLUMNS, "-" for a score that is missing."""
    formats = {"fid": "{:.2f}", "kid": "{:.2f}", "ssim": "{:.3f}", "lpips": "{:.3f}", "images": "{:d}"}
    scaled = {key: 1000 * value if key == "kid" else value for key, value in row.items()}
    if abs(scaled.get("fid", 1)) < 1:  # of a teacher's features, which are small
        formats["fid"] = "{:.4f}"
    return [formats[key].format(scaled[key]) if key in scaled else "-" for key in COLUMNS]


def print_scores(
    sides: dict[str, ImageList],
    protocol: Protocol,
    device: torch.device,
    *,
    real_vs_real: bool = False,
    teacher: TestNet | None = None,
) -> dict[str, Any]:
    """Compute and print the scores with their protocol; returns both, ready for JSON. Arguments as `metrics.score`.

    teacher  whose trunk takes the place of Inception in FID and KID
    """
    network, features, dim = None, INCEPTION, 2048
    if teacher is not None:
        network, dim = trunk_features(teacher.net), teacher.net.channels
        features = f"pooled trunk of {teacher.title}, {dim} features, float64; comparable with this teacher's only"
    scores, missing = score(sides, protocol, device, real_vs_real=real_vs_real, network=network)
    stated = describe(sides, protocol, features)
    for side in sides:
        formats = ", ".join(f"{count} {suffix}" for suffix, count in stated[side]["formats"].items())
        print(f"{side}: {stated[side]['images']} images of {stated[side]['identities']} identities ({formats})")
    for key in PROTOCOL_KEYS:
        print(f"{key}: {stated[key]}")
    to_real = ratios(scores)
    print_rows(list(COLUMNS.values()), {name: score_cells(row) for name, row in scores.items()})
    if to_real:
        print_rows([], {"fake / real": ratio_cells(to_real)})
    half = scores["real"]["images"] // 2
    if real_vs_real:
        print(f"FID and KID of real: one random half ({half} images) against the other")
    for line in missing:
        print(f"not computed: {line}")
    fewest = min([row["images"] for row in scores.values()] + [half] * real_vs_real)
    if any("fid" in row for row in scores.values()) and fewest <= dim:  # no covariance of full rank
        print(f"note: FID from fewer than {dim + 1} images is too high; compare equal numbers, or KID")
    if len({frozenset(stated[side]["formats"]) for side in sides}) > 1:
        print("note: real and fake are of different file formats; FID and KID see JPEG's traces")
    return {"scores": scores, "ratio_to_real": to_real, "not_computed": missing, "protocol": stated}


def print_rows(heads: Sequence[str], rows: dict[str, list[str]]) -> None:
    if heads:
        print(" " * 13 + "".join(f"{head:>12}" for head in heads))
    for name, cells in rows.items():
        print(f"  {name:11}" + "".join(f"{cell:>12}" for cell in cells))


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    set_threads(args.threads)
    sides = {"real": read_people(args.real, args.split, option="--real")}
    if args.fake:
        sides["fake"] = read_people(args.fake, option="--fake", generated=True)
    check_images([path for side in sides.values() for path in side.paths], skip_bad=False, remedy="remove them")
    say_reading(sides)
    teacher = load_teacher_for_test(open_run(args.output_path, args.teacher), device) if args.teacher else None
    size = tuple(args.size or (teacher.size if teacher else (128, 64)))
    protocol = Protocol(size, args.count, args.pairs, args.seed, args.batchsize)
    result = print_scores(sides, protocol, device, real_vs_real=args.real_vs_real, teacher=teacher)
    if args.out:
        write_json(Path(args.out), {"real": args.real, "fake": args.fake} | result)
        print(f"written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
