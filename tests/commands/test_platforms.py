"""Windows and macOS lack modules and calls of Linux: that is no traceback, and what it costs is said in a line."""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HEIGHT, WIDTH, logged, noise

from benchmarks.machine import describe_machine, resident_bytes
from data.cache import Machine, cached_images
from data.folders import read_people
from data.loader import PairLoader
from files import hold_folder
from runs.snapshot import sync_folder
from runs.swap_set import SETTINGS, opened
from utils import ROOT, keep_freed_memory

UNIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios", "tty"}


def photos(folder: Path) -> list[Path]:
    return [noise(folder / person / f"{i}.png", (WIDTH, HEIGHT)) for person in ("a", "b") for i in range(3)]


def test_nothing_of_unix_alone_is_imported_unguarded() -> None:
    files = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "outputs"} & set(path.parts)]
    assert len(files) > 50
    for path in files:
        unguarded = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in unguarded for alias in node.names} | {
            node.module for node in unguarded if isinstance(node, ast.ImportFrom)
        }
        assert not names & UNIX_ONLY, path


def test_a_folder_is_held_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with hold_folder(tmp_path / "new") as first, hold_folder(tmp_path / "new") as second:
        assert first and not second
    with hold_folder(tmp_path / "new") as again:
        assert again
    assert logged(caplog) == ""


def test_without_locks(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with opened(tmp_path / "made", {"count": 1}):
        assert (tmp_path / "made" / SETTINGS).is_file()
    line = logged(caplog)
    assert line.count("\n") == 1 and str(tmp_path / "made") in line
    with hold_folder(tmp_path, wait=True) as held:
        assert held


def test_batches_without_a_signal_of_ended_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path)
    images = read_people(tmp_path)
    loader = PairLoader(images, batch_size=2, height=HEIGHT, width=WIDTH, pad=2, seed=0, num_workers=1, device="cpu")
    expected = loader.batch(0)
    names = {name: value for name, value in vars(signal).items() if name != "SIGCHLD"}
    monkeypatch.setattr("data.loader.signal", SimpleNamespace(**names))
    batches = loader.batches()
    assert torch.equal(next(batches).x, expected.x)
    batches.close()


def test_a_shared_cache_without_reserving_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, machine = photos(tmp_path), Machine(True, lambda value: value)
    expected = cached_images(paths, "resized", HEIGHT, WIDTH, limit_mb=100)
    monkeypatch.delattr(os, "posix_fallocate")
    assert torch.equal(cached_images(paths, "resized", HEIGHT, WIDTH, limit_mb=100, machine=machine), expected)


def test_folders_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(*_: object) -> int:
        asked.append(tmp_path)
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("runs.snapshot.os", SimpleNamespace(name="nt", open=refused, fsync=refused, O_RDONLY=0))
    sync_folder(tmp_path)
    assert asked == []
    monkeypatch.setattr("runs.snapshot.os", SimpleNamespace(name="posix", open=refused, fsync=refused, O_RDONLY=0))
    with pytest.raises(PermissionError):
        sync_folder(tmp_path)


def test_a_machine_that_says_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.setattr("benchmarks.machine.Path", lambda _: Path("nowhere"))
    machine = describe_machine()
    assert machine["memory_gib"] is None and machine["load"] is None and machine["cores"]
    assert resident_bytes("VmRSS") == 0


@pytest.mark.parametrize("error", [TypeError, OSError])
def test_a_system_without_glibc(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    set_up: list[tuple[int, int]] = []

    def refused(_: None) -> None:
        set_up.append((0, 0))
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refused)
    keep_freed_memory()
    assert set_up == [(0, 0)], "it was tried"
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())  # macOS: a library without mallopt
    keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: set_up.append(option)))
    keep_freed_memory()
    assert len(set_up) == 3
