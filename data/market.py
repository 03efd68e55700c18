"""From the archive's folders to one sub-folder per identity: what `prepare-market.py` does. No torch here.

    DATA_ROOT/bounding_box_train  ->  DATA_ROOT/pytorch/{train_all,train,val}/ID/
    DATA_ROOT/bounding_box_test   ->  DATA_ROOT/pytorch/gallery/ID/        with junk -1 and distractors 0000
    DATA_ROOT/query               ->  DATA_ROOT/pytorch/query/ID/
    DATA_ROOT/gt_bbox             ->  DATA_ROOT/pytorch/multi-query/ID/    if there is one

ID is the identity as the file name writes it. Nothing is ever deleted or overwritten.
"""

from __future__ import annotations

import argparse
import errno
import filecmp
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.folders import (
    ARCHIVE_FOLDERS,
    PREPARED_FOLDER,
    SPLITS,
    UNFINISHED_MARK,
    ImageList,
    list_images,
    read_archive,
)
from utils import UserError

# Images and identities of Market-1501. Identities count positive ones only. The 19,732 gallery images are the
# files of bounding_box_test, distractors and junk included; 15,913 of them are not junk.
MARKET_COUNTS = {"train_all": (12_936, 751), "query": (3_368, 750), "gallery": (19_732, 750)}


@dataclass(frozen=True)
class SplitCount:
    """What one prepared split holds."""

    images: int
    identities: int  # positive ones
    junk: int  # images of identity -1
    distractors: int  # images of identity 0


def prepare(data_root: str | Path, *, copy: bool = False) -> dict[str, SplitCount]:
    """Fill DATA_ROOT/pytorch from the archive's folders; files already there with the same content are kept.

    Hard links where the file system has them, copies elsewhere or with `copy`. May be interrupted at any
    point and run again. Returns the counts by split, without `multi-query` when there is no `gt_bbox`.
    Raises UserError, before touching anything, for missing folders and for a target file of other content.
    """
    root = Path(data_root).expanduser()
    splits = _read_splits(root)
    prepared = root / PREPARED_FOLDER
    pairs = [
        (path, prepared / split / token / path.name)
        for split, images in splits.items()
        for path, token in zip(images.paths, images.tokens, strict=True)
    ]
    missing = [(source, target) for source, target in pairs if not _is_there(source, target)]

    mark = prepared / UNFINISHED_MARK
    if missing:
        _make_folder(prepared)
        mark.touch()
        for source, target in tqdm(missing, "prepare", unit=" images", disable=None):
            _place(source, target, copy)
    if mark.exists():
        mark.unlink()

    _warn_of_strangers(prepared, splits, {target for _, target in pairs})
    return {split: _count(images) for split, images in splits.items()}


def _read_splits(root: Path) -> dict[str, ImageList]:
    if not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder; give the folder of the unpacked archive")
    splits = {}
    for split in SPLITS:
        folder = root / ARCHIVE_FOLDERS[split]
        if folder.is_dir():
            splits[split] = read_archive(root, split)
        elif split == "multi-query":
            print(f"note: no {folder}; multi-query evaluation will not be possible", file=sys.stderr)
        else:
            raise UserError(f"--data_root {root}: no {folder.name}/ in it; give the folder of the unpacked archive")
    return splits


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


def _place(source: Path, target: Path, copy: bool) -> None:
    """Make `target` appear in one step, complete."""
    _make_folder(target.parent)
    # A link to a symbolic link would be a symbolic link, and break when that moves.
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


def _warn_of_strangers(prepared: Path, splits: dict[str, ImageList], ours: set[Path]) -> None:
    """Files of another origin stay; training and evaluation would use them, so they are named."""
    for split in splits:
        folders = [folder for folder in sorted((prepared / split).iterdir()) if folder.is_dir()]
        strangers = [path for folder in folders for path in list_images(folder) if path not in ours]
        if strangers:
            print(
                f"warning: {prepared / split}: {len(strangers)} images are not from this archive, the first "
                f"is {strangers[0]}; they are left there and will be used",
                file=sys.stderr,
            )


def _count(images: ImageList) -> SplitCount:
    return SplitCount(
        images=len(images),
        identities=len({int(pid) for pid in images.pids if pid > 0}),
        junk=int((images.pids < 0).sum()),
        distractors=int((images.pids == 0).sum()),
    )


def report(counts: dict[str, SplitCount]) -> None:
    """Print the counts; warn, on stderr, where they differ from the published ones."""
    print(f"{'split':<12}{'images':>8}{'identities':>12}{'junk':>7}{'distractors':>13}{'without junk':>14}")
    for split, n in counts.items():
        print(f"{split:<12}{n.images:>8}{n.identities:>12}{n.junk:>7}{n.distractors:>13}{n.images - n.junk:>14}")
    differing = [
        f"{split} has {found.images} images of {found.identities} identities, not {images} of {identities}"
        for split, (images, identities) in MARKET_COUNTS.items()
        if ((found := counts[split]).images, found.identities) != (images, identities)
    ]
    if differing:
        print(f"warning: this is not the complete Market-1501: {'; '.join(differing)}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command line of `prepare-market.py`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare-market.py",
        description="Sort the Market-1501 archive into one folder per identity, under DATA_ROOT/pytorch. "
        "Can be interrupted and run again; never deletes or overwrites a file.",
    )
    parser.add_argument("--data_root", default="../Market", help="folder of the unpacked archive (%(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of hard-linking them")
    options = parser.parse_args(argv)
    try:
        counts = prepare(options.data_root, copy=options.copy)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        where = error.filename2 or error.filename or options.data_root
        raise UserError(
            f"{where}: {error.strerror or error}; make room or set the permissions, and run again"
        ) from None
    report(counts)
    print(f"prepared: {Path(options.data_root).expanduser() / PREPARED_FOLDER}")
    return 0
