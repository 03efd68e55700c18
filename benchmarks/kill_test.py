"""Does a run that is killed again and again end as an undisturbed one? `python -m benchmarks.kill_test --kills 30`

Trains a tiny DG-Net once undisturbed, and once killed (SIGKILL) at random moments: during steps, while a snapshot or an
image is being written, during start-up. Each time it continues with `--resume auto`. In the end every file of the last
snapshots and every image must be the same, bit for bit.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from benchmarks.machine import benchmark_parser, describe_machine, write_result
from mannequins.dataset import make_dataset
from runs.snapshot import snapshots
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


class Trial:
    """A run in `folder` that is started, killed and started again."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config, self.path = folder, config, folder / "outputs" / "run"
        folder.mkdir()

    def start(self, workers: int = 0) -> subprocess.Popen:
        command = [sys.executable, ROOT / "train.py", "--config", self.config, "--name", "run", "--resume", "auto"]
        command += ["--output_path", self.folder, "--threads", "1", "--device", "cpu"]
        command += ["--set", f"num_workers={workers}"]
        with open(self.folder / "out.txt", "w") as out:
            return subprocess.Popen(command, stdout=out, stderr=out)

    def finish(self) -> None:
        """Run to the end. Raises UserError with the end of the output if the run fails."""
        if status := self.start().wait():
            end = (self.folder / "out.txt").read_text()[-2000:]
            raise UserError(f"{self.folder}: ended with status {status}: {end}")

    def newest(self) -> int:
        return max(snapshots(self.path / "checkpoints"), default=0)

    def writing(self) -> str | None:
        """What is being written at this moment: `checkpoints`, `images` or None."""
        return next((path.parent.name for path in self.path.glob("*/*.part")), None)

    def files(self, kind: str) -> dict[Path, bytes]:
        """Contents of `checkpoints` or `images`, without the manifests, which also hold the number of workers."""
        paths = [path for path in (self.path / kind).rglob("*") if path.is_file() and path.suffix != ".json"]
        return {path.relative_to(self.path): path.read_bytes() for path in paths}


def kill_once(trial: Trial, rng: random.Random, seconds: float) -> str:
    """Start the run and kill it at a random moment; `seconds` is what a start-up and a few steps take.

    Returns what it was doing: start-up, step, checkpoints or images; `nothing` if the run ended before.
    """
    aim = rng.choice([None, None, "checkpoints", "checkpoints", "images"])
    before, process = trial.newest(), trial.start(rng.choice([0, 0, 2]))
    end = time.monotonic() + rng.uniform(0, seconds)
    try:
        # A moment at random, or the writing of a file after a new snapshot.
        while process.poll() is None and time.monotonic() < end + (60 if aim else 0):
            if aim and trial.newest() > before and trial.writing() == aim:
                time.sleep(rng.uniform(0, 0.01))
                break
            time.sleep(0.0003 if trial.newest() > before else 0.005)
        if process.poll() is not None:
            return "nothing"
    finally:
        process.kill()
        process.wait()
    # Before the first new snapshot, a half-written file may be from the kill before this one.
    return trial.writing() or "step" if trial.newest() > before else "start-up"


def measure(scratch: Path, data: Path, kills: int, seed: int) -> dict:
    """Train both runs in `scratch`; returns the result for JSON."""
    machine, config, steps = describe_machine(), scratch / "run.yaml", STEPS_PER_KILL * kills + 4
    config.write_text(yaml.safe_dump(SETTINGS | dict(data_root=str(data), max_iter=steps)))
    whole, killed = (Trial(scratch / name, config) for name in ("whole", "killed"))
    began = time.time()
    whole.finish()
    # The first file in the run's folder shows when the steps began, near enough.
    steps_began = (whole.path / "config.yaml").stat().st_mtime
    seconds = steps_began - began + STEPS_PER_KILL * (time.time() - steps_began) / steps

    rng, moments = random.Random(seed), Counter()
    while moments.total() < kills and (moment := kill_once(killed, rng, seconds)) != "nothing":
        moments[moment] += 1
        print(f"kill {moments.total()}: {moment}; newest snapshot {killed.newest()}", flush=True)
    killed.finish()
    files = {kind: whole.files(kind) for kind in ("checkpoints", "images")}
    same = {kind: contents == killed.files(kind) for kind, contents in files.items()}
    result = dict(kills=moments.total(), moments=dict(moments), seed=seed, steps=steps)
    result |= dict(same_as_undisturbed=all(same.values()), same=same)
    return result | dict(files_compared={kind: len(contents) for kind, contents in files.items()}, machine=machine)


def main() -> int:
    parser = benchmark_parser("kill_test", __doc__, device=False)
    parser.add_argument("--kills", type=between(1), default=30, help="how often the run is killed (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--data", type=Path, help="data set (default: the smallest embedded one)")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if not args.data:
            make_dataset(Path(scratch) / "data", preset="tiny")
        result = measure(Path(scratch), args.data or Path(scratch) / "data", args.kills, args.seed)
    result["seconds"] = round(time.monotonic() - began)
    write_result(args.results, "kill_test", result)
    return 0 if result["same_as_undisturbed"] and result["kills"] == args.kills else 1


if __name__ == "__main__":
    run_cli(main)
