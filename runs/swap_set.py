"""Whole data sets of swaps, made by one or several processes.

Every process makes whole passes of images. It writes them under their names, and then their rows, with the soft labels,
into a file of the pass in `.unfinished`. Process 0 joins these to the manifest when all images are there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import losses as L
from config import DGNetConfig
from data.folders import UNFINISHED_MARK, ImageList, is_data_set, read_people, read_split
from data.generated import (
    MANIFEST,
    SETTINGS,
    Row,
    count_pairs,
    draw_swap_pairs,
    format_soft_label,
    plan_rows,
    read_rows,
    write_rows,
)
from data.images import check_images, denormalise, iter_images, normalise
from data.listing import say_reading, unsaid
from data.people import identify_people
from files import digest_files, digest_of, hold_folder, is_part, make_folder, part_of, read_json, write_json
from parallel.collectives import gather, is_main, rank, world_size
from precision import pick_precision
from runs.folder import find_data, generator_config, open_run, resolve_data_root
from runs.load import find_teacher, load_teacher, pick_epoch, require_teacher_of
from runs.swapper import Swapper, load_swapper
from runs.weights import digest_weights
from trainer import autocast
from utils import UserError, halve_until_it_fits, set_threads

log = logging.getLogger(__name__)
# Images at a time where `--batch_size` is auto; a GPU may have room for less.
CPU_BATCH, GPU_BATCH = 8, 256
WRITERS = 8  # threads that encode and write the images of a pass each
# What a generation that continues may have otherwise: more images, and paths that lead to the same images and weights.
MAY_CHANGE = ("count", "input", "name", "data_root")


@dataclass(frozen=True)
class Job:
    """What to make, and where: image i has `rows[i]` (soft label still empty) and two source files `sources[i]`.

    sources     (appearance, structure)
    top         identities in a soft label
    quality     of JPEG files, 1..100
    batch_size  images in a pass of the nets
    """

    out: Path
    rows: list[Row]
    sources: list[tuple[Path, Path]]
    top: int
    quality: int
    batch_size: int


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


def make_passes(job: Job, nets: Nets, passes: list[range]) -> tuple[int, float]:
    """Make the images of `passes`, ranges of their numbers; returns how many, and the seconds that the nets took.

    Threads read ahead of the nets and write behind them.
    """
    # The nets always see full passes, so that the last one rounds like the others.
    full = [[*chunk, *[chunk[-1]] * (job.batch_size - len(chunk))] for chunk in passes]
    paths = [job.sources[i][role] for chunk in full for role in (0, 1) for i in chunk]
    seconds, count, behind = 0.0, sum(map(len, passes)), deque[Future[None]]()
    bar = tqdm(total=count, desc="images", unit="img", disable=None if is_main() else True, mininterval=0.5)
    stream = iter_images(paths, *nets.size, 2 * job.batch_size, device=nets.device)
    with bar, closing(stream), ThreadPoolExecutor(WRITERS) as pool:
        for chunk in passes:
            x_app, x_str = next(stream).chunk(2)
            began = time.perf_counter()
            images, labels = nets(x_app, x_str)
            seconds += time.perf_counter() - began
            rows = [job.rows[i] for i in chunk]
            if labels is not None:
                texts = [format_soft_label(label, nets.classes, job.top) for label in labels]
                rows = [row._replace(soft_label=text) for row, text in zip(rows, texts, strict=False)]
            behind.append(pool.submit(write_pass, job, chunk[0], rows, images))
            if len(behind) > WRITERS:
                behind.popleft().result()
            bar.update(len(chunk))
        for writing in behind:
            writing.result()
    return count, seconds


def write_pass(job: Job, first: int, rows: list[Row], images: np.ndarray) -> None:
    """Write the images of a pass, (>= n, H, W, 3) uint8, and then their n rows; the first image has number `first`."""
    for row, image in zip(rows, images, strict=False):
        write_image(job.out / row.file, image, job.quality)
    write_rows(job.out / UNFINISHED_MARK / f"{first:06d}.csv", rows)


def write_image(path: Path, image: np.ndarray, quality: int) -> None:
    """Write (H, W, 3) uint8 in the format of the path's suffix; the file is there whole or not at all."""
    data = io.BytesIO()  # Pillow does not notice when a disk takes only the beginning.
    if path.suffix == ".png":
        Image.fromarray(image).save(data, "PNG")
    else:
        Image.fromarray(image).save(data, "JPEG", quality=quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    part_of(path).write_bytes(data.getvalue())
    os.replace(part_of(path), path)


def choose_batch_size(nets: Nets) -> int:
    """`--batch_size auto`: 8 on a CPU; on a GPU 256, or half of it, and so on, until it fits."""
    if nets.device.type == "cpu":
        return CPU_BATCH
    return halve_until_it_fits(lambda size: nets(*torch.zeros(2, size, 3, *nets.size)), GPU_BATCH)[1]


# --------------------------------------------------------------------------------------------- the data set
def generate(job: Job, nets: Nets, settings: dict[str, object], started: float) -> str:
    """Make what is missing of the data set in `job.out`; returns what was made, in words.

    settings  what the images depend on; kept in generate.json and compared when a generation continues
    started   `time.perf_counter()` at the start of the command

    Every process calls this. Raises UserError for a folder that holds anything else, is in use, or cannot be written.
    """
    try:
        with opened(job.out, settings) if is_main() else nullcontext():
            passes = gather(missing_passes(job) if is_main() else [])[0]
            made = gather(make_passes(job, nets, passes[rank() :: world_size()]))
            if is_main():
                rows = recorded_rows(job)
                write_rows(job.out / MANIFEST, [rows[row.file] for row in job.rows])
                shutil.rmtree(job.out / UNFINISHED_MARK)
    except OSError as error:
        why = error.strerror or error
        remedy = "free space and run the same command again to continue"
        raise UserError(f"{job.out}: cannot be written ({why}); {remedy}") from None
    count = sum(images for images, _ in made)
    report = f"{len(job.rows)} images in {job.out}, {count} of them made now"
    if count:
        rate = sum(images / seconds for images, seconds in made if seconds)
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
        if (out / SETTINGS).exists():
            require_same_settings(out / SETTINGS, settings)
        elif others := sorted(p.name for p in out.iterdir() if p.name != UNFINISHED_MARK and not is_part(p)):
            raise UserError(f"--out {out}: holds other files ({others[0]}); choose a new or empty folder")
        make_folder(out / UNFINISHED_MARK)
        write_json(out / SETTINGS, settings)
        yield


def require_same_settings(path: Path, settings: dict[str, object]) -> None:
    """Raise UserError if the data set that was begun with the settings in a file may not continue with `settings`."""
    before = read_json(path, "choose another --out")
    for key, value in settings.items():
        was = before.get(key) if isinstance(before, dict) else None
        if key not in MAY_CHANGE and was != value:
            remedy = "give the same options and images to continue, or choose another --out"
            raise UserError(f"{path}: made with {key} {was!s:.80}, not {value}; {remedy}")


def recorded_rows(job: Job) -> dict[str, Row]:
    """By file the rows of the images that are or were there. Raises UserError for other images than the job's."""
    planned = {row.file: row for row in job.rows}
    manifests = [job.out / MANIFEST, *sorted((job.out / UNFINISHED_MARK).glob("*.csv"))]
    rows: dict[str, Row] = {}
    for path in filter(Path.exists, manifests):
        for row in read_rows(path):
            if planned.get(row.file) != row._replace(soft_label=""):
                what = f"{row.file} is not among the {len(planned)} images of this command"
                raise UserError(f"{path}: {what}; give at least the --count of before, or choose another --out")
            rows[row.file] = row
    return rows


def missing_passes(job: Job) -> list[range]:
    """The passes in which an image is missing or damaged.

    Passes are cut by the images' numbers. An image is therefore always made beside the same others, and its rounding
    does not depend on interruptions or on the number of processes.
    """
    files = list(recorded_rows(job))
    with unsaid():
        sound = check_images([job.out / file for file in files], skip_bad=True, minimum=0)
    if lost := len(files) - sum(sound):
        log.warning("%s: %d images are missing or damaged and are made again", job.out, lost)
    present = {file for file, fine in zip(files, sound, strict=True) if fine}
    size, n = job.batch_size, len(job.rows)
    passes = [range(first, min(first + size, n)) for first in range(0, n, size)]
    return [chunk for chunk in passes if any(job.rows[i].file not in present for i in chunk)]


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
    batch_size = args.batch_size or min(gather(choose_batch_size(nets)))
    same = ("count", "seed", "labels", "format", "quality", "top", "precision")
    settings = {"name": run.name, "iteration": iteration, "weights": nets.digest(), "teachers": teachers}
    settings |= {"input": str(args.input or cfg.data_root), "images": name_images(images, root)}
    settings |= {"contents of the input": digest_of(digests), "device": device.type, "batch_size": batch_size}
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
