"""What `prepare.py` does: sort a data set, as its authors packed it, into one sub-folder per identity. No torch here.

    DATA_ROOT/pytorch/{train_all,train,val}/ID/    training images; train_all is train and val together
    DATA_ROOT/pytorch/{query,gallery}/ID/          the gallery with junk -1 and distractors 0000
    DATA_ROOT/pytorch/multi-query/ID/              if there are such images

ID is the identity as in the file names. Nothing is ever deleted or overwritten.
"""

from __future__ import annotations

import argparse
import csv
import errno
import filecmp
import io
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import archives
from data.archives import Splits
from data.folders import ARCHIVE_FOLDERS, PREPARED_FOLDER, SPLITS, UNFINISHED_MARK, list_folders, list_images
from files import write_whole
from utils import UserError

DATASETS = ("market1501", "msmt17", "cuhk03-np", "dukemtmc-reid", "veri776", "folder", "csv")
IDENTITIES_FILE = "identities.csv"
CUHK03 = "CUHK03-NP"
# Images and positive identities as published. The 19,732 gallery images of Market-1501 are the files of
# bounding_box_test with distractors and junk; 15,913 of them are not junk. The gallery of DukeMTMC-reID has 408
# identities that no query asks for. VeRi-776 is distributed with two numbers of training images.
PUBLISHED: dict[str, dict[str, list[tuple[int, int]]]] = {
    "Market-1501": {"train_all": [(12_936, 751)], "query": [(3_368, 750)], "gallery": [(19_732, 750)]},
    "MSMT17": {
        "train_all": [(32_621, 1_041)],
        "train": [(30_248, 1_041)],
        "val": [(2_373, 1_041)],
        "query": [(11_659, 3_060)],
        "gallery": [(82_161, 3_060)],
    },
    f"{CUHK03} labeled": {"train_all": [(7_368, 767)], "query": [(1_400, 700)], "gallery": [(5_328, 700)]},
    f"{CUHK03} detected": {"train_all": [(7_365, 767)], "query": [(1_400, 700)], "gallery": [(5_332, 700)]},
    "DukeMTMC-reID": {"train_all": [(16_522, 702)], "query": [(2_228, 702)], "gallery": [(17_661, 1_110)]},
    "VeRi-776": {
        "train_all": [(37_778, 576), (37_746, 576)],
        "query": [(1_678, 200)],
        "gallery": [(11_579, 200)],
    },
}


@dataclass(frozen=True)
class SplitCount:
    """What one prepared split holds."""

    images: int
    identities: int  # positive ones
    junk: int  # images of identity -1
    distractors: int  # images of identity 0


@dataclass(frozen=True)
class Task:
    """One folder to fill: the name of the data set, where it lies, and its images."""

    title: str
    root: Path
    splits: Splits
    numbers: dict[str, int] | None = None  # for users' own data: the identities' numbers by name


def read_tasks(
    dataset: str, data_root: str | Path, *, csv_file: str | None = None, test_fraction: float = 0.5, seed: int = 0
) -> list[Task]:
    """The tasks of `prepare.py --dataset`: one, or two for both halves of CUHK03-NP. Notes go to stderr.

    `csv_file` is for `csv` (default: dataset.csv in `data_root`), `test_fraction` and `seed` are for `folder`.
    Raises UserError for data that is not as its authors packed it.
    """
    root = Path(data_root).expanduser()
    if dataset == "market1501":
        splits = archives.flat_archive(root)
        if "multi-query" not in splits:
            _note(f"no {root / ARCHIVE_FOLDERS['multi-query']}; multi-query evaluation will not be possible")
        return [Task("Market-1501", root, splits)]
    if dataset == "dukemtmc-reid":
        _note("DukeMTMC-reID was withdrawn by its authors; make sure that you may use this copy")
        return [Task("DukeMTMC-reID", root, archives.flat_archive(root))]
    if dataset == "cuhk03-np":
        boxes = archives.cuhk03_np(root)
        return [Task(f"{CUHK03} {name}", folder, archives.flat_archive(folder)) for name, folder in boxes.items()]
    if dataset == "veri776":
        return [Task("VeRi-776", root, archives.flat_archive(root, archives.VERI_FOLDERS))]
    if dataset == "msmt17":
        return [Task("MSMT17", root, archives.msmt17(root))]
    if dataset == "folder":
        data = archives.folder_per_identity(root, test_fraction=test_fraction, seed=seed)
    else:
        data = archives.table(root, Path(csv_file).expanduser() if csv_file else root / archives.CSV_NAME)
    if not data.cameras and "query" in data.splits:
        _note("these data have no cameras; evaluate them with test.py --no-cameras")
    return [Task("", root, data.splits, data.numbers)]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def fill_folder(task: Task, *, copy: bool = False) -> dict[str, SplitCount]:
    """Fill ROOT/pytorch with the images of a task; files already there with the same content are kept.

    Images are hard-linked, or copied with `copy` and where the file system has no links. May be interrupted at any
    point and run again. Returns the counts by split.
    Raises UserError, before touching anything, for missing images and for a target file of different content; for
    users' own data also for images of an earlier preparation, which the new split would mix up.
    """
    prepared = task.root / PREPARED_FOLDER
    sources = _sources_by_target(prepared, task)
    missing = [(source, target) for target, source in sources.items() if not _is_there(source, target)]
    _check_strangers(prepared, task, set(sources))
    identities = _identities(prepared, task)

    mark = prepared / UNFINISHED_MARK
    if missing:
        _make_folder(prepared)
        mark.touch()
        for source, target in tqdm(missing, "prepare", unit=" images", disable=None):
            _link_or_copy(source, target, copy)
    if identities is not None:
        text = identities.encode(errors="surrogateescape")  # names of folders may be any bytes
        write_whole(prepared / IDENTITIES_FILE, lambda file: file.write(text))
    mark.unlink(missing_ok=True)
    return {split: _count(images) for split, images in task.splits.items()}


def _sources_by_target(prepared: Path, task: Task) -> dict[Path, Path]:
    """The file to make in the prepared folder, and the image that it is made from, for all images of a task."""
    sources: dict[Path, Path] = {}
    for split, images in task.splits.items():
        for image in images:
            target = prepared / split / image.token / image.name
            earlier = sources.setdefault(target, image.source)
            if earlier != image.source:
                raise UserError(f"{image.source} and {earlier} would both become {target}; rename one of them")
    absent = [source for source in dict.fromkeys(sources.values()) if not source.is_file()]
    if absent:
        raise UserError(f"{absent[0]}: no such file, one of {len(absent)} missing images; unpack the archive again")
    return sources


def _is_there(source: Path, target: Path) -> bool:
    if not os.path.lexists(target):
        return False
    if target.is_file() and (target.samefile(source) or filecmp.cmp(source, target, shallow=False)):
        return True
    raise UserError(f"{target}: already there, and not the same as {source}; move it away")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder}: is a file where a folder is needed; move it away") from None


def _link_or_copy(source: Path, target: Path, copy: bool) -> None:
    """Make `target` appear in one step, complete: a hard link to `source`, or a copy."""
    _make_folder(target.parent)
    # A hard link to a symbolic link would be a symbolic link, and break when its target moves.
    source = source.resolve()
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOSPC, errno.EROFS):
                raise
            # This file system has no hard links, or not between these folders.
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _check_strangers(prepared: Path, task: Task, targets: set[Path]) -> None:
    """Training and evaluation would use files of another origin: warn of them, refuse them in users' own data."""
    for split in SPLITS if task.numbers is not None else task.splits:
        if not (prepared / split).is_dir():
            continue
        folders = [prepared / split / name for name in list_folders(prepared / split)]
        strangers = [path for folder in folders for path in list_images(folder) if path not in targets]
        if strangers and task.numbers is not None:
            raise UserError(
                f"{prepared}: was prepared from different images or settings (the first difference is {strangers[0]}); "
                "move it away, then run again"
            )
        if strangers:
            print(
                f"warning: {prepared / split}: {len(strangers)} images are not from this archive, the first "
                f"is {strangers[0]}; they are left there and will be used",
                file=sys.stderr,
            )


def _identities(prepared: Path, task: Task) -> str | None:
    """The table of the identities' numbers; None if their names are their numbers, or if it is there already.

    Raises UserError for a table with different numbers; new identities may be added to it.
    """
    if all(name.isdecimal() and int(name) == number for name, number in (task.numbers or {}).items()):
        return None
    lines = io.StringIO()
    rows = [("number", "identity"), *((number, name) for name, number in task.numbers.items())]
    csv.writer(lines, lineterminator="\n").writerows(rows)
    file, text = prepared / IDENTITIES_FILE, lines.getvalue()
    if file.exists():
        present = file.read_text(encoding="utf-8", errors="surrogateescape")
        if not set(present.splitlines()) <= set(text.splitlines()):
            raise UserError(f"{file}: gives identities different numbers; move {prepared} away, then run again")
        if present == text:
            return None
    return text


def _count(images: list[archives.SourceImage]) -> SplitCount:
    return SplitCount(
        images=len(images),
        identities=len({image.pid for image in images if image.pid > 0}),
        junk=sum(image.pid < 0 for image in images),
        distractors=sum(image.pid == 0 for image in images),
    )


def print_counts(counts: dict[str, SplitCount], title: str = "") -> None:
    """Print the counts; warn, on stderr, where they differ from those published for the data set `title`."""
    print(f"{'split':<12}{'images':>8}{'identities':>12}{'junk':>7}{'distractors':>13}{'without junk':>14}")
    for split, n in counts.items():
        print(f"{split:<12}{n.images:>8}{n.identities:>12}{n.junk:>7}{n.distractors:>13}{n.images - n.junk:>14}")
    differing = []
    for split, published in PUBLISHED.get(title, {}).items():
        n = counts[split]
        if (n.images, n.identities) not in published:
            expected = " or ".join(f"{images} of {identities}" for images, identities in published)
            differing.append(f"{split} has {n.images} images of {n.identities} identities, not {expected}")
    if differing:
        print(f"warning: this is not the complete {title}: {'; '.join(differing)}", file=sys.stderr)


def main(argv: list[str] | None = None, *, dataset: str | None = None) -> int:
    """The command line of `prepare.py`, or that of a script for one `dataset`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare.py" if dataset is None else None,
        description="Sort a data set into one folder per identity, under DATA_ROOT/pytorch. "
        "Can be interrupted and run again; never deletes or overwrites a file.",
    )
    if dataset is None:
        parser.add_argument("--dataset", required=True, choices=DATASETS, help="which data set, or form of own data")
        parser.add_argument("--data_root", required=True, help="folder of the unpacked archive or of own images")
        parser.add_argument(
            "--csv", dest="csv_file", metavar="FILE", help=f"csv: the table (default: DATA_ROOT/{archives.CSV_NAME})"
        )
        parser.add_argument(
            "--test-fraction", type=float, metavar="F", help="folder: part of the identities to test on (default: 0.5)"
        )
        parser.add_argument("--seed", type=int, help="folder: which identities and queries are drawn (default: 0)")
    else:
        parser.add_argument("--data_root", default="../Market", help="folder of the unpacked archive (%(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of hard-linking them")
    options = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    copy, data_root, dataset = options.pop("copy"), options.pop("data_root"), options.pop("dataset", dataset)
    for name in options:
        needed = "csv" if name == "csv_file" else "folder"
        if dataset != needed:
            option = name.removesuffix("_file").replace("_", "-")
            raise UserError(f"--{option}: goes with --dataset {needed}, not with {dataset}; leave it out")
    if not 0 <= options.get("test_fraction", 0) <= 1:
        raise UserError(f"--test-fraction {options['test_fraction']}: must be from 0 to 1")
    try:
        for task in read_tasks(dataset, data_root, **options):
            print_counts(fill_folder(task, copy=copy), task.title)
            print(f"prepared: {task.root / PREPARED_FOLDER}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except OSError as error:
        where = error.filename2 or error.filename or data_root
        raise UserError(
            f"{where}: {error.strerror or error}; make room or set the permissions, and run again"
        ) from None
    return 0
