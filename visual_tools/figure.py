"""What the figure scripts share: the choice of images, swaps and interpolations, and files written safely."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.folders import ON, ImageList, identity_in, is_data_set, read_people
from data.images import check_images, iter_images, to_uint8
from data.listing import say_reading
from files import make_folder, write_whole
from runs.folder import find_data, resolve_data_root
from runs.grid import paint_grid
from runs.swapper import Swapper, open_swapper
from utils import UserError

LABEL_LENGTH = 8  # letters that fit above a cell


def open_figure(args: argparse.Namespace, figure: str, suffix: str = ".png") -> tuple[Swapper, Path]:
    """The model that the options name, and the path to write: `--out`, by default `figure` in the run's images.

    suffix  of the file; "" is for a folder
    Raises UserError for a missing or damaged model, and as `check_free`.
    """
    model = open_swapper(args)
    path = Path(args.out or model.run.images / f"{figure}_{model.iteration:08d}{suffix}")
    return model, check_free(path, suffix=suffix, force=args.force)


# --------------------------------------------------------------------------------------------- images
def read_input(args: argparse.Namespace, model: Swapper) -> ImageList:
    """The images that `--input` and `--split` name. Raises UserError for fewer than the two that a swap needs."""
    source = find_data(args.input, "--input", model.cfg.data_root, model.run.config_file)
    images = read_people(source, args.split)
    if len(images) < 2:
        raise UserError(f"--input {source}: one image only ({images.paths[0].name}); a swap needs two at least")
    say_reading({"input": images})
    return images


def choose(images: ImageList, count: int, seed: int) -> np.ndarray:
    """Ascending indices (count,) of images drawn from `seed`, of different people as far as possible.

    Raises UserError if there are fewer than `count` images.
    """
    if count > len(images):
        folder = os.path.commonpath([path.parent for path in images.paths])
        raise UserError(f"{folder}: {len(images)} images, {count} asked for; lower --count or add images")
    order = np.random.default_rng(seed).permutation(len(images))
    first = np.sort(np.unique(images.pids[order], return_index=True)[1])  # the first image drawn of each person
    rest = np.delete(np.arange(len(order)), first)
    return np.sort(order[np.concatenate([first, rest])][:count])


def choose_input(
    args: argparse.Namespace, model: Swapper, count: int, *, group: int = 1, whole_folder: bool = False
) -> ImageList:
    """The images of `read_input` that `--count` and `--seed` choose; without `--count`, at most `count`.

    group         images that one of `--count` stands for
    whole_folder  without `--count`, take all images of a folder that is not a data set
    """
    images = read_input(args, model)
    if whole_folder and not is_data_set(resolve_data_root(args.input or model.cfg.data_root)):
        count = len(images)
    chosen = choose(images, group * (args.count or min(count, len(images) // group)), args.seed)
    return images.select(np.isin(np.arange(len(images)), chosen))


def labels(images: ImageList) -> list[str]:
    """A short label for every image: the identity, or the end of the file's name where there is none."""
    return [token if len(token) <= LABEL_LENGTH else "…" + token[1 - LABEL_LENGTH :] for token in images.tokens]


def file_names(images: ImageList) -> list[str]:
    """A distinct name without suffix for every image: its file's name, with a number in front if two are equal."""
    stems = [path.stem for path in images.paths]
    return stems if len(set(stems)) == len(stems) else [f"{i:06d}_{stem}" for i, stem in enumerate(stems)]


def swap_names(images: ImageList) -> list[str]:
    """As `file_names`, with identity and camera in front where the names alone do not say who is the same person.

    From names joined by `ON`, `data.folders.read_swaps` reads the identities again.
    """
    names, pids = file_names(images), images.pids.tolist()
    in_names = [identity_in(name) for name in names]
    unnamed = not any(ON in name for name in names) and set(in_names) == {None}
    if in_names == pids or (unnamed and len(set(pids)) == len(pids)):
        return names
    return [f"{pid:04d}_c{camid}_{name}" for name, pid, camid in zip(names, pids, images.camids.tolist(), strict=True)]


# -------------------------------------------------------------------------------------- generated images
def swap_matrix(model: Swapper, s: Tensor, f: Tensor, batch_size: int) -> list[list[np.ndarray]]:
    """Every appearance on every structure: `rows[i][j]` (H, W, 3) uint8 has appearance `f[i]` and structure `s[j]`."""
    n = len(s)
    swaps = list(model.compose(f, s, list(product(range(len(f)), range(n))), batch_size))
    return [swaps[i * n : (i + 1) * n] for i in range(len(f))]


def interpolations(
    model: Swapper, s: Tensor, f: Tensor, code: str, steps: int, batch_size: int
) -> tuple[list[str], list[list[np.ndarray]]]:
    """Images between the first and the last image's `code`, which is "appearance" or "structure".

    Returns the share of the way at every step ("0.00" to "1.00") and, for each of the n images, a line of `steps`
    images (H, W, 3) uint8 that keep its other code.
    """

    def between(codes: Tensor) -> Tensor:
        t = torch.linspace(0, 1, steps, device=codes.device).view(-1, *[1] * (codes.dim() - 1))
        return torch.lerp(codes[:1], codes[-1:], t)

    if code == "appearance":
        columns = swap_matrix(model, s, between(f), batch_size)
        lines = [list(line) for line in zip(*columns, strict=True)]
    else:
        lines = swap_matrix(model, between(s), f, batch_size)
    return [f"{t / (steps - 1):.2f}" for t in range(steps)], lines


def draw_interpolation(args: argparse.Namespace, code: str, file: str, count: int) -> None:
    """Write the PNG and the GIF of show_smooth.py: an interpolation of `code`, of `count` images by default.

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
    rows = [[original, *line] for original, line in zip(originals, lines, strict=True)]
    row_labels = [f"{code} of", *(f"{kept} of {who}" for who in labels(images))]
    write_grid(out, [ends, *rows], row_labels=row_labels, column_labels=["", *shares])
    steps = zip(shares, zip(*lines, strict=True), strict=True)
    frames = [
        Image.fromarray(paint_grid([originals, column], row_labels=[f"{kept} of", share])) for share, column in steps
    ]
    options = dict(format="GIF", save_all=True, duration=round(1000 / args.fps), loop=0)
    rest = frames[1:] + frames[-2:0:-1]
    write_whole(film, lambda stream: frames[0].save(stream, append_images=rest, **options))
    print(f"interpolation of the {code} written to {out} and {film}")


def draw_partners(pids: np.ndarray, seed: int) -> np.ndarray:
    """For each of n identities (n,) the index (n,) of an image of another person, all equally likely.

    If all n are the same person, any other image is a partner. Needs n of at least 2.
    """
    if (pids == pids[0]).all():
        pids = np.arange(len(pids))
    by_person = np.argsort(pids, kind="stable")
    start, end = (np.searchsorted(pids[by_person], pids, side) for side in ("left", "right"))
    # Draw among the images of other people, then step over the person's own images.
    place = np.random.default_rng(seed).integers(0, len(pids) - (end - start))
    return by_person[np.where(place >= start, place + end - start, place)]


def write_swaps(model: Swapper, images: ImageList, count: int, seed: int, out: Path, batch_size: int) -> None:
    """Write `count` of the images, chosen from `seed`, in the clothes of random other people into `out`.

    Raises UserError for damaged images before it writes.
    """
    chosen, partners = choose(images, count, seed), draw_partners(images.pids, seed)
    check_images(images.paths, skip_bad=False, remedy="remove them")
    names = swap_names(images)
    appearance, structure = (
        iter_images([images.paths[i] for i in side], *model.size, batch_size) for side in (partners[chosen], chosen)
    )
    swaps = (image for pair in zip(appearance, structure, strict=True) for image in to_uint8(model.swap(*pair)))
    for j, image in zip(tqdm(chosen, "images", leave=False, disable=None), swaps, strict=True):
        write_image(out / f"{names[partners[j]]}{ON}{names[j]}.png", image)


# ---------------------------------------------------------------------------------------------- files
def check_free(path: Path, *, suffix: str, force: bool) -> Path:
    """`path`, to be written: a file that ends in `suffix`, or a folder if that is "".

    Raises UserError for a path of the other kind and, without `force`, for an existing file or a folder with files.
    """
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"--out {path}: must end in {suffix}")
    if path.is_file() if not suffix else path.is_dir():
        raise UserError(f"{path} is a {'folder' if suffix else 'file'}; give another --out")
    if not force and path.exists() and (suffix or any(path.iterdir())):
        raise UserError(f"{path} exists; give another --out, or --force to replace files of the same names")
    return path


def write_image(path: Path, image: np.ndarray) -> Path:
    """Write an image (H, W, 3) uint8 as PNG, whole or not at all. Raises UserError if it cannot be written."""
    make_folder(path.parent)
    return write_whole(path, lambda file: Image.fromarray(image).save(file, format="PNG"))


def write_grid(path: Path, rows: Sequence[Sequence[np.ndarray | None]], **layout: Any) -> Path:
    """Write images in rows as one PNG; `layout` goes to `runs.grid.paint_grid`. Raises as `write_image`."""
    return write_image(path, paint_grid(rows, **layout))
