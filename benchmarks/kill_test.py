"""Does a run that is killed again and again end as an undisturbed one? `python -m benchmarks.kill_test --kills 30`

Trains a tiny DG-Net once undisturbed, and once killed (SIGKILL) at random moments: during steps, while a snapshot or an
image is being written, during start-up. Each time it continues with `--resume auto`. In the end every file of the last
snapshots and every image must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.machine import benchmark_parser, describe_machine, write_result
from mannequins.dataset import make_dataset
from utils import ROOT, UserError, between, run_cli

STEPS_PER_KILL = 6  # about as many as a killed process makes
SETTINGS = dict(
    backbone="resnet10w8",
    pretrained=False,
    teacher_style=3,  # needs no teacher
    batch_size=2,
    gen=dict(dim=4, n_downsample=1, id_dim=64, mlp_dim=16, dropout=0.2),
    dis=dict(dim=4, n_layer=1, n_res=1, num_scales=2),
    # Every term, ramps that rise during the first kills.
    **dict(recon_f_w=0.5, recon_s_w=0.5, recon_x_cyc_w=0.5, teacher_w=0.5),
    **dict(warm_iter=10, warm_teacher_iter=20, warm_scale=0.01),
    **dict(crop_image_height=64, crop_image_width=32, crop_padding=2),
    **dict(log_iter=1, snapshot_save_iter=2, image_save_iter=3, image_display_iter=10**6, display_size=2, keep_last=3),
)


@dataclass
class Trial:
    """A run that is started, killed and started again."""

    folder: Path
    config: Path
    max_iter: int

    @property
    def checkpoints(self) -> Path:
        return self.folder / "outputs" / "run" / "checkpoints"

    @property
    def images(self) -> Path:
        return self.folder / "outputs" / "run" / "images"

    def start(self, workers: int = 0) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(self.config), "--name", "run"]
        command += ["--output_path", str(self.folder), "--resume", "auto", "--threads", "1", "--device", "cpu"]
        command += ["--set", f"max_iter={self.max_iter}", f"num_workers={workers}"]
        with open(self.folder / "out.txt", "w") as out:
            return subprocess.Popen(command, stdout=out, stderr=out)

    def finish(self) -> None:
        """Run to the end. Raises UserError with the end of the output if the run fails."""
        if status := self.start().wait():
            raise UserError(f"{self.folder}: the run ended with status {status}: {self.output()}")

    def output(self) -> str:
        return (self.folder / "out.txt").read_text()[-2000:]

    def snapshots(self) -> set[str]:
        return {name for name in names(self.checkpoints) if name.isdecimal()}

    def writing(self) -> str | None:
        """What is being written at this moment: `snapshot`, `image` or None."""
        if any(name.endswith(".part") for name in names(self.checkpoints)):
            return "snapshot"
        return "image" if any(name.endswith(".part") for name in names(self.images)) else None


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files, without the manifests, which also hold the number of workers."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_once(trial: Trial, rng: random.Random, start_up: float, step: float) -> str:
    """Start the run and kill it at a random moment.

    start_up, step  seconds of the undisturbed run's start-up and of a step
    Returns what it was doing: start-up, step, snapshot or image; `nothing` if the run ended before.
    """
    aim = rng.choice(["start-up", "step", "step", "snapshot", "snapshot", "snapshot", "image", "image"])
    before = trial.snapshots()
    process = trial.start(workers=rng.choice([0, 0, 2]))
    began = time.monotonic()
    early = rng.uniform(0, start_up)
    fine = rng.uniform(0, 0.01)  # into the writing of a file
    try:
        while process.poll() is None:
            progress = bool(trial.snapshots() - before)
            if aim == "start-up" and (time.monotonic() - began > early or progress):
                break
            if aim == "step" and progress:
                time.sleep(rng.uniform(0, 4 * step))
                break
            if progress and trial.writing() == aim:
                time.sleep(fine)
                break
            time.sleep(0.0003 if progress else 0.005)
        if process.poll() is not None:
            if process.returncode:
                raise UserError(f"the run ended by itself: {trial.output()}")
            return "nothing"
    finally:
        process.kill()
        process.wait()
    # Before the first new snapshot, a half-written file may be from the kill before this one.
    return trial.writing() or "step" if trial.snapshots() - before else "start-up"


def main() -> int:
    parser = benchmark_parser("kill_test", __doc__, device=False)
    parser.add_argument("--kills", type=between(1), default=30, help="how often the run is killed (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--data", type=Path, help="data set (default: the smallest embedded one)")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(Path(scratch), args)
    result["seconds"] = round(time.monotonic() - began)
    print(f"written to {write_result(args.results, 'kill_test', result)}")
    return 0 if result["same_as_undisturbed"] and result["kills"] == args.kills else 1


def run(scratch: Path, args: argparse.Namespace) -> dict:
    """Train both runs in `scratch`; returns the result for JSON."""
    machine = describe_machine()
    data = args.data or scratch / "data"
    if not args.data:
        make_dataset(data, preset="tiny")
    config = scratch / "run.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | dict(data_root=str(data))))
    max_iter = STEPS_PER_KILL * args.kills + 4
    whole, killed = (Trial(scratch / name, config, max_iter) for name in ("whole", "killed"))
    for trial in (whole, killed):
        trial.folder.mkdir()

    start = time.time()
    whole.finish()
    # The first file in the run's folder shows when the steps began, near enough.
    steps_began = (whole.folder / "outputs" / "run" / "config.yaml").stat().st_mtime
    step, start_up = (time.time() - steps_began) / max_iter, steps_began - start
    print(f"undisturbed: {max_iter} steps of {1000 * step:.0f} ms after {start_up:.1f} s of start-up", flush=True)

    rng = random.Random(args.seed)
    moments: Counter[str] = Counter()
    for k in range(args.kills):
        moment = kill_once(killed, rng, start_up, step)
        if moment == "nothing":
            break
        moments[moment] += 1
        newest = max(killed.snapshots(), default="none yet")
        print(f"kill {k + 1}: {moment}; newest snapshot {newest}", flush=True)
    killed.finish()
    files = {what: [contents(getattr(t, what)) for t in (whole, killed)] for what in ("checkpoints", "images")}
    same = {what: expected == got for what, (expected, got) in files.items()}
    kinds = ", ".join(f"{n} {name}" for name, n in moments.items())
    print(f"{moments.total()} kills ({kinds}); the same as undisturbed: {same}")
    return {
        "kills": moments.total(),
        "moments": dict(moments),
        "seed": args.seed,
        "steps": max_iter,
        "same_as_undisturbed": all(same.values()),
        "same": same,
        "files_compared": {what: len(expected) for what, (expected, _) in files.items()},
        "machine": machine,
    }


if __name__ == "__main__":
    run_cli(main)
