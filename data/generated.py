"""Generated data sets, as generate.py makes them: pairs, file names, the manifest, and training on them.

FOLDER/train_all/ID/*.jpg   images, named as Market-1501's: a data set that `read_split` reads
FOLDER/manifest.csv         a row per image: both sources, identities, cameras, the teacher's soft label
FOLDER/generate.json        the settings that made it
FOLDER/.unfinished/         the rows of the images so far; there until every image is, so that nobody trains on half of
                            a data set
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from data.archives import csv_bytes
from data.folders import UNFINISHED_MARK, ImageList
from data.images import check_images
from files import write_whole
from utils import UserError, one_line

MANIFEST = "manifest.csv"
SETTINGS = "generate.json"
SPLIT = "train_all"
UNLABELLED = "0000"  # Market-1501's number of images that show none of its identities
_DRAWS = 1 << 16  # pairs per draw; a constant, so that more images begin with the same pairs


class Row(NamedTuple):
    """One line of the manifest; the fields are the columns."""

    file: str  # relative to the manifest's folder
    appearance: str  # source of the clothes, relative to generate.py's --input
    structure: str  # source of body, pose and background
    appearance_id: str
    structure_id: str
    appearance_camera: int  # 0: unknown
    structure_camera: int
    soft_label: str  # `ID:PROBABILITY ...`, most probable first; empty without a teacher


# ------------------------------------------------------------------------------------------- what to make
def count_pairs(labels: np.ndarray) -> int:
    """How many ordered pairs of images of different identities there are; `labels` is (n,)."""
    sizes = np.unique(labels, return_counts=True)[1]
    return int(len(labels) ** 2 - (sizes.astype(object) ** 2).sum())


def draw_swap_pairs(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, 2) positions of (appearance, structure) images of different identities, no pair twice.

    All pairs are equally likely. Pair i depends on `labels` (n,), `seed` and i, but not on `count`.
    Raises ValueError if there are fewer pairs than `count`.
    """
    if count > count_pairs(labels):
        raise ValueError(f"{count} pairs of {count_pairs(labels)}")
    rng = np.random.default_rng(seed)
    codes: dict[int, None] = {}  # as an ordered set
    while len(codes) < count:
        pairs = rng.integers(0, len(labels), (_DRAWS, 2))
        pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
        codes.update(dict.fromkeys((pairs[:, 0] * len(labels) + pairs[:, 1]).tolist()))
    return np.stack(np.divmod(np.array(list(codes)[:count], dtype=np.int64), len(labels)), axis=1)


def plan_rows(images: ImageList, root: Path, pairs: np.ndarray, *, labelled: bool, suffix: str) -> list[Row]:
    """The manifest's rows for `pairs` (n, 2) of `images`, which lie under `root`; their soft labels are empty.

    Image i is called `ID_cCAMERAs1_i_00`, in the folder of its identity. The identity is that of the clothes, or 0000
    if not `labelled`. The camera is that of the structure image, whose background is shown.
    """
    sources = [path.relative_to(root).as_posix() for path in images.paths]
    tokens, cameras = images.tokens, images.camids.tolist()
    rows = []
    for index, (a, s) in enumerate(pairs.tolist()):
        folder = number = tokens[a] if labelled else UNLABELLED
        if not re.fullmatch("[0-9]{1,18}", number):  # File names need a number; folders may have any name.
            number = f"{images.pids[a]:04d}"
        file = f"{SPLIT}/{folder}/{number}_c{cameras[s]}s1_{index:06d}_00{suffix}"
        rows.append(Row(file, sources[a], sources[s], tokens[a], tokens[s], cameras[a], cameras[s], soft_label=""))
    return rows


def format_soft_label(probabilities: np.ndarray, classes: Sequence[str], top: int) -> str:
    """The `top` most probable of the K classes as `ID:PROBABILITY ...`; `probabilities` is (K,)."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    # Quoted, because a folder's name may contain a blank or a colon.
    return " ".join(f"{quote(classes[k], safe='', errors='surrogateescape')}:{probabilities[k]:.4f}" for k in order)


def parse_soft_label(text: str) -> dict[str, float]:
    """Probabilities by identity. Raises ValueError for anything that is no soft label."""
    label: dict[str, float] = {}
    for entry in text.split():
        token, sign, number = entry.rpartition(":")
        probability = float(number)
        if not sign or not 0 <= probability <= 1:
            raise ValueError(f"{entry!r} is not ID:PROBABILITY")
        label[unquote(token, errors="surrogateescape")] = probability
    # Rounding to four digits may raise the sum a little above 1.
    if not label or sum(label.values()) > 1 + 1e-4 * len(label):
        raise ValueError("no probabilities" if not label else "probabilities above 1 in sum")
    return label


# ------------------------------------------------------------------------------------------ the manifest
def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a manifest, whole or not at all."""
    write_whole(path, lambda file: file.write(csv_bytes([Row._fields, *rows])))


def read_rows(path: Path) -> list[Row]:
    """The rows of a manifest.

    Raises UserError if it is missing or damaged, and if it names files outside of the data set's folder.
    """
    rows: dict[str, Row] = {}
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            lines = csv.reader(stream, strict=True)
            if next(lines, None) != list(Row._fields):
                raise ValueError("the first line does not name the columns of generate.py")
            for line in lines:
                row = _parse_row(line)
                if rows.setdefault(row.file, row) is not row:
                    raise ValueError(f"{row.file[:80]} is listed twice")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder made by generate.py") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: line {lines.line_num}: {error}; generate the data set again") from None
    return list(rows.values())


def _parse_row(line: list[str]) -> Row:
    """A row of the manifest. Raises ValueError for one that generate.py does not write."""
    if len(line) != len(Row._fields):
        raise ValueError(f"{len(line)} columns instead of {len(Row._fields)}")
    row = Row(*line)
    inner = PurePosixPath(row.file)
    if not inner.parts or "\0" in row.file or inner.is_absolute() or ".." in inner.parts or len(row.file) > 1024:
        raise ValueError(f"{row.file[:80]!r} is not the path of a file in the manifest's folder")
    for camera in (row.appearance_camera, row.structure_camera):
        if not re.fullmatch("[0-9]{1,18}", camera):
            raise ValueError(f"camera {camera[:20]!r} is not a whole number of at most 18 digits")
    return row._replace(appearance_camera=int(row.appearance_camera), structure_camera=int(row.structure_camera))


# ------------------------------------------------------------------------------------- training on them
@dataclass(frozen=True)
class SoftLabels:
    """Labels of n images over K classes, each as (floor, peaks): `floor` everywhere, plus `peaks` at some classes."""

    num_classes: int  # K
    labels: list[tuple[float, dict[int, float]]]

    def rows(self, index: np.ndarray) -> np.ndarray:
        """(N, K) float32 of the images at `index` (N,); each row is a distribution."""
        q = np.empty((len(index), self.num_classes), np.float32)
        for row, (floor, peaks) in zip(q, (self.labels[i] for i in index), strict=True):
            row[:] = floor
            for label, peak in peaks.items():
                row[label] = floor + peak
        return q


def soften(label: dict[int, float], num_classes: int) -> tuple[float, dict[int, float]]:
    """Floor and peaks of a soft label: what its classes leave of 1 is spread evenly over the rest."""
    total, others = sum(label.values()), num_classes - len(label)
    if total >= 1 or not others:
        return 0.0, {k: p / total for k, p in label.items()}
    floor = (1 - total) / others
    return floor, {k: p - floor for k, p in label.items()}


def add_generated(
    images: ImageList, folder: Path, policy: str, *, skip_bad: bool = False
) -> tuple[ImageList, SoftLabels | None]:
    """The real training images followed by the generated ones of `folder`, and the labels of all where not one-hot.

    policy  one_hot: the identity of the clothes; lsro: the same probability for every identity (label smoothing for
            outliers); soft: the manifest's. Real images keep their identity.

    Raises UserError for an unfinished or damaged data set, for identities that `images` do not have, and for `soft`
    if the manifest has no soft labels.
    """
    if (folder / UNFINISHED_MARK).exists():
        raise UserError(f"extra_data {folder}: its generation was interrupted; run the same generate.py command again")
    manifest = folder / MANIFEST
    rows = read_rows(manifest)
    if not rows:
        raise UserError(f"extra_data {folder}: no images in it; generate some")
    classes = {token: label for label, token in enumerate(images.classes)}
    for row in rows:
        _check_known(row.appearance_id, classes, manifest)
    paths = [folder / row.file for row in rows]
    keep = check_images(paths, skip_bad=skip_bad)
    rows = [row for row, fine in zip(rows, keep, strict=True) if fine]
    pid_of = dict(zip(images.tokens, images.pids.tolist(), strict=True))
    both = ImageList(
        images.paths + [path for path, fine in zip(paths, keep, strict=True) if fine],
        [*images.pids, *(pid_of[row.appearance_id] for row in rows)],
        [*images.camids, *(row.structure_camera for row in rows)],
        images.tokens + [row.appearance_id for row in rows],
    )
    if policy == "one_hot":
        return both, None
    labels: list[tuple[float, dict[int, float]]] = [(0.0, {label: 1.0}) for label in images.labels().tolist()]
    if policy == "lsro":
        labels += [(1 / len(classes), {})] * len(rows)
    else:
        labels += [_manifest_label(row, classes, manifest) for row in rows]
    return both, SoftLabels(len(classes), labels)


def _manifest_label(row: Row, classes: dict[str, int], manifest: Path) -> tuple[float, dict[int, float]]:
    """Floor and peaks of a row's soft label, by the numbers of the classes."""
    if not row.soft_label:
        remedy = "generate with a --teacher, or set extra_labels: one_hot"
        raise UserError(f"{manifest}: {row.file} has no soft label; {remedy}")
    try:
        label = parse_soft_label(row.soft_label)
    except ValueError as error:
        why = f"soft label of {row.file}: {one_line(error)}"
        raise UserError(f"{manifest}: {why}; generate the data set again") from None
    for token in label:
        _check_known(token, classes, manifest)
    return soften({classes[token]: probability for token, probability in label.items()}, len(classes))


def _check_known(token: str, classes: dict[str, int], manifest: Path) -> None:
    if token not in classes:
        remedy = "set extra_data to images generated from this config's data_root"
        raise UserError(f"{manifest}: identity {token[:80]} is not in the training folder; {remedy}")
