"""An index of a folder of images, for search without labels: one file that follows the changes of the folder.

The file holds the relative path, stamp and content hash of every image, the features of every content as vectors of a
faiss index, and the fingerprint of the net that they come from. Small galleries are searched exactly, larger ones by an
HNSW graph (Malkov and Yashunin, arXiv:1603.09320), whose recall compared with the exact search is measured on a sample.
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

import faiss
import numpy as np
from torch import nn
from tqdm import tqdm

from data.folders import leave_out_prepared
from data.images import check_images, load_image
from data.listing import find_images, say_reading
from files import Stamp, check_zip, digest_files, is_part, make_folder, stamp, write_whole
from reid_eval.ranking import main_setting
from runs.weights import digest_weights
from utils import UserError, one_line

INDEX_FILE = "index.npz"
FORMAT = 2
KINDS = (b"IxFI", b"IHNf")  # how faiss marks exact indices and graphs
# Of the graph: links per image, candidates during construction, candidates during a search.
LINKS, BUILD_WIDTH, SEARCH_WIDTH = 32, 100, 128
RECALL_SAMPLE, RECALL_AT = 200, 10
_BLOCK = 512  # images per call of the net, after which the index may be saved
_SAVE_SECONDS = 300

Embed = Callable[[Sequence[Path]], np.ndarray]


def fingerprint(net: nn.Module, size: tuple[int, int]) -> str:
    """A hash of what the features depend on: the layers of the net, its tensors, the (height, width) of its images.

    The layers are included because strides and pooling do not show in the tensors.
    """
    return hashlib.sha256(f"{size} {net!r} {digest_weights(net)}".encode()).hexdigest()


def to_vectors(features: np.ndarray) -> np.ndarray:
    """Vectors (n, heads * dim) for features (n, heads, dim); their dot products are the scores of `main_setting`."""
    _, weights = main_setting(features.shape[1])
    scaled = features * np.sqrt(np.array(weights, np.float32))[:, None]
    return np.ascontiguousarray(scaled.reshape(len(features), -1), dtype=np.float32)


def build_vectors(vectors: np.ndarray, *, graph: bool) -> faiss.Index:
    """A faiss index of vectors (n, dim), exact or a graph."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    if graph:
        index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_WIDTH
    for start in tqdm(range(0, len(vectors), _BLOCK), "graph", leave=False, disable=None if graph else True):
        index.add(vectors[start : start + _BLOCK])
    return index


class File(NamedTuple):
    """An image of the gallery: its stamp when it was last read, and the hash of its content, as `files` makes them."""

    stamp: Stamp | None
    content: str


class SearchIndex:
    """The index of `gallery` in `folder`. Copies of an image share a vector, and are one answer.

    files     the images by relative path, as they are listed
    contents  the different contents, in the order of the vectors
    vectors   the faiss index, exact or a graph
    recall    the share of the true ten nearest images that the graph finds; None for an exact index
    """

    def __init__(self, folder: Path, gallery: Path, model: str, model_name: str) -> None:
        self.folder, self.gallery = folder, gallery
        self.model, self.model_name = model, model_name
        self.files: dict[str, File] = {}
        self.contents: list[str] = []
        self.vectors: faiss.Index | None = None
        self.recall: float | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def approximate(self) -> bool:
        return isinstance(self.vectors, faiss.IndexHNSW)

    def update(self, embed: Embed, *, approximate_from: int, skip_bad: bool = False) -> dict[str, int]:
        """Embed new and changed images, forget removed ones, and write the index if it has changed.

        Args:
            embed: image files to features (n, heads, dim).
            approximate_from: number of different images from which on the index is a graph.
            skip_bad: omit unreadable images with a warning, instead of stopping.

        Images whose stamp is that of the index are not opened. Whether any other image is new, its content decides.
        Returns how many images were "added", "changed", "removed" and "unreadable". A long update is saved every few
        minutes, so that an interrupted one continues from there. Raises UserError for an empty gallery, unreadable
        images without `skip_bad`, and a folder that cannot be written.
        """
        paths = leave_out_prepared(find_images(self.gallery, "--gallery"), self.gallery)
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

        wanted, present = {file.content for file in self.files.values()}, set(self.contents)
        kept = [row for row, content in enumerate(self.contents) if content in wanted]
        if changed := len(kept) < len(self.contents):  # HNSW cannot delete
            self._rebuild(kept, graph=self.approximate)
        missing: dict[str, str] = {}
        for name, file in self.files.items():
            if file.content not in present:
                missing.setdefault(file.content, name)
        added = self._add(missing, embed, skip_bad)
        self.files = self._with_vectors()
        if not self.files:
            raise UserError(f"--gallery {self.gallery}: no readable image in it or below")
        graph = len(self.contents) >= approximate_from
        if self.approximate != graph:
            if added:
                self.save()  # building the graph takes long, too
            self._rebuild(range(len(self.contents)), graph=graph)
            changed = True
        if graph and self.recall is None:
            changed, self.recall = True, self._measure_recall()
        if changed or added or self.files != known:
            self.save()
        return {
            "added": sum(name not in known for name in self.files),
            "changed": sum(name in known and file.content != known[name].content for name, file in self.files.items()),
            "removed": sum(name not in stamps for name in known),
            "unreadable": len(stamps) - len(self.files),
        }

    def _with_vectors(self) -> dict[str, File]:
        """The files whose content is embedded."""
        embedded = set(self.contents)
        return {name: file for name, file in self.files.items() if file.content in embedded}

    def _add(self, names: dict[str, str], embed: Embed, skip_bad: bool) -> bool:
        """Embed contents, of each the file `names[content]`; returns whether any was embedded."""
        contents, before, saved = list(names), len(self.contents), time.monotonic()
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
            if not np.isfinite(vectors).all():
                raise UserError(f"{self.model_name}: its features hold NaN or infinity; use a sound model")
            if self.vectors is None:
                self.vectors = build_vectors(vectors[:0], graph=False)
            self._require_width(vectors)
            self.vectors.add(vectors)
            self.contents += block
            self.recall = None
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        return len(self.contents) > before

    def _rebuild(self, rows: Sequence[int], *, graph: bool) -> None:
        vectors = self.vectors.reconstruct_n(0, self.vectors.ntotal)[list(rows)]
        self.vectors, self.recall = build_vectors(vectors, graph=graph), None
        self.contents = [self.contents[row] for row in rows]

    def _measure_recall(self) -> float:
        """The mean share of the ten nearest images that the graph finds, over a sample of the images."""
        chosen = np.random.default_rng(0).permutation(self.vectors.ntotal)[:RECALL_SAMPLE]
        sample = np.stack([self.vectors.reconstruct(int(i)) for i in chosen])
        count = min(RECALL_AT + 1, self.vectors.ntotal)
        exact, exact_rows = self.vectors.storage.search(sample, count)
        close, close_rows = self._nearest(sample, count)
        shares = []
        for i, itself in enumerate(chosen):
            true = exact[i][exact_rows[i] != itself][:RECALL_AT]
            got = close[i][close_rows[i] != itself][:RECALL_AT]
            # Compare scores, not rows: either of two equal images will do.
            shares.append(np.count_nonzero(got >= true[-1] - 1e-6) / len(true) if len(true) else 1.0)
        return float(np.mean(shares))

    def search(self, vectors: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
        """The best `top` different images for every vector (n, dim): relative paths and scores, highest first.

        Of copies the first one listed is named. Images with equal scores keep the order of the index.
        """
        scores, rows = self._nearest(vectors, min(top, self.vectors.ntotal))
        names: dict[str, str] = {}
        for name, file in self.files.items():
            names.setdefault(file.content, name)
        order = np.lexsort((rows, -scores))
        return [
            [(names[self.contents[i]], float(score)) for i, score in zip(row[by], line[by], strict=True)]
            for row, line, by in zip(rows, scores, order, strict=True)
        ]

    def _require_width(self, vectors: np.ndarray) -> None:
        if vectors.shape[1] != self.vectors.d:
            raise UserError(
                f"{self.folder / INDEX_FILE}: damaged, it holds {self.vectors.d} numbers per image and the model gives "
                f"{vectors.shape[1]}; delete its folder or give another --index"
            )

    def _nearest(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        self._require_width(vectors)
        wide = faiss.SearchParametersHNSW(efSearch=max(SEARCH_WIDTH, 2 * count)) if self.approximate else None
        scores, rows = self.vectors.search(vectors, count, params=wide)
        short = (rows < 0).any(axis=1)
        if short.any():  # a graph may have parts that no link leads to
            scores[short], rows[short] = self.vectors.storage.search(vectors[short], count)
        return scores, rows

    def save(self) -> None:
        """Write the index, whole or not at all."""
        rows = {content: row for row, content in enumerate(self.contents)}
        about = {
            "format": FORMAT,
            "model": self.model,
            "model_name": self.model_name,
            "gallery": str(self.gallery.resolve()),
            "recall": self.recall,
            "contents": self.contents,
            "files": [[name, rows[file.content], file.stamp] for name, file in self._with_vectors().items()],
        }
        blob, vectors = np.frombuffer(json.dumps(about).encode(), np.uint8), faiss.serialize_index(self.vectors)
        make_folder(self.folder)
        write_whole(self.folder / INDEX_FILE, lambda file: np.savez(file, about=blob, faiss=vectors))


def open_index(folder: Path, gallery: Path, model: str, model_name: str, *, rebuild: bool = False) -> SearchIndex:
    """The index kept in `folder`; an empty one if there is none, or with `rebuild`.

    So is one of an earlier version, which did not record what its images held. Raises UserError for an index of another
    model or gallery, a damaged index, and a folder with other files.
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
    if vectors is None:
        logging.info("%s: built again, because an earlier version did not record what its images held", path)
        return index
    index.contents, index.vectors, index.recall = about["contents"], vectors, about["recall"]
    index.files = {name: File(then and tuple(then), index.contents[row]) for name, row, then in about["files"]}
    return index


def _read(path: Path) -> tuple[dict[str, Any], faiss.Index | None]:
    """What an index file says, and its vectors; None for an index of an earlier version."""
    try:
        check_zip(path, growth=1)
        with np.load(path, allow_pickle=False) as file:
            about, blob = json.loads(file["about"].tobytes()), file["faiss"]
        if about["format"] == 1:
            return about, None
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, not {FORMAT}")
        if blob[:4].tobytes() not in KINDS:
            # Other kinds of faiss index may open files whose names they hold.
            raise ValueError("its vectors are of a kind that is not written here")
        vectors = faiss.deserialize_index(blob)
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
        if not vectors.ntotal == len(set(about["contents"])) == len(about["contents"]):
            raise ValueError("vectors and images differ in number, or an image is listed twice")
        if {row for _, row, _ in about["files"]} != set(range(vectors.ntotal)):
            raise ValueError("an image is in no file")
        return about, vectors
    except Exception as error:  # zipfile, zlib, json, faiss, ...: every kind of damage has its exception
        why = one_line(error)
        raise UserError(f"{path}: not a readable index ({why}); delete its folder or give another --index") from None


def _decodes(path: Path) -> bool:
    try:
        load_image(path)
    except UserError as error:
        logging.warning("%s; left out", error)
        return False
    return True
