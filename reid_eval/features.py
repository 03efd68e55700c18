"""Test-time features of the id net, and the files that keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.folders import read_split
from data.images import iter_images
from files import check_zip, make_folder, write_whole
from parallel.collectives import gather, rank, world_size
from precision import autocast, pick_precision
from reid_eval.exported import ExportedNet
from reid_eval.ranking import check_finite
from utils import UserError, evaluating, halve_until_it_fits, one_line

HEAD_DIM = 512  # of a head in the files of the release
GROWTH = 100  # how many times its size a feature file may unpack to; features themselves hardly shrink
# Images per pass, each with its mirror. A larger pass is no faster on a CPU; a GPU may need a smaller one.
CPU_BATCH, GPU_BATCH = 32, 512
PARTS = ("f", "label", "cam", "key", "path")  # the fields of Features in the names of a file's arrays


@dataclass(frozen=True)
class Features:
    """Features of n images, (n, heads, dim) float32, every head of length 1; and their (n,) labels."""

    features: np.ndarray
    pids: np.ndarray  # identity; -1 junk, 0 distractor
    camids: np.ndarray
    keys: np.ndarray | None = None  # names of the images, which tell a query from its copy in the gallery
    paths: np.ndarray | None = None  # the image files, as strings

    def __len__(self) -> int:
        return len(self.features)

    def select(self, keep: np.ndarray) -> Features:
        """The images that a mask or indices choose."""
        return Features(*(part if part is None else part[keep] for part in vars(self).values()))


class FeatureFile(NamedTuple):
    """Features of a data set; `multi` are the multi-query images."""

    query: Features
    gallery: Features
    multi: Features | None = None


def embed_images(net: nn.Module | ExportedNet, x: Tensor, precision: str = "fp32") -> Tensor:
    """Features (N, heads, dim) of a batch of normalised images (N, 3, H, W), in the dtype of `x`.

    For each head: L2-normalise the features of the image and of its mirror, add them, normalise again. Images and
    mirrors pass the net together, in `precision`, without gradients and in eval mode, in which they do not affect each
    other. Afterwards every module of the net is in the mode it was in. An exported net does all of this itself.
    """
    if isinstance(net, ExportedNet):
        return net(x)
    with torch.inference_mode(), evaluating(net):
        both = torch.cat([x, x.flip(-1)])
        if x.device.type == "cpu" or precision != "fp32":
            both = both.contiguous(memory_format=torch.channels_last)
        with autocast(x.device, precision):
            both = torch.stack(net.embed(both), dim=1)
        image, mirror = F.normalize(both.to(x.dtype), dim=-1).chunk(2)
        return F.normalize(image + mirror, dim=-1)


def extract_features(
    net: nn.Module | ExportedNet,
    paths: Sequence[Path | str],
    *,
    height: int,
    width: int,
    batch_size: int | None,
    device: torch.device | str,
    precision: str = "fp32",
    progress: bool = True,
) -> np.ndarray:
    """Features (n, heads, dim) float32 of the images in `paths`, in their order; (0, 1, 0) for an empty list.

    Several processes share the batches, and each returns all features. The batches are those of a single process, so
    the features are equal to the bit.

    net            module with `embed(x) -> tuple of (N, dim)`, one per head, already on `device`
    height, width  size in pixels at which the images are read
    batch_size     images per pass; None: 32 on a CPU; on a GPU 512, halved until a pass fits in its memory
    precision      of the net, "fp32", "bf16", "fp16" or "auto" (`precision.pick_precision`)
    progress       show a progress bar on stderr if it is a terminal

    Raises UserError for an image that cannot be read, a batch that does not fit, and fp16 on a CPU.
    """
    device = torch.device(device)
    precision = pick_precision(device, precision)
    most = size = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    starts = range(0, len(paths), most)[rank() :: world_size()]
    share = [path for start in starts for path in paths[start : start + most]]
    parts = []

    def embed(size: int) -> np.ndarray:
        return np.concatenate([embed_images(net, p, precision).float().cpu().numpy() for p in x.split(size)])

    with tqdm(total=len(share), desc="features", unit="img", disable=None if progress and rank() == 0 else True) as bar:
        for x in iter_images(share, height, width, most, device=device):
            features, size = halve_until_it_fits(embed, size, least=batch_size or 1)
            parts.append(features)
            bar.update(len(x))
    shares = gather(parts)
    parts = [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]
    return np.concatenate(parts) if parts else np.empty((0, 1, 0), np.float32)


def extract_data_set(
    net: nn.Module | ExportedNet, data_root: Path | str, *, size: tuple[int, int], multi: bool = False, **how: Any
) -> FeatureFile:
    """Features of a data set's query and gallery, and of its multi-query images if `multi`.

    `size` is (height, width); `how` as in `extract_features`. Raises UserError for missing folders and for image names
    without identity and camera.
    """

    def side(split: str) -> Features:
        images = read_split(data_root, split)
        features = extract_features(net, images.paths, height=size[0], width=size[1], **how)
        keys, paths = np.array([path.name for path in images.paths]), np.array(list(map(str, images.paths)))
        return Features(features, images.pids, images.camids, keys, paths)

    return FeatureFile(side("query"), side("gallery"), side("multi-query") if multi else None)


# ------------------------------------------------------------------------------------------ feature files
def check_feature_file(path: Path | str) -> None:
    """Raise UserError if the name of a feature file has another ending, or its parent is not a folder."""
    if Path(path).suffix not in (".npz", ".mat"):
        raise UserError(f"{path}: feature files end in .npz or .mat")
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is not a folder; give another file")


def save_features(
    path: Path | str, query: Features, gallery: Features, multi: Features | None = None, **more: np.ndarray
) -> list[Path]:
    """Write a feature file and return the written paths; each file is replaced whole or not at all.

    `.npz` holds everything in one file, with the arrays `more`. `.mat` is the release's `pytorch_result.mat`, and the
    multi-query images go to `multi_query.mat` beside it; there the heads lie side by side, (n, heads * dim), labels are
    (1, n), and the number of `heads` and the names of the images are added. Raises UserError for another ending and a
    folder that cannot be written.
    """
    check_feature_file(path)
    path = Path(path)
    make_folder(path.parent)
    if path.suffix == ".npz":
        arrays = _arrays("query", query) | _arrays("gallery", gallery) | _arrays("mquery", multi) | more
        return [write_whole(path, lambda file: np.savez(file, **arrays))]
    from scipy.io import savemat

    def flat(prefix: str, side: Features) -> dict[str, np.ndarray]:
        arrays = _arrays(prefix, replace(side, features=side.features.reshape(len(side), -1), paths=None))
        return arrays | {"heads": np.array(side.features.shape[1])}

    contents = {path: flat("gallery", gallery) | flat("query", query)}
    if multi is not None:
        contents[path.with_name("multi_query.mat")] = flat("mquery", multi)
    return [write_whole(file, partial(savemat, mdict=content)) for file, content in contents.items()]


def _arrays(prefix: str, side: Features | None) -> dict[str, np.ndarray]:
    """The arrays of one side, by their names in a feature file."""
    arrays = {} if side is None else dict(zip(PARTS, vars(side).values(), strict=True))
    return {f"{prefix}_{part}": values for part, values in arrays.items() if values is not None}


def load_features(path: Path | str, *, multi: bool = False) -> FeatureFile:
    """Read an `.npz` feature file; with `multi` the multi-query images too.

    A file of the release, converted to `.npz`, does not say how many heads it holds: a row whose length is a multiple
    of 512 is split into heads of 512, any other row is one head.

    Raises UserError for a file that is missing or of another kind, parts that are missing or do not fit together,
    identities or cameras that are not whole numbers, and features that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python test.py --multi --save-features FILE` writes one")
    if path.suffix == ".mat":
        convert = f"numpy.savez('{path.stem}.npz', **scipy.io.loadmat('{path.name}'))"
        raise UserError(f'{path}: convert it with `python -c "import numpy, scipy.io; {convert}"`; .npz files are read')
    arrays = _read(path)
    prefixes = ("query", "gallery", "mquery") if multi else ("query", "gallery")
    sides = [_side(arrays, prefix, path) for prefix in prefixes]
    expected = sides[0].features.shape[1:]
    for side, prefix in zip(sides, prefixes, strict=True):
        if side.features.shape[1:] != expected:
            raise UserError(
                f"{path}: {prefix}_f has {side.features.shape[1:]} numbers per image "
                f"(heads, dim) but query_f has {expected}; extract all with the same model"
            )
    return FeatureFile(*sides)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        check_zip(path, growth=GROWTH)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # zipfile, zlib, struct, ...: every kind of damage has its exception
        raise UserError(
            f"{path}: not a readable feature file ({one_line(error)}); give a .npz that test.py has written"
        ) from None


def _side(arrays: dict[str, np.ndarray], prefix: str, path: Path) -> Features:
    """The checked features of one side, whose arrays are called `prefix`_f, `prefix`_label and so on."""
    features, pids, camids, keys, paths = (arrays.get(f"{prefix}_{part}") for part in PARTS)
    if features is None or pids is None or camids is None:
        raise UserError(f"{path}: lacks {prefix}_f, {prefix}_label or {prefix}_cam; extract the features again")
    if features.dtype.kind not in "fiu" or features.ndim not in (2, 3) or 0 in features.shape:
        raise UserError(f"{path}: {prefix}_f is not a table of numbers (images x features), or it is empty")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        features = np.asarray(features, dtype=np.float32)
    check_finite(features, f"{path}: {prefix}_f")
    if features.ndim == 2:
        n, width = features.shape
        heads = width // HEAD_DIM if width % HEAD_DIM == 0 else 1
        if "heads" in arrays:
            heads = int(next(iter(_whole_numbers(arrays["heads"], "heads", path)), 0))
        if heads < 1 or width % heads:
            raise UserError(f"{path}: {prefix}_f has {width} numbers per image, which are not {heads} heads")
        features = features.reshape(n, heads, -1)
    pids, camids = _whole_numbers(pids, f"{prefix}_label", path), _whole_numbers(camids, f"{prefix}_cam", path)
    for part, values in (("label", pids), ("cam", camids), ("key", keys)):
        if values is not None and values.shape != (len(features),):
            raise UserError(f"{path}: {prefix}_{part} has shape {values.shape} for {len(features)} rows of {prefix}_f")
    if keys is not None:
        if keys.dtype.kind != "U":
            raise UserError(f"{path}: {prefix}_key does not hold names")
        keys = np.char.rstrip(keys)  # one that was a .mat is filled up with spaces
    return Features(features, pids, camids, keys, paths)


def _whole_numbers(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise UserError(f"{path}: {name} holds values that are not whole numbers")
    return np.ravel(values).astype(np.int64)
