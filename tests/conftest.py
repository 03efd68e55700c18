"""Shared by the tests: a tiny data set, tiny networks, random batches, and scripts run in this process."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config import DGNetConfig, TeacherConfig, parse_config
from data.batch import Batch
from data.folders import read_split
from data.images import decode_images, normalise
from mannequins.dataset import make_dataset
from reIDmodel import build_teacher
from runs.folder import RunFolder, start_folder
from runs.load import save_teacher
from runs.snapshot import save_snapshot
from trainer import DGNetTrainer
from utils import ROOT, run_cli

CPU = torch.device("cpu")
HEIGHT, WIDTH = 64, 32
TINY_IMAGES = dict(crop_image_height=HEIGHT, crop_image_width=WIDTH, crop_padding=2, num_workers=0, cache_images=False)
# resnet10w8 ends in 64 channels: an appearance code of 256 numbers, 64 per chunk.
TINY_DGNET = TINY_IMAGES | dict(
    data_root="",
    backbone="resnet10w8",
    pretrained=False,
    batch_size=2,
    gen=dict(dim=4, n_downsample=1, id_dim=64, mlp_dim=16),
    dis=dict(dim=4, n_layer=1, n_res=1, num_scales=2),
    display_size=2,
)
TINY_TEACHER = TINY_IMAGES | dict(
    task="teacher", data_root="", backbone="resnet10w8", pretrained=False, batch_size=16, epochs=2, warm_epochs=1
)
# Every term but the perceptual one, and ramps that are rising after two steps.
ALL_LOSSES = dict(
    recon_f_w=0.5, recon_s_w=0.5, recon_x_cyc_w=0.5, teacher_w=0.5, warm_iter=2, warm_teacher_iter=2, warm_scale=0.1
)


def pytest_configure() -> None:
    # A shell starts background jobs with Ctrl-C ignored, and what the tests start would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`; sections are merged key by key."""
    result = dict(values)
    for key, value in changes.items():
        result[key] = result.get(key, {}) | value if isinstance(value, dict) else value
    return result


def tiny_config(**changes: Any) -> DGNetConfig:
    return parse_config(merged(TINY_DGNET, changes), "tiny")


def tiny_teacher_config(**changes: Any) -> TeacherConfig:
    return parse_config(merged(TINY_TEACHER, changes), "tiny teacher")


def tiny_trainer(cfg: DGNetConfig, *, classes: int = 4, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    torch.manual_seed(cfg.seed)
    trainer = DGNetTrainer(cfg, classes, CPU, **kwargs)
    for net in [*trainer.networks().values(), *trainer.teachers]:
        net.to(dtype)
    return trainer


def random_batches(cfg: DGNetConfig, *, classes: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
    """The pair of one step, noise with the labels 0, 1, ... and reversed."""
    n, shape = cfg.batch_size, (cfg.batch_size, 3, cfg.crop_image_height, cfg.crop_image_width)
    generator = torch.Generator().manual_seed(1)
    x_a, xp_a, x_b, xp_b = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4))
    y = torch.arange(n) % classes
    return Batch(x_a, xp_a, y, torch.arange(n)), Batch(x_b, xp_b, classes - 1 - y, torch.arange(n))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The golden cases first, shared out among the processes; other files stay together, as they share fixtures."""
    items.sort(key=lambda item: "test_golden" not in item.nodeid)
    for item in items:
        if item.path.stem != "test_golden":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set in its smallest size, in the archive's layout: 8 identities to train on."""
    folder = tmp_path_factory.mktemp("data") / "mannequins"
    make_dataset(folder, preset="tiny")
    return folder


# A Market-1501 of the smallest size: what its folders hold.
MARKET_NAMES = {
    "bounding_box_train": [
        *(f"0002_c{camera}s1_00045{i}_0{i}.jpg" for camera in (1, 2) for i in (1, 2)),
        *(f"0007_c{camera}s2_00010{camera}_01.jpg" for camera in (1, 3, 15)),
        "0011_c6s1_000001_01.jpg",
        *(f"1500_c{camera}s3_000020_01.jpg" for camera in (2, 4)),
    ],
    "bounding_box_test": [
        "-1_c3s2_000031_02.jpg",
        "0000_c6s1_000010_01.jpg",
        "0003_c1s1_000005_01.jpg",
        "0003_c2s1_000006_01.jpg",
        "0004_c5s1_000007_01.jpg",
    ],
    "query": ["0003_c4s1_000008_00.jpg", "0004_c1s1_000009_00.jpg"],
    "gt_bbox": ["0003_c4s1_000008_00.jpg", "0003_c4s1_000010_00.jpg"],
}


def noise(path: Path, size: tuple[int, int] = (20, 44), mode: str = "RGB") -> Path:
    """Save an image of blocks of noise, other for every file name; `size` is (width, height)."""
    rng = np.random.default_rng(list(str(path.name).encode()))
    blocks = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).convert(mode).save(path)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Market-1501 as its authors packed it, with the stray files that unpacking leaves."""
    root = tmp_path / "Market"
    for folder, names in MARKET_NAMES.items():
        for name in names:
            noise(root / folder / name)
        (root / folder / "Thumbs.db").write_bytes(b"not an image")
        (root / folder / "._0002_c1s1.jpg").write_bytes(b"hidden")
    return root


@dataclass(frozen=True)
class OutputFolder:
    """A folder of runs on a data set, and the options that make a script use it."""

    folder: Path
    data: Path

    @property
    def where(self) -> tuple[object, ...]:
        return "--output_path", self.folder, "--threads", 1, "--device", "cpu"


def make_runs(folder: Path, data: Path, **singles: str) -> OutputFolder:
    """A teacher `tutor` and a run per name, with random weights; their BatchNorm has seen the data, so features differ.

    singles  the structure input of every run
    """
    x = normalise(decode_images(read_split(data, "query").paths, HEIGHT, WIDTH))
    for name, single in singles.items():
        cfg, run = tiny_config(data_root=str(data), single=single), RunFolder(folder, name)
        start_folder(run, cfg, resume=False)
        trainer = tiny_trainer(cfg, classes=8)
        trainer.id_net.train()(x)
        save_snapshot(run.checkpoints, trainer, 4)
    net = build_teacher(8, backbone="resnet10w8")
    net.train()(x)
    save_teacher(RunFolder(folder, "tutor"), tiny_teacher_config(data_root=str(data)), net, 8)
    return OutputFolder(folder, data)


@dataclass(frozen=True)
class Outcome:
    """What a script did: its exit status and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal, ours or argparse's: exit status 2, nothing like a traceback."""
        errors = [line for line in self.err.splitlines() if re.match(r"(\S+: )?error: ", line)]
        assert self.code == 2, f"exit status {self.code}\n{self.out}\n{self.err}"
        assert len(errors) == 1, self.err
        assert "Traceback" not in self.err + self.out
        return errors[0]


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def exchange(a: Path, b: Path) -> None:
    """Give each of two files the name of the other."""
    a.rename(spare := a.with_name("spare"))
    b.rename(a)
    spare.rename(b)


def replace_keeping_time(a: Path, b: Path) -> None:
    """Put the smaller of two pictures in the place of the larger; size in bytes and time stay."""
    larger, smaller = sorted((a, b), key=lambda path: path.stat().st_size)[::-1]
    size, when = larger.stat().st_size, larger.stat().st_mtime_ns
    larger.write_bytes(smaller.read_bytes().ljust(size, b"\0"))
    os.utime(larger, ns=(when, when))


def load_script(name: str) -> Any:
    """A script of the project as a module, by its path: `test` is also a package of Python's."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """`script("train", "--config", ...)` runs train.py in this process, on the CPU, as a shell would see it."""

    def run(name: str, *arguments: object) -> Outcome:
        main = load_script(name).main
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_cli(main)
        written = capsys.readouterr()
        return Outcome(stop.value.code or 0, written.out, written.err)

    return run


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """The notes and warnings since the last call, a line each."""
    lines = "".join(f"{message}\n" for message in caplog.messages)
    caplog.clear()
    return lines


@pytest.fixture(autouse=True)
def notes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Notes are shown, as `utils.set_up_logging` shows them."""
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """Networks as small as these are slower on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
