"""Train DG-Net or a teacher: `python train.py --config configs/latest.yaml`."""

from __future__ import annotations

import argparse
import logging

from parallel import collectives, launch
from runs.guards import StopSignals
from runs.recorder import Recorder
from runs.session import Session, build_session, describe
from runs.start import begin, finish, read_options, resume_command
from utils import add_machine_arguments, run_cli, seed_everything, set_threads

log = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file: configs/latest.yaml, configs/teacher.yaml, ... (default: latest)")
    parser.add_argument("--name", help="name of the run (default: the config's file name)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="ITERATION",
        help="continue from the newest snapshot, or from that of ITERATION; `--resume auto` starts or "
        "continues, whichever applies, and passes over damaged snapshots",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys")
    parser.add_argument("--gpu_ids", metavar="N,...", help="GPUs to use, a process for each: 0 is --device cuda:0")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share each batch (default: 1)")
    add_machine_arguments(parser)
    parser.add_argument("--backbone-weights", metavar="FILE", help="ImageNet weights instead of torchvision's cache")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and schedule, stop")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        cfg, run = read_options(args)
        set_threads(args.threads)
        seed_everything(cfg.seed)
        command = resume_command(args, run)
        session = build_session(cfg, run, device, resume=args.resume is not None, command=command)
        if not args.dry_run:
            return train(session, args.resume)
        if collectives.is_main():
            print(describe(session))
        return 0


def train(s: Session, resume: str | None) -> int:
    """Train from the start, or from a snapshot, to the last iteration or to a signal.

    resume  see `runs.start.begin`
    Returns the exit status: 0, or 128 and the number of the signal.
    """
    start = begin(s, resume)
    if start == s.max_iter:
        finish(s)
        return 0
    with Recorder(s, start) as recorder, StopSignals() as stop:
        for t in recorder.bar:
            # ---------------------------------------------------------------------------------- the step
            terms = s.trainer.step(*recorder.batches(t), t)
            recorder.note(t, terms)

            # -------------------------------------------------------------------------- what is due after it
            done, stopping = t + 1, stop.asked(t + 1)
            if due(s.cfg.log_iter, done, s.max_iter):
                recorder.log(done)
            if due(s.image_display_iter, done, s.max_iter):
                recorder.show_images(done)
            if due(s.image_save_iter, done, s.max_iter):
                recorder.save_images(done)
            if due(s.eval_iter, done, s.max_iter):
                recorder.evaluate(done)
            if due(s.snapshot_iter, done, s.max_iter) or stopping:
                recorder.save(done)
            if stopping:
                break
    if done < s.max_iter:
        log.warning("stopped by %s after %d of %d steps, which are saved", stop.received.name, done, s.max_iter)
        log.warning("continue with: %s", s.command)
        return 128 + stop.received
    finish(s)
    return 0


def due(every: int, done: int, last: int) -> bool:
    """Whether something is to be done after `done` steps: every so many (0: never), and at the end."""
    return every > 0 and (done % every == 0 or done == last)


if __name__ == "__main__":
    run_cli(main)
