"""What a training loop needs, built and checked: images, loaders, networks. Nothing is written here."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones import TimmTrunk
from config import Config, DGNetConfig, TeacherConfig
from data.batch import Batch
from data.cache import cached_images
from data.folders import ImageList, check_test_set, read_split
from data.generated import MANIFEST, add_generated
from data.images import iter_images
from data.listing import say_reading, unsaid
from data.loader import PairLoader
from data.people import People, identify_people, people_of_generated, require_same_people
from files import digest_files, digest_of
from losses import RAMPED, loss_weights
from networks import structure_input
from parallel import collectives
from parallel.layers import act_on_whole_batch
from precision import pick_precision
from reIDmodel import seen_size
from runs.folder import RunFolder, resolve_data_root
from runs.load import build_trainer, num_classes, training_images
from runs.snapshot import snapshots
from runs.weights import digest_weights
from trainer import DGNetTrainer, TeacherTrainer
from utils import UserError, evaluating, one_line, set_deterministic

log = logging.getLogger(__name__)
CONTENTS = "contents of the training images"  # among the circumstances of a run


@dataclass
class Session:
    """A run that is ready to train.

    iterations      of the whole run, and of what is due every so many: a snapshot; snapshots that are kept; the image
                    grid of test pairs, to TensorBoard and to a file; an evaluation. 0 is never
    reading         what was read and left out, as `data.listing.say_reading` returns it
    schedule        learning rates and ramped weights at an iteration, by name
    shown           losses in the progress bar
    circumstances   what besides the config affects the numbers of a run; its snapshots remember it
    command         continues the run if it is stopped
    """

    cfg: Config
    run: RunFolder
    device: torch.device
    images: ImageList
    classes: int
    people: People
    reading: dict[str, Any]
    loaders: list[PairLoader]
    trainer: DGNetTrainer | TeacherTrainer
    max_iter: int
    snapshot_iter: int
    keep_every: int
    schedule: Callable[[int], dict[str, float]]
    shown: tuple[str, ...]
    image_display_iter: int = 0
    image_save_iter: int = 0
    eval_iter: int = 0
    command: str = "the same command"
    more_circumstances: dict[str, str] = field(default_factory=dict)

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        images = self.loaders[0].images
        names = "\n".join(f"{label} {path.name}" for label, path in zip(images.labels(), images.paths, strict=True))
        cpu = self.device.type == "cpu"
        return {
            "classes": self.people.mark,
            "training images": f"{len(images)} (list {hashlib.sha256(names.encode()).hexdigest()[:8]})",
            "device": f"cpu, threads {torch.get_num_threads()}" if cpu else torch.cuda.get_device_name(self.device),
            "processes": collectives.world_size(),
            "PyTorch": str(torch.__version__),
            "images resized by": self.loaders[0].resized_by,
        } | self.more_circumstances


def build_session(
    cfg: Config, run: RunFolder, device: torch.device, *, resume: bool, command: str = "the same command"
) -> Session:
    """Check the data and build loaders and trainer."""
    set_deterministic(cfg.deterministic)
    if cfg.precision == "auto":
        # The run's folder keeps what it is; of several processes the first decides.
        cfg = cfg.model_copy(update={"precision": collectives.gather(pick_precision(device, "auto"))[0]})
    for phrase in cfg.unreached():
        log.warning("the run is too short for %s", phrase)
    build = teacher_session if isinstance(cfg, TeacherConfig) else dgnet_session
    session = build(cfg, run, device, resume=resume and bool(snapshots(run.checkpoints)))
    session.command = command
    images_per_process = collectives.own_batch_size(cfg.batch_size, sync_bn=cfg.sync_bn)
    if isinstance(cfg, TeacherConfig) and (each := cfg.images_per_identity):
        if images_per_process % each or images_per_process < 2 * each:
            raise UserError(
                f"batch_size {cfg.batch_size}: a process gets {images_per_process} images, but needs two or more "
                f"identities with images_per_identity {each} each; change batch_size or use fewer processes"
            )
    probe_backbones(session)
    nets = [*session.trainer.networks().values(), *getattr(session.trainer, "teachers", [])]
    act_on_whole_batch(nets, images_per_process, sync_bn=cfg.sync_bn)
    return session


def probe_backbones(s: Session) -> None:
    """Raise UserError if a backbone of timm cannot take images of the run's size; many are made for one size alone."""
    size = seen_size(s.cfg.crop_image_height, s.cfg.crop_image_width)
    for net in s.trainer.networks().values():
        trunk = getattr(net, "model", None)
        if isinstance(trunk, TimmTrunk):
            try:
                with torch.no_grad(), evaluating(trunk):
                    trunk(torch.zeros(1, 3, *size, device=s.device))
            except Exception as error:  # every network has its own
                raise UserError(
                    f"backbone {s.cfg.backbone}: cannot take images of {size[0]} x {size[1]} ({one_line(error)}); "
                    "choose another backbone or size"
                ) from None


def training_data(cfg: Config) -> tuple[ImageList, int, People, list[str]]:
    """The checked images, the number of their identities, who these are, and a digest of every file.

    Files are read now: by the first snapshot they may have changed, or be gone.
    """
    images = training_images(cfg)
    digests = digest_files(images.paths)
    people = identify_people(images, digests, resolve_data_root(cfg.data_root))
    return images, num_classes(cfg, images), people, digests


def dgnet_session(cfg: DGNetConfig, run: RunFolder, device: torch.device, *, resume: bool) -> Session:
    """A DG-Net run: two independently shuffled loaders over the same images."""
    if cfg.eval_iter:
        check_test_set(resolve_data_root(cfg.data_root), cameras=None)
    images, classes, people, digests = training_data(cfg)
    reading = say_reading({cfg.train_split: images})
    options = loader_options(cfg, images, device)
    loaders = [PairLoader(images, seed=seed, **options) for seed in (2 * cfg.seed, 2 * cfg.seed + 1)]
    per_epoch = loaders[0].batches_per_epoch
    start = dict(output_path=run.output_path, initialise=not resume, people=people)
    trainer = build_trainer(cfg, classes, device, steps_per_epoch=per_epoch, **start)

    def schedule(t: int) -> dict[str, float]:
        factors, weights = trainer.lr_factors(t), loss_weights(cfg, t)
        id_rate = cfg.lr2 * factors["id"] * (t >= cfg.id_freeze_iter)
        rates = {"lr_g": cfg.lr_g * factors["gen"], "lr_d": cfg.lr_d * factors["dis"], "lr2": id_rate}
        return rates | {key: weights[term] for term, key in RAMPED.items()}

    return Session(
        *(cfg, run, device, images, classes, people, reading, loaders, trainer),
        *(cfg.max_iter, cfg.snapshot_save_iter, cfg.keep_every),
        schedule,
        shown=("gen_total", "dis_total", "recon_x_a", "id", "teacher"),
        image_display_iter=cfg.image_display_iter,
        image_save_iter=cfg.image_save_iter,
        eval_iter=cfg.eval_iter,
        more_circumstances={CONTENTS: digest_of(digests)}
        | ({"teachers": digest_weights(*trainer.teachers)[:8]} if trainer.teachers else {}),
    )


def teacher_session(cfg: TeacherConfig, run: RunFolder, device: torch.device, *, resume: bool) -> Session:
    """A teacher's run: one loader, of real images and of generated ones if there are any."""
    images, classes, people, digests = training_data(cfg)
    sides, soft_labels, more = {cfg.train_split: images}, None, {}
    if cfg.extra_data is not None:
        extra = resolve_data_root(cfg.extra_data)
        if not cfg.trust_classes:
            for theirs in people_of_generated(extra, soft=cfg.extra_labels == "soft"):
                require_same_people(theirs, people, what=f"extra_data {extra}", allow="--set trust_classes=true")
        images, soft_labels = add_generated(images, extra, cfg.extra_labels, skip_bad=cfg.skip_bad_images)
        sides["extra_data"] = images.select(np.arange(len(images)) >= len(digests))
        digests += digest_files(sides["extra_data"].paths)
        more = {"extra_data": hashlib.sha256((extra / MANIFEST).read_bytes()).hexdigest()[:8]}
    reading = say_reading(sides)
    options = loader_options(cfg, images, device)
    options |= dict(images_per_identity=cfg.images_per_identity, grayscale_p=cfg.grayscale_p, jitter=cfg.jitter)
    loader = PairLoader(images, seed=cfg.seed, with_positive=False, soft_labels=soft_labels, **options)
    per_epoch = loader.batches_per_epoch
    start = dict(output_path=run.output_path, initialise=not resume, people=people)
    trainer = build_trainer(cfg, classes, device, steps_per_epoch=per_epoch, **start)

    def schedule(t: int) -> dict[str, float]:
        rate = cfg.lr * trainer.lr_factor(t)
        return {"lr_trunk": cfg.trunk_lr_factor * rate, "lr_head": rate}

    lengths = (cfg.epochs * per_epoch, cfg.snapshot_epochs * per_epoch, cfg.keep_every * per_epoch)
    return Session(
        *(cfg, run, device, images, classes, people, reading, [loader], trainer),
        *(*lengths, schedule, ("id", "accuracy")),
        more_circumstances=more | {CONTENTS: digest_of(digests)},
    )


def loader_options(cfg: Config, images: ImageList, device: torch.device) -> dict[str, Any]:
    """What the loaders of a run share, the cached images among it."""
    size = dict(height=cfg.crop_image_height, width=cfg.crop_image_width)
    return dict(
        **size,
        batch_size=cfg.batch_size,
        pad=cfg.crop_padding,
        num_workers=cfg.num_workers,
        device=device,
        part=collectives.own_part(),
        pixels=cached_images(images.paths, cfg.cache_images, **size, limit_mb=cfg.cache_limit_mb),
    )


def to_device(batch: Batch, device: torch.device, cfg: Config) -> Batch:
    layout = torch.channels_last if cfg.channels_last else torch.preserve_format
    x, xp = (v.to(device, memory_format=layout, non_blocking=True) for v in (batch.x, batch.xp))
    y, q = (None if v is None else v.to(device, non_blocking=True) for v in (batch.y, batch.q))
    return Batch(x, xp, y, batch.index, q)


@unsaid()  # of the test images only these few are used
def display_pairs(s: Session) -> tuple[Tensor, Tensor]:
    """`display_size` fixed pairs of test images (of training images without a query split), (N, 3, H, W) each."""
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


def describe(s: Session) -> str:
    """What `--dry-run` prints: sizes of networks, shapes of a batch, the schedule."""
    where = f"{s.device} in {s.cfg.precision}"
    where += f", one of {n} processes" if (n := collectives.world_size()) > 1 else ""
    lines = [f"run {s.run.name}: {s.cfg.task} on {where}, {len(s.images)} images of {s.classes} identities"]
    for name, net in s.trainer.networks().items():
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        lines.append(f"  {name:4s} {millions:8.2f} M parameters  {type(net).__name__}")
    batch = s.loaders[0].batch(0)
    lines.append(f"  batch x {tuple(batch.x.shape)}, xp {tuple(batch.xp.shape)}, y {tuple(batch.y.shape)}")
    if "gen" in s.trainer.networks():
        x = torch.cat([batch.x, batch.x]).to(s.device)[:2]
        with torch.no_grad():
            code = s.trainer.gen.encode(structure_input(x, s.cfg.single, np.random.default_rng(0)))
        lines.append(f"  structure code {tuple(code.shape[1:])}, appearance code ({s.trainer.id_net.code_dim},)")
    per_epoch = s.loaders[0].batches_per_epoch
    lines.append(f"  {s.max_iter} steps, {per_epoch} per epoch, a snapshot every {s.snapshot_iter}")
    lines.append("  iteration " + "".join(f"{name:>15s}" for name in s.schedule(0)))
    for t in sorted({round(i * (s.max_iter - 1) / 8) for i in range(9)}):
        lines.append(f"  {t:9d} " + "".join(f"{value:15.4g}" for value in s.schedule(t).values()))
    return "\n".join(lines)
