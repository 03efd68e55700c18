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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from data.folders import (
    ARCHIVE_FOLDERS,
    PREPARED_FOLDER,
    SPLITS,
    TRAINING_SPLITS,
    read_archive,
)
from data.formats import is_image
from data.listing import leave_out_deeper, list_folders, list_images, note
from data.spelling import require_one_spelling, whole_number
from utils import UserError

CSV_NAME = "dataset.csv"
CSV_COLUMNS = ("path", "identity", "camera", "split")
CSV_SPLITS = ("train", "val", "query", "gallery", "multi-query")
JUNK = -1
MOST = 10**17  # identities are kept as int64
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
def flat_archive(root: Path) -> Splits:
    """Market-1501, DukeMTMC-reID and either half of CUHK03-NP: a folder per split, identity and camera in file names.

    Multi-query images are optional. Raises UserError for missing or empty folders and unreadable names.
    """
    _require(root, *dict.fromkeys(name for split, name in ARCHIVE_FOLDERS.items() if split != "multi-query"))
    splits: Splits = {}
    for split, name in ARCHIVE_FOLDERS.items():
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
    lists = {split: root / f"list_{split}.txt" for split in ("train", "val", "query", "gallery")}
    _require(root, *(file.name for file in lists.values()))
    versions = [("train", "test"), ("mask_train_v2", "mask_test_v2")]  # V1, V2: training images, the others
    versions = [folders for folders in versions if all((root / folder).is_dir() for folder in folders)]
    if len(versions) != 1:
        what = "either train/ and test/ (V1) or mask_train_v2/ and mask_test_v2/ (V2)"
        raise UserError(f"--data_root {root}: must hold {what}; unpack one version into a folder of its own")
    splits: Splits = {"train_all": []}
    for split, file in lists.items():
        folder = root / versions[0][split not in TRAINING_SPLITS]
        lines = enumerate(_read_text(file).splitlines(), 1)
        splits[split] = [_msmt17_image(folder, line.strip(), f"{file}: line {i}") for i, line in lines if line.strip()]
        if not splits[split]:
            raise UserError(f"{file}: names no image; unpack the archive again")
    note("the identities are one higher than in the archive, which counts from 0")
    return splits | {"train_all": splits["train"] + splits["val"]}


def _msmt17_image(folder: Path, line: str, where: str) -> SourceImage:
    path, _, identity = line.rpartition(" ")
    name = path.rpartition("/")[2]
    camera = (name.split("_") + [""] * 3)[2]
    if not (re.fullmatch(_NUMBER, identity) and re.fullmatch(_NUMBER, camera)):
        raise UserError(f"{where}: {line[:80]!r} is not a path with a camera and an identity; unpack the archive again")
    if _leads_out(path):
        raise UserError(f"{where}: {path!r} leads out of {folder}; unpack the archive again")
    return _renamed(folder / path, int(identity) + 1, int(camera), name)


def cuhk03_np(root: Path) -> dict[str, Path]:
    """The folders of CUHK03-NP to prepare by name, `labeled` or `detected` or both: those in `root`, or `root` itself.

    Raises UserError for any other folder.
    """
    folders = [root.resolve(), root / "labeled", root / "detected"]
    boxes = {folder.name: folder for folder in folders if folder.name in ("labeled", "detected") and folder.is_dir()}
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
    _require(root)
    if loose := list_images(root):
        raise UserError(f"{loose[0]}: lies in no identity's folder; move it into one")
    folders = [name for name in list_folders(root) if name != PREPARED_FOLDER]
    by_name = {name: paths for name in folders if (paths := list_images(root / name))}
    for name in folders:
        leave_out_deeper(root / name)
    if not by_name:
        raise UserError(f"--data_root {root}: no images in its sub-folders; expected one sub-folder per identity")

    # Sort by drawn numbers, because only `random()` is promised to be the same in every version of Python.
    rng = random.Random(seed)
    shuffled = sorted(by_name, key=lambda _: rng.random())
    tested = set(shuffled[: round(test_fraction * len(shuffled))])
    numbers = number_identities({name: str(root / name) for name in by_name})
    train, query, gallery = [], [], []
    for name, paths in by_name.items():
        images = [_renamed(path, numbers[name], 0, path.name) for path in paths]
        chosen = int(rng.random() * len(images))
        if name not in tested:
            train += images
        else:
            query += images[chosen : chosen + 1] if len(images) > 1 else []
            gallery += images[:chosen] + images[chosen + 1 :] if len(images) > 1 else images
    if test_fraction < 1 and len(by_name) - len(tested) < 2:
        remedy = "lower --test-fraction, or use 1 for evaluation alone"
        raise UserError(f"--data_root {root}: {len(by_name)} identities leave fewer than 2 to train on; {remedy}")
    if test_fraction > 0 and not query:
        remedy = "add images, or use --test-fraction 0 for training alone"
        raise UserError(f"--data_root {root}: no identity to test on has two images, a query and a match; {remedy}")
    splits = (_training_splits(train) if train else {}) | ({"query": query, "gallery": gallery} if query else {})
    return UserData(splits, False, numbers)


def table(root: Path, file: Path) -> UserData:
    """Images that a CSV lists in the columns path, identity, camera and split; more columns are ignored.

    path      image file in `root`, relative to it
    identity  any text, spelled alike for one person; -1 is junk, for the gallery alone
    camera    whole number. For data without cameras the column is absent, or empty in every row
    split     train, val, query, gallery or multi-query. Without val rows the first image of each identity is `val`

    Raises UserError that names file and row for anything else.
    """
    _require(root)
    rows = _read_rows(file)
    first, top = next(iter(rows.items()))
    listed: dict[tuple[str, str], int] = {}
    for number, row in rows.items():
        where = f"{file}: row {number}"
        if defect := _defect(root, row):
            raise UserError(f"{where}: {defect}")
        if bool(row["camera"]) != bool(top["camera"]):
            raise UserError(f"{where}: unlike row {first} in the column camera; fill it in every row or in none")
        row["path"] = os.path.normpath(row["path"])
        earlier = listed.setdefault((row["path"], row["split"]), number)
        if earlier != number:
            raise UserError(f"{where}: the same image and split as row {earlier}; remove one of them")

    places: dict[str, str] = {}
    for number, row in rows.items():
        if whole_number(row["identity"]) != JUNK:
            places.setdefault(row["identity"], f"{file}: row {number}")
    numbers = number_identities(places)
    by_split: Splits = {}
    for row in rows.values():
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
    return UserData(splits, bool(top["camera"]), numbers)


def _read_rows(file: Path) -> dict[int, dict[str, str]]:
    """The rows of a CSV by number, the line on which each ends, as an editor counts lines."""
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    try:
        reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{file}: row {reader.reader.line_num}: not CSV ({error}); check its quotation marks") from None
    if any(header.count(name) != 1 for name in CSV_COLUMNS if name != "camera" or "camera" in header):
        raise UserError(f"{file}: row 1: must name the columns path, identity, split and, if any, camera, with commas")
    rows = {}
    for number, row in lines:
        if not any(cell and cell.strip() for name, cell in row.items() if name is not None):
            continue
        if None in row or None in row.values():
            raise UserError(f"{file}: row {number}: not a field for each of {len(header)} columns; quote commas")
        rows[number] = {name: row.get(name, "").strip() for name in CSV_COLUMNS}
    if not rows:
        raise UserError(f"{file}: no row below the header; list one image per row")
    return rows


def _defect(root: Path, row: dict[str, str]) -> str | None:
    """What is wrong with the values of a row, and the remedy."""
    path, identity, camera, split = (row[name] for name in CSV_COLUMNS)
    if not (path and identity and split):
        return "path, identity or split is empty; fill it in, or remove the row"
    if split not in CSV_SPLITS:
        return f"split {split[:80]!r}: use one of {', '.join(CSV_SPLITS)}"
    person = whole_number(identity)
    if person is not None and person < JUNK:
        return f"identity {identity[:80]!r} is below -1; people are numbered from 1, and -1 is junk"
    if person == JUNK and split != "gallery":
        return f"identity -1 is junk, which belongs into the gallery and not into {split}"
    if camera and not re.fullmatch(_NUMBER, camera):
        return f"camera {camera[:80]!r} is not a whole number of 0 or more; number the cameras"
    if _leads_out(path):
        return f"{path[:80]!r} leads out of {root}; give paths of files in it, relative to it"
    if not (root / path).is_file():
        return f"{root / path}: no such file; paths are relative to --data_root"
    return None if is_image(root / path) else f"{path[:80]} is no image by its name"


# ------------------------------------------------------------------------------------------------------- helpers
def number_identities(places: Mapping[str, str]) -> dict[str, int]:
    """Numbers above 0 for identities: their names, if all are whole numbers above 0, else 1, 2, ... as sorted.

    `places` says where each identity stands. Raises UserError for two spellings of one.
    """
    require_one_spelling(places)
    names = sorted(places)
    numbers = {name: whole_number(name) for name in names}
    if all(number is not None and 0 < number < MOST for number in numbers.values()):
        return numbers
    return {name: number for number, name in enumerate(names, 1)}


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


def _require(root: Path, *names: str) -> None:
    """Raise UserError unless `root` holds files or folders of these names; suggest the sub-folder that does."""
    if not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder; give the folder of the unpacked archive")
    if missing := [name for name in names if not (root / name).exists()]:
        inside = [child for child in sorted(root.iterdir()) if all((child / name).exists() for name in names)]
        what = ", ".join(name if Path(name).suffix else f"{name}/" for name in missing)
        remedy = inside[0] if inside else "the folder of the unpacked archive"
        raise UserError(f"--data_root {root}: no {what} in it; give {remedy}")


def _leads_out(path: str) -> bool:
    """Whether a listed path leads out of its folder: lists may come from anywhere."""
    return os.path.isabs(path) or Path(os.path.normpath(path)).parts[:1] == ("..",)


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """The rows as a CSV file; names of files may be any bytes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{file}: cannot be read ({why})") from None
