"""Does a run that is killed again and again end as an undisturbed one? `python -m benchmarks.kill_test --kills 30`

Trains a tiny DG-Net once undisturbed, and once killed (SIGKILL) at random moments: during steps, while a snapshot or an
image is being written, during start-up. Each time it continues with `--resume auto`. In the end every file of the last
snapshots and every image must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
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

    def __init__(self, folder: Path, config: Path, max_iter: int) -> None:
        self.folder, self.config, self.max_iter = folder, config, max_iter
        self.path = folder / "outputs" / "run"
        folder.mkdir()

    def start(self, workers: int = 0) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(self.config), "--name", "run"]
        command += ["--output_path", str(self.folder), "--resume", "auto", "--threads", "1", "--device", "cpu"]
        command += ["--set", f"max_iter={self.max_iter}", f"num_workers={workers}"]
        with open(self.folder / "out.txt", "w") as out:
            return subprocess.Popen(command, stdout=out, stderr=out)

    def finish(self) -> None:
        """Run to the end. Raises UserError with the end of the output if the run fails."""
        if status := self.start().wait():
            raise UserError(
                f"{self.folder}: ended with status {status}: {(self.folder / 'out.txt').read_text()[-2000:]}"
            )

    def newest(self) -> int:
        return max(snapshots(self.path / "checkpoints"), default=0)

    def writing(self) -> str | None:
        """What is being written at this moment: `checkpoints`, `images` or None."""
        return next((path.parent.name for path in self.path.glob("*/*.part")), None)

    def files(self) -> dict[str, str]:
        """Hashes of snapshots and images, without the manifests, which also hold the number of workers."""
        paths = [p for kind in ("checkpoints", "images") for p in (self.path / kind).rglob("*") if p.is_file()]
        return {
            str(path.relative_to(self.path)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(paths)
            if path.suffix != ".json"
        }


def kill_once(trial: Trial, rng: random.Random, seconds: float) -> str:
    """Start the run and kill it at a random moment; `seconds` is what a start-up and a few steps take.

    Returns what it was doing: start-up, step, checkpoints or images; `nothing` if the run ended before.
    """
    aim = rng.choice([None, None, "checkpoints", "checkpoints", "images"])
    before, process, end = (
        trial.newest(),
        trial.start(rng.choice([0, 0, 2])),
        time.monotonic() + rng.uniform(0, seconds),
    )
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
    write_result(args.results, "kill_test", result)
    return 0 if result["same_as_undisturbed"] and result["kills"] == args.kills else 1


def run(scratch: Path, args: argparse.Namespace) -> dict:
    """Train both runs in `scratch`; returns the result for JSON."""
    machine, data, config = describe_machine(), args.data or scratch / "data", scratch / "run.yaml"
    if not args.data:
        make_dataset(data, preset="tiny")
    config.write_text(yaml.safe_dump(SETTINGS | dict(data_root=str(data))))
    max_iter = STEPS_PER_KILL * args.kills + 4
    whole, killed = (Trial(scratch / name, config, max_iter) for name in ("whole", "killed"))
    began = time.time()
    whole.finish()
    # The first file in the run's folder shows when the steps began, near enough.
    steps_began = (whole.path / "config.yaml").stat().st_mtime
    seconds = steps_began - began + STEPS_PER_KILL * (time.time() - steps_began) / max_iter

    rng, moments = random.Random(args.seed), Counter()
    while moments.total() < args.kills and (moment := kill_once(killed, rng, seconds)) != "nothing":
        moments[moment] += 1
        print(f"kill {moments.total()}: {moment}; newest snapshot {killed.newest()}", flush=True)
    killed.finish()
    files = whole.files()
    same = dict(kills=moments.total(), moments=dict(moments), seed=args.seed, steps=max_iter)
    return same | {"same_as_undisturbed": files == killed.files(), "files_compared": len(files), "machine": machine}


if __name__ == "__main__":
    run_cli(main)
