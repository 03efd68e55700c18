"""DG-Net in a few lines of Python, for notebooks and programs:

    model = dgnet.load("latest")                                       # a run, a teacher, or an ONNX file of export.py
    features = model.embed(["a.jpg", image, array])                    # (3, heads, 512), those of test.py
    pictures = model.swap(appearance="a.jpg", structure=["b.jpg"])     # (1, H, W, 3) uint8
    order, scores = dgnet.rank(features[:1], features[1:], top=2)
    report = dgnet.evaluate(model, "../Market/pytorch")                # the content of reid.json
    hits = dgnet.open_index(model, "photos").search("a.jpg", top=5)    # [[(path, score), ...]]

An image is a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4), or a tensor (3, H, W), of any size, in uint8
or as floats in 0..1. All functions take one image or a sequence, and raise UserError, a sentence with the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import iter_images
from reid_eval import index
from reid_eval.evaluation import say_test_images
from reid_eval.features import extract_data_set, extract_features
from reid_eval.report import evaluate_features, summary
from runs.folder import RunFolder, open_run, resolve_data_root
from runs.load import TestNet, load_exported_for_test, load_for_test
from runs.swapper import Swapper, load_swapper
from utils import UserError, pick_device
from visual_tools.hirescam import activation_maps

Images = str | Path | Image.Image | np.ndarray | Tensor | Sequence[Any]
BATCH = 32


def load(
    source: str | Path,
    *,
    which_epoch: str | int | None = None,
    device: str | None = None,
    output_path: str | None = None,
) -> Model:
    """The newest snapshot of the run `source`, or that of an iteration; the teacher `source`; or an ONNX file.

    device       cpu, cuda or cuda:N; None: the first GPU, or the CPU
    output_path  folder of outputs/ and models/; None: the project's
    """
    on, which = pick_device(device), None if which_epoch is None else str(which_epoch)
    exported = Path(source).suffix == ".onnx"
    run = open_run(output_path, "exported" if exported else str(source))
    tested = load_exported_for_test(Path(source)) if exported else load_for_test(run, on, which)
    if exported or tested.iteration is None:
        if which:
            raise UserError(f"which_epoch {which}: {tested.title} has only one set of weights")
        return Model(tested, on)
    return Model(tested, on, run)


@dataclass(frozen=True)
class Model:
    """An id net, with the generator where there is one."""

    tested: TestNet
    device: torch.device
    run: RunFolder | None = None

    def __repr__(self) -> str:
        return f"<{self.tested.title}, images of {self.tested.size[0]} x {self.tested.size[1]}>"

    def embed(self, images: Images) -> np.ndarray:
        """Features (n, heads, dim) float32, every head of length 1: what test.py computes, bit for bit."""
        height, width = self.tested.size
        how = dict(height=height, width=width, batch_size=None, device=self.device, progress=False)
        return extract_features(self.tested.net, as_list(images), **how)

    def swap(self, appearance: Images, structure: Images) -> np.ndarray:
        """The clothes of `appearance` on the people of `structure`, pair by pair: (n, H, W, 3) uint8.

        Where one side is a single image, it is used for all of the other.
        """
        f = torch.cat([self._swapper.appearance(x) for x in self._batches(appearance)])
        s = torch.cat([self._swapper.structure(x) for x in self._batches(structure)])
        n = max(len(f), len(s))
        if not {len(f), len(s)} <= {1, n}:
            raise UserError(f"{len(f)} images of clothes and {len(s)} of people; give as many of both, or one")
        pairs = [(i % len(f), i % len(s)) for i in range(n)]
        return np.stack(list(self._swapper.compose(f, s, pairs, BATCH)))

    def attend(self, images: Images) -> np.ndarray:
        """Where the features come from: (n, heads, h, w) float32, not negative (`visual_tools.hirescam`)."""
        if not isinstance(self.tested.net, torch.nn.Module):
            raise UserError(f"{self.tested.title}: an exported net has no gradients; load the run itself")
        maps = [activation_maps(self.tested.net, x).cpu() for x in self._batches(images)]
        return torch.cat(maps).numpy()

    def _batches(self, images: Images) -> Iterator[Tensor]:
        return iter_images(as_list(images), *self.tested.size, BATCH, device=self.device)

    @cached_property
    def _swapper(self) -> Swapper:
        if self.run is None:
            raise UserError(f"{self.tested.title}: has no generator; load a DG-Net run")
        return load_swapper(self.run, self.device, str(self.tested.iteration))


def rank(query: np.ndarray, gallery: np.ndarray, *, top: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The best `top` of the gallery for every query, best first: indices (nq, top) int64 and scores (nq, top) float32.

    Both are features of `Model.embed`. Labels and cameras play no part; `evaluate` leaves out by them.
    """
    scores = index.to_vectors(query) @ index.to_vectors(gallery).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(scores, order, axis=1)


def evaluate(
    model: Model, data: str | Path, *, multi: bool = False, rerank: str | None = None, cameras: bool = True
) -> dict[str, Any]:
    """Rank-k, mAP and mINP on a data set with query and gallery, as fractions: the content of reid.json.

    The arguments are the options of test.py; `rerank` is "field" or "paper".
    """
    root = resolve_data_root(str(data))
    splits = ("query", "gallery", "multi-query") if multi else ("query", "gallery")
    reading = say_test_images(root, splits)
    how = dict(size=model.tested.size, batch_size=None, device=model.device, progress=False)
    sides = extract_data_set(model.tested.net, root, multi=multi, **how)
    results = evaluate_features(
        sides.query, sides.gallery, multi=sides.multi, rerank=rerank, remove_same_camera=cameras
    )
    return summary(results, sides.query, sides.gallery, remove_same_camera=cameras) | {"reading": reading}


@dataclass(frozen=True)
class Index:
    """A folder of images that `open_index` has embedded."""

    model: Model
    images: index.SearchIndex

    def search(self, images: Images, *, top: int = 10) -> list[list[tuple[Path, float]]]:
        """The best `top` different images of the folder for every image, highest score first."""
        answers = self.images.search(index.to_vectors(self.model.embed(images)), top)
        return [[(self.images.gallery / name, score) for name, score in answer] for answer in answers]


def open_index(model: Model, folder: str | Path, *, keep: str | Path | None = None, rebuild: bool = False) -> Index:
    """The images of a folder and its sub-folders, embedded; only new and changed ones where the index is there already.

    keep  folder of the index; None: where search.py keeps it, in the folder of the model
    """
    gallery = Path(folder)
    place = Path(keep) if keep else index.default_folder(model.tested.folder, gallery)
    net = model.tested.net
    mark = index.fingerprint(net, model.tested.size)
    images = index.open_index(place, gallery, mark, model.tested.title, rebuild=rebuild)
    images.update(model.embed)
    return Index(model, images)


def as_list(images: Images) -> list[str | Path | Image.Image]:
    """One image or many, as paths and PIL images."""
    many = isinstance(images, Sequence) and not isinstance(images, str)
    many |= isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    listed = [as_pil(image) for image in (images if many else [images])]
    if not listed:
        raise UserError("no images were given")
    return listed


def as_pil(image: str | Path | Image.Image | np.ndarray | Tensor) -> str | Path | Image.Image:
    """Arrays and tensors as PIL images; others as they are."""
    if isinstance(image, str | Path):
        return image
    if isinstance(image, Image.Image):
        image.load()  # here, as several threads read the images later
        return image
    pixels = image
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().float() if image.is_floating_point() else image.cpu()
        pixels = (pixels.movedim(0, -1) if pixels.ndim == 3 else pixels).numpy()
    sound = isinstance(pixels, np.ndarray) and pixels.ndim in (2, 3) and 0 not in pixels.shape
    if not sound or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.dtype.kind not in "uif":
        raise UserError(
            f"an image of type {type(image).__name__} and shape {getattr(image, 'shape', '()')}; give a path, a PIL "
            "image, an array (H, W, 3) or a tensor (3, H, W)"
        )
    if pixels.dtype.kind == "f" and 0 <= pixels.min() and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(
            f"pixels of type {pixels.dtype} in {pixels.min()}..{pixels.max()}; give uint8 or floats in 0..1"
        )
    return Image.fromarray(pixels)
