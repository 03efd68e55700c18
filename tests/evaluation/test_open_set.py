"""Rates of a net that may answer "nobody", probabilities of hits, and what the commands make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome, OutputFolder, contents, make_runs
from sklearn.metrics import det_curve, roc_auc_score, roc_curve

from data.folders import read_split
from mannequins.dataset import make_dataset
from reid_eval.calibrate import calibrate, halves
from reid_eval.calibration import FILE, Calibration
from reid_eval.features import Features
from reid_eval.open_set import calibration_error, compare, measure_open_set, roc, roc_of_searches
from reid_eval.ranking import rank
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]
ABOUT = dict(net="n", net_name="n", data="d")


def side(vectors: np.ndarray, pids: np.ndarray, camids: np.ndarray) -> Features:
    f = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return Features(f[:, None], pids, camids, np.array([f"{i}.jpg" for i in range(len(f))]))


def people(count: int, seed: int, *, first: int = 1) -> tuple[Features, Features]:
    """Query (2 images a person) and gallery (3, and distractors) of people who can be confused."""
    rng = np.random.default_rng(seed)
    looks = rng.standard_normal((count, 10))
    sides = []
    for images, cameras, strangers in ((2, (1, 2), 0), (3, (3, 4, 5), count // 10)):
        seen = np.repeat(looks, images, axis=0) + 0.4 * rng.standard_normal((count * images, 10))
        vectors = np.concatenate([seen, rng.standard_normal((strangers, 10))])
        pids = np.r_[np.repeat(np.arange(first, first + count), images), np.zeros(strangers, int)]
        sides.append(side(vectors, pids, np.r_[np.tile(cameras, count), np.ones(strangers, int)]))
    return sides[0], sides[1]


# ------------------------------------------------------------------------------------------------ rates
@pytest.mark.parametrize("decimals", [1, 2, 6])  # few decimals: many equal scores
def test_rates_are_those_of_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    true, false = (rng.normal(mean, 1, n).round(decimals).astype(np.float32) for mean, n in ((1.5, 70), (0, 900)))
    labels, scores = np.r_[np.ones(70), np.zeros(900)], np.r_[true, false]
    curve = roc(true, np.sort(false))
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert curve.auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert curve.eer == pytest.approx(np.interp(0, fpr + tpr - 1, fpr), abs=1e-12)
    for rate in (0, 0.001, 0.01, 0.1, 0.5, 1):
        point = curve.at(rate)
        assert point.kept == pytest.approx(tpr[fpr <= rate].max(), abs=1e-12)
        assert point.false_alarms == pytest.approx(np.mean(false >= point.threshold), abs=1e-12)
    rates, missed, thresholds = det_curve(labels, scores)
    for threshold, kept, alarms in zip(curve.thresholds, curve.kept, curve.false_alarms, strict=True):
        at = np.flatnonzero(thresholds == threshold)  # det_curve leaves out its flat ends
        assert [kept, alarms] == pytest.approx(
            [*(1 - missed[at]), *rates[at]] if len(at) else [kept, alarms], abs=1e-12
        )


def test_rates_by_hand() -> None:
    curve = roc(np.array([0.9, 0.6, 0.4]), np.array([0.1, 0.2, 0.3, 0.7]))
    assert curve.at(0) == (0.9, pytest.approx(1 / 3), 0) and curve.at(0.24).kept == pytest.approx(1 / 3)
    assert curve.at(0.25) == (0.4, 1, 0.25) and curve.at(1) == (0.4, 1, 0.25)
    assert curve.eer == 0.25 and curve.auc == pytest.approx(10 / 12)
    assert roc(np.array([0.9]), np.array([0.95]), 4).at(0.5) == (np.inf, 0, 0)
    assert calibration_error(np.array([0.95, 0.95, 0.05, 1]), np.array([1, 0, 0, 1])) == pytest.approx((0.9 + 0.05) / 4)


@pytest.mark.parametrize("cameras", [True, False])
def test_pairs_and_searches_leave_out_what_the_ranking_leaves_out(
    cameras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reid_eval.open_set._CHUNK", 100)  # several
    rng = np.random.default_rng(0)
    query, gallery = (
        side(rng.standard_normal((n, 4)).round(1), rng.integers(-1, 6, n), rng.integers(1, 4, n)) for n in (30, 50)
    )
    found = compare(query, gallery, top=3, remove_same_camera=cameras)
    scores = query.features[:, 0] @ gallery.features[:, 0].T
    genuine, impostor = [], []
    for i in range(len(query)):
        lists = [], []
        for g in range(len(gallery)):
            same = bool(query.pids[i] == gallery.pids[g])
            if cameras and (gallery.pids[g] == -1 or (same and query.camids[i] == gallery.camids[g])):
                continue
            if not cameras and same and query.keys[i] == gallery.keys[g]:
                continue
            lists[same and bool(query.pids[i] != -1)].append(scores[i, g])
        impostor += lists[0]
        genuine += lists[1]
        assert found.known[i] == bool(lists[1])
        np.testing.assert_array_equal(found.absent[i], sorted(lists[0], reverse=True)[:3])
        np.testing.assert_array_equal(found.hits[i], sorted(lists[0] + lists[1], reverse=True)[:3])
    np.testing.assert_array_equal(np.sort(found.genuine), np.sort(genuine))
    np.testing.assert_array_equal(found.impostor, np.sort(impostor))

    labels = query.pids, gallery.pids, query.camids, gallery.camids
    ranked = rank(
        query.features, gallery.features, *labels, remove_same_camera=cameras, q_keys=query.keys, g_keys=gallery.keys
    )
    (by_convention,) = ranked.values()
    assert roc_of_searches(found).at(1).kept == pytest.approx(by_convention["standard"].cmc[0], abs=1e-12)
    report = measure_open_set(query, gallery, remove_same_camera=cameras)
    assert (
        report["known"] == found.known.sum()
        and report["searches"] == len(query)
        and report["impostor"] == len(impostor)
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report


# ------------------------------------------------------------------------------------- the probability
@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return calibrate(*people(700, 0), **ABOUT)


@pytest.mark.parametrize("count", [350, 50])  # as many people as the fit had, and a seventh
def test_the_probability_is_true_of_other_people(fitted: Calibration, count: int) -> None:
    p, right = [], []
    for seed in range(1, 1 + 350 // count):
        query, gallery = people(count, seed)
        for i in range(len(query)):
            others = gallery.pids != query.pids[i]
            for keep in (np.ones(len(gallery), bool), others):  # searched for twice
                scores = (gallery.features[keep, 0] @ query.features[i, 0]).astype(float)
                order = np.argsort(-scores)[:10]
                p.append([fitted.probability(scores[order], images) for images in (others.sum(), fitted.images)])
                right.append(gallery.pids[keep][order] == query.pids[i])
    p, blind, right = *np.moveaxis(p, 1, 0), np.array(right)
    assert (np.diff(p, axis=1) <= 0).all()
    assert calibration_error(p.ravel(), right.ravel()) < 0.05 and calibration_error(p[:, 0], right[:, 0]) < 0.05
    if count < 100:  # who takes no account of the gallery's size is wrong
        assert calibration_error(blind.ravel(), right.ravel()) > 0.07


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_measured_is_of_the_other_half(seed: int) -> None:
    query, gallery = people(800, 5)
    (q, g), (q2, g2) = halves(query, gallery, seed)
    assert not set(q.pids) & set(q2.pids) and len(q) == len(q2) == 800
    assert not set(g.pids) - {0} & set(g2.pids) and len(g) + len(g2) == len(gallery)
    found = calibrate(query, gallery, seed=seed, **ABOUT)
    assert found.measured.error < 0.05 and found.measured.error_first < 0.07  # the latter of 1,600 hits
    assert 0.007 < found.measured.pairs.reached < 0.013
    pairs = compare(q2, g2).impostor
    assert found.measured.pairs.reached == pytest.approx(np.mean(pairs > found.measured.pairs.threshold), abs=1e-12)
    assert np.mean(compare(q, g).impostor > found.measured.pairs.threshold) == pytest.approx(0.01, abs=1e-4)
    # On the other half nobody learns from: other features there, the same fit.
    changed = np.where(np.isin(query.pids, q2.pids)[:, None, None], -query.features, query.features)
    again = calibrate(Features(changed, query.pids, query.camids, query.keys), gallery, seed=seed, **ABOUT)
    assert again.probability == found.probability and again.measured != found.measured


def test_too_few_people_and_scores_that_say_nothing() -> None:
    with pytest.raises(UserError, match="20 people"):
        calibrate(*people(19, 0), **ABOUT)
    calibrate(*people(20, 0), **ABOUT)
    query, gallery = people(40, 0)
    with pytest.raises(UserError):
        calibrate(Features(-query.features, query.pids, query.camids, query.keys), gallery, **ABOUT)


# ------------------------------------------------------------------------------------------ the commands
@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> OutputFolder:
    """A run `tiny` and a teacher `tutor` on data with 24 people to test on."""
    folder = tmp_path_factory.mktemp("open")
    make_dataset(folder / "data", preset="tiny", test_ids=24, images_per_camera=1, min_cameras=3)
    return make_runs(folder, folder / "data", tiny="gray")


@pytest.fixture
def copied(runs: OutputFolder, tmp_path: Path) -> OutputFolder:
    shutil.copytree(runs.folder / "outputs", tmp_path / "outputs")
    shutil.copytree(runs.folder / "models", tmp_path / "models")
    return OutputFolder(tmp_path, runs.data)


@pytest.fixture
def search(copied: OutputFolder, script: Script) -> Script:
    asked = read_split(copied.data, "query").paths[:3]
    where = ("--gallery", copied.data / "bounding_box_test", "--query", *asked, "--top", 5, *copied.where)
    return lambda *options: script("search", "--name", "tiny", *where, *options)


def clean(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome.out


def hits(printed: str) -> list[list[list[str]]]:
    """The words of every hit by query: rank, score, probability if there is one, path."""
    blocks = printed.partition("page written")[0].split("\n\n")[1:]
    return [[line.split() for line in block.splitlines()[1:]] for block in blocks]


def test_open_set_adds_to_the_report_and_changes_nothing(copied: OutputFolder, script: Script) -> None:
    plain = clean(script("test", "--teacher", "tutor", *copied.where))
    file = copied.folder / "models" / "tutor" / "reid.json"
    before = json.loads(file.read_text())
    out = clean(script("test", "--teacher", "tutor", *copied.where, "--open-set"))
    report = json.loads(file.read_text())
    rates = report.pop("open_set")
    assert report == before and out.startswith(plain.partition("\nwritten")[0])
    assert all(word in out for word in ("EER", "TAR", "DIR")) and 0 < rates["eer"] < 1
    assert [point["rate"] for point in rates["tar"]] == [0.1, 0.01, 0.001, 0.0001]


def test_probabilities_of_a_search(copied: OutputFolder, script: Script, search: Script) -> None:
    plain = hits(clean(search()))
    out = clean(script("reid_eval/calibrate", "--name", "tiny", *copied.where))
    file = copied.folder / "outputs" / "tiny" / FILE
    found = Calibration.model_validate_json(file.read_text())
    assert str(file) in out and found.people == found.measured.people == 12

    printed = clean(search())
    shown = hits(printed)
    assert [[[*words[:2], words[3]] for words in block] for block in shown] == plain  # the same lists
    images = len(list((copied.data / "bounding_box_test").iterdir()))
    for block in shown:
        p = found.probability(np.array([float(words[1]) for words in block]), images)
        np.testing.assert_allclose([float(words[2].removeprefix("p=")) for words in block], p, atol=2e-3)
    page = next((file.parent / "search").glob("*/results.html"))
    assert page.read_text().count("p=0.") + page.read_text().count("p=1.") == 15

    every = sorted(float(words[2].removeprefix("p=")) for block in shown for words in block)
    least = round((every[7] + every[8]) / 2, 4)
    printed = clean(search("--min-probability", least))
    for fewer, block in zip(hits(printed), shown, strict=True):
        assert fewer == [words for words in block if float(words[2].removeprefix("p=")) >= least]
    assert [not block for block in hits(clean(search("--min-probability", 1)))] == [True] * 3
    assert page.read_text().count("nobody above 1") == 3

    assert "calibrated with" not in search().err
    file.write_text(found.model_copy(update={"images": images / 5}).model_dump_json())
    assert "calibrated with" in search().err  # its gallery was far smaller


def test_a_calibration_belongs_to_one_net(copied: OutputFolder, script: Script, search: Script) -> None:
    nothing = search("--min-probability", 0.5)
    assert "reid_eval.calibrate --name tiny" in nothing.error
    clean(script("reid_eval/calibrate", "--teacher", "tutor", *copied.where))
    theirs = copied.folder / "models" / "tutor" / FILE
    file = theirs.rename(copied.folder / "outputs" / "tiny" / FILE)
    assert str(file) in search("--min-probability", 0.5).error
    foreign = search()
    assert "p=" not in clean(foreign) and str(file) in foreign.err
    content = json.loads(file.read_text())
    for damage in (
        file.read_text()[:100],
        "[]",
        json.dumps(content | {"format": 2}),
        json.dumps(content | {"probability": content["probability"] | {"below": -1}}),
        json.dumps(content | {"probability": content["probability"] | {"bias": float("nan")}}),
    ):
        file.write_text(damage)
        assert str(file) in search().error


def test_bad_data_for_a_calibration(copied: OutputFolder, script: Script, tiny_data: Path, tmp_path: Path) -> None:
    command = ("reid_eval/calibrate", "--name", "tiny", *copied.where)
    before = contents(copied.folder)
    assert "20 people" in script(*command, "--data", tiny_data).error
    # Whom the net was trained on: by name in its own data, by picture anywhere.
    shutil.copytree(copied.data, other := tmp_path / "other")
    before |= contents(copied.folder)
    picture = read_split(copied.data, "train_all").paths[0]
    shutil.copyfile(picture, other / "query" / "9999_c1s1_000000_00.jpg")
    assert "images of train_all" in script(*command, "--data", other).error
    (other / "query" / "9999_c1s1_000000_00.jpg").unlink()
    config = copied.folder / "outputs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace(str(copied.data), str(other)))
    person = read_split(copied.data, "query").paths[0]
    shutil.copyfile(person, other / "query" / picture.name)
    assert "identities of train_all" in script(*command).error
    assert not (config.parent / FILE).exists() and set(contents(copied.folder)) >= set(before)
