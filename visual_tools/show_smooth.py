"""Clothes that turn into others (Figure 5), as PNG and as GIF.

The appearance code moves in a straight line from the first image's to the last's, on the body of every image.

python visual_tools/show_smooth.py --name latest --input ../Market/pytorch --count 4 --steps 9
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import between, run_cli
from visual_tools.options import AT_MOST, figure_parser


def main(code: str = "appearance", file: str = "smooth", description: str | None = __doc__) -> None:
    """The figure of `code`, which is "appearance" or "structure"; `file` is the stem of the default file."""
    parser = figure_parser(
        description,
        count="images: the first, the last and those between (default: 4, or all there are)",
        out=f"PNG to write, with the GIF beside it (default: the run's images/{file}_ITERATION.png)",
    )
    parser.add_argument("--steps", type=between(2, AT_MOST), default=9, help="codes, both ends included (default: 9)")
    parser.add_argument(
        "--fps", type=between(0.1, 50, float), default=8, help="codes per second in the GIF (default: 8)"
    )
    args = parser.parse_args()

    from visual_tools.figure import draw_interpolation

    draw_interpolation(args, code, file, 4)


if __name__ == "__main__":
    run_cli(main)
