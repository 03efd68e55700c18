"""Does a run that is killed again and again end as the run that never was? `python -m benchmarks.kill_test --kills 30`

Trains a tiny DG-Net once undisturbed, and once killed (SIGKILL) at random moments: during steps, while a snapshot or an
image is being written, during start-up; each time continued with `--resume auto`. Then every file of the last snapshots
and every image must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.machine import RESULTS, describe_machine, write_result
from utils import ROOT, UserError, run_cli

STEPS_PER_KILL = 6  # about as many as a killed process gets on by
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

    def finish(self) -> str:
        """Run to the end; returns what was printed."""
        status = self.start().wait()
        out = (self.folder / "out.txt").read_text()
        if status:
            raise UserError(f"{self.folder}: the run ended with status {status}: {out[-2000:]}")
        return out

    def snapshots(self) -> set[str]:
        return {name for name in names(self.checkpoints) if name.isdecimal()}

    def writing(self) -> str | None:
        """What is being written at this moment, as the folders show it."""
        if any(name.endswith(".part") for name in names(self.checkpoints)):
            return "snapshot"
        return "image" if any(name.endswith(".part") for name in names(self.images)) else None


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files but for the manifests, which name the number of workers too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_once(trial: Trial, rng: random.Random, start_up: float, step: float) -> str:
    """Start the run, kill it at a random moment; returns during what, or 'nothing' where the run ended before."""
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
                raise UserError(f"the run ended by itself: {(trial.folder / 'out.txt').read_text()[-2000:]}")
            return "nothing"
    finally:
        process.kill()
        process.wait()
    # Before the first new snapshot, what looks half written may be the killed process's before.
    return trial.writing() or "step" if trial.snapshots() - before else "start-up"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="how often the run is killed (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--data", help="data set (default: the embedded one in its smallest size, drawn for this)")
    parser.add_argument("--results", default=str(RESULTS), help="folder of kill_test.json (default: the project's)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.kills < 1:
        raise UserError(f"--kills {args.kills}: must be at least 1")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(Path(scratch), args)
    result["seconds"] = round(time.monotonic() - began)
    print(f"written to {write_result(args.results, 'kill_test', result)}")
    return 0 if result["same_as_undisturbed"] and result["kills"] == args.kills else 1


def run(scratch: Path, args: argparse.Namespace) -> dict:
    from mannequins.dataset import make_dataset

    machine = describe_machine()
    data = Path(args.data) if args.data else scratch / "data"
    if not args.data:
        make_dataset(data, preset="tiny")
    config = scratch / "run.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | dict(data_root=str(data))))
    max_iter = STEPS_PER_KILL * args.kills + 4
    whole, killed = (Trial(scratch / name, config, max_iter) for name in ("whole", "killed"))
    for trial in (whole, killed):
        trial.folder.mkdir()

    start = time.time()
    out = whole.finish()
    # The first file of the run's folder says when the steps began, near enough.
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
    out = killed.finish()
    last = re.search(r"resumed run after (\d+)", out)
    same = {
        what: contents(getattr(whole, what)) == contents(getattr(killed, what)) for what in ("checkpoints", "images")
    }
    print(
        f"{moments.total()} kills ({', '.join(f'{n} {name}' for name, n in moments.items())}), last resumed after "
        f"{last[1] if last else 0} of {max_iter} steps; final snapshots "
        f"{'the same' if same['checkpoints'] else 'DIFFERENT'}, images {'the same' if same['images'] else 'DIFFERENT'}"
    )
    return {
        "kills": moments.total(),
        "moments": dict(moments),
        "seed": args.seed,
        "steps": max_iter,
        "same_as_undisturbed": all(same.values()),
        "same": same,
        "files_compared": {what: len(contents(getattr(whole, what))) for what in same},
        "machine": machine,
    }


if __name__ == "__main__":
    run_cli(main)
