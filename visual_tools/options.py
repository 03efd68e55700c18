"""The options that the figure scripts share. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse

from utils import add_run_arguments, between

AT_MOST = 100  # images, pairs or steps of a figure: it has to be opened


def figure_parser(
    description: str | None, *, count: str, out: str, least: int = 2, most: int | None = AT_MOST
) -> argparse.ArgumentParser:
    """A parser with the options of every figure.

    description  printed as it is, usually the docstring of the script
    count, out   help of these two options, which says what they mean here and what their defaults are
    least, most  the range of `--count`
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--input", help="data set or any folder of images (default: the run's data_root)")
    parser.add_argument("--split", help="split of a data set to choose from (default: query)")
    parser.add_argument("--count", type=between(least, most), help=count)
    parser.add_argument("--seed", type=between(0), default=0, help="of the choice of images (default: 0)")
    parser.add_argument("--batchsize", type=between(1), default=32, help="images per pass (default: 32)")
    parser.add_argument("--out", help=out)
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser
