"""Where runs and teachers keep their files.

OUTPUT/outputs/NAME/   config.yaml, checkpoints/, images/, reid.json     a run
OUTPUT/models/NAME/    net_last.pth, opts.yaml                           a teacher
OUTPUT/logs/NAME/      TensorBoard
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from config import Config, DGNetConfig, dump_config, load_config, read_yaml
from files import is_part, write_text
from utils import ROOT, UserError

log = logging.getLogger(__name__)
TEACHER_FILES = ("net_last.pth", "opts.yaml")


@dataclass(frozen=True)
class RunFolder:
    """Where a run named `name` keeps its files."""

    output_path: Path
    name: str

    @property
    def path(self) -> Path:
        return self.output_path / "outputs" / self.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def logs(self) -> Path:
        return self.output_path / "logs" / self.name

    @property
    def model(self) -> Path:
        return self.output_path / "models" / self.name


def open_run(output_path: str | None, name: str) -> RunFolder:
    """The run of that name, in the project's folder unless `output_path` is given."""
    if not name or name == ".." or Path(name).name != name:
        raise UserError(f"--name {name!r}: must be a plain folder name")
    return RunFolder(Path(output_path) if output_path else ROOT, name)


def start_folder(run: RunFolder, cfg: Config, *, resume: bool) -> None:
    """Make the run's folder and write the resolved config. Never overwrites another run.

    Raises UserError when the folder holds a run and `resume` is false, or the other way round.
    """
    try:
        str(run.logs).encode()
    except UnicodeEncodeError:
        raise UserError(f"{run.logs}: TensorBoard needs a path in UTF-8; choose another --output_path") from None
    files = [run.config_file] + ([run.model / f for f in TEACHER_FILES] if not cfg.generates else [])
    present = [path for path in files if path.exists()]
    if resume:
        if not run.path.is_dir():
            raise UserError(f"{run.path}: nothing to resume; start the run without --resume")
    elif present or (run.path.is_dir() and not all(map(is_part, run.path.iterdir()))):
        holder = present[0].parent if present else run.path
        raise UserError(f"{holder} holds another run; continue it with --resume or choose another --name")
    make_run_folder(run, cfg)


def make_run_folder(run: RunFolder, cfg: Config) -> None:
    """Create the missing folders of a run. The config comes first, because a folder without one is not a run.

    Also create the teacher's folder, so that a permission error appears before training.
    """
    folder = run.path if cfg.generates else run.model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = run.path
        folder.mkdir(parents=True, exist_ok=True)
        if not run.config_file.exists():
            write_text(run.config_file, dump_config(cfg))
        for folder in (run.checkpoints, run.images):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output_path") from None


def update_config(run: RunFolder, cfg: Config) -> None:
    """Write the config of a resumed run into its config.yaml.

    The first one, which may be the release's with remarks of its owner, stays as config_as_begun.yaml; every snapshot
    keeps the one that it was made with.
    """
    if read_yaml(run.config_file) != cfg.model_dump():
        first = run.path / "config_as_begun.yaml"
        if not first.exists():
            write_text(first, run.config_file.read_text(encoding="utf-8"))
        write_text(run.config_file, dump_config(cfg))
        log.info("%s now says how the run continues", run.config_file)


def run_config(run: RunFolder) -> Config:
    """The config of a finished or running run, ours or the release's."""
    if not run.config_file.is_file():
        raise UserError(f"{run.config_file}: no such run; give --name, and --output_path if it is elsewhere")
    return load_config(run.config_file, strict=False)


def generator_config(run: RunFolder) -> DGNetConfig:
    """The config of a run that has a generator. Raises UserError for a teacher's."""
    cfg = run_config(run)
    if not cfg.generates:
        raise UserError(f"{run.name} is a teacher's run and generates nothing; give the --name of a DG-Net run")
    return cfg


# ------------------------------------------------------------------------------------------------ data
def resolve_data_root(data_root: str) -> Path:
    """A relative data_root is looked for from here, then from the project's folder."""
    path = Path(data_root).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


def find_data(given: str | None, option: str, recorded: str, source: object) -> Path:
    """The data that `option` names or, without it, those that a run or a teacher was trained on.

    recorded, source  their data_root, and where it was read, for the error
    Raises UserError if the recorded folder is not there; a relative path may be there from another folder.
    """
    if given:
        return resolve_data_root(given)
    root = resolve_data_root(recorded)
    if not root.is_dir():
        places = "" if root.is_absolute() and root == Path(recorded) else f" from {Path.cwd()} or {ROOT}"
        raise UserError(f"data_root {recorded}, from {source}: no such folder{places}; give the data with {option} DIR")
    return root
