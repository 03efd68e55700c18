"""The training loop around a trainer's step: data, logs, image grids, snapshots. DG-Net and teachers share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import distributed
from checkpoint import load_snapshot, save_snapshot, snapshots
from config import Config, DGNetConfig, TeacherConfig
from data.folders import ImageList, read_split
from data.generated import add_generated
from data.pairs import Batch, PairLoader, iter_images
from losses import loss_weights
from runs import NETWORKS, RunFolder, build_trainer, num_classes, resolve_data_root, save_teacher, start_folder
from runs import training_images as read_training_images
from trainer import DGNetTrainer, TeacherTrainer, lr_factor, require_finite
from utils import UserError
from visual_tools.grid import paint_pairs

# The losses that the progress bar shows, by task.
SHOWN = {"dgnet": ("gen_total", "dis_total", "recon_x_a", "id", "teacher"), "teacher": ("id", "accuracy")}


@dataclass
class Session:
    """Everything that the loop needs, built and checked."""

    cfg: Config
    run: RunFolder
    device: torch.device
    images: ImageList
    classes: int
    loaders: list[PairLoader]
    trainer: DGNetTrainer | TeacherTrainer
    max_iter: int
    snapshot_iter: int


def prepare(cfg: Config, run: RunFolder, device: torch.device, *, resume: bool) -> Session:
    """Check the data and build loaders and trainer; nothing is written."""
    own_batch_size = distributed.own_batch_size(cfg.batch_size, sync_bn=cfg.sync_bn)
    images = read_training_images(cfg)
    classes = num_classes(cfg, images)
    common = dict(
        batch_size=cfg.batch_size,
        height=cfg.crop_image_height,
        width=cfg.crop_image_width,
        pad=cfg.crop_padding,
        num_workers=0 if cfg.cache_images else cfg.num_workers,
        part=(distributed.rank(), distributed.world_size()),
    )
    if isinstance(cfg, TeacherConfig):
        soft_labels = None
        if cfg.extra_data is not None:
            extra = resolve_data_root(cfg.extra_data)
            images, soft_labels = add_generated(images, extra, cfg.extra_labels, skip_bad=cfg.skip_bad_images)
        single = dict(with_positive=False, soft_labels=soft_labels)
        loaders = [PairLoader(images, seed=cfg.seed, cache=cfg.cache_images, **single, **common)]
    else:
        # Images a and b are two independently shuffled passes over the same folder (section 1).
        a = PairLoader(images, seed=2 * cfg.seed, cache=cfg.cache_images, **common)
        loaders = [
            a,
            PairLoader(images, seed=2 * cfg.seed + 1, cache=a.pixels if cfg.cache_images else False, **common),
        ]
    per_epoch = loaders[0].batches_per_epoch
    resumable = resume and bool(snapshots(run.checkpoints, NETWORKS[cfg.task]))
    trainer = build_trainer(
        cfg, classes, device, output_path=run.output_path, steps_per_epoch=per_epoch, initialise=not resumable
    )
    nets = [*trainer.networks().values(), *getattr(trainer, "teachers", [])]
    distributed.act_on_whole_batch(nets, own_batch_size, sync_bn=cfg.sync_bn)
    if isinstance(cfg, TeacherConfig):
        max_iter, snapshot_iter = cfg.epochs * per_epoch, cfg.snapshot_epochs * per_epoch
    else:
        max_iter, snapshot_iter = cfg.max_iter, cfg.snapshot_save_iter
    return Session(cfg, run, device, images, classes, loaders, trainer, max_iter, snapshot_iter)


def describe(s: Session) -> str:
    """What `--dry-run` prints: sizes of networks, shapes of a batch, the schedule."""
    where = f"{s.device}" + (f", one of {n} processes" if (n := distributed.world_size()) > 1 else "")
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
            code = s.trainer.gen.encode(s.trainer.structure_input(x))
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
        steps = dict(step_size=cfg.step_size, max_iter=cfg.max_iter)
        rates = {
            "lr_g": cfg.lr_g * lr_factor(cfg.lr_policy, t, gamma=cfg.gamma, **steps),
            "lr_d": cfg.lr_d * lr_factor(cfg.lr_policy, t, gamma=cfg.gamma, **steps),
            "lr2": cfg.lr2 * lr_factor(cfg.lr_policy, t, gamma=cfg.gamma2, **steps) * (t >= cfg.id_freeze_iter),
        }
        return rates | vars(loss_weights(cfg, t))
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
    batches = iter_images(chosen, cfg.crop_image_height, cfg.crop_image_width, 64)
    x_a, x_b = torch.cat(list(batches)).to(s.device).chunk(2)
    return x_a, x_b


def train(s: Session, *, resume: str | None) -> None:
    """Run the loop from the start, or from a snapshot, to the last iteration."""
    cfg, run = s.cfg, s.run
    if resume not in (None, "last") and not resume.isdigit():
        raise UserError(
            f"--resume {resume}: not an iteration; there are {snapshots(run.checkpoints, NETWORKS[cfg.task])}"
        )
    if distributed.is_main():
        start_folder(run, cfg, resume=resume is not None)
    distributed.wait_for_all()
    start = 0
    if resume == "last" and run.config_file.is_file() and not any(run.checkpoints.glob("*.pt")):
        print(f"{run.name} has no snapshot yet: starting from the beginning")
    elif resume is not None:
        start = load_snapshot(run.checkpoints, s.trainer, None if resume == "last" else int(resume))
        print(f"resumed {run.name} after {start} of {s.max_iter} steps")
    distributed.start_together(s.trainer, start, s.device)
    with ExitStack() as stack:
        writer = None
        if distributed.is_main():
            writer = stack.enter_context(SummaryWriter(str(run.logs), purge_step=start))
        streams: list[Iterator[Batch]] = [loader.batches(start) for loader in s.loaders]
        for stream in streams:
            stack.callback(stream.close)
        loop(s, streams, writer, start)
    if isinstance(cfg, TeacherConfig) and distributed.is_main():
        save_teacher(run, cfg, s.trainer.net, s.classes)
        print(f"teacher written to {run.model}")


def loop(s: Session, streams: list[Iterator[Batch]], writer: SummaryWriter | None, start: int) -> None:
    """The steps. Of several processes each makes all of them; the one with a `writer` writes."""
    cfg, trainer, main = s.cfg, s.trainer, writer is not None
    paints = main and isinstance(trainer, DGNetTrainer)
    pairs = display_pairs(s) if paints else None
    seen, since = start, time.perf_counter()
    bar = tqdm(range(start, s.max_iter), initial=start, total=s.max_iter, desc=s.run.name, unit="step", mininterval=0.5)
    for t in bar:
        batches = [to_device(next(stream), s.device, cfg) for stream in streams]
        terms = trainer.step(*batches, t)
        done, last = t + 1, t + 1 == s.max_iter
        if done % cfg.log_iter == 0 or last:
            values = require_finite(distributed.average_terms(terms), t)
            rate = (done - seen) * cfg.batch_size * len(batches) / (time.perf_counter() - since)
            seen, since = done, time.perf_counter()
            if main:
                log(writer, s, values, rate, t)
            bar.set_postfix({k: f"{values[k]:.3f}" for k in SHOWN[cfg.task] if k in values}, refresh=False)
        if paints and (done % cfg.image_save_iter == 0 or done % cfg.image_display_iter == 0 or last):
            figure = paint_pairs(trainer.sample(*pairs))
            if done % cfg.image_display_iter == 0 or last:
                writer.add_image("test pairs", figure, done, dataformats="HWC")
            if done % cfg.image_save_iter == 0 or last:
                save_figure(s, figure, done)
        if done % cfg.check_ranks_iter == 0 or last:
            distributed.check_ranks(trainer, done)
        if done % s.snapshot_iter == 0 or last:
            require_finite(distributed.average_terms(terms), t)
            distributed.share_buffers(trainer)
            if main:
                save_snapshot(s.run.checkpoints, trainer, done)


def log(writer: SummaryWriter, s: Session, values: dict[str, float], rate: float, t: int) -> None:
    """Losses by term, weights and learning rates, images/s."""
    for name, value in values.items():
        writer.add_scalar(f"loss/{name}", value, t + 1)
    for name, value in schedule(s, t).items():
        writer.add_scalar(f"schedule/{name}", value, t + 1)
    writer.add_scalar("images_per_second", rate, t + 1)


def save_figure(s: Session, figure: object, done: int) -> None:
    from PIL import Image

    path = s.run.images / f"test_{done:08d}.png"
    try:
        Image.fromarray(figure).save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
