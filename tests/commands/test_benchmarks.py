"""The benchmarks: their plain references agree with what they measure, and they run at small sizes."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import loader, ranking
from data.folders import read_split
from data.images import decoded, normalise
from utils import run_cli


# ---- what is compared
def test_the_plain_pairs_are_the_loaders(tiny_data: Path) -> None:
    """A read image is one of the places that mirroring and moving can give it."""
    plain = loader.PlainPairs(read_split(tiny_data, "train_all", need_names=False))
    x, xp = plain.batch(8)
    assert x.shape == xp.shape == (8, 3, 256, 128) and x.dtype == torch.float32
    whole = normalise(decoded(plain.paths[3], (256, 128))[None])
    padded = torch.nn.functional.pad(whole, (10, 10, 10, 10), mode="replicate")
    views = (view.unfold(2, 256, 1).unfold(3, 128, 1).flatten(2, 3)[0, 0] for view in (padded, padded.flip(3)))
    assert (torch.cat(list(views)) == plain.read(plain.paths[3])[0]).flatten(1).all(1).any()


# ---- the commands
@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_thread: None) -> Callable[..., int]:
    """Runs a benchmark in this process; returns its exit status."""

    def run(module: ModuleType, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmark", "--results", str(tmp_path), *options])
        with pytest.raises(SystemExit) as stop:
            run_cli(module.main)
        return stop.value.code or 0

    return run


@pytest.mark.parametrize("part", ranking.MEASURES)
def test_ranking(tmp_path: Path, run_here: Callable[..., int], part: str) -> None:
    assert run_here(ranking, part, "--queries", "10", "--gallery", "200") == 0
    result = json.loads((tmp_path / f"ranking-{part}.json").read_text())
    assert result["sizes"] == {"queries": 10, "gallery": 200, "dim": 1024}
    assert {"date", "cpu", "cores", "load", "numpy", "python"} <= set(result["machine"])
    assert platform.node() not in json.dumps(result["machine"]).split('"')
    if part == "memory":
        assert result["features"] == 210 * 1024 * 4 and result["beyond_features"] > 0
    elif part == "rerank":
        assert result["images"] == 210 and result["peak"] > 0
    else:
        assert result["good"]["ranking / bare product"] > 0


def test_loader(tmp_path: Path, run_here: Callable[..., int]) -> None:
    assert run_here(loader, *"--device cpu --quick --batch-size 4".split()) == 0
    result = json.loads((tmp_path / "loader.json").read_text())
    speed = result["speed"]
    ways = ["plain", "files", "source", "resized"]
    assert list(speed["images/s"]) == list(speed["times plain"]) == ways
    assert speed["images per round"] == 8 and speed["times plain"]["plain"] == 1
    bytes_of = {"source": 128 * 64 * 3, "resized": 256 * 128 * 3}
    assert speed["cache_mb"] == {name: result["images"] * size / 1e6 for name, size in bytes_of.items()}
