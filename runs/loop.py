"""The training loop: steps, and what is due after them. DG-Net and teachers share it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.batch import Batch
from files import is_part, write_whole
from parallel import collectives
from runs import validate
from runs.folder import TEACHER_FILES, make_run_folder, start_folder, update_config
from runs.grid import paint_pairs
from runs.guards import FiniteWatch, SkippedSteps, StopSignals, not_finite
from runs.load import save_teacher
from runs.session import Session, display_pairs, to_device
from runs.snapshot import (
    changed_settings,
    load_snapshot,
    prune_snapshots,
    read_manifest,
    remove_parts,
    save_snapshot,
    snapshots,
)
from utils import UserError, own_command

EXCHANGE_SIGNALS = 10  # steps after which several processes tell each other of signals to stop
log = logging.getLogger(__name__)


def train(s: Session, *, resume: str | None) -> int:
    """Run the loop from the start, or from a snapshot, to the last iteration or to a signal.

    resume  None: a new run. "last", or an iteration's number: from that snapshot. "auto": whichever applies, passing
            over damaged snapshots
    Returns the exit status: 0, or 128 and the number of the signal.
    """
    start = begin(s, resume)
    stopped = None
    if start < s.max_iter:
        with ExitStack() as stack:
            board = None
            if collectives.is_main():
                board = stack.enter_context(SummaryWriter(str(s.run.logs), purge_step=start + 1))
                board.add_text("command", own_command(), start)
            streams = [stack.enter_context(Stream(loader.batches(start))) for loader in s.loaders]
            stack.enter_context(logging_redirect_tqdm())  # a line of its own, above the progress bar
            stop = stack.enter_context(StopSignals())
            done = loop(s, streams, board, stop, start)
            stopped = stop.received if done < s.max_iter else None
    if stopped is not None:
        log.warning("stopped by %s after %d of %d steps, which are saved", stopped.name, done, s.max_iter)
        log.warning("continue with: %s", s.command)
        return 128 + stopped
    finish(s)
    return 0


def loop(s: Session, streams: list[Iterator[Batch]], board: SummaryWriter | None, stop: StopSignals, start: int) -> int:
    """Steps from `start` to the last one or to a signal; returns the number of finished ones, which are saved.

    Every process makes all steps; the one with a `board` writes.
    """
    cfg, trainer = s.cfg, s.trainer
    pairs = display_pairs(s) if board and s.image_save_iter else None
    finite, skipped = FiniteWatch(s.device), SkippedSteps(trainer.scalers(), s.device)
    clock = Clock(cfg.batch_size * len(streams), start)
    shown = dict(desc=s.run.name, unit="step", mininterval=0.5, disable=not collectives.is_main())
    bar = tqdm(range(start, s.max_iter), initial=start, total=s.max_iter, **shown)
    for t in bar:
        # -------------------------------------------------------------------------------------- the step
        batches = next_batches(s, streams, finite, t, start)
        terms = collectives.average_terms(trainer.step(*batches, t))
        finite.note(t, terms)
        skipped.note()

        # ------------------------------------------------------------------------------- what is due after it
        done, stopping = t + 1, should_stop(stop, t + 1)

        def due(every: int, done: int = done) -> bool:
            return every > 0 and (done % every == 0 or done == s.max_iter)

        if due(cfg.log_iter):
            require_finite(s, finite)
            values = {name: float(value) for name, value in terms.items()}
            log_scalars(s, board, values, clock.rate(done), t, skipped)
            bar.set_postfix({k: f"{values[k]:.3f}" for k in s.shown if k in values}, refresh=False)
        if pairs and (due(s.image_display_iter) or due(s.image_save_iter)):
            figure = paint_pairs(validate.sample_pairs(trainer, *pairs))
            if due(s.image_display_iter):
                board.add_image("test pairs", figure, done, dataformats="HWC")
            if due(s.image_save_iter):
                write_image(s, f"test_{done:08d}.png", figure)
        if due(s.eval_iter):
            with clock.stopped():
                evaluate(s, board, done)
        if due(cfg.check_ranks_iter):
            collectives.check_ranks(trainer, done)
        if due(s.snapshot_iter) or stopping:
            save(s, finite, done)
        if stopping:
            bar.close()
            return done
    return s.max_iter


# ------------------------------------------------------------------------------------- before and after
def begin(s: Session, resume: str | None) -> int:
    """Make the run's folder, or continue from its snapshot; returns the number of finished steps."""
    cfg, run = s.cfg, s.run
    if resume not in (None, "last", "auto") and not resume.isdecimal():
        raise UserError(f"--resume {resume}: not an iteration; there are {snapshots(run.checkpoints)}")
    if collectives.is_main():
        start_folder(run, cfg, resume=run.config_file.is_file() if resume == "auto" else resume is not None)
        remove_parts(run.checkpoints)
        for path in filter(is_part, run.images.iterdir()):
            path.unlink()
    collectives.wait_for_all()
    start = restore(s, resume) if resume is not None else 0
    collectives.start_together(s.trainer, start, s.device)
    if resume is not None and start < s.max_iter and collectives.is_main():
        update_config(run, cfg, start)
    return start


def restore(s: Session, resume: str) -> int:
    """Continue from a snapshot, or begin if there is none yet; returns the number of finished steps."""
    folder = s.run.checkpoints
    if not resume.isdecimal() and not snapshots(folder):
        log.info("%s has no snapshot yet: starting from the beginning", s.run.name)
        return 0
    iteration = int(resume) if resume.isdecimal() else None
    if iteration is not None and (later := [i for i in snapshots(folder) if i > iteration]):
        # They would be what the next --resume continues from.
        raise UserError(
            f"--resume {iteration}: {folder} has later snapshots (up to {later[-1]}); copy the run's folder without "
            "them and resume the copy with its --name"
        )
    start = load_snapshot(folder, s.trainer, iteration, fall_back=resume == "auto")
    log.info("resumed %s after %d of %d steps", s.run.name, start, s.max_iter)
    manifest = read_manifest(folder, start)
    changed = changed_settings(manifest, s.cfg, s.circumstances) if manifest else {}
    if changed and start < s.max_iter:
        listing = ", ".join(f"{name} was {then}, is {now}" for name, (then, now) in changed.items())
        log.warning("results will differ from an uninterrupted run: %s", listing)
    return start


def finish(s: Session) -> None:
    """Put a finished teacher where DG-Net looks for it."""
    if s.cfg.task == "teacher" and collectives.is_main() and not all((s.run.model / f).exists() for f in TEACHER_FILES):
        save_teacher(s.run, s.cfg, s.trainer.net, s.classes)
        log.info("teacher written to %s", s.run.model)


# ----------------------------------------------------------------------------------------- one action each
class Stream:
    """A loader's batches, closed when the loop ends."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches

    def __enter__(self) -> Iterator[Batch]:
        return self.batches

    def __exit__(self, *_: object) -> None:
        self.batches.close()


class Clock:
    """Images per second since the last question, without what `stopped` encloses."""

    def __init__(self, images_per_step: int, start: int) -> None:
        self.images_per_step, self.seen, self.since = images_per_step, start, time.perf_counter()

    def rate(self, done: int) -> float:
        now = time.perf_counter()
        rate = (done - self.seen) * self.images_per_step / (now - self.since)
        self.seen, self.since = done, now
        return rate

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def next_batches(s: Session, streams: list[Iterator[Batch]], finite: FiniteWatch, t: int, start: int) -> list[Batch]:
    """The batches of iteration `t`. If a file or a worker is gone, the steps so far are saved before the error."""
    try:
        return [to_device(next(stream), s.device, s.cfg) for stream in streams]
    except UserError as error:
        # Other processes cannot come to save.
        if t > start and collectives.world_size() == 1:
            save(s, finite, t)
        raise UserError(f"{error}; {last_good(s)}; continue with: {s.command}") from None


def should_stop(stop: StopSignals, done: int) -> bool:
    """Whether to stop after this step. Asked once a step: a signal that comes later in it is for the next one.

    Several processes have to agree, or one would wait for another that has left; they exchange signals now and then.
    """
    if collectives.world_size() == 1:
        return stop.received is not None
    if done % EXCHANGE_SIGNALS:
        return False
    received = [signal for signal in collectives.gather(stop.received) if signal is not None]
    stop.received = received[0] if received else None
    return bool(received)


def log_scalars(
    s: Session, board: SummaryWriter | None, values: dict[str, float], rate: float, t: int, skipped: SkippedSteps
) -> None:
    """Losses, weights and learning rates, images/s, skipped steps. Raises UserError if most steps are skipped."""
    scalars = {f"loss/{name}": value for name, value in values.items()} | {"images_per_second": rate}
    scalars |= {f"schedule/{name}": value for name, value in s.schedule(t).items()}
    scalars |= {f"skipped_steps/{name}": count for name, count in skipped.counts().items()}
    write_scalars(board, scalars, t + 1)
    if most := skipped.most():
        raise UserError(
            f"precision fp16: the gradients overflow, {most} were skipped; use precision: bf16 or fp32, or lower the "
            f"learning rates; {last_good(s)}"
        )


def write_scalars(board: SummaryWriter | None, scalars: dict[str, float], step: int) -> None:
    if board is not None:
        for tag, value in scalars.items():
            board.add_scalar(tag, value, step)


def evaluate(s: Session, board: SummaryWriter | None, done: int) -> None:
    """Re-identification and swaps of the test images; in a single process an error is a warning."""
    try:
        write_scalars(board, validate.evaluate(s, done), done)
    except UserError as error:
        if collectives.world_size() > 1:
            raise  # the other processes wait for this one's share
        log.warning("not evaluated after %d steps: %s", done, error)


def last_good(s: Session) -> str:
    """The newest snapshot, in words: what is written has been checked to be finite."""
    present = snapshots(s.run.checkpoints)
    return f"the last good snapshot has {present[-1]} steps" if present else "there is no snapshot yet"


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
    if collectives.is_main():
        keep_folder(s)
        save_snapshot(s.run.checkpoints, s.trainer, done, s.circumstances)
        prune_snapshots(s.run.checkpoints, done, keep_last=s.cfg.keep_last, keep_every=s.keep_every)


def keep_folder(s: Session) -> None:
    """Make a run's folder again if somebody has removed it."""
    if not s.run.config_file.is_file():
        make_run_folder(s.run, s.cfg)
        log.warning("%s was removed while the run was going on; made again", s.run.path)


def write_image(s: Session, name: str, pixels: np.ndarray) -> None:
    keep_folder(s)
    write_whole(s.run.images / name, lambda file: Image.fromarray(pixels).save(file, format="PNG"))
