"""Several runs and teachers on several data sets, in one table: accuracy, time per image, size.

    python -m studies.compare --runs latest best --test_dir ../Market/pytorch --out compared

Writes `compared.json`, `compared.md` and `compared.png`. What is in the JSON is not measured again, unless the net or
the images have changed since; so the command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.machine import describe_machine
from data.folders import check_test_set, read_split
from files import digest_files, digest_of, make_folder, read_json, write_json, write_text, write_whole
from reid_eval.evaluation import say_test_images, test_roots
from reid_eval.features import embed_images, extract_data_set
from reid_eval.index import fingerprint
from reid_eval.ranking import CONVENTIONS, main_setting
from reid_eval.report import COLUMNS, evaluate_features
from runs.folder import open_run
from runs.load import TestNet, load_for_test
from utils import UserError, add_machine_arguments, pick_device, run_cli, set_threads

BATCH, PASSES = 32, 20  # images of a timed pass, and how many are timed
CONVENTION = "official"  # of the table and the figure; the JSON has both
SHOWN = ("mAP", "rank1", "mINP")


def measure_net(tested: TestNet, device: torch.device) -> dict[str, float]:
    """Milliseconds per image with its mirror (median of passes of 32), parameters and megabytes used at test time."""
    x, seconds = torch.randn(BATCH, 3, *tested.size, device=device), []
    for _ in range(PASSES + 2):
        began = time.perf_counter()
        embed_images(tested.net, x).cpu()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    unused = (".fc.", "classifier.0.")  # the trunk's classifier and those of the heads
    used = [v for name, v in tested.net.state_dict().items() if not any(part in f".{name}" for part in unused)]
    return {
        "ms_per_image": 1000 * statistics.median(seconds[2:]) / BATCH,
        "parameters": sum(v.numel() for v in used),
        "megabytes": sum(v.nbytes for v in used) / 1e6,
    }


def measure_accuracy(tested: TestNet, root: Path, device: torch.device, *, cameras: bool) -> dict[str, Any]:
    """The numbers of the score that the net is used with, by convention, as fractions."""
    sides = extract_data_set(tested.net, root, size=tested.size, batch_size=None, device=device)
    setting, _ = main_setting(sides.query.features.shape[1])
    rows = evaluate_features(sides.query, sides.gallery, remove_same_camera=cameras)
    return {"score": setting} | {row.convention: row.numbers for row in rows if row.setting == setting}


def content_mark(root: Path) -> str:
    """A hash of the query and gallery images of a data set."""
    return digest_of([mark for split in ("query", "gallery") for mark in digest_files(read_split(root, split).paths)])


# ---------------------------------------------------------------------------------------------- the table
def as_markdown(results: dict[str, Any]) -> str:
    """A row per net, a column per data set and number."""
    sets = list(dict.fromkeys(name for row in results["rows"].values() for name in row["accuracy"]))
    head = ["run", *(f"{COLUMNS[key]}, {name}" for name in sets for key in SHOWN)]
    lines = [[*head, "ms an image", "parameters, M", "MB"]]
    for run, row in results["rows"].items():
        cells = [
            f"{100 * row['accuracy'][name][CONVENTION][key]:.2f}" if name in row["accuracy"] else ""
            for name in sets
            for key in SHOWN
        ]
        size = [f"{row['ms_per_image']:.2f}", f"{row['parameters'] / 1e6:.2f}", f"{row['megabytes']:.1f}"]
        lines.append([run, *cells, *size])
    lines.insert(1, ["---"] * len(lines[0]))
    about = results["machine"]
    note = (
        f"{CONVENTION}: {CONVENTIONS[CONVENTION]}. Time of an image and its mirror in passes of {BATCH} on "
        f"{results['device']}, {about['cpu']}, {results['threads']} threads, PyTorch {about['torch']}, {about['date']}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per data set: mAP over milliseconds per image."""
    sets = list(dict.fromkeys(name for row in results["rows"].values() for name in row["accuracy"]))
    figure = Figure(figsize=(5 * len(sets), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for run, row in results["rows"].items():
            if name in row["accuracy"]:
                place = row["ms_per_image"], 100 * row["accuracy"][name][CONVENTION]["mAP"]
                axes.plot(*place, "o")
                axes.annotate(run, place, xytext=(4, 4), textcoords="offset points")
        axes.set(title=name, xlabel="milliseconds an image", ylabel=f"mAP ({CONVENTION}), %")
        axes.grid(alpha=0.3)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


# -------------------------------------------------------------------------------------------- the command
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="studies.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME", help="runs or teachers")
    parser.add_argument("--test_dir", nargs="+", metavar="DIR", help="data sets (default: that of the first run)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to, or to continue in")
    parser.add_argument("--no-cameras", action="store_true", help="leave out nothing by camera")
    add_machine_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    set_threads(args.threads)
    nets = {name: load_for_test(open_run(args.output_path, name), device) for name in dict.fromkeys(args.runs)}
    roots = test_roots(args.test_dir, next(iter(nets.values())))
    for root in roots.values():
        check_test_set(root, cameras=not args.no_cameras)
        say_test_images(root, ("query", "gallery"))
    marks = {name: content_mark(root) for name, root in roots.items()}

    file = make_folder(args.out) / "compared.json"
    kept = read_json(file, "give another --out") if file.exists() else {"rows": {}}
    if not isinstance(kept, dict) or not isinstance(kept.get("rows"), dict):
        raise UserError(f"{file}: not a table of studies.compare; give another --out")
    kept, machine = kept["rows"], describe_machine()
    how = dict(device=str(device), threads=torch.get_num_threads(), cameras=not args.no_cameras)
    how |= {key: machine.get(key) for key in ("cpu", "gpu", "torch")}
    results = how | {"machine": machine, "rows": dict(kept)}
    for name, tested in nets.items():
        mark = {"net": fingerprint(tested.net, tested.size)} | how
        row = kept.get(name, {})
        if row.get("mark") != mark:
            row = {"mark": mark, "title": tested.title, "accuracy": {}} | measure_net(tested, device)
        row["accuracy"] = {
            key: value for key, value in row["accuracy"].items() if value["images"] == marks.get(key, value["images"])
        }
        results["rows"][name] = row
        for key, root in roots.items():
            if key not in row["accuracy"]:
                accuracy = measure_accuracy(tested, root, device, cameras=not args.no_cameras)
                row["accuracy"][key] = accuracy | {"images": marks[key]}
                write_json(file, results)
    write_json(file, results)
    results["rows"] = {name: results["rows"][name] for name in nets}
    table = as_markdown(results)
    write_text(args.out / "compared.md", table)
    draw(results, args.out / "compared.png")
    print(f"{table}\nwritten to {args.out}")


if __name__ == "__main__":
    run_cli(main)
