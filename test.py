"""Re-identification of a run or a teacher: `python test.py --name latest`, `python test.py --teacher best`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import write_json
from utils import UserError, add_batch_argument, add_net_arguments, check_net_arguments, run_cli

if TYPE_CHECKING:
    import torch

    from runs.load import TestNet


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_net_arguments(parser)
    parser.add_argument(
        "--test_dir", nargs="+", metavar="DIR", help="data sets to evaluate on (default: the config's data_root)"
    )
    add_batch_argument(parser, "--batchsize")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the net (fp32)")
    parser.add_argument("--multi", action="store_true", help="also multi-query; needs multi-query/ or gt_bbox/")
    parser.add_argument("--rerank", action="store_true", help="also k-reciprocal re-ranking")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share the images (default: 1)")
    parser.add_argument("--no-cameras", action="store_true", help="drop nothing by camera")
    parser.add_argument("--save-features", metavar="FILE", help="write the features, .npz or .mat")
    parser.add_argument(
        "--rank-figure", type=int, metavar="N", help="picture of the N worst, N best and N other queries; page of all"
    )
    return parser.parse_args()


def main() -> int | None:
    args = parse_args()

    from parallel import launch

    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        return run_test(args, device)


def run_test(args: argparse.Namespace, device: torch.device) -> None:
    check_net_arguments(args)
    if args.batchsize is not None and args.batchsize < 1:
        raise UserError(f"--batchsize {args.batchsize}: must be at least 1")

    from data.folders import check_test_set, data_set_name
    from parallel.collectives import is_main
    from reid_eval.features import check_feature_file
    from reid_eval.report import format_comparison
    from runs.folder import resolve_data_root
    from runs.load import open_net
    from visual_tools.rank_figure import check_count

    if args.rank_figure is not None:
        check_count(args.rank_figure)
    if args.save_features:
        check_feature_file(args.save_features)
    tested = open_net(args, device)
    roots = {data_set_name(root): root for root in map(resolve_data_root, args.test_dir or [tested.data_root])}
    if args.test_dir and len(roots) < len(args.test_dir):
        raise UserError(f"--test_dir {' '.join(args.test_dir)}: two of one name; give every data set once")
    if args.save_features and len(roots) > 1:
        raise UserError("--save-features: holds one data set; give one --test_dir")
    # All of them first, so that a missing folder does not show after the features of another data set.
    for data_root in roots.values():
        check_test_set(data_root, multi=args.multi, cameras=not args.no_cameras)
    results = {name: test_on(data_root, tested, args, device) for name, data_root in roots.items()}
    if len(results) > 1 and is_main():
        trained_on = data_set_name(resolve_data_root(tested.data_root))
        print(f"{tested.title}, trained on {trained_on}\n{format_comparison(results)}")


def test_on(data_root: Path, tested: TestNet, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Evaluate on one data set, print and write what is asked for; returns the report."""
    from data.folders import data_set_name, other_data_set
    from parallel.collectives import is_main
    from reid_eval.features import extract_data_set, save_features
    from reid_eval.report import format_table, rankings, summary
    from reid_eval.top import main_setting
    from runs.folder import resolve_data_root
    from visual_tools.rank_figure import write_rank_figure

    size, cameras = tested.size, not args.no_cameras
    how = dict(batch_size=args.batchsize, precision=args.precision, device=device)
    sets = extract_data_set(tested.net, data_root, size=size, multi=args.multi, **how)
    query, gallery = sets.query, sets.gallery
    ranked = rankings(query, gallery, multi=sets.multi, rerank=args.rerank, remove_same_camera=cameras)
    result = summary(ranked, query, gallery, remove_same_camera=cameras)
    if not is_main():
        return result  # one writes
    own, name = resolve_data_root(tested.data_root), data_set_name(data_root)
    # reid.json is always about the data set that the config names.
    suffix = other_data_set(data_root, own)
    trained = f", trained on {data_set_name(own)}" if suffix else ""
    title = f"{tested.title}{trained}, tested on {name} ({data_root})"
    print(f"{title}\n{format_table(result)}")
    header = {"name": args.teacher or args.name or "latest", "iteration": tested.iteration}
    header |= {"trained_on": data_set_name(own), "tested_on": name, "test_dir": str(data_root)}
    header |= {"precision": args.precision}
    file = tested.folder / f"reid{suffix}.json"
    write_json(file, header | result)
    print(f"written to {file}")
    if args.save_features:
        for path in save_features(args.save_features, query, gallery, sets.multi):
            print(f"features written to {path}")
    if args.rank_figure is not None:
        main = ranked["single query"][main_setting(query.features.shape[1])[0]]
        asked = dict(count=args.rank_figure, title=title, remove_same_camera=cameras)
        for path in write_rank_figure(tested.folder, suffix, query, gallery, main, **asked):
            print(f"written to {path}")
    if args.test_dir and len(args.test_dir) > 1:
        print()
    return result


if __name__ == "__main__":
    run_cli(main)
