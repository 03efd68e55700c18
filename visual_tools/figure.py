"""What the figure scripts share: options, the choice of images, and files that are never overwritten unasked."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from files import make_folder, write_whole
from utils import UserError, add_machine_arguments

if TYPE_CHECKING:
    import numpy as np

    from data.folders import ImageList
    from runs.swapper import Swapper

AT_MOST = 100  # images or pairs of a figure: it has to be opened
LABEL_LENGTH = 8  # letters that fit above a cell


def add_run_arguments(parser: argparse.ArgumentParser, name: str = "latest") -> None:
    """The options that name a model: a run, one of its snapshots, and what to compute on."""
    parser.add_argument("--name", default=name, help=f"run under outputs/ (default: {name})")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    add_machine_arguments(parser)


def add_figure_arguments(parser: argparse.ArgumentParser, *, count: str, out: str) -> None:
    """The options of every figure. `count` and `out` say what these two mean here and what their defaults are."""
    add_run_arguments(parser)
    parser.add_argument("--input", help="data set or any folder of images (default: the run's data_root)")
    parser.add_argument("--split", help="split of a data set to choose from (default: query)")
    parser.add_argument("--count", type=int, help=count)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    parser.add_argument("--batchsize", type=int, default=32, help="images per pass (default: 32)")
    parser.add_argument("--out", help=out)
    parser.add_argument("--force", action="store_true", help="overwrite what is there under the same name")


def check_arguments(args: argparse.Namespace, *, count: tuple[int, int | None]) -> None:
    """Raise UserError for numbers out of range; `count` is the range of `--count`, None is no end."""
    least, most = count
    if args.count is not None and (args.count < least or (most is not None and args.count > most)):
        between = f"at least {least}" if most is None else f"between {least} and {most}"
        raise UserError(f"--count {args.count}: must be {between}")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be at least 0")
    if args.batchsize < 1:
        raise UserError(f"--batchsize {args.batchsize}: must be at least 1")


# --------------------------------------------------------------------------------------------- images
def input_folder(args: argparse.Namespace, model: Swapper) -> Path:
    """The folder that `--input` names, or the run's data set."""
    from runs.folder import resolve_data_root

    return resolve_data_root(args.input or model.cfg.data_root)


def read_input(args: argparse.Namespace, model: Swapper) -> ImageList:
    """The images that `--input` and `--split` name. Raises UserError where there are fewer than the two of a swap."""
    from data.folders import read_people

    source = input_folder(args, model)
    images = read_people(source, args.split)
    if len(images) < 2:
        raise UserError(f"--input {source}: one image only ({images.paths[0].name}); a swap needs two at least")
    return images


def choose(images: ImageList, count: int, seed: int, *, asked: bool) -> np.ndarray:
    """Ascending indices of `count` images drawn from `seed`; different people as far as there are so many.

    asked  True: raise UserError where there are fewer images. False: take what there is.
    """
    import numpy as np

    if asked and count > len(images):
        where = os.path.commonpath([path.parent for path in images.paths])
        raise UserError(f"{where}: {len(images)} images, {count} asked for; lower --count or add images")
    order = np.random.default_rng(seed).permutation(len(images))
    first = np.unique(images.pids[order], return_index=True)[1]  # of every person the image that was drawn first
    others = np.delete(np.arange(len(order)), first)
    return np.sort(order[np.concatenate([np.sort(first), others])][:count])


def choose_images(images: ImageList, count: int, seed: int, *, asked: bool) -> ImageList:
    """The images that `choose` draws, in the order of `images`."""
    import numpy as np

    return images.select(np.isin(np.arange(len(images)), choose(images, count, seed, asked=asked)))


def labels(images: ImageList) -> list[str]:
    """A short label for every image: the identity, or the end of the file's name where there is none."""
    return [token if len(token) <= LABEL_LENGTH else "…" + token[1 - LABEL_LENGTH :] for token in images.tokens]


def file_names(images: ImageList) -> list[str]:
    """A different name for every image, without ending: the file's own where that is enough."""
    stems = [path.stem for path in images.paths]
    for names in (stems, [f"{token}_{stem}" for token, stem in zip(images.tokens, stems, strict=True)]):
        if len(set(names)) == len(names):
            return names
    return [f"{i:06d}_{stem}" for i, stem in enumerate(stems)]


# ---------------------------------------------------------------------------------------------- files
def new_file(path: Path, *, suffix: str, force: bool) -> Path:
    """`path`, for a file to be written. Raises UserError for another ending, and where it exists without `force`."""
    if path.suffix.lower() != suffix:
        raise UserError(f"--out {path}: must end in {suffix}")
    if path.is_dir() or (path.exists() and not force):
        raise UserError(f"{path} exists; give another --out" + ("" if path.is_dir() else " or --force"))
    return path


def figure_file(args: argparse.Namespace, model: Swapper, figure: str) -> Path:
    """The PNG that `--out` names, or `figure` among the run's images. Raises as `new_file`."""
    path = Path(args.out or model.run.images / f"{figure}_{model.iteration:08d}.png")
    return new_file(path, suffix=".png", force=args.force)


def new_folder(path: Path, *, force: bool) -> Path:
    """`path`, a folder to be filled, made if missing. Raises UserError where it holds anything without `force`."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give another --out")
    if path.is_dir() and not force and os.listdir(path):
        raise UserError(
            f"{path} holds files already; give another --out, or --force to replace those of the same names"
        )
    return make_folder(path)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8 as PNG, whole or not at all. Raises UserError where it cannot be written."""
    from PIL import Image

    make_folder(path.parent)
    write_whole(path, lambda file: Image.fromarray(image).save(file, format="PNG"))


def write_gif(path: Path, frames: Sequence[np.ndarray], *, fps: float) -> None:
    """Write images (H, W, 3) uint8 of one size as a GIF that plays for ever, whole or not at all."""
    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    make_folder(path.parent)
    write_whole(
        path,
        lambda file: first.save(
            file, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0
        ),
    )
