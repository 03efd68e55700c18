"""The table of several runs holds what test.py prints, and continues after an interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, OutputFolder, contents, make_runs

from mannequins.dataset import make_dataset
from runs.load import load_teacher
from studies import compare
from utils import run_cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(tiny_data: Path, tmp_path: Path) -> OutputFolder:
    return make_runs(tmp_path / "runs", tiny_data, tiny="gray")


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        run_cli(compare.main)
    return stop.value.code or 0


def test_cells_are_those_of_test_py_and_are_kept(
    place: OutputFolder, tmp_path: Path, script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    make_dataset(other, seed=5, preset="tiny")
    options = "--runs", "tutor", "tiny", "--test_dir", place.data, other, "--out", out, *place.where
    measured = []
    accuracy = compare.measure_accuracy

    def measure(tested: object, root: Path, *rest: object, **how: object) -> dict:
        measured.append(root)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return accuracy(tested, root, *rest, **how)

    monkeypatch.setattr(compare, "measure_accuracy", measure)
    assert run(monkeypatch, *options) == 130
    assert run(monkeypatch, *options) == 0
    assert measured == [place.data, other, other, place.data, other]
    for which, folder in (
        ("--teacher", place.folder / "models" / "tutor"),
        ("--name", place.folder / "outputs" / "tiny"),
    ):
        assert script("test", which, folder.name, "--test_dir", place.data, other, *place.where).code == 0
    rows = json.loads((out / "compared.json").read_text())["rows"]
    for name, file, key in (
        ("tutor", "models/tutor/reid.json", "mannequins"),
        ("tutor", "models/tutor/reid-other.json", "other"),
        ("tiny", "outputs/tiny/reid.json", "mannequins"),
        ("tiny", "outputs/tiny/reid-other.json", "other"),
    ):
        report = json.loads((place.folder / file).read_text())["tables"]["single query"]
        cell = rows[name]["accuracy"][key]
        assert report[cell["score"]] == {convention: cell[convention] for convention in ("official", "standard")}
        assert f"{100 * cell['official']['mAP']:.2f}" in (out / "compared.md").read_text()
    net = load_teacher("tutor", place.folder)
    used = sum(
        p.numel() for n, p in net.state_dict().items() if not n.startswith(("model.fc", "classifier.classifier"))
    )
    assert rows["tutor"]["parameters"] == used and rows["tutor"]["ms_per_image"] > 0
    assert (out / "compared.png").stat().st_size > 1000

    with torch.no_grad():  # another net of that name is measured anew
        net.classifier.add_block[0].weight.mul_(2)
    torch.save(net.state_dict(), place.folder / "models" / "tutor" / "net_last.pth")
    assert run(monkeypatch, *options) == 0 and measured[5:] == [place.data, other]


def test_refusals(place: OutputFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    where = "--out", out, *place.where
    assert run(monkeypatch, "--runs", "nobody", *where) == 2
    assert run(monkeypatch, "--runs", "tiny", "--test_dir", tmp_path / "nothing", *where) == 2
    assert run(monkeypatch, "--runs", "tiny", "--test_dir", place.data, place.data, *where) == 2
    assert not out.exists() or not contents(out)
