"""Nets and trainers, built from configs and loaded from the folders of runs and teachers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import yaml
from torch import Tensor

from config import Config, DGNetConfig, TeacherConfig, read_yaml
from data.folders import ImageList, read_split, require_identities
from data.images import check_images
from data.people import People, require_same_people
from fast import accelerate
from files import Damaged, read_tensors, write_tensors, write_text
from networks import Generator
from parallel.collectives import average_gradients, own_part
from reid_eval.exported import ExportedNet
from reIDmodel import NECKS, POOLS, IdNet, build_id_net, build_teacher
from runs.folder import RunFolder, open_run, resolve_data_root, run_config
from runs.snapshot import read_network, snapshots
from runs.weights import load_imagenet, load_network, load_vgg, plain_names, start_from_teacher
from trainer import DGNetTrainer, TeacherTrainer
from utils import ROOT, UserError, set_threads


def training_images(cfg: Config) -> ImageList:
    """The checked training images. Raises UserError for missing, empty or one-identity folders and bad images."""
    images = read_split(resolve_data_root(cfg.data_root), cfg.train_split, need_names=False)
    images = images.select(check_images(images.paths, skip_bad=cfg.skip_bad_images))
    require_identities(images)
    return images


def num_classes(cfg: Config, images: ImageList) -> int:
    """ID_class, which must be the number of identities of the training folder."""
    if cfg.ID_class not in ("auto", images.num_classes):
        raise UserError(
            f"ID_class is {cfg.ID_class}, but {cfg.data_root} has {images.num_classes} identities to train on; "
            "set ID_class: auto or another data_root"
        )
    return images.num_classes


@dataclass(frozen=True)
class TeacherFiles:
    """A teacher under models/NAME with what its opts.yaml says; the release's files have no `backbone`, pool and neck.

    data_source  where `data_root` was read, for messages
    """

    folder: Path
    stride: int
    backbone: str
    pool: str
    neck: str
    height: int
    width: int
    data_root: str
    data_source: str
    people: People | None

    @property
    def weights(self) -> Path:
        return self.folder / "net_last.pth"


def find_teacher(name: str, output_path: Path) -> TeacherFiles:
    """The files of teacher `name`. Raises UserError that names the command which trains it."""
    for root in dict.fromkeys([output_path, ROOT]):
        folder = root / "models" / name
        if (folder / "net_last.pth").is_file():
            opts = read_yaml(folder / "opts.yaml") if (folder / "opts.yaml").is_file() else {}
            stride = opts.get("stride", 2)
            if stride not in (1, 2):
                raise UserError(f"{folder / 'opts.yaml'}: stride must be 1 or 2 (got {stride!r})")
            height, width = opts.get("crop_image_height", 256), opts.get("crop_image_width", 128)
            if not all(isinstance(v, int) and v > 0 for v in (height, width)):
                raise UserError(
                    f"{folder / 'opts.yaml'}: crop_image_height and crop_image_width must be whole numbers above 0 "
                    f"(got {height!r} and {width!r})"
                )
            source = str(folder / "opts.yaml") + ("" if "data_root" in opts else ", which has none, so by default")
            data_root, mark = str(opts.get("data_root", "../Market/pytorch/")), opts.get("classes")
            people = People(mark, data_root) if isinstance(mark, str) else None
            backbone = str(opts.get("backbone", "resnet50"))
            pool, neck = str(opts.get("pool", "avg")), str(opts.get("neck", "linear"))
            for key, value, known in (("pool", pool, POOLS), ("neck", neck, NECKS)):
                if value not in known:
                    raise UserError(f"{folder / 'opts.yaml'}: {key} must be one of {', '.join(known)} (got {value})")
            return TeacherFiles(folder, stride, backbone, pool, neck, height, width, data_root, source, people)
    raise UserError(
        f"{output_path / 'models' / name / 'net_last.pth'}: no teacher of that name; "
        f"train it with: python train.py --config configs/teacher.yaml --name {name}"
    )


def load_teacher(name: str, output_path: Path, classes: int | None = None) -> IdNet:
    """The net of teacher `name`, eval mode. With `classes` it must know as many identities."""
    files = find_teacher(name, output_path)
    state = plain_names(read_tensors(files.weights), files.weights)
    last = state.get("classifier.classifier.0.weight")
    if not isinstance(last, Tensor) or last.dim() != 2:
        raise UserError(f"{files.weights}: not a teacher's weights (no classifier in it); replace the file")
    if classes is not None and len(last) != classes:
        raise UserError(
            f"{files.weights}: the teacher knows {len(last)} identities, the data {classes}; "
            "use the teacher that was trained on this data"
        )
    options = dict(stride=files.stride, pool=files.pool, neck=files.neck)
    net = build_teacher(len(last), backbone=files.backbone, **options)
    load_network(net, state, files.weights, "opts.yaml")
    return net.eval()


def require_teacher_of(people: People, name: str, output_path: Path, *, allow: str) -> None:
    """Raise UserError unless teacher `name` was trained on these people; the option `allow` accepts any teacher."""
    theirs = find_teacher(name, output_path).people
    require_same_people(theirs, people, what=f"teacher {name}", allow=allow)


def save_teacher(
    run: RunFolder, cfg: TeacherConfig, net: nn.Module, classes: int, people: People | None = None
) -> None:
    """Write a trained teacher to the folder that DG-Net reads."""
    opts = cfg.model_dump() | {"nclasses": classes, "ID_class": classes, "name": run.name}
    opts |= {"classes": people.mark} if people else {}
    # The weights come last: a teacher exists once they do, and without the options they would be misread.
    write_text(run.model / "opts.yaml", yaml.safe_dump(opts, sort_keys=False))
    write_tensors(run.model / "net_last.pth", net.state_dict())


def build_trainer(
    cfg: Config,
    classes: int,
    device: torch.device,
    *,
    output_path: Path,
    steps_per_epoch: int,
    initialise: bool,
    people: People | None = None,
) -> DGNetTrainer | TeacherTrainer:
    """The trainer of `cfg`; with `initialise` its trunk gets its starting weights (not when resuming).

    people  the identities behind the classes, which those of every teacher must be unless `trust_classes`
    """
    together = dict(part=own_part(), average_gradients=average_gradients)
    if isinstance(cfg, TeacherConfig):
        trainer = TeacherTrainer(cfg, classes, device, steps_per_epoch=steps_per_epoch, **together)
        if initialise and cfg.pretrained:
            load_imagenet(trainer.net.model, cfg.backbone, cfg.backbone_weights)
        return trainer
    teachers = [load_teacher(name, output_path, classes) for name in cfg.teachers] if cfg.needs_teacher else []
    if teachers and people and not cfg.trust_classes:
        for name in cfg.teachers:
            require_teacher_of(people, name, output_path, allow="--set trust_classes=true")
    vgg = load_vgg(cfg) if cfg.vgg_w > 0 else None
    trainer = DGNetTrainer(cfg, classes, device, teachers=teachers, vgg=vgg, **together)
    if initialise:
        if cfg.id_init == "teacher":
            start_from_teacher(trainer.id_net, teachers[0], cfg)
        elif cfg.pretrained:
            load_imagenet(trainer.id_net.model, cfg.backbone, cfg.backbone_weights)
    return trainer


def pick_epoch(run: RunFolder, which: str | None) -> int:
    """The iteration of a run's newest snapshot, or of the one that `--which_epoch` names."""
    present = snapshots(run.checkpoints)
    if not present:
        raise UserError(f"{run.checkpoints}: no checkpoint in it; train the run first")
    if which in (None, "last"):
        return present[-1]
    if not which.isdecimal() or int(which) not in present:
        raise UserError(f"--which_epoch {which}: no such snapshot; there are {', '.join(map(str, present))}")
    return int(which)


def _load_part(run: RunFolder, name: str, iteration: int) -> tuple[dict[str, Any], Path]:
    try:
        return read_network(run.checkpoints, name, iteration)
    except Damaged as error:
        older = [i for i in snapshots(run.checkpoints) if i < iteration]
        raise UserError(
            f"{error}" + (f"; the snapshot before it: --which_epoch {older[-1]}" if older else "")
        ) from None


def load_id_net(run: RunFolder, cfg: DGNetConfig, iteration: int, device: torch.device) -> IdNet:
    """The id net of a run, eval mode, on `device`; the number of identities comes from the file."""
    state, path = _load_part(run, "id", iteration)
    classifiers = [v for name, v in state.items() if str(name).endswith("classifier.0.weight")]
    if not classifiers or not isinstance(classifiers[0], Tensor) or classifiers[0].dim() != 2:
        raise UserError(f"{path}: not an id net (no classifier in it); replace the file")
    net = build_id_net(
        cfg.ID_style,
        len(classifiers[0]),
        backbone=cfg.backbone,
        stride=cfg.ID_stride,
        pool=cfg.pool,
        norm_id=cfg.norm_id,
        detach_f=cfg.detach_f,
        neck=cfg.neck,
    )
    load_network(net, state, path)
    return net.to(device).eval()


def load_generator(run: RunFolder, cfg: DGNetConfig, iteration: int, code_dim: int, device: torch.device) -> Generator:
    """The generator of a run, eval mode, on `device`."""
    state, path = _load_part(run, "gen", iteration)
    net = Generator(code_dim=code_dim, **cfg.gen.model_dump())
    load_network(net, state, path)
    return accelerate(net, device).eval()


@dataclass(frozen=True)
class TestNet:
    """A net to evaluate, with the size (height, width) of its images and the data it was trained on.

    data_source  where `data_root` was read, for messages
    folder       where its results are kept
    title        what to call it
    """

    net: nn.Module | ExportedNet
    size: tuple[int, int]
    data_root: str
    data_source: str
    iteration: int | None
    folder: Path
    title: str


def open_net(args: argparse.Namespace, device: torch.device) -> TestNet:
    """The net that the options of `utils.add_net_arguments` name."""
    set_threads(args.threads)
    run = open_run(args.output_path, args.teacher or args.name or "latest")
    return load_teacher_for_test(run, device) if args.teacher else load_run_for_test(run, args.which_epoch, device)


def load_for_test(run: RunFolder, device: torch.device, which: str | None = None) -> TestNet:
    """The id net of the DG-Net run of that name, or else the teacher. Raises UserError if there is neither."""
    if run.config_file.is_file() and run_config(run).generates:
        return load_run_for_test(run, which, device)
    try:
        find_teacher(run.name, run.output_path)
    except UserError:
        if run.model.is_dir():
            raise
        raise UserError(f"{run.path}: no run of that name, and no teacher; give the name of either") from None
    return load_teacher_for_test(run, device)


def load_run_for_test(run: RunFolder, which: str | None, device: torch.device) -> TestNet:
    """The id net of a DG-Net run."""
    cfg = run_config(run)
    if not cfg.generates:
        raise UserError(f"{run.name} is a teacher's run; evaluate it with: python test.py --teacher {run.name}")
    iteration = pick_epoch(run, which)
    net = load_id_net(run, cfg, iteration, device)
    size, title = (cfg.crop_image_height, cfg.crop_image_width), f"{run.name} after {iteration} steps"
    return TestNet(net, size, cfg.data_root, str(run.config_file), iteration, run.path, title)


def load_teacher_for_test(run: RunFolder, device: torch.device) -> TestNet:
    """A teacher under models/."""
    files = find_teacher(run.name, run.output_path)
    net = load_teacher(run.name, run.output_path).to(device)
    data = files.data_root, files.data_source
    return TestNet(net, (files.height, files.width), *data, None, files.folder, f"teacher {run.name}")


def load_exported_for_test(path: Path) -> TestNet:
    """An ONNX file of export.py, which keeps its results in a folder of its name."""
    net = ExportedNet(path)
    title = f"{path.name} of {net.about['run']}"
    return TestNet(
        net, net.size, net.about["data_root"], str(path), net.about["iteration"], path.with_suffix(""), title
    )
