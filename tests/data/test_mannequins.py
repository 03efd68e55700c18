"""The drawn data set: names, factors, swaps, determinism, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.folders import UNFINISHED_MARK, read_split
from mannequins import dataset
from mannequins.dataset import GT, QUERY, TEST, TRAIN, Factors, load_factors, make_dataset, make_settings
from mannequins.dataset import main as cli
from mannequins.render import BAGS, HAIR_STYLES, OCCLUDERS, _paint, render
from studies.ablation.cells import SMALL_DATA
from utils import UserError

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


def names_in(factors: Factors, folder: str) -> list[str]:
    return sorted(name for name, sight in factors.images.items() if folder in sight.folders)


def image(factors: Factors, name: str) -> np.ndarray:
    """The image as drawn: its swap with itself."""
    return factors.true_swap(name, name)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_images(folder: Path, factors: Factors, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", seed=3, preset="tiny", occluders=0.3, workers=2)
    assert contents(tmp_path / "again") == contents(folder)
    assert dataset._plan(make_settings(seed=4, preset="tiny", occluders=0.3)).images != factors.images


def test_folders_hold_the_named_images_and_the_counts_asked_for(folder: Path, factors: Factors) -> None:
    settings = factors.settings
    ids = {}
    for name in FOLDERS:
        files = sorted(p.name for p in (folder / name).iterdir())
        assert files == names_in(factors, name)
        ids[name] = Counter(NAME.fullmatch(file)[1] for file in files)
    assert len(ids[TRAIN]) == settings.train_ids and len(ids[TEST]) == settings.test_ids + 2
    assert ids[TEST]["0000"] == settings.distractors and ids[TEST]["-1"] == settings.junk
    assert set(ids[QUERY]) == set(ids[GT]) == set(ids[TEST]) - {"0000", "-1"}
    assert not set(ids[TRAIN]) & set(ids[TEST])
    cameras = defaultdict(Counter)
    for file in names_in(factors, TRAIN):
        cameras[NAME.fullmatch(file)[1]][NAME.fullmatch(file)[2]] += 1
    assert all(settings.min_cameras <= len(seen) <= 6 and set(seen.values()) == {2} for seen in cameras.values())
    with Image.open(folder / QUERY / names_in(factors, QUERY)[0]) as drawn:
        assert drawn.size == (64, 128) and drawn.mode == "RGB"


def views(names: list[str]) -> dict[str, set[str]]:
    """The cameras that see each person, by the names of images."""
    cameras = defaultdict(set)
    for person, camera in (NAME.fullmatch(name).group(1, 2) for name in names):
        cameras[person].add(camera)
    return cameras


def test_training_identities_seen_by_few_cameras(factors: Factors) -> None:
    few = 2
    limited = dataset._plan(make_settings(seed=3, preset="tiny", train_cameras=few))
    seen = views(names_in(limited, TRAIN))
    assert {len(cameras) for cameras in seen.values()} == {few} and set(seen) == set(views(names_in(factors, TRAIN)))
    assert min(map(len, views(names_in(limited, QUERY)).values())) >= limited.settings.min_cameras > few
    assert limited.people == factors.people


def test_every_query_is_alone_in_its_camera_and_has_matches_elsewhere(factors: Factors) -> None:
    gallery, boxes, queries = (
        [NAME.fullmatch(file).group(1, 2) for file in names_in(factors, name)] for name in (TEST, GT, QUERY)
    )
    assert len(set(queries)) == len(queries)
    for person, camera in queries:
        assert any(p == person and c != camera for p, c in gallery)
        assert boxes.count((person, camera)) == factors.settings.images_per_camera + 1


def test_factors_draw_the_stored_images_again(folder: Path, factors: Factors) -> None:
    for file in names_in(factors, TEST)[::5]:
        stored = np.asarray(Image.open(folder / TEST / file), np.float32)
        assert np.abs(stored - image(factors, file)).mean() < 3


def test_swap_changes_garments_and_leaves_the_background(factors: Factors) -> None:
    files = names_in(factors, TRAIN)
    for structure, clothes in zip(files[::7], files[::-7], strict=True):
        look, body, shot = factors.factors_of(structure)
        worn = factors.factors_of(clothes)[0]
        changed = (factors.true_swap(clothes, structure) != image(factors, structure)).any(2)
        alone = dataclasses.replace(shot, occluder="none")
        covers = [_paint(appearance, body, alone, (128, 64))[1][..., 0] for appearance in (look, worn)]
        background = (covers[0] == 0) & (covers[1] == 0)
        assert background.mean() > 0.5
        assert not changed[background].any()
        if look.upper != worn.upper:
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


def test_vivid_garments_are_equally_bright() -> None:
    worn = [p.appearance for p in dataset._plan(make_settings(preset="demo")).people.values()]
    means = [np.mean(colour) for look in worn for colour in (look.upper, look.lower)]
    assert max(means) - min(means) < 20 and len({look.upper for look in worn}) == 10
    assert all(0 < np.mean(look.upper_second) - np.mean(look.upper) < 50 for look in worn)


@pytest.mark.parametrize("seed, digest", [(7, "8a2ee604427e"), (8, "942860bae362")])
def test_the_ablation_draws_the_people_and_shots_of_its_results(seed: int, digest: str) -> None:
    plan = dataset._plan(make_settings(**SMALL_DATA | dict(seed=seed)))
    assert hashlib.sha256(repr((plan.people, plan.images)).encode()).hexdigest()[:12] == digest


def test_any_size_body_and_occluder_can_be_drawn(factors: Factors) -> None:
    look, body, shot = factors.factors_of(names_in(factors, TRAIN)[0])
    pictures = [
        render(look, dataclasses.replace(body, hair=hair, bag=bag), dataclasses.replace(shot, yaw=yaw))
        for hair, bag, yaw in zip(HAIR_STYLES, BAGS + BAGS, range(0, 360, 60), strict=False)
    ]
    pictures += [render(look, body, dataclasses.replace(shot, occluder=kind)) for kind in OCCLUDERS]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    for size in ((256, 128), (64, 32)):
        assert render(look, body, shot, size).shape == (*size, 3)


def test_an_interrupted_folder_is_finished_and_a_complete_one_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    make_dataset(folder, seed=3, preset="tiny", occluders=0.3)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    out, write = tmp_path / "half", dataset._write_images

    def killed(out: Path, entries: list) -> None:
        write(out, entries[:20])
        (out / TRAIN / entries[20][1]).write_bytes(b"cut short")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "_write_images", killed)
        make_dataset(out, seed=3, preset="tiny", occluders=0.3)
    assert (out / UNFINISHED_MARK).exists()
    with pytest.raises(UserError, match="half"):
        read_split(out, "train_all")
    with pytest.raises(UserError, match="half"):
        make_dataset(out, seed=4, preset="tiny", occluders=0.3)
    make_dataset(out, seed=3, preset="tiny", occluders=0.3)
    assert contents(out) == contents(folder)


def test_foreign_folders_are_refused_untouched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "mine.jpg").write_bytes(b"precious")
    for out in (tmp_path, tmp_path / "query" / "mine.jpg", tmp_path / "query" / "mine.jpg" / "new"):
        with pytest.raises(UserError, match=re.escape(str(out))):
            make_dataset(out, preset="tiny")
    assert contents(tmp_path) == {"query/mine.jpg": b"precious"}
    with pytest.raises(UserError, match="seed=3"):
        make_dataset(folder, seed=5, preset="tiny", occluders=0.3)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    bad = [dict(preset="huge"), dict(cameras=99), dict(train_ids=0), dict(noise=float("nan")), dict(group_size=2.5)]
    for changes in (*bad, dict(cameras=2, min_cameras=3), dict(colours=3)):
        with pytest.raises(UserError, match=next(iter(changes))):
            make_dataset(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_broken_factors_are_named(tmp_path: Path) -> None:
    for text in (None, "", "[]", "{}", '{"drawing": 0}', '{"drawing": 1, "people": 3}'):
        if text is not None:
            (tmp_path / "factors.json").write_text(text)
        with pytest.raises(UserError, match=r"factors\.json"):
            load_factors(tmp_path)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("appearance", "upper_kind", "tartan"),
        ("body", "height", 1e300),
        ("shot", "light", float("nan")),
        (None, "person", "4711"),
    ],
)
def test_factors_that_cannot_be_drawn_are_named(
    folder: Path, tmp_path: Path, part: str | None, key: str, value: Any
) -> None:
    table = json.loads((folder / "factors.json").read_text())
    name, entry = next(iter(table["people" if part in ("appearance", "body") else "images"].items()))
    (entry if part is None else entry[part])[key] = value
    (tmp_path / "factors.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"factors\.json: .*{re.escape(name)}"):
        load_factors(tmp_path)


def test_command_line(factors: Factors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0001_nothing"):
        image(factors, "0001_nothing.jpg")
    with pytest.raises(SystemExit):
        cli(["--out", str(tmp_path / "t"), "--workers", "0"])
    assert cli(["--out", str(tmp_path / "t"), "--preset", "tiny", "--seed", "5"]) == 0
    assert load_factors(tmp_path / "t").settings == make_settings(5, "tiny")
