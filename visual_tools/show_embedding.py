"""A map of the embedding on one page: images with similar features lie close together (t-SNE).

python visual_tools/show_embedding.py --name latest          # reads the reid.npz that test.py has written
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import between, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--name", default="latest", help="run under outputs/ (default: latest)")
    source.add_argument("--teacher", metavar="NAME", help="a teacher under models/ instead of a run")
    source.add_argument("--features", metavar="FILE", help="another feature file, such as reid-OTHER.npz of test.py")
    parser.add_argument("--output_path", help="folder of outputs/, models/ and logs/ (default: the project's)")
    parser.add_argument("--count", type=between(4), default=10_000, help="images at most (default: 10000)")
    parser.add_argument("--perplexity", type=between(1, kind=float), help="neighbours of an image (default: 30)")
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0, help="of the choice and the map (default: 0)")
    parser.add_argument("--threads", type=between(1), help="CPU threads, on which the map depends too (default: all)")
    parser.add_argument("--out", help="HTML file to write (default: embedding.html beside the features)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    args = parser.parse_args()

    from visual_tools.embedding import draw_map

    draw_map(args)


if __name__ == "__main__":
    run_cli(main)
