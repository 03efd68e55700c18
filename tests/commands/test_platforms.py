"""Windows and macOS lack modules and calls of Linux: that is no traceback, and what it costs is said in a line."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import logged

from files import hold_folder
from runs.swap_set import SETTINGS, opened
from utils import ROOT

UNIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios", "tty"}


def test_nothing_of_unix_alone_is_imported_unguarded() -> None:
    files = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "outputs"} & set(path.parts)]
    assert len(files) > 50
    for path in files:
        unguarded = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in unguarded for alias in node.names} | {
            node.module for node in unguarded if isinstance(node, ast.ImportFrom)
        }
        assert not names & UNIX_ONLY, path


def test_without_locks(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with opened(tmp_path / "made", {"count": 1}):
        assert (tmp_path / "made" / SETTINGS).is_file()
    line = logged(caplog)
    assert line.count("\n") == 1 and str(tmp_path / "made") in line
    with hold_folder(tmp_path, wait=True) as held:
        assert held
