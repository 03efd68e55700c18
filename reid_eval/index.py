"""An index of a folder of images, for search without labels: one file that follows the changes of the folder.

The file holds the relative path, stamp and content hash of every image, the features of every content as a vector, and
the fingerprint of the net that they come from. A search compares a query with every vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from tqdm import tqdm

from data.images import check_images, load_image
from data.listing import find_images, say_reading
from files import Stamp, check_zip, digest_files, is_part, make_folder, stamp, write_whole
from reid_eval.exported import ExportedNet
from reid_eval.ranking import check_finite, main_setting
from runs.weights import digest_weights
from utils import UserError, one_line

INDEX_FILE = "index.npz"
FORMAT = 3
_BLOCK = 512  # images per call of the net, after which the index may be saved
_SAVE_SECONDS = 300
_QUERIES = 64  # whose scores are computed at a time

Embed = Callable[[Sequence[Path]], np.ndarray]


def fingerprint(net: nn.Module | ExportedNet, size: tuple[int, int]) -> str:
    """A hash of what the features depend on: the layers of the net, its tensors, the (height, width) of its images.

    The layers are included because strides and pooling do not show in the tensors. Of an exported net it is that of the
    file.
    """
    if isinstance(net, ExportedNet):
        return net.digest
    return hashlib.sha256(f"{size} {net!r} {digest_weights(net)}".encode()).hexdigest()


def default_folder(model_folder: Path, gallery: Path) -> Path:
    """Where the index of a gallery is kept unless another folder is named: with the model, never among the images."""
    digest = hashlib.sha256(os.fsencode(gallery.resolve())).hexdigest()[:8]
    return model_folder / "search" / f"{gallery.resolve().name or 'root'}-{digest}"


def to_vectors(features: np.ndarray) -> np.ndarray:
    """Vectors (n, heads * dim) for features (n, heads, dim); their dot products are the scores of `main_setting`."""
    _, weights = main_setting(features.shape[1])
    scaled = features * np.sqrt(np.array(weights, np.float32))[:, None]
    return np.ascontiguousarray(scaled.reshape(len(features), -1), dtype=np.float32)


class File(NamedTuple):
    """An image of the gallery: its stamp when it was last read, and the hash of its content, as `files` makes them."""

    stamp: Stamp | None
    content: str


class SearchIndex:
    """The index of `gallery` in `folder`. Copies of an image share a vector, and are one answer.

    files    the images by relative path, as they are listed
    vectors  the vector (dim,) float32 of every different content
    """

    def __init__(self, folder: Path, gallery: Path, model: str, model_name: str) -> None:
        self.folder, self.gallery = folder, gallery
        self.model, self.model_name = model, model_name
        self.files: dict[str, File] = {}
        self.vectors: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files)

    def update(self, embed: Embed, *, skip_bad: bool = False) -> dict[str, int]:
        """Embed new and changed images, forget removed ones, and write the index if it has changed.

        Args:
            embed: image files to features (n, heads, dim).
            skip_bad: omit unreadable images with a warning, instead of stopping.

        Images whose stamp is that of the index are not opened. Whether any other image is new, its content decides.
        Returns how many images were "added", "changed", "removed" and "unreadable". A long update is saved every few
        minutes, so that an interrupted one continues from there. Raises UserError for an empty gallery, unreadable
        images without `skip_bad`, and a folder that cannot be written.
        """
        paths = find_images(self.gallery, "--gallery")
        stamps = {os.path.relpath(path, self.gallery): stamp(path) for path in paths}
        known = self.files
        same = [name for name, now in stamps.items() if name in known and now and now == known[name].stamp]
        contents = {name: known[name].content for name in same}
        unread = [name for name in stamps if name not in contents]
        usable = check_images(
            [self.gallery / name for name in unread],
            skip_bad=skip_bad,
            remedy="give --skip-bad-images",
            minimum=0 if same else 1,
        )
        names = [name for name, good in zip(unread, usable, strict=True) if good]
        contents |= zip(names, digest_files([self.gallery / name for name in names]), strict=True)
        self.files = {name: File(now, contents[name]) for name, now in stamps.items() if name in contents}
        say_reading({"gallery": [self.gallery / name for name in self.files]})

        wanted = {file.content for file in self.files.values()}
        self.vectors = {content: vector for content, vector in self.vectors.items() if content in wanted}
        missing = {content: name for content, name in self._names().items() if content not in self.vectors}
        self._add(missing, embed, skip_bad)
        self.files = self._embedded()
        if not self.files:
            raise UserError(f"--gallery {self.gallery}: no readable image in it or below")
        if self.files != known:
            self.save()
        return {
            "added": sum(name not in known for name in self.files),
            "changed": sum(name in known and file.content != known[name].content for name, file in self.files.items()),
            "removed": sum(name not in stamps for name in known),
            "unreadable": len(stamps) - len(self.files),
        }

    def _names(self) -> dict[str, str]:
        """The first image listed of every content."""
        names: dict[str, str] = {}
        for name, file in self.files.items():
            names.setdefault(file.content, name)
        return names

    def _embedded(self) -> dict[str, File]:
        """The images that have a vector."""
        return {name: file for name, file in self.files.items() if file.content in self.vectors}

    def _add(self, names: dict[str, str], embed: Embed, skip_bad: bool) -> None:
        """Embed contents, of each the file `names[content]`."""
        contents, saved = list(names), time.monotonic()
        for start in tqdm(range(0, len(contents), _BLOCK), "features", unit=f"x {_BLOCK} img", disable=None):
            block = contents[start : start + _BLOCK]
            try:
                features = embed([self.gallery / names[content] for content in block])
            except UserError:
                if not skip_bad:
                    raise
                # A file may be damaged in its middle, which `check_images` cannot see.
                block = [content for content in block if _decodes(self.gallery / names[content])]
                if not block:
                    continue
                features = embed([self.gallery / names[content] for content in block])
            vectors = to_vectors(features)
            check_finite(vectors, self.model_name)
            self._require_width(vectors)
            self.vectors |= zip(block, vectors, strict=True)
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()

    def search(self, vectors: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
        """The best `top` different images for every vector (n, dim): relative paths and scores, highest first.

        Of copies the first one listed is named. Images with equal scores keep the order in which they are listed.
        """
        names = self._names()
        self._require_width(vectors)
        gallery, listed, answers = np.stack([self.vectors[content] for content in names]), list(names.values()), []
        for start in range(0, len(vectors), _QUERIES):
            for scores in vectors[start : start + _QUERIES] @ gallery.T:
                best = np.argsort(-scores, kind="stable")[:top]
                answers.append([(listed[i], float(scores[i])) for i in best])
        return answers

    def _require_width(self, vectors: np.ndarray) -> None:
        width = len(next(iter(self.vectors.values()), vectors[0]))
        if vectors.shape[1] != width:
            raise UserError(
                f"{self.folder / INDEX_FILE}: damaged, it holds {width} numbers per image and the model gives "
                f"{vectors.shape[1]}; delete its folder or give another --index"
            )

    def save(self) -> None:
        """Write the index, whole or not at all."""
        rows = {content: row for row, content in enumerate(self.vectors)}
        about = {
            "format": FORMAT,
            "model": self.model,
            "model_name": self.model_name,
            "gallery": str(self.gallery.resolve()),
            "contents": list(self.vectors),
            "files": [[name, rows[file.content], file.stamp] for name, file in self._embedded().items()],
        }
        blob, vectors = np.frombuffer(json.dumps(about).encode(), np.uint8), np.stack(list(self.vectors.values()))
        make_folder(self.folder)
        write_whole(self.folder / INDEX_FILE, lambda file: np.savez(file, about=blob, vectors=vectors))


def open_index(folder: Path, gallery: Path, model: str, model_name: str, *, rebuild: bool = False) -> SearchIndex:
    """The index kept in `folder`; an empty one if there is none, or with `rebuild`.

    Raises UserError for an index of another model or gallery, a damaged index, and a folder with other files.
    """
    index, path = SearchIndex(folder, gallery, model, model_name), folder / INDEX_FILE
    if not path.exists():
        if folder.exists() and not (folder.is_dir() and all(map(is_part, folder.iterdir()))):
            raise UserError(f"--index {folder}: holds something else and no index; name an empty or a new folder")
        return index
    about, vectors = _read(path)  # even for `rebuild`: a file that is not an index must not be replaced
    if rebuild:
        return index
    for key, value, name in (("model", model, "model_name"), ("gallery", str(gallery.resolve()), "gallery")):
        if about[key] != value:
            raise UserError(
                f"{path}: the index of another {key} ({about[name]}), whose images do not compare with these; give "
                "another --index, or --rebuild to build it again"
            )
    contents = about["contents"]
    index.vectors = dict(zip(contents, vectors, strict=True))
    index.files = {name: File(then and tuple(then), contents[row]) for name, row, then in about["files"]}
    return index


def _read(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What an index file says, and its vectors (contents, dim)."""
    try:
        check_zip(path, growth=1)
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, not {FORMAT}")
            vectors = file["vectors"]
        for name, _, then in about["files"]:
            inner = PurePath(name)
            if (
                inner.is_absolute()
                or ".." in inner.parts
                or not (then is None or all(isinstance(n, int) for n in then))
            ):
                raise ValueError(f"{name!r} leads out of the gallery")
        if len({name for name, *_ in about["files"]}) < len(about["files"]):
            raise ValueError("a file is listed twice")
        if vectors.dtype != np.float32 or vectors.ndim != 2:
            raise ValueError("its vectors are no table of numbers")
        if not len(vectors) == len(set(about["contents"])) == len(about["contents"]):
            raise ValueError("vectors and images differ in number, or an image is listed twice")
        if {row for _, row, _ in about["files"]} != set(range(len(vectors))):
            raise ValueError("an image is in no file")
        return about, vectors
    except Exception as error:  # zipfile, zlib, json, ...: every kind of damage has its exception
        why = one_line(error)
        raise UserError(f"{path}: not a readable index ({why}); delete its folder or give another --index") from None


def _decodes(path: Path) -> bool:
    try:
        load_image(path)
    except UserError as error:
        logging.warning("%s; left out", error)
        return False
    return True
