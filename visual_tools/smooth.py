"""The figure and the film of show_smooth.py and show_smooth_structure.py."""

from __future__ import annotations

import argparse

from runs.grid import paint_grid
from visual_tools.figure import (
    check_free,
    choose_input,
    interpolations,
    labels,
    open_figure,
    write_gif,
    write_grid,
)


def draw(args: argparse.Namespace, code: str, file: str, count: int) -> None:
    """Write the PNG and the GIF of an interpolation of `code`, of `count` images by default.

    The PNG has a row per image, which keeps its other code; the two ends are on top. The GIF shows the same images, a
    step per frame, there and back.
    """
    model, out = open_figure(args, file)
    film = check_free(out.with_suffix(".gif"), suffix=".gif", force=args.force)
    images = choose_input(args, model, count)
    originals, s, f = model.read(images.paths, args.batchsize)
    shares, lines = interpolations(model, s, f, code, args.steps, args.batchsize)
    kept = "structure" if code == "appearance" else "clothes"
    ends = [None, originals[0], *[None] * (args.steps - 2), originals[-1]]
    write_grid(
        out,
        [ends, *([original, *line] for original, line in zip(originals, lines, strict=True))],
        row_labels=[f"{code} of", *(f"{kept} of {who}" for who in labels(images))],
        column_labels=["", *shares],
    )
    frames = [
        paint_grid([originals, [line[t] for line in lines]], row_labels=[f"{kept} of", share])
        for t, share in enumerate(shares)
    ]
    write_gif(film, frames + frames[-2:0:-1], fps=args.fps)
    print(f"interpolation of the {code} written to {out} and {film}")
