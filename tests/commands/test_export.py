"""Exported nets compute what PyTorch computes, and files that do not belong are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from conftest import (
    CPU,
    HEIGHT,
    WIDTH,
    Outcome,
    OutputFolder,
    contents,
    load_script,
    make_runs,
    tiny_teacher_config,
)

import runs.export
from data.folders import read_split
from data.images import decode_images, normalise, to_uint8
from reid_eval.features import embed_images, load_features
from runs.folder import RunFolder
from runs.load import load_run_for_test
from runs.swapper import load_swapper

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> OutputFolder:
    return make_runs(tmp_path_factory.mktemp("export"), tiny_data, tiny="gray", edge="edge")


@pytest.fixture(scope="module")
def files(place: OutputFolder) -> Path:
    """The id net and the generator of the run `tiny`, exported."""
    out = place.folder / "files"
    with pytest.MonkeyPatch.context() as patch:
        for part in ("id", "generator"):
            patch.setattr(sys, "argv", ["export.py", "--name", "tiny", "--part", part, *map(str, place.where)])
            sys.argv += ["--out", str(out)]
            load_script("export").main()
    return out


def clean(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Warning" not in outcome.err, outcome.err
    return outcome.out


def ranked(file: Path) -> np.ndarray:
    """The first ten of the gallery for every query, (nq, 10)."""
    sides = load_features(file)
    scores = np.einsum("qhd,ghd->qg", sides.query.features, sides.gallery.features)
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


@pytest.mark.parametrize("option,name,folder", [("--name", "tiny", "outputs"), ("--teacher", "tutor", "models")])
def test_an_exported_net_has_the_same_tables(
    option: str, name: str, folder: str, place: OutputFolder, script: Script, tmp_path: Path
) -> None:
    which = option, name, *place.where
    clean(script("export", *which, "--out", tmp_path))
    clean(script("test", *which))
    clean(script("test", *which, "--model", tmp_path / "id.onnx"))
    clean(script("test", "--model", tmp_path / "id.onnx"))
    theirs, ours = (place.folder / folder / name), tmp_path / "id"
    tables = [json.loads((at / "reid.json").read_text())["tables"]["single query"] for at in (theirs, ours)]
    assert tables[0].keys() == tables[1].keys()
    for setting, conventions in tables[0].items():
        for convention, row in conventions.items():
            assert row == pytest.approx(tables[1][setting][convention], abs=1e-4)
    assert (ranked(theirs / "reid.npz") == ranked(ours / "reid.npz")).all()
    about = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "id.onnx").metadata_props}
    assert (about["height"], about["width"], about["input"], len(about["checksum"])) == (HEIGHT, WIDTH, "uint8", 64)


@pytest.mark.parametrize("form,images", [("pt2", "uint8"), ("onnx", "normalised")])
def test_features_of_any_number_of_images(
    form: str, images: str, place: OutputFolder, script: Script, tmp_path: Path
) -> None:
    clean(
        script("export", "--name", "tiny", "--format", form, "--input", images, "--out", tmp_path / "x", *place.where)
    )
    pixels = decode_images(read_split(place.data, "gallery").paths[:5], HEIGHT, WIDTH)
    expected = embed_images(load_run_for_test(RunFolder(place.folder, "tiny"), None, CPU).net, normalise(pixels))
    if form == "pt2":
        features, vector = torch.export.load(tmp_path / "x" / "id.pt2").module()(pixels.permute(0, 2, 3, 1))
    else:
        session = onnxruntime.InferenceSession(tmp_path / "x" / "id.onnx")
        features, vector = map(torch.from_numpy, session.run(None, {"images": normalise(pixels).numpy()}))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    main = expected[:, 0] @ expected[:, 0].T + 0.5 * expected[:, 1] @ expected[:, 1].T
    torch.testing.assert_close(vector @ vector.T, main / 1.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 5])
def test_exported_swaps_are_those_of_the_run(n: int, files: Path, place: OutputFolder) -> None:
    pixels = decode_images(read_split(place.data, "gallery").paths[: 2 * n], HEIGHT, WIDTH)
    clothes, people = pixels.chunk(2)
    expected = to_uint8(load_swapper(RunFolder(place.folder, "tiny"), CPU).swap(normalise(clothes), normalise(people)))
    encode, swap = (onnxruntime.InferenceSession(files / f"{part}.onnx") for part in ("encode", "swap"))
    codes = [encode.run(None, {"images": side.permute(0, 2, 3, 1).numpy()}) for side in (people, clothes)]
    found = swap.run(None, {"structure": codes[0][0], "appearance": codes[1][1]})[0]
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= 1


def test_int8_says_what_it_costs(place: OutputFolder, script: Script, tmp_path: Path) -> None:
    written = clean(script("export", "--name", "tiny", "--int8", "--out", tmp_path, *place.where))
    assert (tmp_path / "id-int8.onnx").stat().st_size < (tmp_path / "id.onnx").stat().st_size
    clean(script("test", "--model", tmp_path / "id-int8.onnx"))
    table = json.loads((tmp_path / "id-int8" / "reid.json").read_text())["tables"]["single query"]
    assert f"int8 {100 * table['both (beta 0.5)']['official']['mAP']:.2f}" in written


def test_what_differs_is_not_written(
    place: OutputFolder, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = "--name", "tiny", "--out", tmp_path, *place.where
    monkeypatch.setattr(runs.export, "embed_images", lambda net, x: embed_images(net, x) + 2e-5)
    assert "id.onnx" in script("export", *which).error
    swap = runs.export.Swapper.swap
    monkeypatch.setattr(runs.export.Swapper, "swap", lambda *images: swap(*images) + 0.1)
    assert "swap.pt2" in script("export", *which, "--part", "generator", "--format", "pt2").error
    assert not contents(tmp_path)


def test_refusals(place: OutputFolder, files: Path, script: Script, tmp_path: Path) -> None:
    where = "--out", tmp_path / "out", *place.where
    assert "--part" in script("export", "--teacher", "tutor", "--part", "generator", *where).error
    assert "edge" in script("export", "--name", "edge", "--part", "generator", *where).error
    assert "id.onnx exists" in script("export", "--name", "tiny", "--out", files, *place.where).error
    (place.folder / "outputs" / "pupil").mkdir(exist_ok=True)
    config = tiny_teacher_config(data_root=str(place.data)).model_dump()
    (place.folder / "outputs" / "pupil" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "pupil" in script("export", "--name", "pupil", "--part", "generator", *where).error
    assert not contents(tmp_path)


def test_files_of_others_are_refused(place: OutputFolder, files: Path, script: Script, tmp_path: Path) -> None:
    def error(file: Path, *options: object) -> str:
        before = contents(tmp_path)
        line = script("test", "--model", file, *options).error
        assert file.name in line and contents(tmp_path) == before
        return line

    assert "tutor" in error(files / "id.onnx", "--teacher", "tutor", *place.where)
    assert "encode" in error(files / "encode.onnx")
    error(tmp_path / "missing.onnx")
    (cut := tmp_path / "cut.onnx").write_bytes((files / "id.onnx").read_bytes()[:5000])
    error(cut)
    model = onnx.load(files / "id.onnx")
    for prop in model.metadata_props:
        prop.value = "128" if prop.key == "height" else prop.value
    onnx.save(model, tmp_path / "size.onnx")
    assert "128" in error(tmp_path / "size.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert "checksum" in error(tmp_path / "foreign.onnx")


@pytest.mark.parametrize("module", ["onnxruntime", "onnxscript"])
def test_without_the_optional_requirements(
    module: str, place: OutputFolder, files: Path, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    outcomes = [script("export", "--name", "tiny", "--out", tmp_path / "out", *place.where)]
    outcomes += [script("test", "--model", files / "id.onnx")] if module == "onnxruntime" else []
    for outcome in outcomes:
        assert module in outcome.error and "requirements-export.txt" in outcome.error
    assert not contents(tmp_path)
