"""Making whole data sets: batches of swaps on one or several devices, their files, and the manifest.

Workers compute and write images under hidden names; the main process alone names them and lists them, so that the
manifest agrees with the files whatever happens.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import losses as L
from data.folders import UNFINISHED_MARK, ImageList
from data.generated import (
    SETTINGS,
    ManifestFile,
    Row,
    count_pairs,
    draw_pairs,
    format_soft_label,
    plan_rows,
    read_manifest,
    recover_rows,
    write_manifest,
)
from data.images import denormalise, iter_images, normalise
from files import make_folder, part_of, write_json
from parallel.collectives import gather, is_main, rank, world_size
from runs.folder import RunFolder
from runs.load import load_teacher
from runs.swapper import Swapper, load_swapper
from runs.weights import digest_weights
from trainer import autocast
from utils import UserError, halve_until_it_fits, set_threads

# Images that the nets see at a time on a CPU. Its kernels round differently for other numbers of images.
CPU_PASS = 8
# Images at a time where nobody says how many; a GPU may have to do with less.
CPU_BATCH, GPU_BATCH = 32, 256
_QUEUED_BATCHES = 3  # being written while the next one is computed


@dataclass(frozen=True)
class NetNames:
    """Which nets: a run's snapshot, and teachers whose classes stand for the identities `classes`."""

    run: RunFolder
    iteration: int
    teachers: list[str]
    classes: list[str]
    precision: str


@dataclass(frozen=True)
class Job:
    """What to make, and where: image i has `rows[i]` (soft label still empty) and two source files `sources[i]`.

    sources  (appearance, structure)
    top      identities in a soft label
    quality  of JPEG files, 1..100
    """

    nets: NetNames
    out: Path
    rows: list[Row]
    sources: list[tuple[Path, Path]]
    top: int
    quality: int
    batch_size: int
    threads: int | None


class Made(NamedTuple):
    """A batch whose images are written under their hidden names, and what the nets took for it."""

    rows: list[Row]
    worker: int
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Images made by one call, per second of the nets' time alone, and per second of the whole command."""

    images: int
    nets: float
    command: float


# --------------------------------------------------------------------------------------------- one worker
class Nets:
    """The generator of a run and the teachers, on one device. Raises UserError for what cannot be loaded."""

    def __init__(self, names: NetNames, device: torch.device) -> None:
        self.model: Swapper = load_swapper(names.run, device, str(names.iteration))
        count, output_path = len(names.classes), names.run.output_path
        self.teachers = [load_teacher(name, output_path, count).to(device) for name in names.teachers]
        self.precision, self.device, self.size = names.precision, device, self.model.size

    def digest(self) -> str:
        """A name for the weights: the same name, the same images."""
        return digest_weights(self.model.id_net, self.model.gen, *self.teachers)[:16]

    @torch.no_grad()
    def __call__(self, x_app: Tensor, x_str: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """The clothes of `x_app` on the people of `x_str`: (N, H, W, 3) uint8 and the teachers' (N, K) label of it."""
        with autocast(self.device, self.precision):
            pixels = denormalise(self.model.swap(x_app, x_str))
            label = L.mean_prediction(self.teachers, normalise(pixels)) if self.teachers else None
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return images, None if label is None else label.cpu().numpy()


def work(job: Job, nets: Nets, worker: int, batches: list[list[int]]) -> Iterator[Made]:
    """Make the images of `batches` (numbers of images, whole passes), one batch after the other.

    Reading runs ahead of the nets and writing behind them, both in threads.
    """
    size = pass_size(nets.device, job.batch_size)
    passes = [[batch[i : i + size] for i in range(0, len(batch), size)] for batch in batches]
    # The nets always see full passes, so that the last one rounds as all others.
    paths = [
        job.sources[i][role]
        for batch in passes
        for chunk in batch
        for role in (0, 1)
        for i in chunk + chunk[-1:] * (size - len(chunk))
    ]
    written: deque[tuple[list[Row], float, list[Future[None]]]] = deque()
    with closing(iter_images(paths, *nets.size, 2 * size, device=nets.device)) as stream, writers() as pool:
        for batch in passes:
            rows, seconds, files = [], 0.0, []
            for chunk in batch:
                x_app, x_str = next(stream).chunk(2)
                began = time.perf_counter()
                try:
                    images, labels = nets(x_app, x_str)
                except torch.OutOfMemoryError:
                    raise UserError(f"--batch_size {size}: the GPU's memory is too small; use a smaller one") from None
                seconds += time.perf_counter() - began
                for k, i in enumerate(chunk):
                    label = "" if labels is None else format_soft_label(labels[k], job.nets.classes, job.top)
                    rows.append(job.rows[i]._replace(soft_label=label))
                    files.append(pool.submit(write_image, job.out / job.rows[i].file, images[k], job.quality))
            written.append((rows, seconds, files))
            while written and (len(written) > _QUEUED_BATCHES or all(file.done() for file in written[0][2])):
                yield finished(worker, *written.popleft())
        while written:
            yield finished(worker, *written.popleft())


def pass_size(device: torch.device, batch_size: int) -> int:
    return CPU_PASS if device.type == "cpu" else batch_size


def choose_batch_size(nets: Nets, out: Path, sharing: int = 1) -> int:
    """`--batch_size auto`: that with which a generation in `out` was begun; 32 on a CPU; or what a GPU can hold.

    The last is found by trying, 256 first, then half of it; each of the processes `sharing` the GPU has its part.
    """
    if nets.device.type == "cpu":
        return CPU_BATCH
    try:
        begun = json.loads((out / SETTINGS).read_text())["images_per_pass"]
        if isinstance(begun, int) and begun > 0:
            return begun
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a new one, or a damaged one, which `compare_settings` refuses
    _, size = halve_until_it_fits(lambda size: nets(*torch.zeros(2, size, 3, *nets.size)), GPU_BATCH)
    torch.cuda.empty_cache()  # what the trial has taken is for the processes that do the work
    return max(1, size // sharing)


@contextmanager
def writers() -> Iterator[ThreadPoolExecutor]:
    """Threads that encode and write; Pillow lets go of the interpreter lock meanwhile."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def write_image(path: Path, image: np.ndarray, quality: int) -> None:
    """Write (H, W, 3) uint8 under the hidden name of `path`, in the format of its suffix."""
    picture = Image.fromarray(image)
    with open(part_of(path), "wb") as file:
        if path.suffix == ".png":
            picture.save(file, "PNG")
        else:
            picture.save(file, "JPEG", quality=quality)


def finished(worker: int, rows: list[Row], seconds: float, files: list[Future[None]]) -> Made:
    for file in files:
        file.result()
    return Made(rows, worker, seconds)


# ----------------------------------------------------------------------------------------- several workers
def run_workers(job: Job, nets: Nets, devices: list[torch.device], batches: list[list[int]]) -> Iterator[Made]:
    """The batches, dealt out to a process per entry of `devices`; a single entry is served here, with `nets`.

    Under torchrun they are dealt out to its processes, each with its own `nets`, and all get what any has made.
    """
    if world_size() > 1:
        own = work(job, nets, rank(), batches[rank() :: world_size()])
        for _ in range(0, len(batches), world_size()):
            yield from (made for made in gather(next(own, None)) if made is not None)
        return
    if len(devices) == 1:
        yield from work(job, nets, 0, batches)
        return
    context = get_context("spawn")
    running = {}
    try:
        for worker, device in enumerate(devices):
            ours, theirs = context.Pipe()
            share = batches[worker :: len(devices)]
            process = context.Process(target=serve, args=(theirs, job, worker, device, share), daemon=True)
            with interrupts_ignored():
                process.start()
            theirs.close()
            running[ours] = process
        waiting = set(running)
        while waiting:
            for connection in wait(waiting):
                try:
                    message = connection.recv()
                except EOFError:
                    raise UserError(
                        f"{job.out}: a worker process died (out of memory?); run the same command again to continue, "
                        "with fewer processes or a smaller --batch_size"
                    ) from None
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    waiting.remove(connection)
                else:
                    yield message
    finally:
        for connection, process in running.items():
            process.terminate()
            process.join()
            connection.close()


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C from its first moment: it reaches all, the main one decides."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(connection: Connection, job: Job, worker: int, device: torch.device, batches: list[list[int]]) -> None:
    """A worker process: sends every batch that it has made, and ends when the main process does."""

    def leave_with_parent() -> None:
        try:
            connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        set_threads(job.threads)
        for made in work(job, Nets(job.nets, device), worker, batches):
            connection.send(made)
        connection.send(None)
    except (UserError, OSError) as error:
        connection.send(error)


# --------------------------------------------------------------------------------------------- the data set
def generate(job: Job, nets: Nets, devices: list[torch.device], settings: dict[str, object], started: float) -> Speed:
    """Make what is missing of the data set in `job.out`; returns at once when nothing is.

    nets      those of `job`, on the first of `devices` where that is the only one
    devices   a process for each
    settings  what the images depend on; kept in generate.json and compared when a generation continues
    started   `time.perf_counter()` at the start of the command

    Raises UserError for a folder that holds anything else, is in use, or cannot be written.
    """
    out = job.out
    try:
        if not is_main():
            # Process 0 alone names and lists images; this one makes its share.
            for _ in run_workers(job, nets, devices, gather([])[0]):
                pass
            return Speed(0, 0.0, 0.0)
        with opened(out, settings):
            rows = recover_rows(out, job.rows)
            present = {row.file for row in rows}
            batches = missing_batches(job, devices[0], present)
            if batches:
                for folder in {(out / row.file).parent for row in job.rows}:
                    folder.mkdir(parents=True, exist_ok=True)
            gather(batches)
            devices = devices if world_size() > 1 else devices[: len(batches)] or devices[:1]
            speed = fill(job, nets, devices, batches, present, started)
            order = {row.file: i for i, row in enumerate(job.rows)}
            rows = read_manifest(out)
            ordered = sorted(rows, key=lambda row: order[row.file])
            if rows != ordered:
                write_manifest(out, ordered)
            (out / UNFINISHED_MARK).unlink(missing_ok=True)
            return speed
    except OSError as error:
        done = sum(1 for row in job.rows if (out / row.file).exists())
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); {done} of {len(job.rows)} images are there and in "
            "the manifest; free space and run the same command again to continue"
        ) from None


@contextmanager
def opened(out: Path, settings: dict[str, object]) -> Iterator[None]:
    """The data set's folder, new or ours, for this process alone."""
    make_folder(out)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another generate.py is writing to it; wait for it, or stop it") from None
        path = out / SETTINGS
        if path.exists():
            compare_settings(path, settings)
        elif others := sorted(p.name for p in out.iterdir() if p not in (part_of(path), out / UNFINISHED_MARK)):
            raise UserError(f"--out {out}: holds other files ({others[0]}); choose a new or empty folder")
        (out / UNFINISHED_MARK).touch()
        write_json(path, settings)
        yield
    finally:
        os.close(lock)


def compare_settings(path: Path, settings: dict[str, object]) -> None:
    """Raise UserError unless a generation with `settings` may continue the one that wrote `path`."""
    try:
        before = json.loads(path.read_text())
        if not isinstance(before, dict) or not isinstance(before["count"], int):
            raise ValueError
    except (OSError, ValueError, KeyError, RecursionError):
        raise UserError(f"{path}: damaged; choose another --out") from None
    for key, value in settings.items():
        if key not in ("count", "input", "name") and before.get(key) != value:
            raise UserError(
                f"--out {path.parent}: made with {key} {before.get(key)}, now {value}; give the same options to "
                "continue it, or choose another --out"
            )
    if settings["count"] < before["count"]:
        raise UserError(
            f"--out {path.parent}: --count {settings['count']} is less than the {before['count']} images that it was "
            "begun with; give that number or more, or choose another --out"
        )


def missing_batches(job: Job, device: torch.device, present: set[str]) -> list[list[int]]:
    """Whole passes in which an image is missing, joined to batches.

    A pass holds the same images whenever and by whomever it is made, so its images are the same, too.
    """
    size, n = pass_size(device, job.batch_size), len(job.rows)
    passes = [range(first, min(first + size, n)) for first in range(0, n, size)]
    passes = [chunk for chunk in passes if any(job.rows[i].file not in present for i in chunk)]
    together = max(1, job.batch_size // size)
    return [[i for chunk in passes[k : k + together] for i in chunk] for k in range(0, len(passes), together)]


def fill(
    job: Job, nets: Nets, devices: list[torch.device], batches: list[list[int]], present: set[str], started: float
) -> Speed:
    """Make `batches` and list their images; whatever stops this, no half-made image stays."""
    count, seconds, made_by = 0, [0.0] * len(devices), [0] * len(devices)
    bar = tqdm(total=len(job.rows), initial=len(present), desc="images", unit="img", disable=None, mininterval=0.5)
    try:
        with bar, ManifestFile(job.out) as manifest, closing(run_workers(job, nets, devices, batches)) as results:
            for made in results:
                rows = [row for row in made.rows if row.file not in present]
                manifest.commit(rows)
                bar.update(len(rows))
                count += len(rows)
                made_by[made.worker] += len(made.rows)
                seconds[made.worker] += made.seconds
    finally:
        for row in job.rows:
            part_of(job.out / row.file).unlink(missing_ok=True)
    alone = sum(images / spent for images, spent in zip(made_by, seconds, strict=True) if spent)
    return Speed(count, alone, count / (time.perf_counter() - started))


# -------------------------------------------------------------------------------------------------- planning
def plan(
    images: ImageList, root: Path, *, count: int, seed: int, labelled: bool, suffix: str
) -> tuple[list[Row], list[tuple[Path, Path]]]:
    """The rows and the two source files of each of `count` images from `images`, which lie under `root`.

    Raises UserError where `images` do not give as many different pairs.
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
    pairs = draw_pairs(labels, count, seed)
    rows = plan_rows(images, root, pairs, labelled=labelled, suffix=suffix)
    return rows, [(images.paths[a], images.paths[s]) for a, s in pairs.tolist()]
