"""The report's pictures: swaps, interpolations and ranked lists, as images that are their own content."""

from __future__ import annotations

import argparse
import base64
import io
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import Config
from data.folders import have_cameras, read_split
from data.images import load_image
from reid_eval.features import Features, extract_data_set, load_features
from reid_eval.report import rankings
from reid_eval.top import first_entries, main_setting
from runs.folder import RunFolder, resolve_data_root
from runs.load import load_run_for_test, load_teacher_for_test
from runs.swapper import Swapper
from utils import UserError, pick_device
from visual_tools.figure import choose_images, labels, read_input
from visual_tools.rank_figure import choose_queries, entry_caption
from visual_tools.smooth import interpolate

STEPS, LISTS = 7, 4  # points of an interpolation; retrievals of each kind
HEIGHT = 192  # pixels of an image of a ranked list, at most


class Picture(NamedTuple):
    """An image within the page and what it shows; `mark` as in `page.Hit`."""

    src: str
    caption: str
    mark: str = ""


def data_uri(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as the address of a JPEG that is its own content."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Matrix:
    """N originals and the N x N swaps: `rows[i][j]` has the clothes of i on the person of j."""

    originals: list[Picture]
    rows: list[list[Picture]]


@dataclass(frozen=True)
class Strip:
    """A line of images between two codes, after the image whose other code all of it has."""

    kept: Picture
    points: list[Picture]


def draw_pictures(model: Swapper, args: argparse.Namespace, count: int) -> tuple[Matrix, dict[str, list[Strip]]]:
    """The swap matrix and the interpolations of appearance and of structure, of the images that `args` choose: of
    `count` where they do not say how many."""
    images = choose_images(read_input(args, model), args.count or count, args.seed, asked=args.count is not None)
    originals, s, f = model.read(images.paths, args.batchsize)
    n, people = len(originals), labels(images)
    drawn = [data_uri(image) for image in model.compose(f, s, list(product(range(n), range(n))), args.batchsize)]
    border = [Picture(data_uri(image), who) for image, who in zip(originals, people, strict=True)]
    rows = [
        [Picture(drawn[i * n + j], f"clothes of {people[i]}, pose and body of {people[j]}") for j in range(n)]
        for i in range(n)
    ]
    strips: dict[str, list[Strip]] = {}
    shown = [0, n - 1] if n > 2 else [0]
    for code in ("appearance", "structure"):
        clothes, poses = f, s
        if code == "appearance":
            clothes = interpolate(f[0], f[-1], STEPS)
        else:
            poses = interpolate(s[0], s[-1], STEPS)
        for k in shown:
            pairs = [(t, k) if code == "appearance" else (k, t) for t in range(STEPS)]
            points = [
                Picture(data_uri(image), f"{t / (STEPS - 1):.2f}")
                for t, image in enumerate(model.compose(clothes, poses, pairs, args.batchsize))
            ]
            strips.setdefault(code, []).append(Strip(border[k], points))
    return Matrix(border, rows), strips


@dataclass(frozen=True)
class RankedList:
    """A query, and the first entries of its list."""

    kind: str
    caption: str
    query: Picture
    hits: list[Picture]


def ranked_lists(query: Features, gallery: Features) -> tuple[str, list[RankedList]]:
    """The worst and the best queries by `standard` AP, and which score ranks them. Raises as `rank`."""
    setting, _ = main_setting(query.features.shape[1])
    cameras = have_cameras(query, gallery)
    ranking = rankings(query, gallery, remove_same_camera=cameras)["single query"][setting]["standard"]
    chosen = [(kind, i) for kind, i in choose_queries(ranking, LISTS) if kind != "random"]
    lists = first_entries(query, gallery, remove_same_camera=cameras)
    return setting, [
        RankedList(
            kind,
            f"identity {query.pids[i]}, camera {query.camids[i]}: AP {100 * ranking.ap[i]:.1f} %, first match at rank "
            f"{ranking.first[i]}",
            Picture(thumbnail(query.paths[i]), "query"),
            [Picture(thumbnail(gallery.paths[e.index]), entry_caption(e), e.mark) for e in lists[i]],
        )
        for kind, i in chosen
    ]


def thumbnail(path: str) -> str:
    image = load_image(path)
    image.thumbnail((4 * HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    return data_uri(np.asarray(image))


def read_features(path: str, data_root: Path) -> tuple[Features, Features]:
    """Query and gallery of a feature file, with the images of `data_root` that they belong to."""
    file, sides = load_features(path), []
    for split, side in (("query", file.query), ("gallery", file.gallery)):
        paths = {image.name: str(image) for image in read_split(data_root, split).paths}
        if side.keys is None or not set(side.keys.tolist()) <= paths.keys():
            raise UserError(
                f"--features {path}: its {split} images are not those of {data_root}; give the file that "
                "test.py --save-features wrote for this data set"
            )
        sides.append(replace(side, paths=np.array([paths[key] for key in side.keys.tolist()])))
    return sides[0], sides[1]


def retrievals(
    args: argparse.Namespace, run: RunFolder, cfg: Config, model: Swapper | None
) -> tuple[str, list[RankedList]]:
    """`ranked_lists` of the run's test images. Raises UserError where there is no model or no data."""
    root, device = resolve_data_root(cfg.data_root), pick_device(args.device)
    if args.features:
        return ranked_lists(*read_features(args.features, root))
    if model is not None:
        net, size = model.id_net, model.size
    else:
        teacher = cfg.task == "teacher"
        tested = load_teacher_for_test(run, device) if teacher else load_run_for_test(run, args.which_epoch, device)
        net, size = tested.net, tested.size
    sides = extract_data_set(net, root, size=size, batch_size=args.batchsize, device=device)
    return ranked_lists(sides.query, sides.gallery)
