"""Preparing data sets, each packed as its authors packed it, on images of coloured noise."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MARKET_NAMES, Outcome, logged, noise

from data import folders
from data.archives import number_identities
from data.folders import SPLITS, read_split
from data.listing import say_reading
from data.prepare import PUBLISHED, SplitCount, fill_folder, main, print_counts, read_tasks, require_matches
from utils import ROOT, UserError

Script = Callable[..., Outcome]


def prepare_market(root: Path, *, copy: bool = False) -> dict[str, SplitCount]:
    (task,) = read_tasks("market1501", root)
    return fill_folder(task, copy=copy)


def listing(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---- Market-1501, and what all have in common


def test_prepare_layout(archive: Path) -> None:
    counts = prepare_market(archive)
    prepared = archive / "pytorch"
    assert sorted(p.name for p in prepared.iterdir()) == sorted(folders.SPLITS)
    assert sorted(p.name for p in (prepared / "gallery").iterdir()) == ["-1", "0000", "0003", "0004"]
    assert sorted(p.name for p in (prepared / "train_all").iterdir()) == ["0002", "0007", "0011", "1500"]
    assert not (prepared / "train" / "0011").exists()
    for source in (archive / "query").glob("0*.jpg"):
        assert (prepared / "query" / source.name[:4] / source.name).samefile(source)
    assert {split: n.images for split, n in counts.items()} == dict(zip(SPLITS, (10, 6, 4, 2, 5, 2), strict=True))
    assert counts["gallery"] == SplitCount(images=5, identities=2, junk=1, distractors=1)


def test_prepare_goes_on_after_an_interruption(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copyfile, calls = shutil.copyfile, itertools.count()

    def interrupted(source: Path, target: Path) -> None:
        if next(calls) == 7:
            Path(target).write_bytes(source.read_bytes()[:50])
            raise KeyboardInterrupt
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--data_root", str(archive), "--copy"], dataset="market1501")
    with pytest.raises(UserError, match="pytorch"):
        read_split(archive, "train_all")
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    prepare_market(archive, copy=True)
    assert len(read_split(archive, "train_all")) == 10
    assert not [p for p in (archive / "pytorch").rglob(".*")]
    resumed = listing(archive / "pytorch")
    shutil.rmtree(archive / "pytorch")
    prepare_market(archive, copy=True)
    assert listing(archive / "pytorch") == resumed


def test_prepare_overwrites_nothing(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = archive / "pytorch" / "query" / "0003" / MARKET_NAMES["query"][0]
    noise(target.with_name("other.jpg")).rename(target)
    before = listing(archive)
    with pytest.raises(UserError, match=MARKET_NAMES["query"][0]):
        prepare_market(archive)
    assert listing(archive) == before
    target.unlink()
    stranger = noise(target.with_name("0003_c9s1_1.jpg"))
    before = listing(archive)
    with pytest.raises(UserError, match=stranger.name):
        prepare_market(archive)
    assert listing(archive) == before
    stranger.unlink()
    shutil.rmtree(archive / "gt_bbox")
    assert "multi-query" not in prepare_market(archive) and "gt_bbox" in logged(caplog)


def test_prepare_command(archive: Path, script: Script, tmp_path: Path) -> None:
    """prepare-market.py is prepare.py for one data set; help and errors need no PyTorch."""
    shutil.copytree(archive, tmp_path / "twin")
    done = script("prepare-market", "--data_root", archive)
    assert done.code == 0
    gallery = next(line for line in done.out.splitlines() if line.startswith("gallery")).split()
    assert gallery == ["gallery", "5", "2", "1", "1", "4"]
    assert done.err.count("\n") == 2 and "19732 of 750" in done.err
    twin = script("prepare", "--dataset", "market1501", "--data_root", tmp_path / "twin")
    assert (twin.code, twin.err) == (0, done.err) and listing(archive) == listing(tmp_path / "twin")
    assert_repeatable(script, archive, "--dataset", "market1501", "--data_root", archive)

    assert str(tmp_path / "nowhere") in script("prepare-market", "--data_root", tmp_path / "nowhere").error
    shutil.rmtree(archive / "bounding_box_test")
    assert "bounding_box_test/" in script("prepare-market", "--data_root", archive).error
    code = "import data.prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# ---- other archives


def pack(root: Path, files: dict[str, list[str]]) -> Path:
    """An archive: folder by folder the names of its images."""
    for folder, names in files.items():
        for name in names:
            noise(root / folder / name)
    return root


def lists(root: Path) -> dict[str, list[tuple[int, int]]]:
    """Identity and camera of the images of every split that was prepared, as training and evaluation read them."""
    read = {split: read_split(root, split) for split in SPLITS if (root / "pytorch" / split).is_dir()}
    return {split: sorted(zip(v.pids.tolist(), v.camids.tolist(), strict=True)) for split, v in read.items()}


def assert_repeatable(script: Script, root: Path, *arguments: object) -> None:
    """Again, with copies and after an interruption: the same files."""
    prepared, times = listing(root / "pytorch"), {p: os.stat(p).st_mtime_ns for p in root.rglob("*")}
    for more in ((), ("--copy",)):
        assert script("prepare", *arguments, *more).code == 0
        assert listing(root / "pytorch") == prepared
        assert {p: os.stat(p).st_mtime_ns for p in root.rglob("*")} == times
    for path in sorted((root / "pytorch").rglob("*.*g"))[::2]:
        path.unlink()
    (root / "pytorch" / folders.UNFINISHED_MARK).touch()
    with pytest.raises(UserError, match="pytorch"):
        read_split(root, "query")
    assert script("prepare", *arguments, "--copy").code == 0
    assert listing(root / "pytorch") == prepared


DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c5_f0055001.jpg", "0005_c1_f0046302.jpg"],
    "bounding_box_test": ["0002_c1_f0044158.jpg", "0002_c2_f0055002.jpg", "7139_c8_f0099999.jpg"],
    "query": ["0002_c4_f0051111.jpg"],
}
DUKE_LISTS = [[(1, 2), (1, 5), (5, 1)], [(1, 5)], [(1, 2), (5, 1)], [(2, 4)], [(2, 1), (2, 2), (7139, 8)]]


def test_dukemtmc(script: Script, tmp_path: Path) -> None:
    options = ("--dataset", "dukemtmc-reid", "--data_root", pack(tmp_path / "packed", DUKE))
    done = script("prepare", *options)
    assert done.code == 0 and lists(tmp_path / "packed") == dict(zip(SPLITS[:5], DUKE_LISTS, strict=True))
    withdrawn, _, incomplete = done.err.splitlines()
    assert "DukeMTMC-reID" in withdrawn and "17661 of 1110" in incomplete
    assert_repeatable(script, tmp_path / "packed", *options)


def test_cuhk03_np(script: Script, tmp_path: Path) -> None:
    boxes = {"labeled": "7368", "detected": "7365"}
    names = {
        "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png", "0004_c1_31.png"],
        "bounding_box_test": ["0003_c1_22.png", "0003_c2_26.png"],
        "query": ["0003_c1_21.png", "0003_c2_28.png"],
    }
    for box in boxes:
        pack(tmp_path / "cuhk03-np" / box, names)
    done = script("prepare", "--dataset", "cuhk03-np", "--data_root", tmp_path / "cuhk03-np")
    assert done.code == 0 and done.err.count("\n") == len(boxes) + 1
    for box in boxes:
        assert f"CUHK03-NP {box}" in done.err and boxes[box] in done.err
        root = tmp_path / "cuhk03-np" / box
        assert lists(root)["train_all"] == [(1, 1), (1, 2), (4, 1)]
        assert lists(root)["gallery"] == lists(root)["query"] == [(3, 1), (3, 2)]
        # One half alone may be named as well.
        assert_repeatable(script, root, "--dataset", "cuhk03-np", "--data_root", root)


MSMT17 = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg", "0000/0000_001_15_0303morning_0009_0.jpg",
              "0007/0007_002_07_0113afternoon_0081_1.jpg"],
    "val": ["0000/0000_040_14_0302noon_0211_2.jpg"],
    "query": ["0000/0000_003_04_0113noon_0001_0.jpg", "3059/3059_012_12_0303noon_0005_1.jpg"],
    "gallery": ["0000/0000_000_01_0303morning_0015_0.jpg", "3059/3059_000_11_0303noon_0004_0.jpg"],
}  # fmt: skip


def pack_msmt17(root: Path, train: str, test: str) -> Path:
    for split, names in MSMT17.items():
        pack(root, {train if split in ("train", "val") else test: names})
        (root / f"list_{split}.txt").write_text("".join(f"{name} {int(name[:4])}\n" for name in names))
    noise(root / test / "0000" / "0000_099_01_0303morning_9999_0.jpg")  # in no list
    return root


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("mask_train_v2", "mask_test_v2")], ids=["V1", "V2"])
def test_msmt17(script: Script, tmp_path: Path, train: str, test: str) -> None:
    root = pack_msmt17(tmp_path / "MSMT17", train, test)
    done = script("prepare", "--dataset", "msmt17", "--data_root", root)
    assert done.code == 0 and "MSMT17" in done.err and "one higher" in done.err
    # The archive's identity 0 would be a distractor, so all are one higher.
    seen, val = [(1, 1), (1, 15), (8, 7)], [(1, 14)]
    query, gallery = [(1, 4), (3060, 12)], [(1, 1), (3060, 11)]
    assert lists(root) == dict(zip(SPLITS[:5], (sorted(seen + val), seen, val, query, gallery), strict=True))
    source = root / test / "0000" / "0000_003_04_0113noon_0001_0.jpg"
    target = root / "pytorch" / "query" / "0001" / "0001_c4_0000_003_04_0113noon_0001_0.jpg"
    assert target.samefile(source)
    assert_repeatable(script, root, "--dataset", "msmt17", "--data_root", root)


def test_bad_archives(script: Script, tmp_path: Path, archive: Path) -> None:
    def refused(dataset: str, root: Path, *more: object) -> str:
        error = script("prepare", "--dataset", dataset, "--data_root", root, *more).error
        assert not (root / "pytorch").exists()
        return error

    root = pack_msmt17(tmp_path / "up" / "MSMT17_V1", "train", "test")
    assert f"give {root}" in refused("msmt17", root.parent)  # the sub-folder that holds the archive
    for split, line in (("val", "0000/0000_040_14_0302noon_0211_2.jpg"), ("query", "0000/person.jpg 5")):
        good = (root / f"list_{split}.txt").read_text()
        (root / f"list_{split}.txt").write_text(f"{good}\n{line}\n")
        assert f"list_{split}.txt: line {len(MSMT17[split]) + 2}: '{line}'" in refused("msmt17", root)
        (root / f"list_{split}.txt").write_text(good)
    (root / "test" / MSMT17["gallery"][1]).unlink()
    assert MSMT17["gallery"][1] in refused("msmt17", root)
    (root / "list_gallery.txt").write_text("\n")
    assert "list_gallery.txt" in refused("msmt17", root)
    pack_msmt17(root, "mask_train_v2", "mask_test_v2")
    assert "mask_train_v2/" in refused("msmt17", root)  # V1 and V2
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "mask_test_v2")
    assert "mask_test_v2/" in refused("msmt17", root)  # neither

    assert "labeled/" in refused("cuhk03-np", archive)
    assert "invalid choice" in refused("veri776", archive)
    assert f"give {archive}" in refused("dukemtmc-reid", archive.parent)
    assert "--csv" in refused("market1501", archive, "--csv", "a.csv")
    assert "--seed" in refused("csv", archive, "--seed", 1)
    assert "--test-fraction" in refused("folder", archive, "--test-fraction", 1.5)
    noise(archive / "query" / "anna_c1s1_000001_01.jpg")
    assert "anna_c1s1_000001_01.jpg" in refused("market1501", archive)
    for path in (archive / "query").iterdir():
        path.unlink()
    assert str(archive / "query") in refused("market1501", archive)


def test_counts_as_published_raise_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    for title, published in PUBLISHED.items():
        counts = {split: SplitCount(*pair, 0, 0) for split, pair in published.items()}
        print_counts(counts, title)
        assert logged(caplog) == ""
        images, identities = published["query"]
        print_counts(counts | {"query": SplitCount(images - 1, identities, 0, 0)}, title)
        warning = logged(caplog)
        assert title in warning and f"{images - 1} images" in warning and warning.count("\n") == 1


# ---- people's own data


def test_number_identities() -> None:
    def numbers(*names: str) -> dict[str, int]:
        return number_identities(dict.fromkeys(names, "somewhere"))

    assert numbers("0007", "12", "8.0", "+9", "1e1") == {"0007": 7, "12": 12, "8.0": 8, "+9": 9, "1e1": 10}
    assert numbers("bob", "anna", "3") == {"3": 1, "anna": 2, "bob": 3}
    assert numbers("0", "1", "2") == {"0": 1, "1": 2, "2": 3}  # 0 would be a distractor
    assert numbers("7.5", "7") == {"7": 1, "7.5": 2}
    assert numbers("\u0663", "5") == {"5": 1, "\u0663": 2}
    assert numbers("9" * 18, "5") == {"5": 1, "9" * 18: 2}


SPELLINGS = [("7", "0007"), ("7", "7.0"), ("anna", "Anna"), ("anna b", "annab"), ("anna 1", "anna 01")]
SPELLINGS += [("jos\u00e9", "jose\u0301"), ("anna b", "anna\u00a0b")]


@pytest.mark.parametrize("names", SPELLINGS, ids=ascii)
def test_two_spellings_of_one_person_are_refused(script: Script, tmp_path: Path, names: tuple[str, str]) -> None:
    """In a table with both rows, among folders with both folders; nothing is written."""
    rows = [(f"{i}.png", name, "train") for i, name in enumerate([names[0], "x", "y", names[1]])]
    root = write_table(pack(tmp_path / "own", {"": [row[0] for row in rows]}), [("path", "identity", "split"), *rows])
    error = script("prepare", "--dataset", "csv", "--data_root", root).error
    assert "row 5" in error and "row 2" in error
    root_of_folders = people(tmp_path / "people", dict.fromkeys([*names, "x", "y"], 2))
    error = script("prepare", "--dataset", "folder", "--data_root", root_of_folders).error
    assert all(str(root_of_folders / name) in error for name in names)
    assert not (root / "pytorch").exists() and not (root_of_folders / "pytorch").exists()


def test_whole_numbers_in_any_spelling_are_numbers(script: Script, tmp_path: Path) -> None:
    """As spreadsheets and tables in floating point write them; so is junk."""
    rows = [("path", "identity", "split"), ("a.png", "7.0", "train"), ("b.png", " +20 ", "train")]
    rows += [("c.png", "3.0", "query"), ("d.png", "3.0", "gallery")]
    rows += [(f"j{i}.png", junk, "gallery") for i, junk in enumerate(("-1.0", "-01", "-1", " -1. "))]
    root = write_table(pack(tmp_path / "own", {"": [row[0] for row in rows[1:]]}), rows)
    done = script("prepare", "--dataset", "csv", "--data_root", root)
    assert done.code == 0, done.err
    prepared = {split: [pid for pid, _ in images] for split, images in lists(root).items()}
    assert prepared["train_all"] == [7, 20] and prepared["query"] == [3]
    assert prepared["gallery"] == [-1, -1, -1, -1, 3]
    assert not (root / "pytorch" / "identities.csv").exists() and "identities.csv" not in done.err


@pytest.mark.parametrize("dataset", ["csv", "market1501", "msmt17"])
def test_queries_without_anybody_of_the_gallery(script: Script, tmp_path: Path, archive: Path, dataset: str) -> None:
    if dataset == "csv":
        rows = [("path", "identity", "split"), ("a.png", "anna", "train"), ("q.png", "bob", "query")]
        rows += [("j.png", "-1", "gallery"), ("g.png", "carl", "gallery")]
        root = write_table(pack(tmp_path / "own", {"": [row[0] for row in rows[1:]]}), rows)
    elif dataset == "market1501":
        root = archive
        for path in (root / "query").glob("0*.jpg"):
            path.rename(path.with_name("9" + path.name[1:]))
    else:
        root = pack_msmt17(tmp_path / "MSMT17", "train", "test")
        (root / "list_query.txt").write_text("".join(f"{name} 77\n" for name in MSMT17["query"]))
    assert str(root) in script("prepare", "--dataset", dataset, "--data_root", root).error
    assert not (root / "pytorch").exists()
    # One of several identities is no error, but counted.
    (task,) = read_tasks(dataset, root)
    query = task.splits["query"] + task.splits["gallery"][-1:]
    say_reading({})
    require_matches(task._replace(splits=task.splits | {"query": query}))
    asked = len({image.pid for image in query})
    assert f"{asked - 1} of the {asked} " in say_reading({})["assumed"][0]


def people(root: Path, sizes: dict[str, int]) -> Path:
    return pack(root, {name: [f"photo {i}.png" for i in range(size)] for name, size in sizes.items()})


def test_a_folder_per_identity(script: Script, tmp_path: Path) -> None:
    sizes = {"anna": 4, "bob": 1, "carl": 3, "dora": 2, "eva": 5, "0012": 2, "frida": 3, "empty": 0}
    root = people(tmp_path / "people", sizes)
    options = ("--dataset", "folder", "--data_root", root)
    done = script("prepare", *options)
    assert done.code == 0
    assert "--no-cameras" in done.err and done.err.count("\n") == 3
    assert "7 identities" in done.err and str(root / "pytorch" / "identities.csv") in done.err
    rows = (root / "pytorch" / "identities.csv").read_text().splitlines()
    assert rows == ["number,identity", "1,0012", "2,anna", "3,bob", "4,carl", "5,dora", "6,eva", "7,frida"]
    prepared = lists(root)
    assert {camera for images in prepared.values() for _, camera in images} == {0}
    pids = {split: [pid for pid, _ in images] for split, images in prepared.items()}
    size = Counter(dict(enumerate([2, 4, 1, 3, 2, 5, 3], 1)))
    assert len(set(pids["train_all"])) == 3 and len(set(pids["gallery"])) == 4
    assert Counter(pids["train_all"]) + Counter(pids["query"] + pids["gallery"]) == size
    assert pids["query"] == [pid for pid in sorted(set(pids["gallery"])) if size[pid] > 1]
    assert sorted(pids["train"] + pids["val"]) == pids["train_all"]
    assert pids["val"] == sorted(set(pids["train_all"]))
    assert_repeatable(script, root, *options)

    # Another split into the same folder would train on those who are tested.
    before = listing(root)
    assert str(root / "pytorch") in script("prepare", *options, "--seed", 1).error
    assert listing(root) == before
    shutil.rmtree(root / "pytorch")
    assert script("prepare", *options, "--seed", 1).code == 0
    assert lists(root) != prepared


def test_fractions_of_a_folder(script: Script, tmp_path: Path) -> None:
    root = people(tmp_path / "people", {str(i): 2 for i in range(1, 9)})
    prepared: dict[float, set[int]] = {}
    for fraction, splits, tested in ((0, 3, 0), (0.25, 5, 2), (1, 2, 8)):
        done = script("prepare", "--dataset", "folder", "--data_root", root, "--test-fraction", fraction)
        assert done.code == 0, done.err
        assert len(lists(root)) == splits and len(lists(root).get("query", [])) == tested
        assert ("--no-cameras" in done.err) == (tested > 0)
        assert not (root / "pytorch" / "identities.csv").exists()  # the folders' own numbers
        prepared[fraction] = {pid for pid, _ in lists(root).get("query", [])}
        shutil.rmtree(root / "pytorch")
    assert prepared[1] == set(range(1, 9))

    def refused(*more: object) -> str:
        return script("prepare", "--dataset", "folder", "--data_root", root, *more).error

    assert "--test-fraction" in refused("--test-fraction", 0.9)  # one identity to train on
    for folder in root.iterdir():
        (folder / "photo 1.png").unlink()
    assert "--test-fraction 0" in refused()  # no identity with a query and a match
    noise(root / "loose.png")
    assert "loose.png" in refused()
    root = tmp_path / "none"
    assert str(root) in refused()
    (root / "anna").mkdir(parents=True)
    assert str(root) in refused()


TABLE = [
    ("path", "identity", "camera", "split", "remark"),
    ("day 1/a.jpg", "anna", "3", "train", "x"),
    ("day 2/a.jpg", "anna", "3", "train", ""),  # the same name, identity and camera
    ("day 2/b.jpg", "bob", "12", "train", ""),
    ("q.png", "carl, the elder", "1", "query", ""),
    ("g.png", "carl, the elder", "2", "gallery", ""),
    ("nobody.png", "-1", "2", "gallery", ""),
    ("other.png", "dora", "2", "gallery", ""),
]


def write_table(root: Path, rows: list[tuple[str, ...]], name: str = "dataset.csv") -> Path:
    root.mkdir(exist_ok=True)
    with open(root / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    return root


def test_a_table(script: Script, tmp_path: Path) -> None:
    root = write_table(pack(tmp_path / "own", {"": [row[0] for row in TABLE[1:]]}), TABLE)
    options = ("--dataset", "csv", "--data_root", root)
    done = script("prepare", *options)
    assert done.code == 0 and done.err.count("\n") == 2, done.err
    assert "4 identities" in done.err and str(root / "pytorch" / "identities.csv") in done.err
    train, gallery = [(1, 3), (1, 3), (2, 12)], [(-1, 2), (3, 2), (4, 2)]
    expected = {"train_all": train, "train": train[:1], "val": train[1:], "query": [(3, 1)], "gallery": gallery}
    assert lists(root) == expected
    with open(root / "pytorch" / "identities.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["number", "identity"], ["1", "anna"], ["2", "bob"], ["3", "carl, the elder"], ["4", "dora"]]
    sources = {p.read_bytes() for p in (root / "pytorch" / "train_all").rglob("*.jpg")}
    assert sources == {(root / row[0]).read_bytes() for row in TABLE[1:4]}
    assert_repeatable(script, root, *options)

    # More rows are added to what is there; rows that change it are refused.
    noise(root / "new.png")
    write_table(root, [*TABLE, ("new.png", "eva", "4", "gallery", "")])
    before = listing(root / "pytorch")
    assert script("prepare", *options).code == 0
    assert lists(root)["gallery"] == [*gallery, (5, 4)]
    after = listing(root / "pytorch")
    assert after.pop("identities.csv") == before.pop("identities.csv") + b"5,eva\n"
    assert before.items() < after.items()
    write_table(root, [*TABLE, ("new.png", "aaron", "4", "gallery", "")])
    before = listing(root)
    assert str(root / "pytorch") in script("prepare", *options).error
    assert listing(root) == before


def test_a_table_with_val_rows_numbers_and_no_cameras(script: Script, tmp_path: Path) -> None:
    rows = [("split", "path", "identity"), ("train", "a.png", "7"), ("val", "b.png", "7"), ("train", "c.png", "20")]
    rows += [("query", "d.png", "20"), ("gallery", "e.png", "20"), ("multi-query", "d.png", "20")]
    root = pack(tmp_path / "own", {"": [f"{letter}.png" for letter in "abcde"]})
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables", rows, "people.csv")
    done = script("prepare", "--dataset", "csv", "--data_root", root, "--csv", tmp_path / "tables" / "people.csv")
    assert done.code == 0 and "--no-cameras" in done.err and done.err.count("\n") == 3
    assert str(root / "c.png") in done.err and str(root / "d.png") in done.err  # identity 20 trains and is tested
    pids = [7, 7, 20], [7, 20], [7], [20], [20], [20]
    assert lists(root) == {split: [(pid, 0) for pid in of] for split, of in zip(SPLITS, pids, strict=True)}
    assert not (root / "pytorch" / "identities.csv").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("gone.png", "anna", "3", "train", ""), "gone.png"),
        (("dataset.csv", "anna", "3", "train", ""), "dataset.csv is no image"),
        (("q.png", "", "3", "train", ""), "identity"),
        (("q.png", "anna", "-3", "train", ""), "camera '-3'"),
        (("q.png", "anna", "", "train", ""), "row 2"),
        (("q.png", "anna", "3", "test", ""), "split 'test'"),
        (("q.png", "-1", "3", "train", ""), "identity -1"),
        (("q.png", "-1.0", "3", "query", ""), "identity -1"),
        (("q.png", "-2", "3", "gallery", ""), "identity '-2'"),
        (("./q.png", "carl", "3", "query", ""), "row 5"),
        (("q.png", "anna", "3", "train"), "5 columns"),
        (("q.png", "anna", "3", "train", "", "x"), "5 columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_row(script: Script, tmp_path: Path, row: tuple[str, ...], words: str) -> None:
    root = write_table(pack(tmp_path / "own", {"": [row[0] for row in TABLE[1:]]}), [*TABLE, (), row])
    error = script("prepare", "--dataset", "csv", "--data_root", root).error
    assert error.startswith(f"error: {root / 'dataset.csv'}: row {len(TABLE) + 2}: ") and words in error
    assert not (root / "pytorch").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "path, identity, split"),
        (b"path,identity,camera,split\n", "row"),
        (b"path,identity,split,path\n", "path, identity, split"),
        (b'path,identity,split\nq.png,"an"na,train\n', "row 2"),
        (b"path,identity,split\nq.png,anna,query\n", "split gallery"),
        (b"path,identity,split\nq.png,anna,gallery\n", "split query"),
        (b"path,identity,split\nq.png,anna,val\n", "split train"),
        (b"path,identity,split\nq.png,\xff,val\n", "UTF-8"),
        (None, "dataset.csv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_table(script: Script, tmp_path: Path, content: bytes | None, words: str) -> None:
    root = pack(tmp_path / "own", {"": ["q.png"]})
    if content is not None:
        (root / "dataset.csv").write_bytes(content)
    error = script("prepare", "--dataset", "csv", "--data_root", root).error
    assert error.startswith(f"error: {root / 'dataset.csv'}: ") and words in error
    assert not (root / "pytorch").exists()
