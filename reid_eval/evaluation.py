"""What test.py does once its options are parsed: evaluate a net on data sets, print the tables, write the files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.folders import check_test_set, data_set_name, other_data_set, read_split
from data.listing import say_reading, unsaid
from data.overlap import note_overlap_in
from files import write_json
from parallel.collectives import is_main
from reid_eval.features import check_feature_file, extract_data_set, save_features
from reid_eval.index import fingerprint
from reid_eval.open_set import format_open_set, measure_open_set
from reid_eval.ranking import main_setting
from reid_eval.report import SINGLE, evaluate_features, format_comparison, format_table, per_query, summary
from runs.folder import find_data, resolve_data_root
from runs.load import TestNet, load_exported_for_test, open_net
from utils import UserError, set_threads
from visual_tools.ranked_lists import write_ranked_lists


def run_test(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluate on every data set that the options name."""
    if args.save_features:
        check_feature_file(args.save_features)
    tested = open_exported(args, device) if args.model else open_net(args, device)
    roots = test_roots(args.test_dir, tested)
    if args.save_features and len(roots) > 1:
        raise UserError("--save-features: holds one data set; give one --test_dir")
    # Check all of them first, so that a missing folder is reported before the first evaluation.
    with unsaid():  # each is said for itself below
        for data_root in roots.values():
            check_test_set(data_root, multi=args.multi, cameras=not args.no_cameras)
    splits = ("query", "gallery", "multi-query") if args.multi else ("query", "gallery")
    readings = {name: say_test_images(root, splits) for name, root in roots.items()}
    reports = {name: test_on(data_root, tested, args, device, readings[name]) for name, data_root in roots.items()}
    if len(reports) > 1 and is_main():
        trained_on = data_set_name(resolve_data_root(tested.data_root))
        print(f"\n{tested.title}, trained on {trained_on}\n{format_comparison(reports)}")


def test_roots(given: Sequence[str] | None, tested: TestNet) -> dict[str, Path]:
    """The data sets that `--test_dir` names, or the one that the net was trained on, by their names."""
    recorded = tested.data_root, tested.data_source
    roots = [find_data(folder, "--test_dir", *recorded) for folder in given or [None]]
    named = {data_set_name(root): root for root in roots}
    if len(named) < len(roots):
        raise UserError(f"--test_dir {' '.join(given)}: two have the same name; give every data set once")
    return named


def open_exported(args: argparse.Namespace, device: torch.device) -> TestNet:
    """The exported id net that `--model` names; of the run or the teacher that is named too, or UserError."""
    if args.precision != "fp32":
        raise UserError(f"--precision {args.precision}: an exported file has its own; leave the option out")
    if args.which_epoch and not args.name:
        raise UserError("--which_epoch: names a snapshot of --name; a file holds one set of weights")
    set_threads(args.threads)
    exported = load_exported_for_test(Path(args.model))
    if args.name or args.teacher:
        named = open_net(args, device)
        about = exported.net.about
        if about["checksum"] != fingerprint(named.net, named.size):
            raise UserError(
                f"--model {args.model}: of {about['run']}, not of {named.title}; export that, or name no run"
            )
    return exported


def say_test_images(root: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Say what is read for an evaluation, and what training images share with it; returns it as `say_reading` does."""
    sides = {split: read_split(root, split) for split in splits}
    if is_main():
        note_overlap_in(root, {split: sides[split] for split in ("query", "gallery")})
    return say_reading(sides)


def test_on(
    data_root: Path, tested: TestNet, args: argparse.Namespace, device: torch.device, reading: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate on one data set, print the table and write the files; returns the content of reid.json.

    `reid.json` is about the data set that the config names; the files of others are called reid-NAME.json. `reid.npz`
    beside it is a feature file that also holds the results per query (see `per_query`).
    """
    cameras = not args.no_cameras
    how = dict(size=tested.size, batch_size=args.batchsize, precision=args.precision, device=device)
    sets = extract_data_set(tested.net, data_root, multi=args.multi, **how)
    query, gallery = sets.query, sets.gallery
    results = evaluate_features(query, gallery, multi=sets.multi, rerank=args.rerank, remove_same_camera=cameras)
    report = summary(results, query, gallery, remove_same_camera=cameras)
    if not is_main():
        return report  # process 0 writes
    home, name = resolve_data_root(tested.data_root), data_set_name(data_root)
    suffix, trained_on = other_data_set(data_root, home), data_set_name(home)
    title = f"{tested.title}{f', trained on {trained_on}' if suffix else ''}, tested on {name} ({data_root})"
    print(f"{title}\n{format_table(report)}")
    if args.open_set:
        report["open_set"] = measure_open_set(query, gallery, remove_same_camera=cameras)
        print(f"\n{format_open_set(report['open_set'])}")
    header = {
        "name": args.model or args.teacher or args.name or "latest",
        "iteration": tested.iteration,
        "trained_on": trained_on,
    }
    header |= {"tested_on": name, "test_dir": str(data_root), "precision": args.precision}
    written = [tested.folder / f"reid{suffix}.json"]
    write_json(written[0], header | report | {"reading": reading})
    written += save_features(tested.folder / f"reid{suffix}.npz", query, gallery, sets.multi, **per_query(results))
    if args.save_features:
        written += save_features(args.save_features, query, gallery, sets.multi)
    if args.rank_figure is not None:
        setting, _ = main_setting(query.features.shape[1])
        main = {row.convention: row.ranking for row in results if (row.task, row.setting) == (SINGLE, setting)}
        asked = dict(count=args.rank_figure, title=title, remove_same_camera=cameras)
        written += write_ranked_lists(tested.folder, suffix, query, gallery, main, **asked)
    for path in written:
        print(f"written to {path}")
    return report
