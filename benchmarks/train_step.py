"""The training step against a plain one: `python -m benchmarks.train_step [--batch-size 8] [--device cuda]`.

Whole steps of configs/latest.yaml with every loss active (ramps at their end, erasing, a teacher), in turn:

plain       docs/method.md line by line, with textbook layers (benchmarks/plain.py), in fp32 without TF32
plain tf32  the same with TF32, on CUDA alone
fp32        the real step as configured by default
bf16        precision: bf16, channels_last: true, where the device computes in it
fp16        precision: fp16, channels_last: true, on CUDA alone
recompute   recompute: true, in bf16 where possible; not with --short

Of each: seconds (median of the rounds; processor time on a CPU), the ratio to the plain step (median of the rounds'
ratios), real images/s, greatest memory above what lay there before the step, and without --short: operations or
kernels launched, the share of the machine's measured rate of matrix products that the step's convolutions and
products reach, and of the real steps seconds by phase.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import RESULTS, alternate, clock_of, describe_machine, finish, median_ratio, write_result
from benchmarks.plain import PlainTrainer
from config import DGNetConfig, load_config
from data.batch import Batch
from precision import AUTOCAST, has_bf16, pick_precision
from reIDmodel import build_teacher
from runs.session import to_device
from trainer import DGNetTrainer
from utils import ROOT, UserError, pick_device, run_cli, set_threads

CLASSES = 751
AFTER_ALL_RAMPS = 40_000
PHASES = ("encode", "decode", "classify", "update_discriminator", "generator_and_id_terms")
FAST = dict(channels_last=True)


def variants(device: torch.device, *, short: bool) -> dict[str, tuple[type[DGNetTrainer], dict[str, Any]]]:
    """Name to trainer and changes of the config; the first is the plain one."""
    full, half = {"precision": "fp32"}, FAST | {"precision": pick_precision(device, "auto")}
    found = {"plain": (PlainTrainer, full)}
    if device.type == "cuda":
        found["plain tf32"] = (PlainTrainer, full)
    found["fp32"] = (DGNetTrainer, full)
    if has_bf16(device):
        found["bf16"] = (DGNetTrainer, half)
    if device.type == "cuda":
        found["fp16"] = (DGNetTrainer, FAST | {"precision": "fp16"})
    if not short:
        found["recompute"] = (DGNetTrainer, half | {"recompute": True})
    return found


def random_batch(cfg: DGNetConfig, seed: int) -> Batch:
    """Noise in the shape of a training batch; the arithmetic takes the same time for any image."""
    n, generator = cfg.batch_size, torch.Generator().manual_seed(seed)
    x, xp = torch.randn(2, n, 3, cfg.crop_image_height, cfg.crop_image_width, generator=generator)
    return Batch(x, xp, torch.randint(0, CLASSES, (n,), generator=generator), torch.arange(n))


# --------------------------------------------------------------------------------------------- measuring
class Steps:
    """One variant's trainer with its batches; calling it makes one step and waits for its end."""

    def __init__(self, name: str, kind: type[DGNetTrainer], cfg: DGNetConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.device, self.t = name, device, AFTER_ALL_RAMPS
        teacher = build_teacher(CLASSES, backbone=cfg.backbone)
        self.trainer = kind(cfg, CLASSES, device, teachers=[teacher])
        self.batches = [to_device(random_batch(cfg, seed), device, cfg) for seed in (1, 2)]

    def __call__(self) -> None:
        # Otherwise as PyTorch has it: TF32 in convolutions, not in products.
        torch.backends.cuda.matmul.allow_tf32 = self.name == "plain tf32"
        torch.backends.cudnn.allow_tf32 = self.name != "plain"
        # Both kinds of step (live and frozen encoder) would make the rounds unequal: always that of one iteration.
        self.trainer.step(*self.batches, self.t)
        finish(self.device)


@contextmanager
def timed_phases(steps: Steps) -> Iterator[dict[str, float]]:
    """Seconds inside the trainer's methods while the context lasts, the device waited for at each one's end."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(steps.trainer, name)
        clock = clock_of(steps.device)

        def run(*args: Any) -> Any:
            finish(steps.device)
            start = clock()
            result = method(*args)
            finish(steps.device)
            seconds[name] += clock() - start
            return result

        return run

    for name in PHASES:
        setattr(steps.trainer, name, timed(name))
    try:
        yield seconds
    finally:
        for name in PHASES:
            delattr(steps.trainer, name)


def phases(steps: Steps) -> dict[str, float]:
    """Seconds of one step by phase; the backward and the optimisers of G and id net are what the others leave."""
    clock = clock_of(steps.device)
    with timed_phases(steps) as seconds:
        start = clock()
        steps()
        whole = clock() - start
    return dict(seconds) | {"backward and optimisers": whole - sum(seconds.values())}


def peak_memory(steps: Steps) -> int:
    """Bytes at the greatest during a step, above those before it. On a CPU sampled from the process's resident size."""
    if steps.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(steps.device)
        before = torch.cuda.memory_allocated(steps.device)
        steps()
        return torch.cuda.max_memory_allocated(steps.device) - before
    give_back_freed_memory()
    stop, seen = threading.Event(), [resident_bytes()]

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        steps()
    finally:
        stop.set()
        watcher.join()
    return max(seen) - seen[0]


def give_back_freed_memory() -> None:
    """Let glibc return what it keeps for later; elsewhere the peak is measured above that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def launches(steps: Steps) -> int:
    """Kernels launched in one step on CUDA; operations that did the work on a CPU."""
    cuda = steps.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        steps()
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted and not event.cpu_children for event in profile.events())


class CountFlops(TorchDispatchMode):
    """Adds up the operations of convolutions and products. FlopCounterMode's hooks refuse the gradient penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def flops(steps: Steps) -> int:
    """Floating point operations of the step's convolutions and products, forward and backward."""
    with CountFlops() as counter:
        steps()
    return counter.total


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product: what the machine gives at best."""
    n, clock = 8192 if device.type == "cuda" else 1536, clock_of(device)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        finish(device)
        start = clock()
        a @ b
        finish(device)
        best = min(best, clock() - start)
    return 2 * n**3 / best


def measure(cfg: DGNetConfig, device: torch.device, *, rounds: int, short: bool) -> dict[str, Any]:
    """Everything that the module's text promises, ready for JSON. `short` leaves out phases, launches and rates."""
    made = {
        name: Steps(name, kind, cfg.model_copy(update=changes), device)
        for name, (kind, changes) in variants(device, short=short).items()
    }
    # The first step allocates and, on CUDA, chooses algorithms; it serves as the measurement of memory.
    result: dict[str, Any] = {name: {"peak_memory": peak_memory(steps)} for name, steps in made.items()}
    seconds = alternate(made, rounds, clock_of(device))
    for name, steps in made.items():
        found = result[name]
        found["seconds"] = seconds[name]
        found["median"] = statistics.median(seconds[name])
        found["images_per_second"] = 2 * cfg.batch_size / found["median"]
        found["plain / this"] = median_ratio(seconds["plain"], seconds[name])
        found["memory / plain"] = found["peak_memory"] / max(1, result["plain"]["peak_memory"])
        if short:
            continue
        if not isinstance(steps.trainer, PlainTrainer):
            found["phases"] = phases(steps)
        found["launches"] = launches(steps)
        found["flops"] = flops(steps)
        torch.backends.cuda.matmul.allow_tf32 = name != "plain"  # the rate of what its convolutions are done in
        rate = matrix_rate(device, AUTOCAST[steps.trainer.precision] or torch.float32)
        found["share_of_matrix_rate"] = found["flops"] / found["median"] / rate
    return result


def show(result: dict[str, Any]) -> str:
    lines = [f"  {'':14}{'s/step':>9}{'plain/this':>12}{'images/s':>10}{'memory GB':>11}{'launches':>10}{'of rate':>9}"]
    for name, found in result.items():
        launched = f"{found['launches']:10,}" if "launches" in found else ""
        share = f"{found['share_of_matrix_rate']:9.0%}" if "share_of_matrix_rate" in found else ""
        lines.append(
            f"  {name:14}{found['median']:9.3f}{found['plain / this']:12.2f}{found['images_per_second']:10.2f}"
            f"{found['peak_memory'] / 1e9:11.2f}{launched}{share}"
        )
    for name, found in result.items():
        if "phases" in found:
            split = ", ".join(f"{phase.replace('_', ' ')} {seconds:.3f}" for phase, seconds in found["phases"].items())
            lines.append(f"  {name}: {split} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs/latest.yaml"), help="(default: configs/latest.yaml)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    parser.add_argument("--batch-size", type=int, help="pairs per step (default: the config's on CUDA, 2 on a CPU)")
    parser.add_argument("--rounds", type=int, help="alternating rounds (default: 20 on CUDA, 3 on a CPU)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--short", action="store_true", help="leave out phases, launches and the share of the rate")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: ours)")
    args = parser.parse_args()
    device = pick_device(args.device)
    for name, least in (("batch_size", 2), ("rounds", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    set_threads(args.threads)
    settings = ["ID_class=auto", "pretrained=false"]
    batch_size = args.batch_size or (None if device.type == "cuda" else 2)
    cfg = load_config(args.config, settings + ([f"batch_size={batch_size}"] if batch_size else []))
    if not isinstance(cfg, DGNetConfig):
        raise UserError(f"--config {args.config}: is a teacher's; give a DG-Net run's, such as configs/latest.yaml")
    rounds = args.rounds or (20 if device.type == "cuda" else 3)

    result: dict[str, Any] = {
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "device": device.type,
        "batch_size": cfg.batch_size,
        "size": [cfg.crop_image_height, cfg.crop_image_width],
        "backbone": cfg.backbone,
    }
    print(f"train_step: {Path(args.config).name}, batch {cfg.batch_size}, on {result['machine']}", flush=True)
    found = measure(cfg, device, rounds=rounds, short=args.short)
    print(show(found))
    name = f"train_step-{device.type}-batch{cfg.batch_size}"
    print(f"  written to {write_result(args.results, name, result | {'variants': found})}")


if __name__ == "__main__":
    run_cli(main)
