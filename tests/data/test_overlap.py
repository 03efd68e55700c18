"""People and pictures that are in training and test at once are said by prepare.py and test.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, noise, tiny_config, tiny_trainer

from data.folders import read_split
from data.listing import say_reading
from data.overlap import note_overlap_in
from runs.folder import RunFolder, start_folder
from runs.snapshot import save_snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def nothing_said_before() -> None:
    say_reading({})


def assumed(root: Path) -> list[str]:
    note_overlap_in(root, {split: read_split(root, split, need_names=False) for split in ("query", "gallery")})
    return say_reading({})["assumed"]


def data_set(root: Path, people: dict[str, tuple[str, ...]]) -> Path:
    """Two images of each person, by split; every picture is another."""
    for split, names in people.items():
        for name in names:
            for camera in (1, 2):
                noise(root / split / name / f"{name}_c{camera}_{split}.png")
    return root


def test_nothing_shared_is_nothing_said(tiny_data: Path, tmp_path: Path) -> None:
    assert assumed(tiny_data) == []
    root = data_set(tmp_path, {"train_all": ("0001", "0002"), "query": ("0003",), "gallery": ("0003", "0000", "-1")})
    assert assumed(root) == []
    noise(root / "train_all" / "0002" / "deeper" / "x.png")  # left out of what is not read here
    (root / "train_all" / "0002" / "film.mp4").write_bytes(b"film")
    assert assumed(root) == [] and say_reading({})["left_out"] == {}
    shutil.rmtree(root / "train_all")
    assert assumed(root) == []


@pytest.mark.parametrize(("ours", "theirs"), [("0001", "0001"), ("1", "0001"), ("anna", "Anna"), ("0000", "0000")])
def test_the_same_person_by_name(tmp_path: Path, ours: str, theirs: str) -> None:
    people = {"train_all": (ours, "0002"), "query": (theirs,), "gallery": (theirs, "0005")}
    root = data_set(tmp_path, people)
    if theirs == "0000":  # a person who has queries; among distractors alone it is nobody
        (people,) = (line for line in assumed(root) if "train_all" in line)
        shutil.rmtree(root / "query" / theirs)
        noise(root / "query" / "0005" / "0005_c3_1.png")
        assert assumed(root) == []
        return
    (people,) = assumed(root)
    assert people.startswith("1 ")
    assert str(root / "train_all" / ours) in people and str(root / "query" / theirs) in people


def test_identities_numbered_by_half_are_not_compared(tmp_path: Path) -> None:
    for split, camera in (("train_all", 1), ("query", 2), ("gallery", 3)):
        noise(tmp_path / split / "0001" / f"0001_c{camera}_0000_003_0{camera}_0113noon_0001_0.jpg")
    assert assumed(tmp_path) == []


def test_the_same_picture(tmp_path: Path) -> None:
    root = data_set(tmp_path, {"train_all": ("0001", "0002"), "query": ("0003",), "gallery": ("0003", "0004")})
    copies = ("0003/0003_c3_x.png", "0004/0004_c4_x.png")
    shutil.copy(root / "train_all" / "0001" / "0001_c1_train_all.png", root / "query" / copies[0])
    os.link(root / "train_all" / "0002" / "0002_c2_train_all.png", root / "gallery" / copies[1])
    (pictures,) = assumed(root)
    assert pictures.startswith("2 ")
    assert str(root / "query" / copies[0]) in pictures and "train_all/0001" in pictures


def test_the_commands_say_it(script: Script, tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    train, query = (sorted((root / folder).glob("0*")) for folder in ("bounding_box_train", "query"))
    person = query[0].name.partition("_")[0]
    shutil.copy(train[0], root / "bounding_box_train" / f"{person}_c1s1_999999_01{train[0].suffix}")
    shutil.copy(train[1], root / "query" / f"{person}_c1s1_999998_01{train[1].suffix}")
    cfg, run = tiny_config(data_root=str(root)), RunFolder(tmp_path, "run")
    start_folder(run, cfg, resume=False)
    save_snapshot(run.checkpoints, tiny_trainer(cfg), 1)

    def warned(*arguments: Any) -> tuple[int, int]:
        done = script(*arguments)
        assert done.code == 0, done.err
        (line,) = [line for line in done.err.splitlines() if train[1].name in line]
        assert line.startswith("warning: ")
        return line.count("train_all are in"), line.count(str(root / "query"))

    assert warned("prepare", "--dataset", "market1501", "--data_root", root) == (2, 2)
    shutil.rmtree(root / "pytorch")
    assert warned("test", "--name", "run", "--output_path", tmp_path, "--device", "cpu") == (2, 2)
