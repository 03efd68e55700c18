"""What the benchmarks share: options, medians of alternating runs, what the machine is, and the result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torchvision import transforms

from data.folders import ImageList, read_split
from files import write_json
from mannequins.dataset import make_dataset
from utils import IMAGENET_MEAN, IMAGENET_STD

RESULTS = Path(__file__).resolve().parent / "results"


def benchmark_parser(name: str, doc: str, *, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: --results, and --device unless it measures the CPU alone."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="result folder (default: benchmarks/results)")
    if device:
        parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    return parser


def describe_machine() -> dict[str, Any]:
    """The date, processor (without the host's name), memory, load average and versions, ready for JSON."""
    memory = load = None  # where the system does not say
    with suppress(AttributeError, ValueError, OSError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        load = round(os.getloadavg()[0], 2)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    machine = {
        "date": date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "load": load,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }
    if torch.cuda.is_available():
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine


def draw_images(folder: Path, identities: int) -> ImageList:
    """Training images of the embedded renderer, drawn into a new folder `mannequins` in `folder`."""
    with redirect_stdout(None):
        make_dataset(folder / "mannequins", preset="tiny", train_ids=identities, test_ids=2)
    return read_split(folder / "mannequins", "train_all", need_names=False)


def plain_reader(*steps: Callable[[Any], Any]) -> Callable[[Path], torch.Tensor]:
    """Reads an image file as such scripts usually do: Pillow, torchvision's `steps`, then (3, H, W) normalised."""
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def read(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    return read


def alternate(
    measured: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run of each function; they take turns, so that other work on the machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(repeats):
        for name, function in measured.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def compare(ways: Mapping[str, Callable[[], Any]], repeats: int, images: int, device: torch.device) -> dict[str, Any]:
    """Images per second of each way to handle `images` images, and the ratios to the way called `plain`.

    Call every way once before: the first call sets things up.
    """
    seconds = alternate(ways, repeats, clock_of(device))
    return {
        "images/s": {name: images / statistics.median(values) for name, values in seconds.items()},
        "times plain": {name: median_ratio(seconds["plain"], values) for name, values in seconds.items()},
    }


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor seconds on a CPU, since other programs disturb them less; wall-clock seconds on a GPU."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def finish(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median of `over` / `under`, round by round of `alternate`."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def resident_bytes(key: str) -> int:
    """Resident memory of this process: `VmRSS` now, `VmHWM` the greatest; 0 where the system is not Linux."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{key}:\s+(\d+)", status.read_text())[1]) * 1024 if status.is_file() else 0


def write_result(folder: Path | str, name: str, result: dict[str, Any]) -> None:
    """Print a result and write it to `name`.json in `folder`, in place of an earlier one."""
    path = Path(folder) / f"{name}.json"
    write_json(path, result)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(yaml.safe_dump({name: rounded}, sort_keys=False, width=120), end=f"written to {path}\n")
