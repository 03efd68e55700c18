"""Finds the people of query images in any folder of images: `python search.py --gallery DIR --query IMG`."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils import (
    UserError,
    add_batch_argument,
    add_net_arguments,
    between,
    check_net_arguments,
    run_cli,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find the people of query images in any folder of images: no labels, no cameras."
    )
    add_net_arguments(parser)
    parser.add_argument("--gallery", required=True, metavar="DIR", help="folder to search, with its sub-folders")
    parser.add_argument("--query", required=True, nargs="+", metavar="IMG", help="images, or folders of images")
    parser.add_argument("--top", type=between(1), default=10, help="images to show per query (default: 10)")
    parser.add_argument(
        "--min-probability",
        type=between(0, 1, float),
        metavar="P",
        help="show only hits of this probability or more; needs python -m reid_eval.calibrate",
    )
    parser.add_argument(
        "--index",
        metavar="DIR",
        help="folder that keeps the index (default: search/GALLERY-HASH in the folder of the run or the teacher)",
    )
    parser.add_argument("--rebuild", action="store_true", help="make the index anew, also for another model")
    parser.add_argument("--skip-bad-images", action="store_true", help="omit unreadable gallery images")
    parser.add_argument(
        "--page", metavar="FILE", help="HTML page of the results (default: results.html beside the index, replaced)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing --page")
    add_batch_argument(parser, "--batchsize")
    args = parser.parse_args()
    check_net_arguments(args)
    if not Path(args.gallery).is_dir():
        raise UserError(f"--gallery {args.gallery}: no such folder")
    if args.page and Path(args.page).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--page {args.page}: must end in .html")
    if args.page and Path(args.page).exists() and not args.force:
        raise UserError(f"--page {args.page} exists; give another or --force")
    return args


def main() -> None:
    args = parse_args()

    from reid_eval.search import search

    search(args)


if __name__ == "__main__":
    run_cli(main)
