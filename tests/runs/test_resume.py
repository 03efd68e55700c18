"""Interrupted runs: whatever stops one, going on gives the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    ALL_LOSSES,
    TINY_DGNET,
    TINY_TEACHER,
    Outcome,
    contents,
    exchange,
    load_script,
    merged,
    random_batches,
    replace_keeping_time,
    tiny_config,
    tiny_trainer,
)

from data.folders import read_split
from data.generated import MANIFEST, Row, write_rows
from runs.folder import RunFolder
from runs.guards import StopSignals, not_finite
from runs.recorder import Recorder
from runs.snapshot import changed_settings
from runs.start import resume_command
from trainer import DGNetTrainer, TeacherTrainer
from utils import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
Trace = dict[int, dict[str, float]]
# Every loss, dropout and erasing; no teacher, whose net would have to be trained first.
DGNET = merged(TINY_DGNET, ALL_LOSSES | dict(teacher_style=3, gen=dict(dropout=0.2), step_size=4)) | dict(
    max_iter=6, snapshot_save_iter=2, image_save_iter=3, image_display_iter=100, log_iter=1
)
# For the faults: the quickest steps, half of the terms, four of them.
LIGHT = DGNET | dict(
    **dict.fromkeys(
        ("recon_f_w", "recon_s_w", "recon_x_cyc_w", "teacher_w", "recon_id_w", "warm_scale", "erasing_p"), 0
    ),
    **dict(max_iter=4, display_size=1),
)
TEACHER = TINY_TEACHER | dict(batch_size=32, epochs=2, snapshot_epochs=1, erasing_p=0.5, log_iter=1)


@dataclass
class Runs:
    """Runs of train.py in this process, and what they logged."""

    folder: Path
    data: Path
    script: Callable[..., Outcome]
    monkeypatch: pytest.MonkeyPatch
    config: dict[str, Any] = field(default_factory=lambda: DGNET)
    traces: dict[str, Trace] = field(default_factory=dict)

    def train(
        self,
        name: str,
        *options: object,
        config: dict[str, Any] | None = None,
        at: tuple[int, Callable[[], object]] | None = None,
        **settings: Any,
    ) -> Outcome:
        """Run train.py; at iteration `at[0]`, before its step, `at[1]` is called."""
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump((config or self.config) | dict(data_root=str(self.data))))
        trace, log = self.traces.setdefault(name, {}), Recorder.log
        with self.monkeypatch.context() as patch:

            def logged(self: Recorder, done: int) -> None:
                trace[done - 1] = {name: float(value) for name, value in self.terms.items()}
                log(self, done)

            patch.setattr(Recorder, "log", logged)
            for trainer in (DGNetTrainer, TeacherTrainer):
                patch.setattr(trainer, "step", calling(trainer.step, at))
            where = ("--config", file, "--name", name, "--output_path", self.folder, "--device", "cpu")
            changes = [f"{key}={value}" for key, value in settings.items()]
            return self.script("train", *where, *options, *(["--set", *changes] if changes else []))

    def run(self, name: str) -> Path:
        return self.folder / "outputs" / name

    def hashes(self, name: str, iteration: int) -> dict[str, str]:
        """Checksums of a snapshot's files: weights, optimisers, scalers, random state."""
        files = contents(self.run(name) / "checkpoints" / f"{iteration:08d}")
        return {file: digest for file, digest in files.items() if file.endswith(".pt")}

    def images(self, name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.run(name) / "images").iterdir()}

    def assert_same(self, name: str, other: str) -> None:
        """Losses of every step, all of the last snapshot, and the images."""
        iteration = max(self.traces[name]) + 1
        assert self.traces[name] == self.traces[other]
        assert self.hashes(name, iteration) == self.hashes(other, iteration)
        assert self.images(name) == self.images(other)


def calling(step: Callable[..., Any], at: tuple[int, Callable[[], object]] | None) -> Callable[..., Any]:
    def first_call(self: Any, *arguments: Any) -> Any:
        if at is not None and arguments[-1] == at[0]:
            at[1]()
        return step(self, *arguments)

    return first_call


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def clean(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def lines(outcome: Outcome, start: str) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith(start)]


@pytest.fixture
def runs(tmp_path: Path, tiny_data: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, tiny_data, script, monkeypatch)


@pytest.fixture(scope="module")
def finished() -> dict[int, tuple[Path, Trace]]:
    """Runs that were never stopped, made by the first tests that ask: folder and trace by the number of steps."""
    return {}


def with_whole(runs: Runs, finished: dict[int, tuple[Path, Trace]]) -> Runs:
    """`runs` with the finished run `whole` of its config in it."""
    steps = runs.config["max_iter"]
    if steps not in finished:
        clean(runs.train("whole"))
        finished[steps] = runs.folder.parent / f"{runs.folder.name}-whole", dict(runs.traces["whole"])
        shutil.copytree(runs.folder, finished[steps][0])
    else:
        shutil.copytree(finished[steps][0], runs.folder, dirs_exist_ok=True)
        runs.traces["whole"] = dict(finished[steps][1])
    assert sorted(runs.traces["whole"]) == list(range(steps)) and len(runs.images("whole")) == 2
    return runs


@pytest.fixture
def undisturbed(runs: Runs, finished: dict[int, tuple[Path, Trace]]) -> Runs:
    return with_whole(runs, finished)


@pytest.fixture
def light(runs: Runs, finished: dict[int, tuple[Path, Trace]]) -> Runs:
    runs.config = LIGHT
    return with_whole(runs, finished)


# ------------------------------------------------------------------------------------------ full traces
@pytest.mark.parametrize("settings", [dict(), dict(cache_images=True), dict(num_workers=2)], ids=str)
def test_a_stopped_dgnet_goes_on_as_if_nothing_had_happened(undisturbed: Runs, settings: dict[str, Any]) -> None:
    """Stopped by a signal amid an interval between snapshots; how images are read does not show either."""
    runs, handlers = undisturbed, [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stopped = runs.train("parts", at=(2, send(signal.SIGTERM)), **settings)
    assert stopped.code == 128 + signal.SIGTERM
    assert "SIGTERM" in stopped.err and "3 of 6" in stopped.err
    assert f"python train.py --resume --name parts --output_path {runs.folder} --device cpu" in stopped.err
    assert sorted(runs.traces["parts"]) == [0, 1, 2]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    goes_on = clean(runs.train("parts", "--resume", **settings))
    assert "3 of 6" in goes_on.err and not lines(goes_on, "warning")
    runs.assert_same("whole", "parts")
    third, sixth = (runs.hashes("whole", i) for i in (2, 6))
    assert all(third[f"{n}.pt"] != sixth[f"{n}.pt"] for n in ("gen", "id", "dis", "state"))


def test_a_stopped_dgnet_in_bf16_with_a_cosine(runs: Runs) -> None:
    settings = dict(precision="bf16", channels_last=True, lr_policy="cosine", max_iter=4)
    clean(runs.train("whole", **settings))
    assert runs.train("parts", at=(0, send(signal.SIGINT)), **settings).code == 128 + signal.SIGINT
    clean(runs.train("parts", "--resume", "auto", **settings))
    runs.assert_same("whole", "parts")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("gpu_ids", ["0", "0,1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_dgnet_on_gpus(runs: Runs, precision: str, gpu_ids: str) -> None:
    """With `deterministic`: weights, optimisers, scalers and random states. Processes of their own, as a user's."""
    if torch.cuda.device_count() <= int(gpu_ids[-1]):
        pytest.skip("needs two GPUs")
    file = runs.folder / "config.yaml"
    values = dict(data_root=str(runs.data), precision=precision, deterministic=True, batch_size=4)
    file.write_text(yaml.safe_dump(DGNET | values))

    def train(name: str, *options: str) -> None:
        where = ["--config", file, "--name", name, "--output_path", runs.folder, "--gpu_ids", gpu_ids]
        subprocess.run([sys.executable, ROOT / "train.py", *where, *options], check=True, cwd=ROOT)

    train("whole")
    train("parts", "--set", "max_iter=3", "snapshot_save_iter=3")
    train("parts", "--resume")
    assert runs.hashes("parts", 6) == runs.hashes("whole", 6)


def test_a_stopped_teacher(runs: Runs) -> None:
    clean(runs.train("whole", config=TEACHER))
    steps = max(runs.traces["whole"]) + 1
    command = dict(config=TEACHER)
    assert runs.train("parts", "--resume", "auto", at=(steps // 2, send(signal.SIGTERM)), **command).code == 143
    assert not list((runs.folder / "models" / "parts").iterdir())
    clean(runs.train("parts", "--resume", "auto", **command))
    assert runs.traces["whole"] == runs.traces["parts"] and runs.hashes("whole", steps) == runs.hashes("parts", steps)
    # The same command once more has nothing to do, and does nothing.
    weights = runs.folder / "models" / "parts" / "net_last.pth"
    before = weights.stat().st_mtime_ns
    clean(runs.train("parts", "--resume", "auto", **command))
    assert weights.stat().st_mtime_ns == before
    weights.unlink()  # as when the process was killed before its very last act
    clean(runs.train("parts", "--resume", "auto", **command))
    assert weights.read_bytes() == (runs.folder / "models" / "whole" / "net_last.pth").read_bytes()


# ------------------------------------------------------------------------------------------ --resume auto
def test_auto_starts_continues_and_is_done(light: Runs) -> None:
    runs = light
    codes = [runs.train("parts", "--resume", "auto", at=(t, send(signal.SIGTERM))).code for t in (0, 2)]
    codes += [clean(runs.train("parts", "--resume", "auto")).code for _ in range(2)]
    assert codes == [143, 143, 0, 0]
    runs.assert_same("whole", "parts")


def test_an_older_snapshot_is_resumed_in_a_copy_of_the_run(light: Runs) -> None:
    before = {path: path.read_bytes() for path in light.run("whole").rglob("*.pt")}
    assert "--name" in light.train("whole", "--resume", "2").error
    assert {path: path.read_bytes() for path in light.run("whole").rglob("*.pt")} == before
    shutil.copytree(light.run("whole"), light.run("parts"))
    shutil.rmtree(light.run("parts") / "checkpoints" / "00000004")
    clean(light.train("parts", "--resume", "2"))
    assert light.hashes("parts", 4) == light.hashes("whole", 4)


def test_auto_passes_over_a_damaged_snapshot(light: Runs) -> None:
    runs = light
    checkpoints = runs.run("whole") / "checkpoints"
    hashes, last = runs.hashes("whole", 4), checkpoints / "00000004" / "dis.pt"
    last.write_bytes(last.read_bytes()[:-1])
    assert "--resume auto" in runs.train("whole", "--resume").error
    outcome = clean(runs.train("whole", "--resume", "auto"))
    (warning,) = lines(outcome, "warning")
    assert "00000004/dis.pt" in warning and "resumed whole after 2 of 4" in outcome.err
    assert runs.hashes("whole", 4) == hashes
    for path in checkpoints.glob("*/manifest.json"):
        path.write_text("{}")
    error = runs.train("whole", "--resume", "auto").error
    assert "00000002" in error and "00000004" in error


@pytest.mark.parametrize("killed", ["before the config", "in the first snapshot"])
def test_auto_begins_anew_where_nothing_was_saved(light: Runs, killed: str) -> None:
    runs = light
    folder = runs.run("parts")
    if killed == "before the config":
        folder.mkdir()
        (folder / ".config.yaml.0a1b.part").write_text("gen")
    else:
        runs.train("parts", at=(0, send(signal.SIGTERM)))
        (folder / "checkpoints" / "00000001").rename(folder / "checkpoints" / "00000001.part")
    clean(runs.train("parts", "--resume", "auto"))
    runs.assert_same("whole", "parts")
    names = {p.name for p in folder.rglob("*") if not p.name.endswith(".yaml.0a1b.part")}
    assert names == {p.name for p in runs.run("whole").rglob("*")}


def test_auto_does_not_touch_what_is_not_a_run(runs: Runs) -> None:
    runs.run("parts").mkdir(parents=True)
    (runs.run("parts") / "notes.txt").write_text("precious")
    assert "holds another run" in runs.train("parts", "--resume", "auto").error
    teacher = runs.folder / "models" / "T"
    teacher.mkdir(parents=True)
    (teacher / "net_last.pth").write_text("somebody's")
    assert "holds another run" in runs.train("T", "--resume", "auto", config=TEACHER).error
    assert (teacher / "net_last.pth").read_text() == "somebody's"


# ------------------------------------------------------------------------------------- changed settings
def test_a_change_that_matters_is_named(light: Runs) -> None:
    harmless = dict(log_iter=2, snapshot_save_iter=5, image_save_iter=5, display_size=1, num_workers=1, max_iter=5)
    assert not lines(clean(light.train("whole", "--resume", keep_last=3, **harmless)), "warning")
    outcome = clean(
        light.train(
            "whole",
            "--resume",
            batch_size=3,
            seed=4,
            max_iter=6,
            dis="{dim: 4, n_layer: 1, n_res: 1, num_scales: 2, LAMBDA: 0.5}",
        )
    )
    (note,) = lines(outcome, "warning")
    for words in ("batch_size was 2, is 3", "seed was 0, is 4", "dis.LAMBDA was 0.01, is 0.5"):
        assert words in note
    assert note.count(" was ") == 3


def touch_up(a: Path, _: Path) -> None:
    """The last pixel alone; what stands before it, the size and the time are as before."""
    data, when = bytearray(a.read_bytes()), a.stat().st_mtime_ns
    data[-3] ^= 1
    a.write_bytes(data)
    os.utime(a, ns=(when, when))


@pytest.mark.parametrize("change", [exchange, replace_keeping_time, touch_up])
def test_training_images_that_changed_under_their_names_are_noticed(
    light: Runs, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    light.data = Path(shutil.copytree(light.data, tmp_path / "moved"))  # with other inodes and times
    for path in light.data.rglob("*.*"):
        os.utime(path)
    assert not lines(clean(light.train("whole", "--resume", max_iter=5)), "warning")
    folder = light.data / "bounding_box_train"
    first, second = sorted(folder.iterdir())[:2]
    before = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]
    change(first, second)
    assert change is exchange or [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())] == before
    circumstance = "contents of the training images"
    (note,) = lines(clean(light.train("whole", "--resume", max_iter=6)), "warning")
    assert f"{circumstance} was" in note and note.count(" was ") == 1

    # A snapshot of an earlier version does not say; then the names alone are compared.
    manifest = light.run("whole") / "checkpoints" / "00000006" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["circumstances"].pop(circumstance)
    manifest.write_text(json.dumps(content))
    assert not lines(clean(light.train("whole", "--resume", max_iter=7)), "warning")


def test_generated_training_images_that_changed_are_noticed(runs: Runs, tmp_path: Path) -> None:
    extra, names = tmp_path / "extra", []
    images = read_split(runs.data, "train_all")
    for path, token in zip(images.paths[:3], images.tokens, strict=False):
        names.append(f"train_all/{token}/{path.name}")
        (extra / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, extra / names[-1])
    write_rows(
        extra / MANIFEST,
        [Row(name, "a", "b", images.tokens[i], images.tokens[i], 1, 1, "") for i, name in enumerate(names)],
    )
    command = dict(config=TEACHER | dict(extra_data=str(extra), extra_labels="one_hot", epochs=1))
    clean(runs.train("T", **command))
    exchange(extra / names[0], extra / names[1])
    (note,) = lines(clean(runs.train("T", "--resume", epochs=2, **command)), "warning")
    assert "contents of the training images was" in note and "extra_data" not in note


def test_settings_of_a_resumed_run_are_kept(light: Runs) -> None:
    """What it was resumed with holds for the command that is printed, too; the first file stays."""
    where = ("train", "--resume", "--name", "whole", "--output_path", light.folder)
    file = light.run("whole") / "config.yaml"
    before = file.read_bytes()
    assert str(file) in clean(light.script(*where, "--set", "max_iter=5", "log_iter=3")).err
    assert {"max_iter": 5, "log_iter": 3}.items() <= yaml.safe_load(file.read_text()).items()
    again = clean(light.script(*where, "--set", "max_iter=6"))
    assert "resumed whole after 5 of 6" in again.err
    assert yaml.safe_load(file.read_text())["log_iter"] == 3
    assert "resumed whole after 6 of 6" in clean(light.script(*where)).err
    assert (light.run("whole") / "config_as_begun.yaml").read_bytes() == before


def test_what_matters_besides_the_config() -> None:
    cfg = tiny_config(lr_policy="cosine")
    manifest = dict(config=cfg.model_dump(mode="json"), circumstances={"device": "cpu, threads 1", "old": 1})
    assert changed_settings(manifest, cfg, {"device": "cpu, threads 1", "new": 2}) == {}
    assert changed_settings(manifest, cfg, {"device": "cpu, threads 2"}) == {
        "device": ("cpu, threads 1", "cpu, threads 2")
    }
    longer = tiny_config(lr_policy="cosine", max_iter=cfg.max_iter + 1, cache_images=True, data_root="elsewhere")
    assert changed_settings(manifest, longer, {}) == {"max_iter": (cfg.max_iter, cfg.max_iter + 1)}


def test_keep_last_and_keep_every(runs: Runs) -> None:
    runs.config = LIGHT

    def kept(name: str) -> list[int]:
        return sorted(int(path.name) for path in (runs.run(name) / "checkpoints").iterdir())

    clean(runs.train("few", snapshot_save_iter=1, keep_last=2, keep_every=3, image_save_iter=100, max_iter=5))
    assert kept("few") == [3, 4, 5]
    clean(runs.train("T", config=TEACHER, keep_last=1, keep_every=3, epochs=4))
    per_epoch = max(runs.traces["T"]) // 4 + (max(runs.traces["T"]) % 4 > 0)
    assert kept("T") == [3 * per_epoch, 4 * per_epoch], "every third epoch's"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "python train.py --resume --name 'my run'"),
        ("--processes 2 --threads 1", "python train.py --resume --name 'my run' --processes 2 --threads 1"),
        ("--gpu_ids 0,1 --device cuda", "python train.py --resume --name 'my run' --gpu_ids 0,1 --device cuda"),
        ("--output_path out", f"python train.py --resume --name 'my run' --output_path {ROOT / 'out'}"),
    ],
)
def test_the_command_that_continues(options: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("train")
    monkeypatch.setattr(sys, "argv", ["train.py", *options.split()])
    args = script.parse_args()
    run = RunFolder(ROOT / args.output_path if args.output_path else ROOT, "my run")
    assert resume_command(args, run) == expected


def test_what_torchrun_started_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("train")
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    for argv, start in ((["train.py"], "the same torchrun command"), (["train.py", "--processes", "2"], "python")):
        monkeypatch.setattr(sys, "argv", argv)  # the second: what train.py itself has started
        assert resume_command(script.parse_args(), RunFolder(ROOT, "it")).startswith(start)


# ---------------------------------------------------------------------------------------------- signals
def test_a_signal_to_the_whole_group_and_a_second_one(runs: Runs) -> None:
    """As a cluster or a terminal sends them, to workers too; the handler is real, the process a real one."""
    file = runs.folder / "config.yaml"
    values = DGNET | dict(data_root=str(runs.data), max_iter=10**6, num_workers=1, image_save_iter=10**6)
    file.write_text(yaml.safe_dump(values | dict(snapshot_save_iter=10**6)))
    command = [sys.executable, ROOT / "train.py", "--config", file, "--output_path", runs.folder, "--device", "cpu"]
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        seen = ""
        while "gen_total" not in seen:
            part = process.stderr.read(80)
            assert part, seen
            seen += part
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # a launcher that sends it to the process as well
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "python train.py --resume" in rest.splitlines()[-1] and "Traceback" not in rest
    assert len(list((runs.run("config") / "checkpoints").iterdir())) == 1
    with pytest.raises(ProcessLookupError):  # nobody is left in the group
        os.killpg(process.pid, 0)


def test_the_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(StopSignals, "SAME", 0.02)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGINT and ended == []
        time.sleep(0.03)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]


# ----------------------------------------------------------------------------------- numbers not finite
def test_a_loss_that_is_not_finite_is_traced_to_its_iteration(runs: Runs) -> None:
    """The log comes four steps later; terms, files and the last good snapshot are those of iteration 2."""

    def spoil(step: Callable[..., Any]) -> Callable[..., Any]:
        def spoiled(self: DGNetTrainer, a: Any, b: Any, t: int) -> Any:
            if t == 2:
                a.x[0] = torch.inf
                named.extend(runs.data.rglob("*"))
            return step(self, a, b, t)

        return spoiled

    named: list[Path] = []
    runs.monkeypatch.setattr(DGNetTrainer, "step", spoil(DGNetTrainer.step))
    error = runs.train("run", log_iter=6, snapshot_save_iter=2, max_iter=12).error
    assert error.startswith("error: iteration 2: ")
    for term in ("gen_total", "dis_total", "recon_x_a", "recon_xp_b", "id", "pid"):
        assert f" {term} " in error, error
    assert "recon_x_a nan" in error or "recon_x_a inf" in error, error
    images = error.split("Images: ")[1].split(". the last")[0].replace("; ", ", ").split(", ")
    assert len(images) == 8 and set(images) <= {path.name for path in named}
    assert [path.name for path in (runs.run("run") / "checkpoints").iterdir()] == ["00000002"]


def test_a_gradient_that_is_not_finite_is_found_before_it_is_saved(runs: Runs) -> None:
    def spoil(step: Callable[..., Any]) -> Callable[..., Any]:
        def spoiled(self: DGNetTrainer, a: Any, b: Any, t: int) -> Any:
            terms = step(self, a, b, t)
            if t == 3:
                next(self.dis.parameters()).data.fill_(torch.nan)
            return terms

        return spoiled

    runs.monkeypatch.setattr(DGNetTrainer, "step", spoil(DGNetTrainer.step))
    error = runs.train("run").error
    assert "iteration 3: " in error and "(dis." in error and "Images: " in error
    assert [path.name for path in (runs.run("run") / "checkpoints").iterdir()] == ["00000002"]


def test_fp16_gradients_that_overflow_at_every_scale_end_the_run(runs: Runs) -> None:
    """GradScaler skips such steps without a word: the losses stay finite, and nothing is learnt."""

    class Overflowing(torch.amp.GradScaler):
        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=4.0, enabled=True)

        def step(self, optimizer: torch.optim.Optimizer, *options: Any, **more: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.fill_(torch.inf)
            super().step(optimizer, *options, **more)

    runs.monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    done = runs.train("run", log_iter=1, max_iter=12)
    assert done.code == 2 and "fp16" in done.error and "gen 0.5" in done.error


def test_infinities_in_optimisers_and_statistics_are_found() -> None:
    trainer = tiny_trainer(tiny_config())
    trainer.step(*random_batches(trainer.cfg), 0)
    assert not_finite(trainer) == []
    trainer.id_net.model.bn1.running_var[0] = torch.inf
    state = trainer.opt_gen.state[next(iter(trainer.gen.parameters()))]
    state["exp_avg_sq"].view(-1)[0] = torch.nan
    assert not_finite(trainer) == ["id.model.bn1.running_var", "exp_avg_sq 0 of optimiser gen"]


# ----------------------------------------------------------------------------------------------- faults
def test_a_full_disk_loses_nothing(light: Runs) -> None:
    """A limit on file sizes stands in for a full disk; only the snapshots are larger."""
    runs = light
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full = (2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard)))
        error = runs.train("parts", at=full).error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "00000004" in error
    assert [path.name for path in (runs.run("parts") / "checkpoints").iterdir()] == ["00000002"]
    clean(runs.train("parts", "--resume"))
    runs.assert_same("whole", "parts")


@pytest.mark.parametrize("settings", [dict(num_workers=0), dict(num_workers=1)], ids=str)
def test_a_data_file_that_goes_bad(light: Runs, settings: dict[str, int]) -> None:
    """The steps so far are saved, and with the file back again the run ends as ever."""
    runs = light
    data = runs.folder / "data"
    shutil.copytree(runs.data, data)
    runs.data, images = data, sorted((data / "bounding_box_train").iterdir())

    def spoil() -> None:
        for i, path in enumerate(images):
            path.rename(path.with_suffix(".kept"))
            if i % 2:
                path.write_bytes(path.with_suffix(".kept").read_bytes()[:500])

    error = runs.train("parts", at=(0, spoil), **settings).error
    assert ".jpg" in error and "--resume --name parts" in error
    for path in images:
        path.with_suffix(".kept").rename(path)
    clean(runs.train("parts", "--resume"))
    runs.assert_same("whole", "parts")


@pytest.mark.slow
def test_a_process_that_is_killed_twice_ends_as_an_undisturbed_one(light: Runs) -> None:
    """By SIGKILL, as soon as a snapshot is being written."""
    options = ("--config", light.folder / "config.yaml", "--name", "killed", "--output_path", light.folder)
    command = [sys.executable, ROOT / "train.py", *options, "--resume", "auto", "--device", "cpu", "--threads", "1"]
    checkpoints = light.run("killed") / "checkpoints"
    for _ in range(2):
        before = set(checkpoints.glob("*"))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and set(checkpoints.glob("*")) <= before:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    clean(light.train("killed", "--resume", "auto"))
    steps = light.config["max_iter"]
    assert light.hashes("killed", steps) == light.hashes("whole", steps)
    assert light.images("killed") == light.images("whole")
