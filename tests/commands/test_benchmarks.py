"""The benchmarks: their plain references agree with what they measure, and they run at small sizes."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU

from benchmarks import all as all_benchmarks
from benchmarks import features, generate, loader, ranking
from data.folders import read_split
from data.images import decoded, normalise
from reid_eval.features import Features, extract_features
from reid_eval.ranking import SETTINGS
from reIDmodel import build_id_net
from utils import run_cli


# ---- what is compared
@pytest.mark.parametrize("kind", ranking.KINDS)
def test_the_plain_ranking_gives_our_numbers(kind: str) -> None:
    query, gallery = ranking.make_problem(25, 300, 16, signal=ranking.KINDS[kind])
    order = np.random.default_rng(0).permutation(len(gallery))
    gallery = Features(gallery.features[order], gallery.pids[order], gallery.camids[order])
    results = ranking.rank_sides(query, gallery)
    for name, weights in SETTINGS.items():
        expected = ranking.plain_reference(query, gallery, weights)
        for convention, result in results[name].items():
            np.testing.assert_allclose(result.ap, expected[convention], atol=1e-12)
            np.testing.assert_allclose(result.inp, expected["inp"], atol=1e-12)
            assert result.first.tolist() == expected["first"].tolist()


def test_one_kind_of_features_is_good_and_one_at_chance_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "REPEATS", 1)
    result = ranking.measure_speed(30, 800)
    assert min(result["good"]["mAP"].values()) > 0.5
    assert max(result["chance"]["mAP"].values()) < 0.15


def test_ratios_are_taken_round_by_round() -> None:
    assert loader.compare({"plain": lambda: None}, 3, 5, CPU)["times plain"] == {"plain": 1}
    assert ranking.median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == 3.0


def test_the_plain_pairs_are_the_loaders(tiny_data: Path) -> None:
    """A read image is one of the places that mirroring and moving can give it."""
    plain = loader.PlainPairs(read_split(tiny_data, "train_all", need_names=False))
    x, xp = plain.batch(8)
    assert x.shape == xp.shape == (8, 3, 256, 128) and x.dtype == torch.float32
    whole = normalise(decoded(plain.paths[3], (256, 128))[None])
    padded = torch.nn.functional.pad(whole, (10, 10, 10, 10), mode="replicate")
    views = (view.unfold(2, 256, 1).unfold(3, 128, 1).flatten(2, 3)[0, 0] for view in (padded, padded.flip(3)))
    assert (torch.cat(list(views)) == plain.read(plain.paths[3])[0]).flatten(1).all(1).any()


def test_the_plain_loops_features_are_ours(tiny_data: Path) -> None:
    torch.manual_seed(0)
    net = build_id_net("AB", 4, backbone="resnet10w8").eval()
    paths = read_split(tiny_data, "query").paths
    plain = features.plain_features(net, paths, 64, 32, CPU)
    ours = extract_features(net, paths, height=64, width=32, batch_size=5, device=CPU, progress=False)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


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
    assert run_here(loader, *"--device cpu --quick --batch-size 4 --runs demo-teacher".split()) == 0
    result = json.loads((tmp_path / "loader.json").read_text())
    speed, share = result["speed"], result["share"]["demo-teacher"]
    ways = ["plain", "files", "source", "resized"]
    assert list(speed["images/s"]) == list(speed["times plain"]) == ways
    assert speed["images per round"] == 8 and speed["times plain"]["plain"] == 1
    bytes_of = {"source": 128 * 64 * 3, "resized": 256 * 128 * 3}
    assert speed["cache_mb"] == {name: result["images"] * size / 1e6 for name, size in bytes_of.items()}
    assert 0 <= share["share waited"] < 1


def test_features(tmp_path: Path, run_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "has_bf16", lambda device: False)
    assert features.precisions(CPU) == ["fp32"]
    monkeypatch.setattr(features, "has_bf16", lambda device: True)
    assert run_here(features, *"--device cpu --quick --images 4".split()) == 0
    speed = json.loads((tmp_path / "features.json").read_text())["speed"]["demo"]
    assert speed["images/s"].keys() == {"plain", "fp32", "bf16"} and speed["images"] == 4
    assert speed["least cosine to plain"]["fp32"] > 0.9999


def test_all_go_on_after_one_that_fails(tmp_path: Path, run_here: Callable[..., int], monkeypatch, capsys) -> None:
    ran: list[str] = []

    def started(command: list[str], **_: object) -> SimpleNamespace:
        assert command[-2:] == ["--results", str(tmp_path)]
        ran.append(command[2])
        return SimpleNamespace(returncode=int("loader" in command[2]))

    monkeypatch.setattr(all_benchmarks.subprocess, "run", started)
    assert run_here(all_benchmarks, "--device", "cpu") == 2
    assert ran == [f"benchmarks.{name}" for name in ("train_step", "loader", "features", "generate", "ranking")]
    assert "loader" in capsys.readouterr().err.splitlines()[-1]


def test_generate(tmp_path: Path, run_here: Callable[..., int]) -> None:
    small = "--backbone resnet10w16 --size 128 64 --count 3 --device cpu".split()
    assert run_here(generate, *small) == 0
    result = json.loads((tmp_path / "generate-cpu.json").read_text())
    (nets,), (whole,) = result["images/s, nets alone"], result["images/s, whole command"]
    assert 0 < whole < nets and result["whole command / nets alone"] == round(whole / nets, 3)
    assert result["count"] == 3
