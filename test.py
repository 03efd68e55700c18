"""Re-identification of a run or a teacher: `python test.py --name latest`, `python test.py --teacher best`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from utils import UserError, add_machine_arguments, run_cli, set_threads, write_json

if TYPE_CHECKING:
    import torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="run under outputs/ (default: latest)")
    parser.add_argument("--teacher", metavar="NAME", help="a teacher under models/ instead of a run")
    parser.add_argument("--which_epoch", default="last", help="iteration of the snapshot (default: the newest)")
    parser.add_argument(
        "--test_dir", nargs="+", metavar="DIR", help="data sets to evaluate on (default: the config's data_root)"
    )
    parser.add_argument("--batchsize", type=int, default=64, help="images per pass")
    parser.add_argument("--multi", action="store_true", help="also multi-query; needs multi-query/ or gt_bbox/")
    parser.add_argument("--rerank", action="store_true", help="also k-reciprocal re-ranking")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share the images (default: 1)")
    parser.add_argument("--no-cameras", action="store_true", help="drop nothing by camera")
    parser.add_argument("--save-features", metavar="FILE", help="write the features, .npz or .mat")
    parser.add_argument(
        "--rank-figure", type=int, metavar="N", help="picture of the N worst, N best and N other queries; page of all"
    )
    add_machine_arguments(parser)
    return parser.parse_args()


def main() -> int | None:
    args = parse_args()
    if args.name and args.teacher:
        raise UserError("--name and --teacher: give one of the two")
    if args.batchsize < 1:
        raise UserError(f"--batchsize {args.batchsize}: must be at least 1")

    import launch

    processes = launch.count_processes(args.processes, None)
    if processes > 1 and not launch.started():
        return launch.launch(processes, args.device)
    with launch.process_group(args.device) as device:
        return run_test(args, device)


def run_test(args: argparse.Namespace, device: torch.device) -> None:
    from data.folders import check_test_set, data_set_name, data_set_root
    from distributed import is_main
    from reid_eval.evaluate import format_comparison, format_table, report
    from reid_eval.features import extract_data_set, save_features
    from runs import load_run_for_test, load_teacher_for_test, open_run, resolve_data_root
    from visual_tools.rank_figure import check_count, write_rank_figure

    if args.rank_figure is not None:
        check_count(args.rank_figure)
    set_threads(args.threads)
    run = open_run(args.output_path, args.teacher or args.name or "latest")
    tested = load_teacher_for_test(run, device) if args.teacher else load_run_for_test(run, args.which_epoch, device)
    what = f"teacher {run.name}" if args.teacher else f"{run.name} after {tested.iteration} steps"
    own = resolve_data_root(tested.data_root)
    roots = {data_set_name(root): root for root in map(resolve_data_root, args.test_dir or [tested.data_root])}
    if args.test_dir and len(roots) < len(args.test_dir):
        raise UserError(f"--test_dir {' '.join(args.test_dir)}: two of one name; give every data set once")
    if args.save_features and len(roots) > 1:
        raise UserError("--save-features: holds one data set; give one --test_dir")
    # All of them first, so that a missing folder does not show after the features of another data set.
    for data_root in roots.values():
        check_test_set(data_root, multi=args.multi, cameras=not args.no_cameras)

    results = {}
    for data_set, data_root in roots.items():
        sets = extract_data_set(
            tested.net, data_root, size=tested.size, batch_size=args.batchsize, device=device, multi=args.multi
        )
        if args.save_features and is_main():
            for path in save_features(args.save_features, sets.query, sets.gallery, sets.multi):
                print(f"features written to {path}")
        result = report(
            sets.query, sets.gallery, multi=sets.multi, rerank=args.rerank, remove_same_camera=not args.no_cameras
        )
        results[data_set] = result
        if not is_main():
            continue  # one writes
        # reid.json is always about the data set that the config names.
        transferred = data_set_root(data_root) != data_set_root(own)
        suffix = f"-{data_set}" if transferred else ""
        file = (run.model if args.teacher else run.path) / f"reid{suffix}.json"
        trained = f", trained on {data_set_name(own)}" if transferred else ""
        if len(results) > 1:
            print()
        title = f"{what}{trained}, tested on {data_set} ({data_root})"
        print(f"{title}\n{format_table(result)}")
        header = {
            "name": run.name,
            "iteration": tested.iteration,
            "trained_on": data_set_name(own),
            "tested_on": data_set,
            "test_dir": str(data_root),
        }
        write_json(file, header | result)
        print(f"written to {file}")
        if args.rank_figure is not None:
            for path in write_rank_figure(
                file.parent,
                suffix,
                sets.query,
                sets.gallery,
                count=args.rank_figure,
                title=title,
                remove_same_camera=not args.no_cameras,
            ):
                print(f"written to {path}")
    if len(results) > 1:
        print(f"\n{what}, trained on {data_set_name(own)}\n{format_comparison(results)}")


if __name__ == "__main__":
    run_cli(main)
