"""What every benchmark shares: what the machine is, medians of alternating runs, and the result files."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import write_json

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).resolve().parent / "results"


def describe_machine() -> dict[str, Any]:
    """The date, processor (without the host's name), memory, load and versions, ready for JSON.

    `load` is the system's load average over the last minute: above 0 before a benchmark starts, other work
    was running beside it.
    """
    import numpy as np
    import torch

    found = {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def alternate(
    measured: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run of each function; in turn, so that other work on the machine falls on all of them.

    clock  `time.process_time` for what is on the processor alone: waiting for other programs does not count
    """
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(repeats):
        for name, function in measured.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor seconds on a CPU, which other programs disturb less; seconds on a GPU, which works by itself."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def finish(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median over the rounds of `alternate` of one thing's seconds divided by the other's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def write_result(folder: Path | str, name: str, result: dict[str, Any]) -> Path:
    """Write `name`.json into `folder`, replacing an earlier result of that name. Raises UserError as `write_json`."""
    path = Path(folder) / f"{name}.json"
    write_json(path, result)
    return path


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
