"""Reading a person re-identification data set: which images, of whom, from which camera. No torch here.

Two layouts are read, and give the same lists:

- prepared, by `prepare.py`: `DATA_ROOT/SPLIT/IDENTITY/*.jpg`, or the same under `DATA_ROOT/pytorch`;
- the archive's own: `DATA_ROOT/bounding_box_train/*.jpg` and so on, the identity being in the file name.

Lists are sorted by identity token as a string, then by file name: the order of torchvision's ImageFolder,
on which the class numbers of the released weights rest.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

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
# Lies in the prepared folder while it is being filled, so that nobody trains on half a data set.
UNFINISHED_MARK = ".unfinished"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm"})
# What a file may really hold, whatever its suffix. Pillow would also open formats that start other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "GIF", "WEBP", "TIFF")
# What Pillow raises on a broken file.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)

_NAME = re.compile(r"(-?\d{1,18})_c(\d{1,18})", re.ASCII)
_TAIL_BYTES = 4096
_NAMED_IN_MESSAGE = 3


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
    names = [name for name in _visible(folder, "is_file") if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return [folder / name for name in names]


def list_folders(folder: Path) -> list[str]:
    """The names of the folders directly in `folder`, sorted; hidden ones are left out."""
    return _visible(folder, "is_dir")


def _visible(folder: Path, kind: str) -> list[str]:
    """The names of a folder's files or sub-folders that do not begin with a dot, sorted."""

    def fits(entry: os.DirEntry) -> bool:
        try:
            return getattr(entry, kind)()
        except OSError:
            return False  # a link that leads round in a circle is no more than one that leads nowhere

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
        print(f"warning: {error.filename}: cannot be read ({error.strerror}); left out", file=sys.stderr)

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
    need_names  True: every file name must carry identity and camera (evaluation needs them). False: the
                camera is 0 where the name has none; training gets by with one sub-folder per identity.

    The identity of a training image is its sub-folder's name, of any other image the one in its file name.
    Raises UserError for a missing or empty folder, an unfinished preparation, or a name that cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: unknown; use one of {', '.join(SPLITS)}")
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise UserError(f"data_root {root}: no such folder; set data_root, or --test_dir, to the data set's folder")

    for base in (root / PREPARED_FOLDER, root):
        if (base / UNFINISHED_MARK).exists():
            raise UserError(f"{base}: its making was interrupted; run the same command again")
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
    """Images of people to generate from or to score, wherever they lie, sorted by name.

    source  a data set, of which `split` is read (`query` by default) without junk and distractors; or a folder with
            one sub-folder per person, one split's folder for instance; or a folder with images of any names. There,
            the identities come from the names if all have one; otherwise every image counts as another person.
    option  where `source` came from, for the errors
    generated  the images may be those of generate.py: a data set of train_all alone, and of identity 0 throughout,
            where every image counts as another person

    Raises UserError for a missing folder, one without images, and a `split` of what is no data set.
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
    """One split from the archive's own folder of it, identities and cameras from the file names.

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
    return _image_list(
        [row[2] for row in rows], [row[3] for row in rows], [row[4] for row in rows], [row[0] for row in rows]
    )


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

    all_paths, pids, camids, all_tokens = [], [], [], []
    for (token, paths), folder_pid in zip(per_identity, folder_pids, strict=True):
        for path in paths:
            if need_names or _NAME.match(path.name):
                pid, camid = _parse_path(path)
            else:
                pid, camid = folder_pid, 0
            all_paths.append(path)
            pids.append(folder_pid if split in TRAINING_SPLITS else pid)
            camids.append(camid)
            all_tokens.append(token)
    return _image_list(all_paths, pids, camids, all_tokens)


def _folder_pids(tokens: list[str]) -> list[int]:
    """Identities of the folders: the numbers they are named by, or 1, 2, ... where some name is no number."""
    if all(re.fullmatch(r"-?[0-9]{1,18}", token) for token in tokens):
        pids = [int(token) for token in tokens]
        if len(set(pids)) == len(pids):
            return pids
    return list(range(1, len(tokens) + 1))


def _image_list(paths: list[Path], pids: list[int], camids: list[int], tokens: list[str]) -> ImageList:
    return ImageList(paths, np.array(pids, dtype=np.int64), np.array(camids, dtype=np.int64), tokens)


def _suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))


def require_identities(images: ImageList, minimum: int = 2) -> None:
    """Raise UserError when a training folder holds fewer than `minimum` identities."""
    if images.num_classes < minimum:
        where = os.path.commonpath([path.parent for path in images.paths]) if len(images) else "the training folder"
        raise UserError(
            f"{where}: {images.num_classes} identity here ({', '.join(images.classes)}), training "
            f"needs at least {minimum}; give it one sub-folder per identity"
        )


def data_set_name(data_root: str | Path) -> str:
    """What to call a data set: `../MSMT17/pytorch` and `../MSMT17` are MSMT17.

    Either half of CUHK03-NP has the name of the folder around it before its own: CUHK03-NP-labeled.
    """
    root = Path(os.path.abspath(data_root))
    root = root.parent if root.name == PREPARED_FOLDER else root
    return f"{root.parent.name}-{root.name}" if root.name in ("labeled", "detected") else root.name


def data_set_root(data_root: str | Path) -> Path:
    """The folder of a data set, whether that or its prepared folder is given; equal for one and the same."""
    root = Path(data_root).resolve()
    return root.parent if root.name == PREPARED_FOLDER else root


def other_data_set(data_root: str | Path, own: str | Path) -> str:
    """What results on `data_root` have in their files' names: nothing on `own`, the run's data set, -NAME elsewhere."""
    return "" if data_set_root(data_root) == data_set_root(own) else f"-{data_set_name(data_root)}"


def have_cameras(*sides: ImageList) -> bool:
    """Whether images of more than one camera are among these, so that something can be left out by camera."""
    return len(np.unique(np.concatenate([side.camids for side in sides]))) > 1


def check_test_set(data_root: str | Path, *, multi: bool = False, cameras: bool | None = True) -> None:
    """Read the lists of query and gallery, and of multi-query images with `multi`, before hours are spent on them.

    cameras  False: images of one camera count as matches, and the query image itself alone does not. None: as the
             images have it (`have_cameras`).

    Raises UserError as `read_split`, and when no query has a match in the gallery, or one no multi-query image.
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


def check_images(
    paths: Sequence[Path],
    *,
    skip_bad: bool,
    remedy: str = "set skip_bad_images: true in the config",
    minimum: int = 1,
) -> list[bool]:
    """Look at the header and the end of every file; True where it is a usable image.

    Bad are: empty files, files that are no image, files cut short, images of an absurd size. The pixels are
    decoded only where header and end leave a doubt, so that 13,000 files take seconds.

    skip_bad  False: raise UserError if any file is bad. True: say so in one line on stderr.
    remedy    what the error offers besides replacing the files
    Raises UserError also when fewer than `minimum` images remain.
    """
    threads = min(16, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        defects = list(pool.map(_defect, paths, chunksize=64))
    bad = [f"{path} ({why})" for path, why in zip(paths, defects, strict=True) if why is not None]
    if bad:
        more = len(bad) - _NAMED_IN_MESSAGE
        named = ", ".join(bad[:_NAMED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
        found = f"{len(bad)} of {len(paths)} images cannot be read: {named}"
        if not skip_bad:
            raise UserError(f"{found}; replace them, or {remedy}")
        if len(paths) - len(bad) < minimum:
            raise UserError(f"{found}; no image remains, give a folder with readable images")
        print(f"warning: {found}; left out", file=sys.stderr)
    return [why is None for why in defects]


def _defect(path: Path) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return "empty file"
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            file.seek(0)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > limit:
                    return f"{image.width} x {image.height} pixels are too many"
                if not _ends_well(image.format, tail):
                    image.load()
    except Image.DecompressionBombError:
        return "too many pixels"
    except Image.UnidentifiedImageError:
        return "not an image"
    except PermissionError:
        return "no permission to read it"
    except FileNotFoundError:
        return "no such file"
    except DECODE_ERRORS:
        return "damaged or cut short"
    return None


def _ends_well(image_format: str | None, tail: bytes) -> bool:
    """Whether the last bytes of a file show that its image is complete; False leaves it open."""
    if image_format in ("JPEG", "MPO"):
        # Neither marker occurs inside compressed data. An end before the last start of scan is a thumbnail's.
        return tail.rfind(b"\xff\xd9") > tail.rfind(b"\xff\xda")
    if image_format == "PNG":
        return b"IEND" in tail[-64:]
    return False
