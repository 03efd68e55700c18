"""Linear interpolation between two appearance codes (Figure 5), as PNG and as GIF.

python visual_tools/show_smooth.py --name latest --input ../Market/pytorch --count 4 --steps 9
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import run_cli
from visual_tools.smooth import draw, parse_args

DESCRIPTION = (
    "Clothes that turn into others: the appearance code goes in a straight line from the first image's to the last's,"
    " on the body of every image. PNG and GIF."
)


def main() -> None:
    draw(parse_args(DESCRIPTION, "smooth"), code="appearance", file="smooth")


if __name__ == "__main__":
    run_cli(main)
