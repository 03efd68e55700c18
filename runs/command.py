"""What train.py does once its options are parsed: from options to a session, and from a session to the loop."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch

from config import Config, load_config
from parallel import launch
from parallel.collectives import is_main
from runs.folder import RunFolder, open_run
from runs.loop import train
from runs.session import build_session, describe
from utils import ROOT, seed_everything, set_threads


def main(args: argparse.Namespace) -> int:
    """Train by the options of train.py, in this process or in those that it starts; returns the exit status."""
    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        return run_training(args, device)


def run_training(args: argparse.Namespace, device: torch.device) -> int:
    cfg, name = read_config(args)

    set_threads(args.threads)
    seed_everything(cfg.seed)
    run = open_run(args.output_path, name)
    command = resume_command(args, run)
    session = build_session(cfg, run, device, resume=args.resume is not None, command=command)
    if args.dry_run:
        if is_main():
            print(describe(session))
        return 0
    return train(session, resume=args.resume)


def read_config(args: argparse.Namespace) -> tuple[Config, str]:
    """The config with its overrides, and the run's name. A resumed run may take its folder's config."""
    file = Path(args.config or ROOT / "configs" / "latest.yaml")
    if args.config is None and args.resume and args.name:
        own = open_run(args.output_path, args.name).config_file
        if args.resume != "auto" or own.is_file():
            file = own
    name = args.name or file.stem
    # A folder that the release wrote carries keys of other versions.
    own_folder = args.resume and file == open_run(args.output_path, name).config_file
    weights = [f"backbone_weights={json.dumps(args.backbone_weights)}"] if args.backbone_weights else []
    return load_config(file, args.set + weights, strict=not own_folder), name


def resume_command(args: argparse.Namespace, run: RunFolder) -> str:
    """The command that continues a run on the same hardware; its folder has the settings."""
    if launch.started() and args.processes is None and args.gpu_ids is None:
        return f"the same torchrun command with train.py --resume --name {shlex.quote(run.name)}"
    options = {"--name": run.name, "--output_path": None if run.output_path == ROOT else run.output_path}
    options |= {f"--{key}": getattr(args, key) for key in ("gpu_ids", "processes", "device", "threads")}
    given = [word for key, value in options.items() if value is not None for word in (key, str(value))]
    return shlex.join(["python", "train.py", "--resume", *given])
