"""Runs for others: in the release's format, packed for a mirror, or fetched from one.

python -m runs.release --name N --out DIR                        # the release's format
python -m runs.release pack --name N --out DIR --half            # weights for a mirror, with a manifest
python -m runs.release get N --manifest DIR/manifest.json        # or a URL: fetch into outputs/N or models/N

The release keeps flat files `{gen,id,dis}_%08d.pt`, each `{'a': state_dict}`, and one `optimizer.pt`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from files import make_folder, part_of, read_json, read_tensors, sha256, write_json, write_safetensors, write_tensors
from runs.fetch import get
from runs.folder import generator_config, open_run
from runs.load import find_teacher, pick_epoch
from runs.snapshot import OPTIMIZERS, flat_file, own_snapshots, read_manifest, read_network, snapshot_folder
from runs.weights import plain_names
from utils import UserError, run_cli

NETWORKS = ("gen", "id", "dis")
MANIFEST = "manifest.json"


def export(folder: Path, out: Path, iteration: int | None = None) -> int:
    """Write a snapshot of a DG-Net run, the newest or that of `iteration`, as the release's files; returns which.

    Raises UserError rather than overwrite a file.
    """
    present = own_snapshots(folder)
    if not present or iteration not in (None, *present):
        raise UserError(f"{folder}: no such snapshot of a run; there are {', '.join(map(str, present)) or 'none'}")
    iteration = iteration or present[-1]
    state = read_tensors(snapshot_folder(folder, iteration) / "state.pt")
    contents = {flat_file(out, name, iteration): {"a": read_network(folder, name, iteration)[0]} for name in NETWORKS}
    contents[out / OPTIMIZERS] = {name: state[name] for name in NETWORKS}
    for path in contents:
        if path.exists():
            raise UserError(f"{path} exists; give an empty folder as --out")
    make_folder(out)
    for path, content in contents.items():
        write_tensors(path, content)
    return iteration


# ---------------------------------------------------------------------------------------------- for a mirror
def pack(args: argparse.Namespace) -> Path:
    """Write what a run or a teacher needs to be used, not trained on, to `--out`/NAME, and list it in the manifest.

    A run: config.yaml and the newest snapshot's generator and id net as `.safetensors`. A teacher: its two files.
    Returns the folder. Raises UserError if it exists, and for numbers that half precision cannot hold.
    """
    run = open_run(args.output_path, args.teacher or args.name)
    folder, manifest = args.out / run.name, args.out / MANIFEST
    listed = read_json(manifest, "give another --out") if manifest.exists() else {}
    if not isinstance(listed, dict) or not all(isinstance(e, dict) and "files" in e for e in listed.values()):
        raise UserError(f"{manifest}: not a manifest of runs; give another --out")
    if folder.exists():
        raise UserError(f"{folder} exists; give another --out")
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)  # of a pack that was killed
    make_folder(part)
    try:
        if args.teacher:
            files = find_teacher(run.name, run.output_path)
            state = plain_names(read_tensors(files.weights), files.weights)
            write_tensors(part / files.weights.name, packed(state, files.weights, half=args.half))
            if (files.folder / "opts.yaml").is_file():
                shutil.copyfile(files.folder / "opts.yaml", part / "opts.yaml")
        else:
            cfg = generator_config(run)
            iteration = pick_epoch(run, args.which_epoch)
            shutil.copyfile(run.config_file, part / "config.yaml")
            target = make_folder(snapshot_folder(part / "checkpoints", iteration))
            for name in ("gen", "id"):
                state, source = read_network(run.checkpoints, name, iteration)
                write_safetensors(target / f"{name}.safetensors", packed(state, source, half=args.half))
            unknown = {"iteration": iteration, "config": cfg.model_dump(mode="json"), "circumstances": {}}
            write_json(target / "manifest.json", read_manifest(run.checkpoints, iteration) or unknown)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    write_json(manifest, listed | {run.name: {"files": list_files(folder, args.mirror)}})
    return folder


def packed(state: Mapping[str, Tensor], source: Path, *, half: bool) -> dict[str, Tensor]:
    """The tensors of a state_dict, with `half` the floating-point ones in float16; readers convert them back."""
    if not half:
        return dict(state)
    state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{source}: {bad[0]} does not fit into half precision; leave --half out")
    return state


def list_files(folder: Path, mirrors: Sequence[str]) -> dict[str, dict[str, object]]:
    """The files of a packed folder as a manifest beside it lists them; each mirror has the same folder."""
    places, listed = ["", *(mirror.rstrip("/") + "/" for mirror in mirrors)], {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        urls = [place + quote(f"{folder.name}/{name}") for place in places]
        listed[name] = {"sha256": sha256(path), "size": path.stat().st_size, "urls": urls}
    return listed


# ------------------------------------------------------------------------------------------------- commands
def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Options of the three commands; without one of their names it is `export`."""
    parser = argparse.ArgumentParser(
        prog="runs.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export_ = commands.add_parser("export", help="write a run in the release's format (the default)")
    export_.add_argument("--name", required=True, help="the DG-Net run under outputs/")
    pack_ = commands.add_parser("pack", help="write the weights of a run or a teacher for a mirror, with a manifest")
    which = pack_.add_mutually_exclusive_group(required=True)
    which.add_argument("--name", help="the DG-Net run under outputs/")
    which.add_argument("--teacher", metavar="NAME", help="a teacher under models/ instead of a run")
    pack_.add_argument("--half", action="store_true", help="float16, which is converted back to fp32 on reading")
    about = "address of another copy of DIR, to be tried after the manifest's own"
    pack_.add_argument("--mirror", metavar="URL", action="append", default=[], help=about)
    get_ = commands.add_parser("get", help="fetch a run or a teacher that a manifest lists")
    get_.add_argument("name", metavar="NAME", help="its name in the manifest, and in outputs/ or models/")
    get_.add_argument("--manifest", required=True, metavar="FILE_OR_URL", help="what `pack` has written")
    for command in (export_, pack_):
        command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    export_.add_argument("--which_epoch", type=int, metavar="N", help="iteration of the snapshot (default: the newest)")
    pack_.add_argument("--which_epoch", metavar="N", help="iteration of the snapshot (default: the newest)")
    for command in (export_, pack_, get_):
        command.add_argument("--output_path", help="folder of outputs/, models/ and logs/ (default: the project's)")
    named = arguments and arguments[0] in (*commands.choices, "-h", "--help")
    return parser.parse_args(arguments if named else ["export", *arguments])


def main() -> None:
    args = parse_args(sys.argv[1:])
    if args.command == "get":
        folder = get(open_run(args.output_path, args.name), args.manifest)
        print(f"{args.name} fetched into {folder}")
    elif args.command == "pack":
        folder = pack(args)
        precision = "half" if args.half else "full"
        print(f"{folder} written in {precision} precision, listed in {args.out / MANIFEST}")
        print("its .yaml and .json files name the folder of your data")
    else:
        run = open_run(args.output_path, args.name)
        generator_config(run)  # refuses a teacher's run
        iteration = export(run.checkpoints, args.out, args.which_epoch)
        print(f"{run.name} after {iteration} steps written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
