"""The processes of a command: torchrun starts and watches them, also behind --processes and --gpu_ids.

Process 0 alone shows notes and results. An error is reported by the first process that meets it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from parallel.collectives import ProcessLost, reaching_others, wait_for_all
from utils import UserError, in_words, pick_device, set_up_logging

STOPPING = 300  # seconds after a signal: the processes finish a few steps, and process 0 writes a snapshot
PATIENCE = timedelta(minutes=30)  # for a process that is alive, but reads or writes slowly


def started() -> bool:
    """Whether this is one of several processes that torchrun, or `launch_if_asked`, has started."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or size == "1":
        return False
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE {size}: {name} is not set; use torchrun, or unset RANK and WORLD_SIZE")
    return True


# ------------------------------------------------------------------------------------------- options
def parse_gpu_ids(args: argparse.Namespace) -> list[int] | None:
    """The GPUs in `--gpu_ids`, -1 for the CPU; None where the option is absent."""
    text = getattr(args, "gpu_ids", None)
    if text is None:
        return None
    if args.device is not None:
        raise UserError("--gpu_ids and --device: give one of the two")
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--gpu_ids {text}: give numbers of GPUs separated by commas, such as 0 or 0,1") from None
    if len(ids) > 1 and (min(ids) < 0 or len(set(ids)) < len(ids)):
        raise UserError(f"--gpu_ids {text}: several GPUs must be different ones, numbered from 0")
    return ids


def count_processes(args: argparse.Namespace) -> int:
    """The number of processes that the options ask for, or that torchrun has started."""
    processes, gpu_ids = args.processes, parse_gpu_ids(args)
    if processes is not None:
        if processes < 1:
            raise UserError(f"--processes {processes}: must be at least 1")
        if gpu_ids and len(gpu_ids) != processes:
            raise UserError(f"--processes {processes}: --gpu_ids names {len(gpu_ids)} GPUs; leave one of the two out")
    if not started():
        return processes or len(gpu_ids or [0])
    size = int(os.environ["WORLD_SIZE"])
    if processes not in (None, size):
        raise UserError(f"--processes {processes}: torchrun has started {size}; leave --processes out")
    return size


def device_of(args: argparse.Namespace, local: int, processes: int) -> torch.device:
    """The device of process number `local` on this machine, one of `processes`. Raises UserError where it has none."""
    gpu_ids = parse_gpu_ids(args)
    if gpu_ids is not None:
        if local >= len(gpu_ids):
            raise UserError(f"--gpu_ids names {len(gpu_ids)} GPUs, but there are more processes on this machine")
        if gpu_ids[local] < 0:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError(
                f"--gpu_ids {args.gpu_ids}: this PyTorch sees no CUDA GPU; "
                "use --device cpu, with --processes N for several processes"
            )
        return pick_device(f"cuda:{gpu_ids[local]}")
    device = pick_device(args.device)
    if processes == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"--device {device}: {processes} processes need a GPU each; use --gpu_ids 0,1")
    return pick_device(f"cuda:{local}")


# --------------------------------------------------------------------------------------------- starting
def launch_if_asked(args: argparse.Namespace) -> int | None:
    """Run this very command in the processes that the options ask for, as torchrun would on this machine.

    args: `device`, `processes` and, where the command has it, `gpu_ids`.

    Returns the exit status; None where this process has to do the work itself, in `process_group`. Raises UserError
    before anything starts if a process would have no device.
    """
    if started() or (processes := count_processes(args)) == 1:
        return None
    for local in range(processes):
        device_of(args, local, processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The agent's account of a failure is pages long; `explain` says it in one line.
    agent = logging.getLogger("torch.distributed.elastic")
    agent.addHandler(logging.NullHandler())
    agent.propagate = False
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="local",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=STOPPING,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        return explain(error.failures, processes)
    return 0


def explain(failures: dict[int, ProcessFailure], processes: int) -> int:
    """The exit status after `failures`, by rank. Says which process was lost, unless one has reported an error."""
    # A process that loses another ends with status 1 or by the agent's SIGTERM: these are consequences.
    causes = [rank for rank, failure in failures.items() if failure.exitcode not in (1, -signal.SIGTERM)]
    rank = (causes or list(failures))[0]
    status = failures[rank].exitcode
    if status > 1:
        return status
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else "has failed"
    # On a new line: the progress bar of process 0 has not ended its own.
    print(
        f"\nerror: process {rank} of {processes} {how}, so all have ended; "
        "run the same command again to continue (train.py: with --resume)",
        file=sys.stderr,
    )
    return 1


# ------------------------------------------------------------------------------- one of several processes
@contextmanager
def process_group(args: argparse.Namespace) -> Iterator[torch.device]:
    """Join the other processes, yield the device of this one, and leave together with them.

    A single process has nothing to join. An error in one process ends all of them, and is printed once.
    """
    if not started():
        yield device_of(args, 0, 1)
        return
    with reaching_others():
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    # torchrun may start the processes anew with the same store.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    set_up_logging(logging.INFO if rank == 0 else logging.ERROR)
    try:
        device = device_of(args, int(os.environ.get("LOCAL_RANK", rank)), count_processes(args))
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        with reaching_others():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        yield device
        wait_for_all()
        dist.destroy_process_group()
    except KeyboardInterrupt:
        if rank == 0:
            raise
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        words = in_words(error)
        if words is None:
            raise
        # torchrun, or `explain`, says which process was lost.
        silent = dist.is_torchelastic_launched() if isinstance(words, ProcessLost) else store.add("errors", 1) > 1
        if silent:
            raise SystemExit(words.status) from None
        raise
