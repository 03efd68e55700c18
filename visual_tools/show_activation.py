"""What each head of the id net looks at: the images, and over them the sources of the primary and fine-grained feature.

python visual_tools/show_activation.py --name latest --input IMG_OR_DIR ... --out activation.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import add_net_arguments, between, check_net_arguments, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description="Activation maps of the id net on any images, one column per head.")
    add_net_arguments(parser)
    parser.add_argument("--input", required=True, nargs="+", metavar="IMG_OR_DIR", help="images, or folders of images")
    parser.add_argument("--count", type=between(1), default=16, help="images at most, the first ones (default: 16)")
    parser.add_argument("--out", metavar="FILE", help="PNG to write (default: activation_ITERATION.png in the run)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    args = parser.parse_args()
    check_net_arguments(args)

    from visual_tools.hirescam import draw

    draw(args)


if __name__ == "__main__":
    run_cli(main)
