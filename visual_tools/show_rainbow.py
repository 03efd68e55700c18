"""The N x N matrix of swaps, rows appearance, columns structure, originals on the border.

python visual_tools/show_rainbow.py --name latest --input ../Market/pytorch --count 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, add_machine_arguments, pick_device, run_cli, set_threads


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The N x N matrix of swaps: rows are appearance, columns structure, originals on the border."
    )
    parser.add_argument("--name", default="latest", help="run under outputs/ (default: latest)")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--input", help="data set or folder of images (default: the run's data_root)")
    parser.add_argument("--split", default="query", help="split of a data set to draw from (default: query)")
    parser.add_argument(
        "--count", type=int, default=8, help="images, one per identity where these are known (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    parser.add_argument("--out", help="PNG to write (default: the run's images/rainbow_ITERATION.png)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    add_machine_arguments(parser)
    return parser.parse_args()


def choose_images(source: Path, split: str, count: int, seed: int) -> list[Path]:
    """`count` images of different identities of a data set's split, or of any folder."""
    import numpy as np

    from data.folders import list_images, read_split

    rng = np.random.default_rng(seed)
    try:
        images = read_split(source, split, need_names=False)
    except UserError:
        paths = list_images(source)
        if not paths:
            raise UserError(
                f"--input {source}: neither a data set with a {split} split nor a folder of images"
            ) from None
        order = rng.permutation(len(paths))
        return [paths[i] for i in order[:count]]
    first: dict[int, Path] = {}
    for i in rng.permutation(len(images)):
        if images.pids[i] > 0:
            first.setdefault(int(images.pids[i]), images.paths[i])
    return list(first.values())[:count]


def main() -> None:
    args = parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")

    from PIL import Image

    from data.pairs import decode_images, normalise
    from runs import open_run, resolve_data_root
    from visual_tools.grid import paint_grid, to_uint8
    from visual_tools.swapper import load_swapper

    device = pick_device(args.device)
    set_threads(args.threads)
    run = open_run(args.output_path, args.name)
    model = load_swapper(run, device, args.which_epoch)
    out = Path(args.out) if args.out else run.images / f"rainbow_{model.iteration:08d}.png"
    if out.exists() and not args.force:
        raise UserError(f"{out} exists; give another --out or --force")
    paths = choose_images(resolve_data_root(args.input or model.cfg.data_root), args.split, args.count, args.seed)
    x = normalise(decode_images(paths, *model.size))
    border = list(to_uint8(x))
    s, f = model.structure(x), model.appearance(x)
    rows = [[None, *border]]
    for i, original in enumerate(border):
        rows.append([original, *to_uint8(model.decode(s, f[i : i + 1].expand(len(s), -1)))])
    labels = ["structure of", *("clothes of" for _ in border)]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(paint_grid(rows, row_labels=labels)).save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    print(f"swap grid written to {out}")


if __name__ == "__main__":
    run_cli(main)
