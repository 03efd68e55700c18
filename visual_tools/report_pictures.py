"""The pictures of a run's report, as images that are part of the page."""

from __future__ import annotations

import argparse
import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.images import load_image
from files import read_json
from runs.swapper import Swapper
from visual_tools.figure import choose_input, interpolations, labels, swap_matrix
from visual_tools.report_tables import read_from

COUNT, STEPS = 6, 7  # images of the swap matrix by default; points of an interpolation
LISTS, HEIGHT = 4, 192  # ranked lists of each kind; pixels of their images at most


class Picture(NamedTuple):
    """An image within the page and what it shows; `mark` as in `page.Hit`."""

    src: str
    caption: str
    mark: str = ""


def data_uri(content: bytes, kind: str) -> str:
    """The address of an image of MIME type `image/kind` that is its own content."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as the address of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return data_uri(buffer.getvalue(), "jpeg")


def thumbnail(path: str) -> str:
    """An image file, at most HEIGHT pixels high, as the address of a JPEG."""
    image = load_image(path)
    image.thumbnail((4 * HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    return jpeg(np.asarray(image))


@dataclass(frozen=True)
class Swaps:
    """N originals and their N x N swaps: `rows[i][j]` has the clothes of i on the person of j.

    `strips` holds, for "appearance" and "structure", pairs of an original and a line of images between two codes that
    keep its other code.
    """

    originals: list[Picture]
    rows: list[list[Picture]]
    strips: dict[str, list[tuple[Picture, list[Picture]]]]


def draw_swaps(model: Swapper, args: argparse.Namespace) -> Swaps:
    """The swap matrix and interpolations of the images that the options choose. Raises UserError without images."""
    images = choose_input(args, model, COUNT)
    originals, s, f = model.read(images.paths, args.batchsize)
    people = labels(images)
    border = [Picture(jpeg(image), who) for image, who in zip(originals, people, strict=True)]
    rows = [
        [
            Picture(jpeg(swap), f"clothes of {clothes}, pose and body of {who}")
            for who, swap in zip(people, row, strict=True)
        ]
        for clothes, row in zip(people, swap_matrix(model, s, f, args.batchsize), strict=True)
    ]
    strips = {}
    for code in ("appearance", "structure"):
        shares, lines = interpolations(model, s[[0, -1]], f[[0, -1]], code, STEPS, args.batchsize)
        points = [[Picture(jpeg(image), share) for image, share in zip(line, shares, strict=True)] for line in lines]
        strips[code] = list(zip([border[0], border[-1]], points, strict=True))
    return Swaps(border, rows, strips)


@dataclass(frozen=True)
class RankedLists:
    """Queries with the beginnings of their lists, as (caption, query, hits) by "best" and "worst"."""

    setting: str
    legend: str
    kinds: dict[str, list[tuple[str, Picture, list[Picture]]]]


def read_lists(folder: Path) -> RankedLists | None:
    """The best and worst retrievals in `rank_lists.json` of `folder`; None without that file.

    Raises UserError for a damaged file and for images that are gone.
    """
    path = folder / "rank_lists.json"
    if not path.exists():
        return None
    content = read_json(path, "create it again")
    kinds: dict[str, list[tuple[str, Picture, list[Picture]]]] = {"best": [], "worst": []}
    with read_from(path):
        for query in content["lists"]:
            shown = kinds.get(query["kind"], [])
            if query["kind"] in kinds and len(shown) < LISTS:
                hits = [Picture(thumbnail(hit["path"]), hit["caption"], hit["mark"]) for hit in query["hits"]]
                shown.append((query["caption"], Picture(thumbnail(query["path"]), "query"), hits))
        return RankedLists(content["setting"], content["legend"], kinds)
