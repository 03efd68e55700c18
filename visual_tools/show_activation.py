"""What each head of the id net looks at: images, and over them where the primary and fine-grained feature come from.

python visual_tools/show_activation.py --name latest --input IMG_OR_DIR ... --out activation.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, add_machine_arguments, pick_device, run_cli, set_threads


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Activation maps of the id net on any images, one column per head.")
    parser.add_argument("--name", help="run under outputs/ (default: latest)")
    parser.add_argument("--teacher", metavar="NAME", help="a teacher under models/ instead of a run")
    parser.add_argument("--which_epoch", default="last", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--input", required=True, nargs="+", metavar="IMG_OR_DIR", help="images, or folders of images")
    parser.add_argument("--count", type=int, default=16, help="images at most, the first ones (default: 16)")
    parser.add_argument("--out", metavar="FILE", help="PNG to write (default: activation_ITERATION.png in the run)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    add_machine_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.name and args.teacher:
        raise UserError("--name and --teacher: give one of the two")
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")

    from PIL import Image

    from data.folders import find_images
    from data.pairs import decode_images, normalise
    from runs import load_run_for_test, load_teacher_for_test, open_run
    from utils import make_folder, write_whole
    from visual_tools.activation import activation_maps, head_names, overlay
    from visual_tools.grid import paint_grid, to_uint8

    paths = [path for source in args.input for path in find_images(source, "--input")]
    if len(paths) > args.count:
        print(f"the first {args.count} of {len(paths)} images; --count shows more")
    device = pick_device(args.device)
    set_threads(args.threads)
    run = open_run(args.output_path, args.teacher or args.name or "latest")
    tested = load_teacher_for_test(run, device) if args.teacher else load_run_for_test(run, args.which_epoch, device)
    default = run.model / "activation.png" if args.teacher else run.images / f"activation_{tested.iteration:08d}.png"
    out = Path(args.out) if args.out else default
    if out.exists() and not args.force:
        raise UserError(f"{out} exists; give another --out or --force")
    x = normalise(decode_images(paths[: args.count], *tested.size))
    rows = []
    for image, one in zip(to_uint8(x), x.split(1), strict=True):
        maps = activation_maps(tested.net, one.to(device))[0]
        rows.append([image, *(overlay(image, activation) for activation in maps)])
    figure = Image.fromarray(paint_grid(rows, column_labels=["image", *head_names(tested.net)], cell_height=192))
    make_folder(out.parent)
    write_whole(out, lambda file: figure.save(file, format="PNG"))
    print(f"activation maps written to {out}")


if __name__ == "__main__":
    run_cli(main)
