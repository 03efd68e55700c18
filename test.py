"""Re-identification of a run or a teacher: `python test.py --name latest`, `python test.py --teacher best`."""

from __future__ import annotations

import argparse

from utils import UserError, add_machine_arguments, pick_device, run_cli, set_threads, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="run under outputs/ (default: latest)")
    parser.add_argument("--teacher", metavar="NAME", help="a teacher under models/ instead of a run")
    parser.add_argument("--which_epoch", default="last", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--test_dir", help="data set to evaluate on (default: the config's data_root)")
    parser.add_argument("--batchsize", type=int, default=64, help="images per pass")
    parser.add_argument("--multi", action="store_true", help="also multi-query; needs multi-query/ or gt_bbox/")
    parser.add_argument("--rerank", action="store_true", help="also k-reciprocal re-ranking")
    parser.add_argument("--no-cameras", action="store_true", help="drop nothing by camera")
    parser.add_argument("--save-features", metavar="FILE", help="write the features, .npz or .mat")
    add_machine_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.name and args.teacher:
        raise UserError("--name and --teacher: give one of the two")
    if args.batchsize < 1:
        raise UserError(f"--batchsize {args.batchsize}: must be at least 1")

    from reid_eval.evaluate import format_table, report
    from reid_eval.features import extract_data_set, save_features
    from runs import load_run_for_test, load_teacher_for_test, open_run, resolve_data_root

    device = pick_device(args.device)
    set_threads(args.threads)
    run = open_run(args.output_path, args.teacher or args.name or "latest")
    tested = load_teacher_for_test(run, device) if args.teacher else load_run_for_test(run, args.which_epoch, device)
    data_root = resolve_data_root(args.test_dir or tested.data_root)
    sets = extract_data_set(
        tested.net, data_root, size=tested.size, batch_size=args.batchsize, device=device, multi=args.multi
    )
    if args.save_features:
        for path in save_features(args.save_features, sets.query, sets.gallery, sets.multi):
            print(f"features written to {path}")
    result = report(
        sets.query, sets.gallery, multi=sets.multi, rerank=args.rerank, remove_same_camera=not args.no_cameras
    )
    what = f"teacher {run.name}" if args.teacher else f"{run.name} after {tested.iteration} steps"
    print(f"{what}, tested on {data_root}\n{format_table(result)}")
    header = {"name": run.name, "iteration": tested.iteration, "test_dir": str(args.test_dir or tested.data_root)}
    folder = run.model if args.teacher else run.path
    write_json(folder / "reid.json", header | result)
    print(f"written to {folder / 'reid.json'}")


if __name__ == "__main__":
    run_cli(main)
