"""An index of a folder of images, for search without labels: one file that follows the folder's changes.

The file keeps every image's relative path, size and modification time, the features as vectors of a faiss index,
and the fingerprint of the net they came from. Small galleries are searched exactly; larger ones by an HNSW graph
(Malkov and Yashunin, arXiv:1603.09320), whose recall against the exact search is measured on a sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import faiss
import numpy as np
from torch import nn
from tqdm import tqdm

from data.folders import find_images
from data.images import check_images, load_image
from files import check_zip, make_folder, part_of, write_whole
from reid_eval.top import main_setting
from runs.weights import digest_weights
from utils import UserError, one_line

INDEX_FILE = "index.npz"
FORMAT = 1
KINDS = (b"IxFI", b"IHNf")  # how faiss marks exact indices and graphs
# Of the graph: links per image, candidates while it is built, candidates of a search.
LINKS, BUILD_WIDTH, SEARCH_WIDTH = 32, 100, 128
RECALL_SAMPLE, RECALL_AT = 200, 10
_BLOCK = 512  # images between two looks at the clock
_SAVE_SECONDS = 300

Embed = Callable[[Sequence[Path]], np.ndarray]


def fingerprint(net: nn.Module, size: tuple[int, int]) -> str:
    """A hash of all that the features depend on: the net's layers with strides and pooling, which no tensor tells, its
    tensors, and the (height, width) of its images."""
    return hashlib.sha256(f"{size} {net!r} {digest_weights(net)}".encode()).hexdigest()


def to_vectors(features: np.ndarray) -> np.ndarray:
    """Features (n, heads, dim) to vectors (n, heads * dim) whose dot products are the scores of `main_setting`."""
    _, weights = main_setting(features.shape[1])
    scaled = features * np.sqrt(np.array(weights, np.float32))[:, None]
    return np.ascontiguousarray(scaled.reshape(len(features), -1), dtype=np.float32)


class SearchIndex:
    """The index of `gallery` in `folder`; `files` are its images, in the order of its vectors.

    After `update` it is what the gallery holds; `recall` is None for an exact index, else the share of the true
    ten nearest that the graph finds.
    """

    def __init__(self, folder: Path, gallery: Path, model: str, model_name: str) -> None:
        self.folder, self.gallery = folder, gallery
        self.model, self.model_name = model, model_name
        self.files: dict[str, tuple[int, int]] = {}  # relative path: size in bytes, modification time in ns
        self.vectors: faiss.Index | None = None
        self.recall: float | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def approximate(self) -> bool:
        return isinstance(self.vectors, faiss.IndexHNSW)

    # ---------------------------------------------------------------------------------------- updating
    def update(self, embed: Embed, *, approximate_from: int, skip_bad: bool = False) -> dict[str, int]:
        """Follow the gallery: embed new and changed images, forget the others, and write the index if it changed.

        Args:
            embed: image files to features (n, heads, dim).
            approximate_from: number of images from which on the index is a graph.
            skip_bad: leave unreadable images out, with a warning, instead of stopping.

        Returns how many images were "added", "changed", "removed" and "unreadable". A long update is written
        every few minutes, so that an interrupted one goes on where it was.

        Raises:
            UserError: an empty gallery, unreadable images without `skip_bad`, a folder that cannot be written.
        """
        found = {os.path.relpath(path, self.gallery): _stamp(path) for path in find_images(self.gallery, "--gallery")}
        known = dict(self.files)
        kept = [name for name in known if found.get(name) == known[name]]
        new = [name for name in found if known.get(name) != found[name]]
        usable = check_images(
            self._paths(new),
            skip_bad=skip_bad,
            remedy="give --skip-bad-images",
            minimum=0 if kept else 1,
        )
        changed = len(kept) < len(known)
        if changed:
            rows = [row for row, name in enumerate(known) if found.get(name) == known[name]]
            self._replace(self._all_vectors()[rows])
            self.files, self.recall = {name: known[name] for name in kept}, None
        added = self._add([name for name, good in zip(new, usable, strict=True) if good], found, embed, skip_bad)
        if not self.files:
            raise UserError(f"--gallery {self.gallery}: no readable image in it or below")
        graph = len(self) >= approximate_from
        if self.approximate != graph:
            if added:
                self.save()  # building the graph takes long, too
            self._replace(self._all_vectors(), graph=graph)
            changed, self.recall = True, None
        if graph and self.recall is None:
            changed, self.recall = True, self._measure_recall()
        if changed or added:
            self.save()
        return {
            "added": sum(name not in known for name in added),
            "changed": sum(name in known for name in added),
            "removed": sum(name not in found for name in known),
            "unreadable": len(new) - len(added),
        }

    def _add(self, names: list[str], found: dict[str, tuple[int, int]], embed: Embed, skip_bad: bool) -> list[str]:
        added, saved = [], time.monotonic()
        with tqdm(total=len(names), desc="features", unit="img", disable=None) as bar:
            for start in range(0, len(names), _BLOCK):
                block = names[start : start + _BLOCK]
                bar.update(start - bar.n)
                try:
                    features = embed(self._paths(block))
                except UserError:
                    if not skip_bad:
                        raise
                    # Damage in the middle of a file that `check_images` cannot see.
                    block = [name for name in block if _decodes(self.gallery / name)]
                    if not block:
                        continue
                    features = embed(self._paths(block))
                vectors = to_vectors(features)
                if not np.isfinite(vectors).all():
                    raise UserError(f"{self.model_name}: its features hold NaN or infinity; use a sound model")
                if self.vectors is None:
                    self._replace(vectors[:0])
                self._require_width(vectors)
                self.vectors.add(vectors)
                self.files |= {name: found[name] for name in block}
                self.recall = None
                added += block
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
            bar.update(len(names) - bar.n)
        return added

    def _paths(self, names: Sequence[str]) -> list[Path]:
        return [self.gallery / name for name in names]

    def _all_vectors(self) -> np.ndarray:
        return self.vectors.reconstruct_n(0, self.vectors.ntotal)

    def _replace(self, vectors: np.ndarray, *, graph: bool | None = None) -> None:
        """An index of these vectors alone, a graph or exact; by default of the kind it was. HNSW cannot delete."""
        graph = self.approximate if graph is None else graph
        if graph:
            self.vectors = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
            self.vectors.hnsw.efConstruction = BUILD_WIDTH
        else:
            self.vectors = faiss.IndexFlatIP(vectors.shape[1])
        starts = range(0, len(vectors), _BLOCK)
        for start in tqdm(starts, "graph", leave=False, disable=None if graph else True):
            self.vectors.add(vectors[start : start + _BLOCK])

    def _measure_recall(self) -> float:
        """The share of a sampled image's ten nearest others, by score, that the graph finds."""
        chosen = np.random.default_rng(0).permutation(len(self))[:RECALL_SAMPLE]
        sample = np.stack([self.vectors.reconstruct(int(i)) for i in chosen])
        count = min(RECALL_AT + 1, len(self))
        exact, exact_rows = self.vectors.storage.search(sample, count)
        close, close_rows = self._nearest(sample, count)
        shares = []
        for i, itself in enumerate(chosen):
            true = exact[i][exact_rows[i] != itself][:RECALL_AT]
            got = close[i][(close_rows[i] != itself) & (close_rows[i] >= 0)][:RECALL_AT]
            # By score, not by row: one of two equal images is as good as the other.
            shares.append(np.count_nonzero(got >= true[-1] - 1e-6) / len(true) if len(true) else 1.0)
        return float(np.mean(shares))

    # --------------------------------------------------------------------------------------- searching
    def search(self, vectors: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
        """The best `top` images for each of the vectors (n, dim): relative paths and scores, highest first.

        Equal scores are in the order of the index.
        """
        scores, rows = self._nearest(vectors, min(top, len(self)))
        names = list(self.files)
        results = []
        for score, row in zip(scores, rows, strict=True):
            order = [j for j in np.lexsort((row, -score)) if row[j] >= 0]
            results.append([(names[row[j]], float(score[j])) for j in order])
        return results

    def _require_width(self, vectors: np.ndarray) -> None:
        if vectors.shape[1] != self.vectors.d:
            raise UserError(
                f"{self.folder / INDEX_FILE}: damaged, it holds {self.vectors.d} numbers per image and the model gives "
                f"{vectors.shape[1]}; delete its folder or give another --index"
            )

    def _nearest(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        self._require_width(vectors)
        if self.approximate:
            wide = faiss.SearchParametersHNSW(efSearch=max(SEARCH_WIDTH, 2 * count))
            return self.vectors.search(vectors, count, params=wide)
        return self.vectors.search(vectors, count)

    # ------------------------------------------------------------------------------------------- files
    def save(self) -> Path:
        """Write the index; there is the old file or the new one, never a part."""
        about = {
            "format": FORMAT,
            "model": self.model,
            "model_name": self.model_name,
            "gallery": str(self.gallery.resolve()),
            "recall": self.recall,
            "files": [[name, *stamp] for name, stamp in self.files.items()],
        }
        arrays = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "faiss": faiss.serialize_index(self.vectors),
        }
        make_folder(self.folder)
        return write_whole(self.folder / INDEX_FILE, lambda file: np.savez(file, **arrays))


def open_index(folder: Path, gallery: Path, model: str, model_name: str, *, rebuild: bool = False) -> SearchIndex:
    """The index kept in `folder`, or an empty one if there is none, or if it shall be built anew.

    Raises UserError for an index of another model or another gallery, a damaged one, and a folder of other files.
    """
    index, path = SearchIndex(folder, gallery, model, model_name), folder / INDEX_FILE
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--index {folder}: not a folder; name one that holds an index or does not exist yet")
        # A process that was killed while it wrote its first index leaves the temporary file.
        if folder.is_dir() and any(file != part_of(path) for file in folder.iterdir()):
            raise UserError(f"--index {folder}: holds other files and no index; name an empty or a new folder")
        return index
    about, vectors = _read(path)  # also before it is rebuilt: what is no index is not ours to replace
    if rebuild:
        return index
    if about["model"] != model:
        raise UserError(
            f"{path}: made with another model ({about['model_name']}), and features of two models cannot be "
            "compared; give another --index, or --rebuild to make it anew"
        )
    if about["gallery"] != str(gallery.resolve()):
        raise UserError(
            f"{path}: the index of another gallery ({about['gallery']}); give another --index, or --rebuild to "
            "make it anew"
        )
    index.files = {name: (size, mtime) for name, size, mtime in about["files"]}
    index.vectors, index.recall = vectors, about["recall"]
    return index


def _read(path: Path) -> tuple[dict[str, Any], faiss.Index]:
    try:
        check_zip(path, growth=1)
        with np.load(path, allow_pickle=False) as file:
            about, blob = json.loads(file["about"].tobytes()), file["faiss"]
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, not {FORMAT}")
        if blob[:4].tobytes() not in KINDS:
            # Others read files that they name themselves.
            raise ValueError("its vectors are of no kind that is written here")
        vectors = faiss.deserialize_index(blob)
        if vectors.ntotal != len(about["files"]):
            raise ValueError("vectors and files differ in number")
        for name, size, mtime in about["files"]:
            inner = PurePath(name)
            if inner.is_absolute() or ".." in inner.parts or not (isinstance(size, int) and isinstance(mtime, int)):
                raise ValueError(f"{name!r} leads out of the gallery")
        if len({name for name, *_ in about["files"]}) < vectors.ntotal:
            raise ValueError("a file is listed twice")
        return about, vectors
    except Exception as error:  # of zipfile, zlib, json, faiss, ...: each kind of damage has its own
        why = one_line(error)
        raise UserError(f"{path}: not a readable index ({why}); delete its folder or give another --index") from None


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # gone since it was listed; reading it will say so
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _decodes(path: Path) -> bool:
    try:
        load_image(path)
    except UserError as error:
        print(f"warning: {error}; left out", file=sys.stderr)
        return False
    return True
