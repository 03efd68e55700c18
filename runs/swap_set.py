"""Whole data sets of swaps: batches of images in one or several processes, their files, and the manifest.

Every process computes its share and writes images under hidden names. Process 0 alone gives them their names and lists
them, so that the manifest agrees with the files whatever happens.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import losses as L
from config import DGNetConfig
from data.folders import UNFINISHED_MARK, ImageList, is_data_set, read_people, read_split
from data.generated import (
    SETTINGS,
    Row,
    commit_rows,
    count_pairs,
    draw_swap_pairs,
    format_soft_label,
    plan_rows,
    read_rows,
    recover_rows,
    write_rows,
)
from data.images import check_images, denormalise, iter_images, normalise
from data.listing import say_reading
from data.people import identify_people
from files import digest_files, digest_of, hold_folder, part_of, read_json, write_json
from parallel.collectives import gather, is_main, rank, world_size
from precision import pick_precision
from runs.folder import find_data, generator_config, open_run, resolve_data_root
from runs.load import find_teacher, load_teacher, pick_epoch, require_teacher_of
from runs.swapper import Swapper, load_swapper
from runs.weights import digest_weights
from trainer import autocast
from utils import UserError, halve_until_it_fits, set_threads

log = logging.getLogger(__name__)
CONTENTS = "contents"  # the setting that names what the input images hold
# Images that the nets see at a time on a CPU, whose kernels round differently for another number of images.
CPU_PASS = 8
# Images at a time where `--batch_size` is auto; a GPU may have room for less.
CPU_BATCH, GPU_BATCH = 32, 256


@dataclass(frozen=True)
class Job:
    """What to make, and where: image i has `rows[i]` (soft label still empty) and two source files `sources[i]`.

    sources  (appearance, structure)
    top      identities in a soft label
    quality  of JPEG files, 1..100
    """

    out: Path
    rows: list[Row]
    sources: list[tuple[Path, Path]]
    top: int
    quality: int
    batch_size: int


class Made(NamedTuple):
    """A batch, the seconds that the nets took for it, and the files that threads write under their hidden names."""

    rows: list[Row]
    seconds: float
    files: list[Future[None]]


# ------------------------------------------------------------------------------------- one process's share
class Nets:
    """A run's generator and its teachers on one device; `classes` are the identities of the teachers' classes."""

    def __init__(
        self,
        model: Swapper,
        teachers: list[nn.Module],
        classes: list[str],
        precision: str,
        device: torch.device,
    ) -> None:
        self.model, self.teachers, self.classes = model, teachers, classes
        self.precision, self.device, self.size = precision, device, model.size

    def digest(self) -> str:
        """A name for the weights: equal names, equal images."""
        return digest_weights(self.model.id_net, self.model.gen, *self.teachers)[:16]

    @torch.no_grad()
    def __call__(self, x_app: Tensor, x_str: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """The clothes of `x_app` on the people of `x_str`: (N, H, W, 3) uint8 and the teachers' (N, K) label of it."""
        with autocast(self.device, self.precision):
            pixels = denormalise(self.model.swap(x_app, x_str))
            label = L.mean_prediction(self.teachers, normalise(pixels)) if self.teachers else None
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return images, None if label is None else label.cpu().numpy()


def work(job: Job, nets: Nets, batches: list[list[int]]) -> Iterator[tuple[list[Row], float]]:
    """Make the images of `batches` (numbers of images, whole passes); yields the rows and the nets' seconds of each.

    Threads read ahead of the nets and write a batch while the next one is computed.
    """
    size = pass_size(nets.device, job.batch_size)

    def passes(batch: list[int]) -> list[list[int]]:
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    # The nets always see full passes, so that the last one rounds like the others.
    full = [chunk + chunk[-1:] * (size - len(chunk)) for batch in batches for chunk in passes(batch)]
    paths = [job.sources[i][role] for chunk in full for role in (0, 1) for i in chunk]
    behind: Made | None = None
    with closing(iter_images(paths, *nets.size, 2 * size, device=nets.device)) as stream, ThreadPoolExecutor(8) as pool:
        for batch in batches:
            rows, files, seconds = [], [], 0.0
            for chunk in passes(batch):
                x_app, x_str = next(stream).chunk(2)
                began = time.perf_counter()
                images, labels = nets(x_app, x_str)
                seconds += time.perf_counter() - began
                for k, i in enumerate(chunk):
                    label = "" if labels is None else format_soft_label(labels[k], nets.classes, job.top)
                    rows.append(job.rows[i]._replace(soft_label=label))
                    files.append(pool.submit(write_image, job.out / job.rows[i].file, images[k], job.quality))
            if behind:
                yield written(behind)
            behind = Made(rows, seconds, files)
        if behind:
            yield written(behind)


def written(made: Made) -> tuple[list[Row], float]:
    """Wait for a batch's files; raises the error of one that cannot be written."""
    for file in made.files:
        file.result()
    return made.rows, made.seconds


def pass_size(device: torch.device, batch_size: int) -> int:
    return CPU_PASS if device.type == "cpu" else batch_size


def choose_batch_size(nets: Nets, out: Path) -> int:
    """`--batch_size auto`: 32 on a CPU; on a GPU what a generation in `out` began with, or else what fits.

    What fits is found by trying 256, then half of it, and so on.
    """
    if nets.device.type == "cpu":
        return CPU_BATCH
    if (out / SETTINGS).exists():
        return read_settings(out)["images_per_pass"]
    return halve_until_it_fits(lambda size: nets(*torch.zeros(2, size, 3, *nets.size)), GPU_BATCH)[1]


def write_image(path: Path, image: np.ndarray, quality: int) -> None:
    """Write (H, W, 3) uint8 under the hidden name of `path`, in the format of its suffix."""
    picture = Image.fromarray(image)
    with open(part_of(path), "wb") as file:
        if path.suffix == ".png":
            picture.save(file, "PNG")
        else:
            picture.save(file, "JPEG", quality=quality)


# --------------------------------------------------------------------------------------------- the data set
def make_together(job: Job, nets: Nets, batches: list[list[int]]) -> Iterator[tuple[int, list[Row], float]]:
    """Every process makes its share of `batches`; each gets what all have made: the rank, the rows, the seconds."""
    with closing(work(job, nets, batches[rank() :: world_size()])) as share:
        for _ in range(0, len(batches), world_size()):
            yield from ((r, *made) for r, made in enumerate(gather(next(share, None))) if made is not None)


def generate(job: Job, nets: Nets, settings: dict[str, object], started: float) -> str:
    """Make what is missing of the data set in `job.out`; returns what was made, in words, at once when nothing is.

    settings  what the images depend on; kept in generate.json and compared when a generation continues
    started   `time.perf_counter()` at the start of the command

    Every process calls this; what it returns is complete in process 0. Raises UserError for a folder that holds
    anything else, is in use, or cannot be written.
    """
    out = job.out
    try:
        if not is_main():
            for _ in make_together(job, nets, gather([])[0]):
                pass
            return ""
        with opened(out, settings):
            present = {row.file for row in recover_rows(out, job.rows)}
            batches = missing_batches(job, nets.device, present)
            if batches:
                for folder in {(out / row.file).parent for row in job.rows}:
                    folder.mkdir(parents=True, exist_ok=True)
            gather(batches)
            count, rate = fill(job, nets, batches, present)
            order = {row.file: i for i, row in enumerate(job.rows)}
            write_rows(out, sorted(read_rows(out), key=lambda row: order[row.file]))
            (out / UNFINISHED_MARK).unlink(missing_ok=True)
    except OSError as error:
        done = sum(1 for row in job.rows if (out / row.file).exists())
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); {done} of {len(job.rows)} images are there and in "
            "the manifest; free space and run the same command again to continue"
        ) from None
    report = f"{len(job.rows)} images in {out}, {count} of them made now"
    if count:
        whole = count / (time.perf_counter() - started)
        report += (
            f"\nimages/s: {rate:.2f} by the nets alone, {whole:.2f} by the whole command ({whole / rate:.2f} of it)"
        )
    return report


@contextmanager
def opened(out: Path, settings: dict[str, object]) -> Iterator[None]:
    """Hold the folder of a data set, new or begun with `settings`, for this command alone."""
    with hold_folder(out) as held:
        if not held:
            raise UserError(f"--out {out}: another generate.py is writing to it; wait for it, or stop it")
        path = out / SETTINGS
        if path.exists():
            settings = settings | compare_settings(out, settings)
        elif others := sorted(p.name for p in out.iterdir() if p not in (part_of(path), out / UNFINISHED_MARK)):
            raise UserError(f"--out {out}: holds other files ({others[0]}); choose a new or empty folder")
        (out / UNFINISHED_MARK).touch()
        write_json(path, settings)
        yield


def read_settings(out: Path) -> dict[str, Any]:
    """The settings that the data set in `out` was begun with. Raises UserError if the file is damaged."""
    remedy = "choose another --out"
    settings = read_json(out / SETTINGS, remedy)
    whole = isinstance(settings, dict) and all(isinstance(settings.get(k), int) for k in ("count", "images_per_pass"))
    if not whole or min(settings["count"], settings["images_per_pass"]) < 1:
        raise UserError(f"{out / SETTINGS}: damaged; {remedy}")
    return settings


def compare_settings(out: Path, settings: dict[str, object]) -> dict[str, object]:
    """The settings that stay as they were in `out` when a generation with `settings` continues there.

    Raises UserError if it may not.
    """
    before, keep = read_settings(out), {}
    if before.get(CONTENTS) is None:
        log.warning("%s: begun by an earlier version; whether the input images have changed since is unknown", out)
        keep[CONTENTS] = None
    elif before[CONTENTS] != settings[CONTENTS] and before.get("images") == settings["images"]:
        raise UserError(
            f"--out {out}: the images in {settings['input']} have changed under the same names since it was begun; "
            "restore them to continue, or choose another --out"
        )
    for key, value in settings.items():
        if key not in ("count", "input", "name", "data_root", *keep) and before.get(key) != value:
            raise UserError(
                f"--out {out}: made with {key} {before.get(key)}, now {value}; give the same options to continue it, "
                "or choose another --out"
            )
    if settings["count"] < before["count"]:
        raise UserError(
            f"--out {out}: --count {settings['count']} is less than the {before['count']} images that it was begun "
            "with; give that number or more, or choose another --out"
        )
    return keep


def missing_batches(job: Job, device: torch.device, present: set[str]) -> list[list[int]]:
    """Whole passes in which an image is missing, joined to batches.

    The images of a pass do not depend on when and by which process it is made, so neither does their rounding.
    """
    size, n = pass_size(device, job.batch_size), len(job.rows)
    passes = [range(first, min(first + size, n)) for first in range(0, n, size)]
    passes = [chunk for chunk in passes if any(job.rows[i].file not in present for i in chunk)]
    together = max(1, job.batch_size // size)
    return [[i for chunk in passes[k : k + together] for i in chunk] for k in range(0, len(passes), together)]


def fill(job: Job, nets: Nets, batches: list[list[int]], present: set[str]) -> tuple[int, float]:
    """Make `batches` and list their images; whatever stops this, no half-made image stays.

    Returns the number of new images, and the images per second that the nets alone make.
    """
    count, seconds, made_by = 0, [0.0] * world_size(), [0] * world_size()
    bar = tqdm(total=len(job.rows), initial=len(present), desc="images", unit="img", disable=None, mininterval=0.5)
    try:
        with bar, closing(make_together(job, nets, batches)) as results:
            for process, made, spent in results:
                rows = [row for row in made if row.file not in present]
                commit_rows(job.out, rows)
                bar.update(len(rows))
                count += len(rows)
                made_by[process] += len(made)
                seconds[process] += spent
    finally:
        for row in job.rows:
            part_of(job.out / row.file).unlink(missing_ok=True)
    return count, sum(images / spent for images, spent in zip(made_by, seconds, strict=True) if spent)


# -------------------------------------------------------------------------------------------------- planning
def plan(
    images: ImageList, root: Path, *, count: int, seed: int, labelled: bool, suffix: str
) -> tuple[list[Row], list[tuple[Path, Path]]]:
    """The rows of `count` images, and the two source files of every image, from `images` under `root`.

    Raises UserError if `images` give fewer different pairs.
    """
    labels = images.labels()
    possible = count_pairs(labels)
    if not possible:
        raise UserError(
            f"--input {root}: {len(images)} images of {images.num_classes} identity; swaps need images of two or more"
        )
    if count > possible:
        raise UserError(
            f"--count {count}: {root} has {len(images)} images, which give only {possible} different swaps; "
            f"ask for at most {possible}, or give a larger --input"
        )
    pairs = draw_swap_pairs(labels, count, seed)
    rows = plan_rows(images, root, pairs, labelled=labelled, suffix=suffix)
    return rows, [(images.paths[a], images.paths[s]) for a, s in pairs.tolist()]


# ---------------------------------------------------------------------------------------------- the command
def make_data_set(args: argparse.Namespace, device: torch.device, started: float) -> str:
    """What generate.py does, in every process: read, plan, make; returns the report of process 0.

    started  `time.perf_counter()` at the start of the command
    """
    pick_precision(device, args.precision)  # refuses what it cannot do
    set_threads(args.threads)
    run = open_run(args.output_path, args.name)
    cfg = generator_config(run)
    iteration = pick_epoch(run, args.which_epoch)
    root, images = read_input(args, cfg)
    labelled = args.labels == "appearance"
    rows, sources = plan(images, root, count=args.count, seed=args.seed, labelled=labelled, suffix=f".{args.format}")
    teachers, known = choose_teachers(args, cfg)
    digests, classes, people = digest_files(images.paths), [], None
    if known:
        classes, theirs = known.classes, digests if known.paths == images.paths else digest_files(known.paths)
        people = identify_people(known, theirs, known_root(args, cfg))
    model = load_swapper(run, device, str(iteration))
    loaded = [load_teacher(name, run.output_path, len(classes)).to(device) for name in teachers]
    if people and not args.trust_classes:
        for name in teachers:
            require_teacher_of(people, name, run.output_path, allow="--trust-classes")
    nets = Nets(model, loaded, classes, args.precision, device)
    batch_size = args.batch_size or min(gather(choose_batch_size(nets, Path(args.out))))
    same = ("count", "seed", "labels", "format", "quality", "top", "precision")
    settings = {"name": run.name, "iteration": iteration, "weights": nets.digest(), "teachers": teachers}
    settings |= {"input": str(args.input or cfg.data_root), "images": name_images(images, root)}
    settings |= {CONTENTS: digest_of(digests)}
    settings |= {"device": device.type, "images_per_pass": pass_size(device, batch_size)}
    # On a CPU rounding depends on the number of threads, too.
    settings |= {"threads": torch.get_num_threads() if device.type == "cpu" else None}
    settings |= {option: getattr(args, option) for option in same}
    # Whose identities the names and soft labels have. Training on these images compares them with its data.
    settings |= {"identities": identify_people(images, digests, root).mark if labelled else None}
    settings |= {"classes": people.mark if people else None, "data_root": str(known_root(args, cfg))}
    job = Job(Path(args.out), rows, sources, args.top, args.quality, batch_size)
    return generate(job, nets, settings, started)


def read_input(args: argparse.Namespace, cfg: DGNetConfig) -> tuple[Path, ImageList]:
    """The folder of the images to combine, and the checked images."""
    config = open_run(args.output_path, args.name).config_file
    root = find_data(args.input, "--input", cfg.data_root, config)
    images = read_people(root, cfg.train_split if is_data_set(root) else None)
    images = images.select(check_images(images.paths, skip_bad=cfg.skip_bad_images))
    say_reading({"input": images})
    return root, images


def known_root(args: argparse.Namespace, cfg: DGNetConfig) -> Path:
    return resolve_data_root(args.data_root or cfg.data_root)


def choose_teachers(args: argparse.Namespace, cfg: DGNetConfig) -> tuple[list[str], ImageList | None]:
    """The teachers' names and the images of the identities that their classes are; neither without soft labels."""
    if args.no_soft_labels:
        return [], None
    teachers = [name.strip() for name in (args.teacher or cfg.teacher).split(",") if name.strip()]
    try:
        for name in teachers:
            find_teacher(name, open_run(args.output_path, args.name).output_path)
    except UserError as error:
        raise UserError(f"{error}; or name another --teacher, or go without: --no-soft-labels") from None
    try:
        return teachers, read_split(known_root(args, cfg), cfg.train_split, need_names=False)
    except UserError as error:
        raise UserError(f"{error}; soft labels need it: --data_root DIR, or --no-soft-labels") from None


def name_images(images: ImageList, root: Path) -> str:
    """A name for a list of images, made from their paths in order."""
    return hashlib.sha256(b"\n".join(os.fsencode(path.relative_to(root)) for path in images.paths)).hexdigest()[:16]
