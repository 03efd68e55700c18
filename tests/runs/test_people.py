"""Whose classes: nets and images made from another data set are refused, though the numbers agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_DGNET, TINY_TEACHER, merged

from data.folders import read_split
from data.people import People, identify_people
from files import digest_files
from mannequins.dataset import make_dataset

pytestmark = pytest.mark.usefixtures("one_thread")
# Losses that need the teacher from the first step on.
DGNET = merged(TINY_DGNET, dict(teacher="tutor", teacher_w=0.5, max_iter=2, warm_scale=0))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many identities as `tiny_data` has."""
    folder = tmp_path_factory.mktemp("strangers") / "mannequins"
    make_dataset(folder, preset="tiny", seed=9)
    return folder


@pytest.fixture
def train(script: Any, tmp_path: Path) -> Any:
    def run(config: dict[str, Any], name: str, data: Path, *options: object, **settings: Any) -> Any:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config | dict(data_root=str(data))))
        where = ("--name", name, "--output_path", tmp_path, "--device", "cpu", "--threads", 1)
        changes = [f"{key}={value}" for key, value in settings.items()]
        return script("train", "--config", tmp_path / f"{name}.yaml", *where, *options, "--set", "seed=0", *changes)

    return run


def copied(data: Path, to: Path) -> Path:
    shutil.copytree(data, to)
    return to


def renamed(data: Path, to: Path) -> Path:
    """A copy in which the first identity has become the last one."""
    folder = copied(data, to) / "bounding_box_train"
    first = min(path.name.split("_")[0] for path in folder.iterdir())
    for path in folder.glob(f"{first}_*"):
        path.rename(path.with_name(f"9000{path.name[4:]}"))
    return to


def test_a_copy_has_the_same_people_and_others_do_not(tiny_data: Path, strangers: Path, tmp_path: Path) -> None:
    def people(root: Path, split: str = "train_all") -> People:
        images = read_split(root, split, need_names=False)
        return identify_people(images, digest_files(images.paths), root)

    here = people(tiny_data)
    assert people(copied(tiny_data, tmp_path / "elsewhere")).mark == here.mark
    assert people(tiny_data, "train").are(here) and here.are(people(tiny_data, "train"))
    assert not people(strangers).are(here) and not here.are(people(strangers))
    assert not people(renamed(tiny_data, tmp_path / "renamed")).are(here)
    # The same names with the pictures of strangers.
    theirs = People("-".join([here.mark.split("-")[0], *people(strangers).mark.split("-")[1:]]), "theirs")
    assert not here.are(theirs) and not theirs.are(here)


def test_a_teacher_of_other_people(train: Any, tiny_data: Path, strangers: Path, tmp_path: Path) -> None:
    assert train(TINY_TEACHER | dict(epochs=1), "tutor", strangers).code == 0
    for settings in ({}, dict(id_init="teacher")):
        error = train(DGNET, "pupil", tiny_data, **settings).error
        assert str(strangers) in error and str(tiny_data) in error and "trust_classes" in error
    assert not (tmp_path / "outputs" / "pupil").exists()
    assert train(DGNET, "pupil", strangers).code == 0
    assert train(DGNET, "pupil2", tiny_data, trust_classes="true").code == 0
    # A teacher of an earlier version, or the release's, does not say.
    opts = tmp_path / "models" / "tutor" / "opts.yaml"
    opts.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(opts.read_text()).items() if k != "classes"}))
    outcome = train(DGNET, "pupil3", tiny_data)
    assert outcome.code == 0 and "tutor" in outcome.err


def test_a_run_is_not_resumed_on_other_people(train: Any, tiny_data: Path, strangers: Path, tmp_path: Path) -> None:
    alone = DGNET | dict(teacher_w=0, max_teacher_w=0)
    assert train(alone, "run", tiny_data).code == 0
    for data in (strangers, renamed(tiny_data, tmp_path / "renamed")):
        error = train(alone, "run", data, "--resume", max_iter=3).error
        assert str(data) in error and str(tiny_data) in error and "trust_classes" in error
    assert train(alone, "run", copied(tiny_data, tmp_path / "moved"), "--resume", max_iter=3).code == 0
    assert train(alone, "run", strangers, "--resume", max_iter=4, trust_classes="true").code == 0


def test_generated_images_of_other_people(
    train: Any, script: Any, tiny_data: Path, strangers: Path, tmp_path: Path
) -> None:
    assert train(DGNET | dict(teacher_w=0, max_teacher_w=0), "run", strangers).code == 0
    assert train(TINY_TEACHER | dict(epochs=1), "tutor", tiny_data).code == 0
    common = ("--name", "run", "--output_path", tmp_path, "--device", "cpu", "--threads", 1, "--count", 8)
    error = script("generate", *common, "--out", tmp_path / "refused", "--teacher", "tutor").error
    assert str(strangers) in error and str(tiny_data) in error and "--trust-classes" in error
    assert script("generate", *common, "--out", tmp_path / "made", "--no-soft-labels").code == 0
    settings = json.loads((tmp_path / "made" / "generate.json").read_text())
    images = read_split(strangers, "train_all")
    assert settings["identities"] == identify_people(images, digest_files(images.paths), strangers).mark
    assert settings["classes"] is None
    more = dict(extra_data=tmp_path / "made", epochs=1)
    error = train(TINY_TEACHER, "learner", tiny_data, **more).error
    assert str(strangers) in error and str(tiny_data) in error and "trust_classes" in error
    assert train(TINY_TEACHER, "learner", strangers, **more).code == 0
    # What is left out of the generated images is said, too.
    path = next((tmp_path / "made").rglob("*.jpg"))
    path.write_bytes(path.read_bytes()[:100])
    outcome = train(TINY_TEACHER, "sound", strangers, **more, skip_bad_images="true")
    (warning,) = (line for line in outcome.err.splitlines() if path.name in line)
    reading = json.loads((tmp_path / "outputs" / "sound" / "reading.json").read_text())
    assert outcome.code == 0 and "1 file" in warning and reading["read"]["extra_data"]["images"] == 7
