"""The interface for notebooks gives what the commands give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, HEIGHT, WIDTH, OutputFolder, load_script, make_runs
from PIL import Image

import dgnet
from data.folders import read_split
from data.images import decode_images, normalise, to_uint8
from reid_eval.features import load_features
from runs.folder import RunFolder
from runs.swapper import load_swapper
from utils import UserError
from visual_tools.hirescam import activation_maps

pytestmark = pytest.mark.usefixtures("one_thread")


def command(name: str, place: OutputFolder, *options: object) -> None:
    """Run a script of the project on the run `tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", "--name", "tiny", *map(str, place.where + options)])
        load_script(name).main()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, one_thread: None) -> OutputFolder:
    """A run `tiny`, tested and exported, and a teacher `tutor`, with random weights."""
    folder = tmp_path_factory.mktemp("dgnet")
    place = make_runs(folder, tiny_data, tiny="gray")
    command("test", place)
    command("export", place, "--out", folder / "files")
    return place


@pytest.fixture(scope="module")
def model(place: OutputFolder) -> dgnet.Model:
    return dgnet.load("tiny", output_path=str(place.folder), device="cpu")


@pytest.fixture
def paths(place: OutputFolder) -> list[Path]:
    return read_split(place.data, "query").paths


def test_features_and_tables_are_those_of_test_py(
    model: dgnet.Model, place: OutputFolder, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_features(place.folder / "outputs" / "tiny" / "reid.npz")
    assert np.array_equal(model.embed(paths), saved.query.features)
    report = dgnet.evaluate(model, place.data)
    written = json.loads((place.folder / "outputs" / "tiny" / "reid.json").read_text())
    assert report["tables"] == written["tables"] and report["reading"] == written["reading"]
    order, scores = dgnet.rank(saved.query.features, saved.gallery.features, top=7)
    by_hand = np.einsum("qhd,ghd,h->qg", saved.query.features, saved.gallery.features, [1, 0.5])
    assert order.shape == scores.shape == (len(paths), 7)
    assert np.allclose(scores, -np.sort(-by_hand)[:, :7], atol=1e-6)
    assert np.allclose(np.take_along_axis(by_hand, order, 1), scores, atol=1e-6)


def test_images_may_come_in_any_form(model: dgnet.Model, paths: list[Path]) -> None:
    image = Image.open(paths[0])
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = model.embed(str(paths[0]))
    forms = [image, array, tensor, tensor / 255, array / 255, image.convert("RGBA"), [array], array[None]]
    for form in forms:
        assert np.array_equal(model.embed(form), expected), type(form)
    gray = np.asarray(image.convert("L"))
    assert np.array_equal(model.embed(torch.from_numpy(gray.copy())), model.embed(gray))
    assert np.array_equal(model.embed(gray), model.embed(np.stack([gray] * 3, axis=-1)))
    mixed = model.embed([paths[0], array, tensor, paths[1]])
    assert mixed.shape == (4, 2, 512) and np.allclose(mixed[:3], expected, atol=1e-6)


def test_swaps_and_maps_are_those_of_the_figures(model: dgnet.Model, place: OutputFolder, paths: list[Path]) -> None:
    swapper = load_swapper(RunFolder(place.folder, "tiny"), CPU)
    x = normalise(decode_images(paths[:3], HEIGHT, WIDTH))
    pictures, expected = model.swap(paths[:3], paths[2]), to_uint8(swapper.swap(x, x[2:].expand_as(x)))
    assert pictures.dtype == np.uint8 and np.abs(pictures.astype(int) - expected).max() <= 1
    assert np.array_equal(model.attend(paths[:3]), activation_maps(swapper.id_net, x).numpy())
    with pytest.raises(UserError, match="3 images"):
        model.swap(paths[:3], paths[:2])


def test_an_index_finds_the_images_of_a_folder(model: dgnet.Model, place: OutputFolder, paths: list[Path]) -> None:
    kept = place.folder / "index"
    for _ in range(2):  # the second time from the index
        found = dgnet.open_index(model, place.data / "query", keep=kept).search(paths[:2], top=3)
        assert [answer[0][0] for answer in found] == paths[:2] and [len(answer) for answer in found] == [3, 3]
    dgnet.open_index(model, place.data / "query")
    assert list((place.folder / "outputs" / "tiny" / "search").iterdir())


def test_teachers_and_exported_nets_embed_but_do_not_swap(
    model: dgnet.Model, place: OutputFolder, paths: list[Path]
) -> None:
    teacher = dgnet.load("tutor", output_path=str(place.folder), device="cpu")
    exported = dgnet.load(place.folder / "files" / "id.onnx", device="cpu")
    assert teacher.embed(paths).shape == (len(paths), 1, 512)
    assert np.allclose(exported.embed(paths), model.embed(paths), atol=1e-5)
    for net in (teacher, exported):
        with pytest.raises(UserError, match="no generator"):
            net.swap(paths[0], paths[1])
    with pytest.raises(UserError, match="index of another model"):
        dgnet.open_index(model, place.data / "query", keep=place.folder / "other")
        dgnet.open_index(exported, place.data / "query", keep=place.folder / "other")


@pytest.mark.parametrize(
    "given,named",
    [
        ([], "no images"),
        ("missing.jpg", "missing.jpg"),
        (__file__, "test_dgnet.py"),
        (np.zeros((4, 4, 7), np.uint8), "(4, 4, 7)"),
        (np.zeros((9, 0, 3), np.uint8), "(9, 0, 3)"),
        (np.full((8, 4, 3), 3.0), "3.0"),
        ([object()], "object"),
        (None, "NoneType"),
        (np.array("x"), "()"),
    ],
)
def test_what_is_no_image_is_refused(model: dgnet.Model, given: object, named: str) -> None:
    with pytest.raises(UserError) as refusal:
        model.embed(given)
    assert named in str(refusal.value)


def test_unknown_names_are_refused(place: OutputFolder) -> None:
    for name in ("tutor", place.folder / "files" / "id.onnx"):
        with pytest.raises(UserError, match="which_epoch"):
            dgnet.load(name, output_path=str(place.folder), which_epoch=4)
    assert dgnet.load("tiny", output_path=str(place.folder), which_epoch=4).tested.iteration == 4
    for name in ("nobody", place.folder / "nothing.onnx"):
        with pytest.raises(UserError) as refusal:
            dgnet.load(name, output_path=str(place.folder))
        assert Path(name).name in str(refusal.value)
