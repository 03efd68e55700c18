"""Everything about a run on one page that can be sent by mail.

The page contains its images and needs no network. A section without data names the command that creates them.

python -m visual_tools.report --name latest
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import run_cli
from visual_tools.options import figure_parser


def main() -> None:
    parser = figure_parser(
        __doc__,
        count="images of the swap matrix, 2 to 12 (default: 6, or all there are)",
        out="HTML file to write (default: report.html in the run's folder, replaced)",
        most=12,
    )
    parser.add_argument("--no-retrievals", action="store_true", help="omit the ranked lists")
    args = parser.parse_args()

    from visual_tools.run_page import write_report

    write_report(args)


if __name__ == "__main__":
    run_cli(main)
