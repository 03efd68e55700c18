"""What the training loop reads and leaves behind: batches, TensorBoard, test images, evaluations, snapshots."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.batch import Batch
from files import write_whole
from parallel import collectives
from runs import validate
from runs.grid import paint_pairs
from runs.guards import FiniteWatch, not_finite
from runs.session import Session, display_pairs, to_device
from runs.snapshot import prune_snapshots, save_snapshot, snapshots
from utils import UserError, own_command

log = logging.getLogger(__name__)


class Recorder:
    """One action per method, for the loop to call. Every process calls all of them; process 0 alone writes.

    bar  the iterations from `start` to the last one, with a progress bar
    """

    def __init__(self, s: Session, start: int) -> None:
        self.s, self.start, self.last = s, start, start
        self.terms: dict[str, Tensor] = {}
        self.finite = FiniteWatch(s.device)
        self.board: SummaryWriter | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Recorder:
        s, start, main = self.s, self.start, collectives.is_main()
        with self.stack as stack:
            if main:
                self.board = stack.enter_context(SummaryWriter(str(s.run.logs), purge_step=start + 1))
                self.board.add_text("command", own_command(), start)
            self.pairs = display_pairs(s) if main and s.image_save_iter else None
            self.streams = [stack.enter_context(closing(loader.batches(start))) for loader in s.loaders]
            stack.enter_context(logging_redirect_tqdm())  # a line of its own, above the progress bar
            shown = dict(desc=s.run.name, unit="step", mininterval=0.5, disable=not main)
            self.bar = stack.enter_context(tqdm(range(start, s.max_iter), initial=start, total=s.max_iter, **shown))
            self.since = time.perf_counter()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def batches(self, t: int) -> list[Batch]:
        """The batches of iteration `t`. If a file is gone, the steps so far are saved before the error."""
        try:
            return [to_device(next(stream), self.s.device, self.s.cfg) for stream in self.streams]
        except UserError as error:
            # Other processes cannot come to save.
            if t > self.start and collectives.world_size() == 1:
                self.save(t)
            raise UserError(f"{error}; {self.last_good()}; continue with: {self.s.command}") from None

    def note(self, t: int, terms: dict[str, Tensor]) -> None:
        """Keep the losses of iteration `t` until they are logged; a few tiny kernels, no waiting for the device."""
        self.terms = collectives.average_terms(terms)
        self.finite.note(t, self.terms)

    # ------------------------------------------------------------------------------------------ when due
    def log(self, done: int) -> None:
        """Losses, weights and learning rates, images/s and fp16's gradient scales of the last iteration.

        Raises UserError if a loss was not finite, or if fp16's gradients overflow at every scale.
        """
        self.require_finite()
        values = {name: float(value) for name, value in self.terms.items()}
        now, images_per_step = time.perf_counter(), self.s.cfg.batch_size * len(self.streams)
        rate = (done - self.last) * images_per_step / (now - self.since)
        self.last, self.since = done, now
        scalars = {f"loss/{name}": value for name, value in values.items()} | {"images_per_second": rate}
        scalars |= {f"schedule/{name}": value for name, value in self.s.schedule(done - 1).items()}
        scales = {name: v.get_scale() for name, v in self.s.trainer.scalers().items() if v.is_enabled()}
        scalars |= {f"gradient_scale/{name}": scale for name, scale in scales.items()}
        self.write_scalars(scalars, done)
        if overflowing := [f"{name} {scale:.3g}" for name, scale in scales.items() if scale < 1]:
            # Every skipped step halves the scale, which begins at 65,536.
            raise UserError(
                f"precision fp16: gradients overflow at every scale ({', '.join(overflowing)}), so steps are skipped; "
                f"use precision: bf16 or fp32, or lower the learning rates; {self.last_good()}"
            )
        self.bar.set_postfix({k: f"{values[k]:.3f}" for k in self.s.shown if k in values}, refresh=False)

    def write_scalars(self, scalars: dict[str, float], done: int) -> None:
        for tag, value in scalars.items() if self.board else ():
            self.board.add_scalar(tag, value, done)

    def show_images(self, done: int) -> None:
        """The test pairs to TensorBoard."""
        if self.pairs:
            self.board.add_image("test pairs", self.paint(), done, dataformats="HWC")

    def save_images(self, done: int) -> None:
        """The test pairs to the run's folder."""
        if self.pairs:
            figure = Image.fromarray(self.paint())
            write_whole(self.s.run.images / f"test_{done:08d}.png", lambda file: figure.save(file, format="PNG"))

    def paint(self) -> np.ndarray:
        return paint_pairs(validate.sample_pairs(self.s.trainer, *self.pairs))

    def evaluate(self, done: int) -> None:
        """Re-identification and swaps of the test images; in a single process an error is a warning."""
        began = time.perf_counter()
        try:
            self.write_scalars(validate.evaluate(self.s, done), done)
        except UserError as error:
            if collectives.world_size() > 1:
                raise  # the other processes wait for this one's share
            log.warning("not evaluated after %d steps: %s", done, error)
        self.since += time.perf_counter() - began

    def save(self, done: int) -> None:
        """Write the snapshot of `done` steps, if everything in it is finite, and remove those that need not be kept."""
        s = self.s
        self.require_finite()
        collectives.share_buffers(s.trainer)
        if bad := not_finite(s.trainer):
            # A bad gradient shows in the weights before it shows in a loss.
            raise UserError(
                f"iteration {done - 1}: the losses are finite, but after its step {len(bad)} tensors are not "
                f"({bad[0]}, ...), training stopped; lower the learning rates. "
                f"Images: {self.batch_names(done - 1)}. {self.last_good()}"
            )
        if collectives.is_main():
            save_snapshot(s.run.checkpoints, s.trainer, done, s.circumstances)
            prune_snapshots(s.run.checkpoints, done, keep_last=s.cfg.keep_last, keep_every=s.keep_every)

    # ------------------------------------------------------------------------------------------ in words
    def require_finite(self) -> None:
        """Raise UserError that names every term, the batch and the last good snapshot, if a loss was not finite."""
        if bad := self.finite.first():
            t, terms = bad
            raise UserError(
                f"iteration {t}: a loss is not finite, training stopped; lower the learning rates. Terms: {terms}. "
                f"Images: {self.batch_names(t)}. {self.last_good()}"
            )

    def batch_names(self, t: int) -> str:
        """The files of the batches of iteration `t`, one list per stream."""
        return "; ".join(", ".join(path.name for path in loader.files(t)) for loader in self.s.loaders)

    def last_good(self) -> str:
        """The newest snapshot, in words: what is written has been checked to be finite."""
        present = snapshots(self.s.run.checkpoints)
        return f"the last good snapshot has {present[-1]} steps" if present else "there is no snapshot yet"
