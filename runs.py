"""Runs on disk and how their parts are built: folders, teachers, trainers, nets for evaluation.

OUTPUT/outputs/NAME/   config.yaml, checkpoints/, images/, reid.json     a run
OUTPUT/models/NAME/    net_last.pth, opts.yaml                           a teacher
OUTPUT/logs/NAME/      TensorBoard
"""

from __future__ import annotations

import argparse
import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torchvision.models
import yaml
from torch import Tensor
from torchvision.models import get_model_weights, list_models
from torchvision.models.resnet import ResNet

from checkpoint import Damaged, load_network, read_network, read_tensors, snapshots, write_atomically
from config import Config, DGNetConfig, TeacherConfig, dump_config, load_config, read_yaml
from data.folders import ImageList, check_images, read_split, require_identities
from distributed import average_gradients, own_part
from fast import accelerate
from networks import Generator
from reIDmodel import IdNet, build_id_net, build_teacher
from trainer import DGNetTrainer, TeacherTrainer
from utils import ROOT, UserError, part_of, set_threads, write_text

NETWORKS = {"dgnet": ["gen", "id", "dis"], "teacher": ["net"]}
TEACHER_FILES = ("net_last.pth", "opts.yaml")


@dataclass(frozen=True)
class RunFolder:
    """Where a run named `name` keeps its files."""

    output_path: Path
    name: str

    @property
    def path(self) -> Path:
        return self.output_path / "outputs" / self.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def logs(self) -> Path:
        return self.output_path / "logs" / self.name

    @property
    def model(self) -> Path:
        return self.output_path / "models" / self.name


def open_run(output_path: str | None, name: str) -> RunFolder:
    """The run of that name, in the project's own folder unless `output_path` is given."""
    if not name or name == ".." or Path(name).name != name:
        raise UserError(f"--name {name!r}: must be a plain folder name")
    return RunFolder(Path(output_path) if output_path else ROOT, name)


def start_folder(run: RunFolder, cfg: Config, *, resume: bool) -> None:
    """Make the run's folder and write the resolved config. Never overwrites another run.

    Raises UserError when the folder holds a run and `resume` is false, or the other way round.
    """
    try:
        str(run.logs).encode()
    except UnicodeEncodeError:
        raise UserError(f"{run.logs}: TensorBoard needs a path in UTF-8; choose another --output_path") from None
    files = [run.config_file] + ([run.model / f for f in TEACHER_FILES] if cfg.task == "teacher" else [])
    present = [path for path in files if path.exists()]
    if resume:
        if not run.path.is_dir():
            raise UserError(f"{run.path}: nothing to resume; start the run without --resume")
    elif present or (run.path.is_dir() and any(path != part_of(run.config_file) for path in run.path.iterdir())):
        holder = present[0].parent if present else run.path
        raise UserError(f"{holder} holds another run; continue it with --resume or choose another --name")
    make_run_folder(run, cfg)


def make_run_folder(run: RunFolder, cfg: Config) -> None:
    """Make what is not there of a run's folders. In its own the config comes first: without one it is no run.

    A teacher's is made too: whether it can be, shows now and not after the last epoch.
    """
    folder = run.model if isinstance(cfg, TeacherConfig) else run.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = run.path
        folder.mkdir(parents=True, exist_ok=True)
        if not run.config_file.exists():
            write_text(run.config_file, dump_config(cfg))
        for folder in (run.checkpoints, run.images):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output_path") from None


def update_config(run: RunFolder, cfg: Config, start: int) -> None:
    """Let the run's config.yaml say how a run that was resumed after `start` steps goes on.

    Where that is something else than before, the old file is kept beside it as config_until_00000000.yaml, with the
    steps in its name. Snapshots keep the config that each was made with.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what there is to say of the old one has been said
            if load_config(run.config_file, strict=False) == cfg:
                return
    except UserError:
        pass  # damaged, or of another version
    old = run.path / f"config_until_{start:08d}.yaml"
    try:
        if not old.exists():  # of two continuations from one step the first one's stays
            old.write_bytes(run.config_file.read_bytes())
    except OSError as error:
        raise UserError(f"{old}: cannot be written ({error.strerror})") from None
    write_text(run.config_file, dump_config(cfg))
    print(f"{run.config_file} now says how the run goes on; as it was: {old.name}")


def run_config(run: RunFolder) -> Config:
    """The config of a finished or running run, ours or the release's."""
    if not run.config_file.is_file():
        raise UserError(f"{run.config_file}: no such run; give --name, and --output_path if it is elsewhere")
    return load_config(run.config_file, strict=False)


def generator_config(run: RunFolder) -> DGNetConfig:
    """The config of a run that has a generator. Raises UserError for a teacher's."""
    cfg = run_config(run)
    if not isinstance(cfg, DGNetConfig):
        raise UserError(f"{run.name} is a teacher's run and generates nothing; give the --name of a DG-Net run")
    return cfg


# ------------------------------------------------------------------------------------------------ data
def resolve_data_root(data_root: str) -> Path:
    """A relative data_root is looked for from here, then from the project's folder."""
    path = Path(data_root).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


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


# ------------------------------------------------------------------------------------------- teachers
@dataclass(frozen=True)
class TeacherFiles:
    """A teacher under models/NAME with what its opts.yaml says; the release's files have no `backbone`."""

    folder: Path
    stride: int
    backbone: str
    height: int
    width: int
    data_root: str

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
            return TeacherFiles(
                folder,
                stride,
                str(opts.get("backbone", "resnet50")),
                height,
                width,
                str(opts.get("data_root", "../Market/pytorch/")),
            )
    raise UserError(
        f"{output_path / 'models' / name / 'net_last.pth'}: no teacher of that name; "
        f"train it with: python train.py --config configs/teacher.yaml --name {name}"
    )


def load_teacher(name: str, output_path: Path, classes: int | None = None) -> IdNet:
    """The net of teacher `name`, eval mode. With `classes` it must know as many identities."""
    files = find_teacher(name, output_path)
    state = read_tensors(files.weights)
    last = state.get("classifier.classifier.0.weight") if isinstance(state, dict) else None
    if not isinstance(last, Tensor) or last.dim() != 2:
        raise UserError(f"{files.weights}: not a teacher's weights (no classifier in it); replace the file")
    if classes is not None and len(last) != classes:
        raise UserError(
            f"{files.weights}: the teacher knows {len(last)} identities, the data {classes}; "
            "use the teacher that was trained on this data"
        )
    net = build_teacher(len(last), backbone=files.backbone, stride=files.stride)
    load_network(net, state, files.weights)
    return net.eval()


def save_teacher(run: RunFolder, cfg: TeacherConfig, net: nn.Module, classes: int) -> None:
    """Put a trained teacher where DG-Net looks for it."""
    opts = cfg.model_dump() | {"nclasses": classes, "ID_class": classes, "name": run.name}
    # The weights come last: they are what says that there is a teacher, and without the options they are misread.
    write_text(run.model / "opts.yaml", yaml.safe_dump(opts, sort_keys=False))
    write_atomically(run.model / "net_last.pth", net.state_dict())


# ------------------------------------------------------------------------------------------- building
def build_trainer(
    cfg: Config,
    classes: int,
    device: torch.device,
    *,
    output_path: Path,
    steps_per_epoch: int,
    initialise: bool,
) -> DGNetTrainer | TeacherTrainer:
    """The trainer of `cfg`; with `initialise` its trunk gets its starting weights (not when resuming)."""
    together = dict(part=own_part(), average_gradients=average_gradients)
    if isinstance(cfg, TeacherConfig):
        trainer = TeacherTrainer(cfg, classes, device, steps_per_epoch=steps_per_epoch, **together)
        if initialise and cfg.pretrained:
            load_imagenet(trainer.net.model, cfg.backbone, cfg.backbone_weights)
        return trainer
    teachers = [load_teacher(name, output_path, classes) for name in cfg.teachers] if cfg.needs_teacher else []
    vgg = load_vgg(cfg) if cfg.vgg_w > 0 else None
    trainer = DGNetTrainer(cfg, classes, device, teachers=teachers, vgg=vgg, **together)
    if initialise:
        if cfg.id_init == "teacher":
            start_from_teacher(trainer.id_net, teachers[0], cfg)
        elif cfg.pretrained:
            load_imagenet(trainer.id_net.model, cfg.backbone, cfg.backbone_weights)
    return trainer


def start_from_teacher(id_net: IdNet, teacher: IdNet, cfg: DGNetConfig) -> None:
    """`id_init: teacher`: copy the teacher's trunk, and its head into every head of the same size."""
    try:
        id_net.model.load_state_dict(teacher.model.state_dict())
    except RuntimeError:
        raise UserError(
            f"id_init: teacher: the teacher {cfg.teachers[0]} has another backbone than {cfg.backbone}"
        ) from None
    head = teacher.heads()[0].state_dict()
    for own in id_net.heads():
        if {name: v.shape for name, v in own.state_dict().items()} == {name: v.shape for name, v in head.items()}:
            own.load_state_dict(head)


def load_vgg(cfg: DGNetConfig) -> nn.Module:
    """VGG-16 up to relu5_3 with ImageNet weights from `vgg_weights` or torchvision's cache, frozen."""
    from torchvision.models import VGG16_Weights, vgg16

    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    path = Path(cfg.vgg_weights) if cfg.vgg_weights else cached
    if not path.is_file():
        raise UserError(
            f"vgg_w > 0 needs VGG-16 weights: put {cached.name} into {cached.parent}, or set vgg_weights: FILE"
        )
    net = vgg16(weights=None)
    load_network(net, read_tensors(path), path)
    return net.features[:30].requires_grad_(False)


# ----------------------------------------------------------------------------------- ImageNet weights
def load_imagenet(trunk: ResNet, name: str, file: str | None) -> None:
    """Load ImageNet weights from `file`, or from torchvision's cache (downloading them where that is possible).

    Raises UserError that says which file to put where.
    """
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"--backbone-weights {file}: no such file")
    else:
        if name not in list_models(torchvision.models):
            raise UserError(
                f"backbone {name} has no ImageNet weights; set pretrained: false or give --backbone-weights FILE"
            )
        # The first set of weights (IMAGENET1K_V1) is what the published numbers started from.
        url = next(iter(get_model_weights(name))).url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # The end of the name is the beginning of the file's SHA-256.
                prefix = path.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
            except (OSError, RuntimeError):
                raise UserError(
                    f"ImageNet weights of {name} cannot be downloaded here; put {path.name} into {path.parent}, "
                    "or give --backbone-weights FILE, or set pretrained: false"
                ) from None
    try:
        trunk.load_state_dict(read_tensors(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not ImageNet weights of {name} ({first_line(error)}); replace the file") from None


def first_line(error: Exception) -> str:
    """The first informative line of an exception's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    heading = len(lines) > 1 and lines[0].startswith("Error(s) in loading")
    return lines[1 if heading else 0][:200]


# ------------------------------------------------------------------------------- nets of finished runs
def pick_epoch(run: RunFolder, task: str, which: str | None) -> int:
    """The newest complete snapshot, or the one that `--which_epoch` names."""
    found = snapshots(run.checkpoints, NETWORKS[task])
    if not found:
        # A published folder may hold weights alone, without an optimizer.pt.
        first = NETWORKS[task][0]
        found = sorted(int(p.stem.rsplit("_", 1)[1]) for p in run.checkpoints.glob(f"{first}_" + "[0-9]" * 8 + ".pt"))
    if not found:
        raise UserError(f"{run.checkpoints}: no checkpoint in it; train the run first")
    if which in (None, "last"):
        return found[-1]
    if not which.isdecimal() or int(which) not in found:
        raise UserError(f"--which_epoch {which}: no such snapshot; there are {', '.join(map(str, found))}")
    return int(which)


def _load_part(run: RunFolder, name: str, iteration: int) -> tuple[dict[str, Any], Path]:
    try:
        return read_network(run.checkpoints, name, iteration)
    except Damaged as error:
        older = [i for i in snapshots(run.checkpoints, NETWORKS["dgnet"]) if i < iteration]
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

    folder  where its results are kept
    title   what to call it
    """

    net: nn.Module
    size: tuple[int, int]
    data_root: str
    iteration: int | None
    folder: Path
    title: str


def open_net(args: argparse.Namespace, device: torch.device) -> TestNet:
    """The net that the options of `utils.add_net_arguments` name."""
    set_threads(args.threads)
    run = open_run(args.output_path, args.teacher or args.name or "latest")
    return load_teacher_for_test(run, device) if args.teacher else load_run_for_test(run, args.which_epoch, device)


def load_run_for_test(run: RunFolder, which: str | None, device: torch.device) -> TestNet:
    """The id net of a DG-Net run."""
    cfg = run_config(run)
    if not isinstance(cfg, DGNetConfig):
        raise UserError(f"{run.name} is a teacher's run; evaluate it with: python test.py --teacher {run.name}")
    iteration = pick_epoch(run, cfg.task, which)
    net = load_id_net(run, cfg, iteration, device)
    size, title = (cfg.crop_image_height, cfg.crop_image_width), f"{run.name} after {iteration} steps"
    return TestNet(net, size, cfg.data_root, iteration, run.path, title)


def load_teacher_for_test(run: RunFolder, device: torch.device) -> TestNet:
    """A teacher under models/."""
    files = find_teacher(run.name, run.output_path)
    net = load_teacher(run.name, run.output_path).to(device)
    return TestNet(net, (files.height, files.width), files.data_root, None, files.folder, f"teacher {run.name}")
