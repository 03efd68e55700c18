"""The drawn data set: names, factors, swaps, determinism, refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.folders import UNFINISHED_MARK, read_split
from mannequins import dataset
from mannequins.dataset import (
    BAGS,
    GT,
    HAIR_STYLES,
    OCCLUDERS,
    QUERY,
    TEST,
    TRAIN,
    Factors,
    load_factors,
    make_dataset,
    make_settings,
    person_mask,
    render,
)
from mannequins.dataset import main as cli
from utils import UserError

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"(-1|\d{4})_c([1-6])s([1-9])_(\d{6})_(\d\d)\.jpg")
FOLDERS = (TRAIN, TEST, QUERY, GT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mannequins") / "tiny"
    make_dataset(out, seed=3, preset="tiny", occluders=0.3)
    return out


@pytest.fixture(scope="module")
def factors(folder: Path) -> Factors:
    return load_factors(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_images(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", seed=3, preset="tiny", occluders=0.3, workers=2)
    assert contents(tmp_path / "again") == contents(folder)
    make_dataset(tmp_path / "other", seed=4, preset="tiny", occluders=0.3)
    assert contents(tmp_path / "other") != contents(folder)


def test_folders_hold_the_named_images_and_the_counts_asked_for(folder: Path, factors: Factors) -> None:
    settings = factors.settings
    ids = {}
    for name in FOLDERS:
        files = sorted(p.name for p in (folder / name).iterdir())
        assert files == factors.names(name)
        assert all(NAME.fullmatch(file) for file in files)
        ids[name] = Counter(NAME.fullmatch(file)[1] for file in files)
    assert len(ids[TRAIN]) == settings.train_ids
    assert len(ids[TEST]) == settings.test_ids + 2
    assert ids[TEST]["0000"] == settings.distractors
    assert ids[TEST]["-1"] == settings.junk
    assert set(ids[QUERY]) == set(ids[GT]) == set(ids[TEST]) - {"0000", "-1"}
    assert not set(ids[TRAIN]) & set(ids[TEST])
    cameras = defaultdict(Counter)
    for file in factors.names(TRAIN):
        cameras[NAME.fullmatch(file)[1]][NAME.fullmatch(file)[2]] += 1
    assert all(settings.min_cameras <= len(seen) <= 6 and set(seen.values()) == {2} for seen in cameras.values())
    with Image.open(folder / QUERY / factors.names(QUERY)[0]) as image:
        assert image.size == (64, 128) and image.mode == "RGB"


@pytest.mark.parametrize("few", [1, 2])
def test_training_identities_seen_by_few_cameras(factors: Factors, few: int) -> None:
    plain, limited = factors, dataset._plan(make_settings(seed=3, preset="tiny", train_cameras=few))
    seen, before = defaultdict(set), defaultdict(set)
    for names, found in ((limited.names(TRAIN), seen), (plain.names(TRAIN), before)):
        for person, camera in (NAME.fullmatch(file).group(1, 2) for file in names):
            found[person].add(camera)
    assert {len(cameras) for cameras in seen.values()} == {few} and set(seen) == set(before)
    tested = defaultdict(set)  # by as many cameras as ever
    for person, camera in (NAME.fullmatch(file).group(1, 2) for file in limited.names(QUERY)):
        tested[person].add(camera)
    assert min(map(len, tested.values())) >= limited.settings.min_cameras > few
    assert limited.people == plain.people


def test_every_query_is_alone_in_its_camera_and_has_matches_elsewhere(factors: Factors) -> None:
    gallery = [NAME.fullmatch(file).group(1, 2) for file in factors.names(TEST)]
    boxes = Counter(NAME.fullmatch(file).group(1, 2) for file in factors.names(GT))
    queries = [NAME.fullmatch(file).group(1, 2) for file in factors.names(QUERY)]
    assert len(set(queries)) == len(queries)
    for person, camera in queries:
        assert any(p == person and c != camera for p, c in gallery)
        assert boxes[person, camera] == factors.settings.images_per_camera + 1


def test_factors_draw_the_stored_images_again(folder: Path, factors: Factors) -> None:
    for name in FOLDERS:
        for file in factors.names(name)[::9]:
            stored = np.asarray(Image.open(folder / name / file), np.float32)
            assert np.abs(stored - factors.image(file)).mean() < 3


def test_swap_with_itself_is_the_image(factors: Factors) -> None:
    file = factors.names(TRAIN)[5]
    np.testing.assert_array_equal(factors.true_swap(file, file), factors.image(file))


def test_swap_changes_garments_and_leaves_the_background(factors: Factors) -> None:
    files = factors.names(TRAIN)
    for structure, clothes in zip(files[::7], files[::-7], strict=True):
        own, body, shot = factors.factors_of(structure)
        other = factors.factors_of(clothes)[0]
        changed = (factors.true_swap(clothes, structure) != factors.image(structure)).any(2)
        background = (person_mask(own, body, shot) == 0) & (person_mask(other, body, shot) == 0)
        assert background.mean() > 0.5
        assert not changed[background].any()
        if own.upper != other.upper:
            assert changed[~background].mean() > 0.2


def test_groups_share_colours_and_differ_in_structure() -> None:
    settings = make_settings(seed=1, preset="demo", train_ids=24, group_size=4, test_ids=36, test_group_size=12)
    people = dataset._plan(settings).people.values()
    groups, pairs = defaultdict(list), defaultdict(set)
    for person in people:
        if person.split != "stranger":
            groups[person.split, person.group].append(person)
            pairs[person.split].add((person.appearance.upper, person.appearance.lower))
    sizes = {split: {len(members) for (s, _), members in groups.items() if s == split} for split in ("train", "test")}
    assert sizes == {"train": {4}, "test": {12}}
    assert not pairs["train"] & pairs["test"]
    for members in groups.values():
        worn = {dataclasses.replace(m.appearance, upper_kind="", sleeves="") for m in members}
        assert len(worn) == 1
        assert len({(m.body.hair, m.body.bag) for m in members}) == len(members)


def test_any_size_body_and_occluder_can_be_drawn(factors: Factors) -> None:
    look, body, shot = factors.factors_of(factors.names(TRAIN)[0])
    pictures = [
        render(look, dataclasses.replace(body, hair=hair, bag=bag), dataclasses.replace(shot, yaw=yaw))
        for hair, bag, yaw in zip(HAIR_STYLES, BAGS + BAGS, range(0, 360, 60), strict=False)
    ]
    pictures += [render(look, body, dataclasses.replace(shot, occluder=kind)) for kind in OCCLUDERS]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert render(look, body, shot, (256, 128)).shape == (256, 128, 3)
    assert render(look, body, shot, (64, 32)).shape == (64, 32, 3)


def test_knobs_reach_the_shots() -> None:
    def shots(**changes: float) -> list:
        return [s.shot for s in dataset._plan(make_settings(preset="tiny", **changes)).images.values()]

    plain = shots(difficulty=0.0)
    assert {(s.tint, s.noise, s.occluder) for s in plain} == {((1.0, 1.0, 1.0), 0.0, "none")}
    assert {s.light for s in shots(light=0.0)} == {plain[0].light}
    assert max(max(s.tint) for s in shots(tint=0.3)) > 1.2
    assert {s.noise for s in shots(difficulty=2.0)} == {6.0}
    assert {s.noise for s in shots(difficulty=2.0, noise=1.0)} == {1.0}


def test_a_complete_folder_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    make_dataset(folder, seed=3, preset="tiny", occluders=0.3)
    assert "complete already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_an_interrupted_folder_is_finished(folder: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "half"
    shutil.copytree(folder, out)
    (out / "factors.json").rename(out / UNFINISHED_MARK)
    for file in load_factors(folder).names(TRAIN)[::2]:
        (out / TRAIN / file).write_bytes(b"cut short")
    with pytest.raises(UserError, match="half: its making was interrupted"):
        read_split(out, "train_all")
    with pytest.raises(UserError, match="half"):
        make_dataset(out, seed=4, preset="tiny", occluders=0.3)
    make_dataset(out, seed=3, preset="tiny", occluders=0.3)
    assert contents(out) == contents(folder)


def test_while_it_is_drawn_it_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(out: Path, entries: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "_write_images", killed)
        make_dataset(tmp_path / "new", preset="tiny")
    assert (tmp_path / "new" / UNFINISHED_MARK).exists()
    make_dataset(tmp_path / "new", preset="tiny")
    assert not (tmp_path / "new" / UNFINISHED_MARK).exists()


def test_foreign_folders_are_refused_untouched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="is not empty"):
        make_dataset(tmp_path, preset="tiny")
    assert contents(tmp_path) == {"query/mine.jpg": b"precious"}
    with pytest.raises(UserError, match="seed=3, not 5"):
        make_dataset(folder, seed=5, preset="tiny", occluders=0.3)
    with pytest.raises(UserError, match="is not a folder"):
        make_dataset(tmp_path / "query" / "mine.jpg", preset="tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "huge"},
        {"cameras": 99},
        {"train_ids": 0},
        {"noise": float("nan")},
        {"group_size": 2.5},
        {"cameras": 2},
        {"colours": 3},
        {"difficulty": -1.0},
        {"workers": 0},
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        make_dataset(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"drawing": 0}', '{"drawing": 1, "people": 3}'])
def test_broken_factors_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "factors.json").write_text(text)
    with pytest.raises(UserError, match=r"factors\.json"):
        load_factors(tmp_path)
    with pytest.raises(UserError, match=r"factors\.json"):
        load_factors(tmp_path / "missing")


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("appearance", "upper", [1, 2]),
        ("appearance", "upper", "red"),
        ("appearance", "upper_kind", "tartan"),
        ("body", "height", "tall"),
        ("body", "height", -5),
        ("body", "height", 1e300),
        ("body", "hair", "wig"),
        ("shot", "camera", 99),
        ("shot", "scale", 0),
        ("shot", "noise_seed", -1),
        ("shot", "light", float("nan")),
    ],
)
def test_factors_that_cannot_be_drawn_are_named(folder: Path, tmp_path: Path, part: str, key: str, value: Any) -> None:
    table = json.loads((folder / "factors.json").read_text())
    entries = table["images" if part == "shot" else "people"]
    next(iter(entries.values()))[part][key] = value
    (tmp_path / "factors.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"factors\.json: .*make (it|the data set) again"):
        load_factors(tmp_path)


def test_an_image_of_nobody_is_named(folder: Path, tmp_path: Path) -> None:
    table = json.loads((folder / "factors.json").read_text())
    name, entry = next(iter(table["images"].items()))
    entry["person"] = "4711"
    (tmp_path / "factors.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=f"{name}: not what the renderer writes"):
        load_factors(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/m: cannot be written .*; make room"):
        make_dataset(tmp_path / "file" / "m", preset="tiny")


def test_unknown_image_is_named(factors: Factors) -> None:
    with pytest.raises(UserError, match="0001_nothing"):
        factors.image("0001_nothing.jpg")


def test_command_line(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "mannequins.dataset"]
    started = subprocess.run([*script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert started.returncode == 0 and "--group-size" in started.stdout
    refused = subprocess.run([*script, "--out", "x", "--cameras", "1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: cameras=1")
    assert cli(["--out", str(tmp_path / "t"), "--preset", "tiny", "--train-ids", "2", "--tint", "0.2"]) == 0
    settings = load_factors(tmp_path / "t").settings
    assert (settings.train_ids, settings.test_ids, settings.tint) == (2, 6, 0.2)


def test_two_processes_may_draw_the_same_data_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds its mark renamed already."""
    draw = dataset._write_images

    def draw_and_be_overtaken(out: Path, entries: list) -> int:
        count = draw(out, entries)
        (out / UNFINISHED_MARK).rename(out / "factors.json")
        return count

    monkeypatch.setattr(dataset, "_write_images", draw_and_be_overtaken)
    dataset.make_dataset(tmp_path / "data", preset="tiny", train_ids=2, test_ids=2, distractors=0, junk=0)
    assert dataset.load_factors(tmp_path / "data").images
