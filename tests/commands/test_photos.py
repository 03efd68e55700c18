"""The ablation on photographs that are split by people, here on drawings without their factors."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.folders import ImageList, check_test_set, read_split
from studies.ablation import __main__ as ablation
from studies.ablation import split
from studies.ablation.cells import PRESETS
from utils import run_cli

pytestmark = pytest.mark.usefixtures("one_thread")


def run(command, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """The exit status of a command's `main` with these options."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        run_cli(command.main)
    return stop.value.code or 0


@pytest.fixture
def halves(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The eight training identities of the drawings: four to train on, two to validate, two to test."""
    options = ("--images", tiny_data / "bounding_box_train", "--out", tmp_path / "split", "--val", 2, "--test", 2)
    for _ in range(2):  # the second time changes nothing
        assert run(split, monkeypatch, *options) == 0
    return tmp_path / "split"


def people(images: ImageList) -> set[int]:
    return set(images.pids.tolist())


def test_a_split_divides_the_people(halves: Path, tiny_data: Path):
    whole = read_split(tiny_data, "train_all")
    train = {half: read_split(halves / half, "train_all") for half in ("val", "test")}
    assert [path.name for path in train["val"].paths] == [path.name for path in train["test"].paths]
    groups = [people(train["val"])]
    for half in ("val", "test"):
        query, gallery = (read_split(halves / half, side) for side in ("query", "gallery"))
        seen = list(zip(gallery.pids, gallery.camids, strict=True))
        for pid, camera in zip(query.pids, query.camids, strict=True):
            assert any(p == pid and c != camera for p, c in seen)
        asked = list(zip(query.pids, query.camids, strict=True))
        assert len(asked) == len(set(asked))
        assert people(query) <= people(gallery)
        groups.append(people(gallery))
        check_test_set(halves / half)
    assert [len(group) for group in groups] == [4, 2, 2]
    assert set.union(*groups) == people(whole)


def test_a_query_needs_a_partner_under_another_camera(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["0001_c1s1_0.jpg", "0001_c2s1_0.jpg", "0001_c2s1_1.jpg", "0002_c1s1_0.jpg", "0002_c1s1_1.jpg"]
    names += [f"{pid:04d}_c{camera}s1_0.jpg" for pid in (3, 4, 5) for camera in (1, 2)]
    for name in names:
        (folder / name).touch()
    tasks = split.split_people(folder, val=0, test=3)
    asked = {image.name for image in tasks["test"].splits["query"]}
    # Of person 1, camera 2 leaves an image for the query of camera 1; nobody answers a query of camera 2. Person 2 was
    # seen by one camera; of the others no camera has two images.
    assert asked <= {"0001_c1s1_0.jpg"}
    gallery = {image.name for image in tasks["test"].splits["gallery"]}
    train = {image.name for image in tasks["test"].splits["train_all"]}
    assert asked | gallery | train == set(names) and not gallery & train


def test_the_study_chooses_on_val_and_tests_on_test(halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny = replace(PRESETS["tiny"], data=None, swaps=1000, cells=("teacher", "no_feedback"))
    monkeypatch.setitem(PRESETS, "photos", tiny)
    options = ("--preset", "photos", "--data_root", halves, "--seeds", 1, "--out", tmp_path / "out", "--device", "cpu")
    for where in ("val", "test"):
        assert run(ablation, monkeypatch, *options, "--evaluate", where) == 0
        results = json.loads((tmp_path / f"out/results-{where}.json").read_text())
        assert results["data"] == "split" and results["evaluated_on"] == where
        assert [result["cell"] for result in results["runs"]] == ["teacher", "both", "no_feedback"]
        generation = results["runs"][1]["generation"]
        assert {"rank1", "rank1_of_copy", "rank1_of_appearance", "fid", "fid_of_reconstruction"} <= set(generation)
        assert 0 <= generation["fid_of_copy"] < min(generation["fid"], generation["fid_of_reconstruction"])
        assert 0 < results["runs"][1]["reid"]["beta 0.5"]["official"]["mAP"] < 1
        root = tmp_path / "out/outputs/both-0/config.yaml"
        assert f"data_root: {halves / 'val'}" in root.read_text()


def test_refusals(halves: Path, tiny_data: Path, tmp_path: Path, monkeypatch, capsys):
    def refused(command, *options: object) -> str:
        assert run(command, monkeypatch, *options) == 2
        return capsys.readouterr().err

    study = ("--preset", "photos", "--out", tmp_path / "out", "--device", "cpu")
    assert "--data_root" in refused(ablation, *study)
    assert "--data_seed" in refused(ablation, *study, "--data_seed", 3)
    loose = tiny_data / "bounding_box_train"
    assert "studies.ablation.split" in refused(ablation, *study, "--data_root", loose)
    assert "--val" in refused(split, "--images", loose, "--out", tmp_path / "s", "--val", 4, "--test", 4)
    assert "--images" in refused(split, "--images", tmp_path / "none", "--out", tmp_path / "s")
    # The same people in both halves; then other training images.
    person = next((halves / "val/pytorch/gallery").iterdir())
    shutil.copytree(person, halves / "test/pytorch/gallery" / person.name)
    query = next((halves / "val/pytorch/query" / person.name).iterdir())
    (halves / "test/pytorch/query" / person.name).mkdir()
    shutil.copy(query, halves / "test/pytorch/query" / person.name)
    assert str(int(person.name)) in refused(ablation, *study, "--data_root", halves)
    next((halves / "test/pytorch/train_all").glob("*/*")).unlink()
    assert "training images" in refused(ablation, *study, "--data_root", halves)
