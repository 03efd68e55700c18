"""The training step against a plain one: `python -m benchmarks.train_step [--batch-size 8] [--device cuda]`.

Whole steps of configs/latest.yaml with every loss active (ramps at their end, erasing, a teacher), in turn:

plain       docs/method.md line by line with textbook layers (benchmarks/plain.py), in fp32 without TF32
plain tf32  the same with TF32, on CUDA only
fp32        the real step with the default config
bf16        precision: bf16, channels_last: true, if the device computes in bf16
fp16        precision: fp16, channels_last: true, on CUDA only
recompute   recompute: true, in bf16 if possible

Measures for each: seconds (median of the rounds; processor time on a CPU), the ratio to the plain step (median of the
rounds' ratios), real images/s and the peak memory of the step.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import (
    alternate,
    benchmark_parser,
    clock_of,
    describe_machine,
    finish,
    median_ratio,
    resident_bytes,
    write_result,
)
from benchmarks.plain import PlainTrainer
from config import DGNetConfig, load_config
from data.batch import Batch
from precision import has_bf16, pick_precision
from reIDmodel import build_teacher
from runs.session import to_device
from trainer import DGNetTrainer
from utils import ROOT, UserError, between, pick_device, run_cli, set_threads

CLASSES = 751
AFTER_ALL_RAMPS = 40_000


def variants(device: torch.device) -> dict[str, tuple[type[DGNetTrainer], dict[str, Any]]]:
    """Trainer and changes of the config by name; the plain one comes first."""
    cuda, full = device.type == "cuda", {"precision": "fp32"}
    half = {"channels_last": True, "precision": pick_precision(device, "auto")}
    steps = {
        "plain": (True, PlainTrainer, full),
        "plain tf32": (cuda, PlainTrainer, full),
        "fp32": (True, DGNetTrainer, full),
        "bf16": (has_bf16(device), DGNetTrainer, half),
        "fp16": (cuda, DGNetTrainer, half | {"precision": "fp16"}),
        "recompute": (True, DGNetTrainer, half | {"recompute": True}),
    }
    return {name: (kind, changes) for name, (wanted, kind, changes) in steps.items() if wanted}


def random_batch(cfg: DGNetConfig, seed: int) -> Batch:
    """Noise in the shape of a training batch: the arithmetic takes the same time for every image."""
    n, generator = cfg.batch_size, torch.Generator().manual_seed(seed)
    x, xp = torch.randn(2, n, 3, cfg.crop_image_height, cfg.crop_image_width, generator=generator)
    return Batch(x, xp, torch.randint(0, CLASSES, (n,), generator=generator), torch.arange(n))


class Steps:
    """One variant's trainer with two batches; a call makes one step and waits for its end."""

    def __init__(self, name: str, kind: type[DGNetTrainer], cfg: DGNetConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.device, self.t = name, device, AFTER_ALL_RAMPS
        teacher = build_teacher(CLASSES, backbone=cfg.backbone)
        self.trainer = kind(cfg, CLASSES, device, teachers=[teacher])
        self.batches = [to_device(random_batch(cfg, seed), device, cfg) for seed in (1, 2)]

    def __call__(self) -> None:
        # PyTorch's default is TF32 in convolutions and not in products.
        torch.backends.cuda.matmul.allow_tf32 = self.name == "plain tf32"
        torch.backends.cudnn.allow_tf32 = self.name != "plain"
        # Always the step of one iteration: steps with a live and a frozen encoder take different times.
        self.trainer.step(*self.batches, self.t)
        finish(self.device)


def peak_memory(steps: Steps) -> int:
    """Greatest number of bytes during a step, less those before it; on a CPU of resident memory."""
    if steps.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(steps.device)
        before = torch.cuda.memory_allocated(steps.device)
        steps()
        return torch.cuda.max_memory_allocated(steps.device) - before
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # or glibc would hide what it keeps for later
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the greatest memory so far
    before = resident_bytes("VmRSS")
    steps()
    return resident_bytes("VmHWM") - before


def measure(cfg: DGNetConfig, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """The measurements that this module's docstring lists, by variant, ready for JSON."""
    made = {
        name: Steps(name, kind, cfg.model_copy(update=changes), device)
        for name, (kind, changes) in variants(device).items()
    }
    # The first step allocates and, on CUDA, chooses algorithms; it serves as the measurement of memory.
    memory = {name: peak_memory(steps) for name, steps in made.items()}
    seconds = alternate(made, rounds, clock_of(device))
    result: dict[str, Any] = {}
    for name in made:
        median = statistics.median(seconds[name])
        result[name] = {
            "median": median,
            "images_per_second": 2 * cfg.batch_size / median,
            "plain / this": median_ratio(seconds["plain"], seconds[name]),
            "peak_memory": memory[name],
            "memory / plain": memory[name] / max(1, memory["plain"]),
        }
    return result


def main() -> None:
    parser = benchmark_parser("train_step", __doc__)
    parser.add_argument("--config", default=str(ROOT / "configs/latest.yaml"), help="(default: configs/latest.yaml)")
    parser.add_argument("--batch-size", type=between(2), help="pairs per step (default: the config's; 2 on a CPU)")
    parser.add_argument("--rounds", type=between(1), help="alternating rounds (default: 20 on CUDA, 3 on a CPU)")
    parser.add_argument("--threads", type=between(1), default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    device = pick_device(args.device)
    set_threads(args.threads)
    batch_size = args.batch_size or (None if device.type == "cuda" else 2)
    settings = ["ID_class=auto", "pretrained=false", *([f"batch_size={batch_size}"] if batch_size else [])]
    cfg = load_config(args.config, settings)
    if not cfg.generates:
        raise UserError(f"--config {args.config}: is a teacher's; give a DG-Net run's, such as configs/latest.yaml")
    rounds = args.rounds or (20 if device.type == "cuda" else 3)
    result = {
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "device": device.type,
        "config": Path(args.config).name,
        "batch_size": cfg.batch_size,
        "size": [cfg.crop_image_height, cfg.crop_image_width],
        "backbone": cfg.backbone,
        "variants": measure(cfg, device, rounds=rounds),
    }
    write_result(args.results, f"train_step-{device.type}-batch{cfg.batch_size}", result)


if __name__ == "__main__":
    run_cli(main)
