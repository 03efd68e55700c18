"""FID, KID, SSIM and LPIPS of folders: closed forms, the protocol, missing weights, folders that cannot be scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, Outcome, noise, tiny_teacher_config
from PIL import Image

from data.folders import read_people
from data.images import iter_images
from files import write_json
from gen_eval.metrics import Protocol, draw_pairs, frechet_distance, load_inception, load_lpips, score
from gen_eval.score import print_scores
from reIDmodel import build_teacher
from runs.folder import RunFolder
from runs.load import save_teacher
from utils import UserError
from visual_tools.tables import generation_tables

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """PyTorch's cache, empty, on a machine without a network."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return tmp_path / "cache" / "checkpoints"


def colours(x: torch.Tensor) -> torch.Tensor:
    """The small feature network: the mean of every channel."""
    return x.float().mean((2, 3))


def people(folder: Path, count: int = 3, images: int = 3) -> Path:
    """A folder of images named like Market-1501's."""
    for pid in range(1, count + 1):
        for k in range(images):
            noise(folder / f"{pid:04d}_c1s1_{k:06d}_01.png", size=(32, 64))
    return folder


def test_fid_of_gaussians_is_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    m, s = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.5])
    a, b = rng.normal(size=(40000, 3)), m + s * rng.normal(size=(40000, 3))
    expected = (m**2).sum() + ((s - 1) ** 2).sum()
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)


def test_scores_of_folders_by_a_small_network(tmp_path: Path) -> None:
    rng, values = np.random.default_rng(0), {}
    for side, mean, deviation in (("real", (120, 100, 90), 12.0), ("fake", (130, 100, 110), 6.0)):
        values[side] = rng.normal(mean, deviation, (150, 3)).round().clip(0, 255)
        (tmp_path / side).mkdir()
        for k, row in enumerate(values[side]):
            image = np.broadcast_to(row.astype(np.uint8), (40, 20, 3))
            Image.fromarray(image).save(tmp_path / side / f"{1 + k // 3:04d}_c1s1_{k:06d}_01.png")
    sides = {side: read_people(tmp_path / side) for side in ("real", "fake")}

    def level(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() - b.float()).abs().mean((1, 2, 3))

    how = dict(network=colours, lpips=level)
    scores, missing = score(sides, Protocol(pairs=40, batch_size=16), CPU, real_vs_real=True, **how)
    real, fake = scores["real"], scores["fake"]
    assert missing == []
    assert fake["fid"] == pytest.approx(frechet_distance(*map(torch.from_numpy, values.values())), rel=1e-6)
    assert 0 <= real["fid"] < 0.1 * fake["fid"] and abs(real["kid"]) < fake["kid"]
    assert real["lpips"] > 1.3 * fake["lpips"]  # twice the deviation
    assert scores == score(sides, Protocol(pairs=40, batch_size=16), CPU, real_vs_real=True, **how)[0]
    some = score(sides, Protocol(pairs=4, count=20), CPU, **how)[0]
    assert some["real"]["images"] == some["fake"]["images"] == 20 and some["fake"]["fid"] != fake["fid"]
    with pytest.raises(UserError, match="--count"):
        score(sides, Protocol(count=151), CPU, **how)


def test_pairs_are_of_one_identity_and_all_equally_likely() -> None:
    pids = np.array([5, 2, 5, 9, 2, 5])
    pairs = draw_pairs(pids, 6000, seed=1)
    assert (pids[pairs[:, 0]] == pids[pairs[:, 1]]).all() and (pairs[:, 0] != pairs[:, 1]).all()
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    expected = {2: 1 / 4, 5: 1 / 12}  # identities alike, then their 2 and 6 ordered pairs
    assert len(found) == 8
    assert counts / 6000 == pytest.approx([expected[pids[i]] for i, _ in found], abs=0.02)
    with pytest.raises(UserError):
        draw_pairs(np.array([1, 2, 3]), 5, seed=0)


def test_without_weights_the_others_still_run(script: Script, no_weights: Path, tmp_path: Path) -> None:
    real, fake, out = people(tmp_path / "real"), people(tmp_path / "fake", images=2), tmp_path / "score.json"
    done = script("gen_eval/score", "--real", real, "--fake", fake, "--pairs", 5, "--out", out, "--real-vs-real")
    assert done.code == 0, done.err
    for name in ("weights-inception-2015-12-05-6726825d.pth", "alexnet-owt-7be5be79.pth"):
        assert sum(name in line and str(no_weights) in line for line in done.out.splitlines()) == 1
    written = json.loads(out.read_text())
    assert 0 < written["scores"]["fake"]["ssim"] <= 1 and "fid" not in written["scores"]["fake"]
    assert len(written["not_computed"]) == 2 and written["protocol"]["fake"]["images"] == 6
    assert set(written["ratio_to_real"]) == {"ssim"}
    assert f"{written['scores']['real']['ssim']:.3f}" in done.out
    for k in range(3):
        noise(tmp_path / "loose" / f"{k}.png")
    alone = ("--real", tmp_path / "loose", "--fake", tmp_path / "loose")
    error = script("gen_eval/score", *alone).error
    assert "6726825d" in error


def test_ratios_to_real_are_printed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The real row has an FID only where it was halved."""
    level = lambda a, b: (a.float() - b.float()).abs().mean((1, 2, 3))  # noqa: E731
    monkeypatch.setattr("gen_eval.metrics.load_inception", lambda *_: colours)
    monkeypatch.setattr("gen_eval.metrics.load_lpips", lambda *_: level)
    sides = {"real": read_people(people(tmp_path / "real")), "fake": read_people(people(tmp_path / "fake", images=2))}
    run = RunFolder(tmp_path, "run")
    for halves, keys in ((False, {"ssim", "lpips"}), (True, {"fid", "ssim", "lpips"})):
        result = print_scores(sides, Protocol(pairs=5), CPU, real_vs_real=halves)
        scores, ratio = result["scores"], result["ratio_to_real"]
        assert ratio == {key: scores["fake"][key] / scores["real"][key] for key in keys}
        (printed,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["fake", "/"])
        assert f"{ratio['ssim']:.2f}" in printed
        write_json(run.path / f"score-{halves}.json", result)
    alone = print_scores({"real": sides["real"]}, Protocol(pairs=5), CPU, real_vs_real=True)
    assert alone["ratio_to_real"] == {}
    write_json(run.path / "score.json", alone)
    tables = generation_tables(run)  # one for each file
    assert [[row[0] for row in table.rows] for table in tables] == [["real"], *[["real", "fake", "fake / real"]] * 2]
    assert all(len(row) == len(table.heads) for table in tables for row in table.rows)


def test_weights_that_are_none(no_weights: Path) -> None:
    no_weights.mkdir(parents=True)
    names = {"weights-inception-2015-12-05-6726825d.pth": load_inception, "alexnet-owt-7be5be79.pth": load_lpips}
    for name, load in names.items():
        (no_weights / name).write_bytes(b"no weights")
        with pytest.raises(UserError, match=name):
            load(CPU)
        torch.save({"a": torch.zeros(1)}, no_weights / name)
        with pytest.raises(UserError, match=name):
            load(CPU)


def test_lpips_by_its_library(no_weights: Path) -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    no_weights.mkdir(parents=True)
    torch.save(alexnet(weights=None).state_dict(), no_weights / "alexnet-owt-7be5be79.pth")
    lpips = load_lpips(CPU)
    x = torch.randint(0, 256, (2, 3, 64, 32), dtype=torch.uint8)
    assert lpips(x, x).tolist() == [0, 0]
    assert (lpips(x, 255 - x) > 0).all() and lpips(x, 255 - x).shape == (2,)


def test_what_cannot_be_scored(script: Script, no_weights: Path, tmp_path: Path) -> None:
    good, bad = people(tmp_path / "good"), tmp_path / "bad"
    run = lambda *arguments: script("gen_eval/score", "--real", good, *arguments).error  # noqa: E731
    assert f"--fake {bad}" in run("--fake", bad)
    bad.mkdir()
    assert f"--fake {bad}" in run("--fake", bad)
    noise(bad / "0001_c1s1_000001_01.png")
    assert f"--fake {bad}" in run("--fake", bad)  # a single image
    (bad / "0002_c1s1_000001_01.jpg").write_text("no image")
    assert "0002_c1s1_000001_01.jpg" in run("--fake", bad)
    assert "--count" in run("--fake", good, "--count", 10)
    assert "--fake" in run()
    assert "--size" in run("--fake", good, "--size", 16, 64)
    assert "--pairs" in run("--fake", good, "--pairs", 0)
    assert "--split" in run("--fake", good, "--split", "query")


def test_a_teacher_in_the_place_of_inception(script: Script, no_weights: Path, tmp_path: Path) -> None:
    """FID is that of its pooled trunk at its own size, named in the protocol; a missing teacher is one line."""
    run = RunFolder(tmp_path, "small")
    cfg = tiny_teacher_config(crop_image_height=64, crop_image_width=32)
    net = build_teacher(3, backbone=cfg.backbone, stride=cfg.stride)
    run.model.mkdir(parents=True)
    save_teacher(run, cfg, net, 3)
    real, fake = people(tmp_path / "real"), people(tmp_path / "fake", count=2)
    options = ("--real", real, "--fake", fake, "--output_path", tmp_path, "--out", tmp_path / "s.json")
    done = script("gen_eval/score", *options, "--teacher", "small")
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "s.json").read_text())
    assert "small" in written["protocol"]["fid"] and written["protocol"]["size"] == [64, 32]
    features = []
    for folder in (real, fake):
        (x,) = iter_images(read_people(folder).paths, 64, 32, 32)
        with torch.no_grad():
            features.append(net.eval().feature_map(x).mean((2, 3)).double())
    assert written["scores"]["fake"]["fid"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    missing = script("gen_eval/score", *options, "--teacher", "none")
    assert missing.code == 2 and "none" in missing.err
