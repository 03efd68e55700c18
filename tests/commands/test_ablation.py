"""The ablation: real runs in its smallest preset, interrupted and continued; its table, its oracle, its data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL_LOSSES, CPU, random_batches, tiny_config, tiny_trainer

import precision
from data.folders import read_split
from data.images import denormalise
from data.loader import Batch
from files import hold_folder, write_json
from mannequins import dataset
from mannequins.dataset import Settings, load_factors, make_settings
from mannequins.truth import shrink
from reIDmodel import build_teacher
from runs.snapshot import snapshots
from studies.ablation import __main__ as ablation
from studies.ablation import runs as ablation_runs
from studies.ablation import table
from studies.ablation.cells import (
    BETAS,
    CELLS,
    OPTION_CELLS,
    PAPER_CELLS,
    PRESETS,
    STRONG,
    cell_config,
    common_steps,
    is_both,
    needs,
    read_base,
    starts_as_both,
)
from studies.ablation.runs import Study, TrueSwaps, long_epochs, prepare_data, train
from trainer import DGNetTrainer, TeacherTrainer
from utils import ROOT, UserError, run_cli

RESULTS = ROOT / "studies/ablation/results"
pytestmark = pytest.mark.usefixtures("one_thread")


def command(out: Path, *options: str) -> int:
    """The exit status of the command, run in this process."""
    arguments = ["--preset", "tiny", "--seeds", "1", "--out", str(out), "--device", "cpu", *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["studies.ablation", *arguments])
        run_cli(ablation.main)
    return stop.value.code or 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The steps that are made from now on: (teacher or dgnet, iteration)."""
    made: list[tuple[str, int]] = []
    for task, kind in (("teacher", TeacherTrainer), ("dgnet", DGNetTrainer)):

        def step(self, *arguments, task=task, step=kind.step):
            made.append((task, arguments[-1]))
            return step(self, *arguments)

        monkeypatch.setattr(kind, "step", step)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two cells, stopped by SIGTERM in the second one."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    step = DGNetTrainer.step

    def stopped(self, a, b, t):
        if t == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, a, b, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DGNetTrainer, "step", stopped)
        assert command(out, "--cells", "teacher", "both") == 128 + signal.SIGTERM
    assert {path.parent.name for path in out.glob("outputs/*/result-val.json")} == {"teacher-0"}
    assert 5 in snapshots(out / "outputs/both-0/checkpoints")
    assert [run["cell"] for run in json.loads((out / "results-val.json").read_text())["runs"]] == ["teacher"]
    return out


@pytest.fixture(scope="module")
def study(finished: Path) -> Study:
    """The finished cells, for more runs beside them."""
    assert command(finished, "--cells", "both") == 0
    data, held, factors = prepare_data(PRESETS["tiny"], None, finished)
    return Study(PRESETS["tiny"], finished, data, held, factors, CPU, 1)


def test_an_interrupted_command_continues_and_repeats_nothing(finished, steps):
    assert command(finished, "--cells", "both") == 0
    assert steps == [("dgnet", 5), ("dgnet", 6), ("dgnet", 7)]
    results = json.loads((finished / "results-val.json").read_text())
    assert [run["cell"] for run in results["runs"]] == ["teacher", "both"]
    assert results["data"] == PRESETS["tiny"].data and results["precision"] == "fp32"
    both = results["runs"][1]
    assert both["steps"] == both["time"]["steps"] == 8 and both["time"]["seconds"] > 0
    assert set(both["reid"]) == {f"beta {beta:g}" for beta in BETAS} | {"fine"}
    generation = both["generation"]
    assert generation["reduction"] == pytest.approx(1 - generation["changed"] / generation["copy"])
    # A net of eight steps draws nothing that looks real; true swaps do.
    assert 0 <= generation["fid_of_true"] < generation["fid"]
    assert 0 < generation["brightness"] <= generation["changed"] <= generation["brightness"] + generation["colour"]
    assert 0 < generation["recoloured"] < generation["copy"]
    assert set(generation["shares"]) == {"shade", "pattern", "colour"}
    assert "| both " in (finished / "table-val.md").read_text()
    assert (finished / "figure-val.png").read_bytes().startswith(b"\x89PNG")
    steps.clear()
    assert command(finished, "--cells", "both") == 0 and steps == []


def test_test_identities_are_scored_once(study, steps, capsys):
    options = ["--cells", "teacher", "--evaluate", "test"]
    result = study.out / "outputs/teacher-0/result-test.json"
    assert command(study.out, *options) == 0
    first = json.loads(result.read_text())
    assert first["evaluated_on"] == "test" and first["times_scored_on_test"] == 1
    assert len(read_split(study.data, "query")) != len(read_split(study.held, "query"))
    before = result.stat().st_mtime_ns
    assert command(study.out, *options) == 0 and result.stat().st_mtime_ns == before
    result.unlink()
    assert command(study.out, *options) == 2 and not result.exists()
    assert "teacher-0" in capsys.readouterr().err
    assert command(study.out, *options, "--again") == 0
    assert json.loads(result.read_text())["times_scored_on_test"] == 2
    assert steps == []


def test_refusals(study, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    for options, named in (
        (["--data_seed", "9", "--data_root", str(study.data)], "--data_root"),
        (["--data_seed", "9"], "seed=7"),
        (["--preset", "small"], str(study.out)),
        (["--out", str(tmp_path)], "mine.txt"),
    ):
        capsys.readouterr()
        assert command(study.out, *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in error and named in error


def test_data_of_another_seed(study, tmp_path):
    """Other people, everything else as in the preset, and the results say which."""
    assert command(tmp_path / "out", "--cells", "teacher", "--data_seed", "9") == 0
    result = json.loads((tmp_path / "out/results-val.json").read_text())
    assert result["data"] == PRESETS["tiny"].data | {"seed": 9}
    people, others = study.factors.people, load_factors(tmp_path / "out/data/all").people
    assert people.keys() == others.keys() and people != others


def test_a_run_of_other_settings_is_not_continued(study):
    changed = replace(study, preset=replace(study.preset, dgnet=study.preset.dgnet | {"gan_w": 0.5}))
    with pytest.raises(UserError, match=r"both-0: .*gan_w was 0.2, is 0.5"):
        train(changed, ("both", 0))


def test_a_run_that_fails_takes_with_it_what_needs_it_and_no_more(study, tmp_path, monkeypatch, capsys):
    def make(_, run, where):
        made.append(run)
        if run == ("both", 0):
            raise UserError("a loss is not finite")
        ablation.result_file(empty, run, where).write_text("{}")

    made: list = []
    empty = replace(study, out=tmp_path)
    monkeypatch.setattr(ablation, "make", make)
    runs = ablation.choose_runs(empty, ["alpha_1", "no_fake_id", "both"], 2)
    assert ablation.work(empty, runs, "val", again=False) == {("both", 0), ("alpha_1", 0)}
    assert made == [run for run in runs if run != ("alpha_1", 0)] and len(runs) == 8
    assert "both-0" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(tmp_path):
    with hold_folder(tmp_path) as first, hold_folder(tmp_path) as second:
        assert first and not second


# ------------------------------------------------------------------------------------------------ data
def test_held_out_identities_are_whole_groups_that_no_run_trains_on(study):
    everyone = read_split(study.data, "train_all")
    train_all, query, gallery = (read_split(study.held, split) for split in ("train_all", "query", "gallery"))
    trained, held = set(train_all.pids.tolist()), set(query.pids.tolist())
    assert held == set(gallery.pids.tolist()) and not trained & held
    assert trained | held == set(everyone.pids.tolist())
    names = [path.name for side in (train_all, query, gallery) for path in side.paths]
    assert sorted(names) == sorted(path.name for path in everyone.paths)

    def groups(pids):
        return {study.factors.people[f"{pid:04d}"].group for pid in pids}

    assert len(held) == 3 and not groups(trained) & groups(held)
    views = list(zip(query.pids.tolist(), query.camids.tolist(), strict=True))
    assert len(views) == len(set(views))


SMALL = dict(train_ids=144, test_ids=96, distractors=60, junk=40, test_group_size=12)


@pytest.mark.parametrize("name, settings", [("small", SMALL | {"seed": 7}), ("scratch", SMALL | {"seed": 8})])
def test_presets_draw_the_data_of_the_results(tmp_path, monkeypatch, name, settings):
    """Whatever the renderer's presets are by now."""
    common = dict(cameras=6, min_cameras=3, train_cameras=8, images_per_camera=2, group_size=3)
    common |= dict(tint=0.05, light=0.08, noise=3.0, occluders=0.08)
    drawn = []
    monkeypatch.setattr(ablation_runs, "make_dataset", lambda out, **how: drawn.append(make_settings(**how)))
    monkeypatch.setattr(ablation_runs, "is_embedded", lambda data: False)
    monkeypatch.setattr(ablation_runs, "hold_out", lambda *_: None)
    monkeypatch.setitem(dataset.PRESETS, "demo", dict(train_ids=9, tint=0.9))
    prepare_data(PRESETS[name], None, tmp_path)
    assert drawn == [Settings(**common, **settings)]


def test_data_that_do_not_suffice(study, tiny_data, tmp_path):
    with pytest.raises(UserError, match="8 training identities"):
        ablation_runs.hold_out(tiny_data, tmp_path, None, 1 / 7)
    bare = replace(study, factors=None)
    assert {name for name, _ in ablation.choose_runs(bare, None, 1)} == set(PAPER_CELLS) - {"oracle", "alpha_0.2"}
    with pytest.raises(UserError, match="--cells oracle"):
        ablation.choose_runs(bare, ["oracle"], 1)


# ------------------------------------------------------------------------------------------------ cells
def test_every_cell_of_every_preset_has_a_configuration():
    for preset in PRESETS.values():
        configs = {n: cell_config(preset, n, 1, data_root="d", **extra(n)) for n in CELLS}
        both = configs["both"]
        assert common_steps(both) % both.snapshot_save_iter == 0 and both.keep_every == common_steps(both) > 0
        assert both.teacher == "teacher-1"
        whole = {n for n, cfg in configs.items() if cfg.task == "dgnet" and not starts_as_both(n, cfg)}
        assert whole == {"both", "no_fake_id"} | (set() if both.id_freeze_iter else {"live_f"})
        # A live code has an effect as soon as the id net learns or a ramp begins.
        for early in ("id_freeze_iter", "warm_iter"):
            live = configs["live_f"].model_copy(
                update={early: common_steps(both) - 1, "warm_teacher_iter": common_steps(both)}
            )
            assert common_steps(live) == common_steps(both) and not starts_as_both("live_f", live)
            assert starts_as_both("alpha_1", live)
        assert needs("alpha_1", configs["alpha_1"], 1) == {("teacher", 0), ("teacher", 1), ("both", 1)}
        assert needs("teacher", configs["teacher"], 1) == set()


def test_the_strong_recipe_is_the_plain_one_and_its_options():
    plain, strong = (read_base(ROOT / f"configs/{name}.yaml") for name in ("photos-teacher", "photos-strong-teacher"))
    assert strong == plain | STRONG
    for name in OPTION_CELLS:
        assert needs(name, cell_config(PRESETS["photos-options"], name, 1, data_root="d"), 1) == set()


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_what_the_device_has(study: Study, monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    """So that a run which goes on is compared with what it was started with."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    whole = replace(study, preset=PRESETS["small"])
    assert {whole.config(name, 0).precision for name in ("teacher", "both")} == {"bf16" if has else "fp32"}


def test_a_folder_is_of_one_precision(tmp_path, monkeypatch, capsys):
    """Or runs of two machines would stand in one table."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], dgnet={}, teacher={}))  # auto, as the files say
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / ablation.NOTE, dict(preset="tiny", data_root=None, precision="bf16"))
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert command(tmp_path / "out") == 2
    assert "precision bf16, not fp32" in capsys.readouterr().err


def test_a_setting_that_both_has_is_not_trained_twice(study):
    for name, same in (("small", "alpha_0.2"), ("scratch", "alpha_1")):
        assert {cell for cell in CELLS if is_both(PRESETS[name], cell)} == {same}
    runs = ablation.choose_runs(study, ["alpha_0.2", "alpha_1"], 1)
    assert runs == [("teacher", 0), ("both", 0), ("alpha_1", 0)]


def extra(name: str) -> dict[str, str]:
    return {"extra_data": "e"} if name == "offline" else {}


def test_long_teachers_have_the_time_of_teacher_and_dgnet_together(study, tmp_path):
    empty = replace(study, out=tmp_path)
    batches = len(read_split(study.held, "train_all")) // 8
    # A teacher's step takes 2 s, so its two epochs 4 x batches; DG-Net's eight steps 40 s.
    for name, timed in (("teacher-0", dict(steps=3, seconds=6.0)), ("both-0", dict(steps=4, seconds=20.0))):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "time.json").write_text(json.dumps(timed | {"wall": 0}))
    assert long_epochs(empty, 0, 8 * batches) == round((4 * batches + 40) / (2 * batches))
    assert long_epochs(empty, 0, 16 * batches) == round((4 * batches + 40) / (4 * batches))
    assert long_epochs(replace(empty, long_epochs=6), 0, 16 * batches) == 3
    (tmp_path / "outputs/both-0/time.json").unlink()
    with pytest.raises(UserError, match="--long_epochs"):
        long_epochs(empty, 0, 8 * batches)


@pytest.mark.parametrize(
    "cell, changes", [("live_f", {}), pytest.param("alpha_1", dict(id_freeze_iter=0), marks=pytest.mark.slow)]
)
def test_a_run_that_begins_as_both_is_the_run_from_the_start(study, tmp_path, steps, monkeypatch, cell, changes):
    """Its weights, bit for bit, where the id net rests in the common steps and where it learns in them."""
    study = replace(study, preset=replace(study.preset, dgnet=study.preset.dgnet | changes))
    if changes:  # another `both` to begin with
        shutil.copytree(study.out / "models/teacher-0", tmp_path / "models/teacher-0")
        study = replace(study, out=tmp_path)
        assert train(study, ("both", 0)) == 0
        steps.clear()
    run = (cell, 0)
    assert train(study, run) == 0
    assert [t for _, t in steps] == [4, 5, 6, 7]
    weights = study.run(*run).checkpoints / "00000008/id.pt"
    begun_as_both = torch.load(weights)["a"]
    shutil.rmtree(study.run(*run).path)
    steps.clear()
    monkeypatch.setattr(ablation_runs, "copy_start", lambda *_: None)
    assert train(study, run) == 0
    assert [t for _, t in steps] == list(range(8))
    whole = torch.load(weights)["a"]
    assert all(torch.equal(begun_as_both[name], value) for name, value in whole.items())
    both = torch.load(study.run("both", 0).checkpoints / "00000008/id.pt")["a"]
    assert any(not torch.equal(both[name], value) for name, value in whole.items())


# ------------------------------------------------------------------------------------------------ oracle
def test_the_oracle_learns_from_the_true_swaps_of_the_batch(study, monkeypatch):
    """What the student of a real step sees besides the real images, mirrored back where it was mirrored."""
    preset = replace(study.preset, dgnet=study.preset.dgnet | {"crop_padding": 0})
    oracle = replace(study, preset=preset)
    cfg = cell_config(preset, "oracle", 0, data_root=str(study.held))
    names = [path.name for path in read_split(study.held, "train_all").paths]
    seen = []
    swap = TrueSwaps.__call__

    def spy(self, a: Batch, b: Batch, g, rng):
        images = swap(self, a, b, g, rng)
        seen.append((a.index, b.index, images))
        return images

    monkeypatch.setattr(TrueSwaps, "__call__", spy)
    monkeypatch.setattr(ablation_runs, "copy_start", lambda *_: None)
    assert train(oracle, ("oracle", 0)) == 0
    assert len(seen) == cfg.max_iter - 1 - cfg.warm_teacher_iter  # weight 0 up to and including that step
    for a, b, (x_ba, x_ab) in seen:
        for i, j, fed in (*zip(a, b, x_ba, strict=True), *zip(b, a, x_ab, strict=True)):
            true = shrink(study.factors.true_swap(appearance_of=names[i], structure_of=names[j]), (64, 32))
            got = denormalise(fed[None])[0].permute(1, 2, 0).numpy()
            assert np.array_equal(got, true) or np.array_equal(got[:, ::-1], true)
    shutil.rmtree(study.run("oracle", 0).path)


def test_only_the_teacher_loss_reads_the_images_that_are_fed_back():
    cfg = tiny_config(**ALL_LOSSES)

    def step(replaced: bool) -> dict[str, float]:
        torch.manual_seed(0)
        trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
        if replaced:
            trainer.fed_back = lambda a, b, g, rng: (a.x, b.x)
        return {name: float(value) for name, value in trainer.step(*random_batches(cfg), 3).items()}

    generated, replaced = step(False), step(True)
    assert {name for name in generated if generated[name] != replaced[name]} == {"teacher", "gen_total"}


# ------------------------------------------------------------------------------------------------ table
def made_up(name: str, seed: int, mAP: float, **values: float) -> dict:
    """A result whose every score is `mAP`."""
    dgnet = CELLS[name].task == "dgnet"
    settings = [f"beta {beta:g}" for beta in BETAS] + ["fine"] if dgnet else ["feature"]
    numbers = {"official": {"mAP": mAP, "rank1": 0.5}, "standard": {"mAP": mAP + 0.01, "rank1": 0.5}}
    result = {"cell": name, "seed": seed, "reid": dict.fromkeys(settings, numbers)}
    result["time"] = {"seconds": 3.0, "steps": 60}
    if dgnet:
        result["B_w"] = CELLS[name].changes.get("B_w", 0.2)
        result["generation"] = {"changed": 20.0, "reduction": 0.6, "ssim": 0.8, "rank1": 0.25, "fid": 9.0} | values
    return result


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_tables_follow_from_their_runs(file):
    stored = json.loads(file.read_text())
    rows = table.rows(stored["runs"])
    assert json.loads(json.dumps(rows)) == stored["table"]
    assert json.loads(json.dumps(table.sweep(stored["runs"]))) == stored["sweep"]
    assert [{"claim": text, "holds": holds} for text, holds in table.claims(rows)] == stored["claims"]


def test_mean_and_deviation_of_hand_made_results():
    results = [made_up("both", seed, mAP, fid=fid) for seed, mAP, fid in ((0, 0.5, 8), (1, 0.6, 9), (2, 0.7, 13))]
    rows = table.rows([*results, made_up("teacher", 0, 0.4)])
    assert [row["cell"] for row in rows] == ["teacher", "both", "both", "both"]
    teacher, both = rows[0], rows[1]
    assert teacher["values"]["mAP"] == (pytest.approx(40), None) and teacher["values"]["FID"] is None
    assert both["seeds"] == [0, 1, 2] and both["setting"] == "beta 0.5"
    assert both["values"]["mAP"] == (pytest.approx(60), pytest.approx(10))
    assert both["values"]["FID"] == (pytest.approx(10), pytest.approx(7**0.5))
    text = table.format_table(rows)
    assert "| 60.0 ± 10.0 " in text and "| 0.800 ± 0.000 " in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_differences_are_those_of_the_same_seed():
    results = [made_up("both", seed, mAP) for seed, mAP in ((0, 0.5), (1, 0.8), (2, 0.7))]
    results += [made_up("oracle", seed, mAP) for seed, mAP in ((2, 0.8), (0, 0.53))] + [made_up("teacher", 3, 0.9)]
    gains = {(row["cell"], row["setting"]): row["values"]["mAP - both"] for row in table.rows(results)}
    assert gains["oracle", "beta 0.5"] == (pytest.approx(6.5), pytest.approx(24.5**0.5))
    assert gains["teacher", "feature"] is None and gains["both", "beta 0.5"] is None
    assert gains["both", "fine"] == (pytest.approx(0), pytest.approx(0))
    over_teacher = {
        row["cell"]: row["values"]["mAP - teacher"] for row in table.rows([*results, made_up("both", 3, 0.95)])
    }
    assert over_teacher["both"] == (pytest.approx(5), None) and over_teacher["teacher"] is None


@pytest.mark.parametrize(
    ("mAPs", "reduction", "holds"),
    [
        ((0.80, 0.75, 0.78, 0.70, 0.72, 0.83, 0.70, 0.76), 0.6, [True] * 7),
        ((0.75, 0.76, 0.77, 0.70, 0.77, 0.76, 0.70, 0.74), 0.4, [False] * 7),
        ((0.80, None, None, 0.70, None, None, None, 0.76), 0.5, [None, None, None, True, None, True, None]),
    ],
)
def test_claims(mAPs, reduction, holds):
    names = "both", "primary_only", "no_feedback", "teacher_long", "teacher_erasing", "oracle", "teacher", "strong"
    results = [made_up(n, 0, mAP, reduction=reduction) for n, mAP in zip(names, mAPs, strict=True) if mAP]
    assert [held for _, held in table.claims(table.rows(results))] == holds


def test_claims_compare_the_same_seeds() -> None:
    results = [made_up("both", seed, 0.8) for seed in range(2)] + [made_up("primary_only", 0, 0.7)]
    assert table.claims(table.rows(results))[0][1] is None
    assert table.claims(table.rows(results[1:] + [made_up("primary_only", 1, 0.7)]))[0][1] is None
    assert table.claims(table.rows([*results, made_up("primary_only", 1, 0.7)]))[0][1] is True
