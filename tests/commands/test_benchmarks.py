"""The benchmarks: their references agree with what they measure, and they run at small sizes."""

import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU

from benchmarks import all as all_benchmarks
from benchmarks import features, generate, loader
from benchmarks.features import plain_features
from benchmarks.loader import PlainPairs
from benchmarks.loader import measure_speed as measure_loading
from benchmarks.machine import median_ratio
from benchmarks.ranking import KINDS, make_problem, measure_speed, plain_reference, rank_sides
from data.folders import read_split
from data.images import normalise, resized
from reid_eval.features import Features, extract_features
from reid_eval.ranking import SETTINGS
from reIDmodel import build_id_net
from utils import ROOT, run_cli


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_reference_gives_our_numbers(kind, shuffled):
    query, gallery = make_problem(25, 300, 16, signal=KINDS[kind])
    if shuffled:
        order = np.random.default_rng(0).permutation(len(gallery))
        gallery = Features(gallery.features[order], gallery.pids[order], gallery.camids[order])
    results = rank_sides(query, gallery)
    for name, weights in SETTINGS.items():
        expected = plain_reference(query, gallery, weights)
        for convention, ranking in results[name].items():
            np.testing.assert_allclose(ranking.ap, expected[convention], atol=1e-12)
            np.testing.assert_allclose(ranking.inp, expected["inp"], atol=1e-12)
            assert ranking.first.tolist() == expected["first"].tolist()


def test_the_two_kinds_of_features_are_good_and_at_chance_level():
    found = measure_speed(30, 800, 64, repeats=1, sample=3)
    assert min(found["good"]["mAP"].values()) > 0.5
    assert max(found["chance"]["mAP"].values()) < 0.15
    for kind in KINDS:
        assert {len(seconds) for seconds in found[kind]["seconds"].values()} == {1}


def test_ratios_are_taken_round_by_round():
    assert median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == 3.0


def run(*arguments, folder, name="ranking"):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--results", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path):
    sizes = ["--queries", "10", "--gallery", "200", "--dim", "16", "--repeats", "1", "--sample", "2"]
    done = run(*sizes, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(found) == ["ranking-memory", "ranking-rerank", "ranking-speed"]
    for result in found.values():
        assert result["sizes"] == {"queries": 10, "gallery": 200, "dim": 16}
        assert {"date", "cpu", "cores", "load", "numpy", "python"} <= set(result["machine"])
        assert platform.node() not in json.dumps(result["machine"]).split('"')
    assert found["ranking-memory"]["features"] == 210 * 16 * 4
    assert 0 < found["ranking-memory"]["beyond_features"] < 2e9
    assert found["ranking-rerank"]["images"] == 210
    assert found["ranking-speed"]["good"]["ranking / bare product"] > 0


def test_bad_sizes_are_one_line(tmp_path):
    for option, value in (("--dim", "3"), ("--repeats", "0"), ("--gallery", "5")):
        done = run(option, value, folder=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {option} {value}: must be") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- loader and features


def test_the_plain_pairs_are_the_loaders(tiny_data):
    """One pixel of an image's middle tells which image it is and how it was mirrored and moved."""
    images = read_split(tiny_data, "train_all", need_names=False)
    plain = PlainPairs(images)
    x, xp = plain.batch(8)
    assert x.shape == xp.shape == (8, 3, 256, 128) and x.dtype == torch.float32
    torch.manual_seed(0)
    whole = normalise(resized(images.paths[3], 256, 128)[None])
    padded = torch.nn.functional.pad(whole, (10, 10, 10, 10), mode="replicate")
    places = torch.cat(
        [view.unfold(2, 256, 1).unfold(3, 128, 1).flatten(2, 3)[0, 0] for view in (padded, padded.flip(3))]
    )
    found = plain.read(3)[0]
    assert (places == found).flatten(1).all(1).sum() >= 1


def test_speeds_of_the_loader_are_of_the_same_images(tiny_data):
    images = read_split(tiny_data, "train_all", need_names=False)
    found = measure_loading(images, CPU, batch_size=4, batches=1, repeats=2)
    assert list(found["images/s"]) == list(found["times plain"]) == ["plain", "files", "source", "resized"]
    assert found["images per round"] == 8 and found["times plain"]["plain"] == 1
    assert found["cache_mb"] == {
        "source": len(images) * 3 * 128 * 64 / 1e6,
        "resized": len(images) * 3 * 256 * 128 / 1e6,
    }
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}


def test_the_plain_loops_features_are_ours(tiny_data):
    torch.manual_seed(0)
    net = build_id_net("AB", 4, backbone="resnet10w8").eval()
    paths = read_split(tiny_data, "query").paths
    plain = plain_features(net, paths, 64, 32, CPU)
    ours = extract_features(net, paths, height=64, width=32, batch_size=5, device=CPU, progress=False)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.fixture
def run_here(monkeypatch, tmp_path, one_thread):
    """A benchmark in this process, which has imported what it needs; returns its exit status."""

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--results", str(tmp_path), "--device", "cpu", *options])
        with pytest.raises(SystemExit) as stop:
            run_cli(module.main)
        return stop.value.code or 0

    return run


def test_command_line_of_the_loader(tmp_path, run_here, capsys):
    assert run_here(loader, "--quick", "--identities", "4", "--repeats", "1", "--runs", "demo-teacher") == 0
    result = json.loads((tmp_path / "loader.json").read_text())
    assert {"date", "cpu", "cores", "load"} <= set(result["machine"]) and result["device"] == "cpu"
    assert result["speed"]["images/s"].keys() == {"plain", "files", "source", "resized"}
    share = result["share"]["demo-teacher"]
    assert 0 <= share["share waited"] < 1 and len(share["steps"]) == len(share["waited"]) == 2
    assert capsys.readouterr().out.count("\n") == 9
    assert run_here(loader, "--batches", "0") == 2
    assert capsys.readouterr().err == "error: --batches 0: must be at least 1\n"


def test_command_line_of_the_features(tmp_path, run_here, monkeypatch, capsys):
    monkeypatch.setattr(features, "has_bf16", lambda device: False)
    assert features.precisions(CPU) == ["fp32"]
    monkeypatch.setattr(features, "has_bf16", lambda device: True)
    assert run_here(features, "--quick", "--images", "4", "--repeats", "1") == 0
    result = json.loads((tmp_path / "features.json").read_text())
    assert {"date", "cpu", "cores", "load"} <= set(result["machine"]) and result["device"] == "cpu"
    speed = result["speed"]["demo"]
    assert speed["images/s"].keys() == {"plain", "fp32", "bf16"} and speed["images"] == 4
    assert speed["least cosine to plain"]["fp32"] > 0.9999
    assert capsys.readouterr().out.count("\n") == 6
    assert run_here(features, "--images", "0") == 2
    assert capsys.readouterr().err == "error: --images 0: must be at least 1\n"


def test_speed_of_generating(tmp_path, monkeypatch):
    """In the size of `benchmarks.all`."""
    options = [*all_benchmarks.GENERATE, "--count", "3", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["generate", *options, "--results", str(tmp_path)])
    generate.main()
    found = json.loads((tmp_path / "generate-cpu.json").read_text())
    (nets,), (command,) = found["images/s, nets alone"], found["images/s, whole command"]
    assert 0 < command < nets and found["whole command / nets alone"] == round(command / nets, 3)
    assert found["count"] == 3 and "cores" in found["machine"]
    assert run("--count", "0", folder=tmp_path, name="generate").stderr == "error: --count 0: must be at least 1\n"


def test_all_benchmarks_go_on_after_one_that_fails(tmp_path, run_here, monkeypatch, capfd):
    monkeypatch.setattr(all_benchmarks, "RANKING", "--only speed --queries 5 --gallery 50 --dim 16 --sample 2".split())
    monkeypatch.setattr(all_benchmarks, "GENERATE", ["--count", "0"])
    (tmp_path / "loader.json").write_text('{"speed": "of another day"}')
    assert run_here(all_benchmarks, "--only", "generate", "ranking") == 2
    written = capfd.readouterr()
    assert "ranking, good features" in written.out and "error: --count 0: must be at least 1" in written.err
    assert f"error: benchmarks.generate: failed, see above; the other results are in {tmp_path}" in written.err
