"""A run in the release's format, read as it is and written by `python -m runs.release --name N --out DIR`.

The release keeps flat files `{gen,id,dis}_%08d.pt`, each `{'a': state_dict}`, and one `optimizer.pt`. Runs of earlier
versions of this project have the same flat files of networks, so they can be evaluated too.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from files import make_folder, read_tensors, write_tensors
from utils import UserError, run_cli

OPTIMIZERS = "optimizer.pt"
NETWORKS = ("gen", "id", "dis")


def network_file(folder: Path, name: str, iteration: int) -> Path:
    return folder / f"{name}_{iteration:08d}.pt"


def iterations(folder: Path) -> list[int]:
    """Iterations of which a folder has an id net (a teacher's run: its net) in a flat file, ascending."""
    names = (re.fullmatch(r"(?:id|net)_(\d{8})\.pt", path.name) for path in folder.glob("*.pt"))
    return sorted(int(match[1]) for match in names if match)


def export(folder: Path, out: Path, iteration: int | None = None) -> int:
    """Write a snapshot of a DG-Net run, the newest or that of `iteration`, as the release's files; returns which.

    Raises UserError rather than overwrite a file.
    """
    from runs.snapshot import own_snapshots, read_network, snapshot_folder

    present = own_snapshots(folder)
    if not present or iteration not in (None, *present):
        raise UserError(f"{folder}: no such snapshot of a run; there are {', '.join(map(str, present)) or 'none'}")
    iteration = iteration or present[-1]
    state = read_tensors(snapshot_folder(folder, iteration) / "state.pt")
    contents = {
        network_file(out, name, iteration): {"a": read_network(folder, name, iteration)[0]} for name in NETWORKS
    }
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

    from runs.folder import generator_config, open_run

    run = open_run(args.output_path, args.name)
    generator_config(run)  # refuses a teacher's run
    iteration = export(run.checkpoints, args.out, args.which_epoch)
    print(f"{run.name} after {iteration} steps written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
