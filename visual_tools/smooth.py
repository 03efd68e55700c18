"""Interpolation between two codes, the one thing that show_smooth.py and show_smooth_structure.py do."""

from __future__ import annotations

import argparse
from itertools import product
from typing import TYPE_CHECKING

from utils import UserError
from visual_tools.figure import AT_MOST, add_figure_arguments, check_arguments

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from runs.swapper import Swapper

COUNT = 4


def parse_args(description: str, file: str) -> argparse.Namespace:
    """The options of either script; `file` is how the default file is called."""
    parser = argparse.ArgumentParser(description=description)
    add_figure_arguments(
        parser,
        count=f"images: the first, the last and those between (default: {COUNT}, or all there are)",
        out=f"PNG to write, the GIF goes beside it (default: the run's images/{file}_ITERATION.png)",
    )
    parser.add_argument("--steps", type=int, default=9, help="points from end to end, both counted (default: 9)")
    parser.add_argument("--fps", type=float, default=8, help="points per second of the GIF (default: 8)")
    args = parser.parse_args()
    check_arguments(args, count=(2, AT_MOST))
    if not 2 <= args.steps <= AT_MOST:
        raise UserError(f"--steps {args.steps}: must be between 2 and {AT_MOST}")
    if not 0.1 <= args.fps <= 50:
        raise UserError(f"--fps {args.fps:g}: must be between 0.1 and 50, what GIF players can do")
    return args


def interpolate(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """`steps` codes on the line from `first` to `last`, both included: (steps, *shape of a code)."""
    import torch

    t = torch.linspace(0, 1, steps, device=first.device).view(-1, *[1] * first.dim())
    return torch.lerp(first[None], last[None], t)


def paint(model: Swapper, args: argparse.Namespace, *, code: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The figure and the frames, there and back, of the interpolation of `code`: appearance or structure.

    A row of the figure per image, with that image's other code; the ends of the line stand on top.
    """
    from runs.grid import paint_grid
    from visual_tools.figure import choose_images, labels, read_input

    images = choose_images(read_input(args, model), args.count or COUNT, args.seed, asked=args.count is not None)
    originals, s, f = model.read(images.paths, args.batchsize)
    n, steps = len(originals), args.steps
    if code == "appearance":
        f = interpolate(f[0], f[-1], steps)
        pairs = [(t, j) for j, t in product(range(n), range(steps))]
    else:
        s = interpolate(s[0], s[-1], steps)
        pairs = [(i, t) for i, t in product(range(n), range(steps))]
    drawn = list(model.compose(f, s, pairs, args.batchsize))
    lines = [drawn[k * steps : (k + 1) * steps] for k in range(n)]  # a line of points per image
    shares, people = [f"{t / (steps - 1):.2f}" for t in range(steps)], labels(images)
    kept = "structure" if code == "appearance" else "clothes"
    ends = [None, originals[0], *[None] * (steps - 2), originals[-1]]
    figure = paint_grid(
        [ends, *([original, *line] for original, line in zip(originals, lines, strict=True))],
        row_labels=[f"{code} of", *(f"{kept} of {who}" for who in people)],
        column_labels=["", *shares],
    )
    frames = [
        paint_grid([list(originals), [line[t] for line in lines]], row_labels=[f"{kept} of", share])
        for t, share in enumerate(shares)
    ]
    return figure, frames + frames[-2:0:-1]


def draw(args: argparse.Namespace, *, code: str, file: str) -> None:
    """What the scripts do once they have their options: PNG and GIF, neither over an existing file unasked."""
    from runs.swapper import open_swapper
    from visual_tools.figure import figure_file, new_file, write_gif, write_image

    model = open_swapper(args)
    out = figure_file(args, model, file)
    film = new_file(out.with_suffix(".gif"), suffix=".gif", force=args.force)
    figure, frames = paint(model, args, code=code)
    write_image(out, figure)
    write_gif(film, frames, fps=args.fps)
    print(f"interpolation of the {code} written to {out} and {film}")
