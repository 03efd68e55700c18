"""Before the first step and after the last one: the config of a run, its folder, its snapshot, its teacher."""

from __future__ import annotations

import argparse
import json
import logging
import shlex

from config import Config, find_config, load_config
from data.people import require_same_people
from files import is_part, write_json
from parallel import collectives, launch
from runs.folder import TEACHER_FILES, RunFolder, open_run, start_folder, update_config
from runs.load import save_teacher
from runs.session import Session
from runs.snapshot import changed_settings, load_snapshot, people_of_snapshot, read_manifest, remove_parts, snapshots
from utils import ROOT, UserError

log = logging.getLogger(__name__)


def read_options(args: argparse.Namespace) -> tuple[Config, RunFolder]:
    """The config with its overrides, and the run's folder. A resumed run may take the config in its folder."""
    file = find_config(args.config or "configs/latest.yaml")
    run = open_run(args.output_path, args.name or file.stem)
    if args.config is None and args.name and args.resume and (args.resume != "auto" or run.config_file.is_file()):
        file = run.config_file
    weights = [f"backbone_weights={json.dumps(args.backbone_weights)}"] if args.backbone_weights else []
    # A folder that the release wrote carries keys of other versions.
    return load_config(file, args.set + weights, strict=not (args.resume and file == run.config_file)), run


def resume_command(args: argparse.Namespace, run: RunFolder) -> str:
    """The command that continues a run on the same hardware; its folder has the settings."""
    if launch.started() and args.processes is None and args.gpu_ids is None:
        return f"the same torchrun command with train.py --resume --name {shlex.quote(run.name)}"
    options = {"--name": run.name, "--output_path": None if run.output_path == ROOT else run.output_path}
    options |= {f"--{key}": getattr(args, key) for key in ("gpu_ids", "processes", "device", "threads")}
    given = [word for key, value in options.items() if value is not None for word in (key, str(value))]
    return shlex.join(["python", "train.py", "--resume", *given])


def begin(s: Session, resume: str | None) -> int:
    """Make the run's folder, or continue from its snapshot; returns the number of finished steps.

    resume  None: a new run. "last", or an iteration's number: from that snapshot. "auto": whichever applies, passing
            over damaged snapshots
    """
    cfg, run = s.cfg, s.run
    if resume not in (None, "last", "auto") and not resume.isdecimal():
        raise UserError(f"--resume {resume}: not an iteration; there are {snapshots(run.checkpoints)}")
    if collectives.is_main():
        start_folder(run, cfg, resume=run.config_file.is_file() if resume == "auto" else resume is not None)
        remove_parts(run.checkpoints)
        for path in filter(is_part, run.images.iterdir()):
            path.unlink()
        write_json(run.path / "reading.json", s.reading)
    collectives.wait_for_all()
    start = restore(s, resume) if resume is not None else 0
    collectives.start_together(s.trainer, start, s.device)
    if resume is not None and start < s.max_iter and collectives.is_main():
        update_config(run, cfg)
    return start


def restore(s: Session, resume: str) -> int:
    """Continue from a snapshot, or begin if there is none yet; returns the number of finished steps."""
    folder = s.run.checkpoints
    if not resume.isdecimal() and not snapshots(folder):
        log.info("%s has no snapshot yet: starting from the beginning", s.run.name)
        return 0
    iteration = int(resume) if resume.isdecimal() else None
    if iteration is not None and (later := [i for i in snapshots(folder) if i > iteration]):
        # They would be what the next --resume continues from.
        raise UserError(
            f"--resume {iteration}: {folder} has later snapshots (up to {later[-1]}); copy the run's folder without "
            "them and resume the copy with its --name"
        )
    start = load_snapshot(folder, s.trainer, iteration, fall_back=resume == "auto")
    log.info("resumed %s after %d of %d steps", s.run.name, start, s.max_iter)
    manifest = read_manifest(folder, start)
    then = people_of_snapshot(manifest)
    if then and not s.cfg.trust_classes:
        require_same_people(then, s.people, what=f"--resume {s.run.name}", allow="--set trust_classes=true")
    changed = changed_settings(manifest, s.cfg, s.circumstances) if manifest else {}
    if changed and start < s.max_iter:
        listing = ", ".join(f"{name} was {then}, is {now}" for name, (then, now) in changed.items())
        log.warning("results will differ from an uninterrupted run: %s", listing)
    return start


def finish(s: Session) -> None:
    """Put a finished teacher where DG-Net looks for it."""
    if not s.cfg.generates and collectives.is_main() and not all((s.run.model / f).exists() for f in TEACHER_FILES):
        save_teacher(s.run, s.cfg, s.trainer.trained, s.classes, s.people)
        log.info("teacher written to %s", s.run.model)
