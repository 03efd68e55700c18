"""What lies in a data set and is not read is said, with counts that an independent look at the folders confirms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_DGNET, TINY_TEACHER, logged, noise
from PIL import Image

from data.folders import read_people, read_split
from data.images import check_images
from data.listing import say_reading
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_said_before() -> None:
    say_reading({})


def left_out(reading: dict[str, Any]) -> int:
    return sum(row["count"] for row in reading["left_out"].values())


def as_format(path: Path, suffix: str) -> Path:
    """The same picture in another file format, in the place of the old file."""
    new = path.with_suffix(suffix)
    with Image.open(path) as image:
        image.convert("RGB").save(new, format="JPEG" if suffix in ("", ".jfif") else None)
    path.unlink()
    return new


# ------------------------------------------------------------------------------------------------ listing
def test_other_formats_give_the_same_lists(tiny_data: Path, tmp_path: Path) -> None:
    """Half of a gallery saved in other formats is the whole gallery."""
    shutil.copytree(tiny_data, tmp_path / "data")
    before = read_split(tmp_path / "data", "gallery")
    suffixes = [".webp", ".tif", ".tiff", ".jfif", ".gif", "", ".PNG"]
    for i, path in enumerate(before.paths[::2]):
        as_format(path, suffixes[i % len(suffixes)])
    after = read_split(tmp_path / "data", "gallery")
    assert after.pids.tolist() == before.pids.tolist() and after.camids.tolist() == before.camids.tolist()
    assert {path.suffix for path in after.paths} >= set(suffixes)
    check_images(after.paths, skip_bad=False)
    assert left_out(say_reading({"gallery": after})) == 0


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "train_all"
    for person in ("0001", "0002"):
        for i in range(3):
            noise(root / person / f"{person}_c1_{i}.jpg")
    noise(root / "0001" / "more" / "0001_c2_1.jpg")
    noise(root / "0001" / "more" / "still" / "0001_c2_2.webp")
    (root / "0002" / "IMG_1.heic").write_bytes(b"no HEIF plugin here")
    (root / "0002" / "film.mp4").write_bytes(b"film")
    (root / "0002" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for clutter in ("Thumbs.db", ".DS_Store", "._0002_c1_0.jpg", "desktop.ini", "notes.txt"):
        (root / "0002" / clutter).write_bytes(b"x")
    (root / "0003").mkdir()
    images = read_split(tmp_path, "train_all", need_names=False)
    assert len(images) == 7, "the dangling link is an unreadable image"
    images = images.select(check_images(images.paths, skip_bad=True))
    caplog.clear()
    reading = say_reading({"train_all": images})
    files = {path for path in root.rglob("*") if path.is_symlink() or path.is_file()}
    hidden = {path for path in files if path.name.startswith(".")}
    mentioned = files - hidden - {root / "0002" / name for name in ("Thumbs.db", "desktop.ini", "notes.txt")}
    assert left_out(reading) == len(mentioned) - len(images) == 5
    assert sorted(row["count"] for row in reading["left_out"].values()) == [1, 1, 1, 2]
    assert reading["read"] == {"train_all": {"images": 6, "identities": 2, "cameras": 1}}
    first, second = logged(caplog).splitlines()
    assert "6 images" in first and "5 files" in second
    for name in ("IMG_1.heic", "film.mp4", "gone.jpg", "0001_c2_1.jpg", "0003"):
        assert name in second
    assert say_reading({"train_all": images})["left_out"] == {}, "said once"


def test_preparing_says_what_it_leaves_in_a_folder_of_people(script: Any, tmp_path: Path) -> None:
    for person in ("anna", "bob", "carl", "dora"):
        for i in range(3):
            noise(tmp_path / person / f"{person}{i}.png")
    noise(tmp_path / "anna" / "more" / "x.png")
    (tmp_path / "bob" / "film.mp4").write_bytes(b"film")
    outcome = script("prepare", "--dataset", "folder", "--data_root", tmp_path)
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("read: ")]
    assert "train_all 6 images of 2 identities" in line
    (warning,) = [line for line in outcome.err.splitlines() if "2 files" in line]
    assert "x.png" in warning and "film.mp4" in warning and "identities.csv" in warning


# -------------------------------------------------------------------------------------------- identity 0
def test_identity_0_is_a_person_where_it_trains_in_either_layout(tmp_path: Path) -> None:
    for name in ("0000_c1s1_1.jpg", "0000_c2s1_2.jpg", "0001_c1s1_1.jpg", "-1_c1s1_1.jpg"):
        noise(tmp_path / "flat" / "bounding_box_train" / name)
        noise(tmp_path / "sorted" / "train_all" / name.partition("_")[0] / name)
    for root in ("flat", "sorted"):
        images = read_split(tmp_path / root, "train_all")
        assert images.pids.tolist() == [0, 0, 1] and images.classes == ["0000", "0001"]
        reading = say_reading({"train_all": images})
        assert left_out(reading) == 1 and " 2 " in reading["assumed"][0]


def test_identity_0_is_a_distractor_in_a_gallery_and_a_person_with_queries(tmp_path: Path) -> None:
    for name in ("0000_c1s1_1.jpg", "0001_c1s1_1.jpg", "0001_c2s1_1.jpg"):
        noise(tmp_path / "bounding_box_test" / name)
    noise(tmp_path / "query" / "0001_c3s1_1.jpg")
    assert read_people(tmp_path, "gallery").pids.tolist() == [1, 1]
    assert say_reading({})["assumed"] == []
    noise(tmp_path / "query" / "0000_c2s1_1.jpg")
    assert read_people(tmp_path, "query").pids.tolist() == [0, 1]
    assert " 1 " in say_reading({})["assumed"][0]


# ------------------------------------------------------------------------------------------ whose image
def test_the_folder_decides_whose_image_it_is(tmp_path: Path) -> None:
    for split in ("train_all", "query", "gallery"):
        for person in ("0001", "0002"):
            for camera in (1, 2):
                noise(tmp_path / split / person / f"{person}_c{camera}_1.jpg")
        wrong = tmp_path / split / "0001" / "0001_c2_1.jpg"
        wrong.rename(tmp_path / split / "0002" / wrong.name)
        images = read_split(tmp_path, split)
        assert images.pids.tolist() == [1, 2, 2, 2]
        assert images.camids.tolist() == [1, 2, 1, 2]
        (assumed,) = say_reading({split: images})["assumed"]
        assert assumed.startswith("1 ") and "0002/0001_c2_1.jpg" in assumed


@pytest.mark.parametrize("names", [("7", "0007"), ("anna", "Anna"), ("anna b", "annab")])
def test_two_folders_of_one_person_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    people = tmp_path / "data" / "train_all"
    for person in names:
        noise(people / person / "a.jpg")
    for read in (lambda: read_split(tmp_path / "data", "train_all", need_names=False), lambda: read_people(people)):
        with pytest.raises(UserError) as error:
            read()
        assert all(str(people / name) in str(error.value) for name in names)


# ----------------------------------------------------------------------------------------- the commands
def test_every_command_says_what_it_read(script: Any, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    as_format(min((data / "bounding_box_train").iterdir()), ".webp")
    for folder in ("bounding_box_train", "bounding_box_test", "query"):
        (data / folder / "film.mp4").write_bytes(b"film")
    n = {folder: len(list((data / folder).iterdir())) - 1 for folder in ("bounding_box_train", "query")}
    config = TINY_DGNET | dict(data_root=str(data), max_iter=1, teacher_style=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    where = ("--name", "run", "--output_path", tmp_path, "--device", "cpu", "--threads", 1)

    def said(name: str, *options: object) -> str:
        outcome = script(name, *options)
        assert outcome.code == 0, outcome.err
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("read: ")]
        (warning,) = [line for line in outcome.err.splitlines() if "film.mp4" in line]
        assert warning.startswith("warning: ")
        return line

    assert f"{n['bounding_box_train']} images" in said("train", "--config", tmp_path / "run.yaml", *where)
    reading = json.loads((tmp_path / "outputs" / "run" / "reading.json").read_text())
    assert reading["read"]["train_all"]["images"] == n["bounding_box_train"] and left_out(reading) == 1
    assert f"query {n['query']} images" in said("test", *where)
    reading = json.loads((tmp_path / "outputs" / "run" / "reid.json").read_text())["reading"]
    assert reading["read"]["query"]["images"] == n["query"] and left_out(reading) == 2
    out = ("--out", tmp_path / "made", "--no-soft-labels", "--count", 2)
    assert f"{n['bounding_box_train']} images" in said("generate", *where, *out)
    said("visual_tools/show_rainbow", *where, "--count", 3)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(TINY_TEACHER | dict(data_root=str(data), epochs=1)))
    options = ("--config", tmp_path / "teacher.yaml", "--output_path", tmp_path, "--device", "cpu", "--dry-run")
    said("train", *options)
