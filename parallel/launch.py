"""Several processes of one command: started here or by torchrun, watched, and ended together.

All speak with one voice: only process 0 prints, and an error is reported by the first that meets it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.collectives import ProcessLost, wait_for_all
from utils import UserError, pick_device

BEAT = 2.0  # seconds between signs of life
SILENCE = 40.0  # seconds without one after which a process counts as lost
GRACE = 10.0  # seconds that a process has to end by itself once another is lost
STOPPING = 300.0  # the same after a signal to stop, when process 0 may be writing a snapshot
PATIENCE = timedelta(minutes=30)  # for a process that lives, but writes or reads slowly


def started() -> bool:
    """Whether this is one of several processes that torchrun, or `launch`, has started."""
    text = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or text == "1":
        return False
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    numbers = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name not in missing]
    if missing or not all(number.isdecimal() for number in numbers):
        what = f"{missing[0]} is not set" if missing else "RANK, WORLD_SIZE and MASTER_PORT must be numbers"
        raise UserError(f"WORLD_SIZE {text}: {what}; start several processes with torchrun, or unset RANK, WORLD_SIZE")
    return int(text) > 1


# ------------------------------------------------------------------------------------------- options
def parse_gpu_ids(text: str | None, device: str | None) -> list[int] | None:
    """The numbers in `--gpu_ids`, None where it is not given. -1 is the CPU."""
    if text is None:
        return None
    if device is not None:
        raise UserError("--gpu_ids and --device: give one of the two")
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--gpu_ids {text}: give numbers of GPUs separated by commas, such as 0 or 0,1") from None
    if len(ids) > 1 and (min(ids) < 0 or len(set(ids)) < len(ids)):
        raise UserError(f"--gpu_ids {text}: several GPUs must be different ones, numbered from 0")
    return ids


def count_processes(processes: int | None, gpu_ids: list[int] | None) -> int:
    """How many processes the options ask for; torchrun's number where it has started this one."""
    asked = processes or (len(gpu_ids) if gpu_ids else None)
    if processes is not None:
        if processes < 1:
            raise UserError(f"--processes {processes}: must be at least 1")
        if gpu_ids and len(gpu_ids) != processes:
            raise UserError(f"--processes {processes}: --gpu_ids names {len(gpu_ids)} GPUs; leave one of the two out")
    if not started():
        return asked or 1
    size = int(os.environ["WORLD_SIZE"])
    if processes not in (None, size):
        raise UserError(f"--processes {processes}: torchrun has started {size}; leave --processes out")
    return size


def own_device(device: str | None, gpu_ids: list[int] | None, local: int = 0, processes: int = 1) -> torch.device:
    """The device of process number `local` on this machine. Raises UserError where there is none."""
    if gpu_ids is not None:
        if local >= len(gpu_ids):
            raise UserError(f"--gpu_ids names {len(gpu_ids)} GPUs, but there are more processes on this machine")
        if gpu_ids[local] < 0:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError(
                f"--gpu_ids {','.join(map(str, gpu_ids))}: this PyTorch sees no CUDA GPU; "
                "use --device cpu, with --processes N for several processes"
            )
        return pick_device(f"cuda:{gpu_ids[local]}")
    chosen = pick_device(device)
    if processes == 1 or chosen.type == "cpu":
        return chosen
    if chosen.index is not None:
        raise UserError(f"--device {device}: each of {processes} processes needs a GPU of its own; use --gpu_ids 0,1")
    return pick_device(f"cuda:{local}")


# ------------------------------------------------------------------------------- one of several processes
@contextmanager
def process_group(device: str | None, gpu_ids: list[int] | None = None) -> Iterator[torch.device]:
    """Join the other processes, yield this one's device, and leave together with them.

    In a single process there is nothing to join. An error in one process ends all within a minute.
    """
    if not started():
        yield own_device(device, gpu_ids)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun, like `launch`, keeps the store itself, so that it outlives every process.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shown = sys.stdout, sys.stderr
    store = dist.TCPStore(host, port, None, is_master=hosts, timeout=PATIENCE, wait_for_workers=False)
    # The watch has a client of its own: the other one's requests may wait for long.
    client = dist.TCPStore(host, port, None, is_master=False, wait_for_workers=False)
    watch = Watch(dist.PrefixStore(f"watch{attempt}", client), rank, size)
    with open(os.devnull, "w") as nowhere:
        if rank > 0:
            sys.stdout = sys.stderr = nowhere
        try:
            watch.start()
            own = own_device(device, gpu_ids, int(os.environ.get("LOCAL_RANK", rank)), size)
            backend = "gloo"
            if own.type == "cuda":
                torch.cuda.set_device(own)
                backend = "cpu:gloo,cuda:nccl"
            group = dist.PrefixStore(f"group{attempt}", store)
            dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=PATIENCE)
            watch.joined = True
            yield own
            wait_for_all()
            watch.finish()
            dist.destroy_process_group()
        except (UserError, KeyboardInterrupt) as error:
            lost = isinstance(error, ProcessLost)
            if watch.may_speak(patient=lost):
                sys.stdout, sys.stderr = shown
                raise
            raise SystemExit(getattr(error, "status", 130)) from None
        except SystemExit:
            watch.finish()
            raise
        except BaseException:
            watch.may_speak()
            sys.stdout, sys.stderr = shown
            raise
        finally:
            sys.stdout, sys.stderr = shown


class Watch:
    """A thread that gives and reads signs of life in the store.

    An exchange with a dead process may wait for long (on GPUs) and the main thread with it; this thread then ends the
    process. Each process watches the next one and tells all when it is lost.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.next = store, rank, (rank + 1) % size
        self.joined = False  # before all have come, none is missed but by whoever started it
        self.finished = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def finish(self) -> None:
        """This process ends in order; nobody need miss it."""
        self.finished.set()
        try:
            with self.lock:
                self.store.set(f"done{self.rank}", "")
        except RuntimeError:
            pass  # the store has gone with the process that kept it
        # Python cannot end while a thread is inside a request of the store: that aborts the process, status 134.
        self.thread.join(GRACE)

    def may_speak(self, *, patient: bool = False) -> bool:
        """Tell all that the run has failed; whether this process is the first, and so reports it.

        `patient`: leave precedence to whoever knows the cause.
        """
        try:
            with self.lock:
                self.store.set("lost", "")
            if patient:
                time.sleep(3)
            with self.lock:
                return self.store.add("said", 1) == 1
        except RuntimeError:
            return True

    def _next_is_lost(self) -> bool:
        """One sign of life; whether somebody is lost."""
        with self.lock:
            self.store.add(f"alive{self.rank}", 1)
            count = self.store.add(f"alive{self.next}", 0)
            if not self.joined or count != self.count or self.store.check([f"done{self.next}"]):
                self.count, self.seen = count, time.monotonic()
            return time.monotonic() - self.seen > SILENCE or self.store.check(["lost"])

    def _run(self) -> None:
        self.count, self.seen = 0, time.monotonic()
        while not self.finished.wait(BEAT):
            try:
                if not self._next_is_lost():
                    continue
            except RuntimeError:
                pass  # whoever kept the store is gone
            if self.finished.wait(GRACE):
                return
            if self.may_speak():
                print(
                    "\nerror: another process of this run has ended or cannot be reached, so all end; "
                    "continue with --resume",
                    file=sys.__stderr__,
                    flush=True,
                )
            os._exit(1)


# --------------------------------------------------------------------------------------------- starting
def launch(processes: int, device: str | None, gpu_ids: list[int] | None = None) -> int:
    """Run this very command in `processes` processes on this machine, as torchrun would; returns the exit status.

    Signals to stop are passed on. When one process fails, the others have some seconds to end by themselves. Raises
    UserError, before anything starts, where there is no device for each.
    """
    for local in range(processes):
        own_device(device, gpu_ids, local, processes)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    children: list[subprocess.Popen] = []
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    kept = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(processes):
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In sessions of their own: a Ctrl-C then reaches them once, through `stop`.
            children.append(subprocess.Popen([sys.executable, *sys.argv], env=own, start_new_session=True))
        return _wait(children, store, stopped)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in kept.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen], store: dist.Store, stopped: list[int]) -> int:
    """Until all have ended. The status is that of the first that failed, 1 where a signal ended it."""
    status, since = 0, 0.0
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        failed = [(rank, child) for rank, child in enumerate(children) if child.poll()]
        if failed and not status:
            (rank, child), since = failed[0], time.monotonic()
            status = _status(child.returncode, stopped)
            if child.returncode < 0 and not stopped and store.add("watch0/said", 1) == 1:
                name = signal.Signals(-child.returncode).name
                # On a line of its own: the progress bar of process 0 has not ended its line.
                print(
                    f"\nerror: process {rank} of {len(children)} was ended by {name}, so all end; "
                    "continue with --resume",
                    file=sys.stderr,
                )
        if status:
            waited = time.monotonic() - since - (STOPPING if stopped else 2 * GRACE)
            for child in children:
                if child.poll() is None and waited > 0:
                    child.terminate() if waited < GRACE else child.kill()
    return status or max((_status(child.returncode, stopped) for child in children), default=0)


def _status(code: int, stopped: list[int]) -> int:
    return code if code >= 0 else 128 - code if stopped else 1
