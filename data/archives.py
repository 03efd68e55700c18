"""Where the images lie in the archives of re-identification data sets, and in users' own data. No torch here.

Every function lists the images of one data set by split, with their names in the prepared folder. Names that carry
identity and camera stay as they are; the others get them in front: `0001_c3_NAME`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data.folders import (
    ARCHIVE_FOLDERS,
    IMAGE_SUFFIXES,
    PREPARED_FOLDER,
    SPLITS,
    TRAINING_SPLITS,
    list_folders,
    list_images,
    read_archive,
)
from utils import UserError

VERI_FOLDERS = dict.fromkeys(TRAINING_SPLITS, "image_train") | {"query": "image_query", "gallery": "image_test"}
MSMT17_LISTS = {split: f"list_{split}.txt" for split in ("train", "val", "query", "gallery")}
MSMT17_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))  # V1, V2: training images, the others
CUHK03_FOLDERS = ("labeled", "detected")
CSV_NAME = "dataset.csv"
CSV_COLUMNS = ("path", "identity", "camera", "split")
CSV_SPLITS = ("train", "val", "query", "gallery", "multi-query")
JUNK = -1
_NUMBER = re.compile(r"\d{1,17}", re.ASCII)


class SourceImage(NamedTuple):
    """One image: its file, its identity, and that identity's folder and its name in the prepared data set."""

    source: Path
    pid: int
    token: str
    name: str


Splits = dict[str, list[SourceImage]]


class UserData(NamedTuple):
    """A user's own data: the images, whether they have cameras, and the numbers of the identities by name."""

    splits: Splits
    cameras: bool
    numbers: dict[str, int]


# -------------------------------------------------------------------------------------------- published archives
def flat_archive(root: Path, folders: dict[str, str] = ARCHIVE_FOLDERS) -> Splits:
    """Archives with one folder per split and with identity and camera in the file names.

    `ARCHIVE_FOLDERS` are those of Market-1501, DukeMTMC-reID and either half of CUHK03-NP, `VERI_FOLDERS` those of
    VeRi-776. Multi-query images are optional. Raises UserError for missing or empty folders and unreadable names.
    """
    _require(root, list(dict.fromkeys(name for split, name in folders.items() if split != "multi-query")))
    splits: Splits = {}
    for split, name in folders.items():
        if (root / name).is_dir():
            images = read_archive(root / name, split)
            rows = zip(images.paths, images.pids.tolist(), images.tokens, strict=True)
            splits[split] = [SourceImage(path, pid, token, path.name) for path, pid, token in rows]
    return splits


def msmt17(root: Path) -> Splits:
    """MSMT17, V1 or V2, by its list files, which have a `val` split.

    A line is `0000/0000_000_01_0303morning_0008_0.jpg 0`: the third field of the name is the camera, 1 to 15. The
    archive counts identities from 0, which means distractor elsewhere, so 1 is added to all.
    Raises UserError for missing files and for lines of another form.
    """
    _require(root, [*MSMT17_LISTS.values()])
    versions = [folders for folders in MSMT17_FOLDERS if all((root / folder).is_dir() for folder in folders)]
    if len(versions) != 1:
        raise UserError(
            f"--data_root {root}: must hold either train/ and test/ (V1) or mask_train_v2/ and mask_test_v2/ (V2); "
            f"it holds {'both' if versions else 'neither'}, unpack one version into a folder of its own"
        )
    train_folder, test_folder = (root / folder for folder in versions[0])
    splits: Splits = {}
    for split, name in MSMT17_LISTS.items():
        folder = train_folder if split in TRAINING_SPLITS else test_folder
        lines = enumerate(_read_text(root / name).splitlines(), 1)
        splits[split] = [_msmt17_image(folder, line.strip(), root / name, i) for i, line in lines if line.strip()]
        if not splits[split]:
            raise UserError(f"{root / name}: names no image; unpack the archive again")
    return {"train_all": splits["train"] + splits["val"]} | splits


def _msmt17_image(folder: Path, line: str, file: Path, number: int) -> SourceImage:
    path, _, identity = line.rpartition(" ")
    name = path.rpartition("/")[2]
    camera = (name.split("_") + [""] * 3)[2]
    if not (re.fullmatch(_NUMBER, identity) and re.fullmatch(_NUMBER, camera)):
        raise UserError(
            f"{file}: line {number}: {line[:80]!r} is not a path and an identity as in "
            "'0000/0000_000_01_0303morning_0008_0.jpg 0'; unpack the archive again"
        )
    _require_inside(folder, path, f"{file}: line {number}")
    return _renamed(folder / path, int(identity) + 1, int(camera), name)


def cuhk03_np(root: Path) -> dict[str, Path]:
    """The folders of CUHK03-NP to prepare, by the name of the boxes: `labeled`, `detected`, or both.

    `root` holds one or both of them, or is one of them. Raises UserError for any other folder.
    """
    _require(root, [])
    if root.resolve().name in CUHK03_FOLDERS:
        return {root.resolve().name: root}
    boxes = {name: root / name for name in CUHK03_FOLDERS if (root / name).is_dir()}
    if not boxes:
        raise UserError(f"--data_root {root}: neither labeled/ nor detected/ in it; give the folder that holds them")
    return boxes


# --------------------------------------------------------------------------------------------- users' own data
def folder_per_identity(root: Path, *, test_fraction: float, seed: int) -> UserData:
    """One folder per identity, cut into training and test identities by `seed`.

    `test_fraction` of the identities, rounded, are for testing: one image of each is the query, drawn if there are two
    or more, and the others are the gallery. All images have the unknown camera, 0.

    Raises UserError for images outside folders, and for fewer than two identities to train on or none to test with.
    """
    _require(root, [])
    loose = list_images(root)
    if loose:
        raise UserError(f"{loose[0]}: lies in no identity's folder; move it into one")
    by_name = {name: list_images(root / name) for name in list_folders(root) if name != PREPARED_FOLDER}
    by_name = {name: paths for name, paths in by_name.items() if paths}
    if not by_name:
        raise UserError(f"--data_root {root}: no images in its sub-folders; expected one sub-folder per identity")

    # Sort by drawn numbers, because only `random()` is promised to be the same in every version of Python.
    rng = random.Random(seed)
    shuffled = sorted(by_name, key=lambda _: rng.random())
    tested = set(shuffled[: round(test_fraction * len(shuffled))])
    numbers = number_identities(by_name)
    train, query, gallery = [], [], []
    for name, paths in by_name.items():
        images = [_renamed(path, numbers[name], 0, path.name) for path in paths]
        chosen = int(rng.random() * len(images))
        if name not in tested:
            train += images
        else:
            query += [images[chosen]] if len(images) > 1 else []
            gallery += [image for i, image in enumerate(images) if i != chosen or len(images) == 1]
    if test_fraction < 1 and len(by_name) - len(tested) < 2:
        raise UserError(
            f"--data_root {root}: {len(by_name)} identities leave {len(by_name) - len(tested)} to train on, at least 2 "
            "are needed; add identities, lower --test-fraction, or use --test-fraction 1 for evaluation alone"
        )
    if test_fraction > 0 and not query:
        raise UserError(
            f"--data_root {root}: none of the {len(tested)} identities to test on has two images, a query and a match; "
            "add images, or use --test-fraction 0 for training alone"
        )
    splits = (_training_splits(train) if train else {}) | ({"query": query, "gallery": gallery} if query else {})
    return UserData(splits, False, numbers)


def table(root: Path, file: Path) -> UserData:
    """Images that a CSV lists in the columns path, identity, camera and split; more columns are ignored.

    path      image file in `root`, relative to it
    identity  any text; -1 is junk, for the gallery alone
    camera    whole number. For data without cameras the column is absent, or empty in every row
    split     train, val, query, gallery or multi-query. Without val rows the first image of each identity is `val`

    Raises UserError that names file and row for anything else.
    """
    _require(root, [])
    rows = _read_rows(file)
    first_number, first = rows[0]
    seen: dict[tuple[str, str], int] = {}
    for number, row in rows:
        where = f"{file}: row {number}"
        _check_row(root, row, where)
        if bool(row["camera"]) != bool(first["camera"]):
            raise UserError(
                f"{where}: {'a' if row['camera'] else 'no'} camera, unlike row {first_number}; fill the column in "
                "every row or in none"
            )
        earlier = seen.setdefault((row["path"], row["split"]), number)
        if earlier != number:
            raise UserError(f"{where}: the same image and split as row {earlier}; remove one of them")

    numbers = number_identities(row["identity"] for _, row in rows if row["identity"] != str(JUNK))
    by_split: Splits = {}
    for _, row in rows:
        source = root / row["path"]
        # Images in different folders may have the same name, so the new name contains a hash of the path.
        name = f"{source.stem}-{hashlib.sha256(row['path'].encode()).hexdigest()[:10]}{source.suffix}"
        pid = numbers.get(row["identity"], JUNK)
        by_split.setdefault(row["split"], []).append(_renamed(source, pid, int(row["camera"] or 0), name))
    for needed, given in (("train", "val"), ("query", "gallery"), ("query", "multi-query"), ("gallery", "query")):
        if given in by_split and needed not in by_split:
            raise UserError(f"{file}: no row has split {needed}, which {given} needs; add such rows")
    if "val" in by_split:
        by_split["train_all"] = by_split["train"] + by_split["val"]
    elif "train" in by_split:
        by_split |= _training_splits(by_split.pop("train"))
    splits = {split: by_split[split] for split in SPLITS if split in by_split}
    return UserData(splits, bool(first["camera"]), numbers)


def number_identities(names: Iterable[str]) -> dict[str, int]:
    """Numbers above 0 for identities: their names, if all are distinct numbers above 0, else 1, 2, ... as sorted."""
    names = sorted(set(names))
    if all(re.fullmatch(_NUMBER, name) and int(name) > 0 for name in names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) == len(names):
            return numbers
    return {name: number for number, name in enumerate(names, 1)}


# ------------------------------------------------------------------------------------------------------- helpers
def _renamed(source: Path, pid: int, camid: int, name: str) -> SourceImage:
    token = f"{pid:04d}" if pid >= 0 else str(pid)
    return SourceImage(source, pid, token, f"{token}_c{camid}_{name}")


def _training_splits(images: list[SourceImage]) -> Splits:
    """The first image of each identity, by name, is `val`; the others are `train`, as for Market-1501."""
    first: dict[int, SourceImage] = {}
    for image in sorted(images, key=lambda image: image.name):
        first.setdefault(image.pid, image)
    train = [image for image in images if image is not first[image.pid]]
    return {"train_all": images, "train": train, "val": list(first.values())}


def _require(root: Path, names: list[str]) -> None:
    """Raise UserError unless `root` holds files or folders of these names; suggest the sub-folder that does."""
    if not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder; give the folder of the unpacked archive")
    missing = [name for name in names if not (root / name).exists()]
    if missing:
        inside = [child for child in sorted(root.iterdir()) if all((child / name).exists() for name in names)]
        what = ", ".join(name if Path(name).suffix else f"{name}/" for name in missing)
        remedy = inside[0] if inside else "the folder of the unpacked archive"
        raise UserError(f"--data_root {root}: no {what} in it; give {remedy}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{file}: cannot be read ({why})") from None


def _read_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV by column, with their numbers: the lines on which they end, counted as an editor does."""
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise UserError(f"{file}: row {reader.line_num}: not CSV ({error}); check its quotation marks") from None
    header = lines[0][1] if lines else []
    missing = [name for name in CSV_COLUMNS if name not in header and name != "camera"]
    repeated = [name for name in CSV_COLUMNS if header.count(name) > 1]
    if missing or repeated:
        raise UserError(
            f"{file}: row 1: {'no column' if missing else 'more than one column'} {', '.join(missing or repeated)}; "
            "the first row must name the columns path, identity, split and, if there are cameras, camera, with commas"
        )
    if len(lines) == 1:
        raise UserError(f"{file}: no row below the header; list one image per row")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(
                f"{file}: row {number}: {len(cells)} fields for {len(header)} columns; quote fields that hold commas"
            )
        rows.append((number, {"camera": ""} | dict(zip(header, cells, strict=True))))
    return rows


def _require_inside(folder: Path, path: str, where: str) -> None:
    """Raise UserError for a listed path that leads out of its folder: lists may come from anywhere."""
    if os.path.isabs(path) or Path(os.path.normpath(path)).parts[:1] == ("..",):
        raise UserError(f"{where}: {path!r} leads out of {folder}; give paths of files in it, relative to it")


def _check_row(root: Path, row: dict[str, str], where: str) -> None:
    """Raise UserError for a value that cannot be used. Normalises the path, so that equal paths compare equal."""
    for column in ("path", "identity", "split"):
        if not row[column]:
            raise UserError(f"{where}: no {column}; fill it in, or remove the row")
    if row["split"] not in CSV_SPLITS:
        raise UserError(f"{where}: split {row['split']!r}: use one of {', '.join(CSV_SPLITS)}")
    if row["identity"] == str(JUNK) and row["split"] != "gallery":
        raise UserError(f"{where}: identity -1 is junk, which belongs into the gallery and not into {row['split']}")
    if row["camera"] and not re.fullmatch(_NUMBER, row["camera"]):
        raise UserError(f"{where}: camera {row['camera']!r} is not a whole number of 0 or more; number the cameras")
    if Path(row["path"]).suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{where}: {row['path']} is no image by its name; use {' '.join(sorted(IMAGE_SUFFIXES))}")
    _require_inside(root, row["path"], where)
    if not (root / row["path"]).is_file():
        raise UserError(f"{where}: {root / row['path']}: no such file; paths are relative to --data_root")
    row["path"] = os.path.normpath(row["path"])
