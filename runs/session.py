"""The training loop around a trainer's step: data, logs, image grids, snapshots. DG-Net and teachers share it."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, DGNetConfig, TeacherConfig
from data.batch import Batch
from data.cache import Machine, cached_images
from data.folders import ImageList, check_test_set, read_split
from data.generated import MANIFEST, add_generated
from data.images import iter_images
from data.loader import PairLoader
from files import write_whole
from losses import RAMPED, loss_weights
from networks import structure_input
from parallel import collectives
from parallel.layers import act_on_whole_batch
from precision import pick_precision
from runs.board import Board
from runs.folder import (
    NETWORKS,
    TEACHER_FILES,
    RunFolder,
    make_run_folder,
    resolve_data_root,
    start_folder,
    update_config,
)
from runs.grid import paint_pairs
from runs.guards import FiniteWatch, SkippedSteps, StopSignals, not_finite
from runs.load import build_trainer, num_classes, save_teacher
from runs.load import training_images as read_training_images
from runs.snapshot import (
    changed_settings,
    load_snapshot,
    nothing_saved,
    prune_snapshots,
    read_manifest,
    remove_parts,
    save_snapshot,
    set_aside,
    snapshots,
)
from runs.validate import sample_pairs
from runs.weights import digest_weights
from trainer import DGNetTrainer, TeacherTrainer
from utils import UserError, own_command, set_deterministic

EXCHANGE_SIGNALS = 10  # steps after which several processes tell each other of signals to stop
# The losses that the progress bar shows, by task.
SHOWN = {"dgnet": ("gen_total", "dis_total", "recon_x_a", "id", "teacher"), "teacher": ("id", "accuracy")}


@dataclass
class Session:
    """Everything that the loop needs, built and checked. `command` continues the run when it was stopped."""

    cfg: Config
    run: RunFolder
    device: torch.device
    images: ImageList
    classes: int
    loaders: list[PairLoader]
    trainer: DGNetTrainer | TeacherTrainer
    max_iter: int
    snapshot_iter: int
    command: str

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        """What besides the config decides the numbers of a run; its snapshots remember it."""
        images = self.loaders[0].images
        names = "\n".join(f"{label} {path.name}" for label, path in zip(images.labels(), images.paths, strict=True))
        cpu = self.device.type == "cpu"
        found = {
            "training images": f"{len(images)} (list {hashlib.sha256(names.encode()).hexdigest()[:8]})",
            "device": f"cpu, threads {torch.get_num_threads()}" if cpu else torch.cuda.get_device_name(self.device),
            "processes": collectives.world_size(),
            "PyTorch": str(torch.__version__),
            "images resized by": self.loaders[0].resized_by,
        }
        if isinstance(self.trainer, DGNetTrainer) and self.trainer.teachers:
            found["teachers"] = digest_weights(*self.trainer.teachers)[:8]
        if isinstance(self.cfg, TeacherConfig) and self.cfg.extra_data is not None:
            manifest = resolve_data_root(self.cfg.extra_data) / MANIFEST
            found["extra_data"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:8]
        return found


def build_session(
    cfg: Config, run: RunFolder, device: torch.device, *, resume: bool, command: str = "the same command"
) -> Session:
    """Check the data and build loaders and trainer; nothing is written."""
    set_deterministic(cfg.deterministic)
    if cfg.precision == "auto":
        # The run's folder keeps what it is; of several processes the first decides.
        cfg = cfg.model_copy(update={"precision": collectives.gather(pick_precision(device, "auto"))[0]})
    if isinstance(cfg, DGNetConfig) and cfg.eval_iter:
        check_test_set(resolve_data_root(cfg.data_root), cameras=None)
    own_batch_size = collectives.own_batch_size(cfg.batch_size, sync_bn=cfg.sync_bn)
    images = read_training_images(cfg)
    classes = num_classes(cfg, images)
    common = dict(
        batch_size=cfg.batch_size,
        height=cfg.crop_image_height,
        width=cfg.crop_image_width,
        pad=cfg.crop_padding,
        num_workers=cfg.num_workers,
        device=device,
        part=collectives.own_part(),
    )
    if isinstance(cfg, TeacherConfig):
        soft_labels = None
        if cfg.extra_data is not None:
            extra = resolve_data_root(cfg.extra_data)
            images, soft_labels = add_generated(images, extra, cfg.extra_labels, skip_bad=cfg.skip_bad_images)
        streams = [dict(seed=cfg.seed, with_positive=False, soft_labels=soft_labels)]
    else:
        # Images a and b are two independently shuffled passes over the same folder.
        streams = [dict(seed=2 * cfg.seed), dict(seed=2 * cfg.seed + 1)]
    machine = None
    if collectives.world_size() > 1:
        machine = Machine(collectives.local_rank() == 0, collectives.from_first_of_machine)
    common["pixels"] = cached_images(
        images.paths,
        cfg.cache_images,
        cfg.crop_image_height,
        cfg.crop_image_width,
        limit_mb=cfg.cache_limit_mb,
        machine=machine,
    )
    loaders = [PairLoader(images, **stream, **common) for stream in streams]
    per_epoch = loaders[0].batches_per_epoch
    resumable = resume and bool(snapshots(run.checkpoints, NETWORKS[cfg.task]))
    trainer = build_trainer(
        cfg, classes, device, output_path=run.output_path, steps_per_epoch=per_epoch, initialise=not resumable
    )
    nets = [*trainer.networks().values(), *getattr(trainer, "teachers", [])]
    act_on_whole_batch(nets, own_batch_size, sync_bn=cfg.sync_bn)
    if isinstance(cfg, TeacherConfig):
        max_iter, snapshot_iter = cfg.epochs * per_epoch, cfg.snapshot_epochs * per_epoch
    else:
        max_iter, snapshot_iter = cfg.max_iter, cfg.snapshot_save_iter
    return Session(cfg, run, device, images, classes, loaders, trainer, max_iter, snapshot_iter, command)


def describe(s: Session) -> str:
    """What `--dry-run` prints: sizes of networks, shapes of a batch, the schedule."""
    where = f"{s.device} in {s.cfg.precision}"
    where += f", one of {n} processes" if (n := collectives.world_size()) > 1 else ""
    lines = [f"run {s.run.name}: {s.cfg.task} on {where}, {len(s.images)} images of {s.classes} identities"]
    for name, net in s.trainer.networks().items():
        lines.append(
            f"  {name:4s} {sum(p.numel() for p in net.parameters()) / 1e6:8.2f} M parameters  {type(net).__name__}"
        )
    batch = s.loaders[0].batch(0)
    lines.append(f"  batch x {tuple(batch.x.shape)}, xp {tuple(batch.xp.shape)}, y {tuple(batch.y.shape)}")
    if isinstance(s.trainer, DGNetTrainer):
        x = torch.cat([batch.x, batch.x]).to(s.device)[:2]
        with torch.no_grad():
            code = s.trainer.gen.encode(structure_input(x, s.cfg.single, np.random.default_rng(0)))
        lines.append(f"  structure code {tuple(code.shape[1:])}, appearance code ({s.trainer.id_net.code_dim},)")
    lines.append(
        f"  {s.max_iter} steps, {s.loaders[0].batches_per_epoch} per epoch, a snapshot every {s.snapshot_iter}"
    )
    lines.append("  iteration " + "".join(f"{name:>15s}" for name in schedule(s, 0)))
    for t in sorted({round(i * (s.max_iter - 1) / 8) for i in range(9)}):
        lines.append(f"  {t:9d} " + "".join(f"{value:15.4g}" for value in schedule(s, t).values()))
    return "\n".join(lines)


def schedule(s: Session, t: int) -> dict[str, float]:
    """Learning rates and ramped weights at iteration `t`."""
    cfg = s.cfg
    if isinstance(cfg, DGNetConfig):
        factors = s.trainer.lr_factors(t)
        rates = {
            "lr_g": cfg.lr_g * factors["gen"],
            "lr_d": cfg.lr_d * factors["dis"],
            "lr2": cfg.lr2 * factors["id"] * (t >= cfg.id_freeze_iter),
        }
        weights = loss_weights(cfg, t)
        return rates | {key: weights[name] for name, key in RAMPED.items()}
    factor = s.trainer.lr_factor(t)
    return {"lr_trunk": cfg.trunk_lr_factor * cfg.lr * factor, "lr_head": cfg.lr * factor}


def to_device(batch: Batch, device: torch.device, cfg: Config) -> Batch:
    layout = torch.channels_last if cfg.channels_last else torch.preserve_format
    x, xp = (v.to(device, memory_format=layout, non_blocking=True) for v in (batch.x, batch.xp))
    y, q = (None if v is None else v.to(device, non_blocking=True) for v in (batch.y, batch.q))
    return Batch(x, xp, y, batch.index, q)


def display_pairs(s: Session) -> tuple[Tensor, Tensor]:
    """`display_size` fixed pairs of test images (training images where there is no query split)."""
    cfg = s.cfg
    try:
        paths = read_split(resolve_data_root(cfg.data_root), "query", need_names=False).paths
    except UserError:
        paths = s.images.paths
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    chosen = [paths[order[i % len(paths)]] for i in range(2 * cfg.display_size)]
    batches = iter_images(chosen, cfg.crop_image_height, cfg.crop_image_width, 64, device=s.device)
    x_a, x_b = torch.cat(list(batches)).chunk(2)
    return x_a, x_b


def train(s: Session, *, resume: str | None) -> int:
    """Run the loop from the start, or from a snapshot, to the last iteration or to a signal.

    resume  None: a new run. "last", or an iteration's number: from that snapshot. "auto": what applies, passing over
            damaged snapshots
    Returns the exit status: 0, or 128 and the number of the signal.
    """
    cfg, run = s.cfg, s.run
    if resume not in (None, "last", "auto") and not resume.isdecimal():
        raise UserError(
            f"--resume {resume}: not an iteration; there are {snapshots(run.checkpoints, NETWORKS[cfg.task])}"
        )
    if collectives.is_main():
        start_folder(run, cfg, resume=run.config_file.is_file() if resume == "auto" else resume is not None)
        if resume is not None:
            remove_parts(run.checkpoints, NETWORKS[cfg.task])
    collectives.wait_for_all()
    start = restore(s, resume) if resume is not None else 0
    collectives.start_together(s.trainer, start, s.device)
    if start < s.max_iter:
        if resume is not None and collectives.is_main():
            update_config(run, cfg, start)
        with ExitStack() as stack:
            board = stack.enter_context(Board(run.logs, start)) if collectives.is_main() else None
            if board is not None:
                board.text("command", own_command(), start)
            streams: list[Iterator[Batch]] = [loader.batches(start) for loader in s.loaders]
            for stream in streams:
                stack.callback(stream.close)
            stop = stack.enter_context(StopSignals())
            done = loop(s, streams, board, stop, start)
        if done < s.max_iter:
            print(
                f"stopped by {stop.received.name} after {done} of {s.max_iter} steps, which are saved; "
                f"continue with: {s.command}",
                file=sys.stderr,
            )
            return 128 + stop.received
    written = start >= s.max_iter and all((run.model / f).exists() for f in TEACHER_FILES)
    if isinstance(cfg, TeacherConfig) and collectives.is_main() and not written:
        save_teacher(run, cfg, s.trainer.net, s.classes)
        print(f"teacher written to {run.model}")
    return 0


def restore(s: Session, resume: str) -> int:
    """Continue from a snapshot, or begin where there is none yet; returns the number of finished steps."""
    cfg, run, networks = s.cfg, s.run, NETWORKS[s.cfg.task]
    if not resume.isdecimal() and nothing_saved(run.checkpoints, networks):
        print(f"{run.name} has no snapshot yet: starting from the beginning")
        return 0
    iteration = int(resume) if resume.isdecimal() else None
    start = load_snapshot(run.checkpoints, s.trainer, iteration, fall_back=resume == "auto")
    print(f"resumed {run.name} after {start} of {s.max_iter} steps")
    if iteration is not None and collectives.is_main() and (aside := set_aside(run.checkpoints, networks, start)):
        print(f"the snapshots after {start} steps are now in {aside}")
    manifest = read_manifest(run.checkpoints, start)
    changed = changed_settings(manifest, cfg, s.circumstances) if manifest else {}
    if changed and start < s.max_iter:
        listing = ", ".join(f"{name} was {then}, is {now}" for name, (then, now) in changed.items())
        print(f"note: this will not be the run that was never stopped: {listing}", file=sys.stderr)
    return start


def loop(s: Session, streams: list[Iterator[Batch]], board: Board | None, stop: StopSignals, start: int) -> int:
    """Steps from `start` to the last one or to a signal; returns the number of finished ones, which are saved.

    Of several processes each makes all steps; the one with a `board` writes.
    """
    cfg, trainer, main, saved = s.cfg, s.trainer, board is not None, start
    paints = main and isinstance(trainer, DGNetTrainer)
    pairs = display_pairs(s) if paints else None
    evaluates = isinstance(cfg, DGNetConfig) and cfg.eval_iter > 0
    finite, skipped = FiniteWatch(s.device), SkippedSteps(trainer.scalers(), s.device)
    seen, since = start, time.perf_counter()
    bar = tqdm(range(start, s.max_iter), initial=start, total=s.max_iter, desc=s.run.name, unit="step", mininterval=0.5)
    for t in bar:
        try:
            batches = [to_device(next(stream), s.device, cfg) for stream in streams]
        except UserError as error:
            # A file or a worker is gone, but the steps so far are whole; other processes cannot come to save them.
            if t > saved and collectives.world_size() == 1:
                save(s, finite, t)
                saved = t
            raise UserError(f"{error}; {saved} steps are saved, continue with: {s.command}") from None
        terms = collectives.average_terms(trainer.step(*batches, t))
        finite.note(t, terms)
        skipped.note()
        done, last, stopping = t + 1, t + 1 == s.max_iter, should_stop(stop, t + 1)
        if done % cfg.log_iter == 0 or last:
            require_finite(s, finite)
            values = {name: float(value) for name, value in terms.items()}
            rate = (done - seen) * cfg.batch_size * len(batches) / (time.perf_counter() - since)
            seen, since = done, time.perf_counter()
            if main:
                log(board, s, values, rate, t, skipped)
            bar.set_postfix({k: f"{values[k]:.3f}" for k in SHOWN[cfg.task] if k in values}, refresh=False)
        if paints and (done % cfg.image_save_iter == 0 or done % cfg.image_display_iter == 0 or last):
            require_finite(s, finite)
            figure = paint_pairs(sample_pairs(trainer, *pairs))
            if done % cfg.image_display_iter == 0 or last:
                board.image("test pairs", figure, done)
            if done % cfg.image_save_iter == 0 or last:
                save_figure(s, figure, done)
        if evaluates and (done % cfg.eval_iter == 0 or last):
            require_finite(s, finite)
            began = time.perf_counter()
            evaluate(s, board, done)
            since += time.perf_counter() - began  # images/s are those of the training
        if done % cfg.check_ranks_iter == 0 or last:
            collectives.check_ranks(trainer, done)
        if done % s.snapshot_iter == 0 or last or stopping:
            save(s, finite, done)
            saved = done
        if stopping:
            bar.close()
            return done
    return s.max_iter


def should_stop(stop: StopSignals, done: int) -> bool:
    """Whether to stop after this step. Asked once a step: a signal that comes later in it is for the next one.

    Several processes have to agree, or one waits for another that has left; they exchange signals now and then.
    """
    if collectives.world_size() == 1:
        return stop.received is not None
    if done % EXCHANGE_SIGNALS:
        return False
    received = [signal for signal in collectives.gather(stop.received) if signal is not None]
    stop.received = received[0] if received else None
    return bool(received)


def log(board: Board, s: Session, values: dict[str, float], rate: float, t: int, skipped: SkippedSteps) -> None:
    """Losses by term, weights and learning rates, images/s, skipped steps. Raises UserError when most are skipped."""
    scalars = {f"loss/{name}": value for name, value in values.items()}
    scalars |= {f"schedule/{name}": value for name, value in schedule(s, t).items()}
    scalars |= {f"skipped_steps/{name}": count for name, count in skipped.counts().items()}
    board.scalars(scalars | {"images_per_second": rate}, t + 1)
    if most := skipped.most():
        raise UserError(
            f"precision fp16: the gradients overflow, {most} were skipped; use precision: bf16 or fp32, or lower the "
            f"learning rates; {last_good(s)}"
        )


def evaluate(s: Session, board: Board | None, done: int) -> None:
    """Re-identification and swaps of the test images for the `board`; an error is a warning, as far as it can be."""
    from runs import validate

    try:
        scalars = validate.evaluate(s, done)
    except UserError as error:
        if collectives.world_size() > 1:
            raise  # the others wait for this process's share
        print(f"\nwarning: not evaluated after {done} steps: {error}; training goes on", file=sys.stderr)
        return
    if board is not None:
        board.scalars(scalars, done)


def last_good(s: Session) -> str:
    """The newest snapshot, in words: what is written has been found finite."""
    found = snapshots(s.run.checkpoints, NETWORKS[s.cfg.task])
    return f"the last good snapshot: --resume {found[-1]}" if found else "there is no snapshot yet"


def batch_names(s: Session, t: int) -> str:
    """The files of the batches of iteration `t`, one list per stream."""
    return "; ".join(", ".join(path.name for path in loader.files(t)) for loader in s.loaders)


def require_finite(s: Session, finite: FiniteWatch) -> None:
    """Raise UserError that names every term, the batch and the last good snapshot, if a loss was not finite."""
    if bad := finite.first():
        t, terms = bad
        raise UserError(
            f"iteration {t}: a loss is not finite, training stopped; lower the learning rates. Terms: {terms}. "
            f"Images: {batch_names(s, t)}. {last_good(s)}"
        )


def save(s: Session, finite: FiniteWatch, done: int) -> None:
    """Write the snapshot of `done` steps, if everything in it is finite, and remove those that need not be kept."""
    require_finite(s, finite)
    collectives.share_buffers(s.trainer)
    if bad := not_finite(s.trainer):
        # A bad gradient shows in the weights before it shows in a loss.
        raise UserError(
            f"iteration {done - 1}: the losses are finite, but after its step {len(bad)} tensors are not "
            f"({bad[0]}, ...), training stopped; lower the learning rates. "
            f"Images: {batch_names(s, done - 1)}. {last_good(s)}"
        )
    if not collectives.is_main():
        return
    keep_folder(s)
    save_snapshot(s.run.checkpoints, s.trainer, done, s.circumstances)
    every = s.cfg.keep_every * (s.loaders[0].batches_per_epoch if isinstance(s.cfg, TeacherConfig) else 1)
    networks = NETWORKS[s.cfg.task]
    prune_snapshots(s.run.checkpoints, networks, done, keep_last=s.cfg.keep_last, keep_every=every)


def keep_folder(s: Session) -> None:
    """Make a run's folder again that somebody has removed."""
    if not s.run.config_file.is_file():
        make_run_folder(s.run, s.cfg)
        print(f"\nwarning: {s.run.path} was removed while the run was going on; made again", file=sys.stderr)


def save_figure(s: Session, figure: Any, done: int) -> None:
    """Write the grid of test pairs; a figure is not worth a run, so an error is a warning."""
    from PIL import Image

    path = s.run.images / f"test_{done:08d}.png"
    try:
        keep_folder(s)
        write_whole(path, lambda file: Image.fromarray(figure).save(file, format="PNG"))
    except UserError as error:
        print(f"\nwarning: {error}; training goes on", file=sys.stderr)
