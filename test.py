"""Re-identification of a run or a teacher: `python test.py --name latest`, `python test.py --teacher best`."""

from __future__ import annotations

import argparse

from utils import add_batch_argument, add_net_arguments, add_rerank_argument, between, check_net_arguments, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_net_arguments(parser)
    parser.add_argument("--model", metavar="FILE", help="an ONNX file of export.py; of the run if one is named")
    parser.add_argument(
        "--test_dir", nargs="+", metavar="DIR", help="data sets to evaluate on (default: the config's data_root)"
    )
    add_batch_argument(parser, "--batchsize")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the net (fp32)")
    parser.add_argument("--multi", action="store_true", help="also multi-query; needs multi-query/ or gt_bbox/")
    add_rerank_argument(parser)
    parser.add_argument("--open-set", action="store_true", help="also EER, TAR at FAR, and searches for absent people")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share the images (default: 1)")
    parser.add_argument("--no-cameras", action="store_true", help="leave out nothing by camera")
    parser.add_argument("--save-features", metavar="FILE", help="write the features here too, .npz or .mat")
    parser.add_argument(
        "--rank-figure",
        type=between(1, 100),
        metavar="N",
        help="picture of the N worst, N best and N random queries, and a page of all",
    )
    args = parser.parse_args()
    check_net_arguments(args)
    return args


def main() -> int | None:
    args = parse_args()

    from parallel import launch

    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        from reid_eval.evaluation import run_test

        run_test(args, device)
        return 0


if __name__ == "__main__":
    run_cli(main)
