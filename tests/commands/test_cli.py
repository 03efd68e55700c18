"""`train.py` and `test.py` as a user meets them: a whole run, and what they say to bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from conftest import ALL_LOSSES, TINY_DGNET, TINY_TEACHER, Outcome, OutputFolder, contents, load_script, merged, noise
from PIL import Image

import demo
import precision
from config import load_config
from mannequins.dataset import make_dataset
from reIDmodel import build_teacher
from runs.folder import RunFolder
from runs.load import find_teacher
from utils import ROOT, UserError, run_cli

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]


def shell(folder: Path, name: str, *arguments: object) -> Outcome:
    """Run a script in a process of its own, on the CPU, from another directory than the project's."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def clean(outcome: Outcome) -> str:
    """The output of a script that succeeded without a warning."""
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Warning" not in outcome.err and "Traceback" not in outcome.err, outcome.err
    return outcome.out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@dataclass(frozen=True)
class Runs(OutputFolder):
    """A teacher and a DG-Net run on the tiny data, as train.py left them."""

    dgnet: Outcome

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

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
    teacher = TINY_TEACHER | dict(data_root=str(tiny_data), num_workers=2)
    (folder / "tiny-teacher.yaml").write_text(yaml.safe_dump(teacher))
    common = ("--output_path", folder, "--threads", 1, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        options = "--config", folder / "tiny-teacher.yaml", "--name", "tutor", *common
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        run_cli(load_script("train").main)
    assert not stop.value.code
    return Runs(folder, tiny_data, shell(folder, "train", "--config", "tiny.yaml", *common))


@pytest.fixture
def copied(trained: Runs, tmp_path: Path) -> Runs:
    """The same runs in a folder of the test's own."""
    folder = tmp_path / "runs"
    shutil.copytree(trained.folder, folder)
    return Runs(folder, trained.data, trained.dgnet)


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
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--which_epoch" in done.stdout and done.stdout.endswith("heavy []\n")


def test_a_run_leaves_its_files(trained: Runs) -> None:
    clean(trained.dgnet)
    assert "6/6" in trained.dgnet.err and "gen_total=" in trained.dgnet.err and "step/s" in trained.dgnet.err
    names = ("dis.pt", "gen.pt", "id.pt", "manifest.json", "state.pt")
    snapshots = [f"checkpoints/0000000{i}/{name}" for i in (3, 6) for name in names]
    figures = ["images/test_00000004.png", "images/test_00000006.png"]
    assert sorted(contents(trained.run)) == [*snapshots, "config.yaml", *figures, "reading.json"]
    resolved = load_config(trained.run / "config.yaml")
    assert resolved == load_config(trained.config)
    assert (resolved.teacher_w, resolved.gen.dim, resolved.erasing_p) == (0.5, 4, 0.5)
    early, late = (np.asarray(Image.open(trained.run / name)).astype(float) for name in figures)
    assert late.shape[0] > 8 * 64 and late.shape[2] == 3 and late.std() > 20 and (early != late).any()


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


def check_report(file: Path, queries: int) -> dict[str, Any]:
    report = json.loads(file.read_text())
    assert len(report["conventions"]) == 2 and report["queries"] == queries
    for by_convention in report["tables"]["single query"].values():
        assert set(by_convention) == set(report["conventions"])
        for numbers in by_convention.values():
            assert 0 < numbers["rank1"] <= numbers["rank5"] <= numbers["rank10"] <= 1
            assert 0 < numbers["mAP"] < 1
    file.unlink()
    return report


def test_evaluation_of_a_run(trained: Runs, script: Script) -> None:
    file = trained.run / "reid.json"
    out = clean(script("test", "--name", "tiny", *trained.where))
    report = check_report(file, trained.images("query"))
    assert (report["name"], report["iteration"], len(report["tables"]["single query"])) == ("tiny", 6, 3)
    for words in ("trapezoidal", "Rank-1", "Rank-5", "Rank-10", "mAP", "beta 0", "fine-grained", str(file)):
        assert words in out, words


def test_evaluation_of_a_teacher(trained: Runs, script: Script) -> None:
    options = ("--multi", "--batchsize", "auto", "--precision", "bf16")
    clean(script("test", "--teacher", "tutor", *trained.where, *options))
    report = check_report(trained.folder / "models" / "tutor" / "reid.json", trained.images("query"))
    assert "multi-query" in report["tables"] and report["precision"] == "bf16"


def test_several_data_sets_give_a_table(trained: Runs, script: Script, tmp_path: Path) -> None:
    shutil.copytree(trained.data, tmp_path / "Other" / "pytorch")
    min((tmp_path / "Other" / "pytorch" / "bounding_box_test").iterdir()).unlink()  # junk
    roots = (trained.data, tmp_path / "Other" / "pytorch")
    where = (*trained.where, "--name", "tiny", "--multi")
    out = clean(script("test", *where, "--test_dir", *roots))
    files = {trained.data.name: trained.run / "reid.json", "Other": trained.run / "reid-Other.json"}
    reports = {name: check_report(file, trained.images("query")) for name, file in files.items()}
    assert [report["tested_on"] for report in reports.values()] == list(files)
    assert reports["Other"]["gallery"] < reports[trained.data.name]["gallery"]
    table = out[out.rindex("tiny after 6 steps") :]
    for name, report in reports.items():
        expected = [
            f"{100 * by_convention[convention]['mAP']:.2f}"
            for by_setting in report["tables"].values()
            for convention in report["conventions"]
            for by_convention in by_setting.values()
        ]
        rows = [line.split() for line in table.splitlines() if line.startswith(f"  {name} ")]
        assert [row[-2] for row in rows] == expected and len(rows) == 2 * 2 * 3

    # What is wrong with the second shows before the first is begun.
    before = contents(trained.folder)
    again = script("test", *where, "--test_dir", trained.data, tmp_path / "nowhere")
    assert "nowhere" in again.error and again.out == ""
    assert "--test_dir" in script("test", *where, "--test_dir", tmp_path / "Other", roots[1]).error
    assert "--save-features" in script("test", *where, "--test_dir", *roots, "--save-features", "f.npz").error
    assert contents(trained.folder) == before


def test_a_dry_run_builds_everything_and_writes_nothing(trained: Runs, script: Script) -> None:
    before, n = contents(trained.folder), trained.images()
    start = ("train", *trained.where, "--dry-run", "--config")
    out = clean(script(*start, trained.config, "--name", "dry"))
    shapes = ("(2, 3, 64, 32)", "(16, 32, 16)", "(256,)")
    sizes = (f"{n} images of 8 identities", f"6 steps, {n // 2} per epoch")
    for words in (*shapes, *sizes, "dgnet on", "Generator", "Discriminator", "IdNetAB", "teacher_w"):
        assert words in out, words
    clean(script(*start, trained.config, "--name", "dry", "--set", "single=edge"))
    no_gpu = ("--output_path", trained.folder, "--gpu_ids", "-1")  # as the release says it
    out = clean(script("train", *no_gpu, "--dry-run", "--config", trained.folder / "tiny-teacher.yaml"))
    assert "teacher on" in out and f"{2 * (n // 16)} steps, {n // 16} per epoch" in out
    assert contents(trained.folder) == before


@pytest.mark.parametrize("has", [True, False])
def test_a_run_keeps_the_precision_that_auto_was(
    trained: Runs, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    common = ("--name", "auto", "--output_path", tmp_path, "--device", "cpu")
    auto = ("--config", trained.config, "--set", "precision=auto", "teacher_style=3", "snapshot_save_iter=1")
    clean(script("train", *common, *auto, "max_iter=1"))
    assert load_config(tmp_path / "outputs/auto/config.yaml").precision == ("bf16" if has else "fp32")
    # Elsewhere the folder's own config goes on as it was, `auto` with a note of what is different.
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    continued = script("train", *common, "--resume", "--set", "max_iter=2")
    assert continued.code == 0 and "precision was" not in continued.err
    changed = script("train", *common, "--resume", *auto, "max_iter=3")
    assert changed.code == 0 and ("precision was fp32, is bf16" in changed.err) == (not has)


def test_a_run_is_never_overwritten(trained: Runs, script: Script, tmp_path: Path) -> None:
    before = contents(trained.folder)
    again = script("train", "--config", trained.config, "--name", "tiny", *trained.where).error
    assert "--resume" in again and "--name" in again and str(trained.run) in again
    teacher = trained.folder / "tiny-teacher.yaml"
    assert "--name" in script("train", "--config", teacher, "--name", "tutor", *trained.where).error
    assert contents(trained.folder) == before
    # Nor is a folder of other files used.
    folder = tmp_path / "outputs" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    (tmp_path / "models").symlink_to(trained.folder / "models")
    assert "mine" in script("train", "--config", trained.config, "--name", "mine", "--output_path", tmp_path).error
    assert contents(folder).keys() == {"notes.txt"}


def test_another_teacher_of_the_same_name_is_noticed(copied: Runs, script: Script) -> None:
    weights = copied.folder / "models" / "tutor" / "net_last.pth"
    state = torch.load(weights, weights_only=True)
    state["model.conv1.weight"] += 0.01
    torch.save(state, weights)
    resumed = script("train", "--name", "tiny", *copied.where, "--resume", "--set", "max_iter=7")
    (note,) = (line for line in resumed.err.splitlines() if line.startswith("warning"))
    assert "teachers was " in note and note.count(" was ") == 1
    assert (copied.run / "checkpoints" / "00000007" / "state.pt").is_file()


# ------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def refused(trained: Runs, script: Script, tmp_path: Path) -> Callable[..., str]:
    """Start a run that must be refused, with `--set` overrides; nothing may be written. Returns the error line."""

    def start(*settings: str, options: tuple[object, ...] = ()) -> str:
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        if not (output / "models").exists():
            shutil.copytree(trained.folder / "models", output / "models")
        before = contents(output)
        arguments = ["--config", trained.config, "--name", "new", "--output_path", output, *options]
        outcome = script("train", *arguments, *(["--set", *settings] if settings else []))
        assert contents(output) == before
        return outcome.error

    return start


Refused = Callable[..., str]


def test_a_truncated_image_is_named_or_skipped(refused: Refused, script: Script, trained: Runs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained.data, data)
    first, second = sorted((data / "bounding_box_train").iterdir())[:2]
    cut(first)
    second.write_bytes(b"")
    counted = f"2 of {trained.images()} images"
    message = refused(f"data_root={data}")
    for words in (counted, first.name, second.name, "skip_bad_images: true"):
        assert words in message

    options = ("--dry-run", "--set", f"data_root={data}", "skip_bad_images=true")
    outcome = script("train", "--config", trained.config, "--name", "new", *trained.where, *options)
    assert f"{trained.images() - 2} images of 8 identities" in clean(outcome)
    (warning,) = [line for line in outcome.err.splitlines() if line.startswith("warning:")]
    assert "2 files" in warning and first.name in warning and second.name in warning


def test_teachers_that_do_not_fit(refused: Refused, tmp_path: Path) -> None:
    assert "configs/teacher.yaml --name nobody" in refused("teacher=nobody")
    assert "nobody" in refused("teacher='tutor,nobody'")
    folder = tmp_path / "output" / "models" / "misfit"
    weights, opts = folder / "net_last.pth", folder / "opts.yaml"
    folder.mkdir()
    torch.save(build_teacher(5, backbone="resnet10w8").state_dict(), weights)
    opts.write_text("stride: 2\nbackbone: resnet10w8\n")
    for settings in ((), ("id_init=teacher", "teacher_w=0")):
        assert re.search("5 identities.* 8", refused("teacher=misfit", *settings))
    opts.write_text("stride: 3\n")
    assert "stride" in refused("teacher=misfit")
    opts.write_text("stride: 2\nbackbone: resnet10w8\ncrop_image_height: tall\n")
    assert "opts.yaml: " in refused("teacher=misfit")
    opts.unlink()
    cut(weights)
    assert "net_last.pth: " in refused("teacher=misfit")
    torch.save({"epoch": 3}, weights)
    assert "net_last.pth: " in refused("teacher=misfit")


def test_resuming_what_is_not_there(trained: Runs, script: Script) -> None:
    start = ("train", "--config", trained.config, *trained.where)
    assert "resume" in script(*start, "--name", "new", "--resume").error
    assert "7; there are 3, 6" in script(*start, "--resume", 7).error
    assert "--resume soon" in script(*start, "--resume", "soon").error
    assert not (trained.folder / "outputs" / "new").exists()


@pytest.mark.parametrize(
    "settings, options, words",
    [
        (["bacth_size=4"], [], "bacth_size.*batch_size"),
        (["ID_class=751"], [], "ID_class"),
        (["backbone=vgg16"], [], "backbone vgg16"),
        (["apex=true"], ["--device", "cpu"], "apex: true"),
        ([], ["--device", "tpu9"], "--device tpu9"),
        ([], ["--device", "cuda:99"], "--device cuda:99"),
        (["batch_size=4"], ["--gpu_ids", "0,1"], "--gpu_ids 0,1.*--device cpu.*--processes"),
        ([], ["--gpu_ids", "0,0"], "--gpu_ids 0,0"),
        ([], ["--gpu_ids", "0,1", "--processes", "3"], "--processes 3"),
        ([], ["--gpu_ids", "0", "--device", "cpu"], "--gpu_ids and --device"),
        ([], ["--threads", "0"], "--threads 0"),
        (["vgg_w=1", "vgg_weights=nowhere.pth"], [], "nowhere.pth: "),
        (["pretrained=true"], [], "backbone resnet10w8.*pretrained: false"),
        (["pretrained=true", "backbone_weights=nowhere.pth"], [], "nowhere.pth: "),
    ],
)
def test_bad_options(refused: Refused, settings: list[str], options: list[str], words: str) -> None:
    assert re.search(words, refused(*settings, options=tuple(options)))


def test_missing_imagenet_weights(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network and without a cache: which file goes where."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    error = refused("backbone=resnet18", "gen.id_dim=512", "pretrained=true", "teacher_style=3")
    for words in ("resnet18-", str(tmp_path / "cache/hub/checkpoints"), "--backbone-weights FILE", "pretrained: false"):
        assert words in error


def test_backbone_weights_from_a_file(trained: Runs, script: Script, tmp_path: Path) -> None:
    weights = build_teacher(3, backbone="resnet10w8").model.state_dict()
    torch.save(weights, tmp_path / "trunk.pth")
    start = ("train", "--config", trained.config, "--output_path", tmp_path, "--name", "new")
    settings = ("--set", "pretrained=true", "max_iter=1", "lr2=1e-12", "teacher_style=3")
    clean(script(*start, *settings, "--backbone-weights", tmp_path / "trunk.pth"))
    run = tmp_path / "outputs" / "new"
    state = torch.load(run / "checkpoints" / "00000001" / "id.pt", weights_only=True)["a"]
    torch.testing.assert_close(state["model.conv1.weight"], weights["conv1.weight"], rtol=1e-5, atol=1e-6)
    assert load_config(run / "config.yaml").backbone_weights == str(tmp_path / "trunk.pth")
    (tmp_path / "bad.pth").write_bytes(b"hello")
    assert "bad.pth: " in script(*start, *settings, "--backbone-weights", tmp_path / "bad.pth", "--name", "other").error


@pytest.mark.parametrize(
    "options, words",
    [
        (["--name", "nobody"], "nobody/config.yaml: "),
        (["--teacher", "nobody"], "python train.py"),
        (["--name", "tutor"], "python test.py --teacher tutor"),
        (["--name", "tiny", "--teacher", "tutor"], "--name and --teacher"),
        (["--name", "tiny", "--precision", "fp16"], "CUDA"),
        (["--teacher", "tutor", "--which_epoch", "3"], "--which_epoch"),
        (["--name", "tiny", "--save-features", "f.txt"], "f.txt: "),
        (["--name", "tiny", "--save-features", f"{__file__}/f.npz"], "test_cli.py"),
        (["--name", "x" * 300], "x" * 300),
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
    query, gallery, boxes = data / "query", data / "bounding_box_test", data / "gt_bbox"
    for folder in (query, gallery):
        shutil.copytree(trained.data / folder.name, folder)
    before = contents(trained.folder)

    def refused(*options: str) -> str:
        outcome = script("test", *trained.where, "--name", "tiny", "--test_dir", data, *options)
        assert outcome.out == "" and contents(trained.folder) == before
        return outcome.error

    def keep(folder: Path, pattern: str) -> None:
        for path in set(folder.iterdir()) - set(folder.glob(pattern)):
            path.unlink()

    assert "gt_bbox/" in refused("--multi")
    shutil.copytree(query, boxes)
    first = min(boxes.glob("0*"))
    first.unlink()
    assert f"identity {int(first.name[:4])} in camera" in refused("--multi")
    person = next(query.iterdir())
    stranger = person.rename(query / f"anna_{person.name}")
    assert str(stranger) in refused()
    stranger.unlink()
    for path in query.iterdir():  # nobody of the gallery
        path.rename(query / f"9{path.name}")
    assert str(data) in refused() and str(data) in refused("--no-cameras")

    known = next(gallery.glob("0*_c1*"))
    keep(query, "nobody")
    shutil.copy(known, query)
    keep(gallery, "*_c1*")
    assert "--no-cameras" in refused()
    keep(gallery, known.name)
    assert "gallery" in refused("--no-cameras")
    keep(gallery, "nobody")
    assert str(gallery) in refused()
    shutil.rmtree(gallery)
    assert "bounding_box_test/" in refused()


def test_output_paths_that_cannot_be_written(trained: Runs, script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "models").write_text("")  # where the teacher would go in the end
    for name, output in (("tiny", "file"), ("tiny-teacher", "out"), ("tiny-teacher", os.fsdecode(b"d\xe9"))):
        start = ("train", "--config", trained.folder / f"{name}.yaml", "--output_path", tmp_path / output)
        script(*start, *(["--set", "teacher_style=3"] if name == "tiny" else [])).error  # noqa: B018
    assert contents(tmp_path).keys() == {"file", "out/models"}


# ------------------------------------------------------------------------------- figures and measures
@pytest.mark.parametrize(
    "raised, words",
    [
        (PermissionError(13, "Permission denied", "closed/file"), "closed/file"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA"),
    ],
)
def test_what_no_check_has_met_is_one_line_too(capsys: pytest.CaptureFixture, raised: Exception, words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(Mock(side_effect=raised))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and words in line


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


def test_the_swap_error_of_a_run(trained: Runs, script: Script, tmp_path: Path) -> None:
    measure = ("mannequins/against_truth", *trained.where, "--name")
    clean(script(*measure, "tiny", "--count", 12))
    written = json.loads((trained.run / "swaps.json").read_text())
    (trained.run / "swaps.json").unlink()
    assert written["pairs"] == 12 and written["generated"] > 0 and written["copy"] > 20
    assert written["reduction"] == pytest.approx(1 - written["generated"] / written["copy"])
    images = written["images"]
    assert images["generated"]["changed"] == written["generated"] and images["copy"]["changed"] == written["copy"]
    assert set(written["recognised"]) == {"appearance", "true", *images}
    assert set(written["shares"]) == {"shade", "pattern", "colour"}
    assert "tutor" in script(*measure, "tutor").error
    # On another data set it has a file of its own.
    make_dataset(tmp_path / "others", preset="tiny", seed=5)
    clean(script(*measure, "tiny", "--count", 4, "--data_root", tmp_path / "others"))
    assert json.loads((trained.run / "swaps-others.json").read_text())["tested_on"] == "others"
    assert not (trained.run / "swaps.json").exists()
    (trained.run / "swaps-others.json").unlink()


def test_a_folder_per_person_is_to_be_prepared(trained: Runs, script: Script, tmp_path: Path) -> None:
    """Ordinary names: each message names the command that helps, which then does."""
    for person in ("anna", "bob", "carl", "dora"):
        for i in range(3):
            noise(tmp_path / "people" / person / f"photo {i}.jpg")
    root, sorted_by_hand, numbered = tmp_path / "people", tmp_path / "by hand", tmp_path / "numbered"
    for split in ("query", "gallery"):
        shutil.copytree(root, sorted_by_hand / split)
        shutil.copytree(root / "anna", numbered / split / "0001")
    test = ("test", *trained.where, "--name", "tiny", "--no-cameras", "--test_dir")
    command = f"prepare.py --dataset folder --data_root {root}"
    assert command in script(*test, root).error
    for other in (sorted_by_hand, numbered):
        error = script(*test, other).error
        assert "prepare.py --dataset folder" in error and "--dataset csv" in error and "photo 0.jpg" in error
    assert script(*command.removesuffix(str(root)).replace(".py", "").split(), root).code == 0
    assert script(*test, root).code == 0


def test_data_that_is_not_there_from_here(copied: Runs, script: Script, tmp_path: Path) -> None:
    """Says which file named the data, and which option names other data."""
    opts, config = copied.folder / "models" / "tutor" / "opts.yaml", copied.folder / "outputs" / "tiny" / "config.yaml"
    for file in (opts, config):
        values = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(values | {"data_root": "../no such data"}))

    def refused(name: str, *options: object) -> str:
        return script(name, *copied.where, *options).error

    for file, option, command in (
        (opts, "--test_dir", ("test", "--teacher", "tutor")),
        (config, "--test_dir", ("test", "--name", "tiny")),
        (config, "--input", ("generate", "--name", "tiny", "--no-soft-labels", "--count", 2, "--out", "made")),
        (config, "--input", ("visual_tools/show_rainbow", "--name", "tiny")),
        (config, "--data_root", ("mannequins/against_truth", "--name", "tiny")),
    ):
        error = refused(*command)
        assert str(file) in error and option in error and "../no such data" in error
    assert script("test", *copied.where, "--teacher", "tutor", "--test_dir", copied.data).code == 0
    files = find_teacher("tutor", copied.folder)
    opts.write_text("stride: 2\n")
    assert find_teacher("tutor", copied.folder).data_source != files.data_source
