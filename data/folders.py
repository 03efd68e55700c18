"""Reading a person re-identification data set: which images, of whom, from which camera. No torch here.

Two layouts give the same lists:

- prepared by `prepare.py`: `DATA_ROOT/SPLIT/IDENTITY/*.jpg`, or the same under `DATA_ROOT/pytorch`;
- as the archive was packed: `DATA_ROOT/bounding_box_train/*.jpg` and so on, with the identity in the file name.

Lists are sorted by identity token as a string, then by file name. This is the order of torchvision's ImageFolder, from
which the released weights have their class numbers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.listing import leave_out, leave_out_deeper, list_folders, list_images, note
from data.spelling import require_one_spelling
from utils import UserError

SPLITS = ("train_all", "train", "val", "query", "gallery", "multi-query")
TRAINING_SPLITS = ("train_all", "train", "val")
# `train` and `val` are cut out of the folder of `train_all`.
ARCHIVE_FOLDERS = dict.fromkeys(TRAINING_SPLITS, "bounding_box_train") | {
    "query": "query",
    "gallery": "bounding_box_test",
    "multi-query": "gt_bbox",
}
PREPARED_FOLDER = "pytorch"
# A file that marks a prepared folder while it is being filled, so that nobody trains on half a data set.
UNFINISHED_MARK = ".unfinished"
# Between the names of the images that a swap has its clothes and its structure from.
ON = "_on_"

_NAME = re.compile(r"(-?\d{1,18})_c(\d{1,18})", re.ASCII)


@dataclass(eq=False)
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
        self.pids, self.camids = (np.asarray(numbers, dtype=np.int64) for numbers in (self.pids, self.camids))
        if self.tokens is None:
            self.tokens = [str(pid) for pid in self.pids]

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

    @property
    def folder(self) -> str:
        """The folder that holds all images, for messages."""
        return os.path.commonpath([path.parent for path in self.paths]) if self.paths else "the data set"

    def select(self, mask: Sequence[bool] | np.ndarray) -> ImageList:
        """The images where `mask` (n booleans) is true, e.g. the mask of `check_images`."""
        keep = np.flatnonzero(np.asarray(mask, dtype=bool))
        paths, tokens = [self.paths[i] for i in keep], [self.tokens[i] for i in keep]
        return ImageList(paths, self.pids[keep], self.camids[keep], tokens)


def parse_name(file: str | Path) -> tuple[int, int]:
    """Identity and camera of a file name: `0002_c1s1_000451_03.jpg` is (2, 1), `-1_c3s2_...` is (-1, 3).

    file  a name, or the path of a file
    Raises UserError when the name does not start like that.
    """
    match = _NAME.match(file.name if isinstance(file, Path) else file)
    if match is None:
        raise UserError(
            f"{file}: no identity and camera in the file name, which evaluation needs, also without cameras; from one "
            "folder per person `python prepare.py --dataset folder --data_root DIR` makes query and gallery, from a "
            "table `--dataset csv`; or rename the file like 0002_c1s1_000451_03.jpg"
        )
    return int(match[1]), int(match[2])


def identity_in(name: str) -> int | None:
    """The identity in a file name; None if there is none with a camera."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


# ------------------------------------------------------------------------------------------- reading a split
def read_split(data_root: str | Path, split: str, *, need_names: bool = True) -> ImageList:
    """The images of one split, in a fixed order.

    split       one of SPLITS
    need_names  True: every file name must carry identity and camera (evaluation needs them). False: the camera is 0
                where the name has none; one sub-folder per identity is enough for training

    In the prepared layout an image's identity is its sub-folder's; if the sub-folders of query and gallery are not
    numbers, it is that in the file name. Identity 0 is a person in training folders and where it has queries, and a
    distractor in the gallery otherwise.

    Raises UserError for a missing or empty folder, an unfinished preparation, or a name that cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: unknown; use one of {', '.join(SPLITS)}")
    root = Path(data_root).expanduser()
    remedy = "set data_root, or --test_dir, to the data set's folder"
    if not root.is_dir():
        raise UserError(f"data_root {root}: no such folder; {remedy}")
    for base in (root / PREPARED_FOLDER, root):
        if (base / UNFINISHED_MARK).exists():
            raise UserError(f"{base}: making it was interrupted; run the same command again")
        if (base / split).is_dir():
            return _read_prepared(base / split, split, need_names)
    if (root / ARCHIVE_FOLDERS[split]).is_dir():
        return read_archive(root / ARCHIVE_FOLDERS[split], split)
    if not is_data_set(root) and any(list_images(root / name) for name in list_folders(root)):
        remedy = f"if each is one person: python prepare.py --dataset folder --data_root {root}"
        raise UserError(
            f"data_root {root}: folders of images but no {split}/; {remedy}; for an archive, name its --dataset"
        )
    raise UserError(
        f"data_root {root}: no {split}/, {PREPARED_FOLDER}/{split}/ or {ARCHIVE_FOLDERS[split]}/ in it; "
        f"{remedy}, or prepare it with prepare.py"
    )


def read_archive(folder: Path, split: str) -> ImageList:
    """One split from its folder in the archive, with identities and cameras from the file names.

    The first image of each identity, in file name order, is its `val` image; the others are `train`. Junk never trains.
    """
    leave_out_deeper(folder)
    images = _read_flat(list_images(folder), split)
    if split in ("train", "val"):
        first = np.array(
            [token != before for before, token in zip([None, *images.tokens], images.tokens, strict=False)]
        )
        images = images.select(first if split == "val" else ~first)
    if not len(images):
        raise UserError(f"{folder}: no images for {split}; unpack the archive again")
    return images


def _read_flat(paths: list[Path], split: str) -> ImageList:
    """Images that lie directly in a folder, by the identities and cameras in their names."""
    rows = [(path.name.partition("_")[0], path, *parse_name(path)) for path in paths]
    # By token first: `20_c1` sorts before `2_c1` as a file name, but folder `2` before folder `20`.
    rows = sorted(_trainable(rows, split), key=lambda row: (row[0], row[1].name))
    require_one_spelling({token: str(path) for token, path, *_ in rows})
    tokens, paths, pids, camids = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
    return ImageList(paths, pids, camids, tokens)


def _trainable(rows: list[tuple], split: str) -> list[tuple]:
    """The rows (token, path, pid, camid) that a split keeps: training has no junk. Identity 0 is noted."""
    if split not in TRAINING_SPLITS:
        if split == "query" and (zeros := sum(row[2] == 0 for row in rows)):
            note(f"identity 0 is taken for a person, who has {zeros} queries")
        return rows
    if zeros := sum(row[2] == 0 for row in rows):
        note(f"identity 0 is taken for a person, who has {zeros} training images")
    for row in rows:
        if row[2] < 0:
            leave_out(row[1], "junk (identity below 0) among training images")
    return [row for row in rows if row[2] >= 0]


def _read_prepared(folder: Path, split: str, need_names: bool) -> ImageList:
    loose, tokens = list_images(folder), list_folders(folder)
    if loose and not tokens:
        # The archive's `query` bears the same name as the prepared one; its images lie directly in it.
        return _read_flat(loose, split)
    if loose:
        raise UserError(f"{loose[0]}: lies beside sub-folders; move every image into the sub-folder of its identity")
    by_token = {token: list_images(folder / token) for token in tokens}
    for token in tokens:
        leave_out_deeper(folder / token)
    if empty := [token for token, paths in by_token.items() if not paths]:
        note(f"{len(empty)} folders of identities hold no image ({', '.join(empty[:3])})")
    by_token = {token: paths for token, paths in by_token.items() if paths}
    if not by_token:
        raise UserError(f"{folder}: no images; expected one sub-folder per identity")
    # The folders' names are the identities if they are numbers.
    are_numbers = all(re.fullmatch(r"-?[0-9]{1,18}", token) for token in by_token)
    require_one_spelling({token: str(folder / token) for token in by_token})

    rows, disagreeing = [], []
    for place, (token, paths) in enumerate(by_token.items(), 1):
        for path in paths:
            pid, camid = parse_name(path) if need_names or _NAME.match(path.name) else (None, 0)
            if are_numbers:
                disagreeing += [path] if pid not in (None, int(token)) else []
                pid = int(token)
            elif pid is None or split in TRAINING_SPLITS:
                pid = place
            rows.append((token, path, pid, camid))
    if disagreeing:
        note(
            f"{len(disagreeing)} images lie in the folder of another identity than their names say, "
            f"{disagreeing[0].parent.name}/{disagreeing[0].name} first; the folder counts"
        )
    if not (rows := _trainable(rows, split)):
        raise UserError(f"{folder}: no images of people in it")
    tokens, paths, pids, camids = map(list, zip(*rows, strict=True))
    return ImageList(paths, pids, camids, tokens)


def is_data_set(root: Path) -> bool:
    """Whether a folder holds splits, in either layout."""
    names = {*SPLITS, *ARCHIVE_FOLDERS.values()}
    return any((base / name).is_dir() for base in (root, root / PREPARED_FOLDER) for name in names)


def read_people(
    source: str | Path, split: str | None = None, *, option: str = "--input", generated: bool = False
) -> ImageList:
    """Images of people to generate from or to score, in any layout, sorted by name.

    source     a data set, of which `split` (default: `query`) is read without junk and distractors; a folder with one
               sub-folder per person; or a folder of images, each of another person if not all names have an identity
    option     where `source` came from, for the errors
    generated  the images may be generate.py's: train_all alone, each of another person if all have identity 0; or those
               of visual_tools/test_folder.py (`read_swaps`)

    Raises UserError for a missing folder, one without images, and a `split` of a folder that is no data set.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"{option} {root}: no such folder; give a data set or a folder of images")
    if is_data_set(root):
        split = split or ("train_all" if generated and not (root / "query").is_dir() else "query")
        images, least = read_split(root, split, need_names=False), 1 if split == "gallery" else 0
    elif split is not None:
        raise UserError(f"--split {split}: {root} is a folder of images, not a data set; leave --split out")
    elif loose := list_images(root):
        if generated and all(ON in path.stem for path in loose):
            note(f"{len(loose)} images have names like A{ON}B.png: they have the identity of A")
            return read_swaps(loose)
        if not all(_NAME.match(path.name) for path in loose):
            return ImageList(loose, range(1, len(loose) + 1), [0] * len(loose), [path.stem for path in loose])
        images, least = _read_flat(loose, "gallery"), 1
    elif not any(list_images(root / name) for name in list_folders(root)):
        remedy = "put images there, or into one sub-folder per person"
        raise UserError(f"{option} {root}: neither a data set nor a folder of images; {remedy}")
    else:
        images, least = _read_prepared(root, "train_all", need_names=False), 0
    # Identity 0 is a distractor in a gallery, and among images that may come from one.
    if generated and not images.pids.any():
        return replace(images, pids=np.arange(1, len(images) + 1), tokens=None)
    people = images.select(images.pids >= least)
    if not len(people):
        raise UserError(f"{option} {root}: all {len(images)} images are junk or distractors; give images of people")
    return people


def read_swaps(paths: list[Path]) -> ImageList:
    """The images A_on_B.png of visual_tools/test_folder.py, sorted by name, with the identities of the clothes, A.

    These are in front of all names (`0002_c1_...`), or else each A is another person.
    """
    paths = sorted(paths)
    clothes = [path.stem.partition(ON)[0] for path in paths]
    if all(map(_NAME.match, clothes)):
        pids, camids = zip(*map(parse_name, clothes), strict=True)
        return ImageList(paths, pids, camids)
    place = {name: i for i, name in enumerate(dict.fromkeys(clothes), 1)}
    return ImageList(paths, [place[name] for name in clothes], [0] * len(paths), clothes)


# ------------------------------------------------------------------------------------------------ data sets
def data_set_name(data_root: str | Path) -> str:
    """What to call a data set: MSMT17 for `../MSMT17/pytorch` and `../MSMT17`.

    Either half of CUHK03-NP is named after its parent folder too: CUHK03-NP-labeled.
    """
    root = _unprepared(Path(os.path.abspath(data_root)))
    return f"{root.parent.name}-{root.name}" if root.name in ("labeled", "detected") else root.name


def other_data_set(data_root: str | Path, trained_on: str | Path) -> str:
    """The suffix of result files: "" if `data_root` is the data set that a run was trained on, else "-NAME"."""
    same = _unprepared(Path(data_root).resolve()) == _unprepared(Path(trained_on).resolve())
    return "" if same else f"-{data_set_name(data_root)}"


def _unprepared(root: Path) -> Path:
    return root.parent if root.name == PREPARED_FOLDER else root


# -------------------------------------------------------------------------------------- checks before hours of work
def require_identities(images: ImageList) -> None:
    """Raise UserError if a training folder holds fewer than two identities."""
    if images.num_classes < 2:
        what = f"{images.num_classes} identity here ({', '.join(images.classes)}), training needs at least 2"
        raise UserError(f"{images.folder}: {what}; give it one sub-folder per identity")


def have_cameras(*sides: ImageList) -> bool:
    """Whether these images come from more than one camera, so that matches of one camera can be left out."""
    return len(np.unique(np.concatenate([side.camids for side in sides]))) > 1


def check_test_set(data_root: str | Path, *, multi: bool = False, cameras: bool | None = True) -> None:
    """Read the lists of query and gallery, and with `multi` those of multi-query images.

    cameras  True: a match is an image of another camera. False: any image but the query itself. None: True if the
             images have cameras (`have_cameras`)

    Raises UserError as `read_split` does, if no query has a match in the gallery, and if a query has no multi-query
    image.
    """

    def views(images: ImageList) -> set[tuple[int, int | str]]:
        seen = images.camids.tolist() if cameras else [path.name for path in images.paths]
        return set(zip(images.pids.tolist(), seen, strict=True))

    query, gallery = read_split(data_root, "query"), read_split(data_root, "gallery")
    cameras = have_cameras(query, gallery) if cameras is None else cameras
    if multi:
        shots = [read_split(data_root, "multi-query"), query]
        there, asked = (set(zip(side.pids.tolist(), side.camids.tolist(), strict=True)) for side in shots)
        if absent := sorted(asked - there):
            raise UserError(
                f"data_root {data_root}: no multi-query image of identity {absent[0][0]} in camera {absent[0][1]}; "
                "every query needs one"
            )
    there = views(gallery)
    views_of = Counter(pid for pid, _ in there)
    asked = [(pid, view) for pid, view in views(query) if pid in views_of and pid != -1]
    if not asked:
        raise UserError(f"{data_root}: none of the identities in query is in the gallery; both must be of one data set")
    if not any(views_of[pid] > ((pid, view) in there) for pid, view in asked):
        what = "camera" if cameras else "image"
        remedy = "for data without cameras use --no-cameras" if cameras else "add other images to the gallery"
        raise UserError(f"{data_root}: no query has a match of another {what} in the gallery; {remedy}")
