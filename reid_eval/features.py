"""Test-time features of the id net (spec section 9) and the files that keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.folders import read_split
from files import check_zip, make_folder, write_whole
from utils import UserError, evaluating, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

HEAD_DIM = 512  # of one head in the release's .mat files
GROWTH = 100  # times its size that a feature file may unpack to; features themselves hardly shrink
# Images per pass, each with its mirror. On a CPU more are no faster; a GPU may have to do with less.
CPU_BATCH, GPU_BATCH = 32, 512
_PARTS = {"query": "query", "gallery": "gallery", "multi": "mquery"}  # FeatureFile's field, prefix in the files


@dataclass(frozen=True)
class Features:
    """Features of n images: (n, heads, dim) float32, every head of length 1, and their (n,) labels."""

    features: np.ndarray
    pids: np.ndarray  # identity; -1 junk, 0 distractor
    camids: np.ndarray
    keys: np.ndarray | None = None  # names of the images, to tell a query from its own copy in the gallery
    paths: np.ndarray | None = None  # the images' files, as strings; feature files do not keep them

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class FeatureFile:
    """What a feature file holds; `multi` are the multi-query images."""

    query: Features
    gallery: Features
    multi: Features | None = None


def embed_images(net: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    """Features (N, heads, dim) of a batch of normalised images (N, 3, H, W), in x's dtype (section 9).

    Per head: L2-normalise for the image and for its mirror, add, normalise again. Images and mirrors go through the
    net together, in `precision`: it runs in eval mode, where they do not see each other, without gradients, and is left
    in the modes it had.
    """
    import torch
    from torch.nn import functional as F

    from precision import autocast

    with torch.inference_mode(), evaluating(net):
        both = torch.cat([x, x.flip(-1)])
        if x.device.type == "cpu" or precision != "fp32":
            both = both.contiguous(memory_format=torch.channels_last)
        with autocast(x.device, precision):
            both = torch.stack(net.embed(both), dim=1)
        image, mirror = F.normalize(both.to(x.dtype), dim=-1).chunk(2)
        return F.normalize(image + mirror, dim=-1)


def extract_features(
    net: nn.Module,
    paths: Sequence[Path | str],
    *,
    height: int,
    width: int,
    batch_size: int | None,
    device: torch.device | str,
    precision: str = "fp32",
    num_workers: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Features (n, heads, dim) float32 of the images in `paths`, in their order.

    Several processes share the batches and all return the whole; the batches are those of one process, and so are
    the features, to the bit.

    Args:
        net: module with `embed(x) -> tuple of (N, dim)`, one per head, already on `device`.
        paths: image files; none gives an empty (0, 1, 0) array.
        height, width: size the images are read at, in pixels.
        batch_size: images per pass. None: 32 on a CPU, and on a GPU as many as fit in its memory, at most 512; they are
            found by halving.
        precision: of the net, "fp32", "bf16", "fp16" or "auto" (`precision.pick_precision`).
        progress: a progress bar on stderr, where that is a terminal.

    Raises:
        UserError: an image that cannot be read; a batch that does not fit; fp16 on a CPU.
    """
    import torch
    from tqdm import tqdm

    from data.images import iter_images
    from parallel.collectives import gather, rank, world_size
    from precision import pick_precision

    device = torch.device(device)
    precision = pick_precision(device, precision)
    most = fitting = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    starts = range(0, len(paths), max(1, most))[rank() :: world_size()]
    own = [path for start in starts for path in paths[start : start + most]]
    parts = []
    with tqdm(total=len(own), desc="features", unit="img", disable=None if progress and rank() == 0 else True) as bar:
        for x in iter_images(own, height, width, most, num_workers=num_workers, device=device):
            while (features := _embed_in_parts(net, x, fitting, precision)) is None:
                if fitting == 1 or batch_size is not None:
                    raise UserError(
                        f"--batchsize {fitting}: the GPU's memory is too small; use a smaller one, auto or --device cpu"
                    )
                fitting //= 2
                torch.cuda.empty_cache()
            parts.append(features)
            bar.update(len(x))
    shares = gather(parts)
    parts = [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]
    return np.concatenate(parts) if parts else np.empty((0, 1, 0), np.float32)


def _embed_in_parts(net: nn.Module, x: Tensor, size: int, precision: str) -> np.ndarray | None:
    """`embed_images` of at most `size` images at a time, as an array; None where the GPU's memory is too small."""
    import torch

    try:
        return np.concatenate([embed_images(net, part, precision).float().cpu().numpy() for part in x.split(size)])
    except torch.OutOfMemoryError:
        return None


def check_feature_file(path: Path | str) -> None:
    """Raise UserError for a name that `save_features` has no format for, or in what is no folder."""
    if Path(path).suffix not in (".npz", ".mat"):
        raise UserError(f"{path}: feature files end in .npz or .mat")
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is no folder; give another file")


def save_features(path: Path | str, query: Features, gallery: Features, multi: Features | None = None) -> list[Path]:
    """Write a feature file and return what was written; each file is replaced whole or not at all.

    `.npz` holds everything in one file. `.mat` is the release's `pytorch_result.mat`, and the multi-query
    images go to `multi_query.mat` beside it; the heads lie side by side, (n, heads * dim), labels (1, n). To the
    release's names `heads`, their number, and the images' names are added.

    Raises:
        UserError: another ending, or a folder that cannot be written.
    """
    check_feature_file(path)
    path = Path(path)
    make_folder(path.parent)
    sides = {"query": query, "gallery": gallery} | ({} if multi is None else {"multi": multi})
    if path.suffix == ".npz":
        arrays: dict[str, np.ndarray] = {}
        for field, side in sides.items():
            arrays |= _arrays(field, side, side.features)
        return [write_whole(path, lambda file: np.savez(file, **arrays))]
    from scipy.io import savemat

    flat = {f: _arrays(f, side, side.features.reshape(len(side), -1)) for f, side in sides.items()}
    for arrays in flat.values():
        arrays["heads"] = np.array(query.features.shape[1])
    written = [write_whole(path, lambda file: savemat(file, flat["gallery"] | flat["query"]))]
    if multi is not None:
        second = path.with_name("multi_query.mat")
        written.append(write_whole(second, lambda file: savemat(file, flat["multi"])))
    return written


def load_features(path: Path | str, *, multi: bool = False) -> FeatureFile:
    """Read a feature file, one of ours or of the release's scripts.

    A `.mat` of the release does not say how many heads it holds: a row of a multiple of 512 numbers is split
    into heads of 512, any other is one head. With `multi` the multi-query images are read too, for a `.mat`
    from `multi_query.mat` beside it.

    Raises:
        UserError: a file that is missing or of another kind, parts that are missing or do not fit together,
            identities or cameras that are not whole numbers, features that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; `python test.py --save-features FILE` writes one")
    arrays, source = _read(path), dict.fromkeys(_PARTS, path)
    if multi and path.suffix != ".npz":
        source["multi"] = path.with_name("multi_query.mat")
        if not source["multi"].is_file():
            raise UserError(f"{source['multi']}: no such file; it holds the multi-query features of {path.name}")
        arrays |= _read(source["multi"])
    found = {field: _side(arrays, field, source[field]) for field in (_PARTS if multi else ("query", "gallery"))}
    query = found["query"]
    for field, side in found.items():
        if len(side) and len(query) and side.features.shape[1:] != query.features.shape[1:]:
            raise UserError(
                f"{source[field]}: {_PARTS[field]}_f has {_dims(side)} numbers per image but query_f has "
                f"{_dims(query)}; extract all with the same model"
            )
    return FeatureFile(**found)


def without_junk(side: Features) -> Features:
    """The images whose identity is not -1."""
    keep = side.pids != -1
    if keep.all():
        return side
    keys, paths = (None if values is None else values[keep] for values in (side.keys, side.paths))
    return Features(side.features[keep], side.pids[keep], side.camids[keep], keys, paths)


def _dims(side: Features) -> str:
    return " x ".join(map(str, side.features.shape[1:]))


def _arrays(field: str, side: Features, features: np.ndarray) -> dict[str, np.ndarray]:
    prefix = _PARTS[field]
    arrays = {f"{prefix}_f": features, f"{prefix}_label": side.pids, f"{prefix}_cam": side.camids}
    return arrays if side.keys is None else arrays | {f"{prefix}_key": np.asarray(side.keys, dtype=str)}


def _read(path: Path) -> dict[str, np.ndarray]:
    remedy = "give a .npz written here or the release's pytorch_result.mat"
    if path.suffix == ".npz":
        try:
            check_zip(path, growth=GROWTH)
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except Exception as error:  # zipfile, zlib, struct, ... : each kind of damage has its own
            raise UserError(f"{path}: not a readable .npz feature file ({one_line(error)}); {remedy}") from None
    from reid_eval.matfile import read_mat

    try:
        return read_mat(path, growth=GROWTH)
    except Exception as error:
        raise UserError(f"{path}: not a readable .mat file ({one_line(error)}); {remedy}") from None


def _side(arrays: dict[str, np.ndarray], field: str, path: Path) -> Features:
    prefix = _PARTS[field]
    names = [f"{prefix}_{suffix}" for suffix in ("f", "label", "cam")]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(f"{path}: holds no {', '.join(missing)}; {field} features were not saved there")
    features = arrays[names[0]]
    if (
        not isinstance(features, np.ndarray)
        or features.dtype.kind not in "fiu"
        or features.ndim not in (2, 3)
        or 0 in features.shape[1:]
    ):
        raise UserError(f"{path}: {names[0]} is not a table of numbers (images x features)")
    if len(features) == 0:
        raise UserError(f"{path}: {names[0]} is empty; extract features from a folder with images")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        features = np.asarray(features, dtype=np.float32)
    rows = range(0, len(features), 4096)  # some at a time: half a million images fill gigabytes
    finite = [np.isfinite(features[i : i + 4096]).reshape(len(features[i : i + 4096]), -1).all(1) for i in rows]
    bad = ~np.concatenate(finite)
    if bad.any():
        raise UserError(
            f"{path}: {names[0]} holds NaN or infinity in {bad.sum()} of {len(bad)} rows (first: row "
            f"{int(bad.argmax())}); extract the features again with a sound model"
        )
    if features.ndim == 2:
        width = features.shape[1]
        heads = width // HEAD_DIM if width % HEAD_DIM == 0 else 1
        if "heads" in arrays:
            heads = int(next(iter(_whole_numbers(arrays["heads"], "heads", path)), 0))
        if heads < 1 or width % heads:
            raise UserError(f"{path}: {names[0]} has {width} numbers per image, which are not {heads} heads")
        features = features.reshape(len(features), heads, -1)
    labels = [_whole_numbers(arrays[name], name, path) for name in names[1:]]
    for name, values in zip(names[1:], labels, strict=True):
        if len(values) != len(features):
            raise UserError(f"{path}: {name} has {len(values)} entries for {len(features)} rows of {names[0]}")
    keys = arrays.get(f"{prefix}_key")
    if keys is not None:
        if keys.dtype.kind != "U" or keys.shape != labels[0].shape:
            raise UserError(f"{path}: {prefix}_key does not hold one name for each of the {len(features)} images")
        keys = np.char.rstrip(keys)  # a .mat fills up with spaces
    return Features(features, *labels, keys)


def _whole_numbers(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    values = np.ravel(values)
    try:
        numbers = values.astype(np.int64) if values.dtype.kind in "iu" else values.astype(np.float64)
    except (TypeError, ValueError):
        example = next((str(v) for v in values if not _is_number(v)), "")
        what = {"label": "identities", "cam": "cameras"}.get(name.rpartition("_")[2], name)
        raise UserError(f"{path}: {name} holds {example!r}; {what} must be whole numbers") from None
    if numbers.dtype != np.int64:
        if not (np.abs(numbers) < 2.0**63).all() or (numbers != np.round(numbers)).any():
            raise UserError(f"{path}: {name} holds values that are not whole numbers")
        numbers = numbers.astype(np.int64)
    return numbers


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def extract_data_set(
    net: nn.Module,
    data_root: Path | str,
    *,
    size: tuple[int, int],
    batch_size: int | None,
    device: torch.device,
    precision: str = "fp32",
    multi: bool = False,
    progress: bool = True,
) -> FeatureFile:
    """Features of a data set's query and gallery, and of its multi-query images when `multi`.

    `size` is (height, width); the rest as in `extract_features`. Raises UserError for missing folders and names without
    identity and camera.
    """

    def side(split: str) -> Features:
        images = read_split(data_root, split)
        features = extract_features(
            net,
            images.paths,
            height=size[0],
            width=size[1],
            batch_size=batch_size,
            device=device,
            precision=precision,
            progress=progress,
        )
        keys = np.array([path.name for path in images.paths])
        return Features(features, images.pids, images.camids, keys, np.array([str(path) for path in images.paths]))

    return FeatureFile(side("query"), side("gallery"), side("multi-query") if multi else None)
