"""What `studies.ablation` compares: the cells, the presets, and the configuration of every run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from config import Config, DGNetConfig, parse_config, read_yaml
from utils import ROOT


@dataclass(frozen=True)
class Cell:
    """A way of training; with a seed it is a run.

    task     dgnet or teacher
    scored   the name in `score_settings` of the score in the table
    changes  settings on top of the preset's
    about    the label in the table
    """

    task: str
    scored: str
    changes: dict[str, Any]
    about: str


BOTH = "beta 0.5"  # q_prim . g_prim + 0.5 q_fine . g_fine
PRIMARY, FINE, ONE_HEAD = "beta 0", "fine", "feature"
BETAS = (0, 0.1, 0.25, 0.5, 0.75, 1, 2)  # of the sweep at test time

# In the order of the table. A label says what is changed, and nothing else is.
PAPER_CELLS: dict[str, Cell] = {
    # ---- Table 3, and fair opponents
    "teacher": Cell("teacher", ONE_HEAD, {}, "teacher"),
    "teacher_long": Cell("teacher", ONE_HEAD, {}, "teacher, time of teacher and DG-Net together"),
    "teacher_erasing": Cell("teacher", ONE_HEAD, {"erasing_p": 0.5}, "the same with random erasing"),
    "primary_only": Cell("dgnet", PRIMARY, {"B_w": 0.0}, "primary only"),  # the fine-grained head gets no gradient
    "fine_only": Cell("dgnet", FINE, {"T_w": 0.0}, "fine-grained only"),  # no soft labels: KL has weight 0
    "both": Cell("dgnet", BOTH, {}, "both"),  # the system, with the preset's settings
    "oracle": Cell("dgnet", BOTH, {}, "both, oracle: the renderer's swaps"),  # `runs.TrueSwaps` does the rest
    # ---- Figure 4
    "no_feedback": Cell("dgnet", PRIMARY, {"max_teacher_w": 0.0}, "generated images not fed back"),
    "no_fake_id": Cell("dgnet", BOTH, {"recon_id_w": 0.0}, "no identity loss on generated images"),
    "offline": Cell("teacher", ONE_HEAD, {"extra_labels": "soft"}, "offline: generate once, then train"),
    # ---- the teacher's labels of generated images; style 0 is `both`
    "style_1": Cell("dgnet", BOTH, {"teacher_style": 1}, "teacher style 1: one-hot of its maximum"),
    "style_2": Cell("dgnet", BOTH, {"teacher_style": 2}, "teacher style 2: one-hot of the appearance"),
    "style_3": Cell("dgnet", BOTH, {"teacher_style": 3}, "teacher style 3: uniform"),
    "style_4": Cell("dgnet", BOTH, {"teacher_style": 4}, "teacher style 4: of the two identities alone"),
    # ---- what is fed back: the generated colours on the structure image's brightness
    "recoloured": Cell("dgnet", BOTH, {"fed_back": "recoloured"}, "swaps recoloured before they are fed back"),
    # ---- gradient through the appearance code
    "live_f": Cell("dgnet", BOTH, {"detach_f": False}, "gradient through the appearance code"),
    # ---- Figure 8; alpha 0 is `primary_only`, the preset's own is `both`
    "alpha_0.1": Cell("dgnet", BOTH, {"B_w": 0.1}, "alpha 0.1"),
    "alpha_0.2": Cell("dgnet", BOTH, {"B_w": 0.2}, "alpha 0.2"),
    "alpha_0.5": Cell("dgnet", BOTH, {"B_w": 0.5}, "alpha 0.5"),
    "alpha_1": Cell("dgnet", BOTH, {"B_w": 1.0}, "alpha 1"),
}
# Each option of a strong teacher by itself, and what configs/photos-strong-teacher.yaml puts together of them.
BALANCED = {"images_per_identity": 4}
STRONG = BALANCED | dict(lr=0.05, weight_decay=0.006, neck="bnneck", dropout=0.0, triplet_w=1.0, label_smoothing=0.1)
STRONG_ID = {key: STRONG[key] for key in ("neck", "label_smoothing")}  # what the id net of DG-Net has of them
OPTION_CELLS: dict[str, Cell] = {
    name: Cell("teacher", ONE_HEAD, changes, about)
    for name, changes, about in (
        ("bnneck", {"neck": "bnneck", "dropout": 0.0}, "teacher with BNNeck, no dropout"),
        ("gem", {"pool": "gem"}, "teacher with GeM pooling"),
        ("smoothing", {"label_smoothing": 0.1}, "teacher with label smoothing 0.1"),
        ("balanced", BALANCED, "teacher, batches of 8 identities x 4 images"),
        ("triplet", BALANCED | {"triplet_w": 1.0}, "the same with the triplet loss"),
        ("circle", BALANCED | {"circle_w": 0.1}, "the same with the circle loss, weight 0.1"),
        ("grayscale", {"grayscale_p": 0.2}, "teacher, 20 % of the images gray"),
        ("jitter", {"jitter": 0.2}, "teacher with colour jitter 0.2"),
        ("average", {"ema_decay": 0.998}, "teacher, average of the weights"),
        ("low_rate", {"lr": 0.05}, "teacher with half the rate"),
        ("strong", STRONG, "strong teacher: the options of configs/photos-strong-teacher.yaml together"),
    )
}
CELLS = PAPER_CELLS | OPTION_CELLS
# Trained for as many steps as the teacher makes in the time of `teacher` and `both` together.
LONG = ("teacher_long", "teacher_erasing", "offline")
# How an id net learns from nothing within minutes (studies/ablation/notebook.md).
FROM_SCRATCH = dict(id_init="backbone", id_freeze_iter=0, id_weight_decay=0.04, head_lr_factor=1.0, lr2=0.015)
# With B_w 0.2 that decay empties the fine-grained head.
FROM_SCRATCH |= dict(joint_bn=True, B_w=1.0, warm_iter=400, warm_teacher_iter=400)
# Settings that have no effect in the `common_steps`: up to there, runs that differ in nothing else are the same.
LATE_SETTINGS = {"B_w", "T_w", "teacher_style", "max_teacher_w", "fed_back", "detach_f"}


@dataclass(frozen=True)
class Preset:
    """Data, base configurations and what is changed in them.

    data      every setting of the renderer, whose own presets may change; None: the user's photographs
    configs   files of teacher and DG-Net
    cells     those that are trained if none are chosen
    held_out  share of the training identities that no run sees, in whole groups of the same colours
    swaps     pairs on which generation is measured
    """

    about: str
    data: dict[str, Any] | None
    configs: tuple[str, str]
    swaps: int = 512
    cells: tuple[str, ...] = tuple(PAPER_CELLS)
    teacher: dict[str, Any] = field(default_factory=dict)
    dgnet: dict[str, Any] = field(default_factory=dict)
    held_out: float = 1 / 7


CAMERAS = dict(cameras=6, min_cameras=3, train_cameras=8, images_per_camera=2)
LOOKS = dict(vivid=0, tint=0.05, light=0.08, noise=3.0, occluders=0.08)
PEOPLE = dict(seed=7, train_ids=12, test_ids=6, distractors=4, junk=4, group_size=3, test_group_size=6)
TINY_DATA = PEOPLE | CAMERAS | LOOKS
SMALL_DATA = TINY_DATA | dict(train_ids=144, test_ids=96, distractors=60, junk=40, test_group_size=12)
LARGE_DATA = SMALL_DATA | dict(train_ids=462, test_ids=200, distractors=400, junk=200, group_size=6, test_group_size=6)
LARGE_DATA |= dict(cameras=8, images_per_camera=4)
# Copies of the demo's, so that the demo can be retuned.
SMALL_CONFIGS = "studies/ablation/configs/small-teacher.yaml", "studies/ablation/configs/small.yaml"
TINY_DGNET = dict(
    backbone="resnet10w8",
    gen=dict(dim=4, n_downsample=1, n_res=2, id_dim=128, mlp_dim=16),
    dis=dict(dim=4, n_layer=1, n_res=1, num_scales=1),
    **dict(batch_size=2, max_iter=8, id_freeze_iter=4, warm_iter=4, warm_teacher_iter=4, warm_scale=0.5),
    **dict(snapshot_save_iter=2, image_save_iter=8, image_display_iter=8, display_size=2, precision="fp32"),
)

FAIR = ("teacher", "teacher_long", "both")  # does DG-Net beat its teacher, given as much time?

# No data set is drawn from seed 0: that is the demo's, whose test identities have been looked at.
PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "seconds a run, to try the command; its numbers mean nothing",
        TINY_DATA,
        SMALL_CONFIGS,
        teacher=dict(backbone="resnet10w8", epochs=2, batch_size=8, snapshot_epochs=1, precision="fp32"),
        dgnet=TINY_DGNET,
        swaps=16,
    ),
    "small": Preset(
        "small networks at 64 x 32: 96 identities to train on, 48 to validate, 96 to test; for two CPU cores",
        SMALL_DATA,
        SMALL_CONFIGS,
        held_out=1 / 3,
    ),
    "scratch": Preset(
        "small, but an id net from scratch, the fine-grained head at full weight, 2,000 steps; on data of its own",
        SMALL_DATA | dict(seed=8),
        SMALL_CONFIGS,
        dgnet=FROM_SCRATCH | dict(max_iter=2000),
        held_out=1 / 3,
    ),
    "large": Preset(
        "ResNet-18 at 128 x 64: 396 identities to train on, 66 to validate, 200 to test; for a GPU",
        LARGE_DATA,
        ("configs/mannequins-teacher.yaml", "configs/mannequins.yaml"),
        # At the files' length a run takes hours. This is the schedule of `scratch`, shorter, with twice the images a
        # step.
        teacher=dict(epochs=20, warm_epochs=1, batch_size=64, lr=0.1, weight_decay=0.01, erasing_p=0.0),
        dgnet=FROM_SCRATCH | dict(batch_size=16, max_iter=1400, warm_scale=0.01, max_w=0.5, erasing_p=0.0),
        swaps=2048,
    ),
    "photos": Preset(
        "configs/photos.yaml on photographs: needs --data_root, made by studies.ablation.split; for two CPU cores",
        None,
        ("configs/photos-teacher.yaml", "configs/photos.yaml"),
        cells=("teacher", "teacher_long", "no_feedback", "primary_only", "both", "recoloured"),
    ),
    "photos-options": Preset(
        "each option of a strong teacher by itself, for 12 epochs, on the data of photos",
        None,
        ("configs/photos-teacher.yaml", "configs/photos.yaml"),
        cells=("teacher", *OPTION_CELLS),
        teacher=dict(epochs=12),
    ),
    "photos-strong": Preset(
        "photos with a strong teacher, and its neck and label smoothing in the id net",
        None,
        ("configs/photos-strong-teacher.yaml", "configs/photos.yaml"),
        cells=FAIR,
        dgnet=STRONG_ID,
    ),
    "scratch-strong": Preset(
        "scratch with a strong teacher, and its neck and label smoothing in the id net",
        SMALL_DATA | dict(seed=8),
        SMALL_CONFIGS,
        cells=FAIR,
        teacher=STRONG,
        dgnet=FROM_SCRATCH | dict(max_iter=2000) | STRONG_ID,
        held_out=1 / 3,
    ),
}

read_base = cache(read_yaml)  # the preset's file, for every run


def is_both(preset: Preset, name: str) -> bool:
    """Whether the preset has the cell's settings anyway, so that the cell is `both`."""
    changes, both = CELLS[name].changes, cell_config(preset, "both", 0, data_root="").model_dump()
    return CELLS[name].task == "dgnet" and bool(changes) and changes.items() <= both.items()


def score_settings(heads: int) -> dict[str, tuple[float, ...]]:
    """Weights of the heads by name, for a net with one head or two; the sweep of beta is among them."""
    if heads == 1:
        return {ONE_HEAD: (1.0,)}
    return {f"beta {beta:g}": (1.0, float(beta)) for beta in BETAS} | {FINE: (0.0, 1.0)}


def cell_config(preset: Preset, name: str, seed: int, *, data_root: str, **changes: Any) -> Config:
    """The configuration of a run: the preset's file, then the preset's, the cell's and the given changes."""
    cell, dgnet = CELLS[name], CELLS[name].task == "dgnet"
    values = read_base(ROOT / preset.configs[dgnet]) | (preset.dgnet if dgnet else preset.teacher)
    values |= {"data_root": data_root, "seed": seed, "keep_last": 1} | cell.changes | changes
    values |= {"teacher": f"teacher-{seed}"} if dgnet else {}
    cfg = parse_config(values, f"cell {name}")
    if name == "both" and (steps := common_steps(cfg)):
        # Other runs start from the snapshot of that step, so `both` writes and keeps it.
        every = max(n for n in range(1, cfg.snapshot_save_iter + 1) if steps % n == 0)
        cfg = cfg.model_copy(update={"keep_every": steps, "snapshot_save_iter": every})
    return cfg


def common_steps(cfg: DGNetConfig) -> int:
    """Steps at the start in which no generated image reaches the id net: it rests, or its teacher loss has weight 0."""
    steps = max(cfg.id_freeze_iter, cfg.warm_teacher_iter if cfg.teacher_w == 0 else 0)
    return steps if steps < cfg.max_iter else 0


def starts_as_both(name: str, cfg: Config) -> bool:
    """Whether a run does the same as `both` in the `common_steps`."""
    if name == "both" or not cfg.generates or not set(CELLS[name].changes) <= LATE_SETTINGS:
        return False
    # With a live code, reconstruction moves an id net that learns, and the ramped terms move the generator.
    same = min(cfg.id_freeze_iter, cfg.warm_iter) if "detach_f" in CELLS[name].changes else cfg.max_iter
    return 0 < common_steps(cfg) <= same


def needs(name: str, cfg: Config, seed: int) -> set[tuple[str, int]]:
    """The runs (cell, seed) that have to be finished before this one."""
    runs = set()
    if CELLS[name].task == "dgnet":
        runs |= {("teacher", seed), ("teacher", 0)}  # FID compares features of the teacher of seed 0
    if name in LONG:
        runs |= {("teacher", seed), ("both", seed)}
    if starts_as_both(name, cfg):
        runs.add(("both", seed))
    return runs
