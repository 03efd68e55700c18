"""What each head of the id net looks at: images, and over them where the primary and fine-grained feature come from.

python visual_tools/show_activation.py --name latest --input IMG_OR_DIR ... --out activation.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, add_net_arguments, check_net_arguments, pick_device, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Activation maps of the id net on any images, one column per head.")
    add_net_arguments(parser)
    parser.add_argument("--input", required=True, nargs="+", metavar="IMG_OR_DIR", help="images, or folders of images")
    parser.add_argument("--count", type=int, default=16, help="images at most, the first ones (default: 16)")
    parser.add_argument("--out", metavar="FILE", help="PNG to write (default: activation_ITERATION.png in the run)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_net_arguments(args)
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")

    from data.folders import find_images
    from data.images import decode_images, normalise, to_uint8
    from reIDmodel import head_names
    from runs.grid import paint_grid
    from runs.load import open_net
    from visual_tools.activation import activation_maps, overlay
    from visual_tools.figure import new_file, write_image

    paths = [path for source in args.input for path in find_images(source, "--input")]
    if len(paths) > args.count:
        print(f"the first {args.count} of {len(paths)} images; --count shows more")
    device = pick_device(args.device)
    tested = open_net(args, device)
    default = "activation.png" if args.teacher else f"images/activation_{tested.iteration:08d}.png"
    out = new_file(Path(args.out or tested.folder / default), suffix=".png", force=args.force)
    x = normalise(decode_images(paths[: args.count], *tested.size))
    rows = []
    for image, one in zip(to_uint8(x), x.split(1), strict=True):
        maps = activation_maps(tested.net, one.to(device))[0]
        rows.append([image, *(overlay(image, activation) for activation in maps)])
    write_image(out, paint_grid(rows, column_labels=["image", *head_names(tested.net)], cell_height=192))
    print(f"activation maps written to {out}")


if __name__ == "__main__":
    run_cli(main)
