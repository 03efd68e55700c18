"""Bodies that turn into others (Figure 9), as PNG and as GIF.

The structure code moves in a straight line from the first image's to the last's, in the clothes of every image.

python visual_tools/show_smooth_structure.py --name latest --input ../Market/pytorch --count 4 --steps 9
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import run_cli
from visual_tools import show_smooth


def main() -> None:
    show_smooth.main("structure", "smooth_structure", __doc__)


if __name__ == "__main__":
    run_cli(main)
