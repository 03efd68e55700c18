"""One run of `studies.ablation`: its data, its training, its scores."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import clock_of
from config import Config, exact_settings, load_config
from data.archives import SourceImage
from data.augment import augment
from data.batch import Batch
from data.folders import UNFINISHED_MARK, ImageList, check_test_set, is_data_set, read_split
from data.generated import MANIFEST, count_pairs, draw_swap_pairs
from data.images import iter_images, normalise, to_uint8
from data.prepare import Task, fill_folder
from files import read_json, write_json
from gen_eval.metrics import Protocol, frechet_distance, image_features, trunk_features
from mannequins.against_truth import ask_teacher
from mannequins.dataset import Factors, is_embedded, load_factors, make_dataset
from mannequins.truth import Swaps, clothes_shares, draw_swaps, measure_swaps, shrink
from precision import pick_precision
from reid_eval.features import extract_data_set
from reid_eval.ranking import rank
from runs.folder import TEACHER_FILES, RunFolder, make_run_folder, resolve_data_root
from runs.load import load_run_for_test, load_teacher, load_teacher_for_test
from runs.session import build_session
from runs.snapshot import snapshot_folder, snapshots
from runs.swapper import load_swapper
from studies.ablation.cells import CELLS, LONG, Preset, cell_config, common_steps, score_settings, starts_as_both
from trainer import Decoded
from utils import ROOT, UserError, seed_everything

Run = tuple[str, int]  # cell, seed
SPLIT_COMMAND = "python -m studies.ablation.split --images DIR --out DATA_ROOT"


@dataclass(frozen=True)
class Study:
    """What the runs of one folder share.

    data     the data set; its query and gallery are the test identities
    held     its train_all without the held-out identities, whose images are the query and gallery here
    factors  of embedded data, otherwise None
    """

    preset: Preset
    out: Path
    data: Path
    held: Path
    factors: Factors | None
    device: torch.device
    threads: int
    long_epochs: int | None = None

    def run(self, name: str, seed: int) -> RunFolder:
        return RunFolder(self.out, f"{name}-{seed}")

    def config(self, name: str, seed: int) -> Config:
        """The configuration of a run; `final_config` adds the length of a run that is to be as long as others."""
        changes = {"extra_data": str(self.generated(seed))} if name == "offline" else {}
        cfg = cell_config(self.preset, name, seed, data_root=str(self.held), **changes)
        return cfg.model_copy(update={"precision": pick_precision(self.device, cfg.precision)})

    def generated(self, seed: int) -> Path:
        return self.out / "generated" / f"both-{seed}"


# ------------------------------------------------------------------------------------------------ data
def prepare_data(preset: Preset, data_root: str | None, out: Path) -> tuple[Path, Path, Factors | None]:
    """Return the data set (drawn into `out` if no `data_root` is given), the one with held-out identities, the factors.

    A `data_root` with the folders val/ and test/ is split already (studies/ablation/split.py). The factors are None
    unless the data are embedded. Raises UserError for missing photographs, and for halves that do not belong together.
    """
    if data_root is not None:
        data = resolve_data_root(data_root).resolve()
        if is_data_set(data / "test"):
            check_halves(data)
            return data / "test", data / "val", None
        if not is_data_set(data):
            raise UserError(f"--data_root {data}: neither a data set nor split into val/ and test/: {SPLIT_COMMAND}")
    elif preset.data is None:
        raise UserError(f"--data_root is missing; this preset needs photographs, split by: {SPLIT_COMMAND}")
    else:
        data = out / "data" / "all"
        # Not the default preset, which changes with the demo: the study writes out every setting.
        make_dataset(data, preset="tiny", **preset.data)
    factors = load_factors(data) if is_embedded(data) else None
    held = out / "data" / "held-out"
    hold_out(data, held, factors, preset.held_out)
    return data, held, factors


def check_halves(root: Path) -> None:
    """Raise UserError unless val/ and test/ have the same training images, and people to search for of their own."""
    people: dict[str, set[int]] = {}
    names: list[list[str]] = []
    for half in ("val", "test"):
        check_test_set(root / half)
        train, *sides = (read_split(root / half, split) for split in ("train_all", "query", "gallery"))
        people["train"] = set(train.pids.tolist())
        people[half] = {pid for side in sides for pid in side.pids.tolist() if pid > 0}  # no junk, no distractors
        names.append([path.name for path in train.paths])
    if names[0] != names[1]:
        what = "val/ and test/ have different training images"
        raise UserError(f"--data_root {root}: {what}; split again: {SPLIT_COMMAND}")
    for one, two in combinations(people, 2):
        if common := sorted(people[one] & people[two]):
            what = f"{len(common)} people are both in {one} and in {two}, the first is {common[0]}"
            raise UserError(f"--data_root {root}: {what}; split again: {SPLIT_COMMAND}")


def hold_out(data: Path, held: Path, factors: Factors | None, share: float) -> None:
    """Fill `held` with links to the training images of `data`; `share` of the identities become query and gallery.

    In embedded data they are whole groups that wear the same colours, as the test identities are. The first image of a
    held-out identity under each camera is a query. Raises UserError for names without identity and camera, too few
    identities, or a folder that was filled from other data.
    """
    images = read_split(data, "train_all")
    pids, camids = images.pids.tolist(), images.camids.tolist()
    group = {pid: factors.people[f"{pid:04d}"].group if factors else pid for pid in sorted(set(pids))}
    chosen: set[int] = set()
    for number in np.random.default_rng(0).permutation(sorted(set(group.values()))).tolist():
        if len(chosen) >= share * len(group):
            break
        chosen |= {pid for pid in group if group[pid] == number}
    if len(chosen) < 3 or len(group) - len(chosen) < 2:
        raise UserError(f"{data}: {len(group)} training identities are too few to hold some out; 15 are enough")
    splits: dict[str, list[SourceImage]] = {"train_all": [], "query": [], "gallery": []}
    seen = set()
    for path, pid, camera, token in zip(images.paths, pids, camids, images.tokens, strict=True):
        split = "train_all" if pid not in chosen else "gallery" if (pid, camera) in seen else "query"
        seen.add((pid, camera))
        splits[split].append(SourceImage(path, pid, token, path.name))
    fill_folder(Task("", held, splits, dict(zip(images.tokens, pids, strict=True))))
    check_test_set(held)


class TrueSwaps:
    """Takes the place of `DGNetTrainer.fed_back` in the oracle: the renderer's swaps instead of the generated images.

    They are augmented as any training image is. Only the teacher loss reads them: the soft label, the id net's passes
    over the fakes, and so their BatchNorm statistics. All other terms keep the generated images.
    """

    def __init__(self, factors: Factors, images: ImageList, size: tuple[int, int], pad: int) -> None:
        self.factors, self.size, self.pad = factors, size, pad
        self.names = [path.name for path in images.paths]

    def draw(self, appearance: Tensor, structure: Tensor) -> Tensor:
        """The true swaps (N, 3, H, W) uint8 of images by their positions (N,) in the list."""
        pairs = zip(appearance.tolist(), structure.tolist(), strict=True)
        drawn = [shrink(self.factors.true_swap(self.names[i], self.names[j]), self.size) for i, j in pairs]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()

    def __call__(self, a: Batch, b: Batch, d: Decoded, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        swaps = self.draw(torch.cat([a.index, b.index]), torch.cat([b.index, a.index]))
        n, places = len(swaps), 2 * self.pad + 1
        draws = rng.random(n) < 0.5, rng.integers(0, places, n), rng.integers(0, places, n)
        x = normalise(augment(swaps, torch.arange(n), *map(torch.from_numpy, draws), self.pad)).to(a.x.device)
        return tuple(x.chunk(2))


# ------------------------------------------------------------------------------------------------ training
def trained(study: Study, run: Run) -> bool:
    folder = study.run(*run)
    if CELLS[run[0]].task == "teacher":
        return all((folder.model / name).is_file() for name in TEACHER_FILES)
    return study.config(*run).max_iter in snapshots(folder.checkpoints)


def read_time(folder: RunFolder) -> dict[str, float]:
    """The measured steps of a run, their seconds (of processor time on a CPU), and the run's wall-clock seconds."""
    path = folder.path / "time.json"
    if not path.is_file():
        return {"steps": 0, "seconds": 0.0, "wall": 0.0}
    return read_json(path, "remove the folder of its run, which then begins anew")


def long_epochs(study: Study, seed: int, images: int) -> int:
    """Passes over `images` in as many steps as the teacher makes in the time of teacher and DG-Net together."""
    cfg, real = study.config("teacher", seed), len(read_split(study.held, "train_all"))
    if study.long_epochs is not None:
        return max(1, round(study.long_epochs * (real // cfg.batch_size) / (images // cfg.batch_size)))
    seconds, steps = {}, cfg.epochs * (real // cfg.batch_size)
    for name, count in (("teacher", steps), ("both", study.config("both", seed).max_iter)):
        timed = read_time(study.run(name, seed))
        if not timed["steps"]:
            raise UserError(f"{study.run(name, seed).path}: no step of it was timed; give --long_epochs")
        seconds[name] = count * timed["seconds"] / timed["steps"]
    ratio = (seconds["teacher"] + seconds["both"]) / seconds["teacher"]
    return max(1, round(ratio * steps / (images // cfg.batch_size)))


def final_config(study: Study, run: Run) -> Config:
    """The configuration that a run starts or continues with. Raises UserError if it was started with another one."""
    cfg, folder = study.config(*run), study.run(*run)
    started = load_config(folder.config_file) if folder.config_file.is_file() else None
    if run[0] in LONG:
        real = len(read_split(study.held, "train_all"))
        images = 2 * real if run[0] == "offline" else real
        cfg = cfg.model_copy(update={"epochs": started.epochs if started else long_epochs(study, run[1], images)})
    if started:
        old, new = exact_settings(started.model_dump()), exact_settings(cfg.model_dump())
        changed = [f"{key} was {old.get(key)}, is {new[key]}" for key in new if old.get(key) != new[key]]
        if changed:
            raise UserError(f"{folder.path}: started with other settings ({', '.join(changed)}); choose another --out")
    return cfg


def train(study: Study, run: Run) -> int:
    """Train a run or continue it, and add the time to its `time.json`; returns 0, or 128 and a signal's number."""
    if run[0] == "offline":
        generate(study, run[1])
    cfg, folder = final_config(study, run), study.run(*run)
    if starts_as_both(run[0], cfg):
        copy_start(study, run, cfg)
    seed_everything(cfg.seed)
    session = build_session(cfg, folder, study.device, resume=True)
    if run[0] == "oracle":
        size = cfg.crop_image_height, cfg.crop_image_width
        session.trainer.fed_back = TrueSwaps(study.factors, session.images, size, cfg.crop_padding)

    def clocks() -> dict[str, float]:
        steps = max(snapshots(folder.checkpoints), default=0)
        return {"steps": steps, "seconds": clock_of(study.device)(), "wall": time.perf_counter()}

    before = clocks()
    status = runpy.run_path(str(ROOT / "train.py"))["train"](session, "auto")
    passed, after = read_time(folder), clocks()
    write_json(folder.path / "time.json", {key: passed[key] + after[key] - before[key] for key in before})
    return status


def copy_start(study: Study, run: Run, cfg: Config) -> None:
    """Give a run that has not begun the snapshot of `both` at the end of the common steps."""
    folder, source = study.run(*run), study.run("both", run[1])
    if snapshots(folder.checkpoints):
        return
    make_run_folder(folder, cfg)
    shared = snapshot_folder(source.checkpoints, common_steps(cfg))
    if not shared.is_dir():
        raise UserError(f"{shared}: the runs of this seed start from there; remove {source.path} to train it again")
    part = snapshot_folder(folder.checkpoints, common_steps(cfg)).with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(shared, part, copy_function=os.link)
    part.rename(part.with_suffix(""))
    print(f"{folder.name} starts from step {common_steps(cfg)} of {source.name}: up to there they do not differ")


def generate(study: Study, seed: int) -> None:
    """Make one image of the offline cell for each real one; generate.py continues where it was interrupted."""
    out = study.generated(seed)
    if (out / MANIFEST).is_file() and not (out / UNFINISHED_MARK).exists():
        return
    count = len(read_split(study.held, "train_all"))
    command = [sys.executable, "generate.py", "--name", f"both-{seed}", "--count", str(count), "--out", str(out)]
    command += ["--output_path", str(study.out), "--device", str(study.device), "--threads", str(study.threads)]
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"generate.py ended with status {status}; the same command continues")


# ------------------------------------------------------------------------------------------------ scores
def score(study: Study, run: Run, where: str) -> dict[str, Any]:
    """All measurements of a trained run on the held-out (val) or the test identities."""
    name, folder = run[0], study.run(*run)
    dgnet = CELLS[name].task == "dgnet"
    root = study.held if where == "val" else study.data
    tested = load_run_for_test(folder, None, study.device) if dgnet else load_teacher_for_test(folder, study.device)
    cfg = load_config(folder.config_file)
    length = {"steps": cfg.max_iter} if dgnet else {"epochs": cfg.epochs}
    result = {"cell": name, "seed": run[1], "evaluated_on": where} | length | {"time": read_time(folder)}
    result |= {"B_w": cfg.B_w} if dgnet else {}
    result["reid"] = score_reid(tested.net, root, tested.size, study.device)
    if dgnet:
        measure = score_photographs if study.factors is None else score_generation
        result["generation"] = measure(study, folder, root)
    return result


def score_reid(net: nn.Module, root: Path, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """`{setting: {convention: {"rank1", "mAP"}}}`, fractions, for every setting of `score_settings`."""
    sides = extract_data_set(net, root, size=size, batch_size=None, device=device, progress=False)
    q, g = sides.query, sides.gallery
    labels = q.pids, g.pids, q.camids, g.camids
    settings = score_settings(q.features.shape[1])
    ranked = rank(q.features, g.features, *labels, settings=settings, max_rank=1, progress=False)
    return {
        setting: {convention: {"rank1": float(r.cmc[0]), "mAP": float(r.mAP)} for convention, r in by.items()}
        for setting, by in ranked.items()
    }


def score_generation(study: Study, folder: RunFolder, root: Path) -> dict[str, Any]:
    """Compare swaps of query images with the renderer's.

    changed, copy           L1 on the pixels that the true swap changes: of generated swaps, of the structure image
    brightness, colour      the two parts of `changed` (mannequins.truth.image_errors)
    reduction               1 - changed / copy
    recoloured              L1 of the structure image in the true swap's colours, as if a generator chose colours alone
    ssim                    with the true swaps
    shares                  whose clothes they wear (mannequins.truth.clothes_shares)
    rank1, rank1_of_true    generated and true swaps as queries for the clothes' owner, by the run's teacher
    fid, fid_of_true        to the real images of query and gallery, in the pooled trunk of seed 0's teacher
    """
    model = load_swapper(folder, study.device)
    count = study.preset.swaps
    swaps = draw_swaps(model.swap, study.factors, read_split(root, "query"), size=model.size, count=count)
    rows = measure_swaps(swaps)
    changed, copy = rows["generated"]["changed"], rows["copy"]["changed"]
    recognised = ask_teacher(model, root, swaps)
    result = {"changed": changed, "copy": copy, "reduction": 1 - changed / copy}
    result |= {key: rows["generated"][key] for key in ("brightness", "colour", "ssim")}
    result |= {"recoloured": rows["recoloured"]["changed"], "shares": clothes_shares(swaps)}
    for suffix, row in (("", "generated"), ("_of_true", "true")):
        result[f"rank1{suffix}"] = recognised[row]["official"]["rank1"]
    return result | fids(study, root, {"fid": swaps.images["generated"], "fid_of_true": swaps.images["true"]})


def score_photographs(study: Study, folder: RunFolder, root: Path) -> dict[str, Any]:
    """Measure swaps of photographs, of which no true swaps exist, on pairs of query images.

    rank1                    the run's teacher searches for the owner of the clothes by the generated swaps
    rank1_of_copy            it searches by the structure images
    rank1_of_appearance      it searches by the images that the clothes come from
    rank1_of_reconstruction  it searches for the person reconstructed by the reconstruction
    fid                      of generated swaps to the real images of query and gallery, in the features of `fids`
    fid_of_reconstruction, fid_of_copy    of reconstructions; of the structure images
    """
    model, query = load_swapper(folder, study.device), read_split(root, "query")
    labels = query.labels()
    pairs = draw_swap_pairs(labels, min(study.preset.swaps, count_pairs(labels)), seed=0)
    sources = [iter_images([query.paths[i] for i in role], *model.size, 32) for role in pairs.T]
    batches = [
        [to_uint8(x) for x in (x_app, x_str, model.swap(x_app, x_str), model.swap(x_str, x_str))]
        for x_app, x_str in zip(*sources, strict=True)
    ]
    names = ("appearance", "copy", "generated", "reconstruction")
    swaps = Swaps(*pairs.T, dict(zip(names, map(np.concatenate, zip(*batches, strict=True)), strict=True)))
    recognised = ask_teacher(model, root, swaps)
    rank1 = {row: recognised[row]["official"]["rank1"] for row in names}
    result = {"rank1": rank1.pop("generated")} | {f"rank1_of_{row}": share for row, share in rank1.items()}
    of = {"fid": "generated", "fid_of_reconstruction": "reconstruction", "fid_of_copy": "copy"}
    return result | fids(study, root, {key: swaps.images[row] for key, row in of.items()})


def fids(study: Study, root: Path, sets: dict[str, np.ndarray]) -> dict[str, float]:
    """FID of every set (n, H, W, 3) uint8 to query and gallery, in the pooled trunk of seed 0's teacher."""
    network = trunk_features(load_teacher("teacher-0", study.out).to(study.device))
    sides = [read_split(root, split) for split in ("query", "gallery")]
    people = [side.select(side.pids > 0) for side in sides]  # neither junk nor distractors
    protocol = Protocol(next(iter(sets.values())).shape[1:3])
    real = torch.cat([image_features(images, network, protocol, study.device) for images in people])
    result = {}
    for name, images in sets.items():
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(64)
        with torch.inference_mode():
            features = torch.cat([network(part.to(study.device)).double().cpu() for part in parts])
        result[name] = frechet_distance(real, features)
    return result
