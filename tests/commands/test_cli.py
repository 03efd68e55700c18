"""`train.py` and `test.py` as a user meets them: a whole run, and what they say to bad input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ALL_LOSSES, TINY_DGNET, TINY_TEACHER, Outcome, merged
from PIL import Image

import demo
import precision
from config import load_config
from data.folders import check_test_set
from mannequins.dataset import make_dataset
from parallel import collectives
from reIDmodel import build_teacher
from runs.folder import RunFolder
from utils import ROOT, UserError, run_cli

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]


def shell(folder: Path, name: str, *arguments: object, **environment: str) -> Outcome:
    """Run a script in a process of its own, on the CPU, from another directory than the project's."""
    environment |= dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clean(outcome: Outcome) -> str:
    """The output of a script that succeeded without a warning."""
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Warning" not in outcome.err and "Traceback" not in outcome.err, outcome.err
    return outcome.out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@dataclass(frozen=True)
class Runs:
    """A teacher and a DG-Net run on the tiny data, as train.py left them."""

    folder: Path
    data: Path
    teacher: Outcome
    dgnet: Outcome

    def config(self, **changes: Any) -> Path:
        """The run's config file, or another beside it with `changes`."""
        path = self.folder / "tiny.yaml"
        if changes:
            values = merged(yaml.safe_load(path.read_text()), changes)
            path = self.folder / "changed.yaml"
            path.write_text(yaml.safe_dump(values))
        return path

    def images(self, folder: str = "bounding_box_train") -> int:
        return len(list((self.data / folder).iterdir()))

    @property
    def run(self) -> Path:
        return self.folder / "outputs" / "tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    schedule = dict(max_iter=6, snapshot_save_iter=3, image_save_iter=4, image_display_iter=4)
    dgnet = merged(TINY_DGNET, ALL_LOSSES | schedule | dict(data_root=str(tiny_data), teacher="tutor"))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(dgnet))
    (folder / "tiny-teacher.yaml").write_text(
        yaml.safe_dump(TINY_TEACHER | dict(data_root=str(tiny_data), num_workers=2))
    )
    common = ("--output_path", folder, "--threads", 1, "--device", "cpu")
    teacher = shell(folder, "train", "--config", "tiny-teacher.yaml", "--name", "tutor", *common)
    run = shell(folder, "train", "--config", "tiny.yaml", *common)
    return Runs(folder, tiny_data, teacher, run)


@pytest.fixture
def copied(trained: Runs, tmp_path: Path) -> Runs:
    """The same runs in a folder of the test's own."""
    folder = tmp_path / "runs"
    shutil.copytree(trained.folder, folder)
    return Runs(folder, trained.data, trained.teacher, trained.dgnet)


# ------------------------------------------------------------------------------------------ whole runs
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = ['test.py', '--help']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'test.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('heavy', sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--which_epoch" in done.stdout and done.stdout.endswith("heavy []\n")


def test_a_teacher_is_trained_and_put_where_dgnet_looks_for_it(trained: Runs) -> None:
    clean(trained.teacher)
    opts = yaml.safe_load((trained.folder / "models" / "tutor" / "opts.yaml").read_text())
    assert (opts["stride"], opts["nclasses"], opts["backbone"]) == (2, 8, "resnet10w8")
    state = torch.load(trained.folder / "models" / "tutor" / "net_last.pth", weights_only=True)
    assert state["classifier.classifier.0.weight"].shape == (8, 512)


def test_a_run_leaves_its_files(trained: Runs) -> None:
    clean(trained.dgnet)
    assert "6/6" in trained.dgnet.err and "gen_total=" in trained.dgnet.err and "step/s" in trained.dgnet.err
    files = sorted(contents(trained.run))
    names = ("dis.pt", "gen.pt", "id.pt", "manifest.json", "state.pt")
    assert files == [
        *(f"checkpoints/0000000{i}/{name}" for i in (3, 6) for name in names),
        "config.yaml",
        "images/test_00000004.png",
        "images/test_00000006.png",
    ]
    resolved = load_config(trained.run / "config.yaml")
    assert resolved == load_config(trained.config())
    assert (resolved.teacher_w, resolved.gen.dim, resolved.erasing_p) == (0.5, 4, 0.5)


def test_the_figure_shows_images(trained: Runs) -> None:
    with Image.open(trained.run / "images" / "test_00000006.png") as image:
        assert image.mode == "RGB"
        pixels = np.asarray(image).astype(float)
    assert pixels.shape[0] > 8 * 64 and pixels.std() > 20
    with Image.open(trained.run / "images" / "test_00000004.png") as image:
        assert (np.asarray(image) != pixels).any()


def test_tensorboard_gets_terms_weights_rates_and_figures(trained: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.folder / "logs" / "tiny"))
    events.Reload()
    tags = events.Tags()
    losses = {name.removeprefix("loss/") for name in tags["scalars"] if name.startswith("loss/")}
    pairs = ("recon_x", "recon_xp", "recon_f", "recon_s", "cyc", "adv", "dis")
    single = {"dis_total", "gen_total", "id", "pid", "recon_id", "teacher"}
    assert losses == single | {f"{name}_{image}" for name in pairs for image in "ab"}
    schedule = {"lr_g", "lr_d", "lr2", "recon_f_w", "recon_s_w", "recon_x_cyc_w", "teacher_w"}
    assert {f"schedule/{name}" for name in schedule} <= set(tags["scalars"])
    assert "images_per_second" in tags["scalars"] and len(tags["images"]) == 1
    assert [event.step for event in events.Scalars("loss/id")] == [1, 2, 3, 4, 5, 6]
    # warm_iter 2, warm_scale 0.1: the weight of iteration 5, logged as step 6, has risen by 0.3.
    weights = [event.value for event in events.Scalars("schedule/teacher_w")]
    assert weights == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.7, 0.8])
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))


def check_report(printed: str, file: Path, queries: int) -> dict[str, Any]:
    for words in ("trapezoidal", "Rank-1", "Rank-5", "Rank-10", "mAP", f"{queries} queries"):
        assert words in printed, words
    assert f"written to {file}" in printed
    report = json.loads(file.read_text())
    assert len(report["conventions"]) == 2
    for by_convention in report["tables"]["single query"].values():
        assert set(by_convention) == set(report["conventions"])
        for numbers in by_convention.values():
            assert 0 < numbers["rank1"] <= numbers["rank5"] <= numbers["rank10"] <= 1
            assert 0 < numbers["mAP"] < 1
    return report


def test_evaluation_of_a_run(trained: Runs) -> None:
    out = clean(shell(trained.folder, "test", "--name", "tiny", "--output_path", trained.folder, "--threads", 1))
    report = check_report(out, trained.run / "reid.json", trained.images("query"))
    assert (report["name"], report["iteration"]) == ("tiny", 6)
    assert len(report["tables"]["single query"]) == 3
    (trained.run / "reid.json").unlink()


def test_evaluation_of_a_teacher(trained: Runs, script: Script) -> None:
    options = ("--multi", "--batchsize", "auto", "--precision", "bf16")
    out = clean(script("test", "--teacher", "tutor", "--output_path", trained.folder, *options))
    file = trained.folder / "models" / "tutor" / "reid.json"
    report = check_report(out, file, trained.images("query"))
    assert "multi-query" in report["tables"] and report["precision"] == "bf16"
    file.unlink()


def test_evaluation_of_an_earlier_snapshot_on_other_data(trained: Runs, script: Script, tmp_path: Path) -> None:
    shutil.copytree(trained.data, tmp_path / "other")
    where = ("--output_path", trained.folder, "--name", "tiny")
    out = clean(script("test", *where, "--which_epoch", 3, "--test_dir", tmp_path / "other"))
    assert str(tmp_path / "other") in out
    report = json.loads((trained.run / "reid-other.json").read_text())
    assert (report["iteration"], report["trained_on"], report["tested_on"]) == (3, trained.data.name, "other")
    assert not (trained.run / "reid.json").exists(), "that of the run's own data set"
    (trained.run / "reid-other.json").unlink()
    assert re.search("--which_epoch 4.*3, 6", script("test", *where, "--which_epoch", 4).error)


def test_several_data_sets_give_a_table(trained: Runs, script: Script, tmp_path: Path) -> None:
    shutil.copytree(trained.data, tmp_path / "Other" / "pytorch")
    min((tmp_path / "Other" / "pytorch" / "bounding_box_test").iterdir()).unlink()  # junk
    roots = (trained.data, tmp_path / "Other" / "pytorch")
    where = ("--output_path", trained.folder, "--name", "tiny", "--multi")
    out = clean(script("test", *where, "--test_dir", *roots))
    files = {trained.data.name: trained.run / "reid.json", "Other": trained.run / "reid-Other.json"}
    reports = {name: check_report(out, file, trained.images("query")) for name, file in files.items()}
    assert [report["tested_on"] for report in reports.values()] == list(files)
    assert reports["Other"]["gallery"] < reports[trained.data.name]["gallery"]
    for name, report in reports.items():
        rows = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        expected = [
            f"{100 * by_convention[convention]['mAP']:.2f}"
            for by_setting in report["tables"].values()
            for convention in report["conventions"]
            for by_convention in by_setting.values()
        ]
        assert [row.split()[-2] for row in rows] == expected and len(rows) == 2 * 2 * 3
    for file in files.values():
        file.unlink()

    # What is wrong with the second shows before the first is begun.
    before = contents(trained.folder)
    again = script("test", *where, "--test_dir", trained.data, tmp_path / "nowhere")
    assert "nowhere" in again.error and again.out == ""
    assert "--test_dir" in script("test", *where, "--test_dir", tmp_path / "Other", roots[1]).error
    saved = script("test", *where, "--test_dir", *roots, "--save-features", tmp_path / "f.npz")
    assert "--save-features" in saved.error and not (tmp_path / "f.npz").exists()
    assert contents(trained.folder) == before


def test_a_dry_run_builds_everything_and_writes_nothing(trained: Runs, script: Script) -> None:
    before, n = contents(trained.folder), trained.images()
    out = clean(
        script("train", "--config", trained.config(), "--name", "dry", "--output_path", trained.folder, "--dry-run")
    )
    assert contents(trained.folder) == before
    numbers = f"{n} images of 8 identities", "(2, 3, 64, 32)", "(16, 32, 16)", "(256,)", f"{n // 2} per epoch"
    for words in (*numbers, "Generator", "Discriminator", "IdNetAB", "teacher_w"):
        assert words in out, words
    where = ("--name", "dry", "--output_path", trained.folder, "--dry-run")
    clean(script("train", "--config", trained.config(), *where, "--set", "single=edge"))
    teacher = trained.folder / "tiny-teacher.yaml"
    out = clean(script("train", "--config", teacher, "--output_path", trained.folder, "--dry-run"))
    assert f"{2 * (n // 16)} steps, {n // 16} per epoch" in out
    assert contents(trained.folder) == before


@pytest.mark.parametrize("has", [True, False])
def test_a_run_keeps_the_precision_that_auto_was(
    trained: Runs, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    common = ("--name", "auto", "--output_path", tmp_path, "--device", "cpu")
    settings = ("--set", "precision=auto", "teacher_style=3", "snapshot_save_iter=1")
    out = clean(script("train", "--config", trained.config(), *common, *settings, "--dry-run"))
    assert f"on cpu in {'bf16' if has else 'fp32'}, " in out
    clean(script("train", "--config", trained.config(), *common, *settings, "max_iter=1"))
    assert load_config(tmp_path / "outputs/auto/config.yaml").precision == ("bf16" if has else "fp32")
    # Elsewhere the folder's own config goes on as it was, `auto` with a note of what is different.
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    own = script("train", *common, "--resume", "--set", "max_iter=2")
    assert own.code == 0 and "precision was" not in own.err
    auto = script("train", "--config", trained.config(), *common, "--resume", *settings, "max_iter=3")
    assert auto.code == 0 and ("precision was fp32, is bf16" in auto.err) == (not has)


def test_of_several_processes_the_first_decides_what_auto_is(
    trained: Runs, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    monkeypatch.setattr(collectives, "gather", lambda value: ["bf16", value])  # as the second of two
    where = ("--name", "auto", "--output_path", trained.folder, "--dry-run", "--set", "precision=auto")
    assert "on cpu in bf16, " in clean(script("train", "--config", trained.config(), *where))


def test_a_run_is_never_overwritten(trained: Runs, script: Script, tmp_path: Path) -> None:
    before = contents(trained.folder)
    where = ("--output_path", trained.folder)
    for config, name in (("tiny", "tiny"), ("tiny-teacher", "tutor")):
        error = script("train", "--config", trained.folder / f"{config}.yaml", "--name", name, *where).error
        assert name in error and "--resume" in error and "--name" in error
    assert contents(trained.folder) == before
    folder = tmp_path / "outputs" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    (tmp_path / "models").symlink_to(trained.folder / "models")
    start = ("train", "--config", trained.config(), "--name", "mine", "--output_path", tmp_path)
    assert "mine" in script(*start).error
    assert contents(folder).keys() == {"notes.txt"}


def test_a_resumed_run_ends_as_an_uninterrupted_one(copied: Runs, script: Script) -> None:
    whole = contents(copied.run)
    shutil.rmtree(copied.run / "checkpoints" / "00000006")
    (copied.run / "images" / "test_00000006.png").unlink()
    where = ("--output_path", copied.folder, "--resume", "--threads", 1, "--device", "cpu")
    resumed = script("train", "--config", copied.config(), *where)
    clean(resumed)
    assert "3 of 6" in resumed.err
    assert contents(copied.run) == whole, "every file, bit for bit"


def test_resume_needs_the_name_only(copied: Runs, script: Script) -> None:
    """Without --config the run's own is taken; a finished run has nothing left to do."""
    outcome = script("train", "--name", "tiny", "--resume", "--output_path", copied.folder)
    assert outcome.code == 0 and "6 of 6" in outcome.err
    clean(script("train", "--name", "tiny", "--output_path", copied.folder, "--set", "max_iter=7", "--resume"))
    assert (copied.run / "checkpoints" / "00000007" / "state.pt").is_file()


def test_another_teacher_of_the_same_name_is_noticed(copied: Runs, script: Script) -> None:
    shutil.rmtree(copied.run / "checkpoints" / "00000006")
    weights = copied.folder / "models" / "tutor" / "net_last.pth"
    state = torch.load(weights, weights_only=True)
    state["model.conv1.weight"] += 0.01
    torch.save(state, weights)
    where = ("--name", "tiny", "--output_path", copied.folder, "--threads", 1)
    outcome = script("train", *where, "--resume", "--set", "max_iter=7")
    (note,) = (line for line in outcome.err.splitlines() if line.startswith("warning"))
    assert "teachers" in note and note.count(" was ") == 1


# ------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def refused(trained: Runs, script: Script, tmp_path: Path) -> Callable[..., str]:
    """Start a run that must be refused, with `--set` overrides; nothing may be written. Returns the error line."""

    def start(*settings: str, options: tuple[object, ...] = (), config: Path | None = None) -> str:
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        if not (output / "models").exists():
            shutil.copytree(trained.folder / "models", output / "models")
        before = contents(output)
        arguments = ["--config", config or trained.config(), "--name", "new", "--output_path", output, *options]
        outcome = script("train", *arguments, *(["--set", *settings] if settings else []))
        assert contents(output) == before
        return outcome.error

    return start


Refused = Callable[..., str]


def test_data_that_is_not_there(refused: Refused, trained: Runs, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(f"data_root={tmp_path / 'nowhere'}")
    empty = tmp_path / "empty"
    for folder in (empty, empty / "train_all", empty / "train_all" / "0002"):
        folder.mkdir()
        assert "train_all" in refused(f"data_root={empty}")
    one = tmp_path / "one" / "bounding_box_train"
    one.mkdir(parents=True)
    images = sorted((trained.data / "bounding_box_train").iterdir())
    for path in images:
        if path.name.split("_")[0] == images[0].name.split("_")[0]:
            shutil.copy(path, one)
    assert re.search("1 identity .* 2", refused(f"data_root={one.parent}"))
    assert re.search(f"{trained.images()} .*batch_size 1000", refused("batch_size=1000"))


def test_a_truncated_image_is_named_or_skipped(refused: Refused, script: Script, trained: Runs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained.data, data)
    first, second = sorted((data / "bounding_box_train").iterdir())[:2]
    cut(first)
    second.write_bytes(b"")
    message = refused(f"data_root={data}")
    for words in (f"2 of {trained.images()}", first.name, second.name, "skip_bad_images"):
        assert words in message

    options = ("--output_path", trained.folder, "--dry-run", "--set", f"data_root={data}", "skip_bad_images=true")
    outcome = script("train", "--config", trained.config(), "--name", "new", *options)
    assert f"{trained.images() - 2} images of 8 identities" in clean(outcome)
    (warning,) = [line for line in outcome.err.splitlines() if line.startswith("warning:")]
    assert f"2 of {trained.images()}" in warning and first.name in warning


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(bacth_size=4), "bacth_size.*batch_size"),
        (dict(gen=dict(dimm=4)), "gen.dimm.*gen.dim"),
        (dict(batch_size="many"), "batch_size: "),
        (dict(crop_image_height=-64), "crop_image_height: "),
        (dict(gen=dict(dim=-4)), "gen.dim: "),
        (dict(ID_class=751), "ID_class.*751"),
        (dict(backbone="vgg16"), "backbone.*vgg16"),
        (dict(backbone="resnet10w16"), "gen.id_dim.*128"),
        (dict(gen=dict(dec="slim")), "gen.dec: "),
    ],
    ids=str,
)
def test_bad_configs(refused: Refused, trained: Runs, changes: dict[str, Any], words: str) -> None:
    config = trained.config(**changes)
    assert re.search(words, refused(config=config))


def test_a_config_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(config=tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "empty.yaml: " in refused(config=tmp_path / "empty.yaml")


def test_teachers_that_do_not_fit(refused: Refused, tmp_path: Path) -> None:
    assert "--config configs/teacher.yaml --name nobody" in refused("teacher=nobody")
    assert "nobody" in refused("teacher='tutor,nobody'")
    other = tmp_path / "output" / "models" / "other"
    other.mkdir()
    torch.save(build_teacher(5, backbone="resnet10w8").state_dict(), other / "net_last.pth")
    (other / "opts.yaml").write_text("stride: 2\nbackbone: resnet10w8\n")
    for settings in ([], ["id_init=teacher", "teacher_w=0"]):
        assert re.search("net_last.pth.* 5 .* 8", refused("teacher=other", *settings))
    for opts in ("stride: 3\n", "stride: 2\nbackbone: resnet10w8\ncrop_image_height: tall\n"):
        (other / "opts.yaml").write_text(opts)
        assert "opts.yaml" in refused("teacher=other")
    (other / "opts.yaml").unlink()
    cut(other / "net_last.pth")
    assert "net_last.pth" in refused("teacher=other")
    torch.save({"epoch": 3}, other / "net_last.pth")
    assert "net_last.pth" in refused("teacher=other")


def test_a_checkpoint_cut_in_half(copied: Runs, script: Script) -> None:
    cut(copied.run / "checkpoints" / "00000006" / "gen.pt")
    before = contents(copied.folder)
    # The end of the run lies behind, so make it longer.
    resumed = ("train", "--config", copied.config(), "--output_path", copied.folder, "--set", "max_iter=7")
    message = script(*resumed, "--resume").error
    assert "00000006/gen.pt" in message and "--resume auto" in message
    assert contents(copied.folder).keys() - before.keys() == set()
    outcome = script(*resumed, "--resume", "auto")
    assert outcome.code == 0 and "3 of 7" in outcome.err


def test_a_checkpoint_cut_in_half_before_evaluation(copied: Runs, script: Script) -> None:
    cut(copied.run / "checkpoints" / "00000006" / "id.pt")
    error = script("test", "--name", "tiny", "--output_path", copied.folder).error
    assert "00000006/id.pt" in error and error.endswith("--which_epoch 3")
    assert not (copied.run / "reid.json").exists()


def test_resuming_what_is_not_there(copied: Runs, script: Script) -> None:
    where = ("--config", copied.config(), "--output_path", copied.folder)
    assert "--resume" in script("train", *where, "--name", "new", "--resume").error
    assert re.search("7.*3, 6", script("train", *where, "--resume", 7).error)
    assert "--resume soon" in script("train", *where, "--resume", "soon").error
    assert not (copied.folder / "outputs" / "new").exists()


def test_resuming_with_another_number_of_identities(copied: Runs, script: Script, tmp_path: Path) -> None:
    data = tmp_path / "fewer"
    shutil.copytree(copied.data, data)
    names = sorted({path.name[:4] for path in (data / "bounding_box_train").iterdir()})
    for path in (data / "bounding_box_train").glob(f"{names[-1]}_*"):
        path.unlink()
    outcome = script(
        "train", "--config", copied.config(), "--output_path", copied.folder, "--resume", "--set",
        f"data_root={data}", "teacher_style=3", "max_iter=7",
    )  # fmt: skip
    assert re.search("8 .*ID_class is 7", outcome.error)


def test_a_run_whose_losses_explode_stops(refused: Refused, script: Script, trained: Runs, tmp_path: Path) -> None:
    outcome = script(
        "train", "--config", trained.config(), "--name", "new", "--output_path", tmp_path,
        "--set", "lr_g=1e30", "max_iter=5", "snapshot_save_iter=1", "teacher_style=3",
    )  # fmt: skip
    assert "recon_x_a nan" in outcome.error
    for path in (tmp_path / "outputs" / "new" / "checkpoints").rglob("gen.pt"):
        state = torch.load(path, weights_only=True)["a"]
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    "settings,options,words",
    [
        (["apex=true"], ["--device", "cpu"], "apex.*CUDA"),
        (["precision=fp16"], ["--device", "cpu"], "precision"),
        (["apex=true", "precision=bf16"], [], "apex.*precision"),
        ([], ["--device", "tpu9"], "--device tpu9"),
        ([], ["--device", "meta"], "--device meta"),
        ([], ["--device", "cuda:99"], "--device cuda:99"),
        (["batch_size=4"], ["--gpu_ids", "0,1"], "--gpu_ids 0,1.*--processes N"),
        ([], ["--gpu_ids", "0,0"], "--gpu_ids 0,0"),
        ([], ["--gpu_ids", "all"], "--gpu_ids all"),
        ([], ["--gpu_ids", "99"], "--gpu_ids 99"),
        ([], ["--gpu_ids", "0,1", "--processes", "3"], "--processes 3.*--gpu_ids"),
        ([], ["--processes", "0"], "--processes 0"),
        ([], ["--gpu_ids", "0", "--device", "cpu"], "--gpu_ids and --device"),
        ([], ["--threads", "0"], "--threads 0"),
        ([], ["--name", "a/b"], "--name 'a/b'"),
        ([], ["--name", ".."], "--name '..'"),
        (["batch_size"], [], "--set batch_size"),
        (["vgg_w=1", "vgg_weights=nowhere.pth"], [], "nowhere.pth"),
        (["pretrained=true"], [], "resnet10w8.*pretrained: false"),
        (["pretrained=true", "backbone_weights=nowhere.pth"], [], "nowhere.pth"),
    ],
)
def test_bad_options(refused: Refused, settings: list[str], options: list[str], words: str) -> None:
    assert re.search(words, refused(*settings, options=tuple(options)))


def test_the_release_number_of_no_gpu_is_the_cpu(trained: Runs, script: Script, tmp_path: Path) -> None:
    where = ("--output_path", trained.folder, "--name", "new", "--dry-run")
    assert "dgnet on cpu" in clean(script("train", "--config", trained.config(), *where, "--gpu_ids", "-1"))


def test_missing_imagenet_weights(trained: Runs, tmp_path: Path) -> None:
    """Without a network and without a cache: which file goes where."""
    settings = ("backbone=resnet18", "gen.id_dim=512", "pretrained=true", "teacher_style=3")
    arguments = ("--config", trained.config(), "--output_path", tmp_path / "out", "--set", *settings)
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    outcome = shell(tmp_path, "train", *arguments, TORCH_HOME=str(tmp_path / "cache"), **proxies)
    assert "resnet18-" in outcome.error and "checkpoints" in outcome.error
    assert str(tmp_path / "cache" / "hub" / "checkpoints") in outcome.error
    assert "--backbone-weights FILE" in outcome.error and "pretrained: false" in outcome.error
    assert not (tmp_path / "out").exists()


def test_backbone_weights_from_a_file(trained: Runs, script: Script, tmp_path: Path) -> None:
    weights = build_teacher(3, backbone="resnet10w8").model.state_dict()
    torch.save(weights, tmp_path / "trunk.pth")
    start = ("train", "--config", trained.config(), "--output_path", tmp_path, "--name", "new", "--set")
    settings = ("pretrained=true", "max_iter=1", "lr2=1e-12", "teacher_style=3")
    clean(script(*start, *settings, "--backbone-weights", tmp_path / "trunk.pth"))
    state = torch.load(tmp_path / "outputs" / "new" / "checkpoints" / "00000001" / "id.pt", weights_only=True)["a"]
    torch.testing.assert_close(state["model.conv1.weight"], weights["conv1.weight"], rtol=1e-5, atol=1e-6)
    assert load_config(tmp_path / "outputs" / "new" / "config.yaml").backbone_weights == str(tmp_path / "trunk.pth")

    (tmp_path / "bad.pth").write_bytes(b"hello")
    outcome = script(*start, *settings, "--name", "other", "--backbone-weights", tmp_path / "bad.pth")
    assert "bad.pth" in outcome.error


@pytest.mark.parametrize(
    "options,words",
    [
        (["--name", "nobody"], "nobody/config.yaml"),
        (["--teacher", "nobody"], "python train.py"),
        (["--name", "tutor"], "python test.py --teacher tutor"),
        (["--name", "tiny", "--teacher", "tutor"], "--name and --teacher"),
        (["--name", "tiny", "--batchsize", "0"], "--batchsize"),
        (["--name", "tiny", "--precision", "fp16"], "CUDA"),
        (["--name", "tiny", "--test_dir", "/nowhere"], "/nowhere"),
        (["--name", "tiny", "--device", "tpu"], "--device tpu"),
        (["--teacher", "tutor", "--which_epoch", "3"], "--which_epoch"),
        (["--name", "tiny", "--save-features", "f.txt"], "f.txt"),
        (["--name", "tiny", "--save-features", f"{__file__}/f.npz"], "test_cli.py"),
        (["--name", "x" * 300], "File name too long"),
        (["--name", "tiny", "--threads", "100000000"], "--threads 100000000"),
        (["--name", "tiny", "--which_epoch", "best"], "--which_epoch best"),
    ],
)
def test_bad_input_of_evaluation(trained: Runs, script: Script, options: list[str], words: str) -> None:
    before = contents(trained.folder)
    assert words in script("test", "--output_path", trained.folder, *options).error
    assert contents(trained.folder) == before


def test_test_sets_that_cannot_be_ranked(trained: Runs, script: Script, tmp_path: Path) -> None:
    data = tmp_path / "data"
    query, gallery = data / "query", data / "bounding_box_test"
    for folder in (query, gallery):
        shutil.copytree(trained.data / folder.name, folder)
    before = contents(trained.folder)

    def refused(*options: str) -> str:
        outcome = script("test", "--output_path", trained.folder, "--name", "tiny", "--test_dir", data, *options)
        assert outcome.out == "" and contents(trained.folder) == before
        return outcome.error

    assert "gt_bbox" in refused("--multi")
    shutil.copytree(query, data / "gt_bbox")
    first = min((data / "gt_bbox").glob("0*"))
    first.unlink()
    assert f"identity {int(first.name[:4])} in camera" in refused("--multi")
    person = next(query.iterdir())
    stranger = person.rename(query / f"anna_{person.name}")
    assert str(stranger) in refused()
    stranger.unlink()

    for path in query.iterdir():
        path.rename(query / f"9{path.name}")
    assert str(data) in refused() and str(data) in refused("--no-cameras")

    for path in query.iterdir():
        path.unlink()
    shutil.copy(next(gallery.glob("0*_c1*")), query)
    for path in gallery.iterdir():
        if "_c1" not in path.name:
            path.unlink()
    assert "--no-cameras" in refused()
    for path in gallery.iterdir():
        if not (query / path.name).exists():
            path.unlink()
    assert str(data) in refused("--no-cameras")

    for path in gallery.iterdir():
        path.unlink()
    assert str(gallery) in refused()
    shutil.rmtree(gallery)
    assert "bounding_box_test" in refused()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(ID_style="PCB"), "missing"),
        (dict(backbone="resnet10w16", gen=dict(id_dim=128)), "shape"),
        (dict(backbone="resnet18", gen=dict(id_dim=512)), "missing"),
    ],
    ids=["style", "width", "backbone"],
)
def test_a_model_and_a_config_that_do_not_belong_together(
    copied: Runs, script: Script, changes: dict[str, Any], words: str
) -> None:
    file = copied.run / "config.yaml"
    file.write_text(yaml.safe_dump(merged(yaml.safe_load(file.read_text()), changes)))
    error = script("test", "--output_path", copied.folder, "--name", "tiny").error
    assert words in error and str(copied.run) in error
    assert not (copied.run / "reid.json").exists()


def test_a_teacher_and_opts_that_do_not_belong_together(copied: Runs, script: Script) -> None:
    folder = copied.folder / "models" / "tutor"
    opts = yaml.safe_load((folder / "opts.yaml").read_text())
    for backbone in ("resnet18", "resnet10w16"):
        (folder / "opts.yaml").write_text(yaml.safe_dump(opts | dict(backbone=backbone)))
        error = script("test", "--output_path", copied.folder, "--teacher", "tutor").error
        assert str(folder / "net_last.pth") in error


def test_a_folder_of_people_is_prepared_trained_on_and_tested(trained: Runs, script: Script, tmp_path: Path) -> None:
    """From a folder per identity to numbers: names that are no numbers, and no cameras."""
    root = tmp_path / "people"
    for path in (trained.data / "bounding_box_train").iterdir():
        (root / f"person {path.name[:4]}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / f"person {path.name[:4]}" / path.name[5:])
    assert script("prepare", "--dataset", "folder", "--data_root", root).code == 0
    where = ("--output_path", trained.folder, "--name", "tiny", "--test_dir", root)
    assert "--no-cameras" in script("test", *where).error
    clean(script("test", *where, "--no-cameras"))
    report = json.loads((trained.run / "reid-people.json").read_text())
    check_test_set(root, cameras=None)  # as `eval_iter` does
    assert report["queries"] == 4 and report["without_match"] == 0
    (trained.run / "reid-people.json").unlink()
    start = ("train", "--config", trained.config(), "--output_path", trained.folder, "--name", "new", "--dry-run")
    assert "images of 4 identities" in clean(
        script(*start, "--set", f"data_root={root}", "teacher_style=3", "teacher_w=0")
    )


def test_an_output_path_that_cannot_be_written(trained: Runs, script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    start = ("train", "--config", trained.config(), "--output_path", tmp_path / "file", "--set", "teacher_style=3")
    assert str(tmp_path / "file") in script(*start).error
    # A teacher's folder too is tried before anything is trained.
    (tmp_path / "models").write_text("")
    start = ("train", "--config", trained.folder / "tiny-teacher.yaml", "--output_path")
    assert "tiny-teacher" in script(*start, tmp_path).error
    assert {path.name for path in tmp_path.iterdir()} == {"file", "models"}
    unreadable = tmp_path / os.fsdecode(b"d\xe9")
    assert "UTF-8" in script(*start, unreadable).error and not unreadable.exists()


# ------------------------------------------------------------------------------- figures and measures
def test_the_swap_grid_of_a_run(copied: Runs, script: Script, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    where = ("--name", "tiny", "--output_path", copied.folder, "--threads", 1, "--device", "cpu", "--out", out)
    clean(script("visual_tools/show_rainbow", *where, "--count", 3))
    with Image.open(out) as grid:
        assert grid.height > 4 * 128  # the border and three rows
    before = out.read_bytes()
    assert str(out) in script("visual_tools/show_rainbow", *where, "--count", 3).error and out.read_bytes() == before
    clean(script("visual_tools/show_rainbow", *where, "--count", 3, "--force", "--seed", 1))
    assert out.read_bytes() != before
    out.unlink()
    folder = tmp_path / "people"
    folder.mkdir()
    assert str(folder) in script("visual_tools/show_rainbow", *where, "--input", folder).error
    for i, size in enumerate([(40, 90), (64, 128), (31, 57)]):
        Image.fromarray(np.full((*size[::-1], 3), 60 * (i + 1), np.uint8)).save(folder / f"{i}.png")
    clean(script("visual_tools/show_rainbow", *where, "--input", folder))
    assert out.is_file()


def test_the_swap_error_of_a_run(copied: Runs, script: Script, tmp_path: Path) -> None:
    where = ("--name", "tiny", "--output_path", copied.folder, "--threads", 1, "--device", "cpu")
    out = clean(script("mannequins/against_truth", *where, "--count", 12))
    written = json.loads((copied.run / "swaps.json").read_text())
    assert written["pairs"] == 12 and written["generated"] > 0 and written["copy"] > 20
    assert written["reduction"] == pytest.approx(1 - written["generated"] / written["copy"])
    images, seen = written["images"], written["recognised"]
    assert images["generated"]["changed"] == written["generated"] and images["copy"]["changed"] == written["copy"]
    for value in (written["copy"], images["generated"]["psnr"], 100 * seen["true"]["official"]["mAP"]):
        assert f"{value:.1f}" in out
    assert set(seen) == set(written["top1"]) == {"appearance", "true", *images}
    assert set(written["shares"]) == {"shade", "pattern", "colour"}
    assert set(written["named"]["generated changed"]) == {"primary", "fine-grained"}
    # Another data set has a file of its own.
    make_dataset(tmp_path / "others", preset="tiny", seed=5)
    before = (copied.run / "swaps.json").read_bytes()
    clean(script("mannequins/against_truth", *where, "--count", 4, "--data_root", tmp_path / "others"))
    assert json.loads((copied.run / "swaps-others.json").read_text())["tested_on"] == "others"
    assert (copied.run / "swaps.json").read_bytes() == before
    assert "tutor" in script("mannequins/against_truth", *where, "--name", "tutor").error


@pytest.mark.parametrize(
    "raised, words",
    [
        (PermissionError(13, "Permission denied", "closed/file"), "closed/file"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory"),
    ],
)
def test_what_no_check_has_met_is_one_line_too(capsys: pytest.CaptureFixture, raised: Exception, words: str) -> None:
    def main() -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and words in line


def test_other_errors_keep_their_traceback() -> None:
    for raised in (RuntimeError("a defect"), OSError("no file")):
        with pytest.raises(type(raised), match=str(raised)):
            run_cli(lambda raised=raised: (_ for _ in ()).throw(raised))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--name", "a/b"], "a/b"),
        (["--teacher", "a/b"], "a/b"),
        (["--teacher", "demo"], "--name and --teacher"),
        (["--seed", "-1"], "seed: "),
        (["--threads", "0"], "--threads 0"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_the_demo_refuses_before_it_begins(script: Script, tmp_path: Path, options: list[str], words: str) -> None:
    assert words in script("demo", "--output_path", tmp_path, "--data", tmp_path / "data", *options).error
    assert not list(tmp_path.iterdir())


def test_the_demo_says_whose_run_is_there(trained: Runs) -> None:
    with pytest.raises(UserError, match="seed 0"):
        demo.train("DG-Net", demo.CONFIG, RunFolder(trained.folder, "tiny"), [], {"teacher": "tutor", "seed": 3})
