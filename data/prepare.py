"""What `prepare.py` does: sort a data set, as its authors packed it, into one sub-folder per identity. No torch here.

    DATA_ROOT/pytorch/{train_all,train,val}/ID/    training images; train_all is train and val together
    DATA_ROOT/pytorch/{query,gallery}/ID/          the gallery with junk -1 and distractors 0000
    DATA_ROOT/pytorch/multi-query/ID/              if there are such images

ID is the identity as in the file names. Nothing is ever deleted or overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import archives
from data.archives import SourceImage, Splits
from data.folders import ARCHIVE_FOLDERS, PREPARED_FOLDER, SPLITS, UNFINISHED_MARK, ImageList, parse_name
from data.listing import list_folders, list_images, note, say_reading
from data.overlap import note_overlap
from data.spelling import whole_number
from files import make_folder, write_whole
from utils import UserError, between

DATASETS = ("market1501", "msmt17", "cuhk03-np", "dukemtmc-reid", "folder", "csv")
IDENTITIES_FILE = "identities.csv"
# Images and positive identities as published. The 19,732 gallery images of Market-1501 are the files of
# bounding_box_test with distractors and junk; 15,913 of them are not junk. The gallery of DukeMTMC-reID has 408
# identities that no query asks for.
PUBLISHED: dict[str, dict[str, tuple[int, int]]] = {
    "Market-1501": {"train_all": (12_936, 751), "query": (3_368, 750), "gallery": (19_732, 750)},
    "MSMT17": {
        "train_all": (32_621, 1_041),
        "train": (30_248, 1_041),
        "val": (2_373, 1_041),
        "query": (11_659, 3_060),
        "gallery": (82_161, 3_060),
    },
    "CUHK03-NP labeled": {"train_all": (7_368, 767), "query": (1_400, 700), "gallery": (5_328, 700)},
    "CUHK03-NP detected": {"train_all": (7_365, 767), "query": (1_400, 700), "gallery": (5_332, 700)},
    "DukeMTMC-reID": {"train_all": (16_522, 702), "query": (2_228, 702), "gallery": (17_661, 1_110)},
}


class SplitCount(NamedTuple):
    """What one prepared split holds."""

    images: int
    identities: int  # positive ones
    junk: int  # images of identity -1
    distractors: int  # images of identity 0


class Task(NamedTuple):
    """One folder to fill: the name of the data set, where it lies, and its images."""

    title: str
    root: Path
    splits: Splits
    numbers: dict[str, int] | None = None  # for users' own data: the identities' numbers by name


def read_tasks(
    dataset: str, data_root: str | Path, *, csv_file: str | None = None, test_fraction: float = 0.5, seed: int = 0
) -> list[Task]:
    """The tasks of `prepare.py --dataset`: one, or two for both halves of CUHK03-NP. Notes are logged.

    `csv_file` is for `csv` (default: dataset.csv in `data_root`), `test_fraction` and `seed` are for `folder`.
    Raises UserError for data that is not as its authors packed it.
    """
    root = Path(data_root).expanduser()
    if dataset == "cuhk03-np":
        boxes = archives.cuhk03_np(root)
        return [Task(f"CUHK03-NP {name}", folder, archives.flat_archive(folder)) for name, folder in boxes.items()]
    if dataset == "market1501":
        splits = archives.flat_archive(root)
        if "multi-query" not in splits:
            logging.info(f"no {root / ARCHIVE_FOLDERS['multi-query']}; multi-query evaluation will not be possible")
        return [Task("Market-1501", root, splits)]
    if dataset == "dukemtmc-reid":
        logging.info("DukeMTMC-reID was withdrawn by its authors; make sure that you may use this copy")
        return [Task("DukeMTMC-reID", root, archives.flat_archive(root))]
    if dataset == "msmt17":
        return [Task("MSMT17", root, archives.msmt17(root))]
    if dataset == "folder":
        data = archives.folder_per_identity(root, test_fraction=test_fraction, seed=seed)
    else:
        data = archives.table(root, Path(csv_file).expanduser() if csv_file else root / archives.CSV_NAME)
    if not data.cameras and "query" in data.splits:
        logging.info("these data have no cameras; evaluate them with test.py --no-cameras")
    if _renumbered(data.numbers):
        file = root / PREPARED_FOLDER / IDENTITIES_FILE
        note(f"{len(data.numbers)} identities are numbered from 1, because not all names are numbers above 0: {file}")
    return [Task("", root, data.splits, data.numbers)]


def require_matches(task: Task) -> None:
    """Raise UserError if no identity of the queries is in the gallery; note how many are not."""
    asked, there = ({image.pid for image in task.splits.get(split, ())} - {-1} for split in ("query", "gallery"))
    if asked and not asked & there:
        query = task.splits["query"][0].source
        what = f"none of the {len(asked)} identities of the queries is in the gallery ({query} is the first query)"
        raise UserError(f"--data_root {task.root}: {what}; give both of one data set")
    if absent := len(asked - there):
        note(f"{absent} of the {len(asked)} identities of the queries have no image in the gallery")


def _image_list(images: list[SourceImage]) -> ImageList:
    cameras = [parse_name(image.name)[1] for image in images]
    pids, tokens = [image.pid for image in images], [image.token for image in images]
    return ImageList([image.source for image in images], pids, cameras, tokens)


def fill_folder(task: Task, *, copy: bool = False) -> dict[str, SplitCount]:
    """Fill ROOT/pytorch with the images of a task; files already there with the same content are kept.

    Images are hard-linked, or copied with `copy` and where the file system has no links. May be interrupted at any
    point and run again. Returns the counts by split.
    Raises UserError, before touching anything, for missing images, for a target file of different content, and for
    images from elsewhere or of an earlier preparation, which training and evaluation would use.
    """
    prepared = task.root / PREPARED_FOLDER
    sources: dict[Path, Path] = {}
    for split, images in task.splits.items():
        for image in images:
            target = prepared / split / image.token / image.name
            earlier = sources.setdefault(target, image.source)
            if earlier != image.source:
                raise UserError(f"{image.source} and {earlier} would both become {target}; rename one of them")
    if absent := [source for source in dict.fromkeys(sources.values()) if not source.is_file()]:
        raise UserError(f"{absent[0]}: no such file, one of {len(absent)} missing images; unpack the archive again")
    missing = [(source, target) for target, source in sources.items() if not _is_there(source, target)]
    for folder in (prepared / split for split in SPLITS):
        for name in list_folders(folder) if folder.is_dir() else []:
            if strangers := [path for path in list_images(folder / name) if path not in sources]:
                what = f"was prepared from different images or settings (the first difference is {strangers[0]})"
                raise UserError(f"{prepared}: {what}; move it away, then run again")

    mark = prepared / UNFINISHED_MARK
    if missing:
        make_folder(prepared)
        mark.touch()
        if _renumbered(task.numbers or {}):
            rows = [("number", "identity"), *zip(task.numbers.values(), task.numbers, strict=True)]
            write_whole(prepared / IDENTITIES_FILE, lambda file: file.write(archives.csv_bytes(rows)))
        for source, target in tqdm(missing, "prepare", unit=" images", disable=None):
            _link_or_copy(source, target, copy)
    mark.unlink(missing_ok=True)
    return {split: _count([image.pid for image in images]) for split, images in task.splits.items()}


def _count(pids: list[int]) -> SplitCount:
    return SplitCount(len(pids), len({pid for pid in pids if pid > 0}), sum(pid < 0 for pid in pids), pids.count(0))


def _is_there(source: Path, target: Path) -> bool:
    if not os.path.lexists(target):
        return False
    if target.is_file() and (target.samefile(source) or filecmp.cmp(source, target, shallow=False)):
        return True
    raise UserError(f"{target}: already there, and not the same as {source}; move it away")


def _link_or_copy(source: Path, target: Path, copy: bool) -> None:
    """Make `target` appear in one step, complete: a hard link to `source`, or a copy."""
    make_folder(target.parent)
    # A hard link to a symbolic link would be a symbolic link, and break when its target moves.
    source = source.resolve()
    if not copy:
        with contextlib.suppress(OSError):  # This file system has no hard links, or not between these folders.
            os.link(source, target)
            return
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _renumbered(numbers: dict[str, int]) -> bool:
    return any(whole_number(name) != number for name, number in numbers.items())


def print_counts(counts: dict[str, SplitCount], title: str = "") -> None:
    """Print the counts; warn where they differ from those published for the data set `title`."""
    print(f"{'split':<12}{'images':>8}{'identities':>12}{'junk':>7}{'distractors':>13}{'without junk':>14}")
    for split, n in counts.items():
        print(f"{split:<12}{n.images:>8}{n.identities:>12}{n.junk:>7}{n.distractors:>13}{n.images - n.junk:>14}")
    differing = []
    for split, published in PUBLISHED.get(title, {}).items():
        n, (images, identities) = counts[split], published
        if (n.images, n.identities) != published:
            what = f"{split} has {n.images} images of {n.identities} identities, not {images} of {identities}"
            differing.append(what)
    if differing:
        logging.warning(f"this is not the complete {title}: {'; '.join(differing)}")


def main(argv: list[str] | None = None, *, dataset: str | None = None) -> int:
    """The command line of `prepare.py`, or that of a script for one `dataset`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare.py" if dataset is None else None,
        description="Sort a data set into one folder per identity, under DATA_ROOT/pytorch. "
        "Can be interrupted and run again; never deletes or overwrites a file.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    if dataset is None:
        add("--dataset", required=True, choices=DATASETS, help="the data set, or the form of your data")
        add("--data_root", required=True, help="folder of the unpacked archive or of your images")
        csv_help = f"csv: the table (default: DATA_ROOT/{archives.CSV_NAME})"
        add("--csv", dest="csv_file", metavar="FILE", help=csv_help)
        fraction_help = "folder: part of the identities to test on (default: 0.5)"
        add("--test-fraction", type=between(0, 1, float), metavar="F", help=fraction_help)
        add("--seed", type=int, help="folder: which identities and queries are drawn (default: 0)")
    else:
        add("--data_root", default="../Market", help="folder of the unpacked archive (%(default)s)")
    add("--copy", action="store_true", default=False, help="copy the images instead of hard-linking them")
    options = vars(parser.parse_args(argv))
    copy, data_root, dataset = options.pop("copy"), options.pop("data_root"), options.pop("dataset", dataset)
    for name, option, needed in (
        ("csv_file", "--csv", "csv"),
        ("test_fraction", "--test-fraction", "folder"),
        ("seed", "--seed", "folder"),
    ):
        if name in options and dataset != needed:
            raise UserError(f"{option}: goes with --dataset {needed}, not with {dataset}; leave it out")
    tasks = read_tasks(dataset, data_root, **options)
    sides = {}
    for task in tasks:
        require_matches(task)
        images = {split: _image_list(images) for split, images in task.splits.items()}
        if "train_all" in images:
            note_overlap(images["train_all"], {side: images[side] for side in ("query", "gallery") if side in images})
        sides |= {f"{task.title} {split}" if len(tasks) > 1 else split: side for split, side in images.items()}
    say_reading(sides)
    for task in tasks:
        print_counts(fill_folder(task, copy=copy), task.title)
        print(f"prepared: {task.root / PREPARED_FOLDER}")
    return 0
