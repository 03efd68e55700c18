"""Write a run in the release's format: `python -m runs.release --name N --out DIR`.

The release keeps flat files `{gen,id,dis}_%08d.pt`, each `{'a': state_dict}`, and one `optimizer.pt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from files import make_folder, read_tensors, write_tensors
from runs.folder import generator_config, open_run
from runs.snapshot import OPTIMIZERS, flat_file, own_snapshots, read_network, snapshot_folder
from utils import UserError, run_cli

NETWORKS = ("gen", "id", "dis")


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="runs.release", description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="the DG-Net run under outputs/")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--which_epoch", type=int, metavar="N", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--output_path", help="folder of outputs/, models/ and logs/ (default: the project's)")
    args = parser.parse_args()

    run = open_run(args.output_path, args.name)
    generator_config(run)  # refuses a teacher's run
    iteration = export(run.checkpoints, args.out, args.which_epoch)
    print(f"{run.name} after {iteration} steps written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
