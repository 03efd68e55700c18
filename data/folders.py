"""Reading a person re-identification data set: which images, of whom, from which camera. No torch here.

Two layouts give the same lists:

- prepared by `prepare.py`: `DATA_ROOT/SPLIT/IDENTITY/*.jpg`, or the same under `DATA_ROOT/pytorch`;
- as the archive was packed: `DATA_ROOT/bounding_box_train/*.jpg` and so on, with the identity in the file name.

Lists are sorted by identity token as a string, then by file name. This is the order of torchvision's ImageFolder, from
which the released weights have their class numbers.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils import UserError

SPLITS = ("train_all", "train", "val", "query", "gallery", "multi-query")
TRAINING_SPLITS = ("train_all", "train", "val")
# `train` and `val` are cut out of the folder of `train_all`.
ARCHIVE_FOLDERS = {
    "train_all": "bounding_box_train",
    "train": "bounding_box_train",
    "val": "bounding_box_train",
    "query": "query",
    "gallery": "bounding_box_test",
    "multi-query": "gt_bbox",
}
PREPARED_FOLDER = "pytorch"
# A file that marks a prepared folder while it is being filled, so that nobody trains on half a data set.
UNFINISHED_MARK = ".unfinished"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm"})

_NAME = re.compile(r"(-?\d{1,18})_c(\d{1,18})", re.ASCII)


@dataclass(frozen=True, eq=False)
class ImageList:
    """n images with their identities and cameras, index for index.

    paths   n files
    pids    (n,) int64 identity; -1 junk, 0 distractor (in folders that hold such)
    camids  (n,) int64 camera, 0 where unknown
    tokens  n identities as written in the folder or file name (`0002`, `-1`); None: `str(pid)`
    """

    paths: list[Path]
    pids: np.ndarray
    camids: np.ndarray
    tokens: list[str] | None = None

    def __post_init__(self) -> None:
        if self.tokens is None:
            object.__setattr__(self, "tokens", [str(pid) for pid in self.pids])

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self) -> np.ndarray:
        """(n,) int64 class numbers 0..num_classes-1: the rank of the identity's token, sorted as a string."""
        rank = {token: label for label, token in enumerate(self.classes)}
        return np.array([rank[token] for token in self.tokens], dtype=np.int64)

    @property
    def classes(self) -> list[str]:
        """The distinct identity tokens; `classes[label]` is the token of a class."""
        return sorted(set(self.tokens))

    @property
    def num_classes(self) -> int:
        return len(set(self.tokens))

    def select(self, mask: Sequence[bool] | np.ndarray) -> ImageList:
        """The images where `mask` (n booleans) is true, e.g. the mask of `check_images`."""
        keep = np.flatnonzero(np.asarray(mask, dtype=bool))
        paths, tokens = [self.paths[i] for i in keep], [self.tokens[i] for i in keep]
        return ImageList(paths, self.pids[keep], self.camids[keep], tokens)


def parse_name(name: str) -> tuple[int, int]:
    """Identity and camera of a file name: `0002_c1s1_000451_03.jpg` is (2, 1), `-1_c3s2_...` is (-1, 3).

    Raises UserError when the name does not start like that.
    """
    match = _NAME.match(name)
    if match is None:
        raise UserError(
            f"{name}: no identity and camera in the file name; rename it like 0002_c1s1_000451_03.jpg "
            "(identity 2, camera 1)"
        )
    return int(match[1]), int(match[2])


def list_images(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; hidden files are left out."""
    return [folder / name for name in _visible(folder, "is_file") if Path(name).suffix.lower() in IMAGE_SUFFIXES]


def list_folders(folder: Path) -> list[str]:
    """The names of the folders directly in `folder`, sorted; hidden ones are left out."""
    return _visible(folder, "is_dir")


def _visible(folder: Path, kind: str) -> list[str]:
    """The names of a folder's files or sub-folders that do not begin with a dot, sorted."""

    def fits(entry: os.DirEntry) -> bool:
        try:
            return getattr(entry, kind)()
        except OSError:
            return False  # Treat a circular link as a broken one.

    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and fits(entry))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); set its permissions, or move it away") from None


def find_images(source: str | Path, option: str) -> list[Path]:
    """The image files of a folder and its sub-folders, sorted folder by folder; or the one file that `source` is.

    Hidden files and folders are left out, links to folders are not followed.
    Raises UserError that names `option`, where `source` came from, if it is missing or holds no image.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{option} {source}: no such file or folder")

    def unreadable(error: OSError) -> None:
        logging.warning(f"{error.filename}: cannot be read ({error.strerror}); left out")

    paths = []
    for folder, inner, _ in os.walk(source, onerror=unreadable):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        paths += list_images(Path(folder))
    if not paths:
        raise UserError(f"{option} {source}: no images in it or below; looked for {_suffixes()} files")
    return paths


def read_split(data_root: str | Path, split: str, *, need_names: bool = True) -> ImageList:
    """The images of one split, in a fixed order.

    split       one of SPLITS
    need_names  True: every file name must carry identity and camera (evaluation needs them). False: the camera is 0
                where the name has none; one sub-folder per identity is enough for training

    A training image's identity is its sub-folder's name. All others have their identity in the file name.
    Raises UserError for a missing or empty folder, an unfinished preparation, or a name that cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: unknown; use one of {', '.join(SPLITS)}")
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise UserError(f"data_root {root}: no such folder; set data_root, or --test_dir, to the data set's folder")

    for base in (root / PREPARED_FOLDER, root):
        if (base / UNFINISHED_MARK).exists():
            raise UserError(f"{base}: making it was interrupted; run the same command again")
        if (base / split).is_dir():
            return _read_prepared(base / split, split, need_names)
    if (root / ARCHIVE_FOLDERS[split]).is_dir():
        return read_archive(root / ARCHIVE_FOLDERS[split], split)
    raise UserError(
        f"data_root {root}: no {split}/, {PREPARED_FOLDER}/{split}/ or {ARCHIVE_FOLDERS[split]}/ in it; "
        "set data_root, or --test_dir, to the data set's folder, or prepare it with prepare.py"
    )


def is_data_set(root: Path) -> bool:
    """Whether a folder holds splits, in either layout."""
    names = {*SPLITS, *ARCHIVE_FOLDERS.values()}
    return any((base / name).is_dir() for base in (root, root / PREPARED_FOLDER) for name in names)


def read_people(
    source: str | Path, split: str | None = None, *, option: str = "--input", generated: bool = False
) -> ImageList:
    """Images of people to generate from or to score, in any layout, sorted by name.

    source     one of: a data set, of which `split` (default: `query`) is read without junk and distractors; a folder
               with one sub-folder per person, for instance one split's; a folder of images. The identities of the last
               come from the file names if all have one; otherwise every image counts as another person
    option     where `source` came from, for the errors
    generated  the images may come from generate.py: a data set of train_all alone. If all have identity 0, every image
               counts as another person

    Raises UserError for a missing folder, one without images, and a `split` of a folder that is no data set.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"{option} {root}: no such folder; give a data set or a folder of images")
    if is_data_set(root):
        default = "train_all" if generated and not (root / "query").is_dir() else "query"
        images = read_split(root, split or default, need_names=False)
    elif split is not None:
        raise UserError(f"--split {split}: {root} is a folder of images, not a data set; leave --split out")
    elif loose := list_images(root):
        if not all(_NAME.match(path.name) for path in loose):
            n = len(loose)
            return _image_list(loose, list(range(1, n + 1)), [0] * n, [path.stem for path in loose])
        images = _read_flat(root, loose, training=False)
    else:
        try:
            images = _read_prepared(root, "train_all", need_names=False)
        except UserError:
            raise UserError(
                f"{option} {root}: neither a data set nor a folder of images; looked for {_suffixes()} files there "
                "and in one sub-folder per person"
            ) from None
    if generated and not images.pids.any():
        return replace(images, pids=np.arange(1, len(images) + 1), tokens=None)
    people = images.select(images.pids > 0)
    if not len(people):
        raise UserError(f"{option} {root}: all {len(images)} images are junk or distractors; give images of people")
    return people


def read_archive(folder: Path, split: str) -> ImageList:
    """One split from its folder in the archive, with identities and cameras from the file names.

    The first image of each identity, in file name order, is its `val` image; the others are `train`. Junk and
    distractors (identity 0 or less) never train.
    """
    images = _read_flat(folder, list_images(folder), training=split in TRAINING_SPLITS)
    if split in ("train", "val"):
        tokens = images.tokens
        first = np.array([i == 0 or tokens[i] != tokens[i - 1] for i in range(len(tokens))])
        images = images.select(first if split == "val" else ~first)
    if not len(images):
        raise UserError(f"{folder}: no images for {split}; unpack the archive again")
    return images


def _read_flat(folder: Path, paths: list[Path], *, training: bool) -> ImageList:
    """Images that lie directly in a folder, by the identities and cameras in their names."""
    rows = []
    for path in paths:
        pid, camid = _parse_path(path)
        if pid > 0 or not training:
            rows.append((path.name.partition("_")[0], path.name, path, pid, camid))
    # By token first: `20_c1` sorts before `2_c1` as a file name, but folder `2` before folder `20`.
    rows.sort(key=lambda row: row[:2])
    tokens, _, paths, pids, camids = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [], [])
    return _image_list(paths, pids, camids, tokens)


def _parse_path(path: Path) -> tuple[int, int]:
    try:
        return parse_name(path.name)
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from None


def _read_prepared(folder: Path, split: str, need_names: bool) -> ImageList:
    loose = list_images(folder)
    tokens = list_folders(folder)
    if loose and not tokens:
        # The archive's `query` bears the same name as the prepared one; its images lie directly in it.
        return _read_flat(folder, loose, training=split in TRAINING_SPLITS)
    if loose:
        raise UserError(
            f"{folder}: holds both images and sub-folders ({loose[0].name}, {tokens[0]}/); "
            "move every image into the sub-folder of its identity"
        )

    per_identity = [(token, list_images(folder / token)) for token in tokens]
    per_identity = [(token, paths) for token, paths in per_identity if paths]
    if not per_identity:
        raise UserError(f"{folder}: no images; expected one sub-folder per identity with {_suffixes()} files")
    folder_pids = _folder_pids([token for token, _ in per_identity])

    rows = []
    for (token, paths), folder_pid in zip(per_identity, folder_pids, strict=True):
        for path in paths:
            named = need_names or _NAME.match(path.name)
            pid, camid = _parse_path(path) if named else (folder_pid, 0)
            rows.append((path, folder_pid if split in TRAINING_SPLITS else pid, camid, token))
    return _image_list(*map(list, zip(*rows, strict=True)))


def _folder_pids(tokens: list[str]) -> list[int]:
    """Identities of the folders: the numbers in their names, or 1, 2, ... if a name is no number."""
    if all(re.fullmatch(r"-?[0-9]{1,18}", token) for token in tokens):
        pids = [int(token) for token in tokens]
        if len(set(pids)) == len(pids):
            return pids
    return list(range(1, len(tokens) + 1))


def _image_list(paths: list[Path], pids: list[int], camids: list[int], tokens: list[str]) -> ImageList:
    return ImageList(paths, np.array(pids, dtype=np.int64), np.array(camids, dtype=np.int64), tokens)


def _suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))


def require_identities(images: ImageList) -> None:
    """Raise UserError if a training folder holds fewer than two identities."""
    if images.num_classes < 2:
        where = os.path.commonpath([path.parent for path in images.paths]) if len(images) else "the training folder"
        raise UserError(
            f"{where}: {images.num_classes} identity here ({', '.join(images.classes)}), training "
            "needs at least 2; give it one sub-folder per identity"
        )


def data_set_name(data_root: str | Path) -> str:
    """What to call a data set: MSMT17 for `../MSMT17/pytorch` and `../MSMT17`.

    Either half of CUHK03-NP is named after its parent folder too: CUHK03-NP-labeled.
    """
    root = Path(os.path.abspath(data_root))
    root = root.parent if root.name == PREPARED_FOLDER else root
    return f"{root.parent.name}-{root.name}" if root.name in ("labeled", "detected") else root.name


def other_data_set(data_root: str | Path, trained_on: str | Path) -> str:
    """The suffix of result files: "" if `data_root` is the data set that a run was trained on, else "-NAME"."""
    roots = [Path(root).resolve() for root in (data_root, trained_on)]
    tested, trained = (root.parent if root.name == PREPARED_FOLDER else root for root in roots)
    return "" if tested == trained else f"-{data_set_name(data_root)}"


def have_cameras(*sides: ImageList) -> bool:
    """Whether these images come from more than one camera, so that matches of one camera can be left out."""
    return len(np.unique(np.concatenate([side.camids for side in sides]))) > 1


def check_test_set(data_root: str | Path, *, multi: bool = False, cameras: bool | None = True) -> None:
    """Read the lists of query and gallery, with `multi` also of multi-query images, before hours are spent on them.

    cameras  True: a match is an image of another camera. False: any image but the query itself. None: True if the
             images have cameras (`have_cameras`)

    Raises UserError as `read_split` does, if no query has a match in the gallery, and if a query has no multi-query
    image.
    """
    query, gallery = read_split(data_root, "query"), read_split(data_root, "gallery")
    cameras = have_cameras(query, gallery) if cameras is None else cameras
    if multi:
        sides = (query, read_split(data_root, "multi-query"))
        asked, there = (set(zip(side.pids.tolist(), side.camids.tolist(), strict=True)) for side in sides)
        if absent := sorted(asked - there):
            raise UserError(
                f"data_root {data_root}: no multi-query image of identity {absent[0][0]} in camera {absent[0][1]}; the "
                "multi-query folder must hold every query's identity and camera"
            )
    q_views, g_views = (side.camids.tolist() if cameras else [p.name for p in side.paths] for side in (query, gallery))
    seen: dict[int, set[int | str]] = {}
    for pid, view in zip(gallery.pids.tolist(), g_views, strict=True):
        seen.setdefault(pid, set()).add(view)
    asked = [(pid, view) for pid, view in zip(query.pids.tolist(), q_views, strict=True) if pid in seen and pid != -1]
    if not asked:
        raise UserError(
            f"{data_root}: none of the {query.num_classes} identities in query is in the gallery (query has "
            f"{query.classes[0]}, the gallery {gallery.classes[0]}); both must be of one data set"
        )
    if not any(seen[pid] - {view} for pid, view in asked):
        remedy = "for data without cameras use --no-cameras" if cameras else "add other images to the gallery"
        what = "camera" if cameras else "image"
        raise UserError(f"{data_root}: no query has a match of another {what} in the gallery; {remedy}")
