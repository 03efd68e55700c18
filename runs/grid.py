"""The painter of image grids with row and column labels, for every figure and for the test pairs of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.images import to_uint8

GAP = 4
WHITE, INK = (255, 255, 255), (40, 40, 40)

# Rows of the figure of test pairs, in the order of `DGNetTrainer.sample`.
PAIR_ROWS = {
    "x_a": "a",
    "x_a_recon": "a again",
    "x_ba": "a's clothes on b",
    "x_aba": "a, cycle",
    "x_b": "b",
    "x_b_recon": "b again",
    "x_ab": "b's clothes on a",
    "x_bab": "b, cycle",
}


def paint_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell_height: int = 128,
) -> np.ndarray:
    """A figure (H, W, 3) uint8 from rows of images (h, w, 3) uint8 of one size; None leaves a cell empty."""
    first = next(image for row in rows for image in row if image is not None)
    cell_width = max(1, round(cell_height * first.shape[1] / first.shape[0]))
    font = column_font = ImageFont.load_default(size=max(11, cell_height // 9))
    if widest := max(map(font.getlength, column_labels), default=0):
        column_font = ImageFont.load_default(size=font.size * min(1, cell_width / widest))
    left = GAP + (max(int(font.getlength(label)) for label in row_labels) + 2 * GAP if row_labels else 0)
    top = GAP + (int(font.size * 1.5) if column_labels else 0)
    columns = max(map(len, rows))
    figure = Image.new("RGB", (left + columns * (cell_width + GAP), top + len(rows) * (cell_height + GAP)), WHITE)
    draw = ImageDraw.Draw(figure)
    for i, label in enumerate(row_labels):
        draw.text((GAP, top + i * (cell_height + GAP) + cell_height / 2), label, INK, font, anchor="lm")
    for j, label in enumerate(column_labels):
        draw.text((left + j * (cell_width + GAP) + cell_width / 2, top / 2), label, INK, column_font, anchor="mm")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                cell = Image.fromarray(image).resize((cell_width, cell_height), Image.Resampling.BICUBIC)
                figure.paste(cell, (left + j * (cell_width + GAP), top + i * (cell_height + GAP)))
    return np.asarray(figure)


def paint_pairs(images: dict[str, Tensor]) -> np.ndarray:
    """The figure (H, W, 3) uint8 of fixed test pairs: inputs, reconstructions, swaps, cycles; a column per pair.

    `images` holds a normalised batch (N, 3, h, w) for every key of PAIR_ROWS.
    """
    rows = [list(to_uint8(images[name])) for name in PAIR_ROWS]
    return paint_grid(rows, row_labels=list(PAIR_ROWS.values()))
