"""The configuration: every key with its type, range, default and meaning. Frozen and validated; no torch here.

The keys and defaults of `DGNetConfig` are those of the published release (spec section 11); those that this project
adds stand at the end under their own heading. `TeacherConfig` describes the training of a teacher.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from utils import UserError

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Activation = Literal["lrelu", "relu", "prelu", "selu", "tanh", "none"]
Padding = Literal["reflect", "replicate", "zero"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]

# Keys that the release's files carry and nothing reads, there or here.
DEAD_KEYS = ("sqrt", "use_decoder_again", "input_dim_b")
# Keys that say what is shown and kept, how fast images come, or what a run starts from: none of them changes the steps
# of a run that goes on. `data_root` counts by the images found there, `apex` by `precision`.
HARMLESS_KEYS = frozenset(
    "apex backbone_weights cache_images cache_limit_mb check_ranks_iter data_root display_size eval_iter ID_class "
    "id_init image_display_iter image_save_iter input_dim_a keep_every keep_last log_iter new_size num_workers "
    "pretrained skip_bad_images snapshot_epochs snapshot_save_iter".split()
)
# What the release assumes where a run folder's config.yaml does not name a key; other defaults are the schema's.
RELEASE_FALLBACKS = {"ID_stride": 2, "apex": False, "erasing_p": 0.0, "T_w": 1.0, "lr_policy": "constant"}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        allowed = annotation is bool or any(choice is value for choice in get_args(annotation))
        if isinstance(value, bool) and not allowed:
            raise ValueError("must not be true or false")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("must be a smaller number")
        return value


class GenConfig(Section):
    """Structure encoder, AdaIN MLPs and decoder (spec sections 3 and 4)."""

    activ: Activation = "lrelu"  # activation
    dec: Literal["basic", "series", "parallel"] = "basic"  # residual block of the decoder
    dim: Count = 16  # channels of the first layer; the structure code has 4 * dim * 2**(n_downsample - 1)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # dropout on the structure code
    id_dim: Count = 2048  # length of one chunk of the appearance code
    init: Literal["kaiming", "gaussian", "xavier", "orthogonal"] = "kaiming"  # initial weights
    mlp_dim: Count = 512  # hidden width of the AdaIN MLPs
    mlp_norm: Literal["none", "ln"] = "none"  # normalisation in the AdaIN MLPs
    n_downsample: Annotated[int, Field(ge=1, le=5)] = 2  # halvings of the resolution
    n_res: Count = 4  # residual blocks of the encoder, and of the decoder; chunks of the appearance code
    non_local: Annotated[int, Field(ge=0, le=1)] = 0  # 1: self-attention in the decoder
    pad_type: Padding = "reflect"  # padding of the convolutions
    tanh: bool = False  # tanh on the structure code


class DisConfig(Section):
    """Discriminator (spec section 5)."""

    LAMBDA: Weight = 0.01  # weight of the gradient penalty
    activ: Activation = "lrelu"  # activation
    dim: Count = 32  # channels of the first layer
    gan_type: Literal["lsgan", "nsgan", "wgan"] = "lsgan"  # loss; wgan is one net for 256 x 128
    n_layer: Count = 2  # halvings of the resolution
    n_res: Annotated[int, Field(ge=0)] = 4  # residual blocks
    non_local: Annotated[int, Field(ge=0, le=2)] = 0  # 1: self-attention after the residual blocks; 2: before too
    norm: Literal["none", "in", "ln"] = "none"  # normalisation
    num_scales: Count = 3  # copies on an image pyramid
    pad_type: Padding = "reflect"  # padding of the convolutions


class CommonConfig(Section):
    """What a DG-Net run and a teacher's run share."""

    data_root: str  # folder with train_all, query, gallery, ..., or the archive's own folders
    ID_class: Count | Literal["auto"] = "auto"  # identities; auto counts those of the training folder
    crop_image_height: Count = 256  # image height
    crop_image_width: Count = 128  # image width
    num_workers: Annotated[int, Field(ge=0)] = 8  # processes that read images
    weight_decay: Weight = 0.0005  # of every optimiser
    # ---- added to the release's keys
    backbone: str = "resnet50"  # trunk: a ResNet of torchvision, or resnet10 / resnet10w32 for CPUs
    backbone_weights: str | None = None  # file of ImageNet weights instead of torchvision's cache
    pretrained: bool = True  # start the trunk from ImageNet weights
    precision: Precision = "fp32"  # arithmetic of the passes; auto: bf16 on a device that has it, fp32 elsewhere
    channels_last: bool = False  # memory format; faster in bf16 on CPUs and in fp16 on GPUs
    cache_images: Literal[False, True, "auto", "source", "resized"] = "auto"  # training images decoded, in memory
    cache_limit_mb: Count = 4096  # what does not fit is read from its files
    check_ranks_iter: Count = 500  # several processes: compare their weights every so many steps
    crop_padding: Annotated[int, Field(ge=0)] = 10  # pixels added on every side before the random crop
    deterministic: bool = False  # on a GPU too: the same numbers in every run; slower
    keep_every: Annotated[int, Field(ge=0)] = (
        0  # with keep_last: keep those of every so many steps too (teacher: epochs)
    )
    keep_last: Annotated[int, Field(ge=0)] = 0  # snapshots to keep; 0: all
    skip_bad_images: bool = False  # leave unreadable images out instead of stopping
    train_split: Literal["train_all", "train"] = "train_all"  # train leaves out each identity's validation image
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of weights, data order and augmentation
    sync_bn: bool = False  # several processes: BatchNorm with the statistics of the whole batch


class DGNetConfig(CommonConfig):
    """A DG-Net run: the release's keys (section 11), then the added ones."""

    task: Literal["dgnet"] = "dgnet"
    # ---- id net
    ID_stride: Literal[1, 2] = 1  # stride of the trunk's last stage (style AB)
    ID_style: Literal["AB", "normal", "PCB"] = "AB"  # two heads, one head, or one per body part
    norm_id: bool = False  # style normal: divide the appearance code by its norm
    pool: Literal["max", "avg"] = "max"  # pooling of the appearance code and of the heads' input
    train_bn: bool = True  # frozen passes use batch statistics (false: running ones)
    # ---- networks
    gen: GenConfig = GenConfig()
    dis: DisConfig = DisConfig()
    input_dim_a: Literal[1] = 1  # channels of the structure encoder's input
    single: Literal["gray", "edge"] = "gray"  # input of the structure encoder
    # ---- loss weights (section 7)
    B_w: Weight = 0.2  # fine-grained part of identity and teacher loss
    T_w: Weight = 1.0  # KL part of the teacher loss
    gan_w: Weight = 1.0  # adversarial
    id_w: Weight = 1.0  # identity
    pid_w: Weight = 1.0  # identity of the positive image
    recon_x_w: Weight = 5.0  # self reconstruction
    recon_xp_w: Weight = 5.0  # reconstruction from the positive image's code
    recon_id_w: Weight = 0.5  # identity of the fakes
    recon_f_w: Weight = 0.0  # appearance code of the fakes, ramped
    recon_s_w: Weight = 0.0  # structure code of the fakes, ramped
    recon_x_cyc_w: Weight = 0.0  # cycle, ramped
    teacher_w: Weight = 0.0  # teacher on the fakes, ramped
    vgg_w: Weight = 0.0  # perceptual
    warm_iter: Annotated[int, Field(ge=0)] = 30000  # iteration after which the reconstruction weights rise
    warm_scale: Weight = 0.0005  # rise of a ramped weight per iteration
    warm_teacher_iter: Annotated[int, Field(ge=0)] = 30000  # iteration after which teacher_w rises
    max_w: Weight = 1.0  # ceiling of recon_f_w and recon_s_w
    max_cyc_w: Weight = 2.0  # ceiling of recon_x_cyc_w
    max_teacher_w: Weight = 2.0  # ceiling of teacher_w
    # ---- teacher and draws
    teacher: str = "best"  # name under models/, several separated by commas
    teacher_style: Annotated[int, Field(ge=0, le=4)] = 0  # soft label of the fakes (section 7)
    # What the id net learns from (added). recoloured: the swaps' colours on the structure image's brightness.
    fed_back: Literal["generated", "recoloured"] = "generated"
    use_encoder_again: Annotated[float, Field(allow_inf_nan=False)] = (
        0.5  # probability of the live structure encoder on the fakes
    )
    erasing_p: Fraction = 0.5  # random erasing, probability per image
    # ---- optimisers (section 8)
    batch_size: Count = 8  # pairs per step, of all processes together
    max_iter: Count = 100000  # steps
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0  # Adam
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999  # Adam
    lr_g: Rate = 0.0001  # Adam of encoder and decoder
    lr_d: Rate = 0.0001  # Adam of the discriminator
    lr2: Rate = 0.002  # SGD of the id net's trunk; the heads get head_lr_factor times as much
    lr_policy: Literal["constant", "step", "multistep", "cosine"] = "multistep"  # cosine (added): to 0 at max_iter
    step_size: Count = 60000  # step and multistep
    gamma: Fraction = 0.1  # factor of each step, encoder, decoder and discriminator
    gamma2: Fraction = 0.1  # factor of each step, id net
    # ---- logging
    display_size: Count = 16  # test pairs in the image grids
    image_display_iter: Count = 5000  # image grid to TensorBoard every so many steps
    image_save_iter: Count = 5000  # image grid to outputs/NAME/images
    log_iter: Count = 1  # losses to TensorBoard
    snapshot_save_iter: Count = 10000  # checkpoints
    new_size: Count | None = None  # the release's width before cropping; the images here are cropped at full size
    # ---- added to the release's keys
    apex: bool = False  # the release's name for precision: fp16
    eval_iter: Annotated[int, Field(ge=0)] = 0  # re-id and swap scores to TensorBoard; 0: never
    detach_f: bool = True  # false: reconstruction trains the id net through the appearance code (style AB)
    accumulate: Count = 1  # parts of a batch whose gradients are added up, one in memory at a time
    joint_bn: bool = False  # id net passes of a step as one, with common BatchNorm statistics; changes the numbers
    recompute: bool = False  # make activations again in the backward instead of keeping them: less memory, slower
    head_lr_factor: Rate = 10.0  # rate of the id net's heads, relative to its trunk's (lr2)
    id_weight_decay: Weight | None = None  # of the id net's optimiser; none: weight_decay
    id_init: Literal["backbone", "teacher"] = "backbone"  # teacher: start the id net from the teacher
    id_freeze_iter: Annotated[int, Field(ge=0)] = 0  # steps at the start in which the id net is not updated
    vgg_weights: str | None = None  # file of torchvision's VGG-16 weights

    @model_validator(mode="before")
    @classmethod
    def _apex_is_fp16(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("apex") in (True, "true"):
            if values.get("precision", "fp16") != "fp16":
                raise ValueError("apex: true means precision: fp16; remove one of the two")
            return values | {"precision": "fp16"}
        return values

    @model_validator(mode="after")
    def _sizes_fit(self) -> DGNetConfig:
        h, w = self.crop_image_height, self.crop_image_width
        factor = 2**self.gen.n_downsample
        if h % factor or w % factor:
            raise ValueError(
                f"crop_image_height {h} x crop_image_width {w} must be multiples of {factor} (gen.n_downsample)"
            )
        if self.gen.pad_type == "reflect" and min(h, w) // factor <= 9:
            raise ValueError(
                f"crop_image_height {h} x crop_image_width {w}: the structure code of {h // factor} x {w // factor} "
                "is too small to be padded by 9; use larger images, fewer gen.n_downsample, or gen.pad_type: zero"
            )
        if self.gen.mlp_norm == "ln" and self.gen.mlp_dim < 2:
            raise ValueError("gen.mlp_norm ln needs gen.mlp_dim of 2 or more: a single number has no deviation")
        # Self-attention compares codes of an eighth of the channels.
        if self.gen.non_local and self.gen.dim * 2 * factor < 8:
            raise ValueError(f"gen.non_local needs more channels than gen.dim {self.gen.dim} gives; use 2 or more")
        attention = self.dis.non_local and self.dis.gan_type != "wgan"
        if attention and self.dis.dim * 2 ** (self.dis.n_layer - 1) < 8:
            raise ValueError(
                f"dis.non_local needs more channels than dis.dim {self.dis.dim} and dis.n_layer {self.dis.n_layer} "
                "give; use more of either"
            )
        if self.dis.gan_type == "wgan":
            if (h, w) != (256, 128):
                raise ValueError("dis.gan_type wgan needs crop_image_height 256 and crop_image_width 128")
        elif min(h, w) // 2 ** (self.dis.num_scales - 1 + self.dis.n_layer) < 2:
            raise ValueError(
                f"crop_image_height {h} x crop_image_width {w} is too small for dis.num_scales {self.dis.num_scales} "
                f"and dis.n_layer {self.dis.n_layer}; use fewer of either"
            )
        return self

    @model_validator(mode="after")
    def _named_teacher(self) -> DGNetConfig:
        if self.needs_teacher and not self.teachers:
            raise ValueError("teacher names none; give the name of one under models/, or set max_teacher_w: 0")
        return self

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> DGNetConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate}: batch_size {self.batch_size} is not a multiple of it")
        if self.accumulate > 1 and self.dis.gan_type == "wgan":
            raise ValueError("accumulate needs dis.gan_type lsgan or nsgan: a loss of wgan is a sum over the batch")
        if self.accumulate > 1 and self.gen.dropout > 0:
            raise ValueError("accumulate needs gen.dropout 0: the fakes are made twice, and have to be the same")
        if self.batch_size == self.accumulate:
            parts = f" in {self.accumulate} parts (accumulate)" if self.accumulate > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size}{parts} is one pair at a time, too few for the statistics of BatchNorm; "
                "use two or more"
            )
        return self

    @property
    def teachers(self) -> list[str]:
        return [name.strip() for name in self.teacher.split(",") if name.strip()]

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's net is read at any iteration."""
        ramps = self.warm_scale > 0 and self.max_teacher_w > 0 and self.max_iter > self.warm_teacher_iter + 1
        labelled = (self.teacher_w > 0 or ramps) and self.teacher_style not in (2, 3)
        return labelled or self.id_init == "teacher"


class TeacherConfig(CommonConfig):
    """A teacher (or baseline) run: a one-head ResNet with average pooling, trained on identities alone."""

    task: Literal["teacher"]
    stride: Literal[1, 2] = 2  # stride of the trunk's last stage
    batch_size: Annotated[int, Field(ge=2)] = 32  # images per step, of all processes together
    epochs: Count = 60  # passes over the training images
    warm_epochs: Annotated[int, Field(ge=0)] = 5  # linear warm-up of the rates
    lr: Rate = 0.05  # of the head; the trunk gets a tenth
    trunk_lr_factor: Fraction = 0.1  # rate of the trunk relative to the head
    lr_policy: Literal["step", "cosine"] = "step"  # step: a tenth after two thirds; cosine: to 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5  # before the classifier
    erasing_p: Fraction = 0.0  # random erasing, probability per image
    extra_data: str | None = None  # folder made by generate.py, trained on beside data_root
    extra_labels: Literal["one_hot", "lsro", "soft"] = "one_hot"  # its labels: clothes' identity, uniform, manifest's
    log_iter: Count = 20  # losses to TensorBoard
    snapshot_epochs: Count = 10  # checkpoints

    @model_validator(mode="after")
    def _labels_of_something(self) -> TeacherConfig:
        if self.extra_data is None and self.extra_labels != "one_hot":
            raise ValueError(f"extra_labels {self.extra_labels} needs extra_data, a folder made by generate.py")
        return self


Config = DGNetConfig | TeacherConfig


# ---------------------------------------------------------------------------------------------- loading
class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML silently keeps the last of two equal keys; a config must not say two things.

    Nor may a few lines stand for gigabytes: aliases of lists and sections can be nested (`b: [*a, *a]`, `c: [*b, *b]`).
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if mark is not None and not isinstance(node, yaml.ScalarNode):
            raise UserError(
                f"{mark.name}: line {mark.line + 1}: an alias of a list or a section is refused; write its values out"
            )
        return node


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{node.start_mark.name}: line {key_node.start_mark.line + 1}: {key!r} is not a key name")
        if key in seen:
            raise UserError(
                f"{node.start_mark.name}: line {key_node.start_mark.line + 1}: key {key} is given twice; remove one"
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file. Raises UserError for anything else."""
    try:
        with open(path, encoding="utf-8") as stream:
            values = yaml.load(stream, _UniqueKeyLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}; correct the file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: empty, or not a list of `key: value` lines")
    return values


def set_values(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`values` with `--set` overrides such as `batch_size=4` and `gen.dim=8` applied."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise UserError(f"--set {setting}: write key=value, for example --set batch_size=4 gen.dim=8")
        target = values
        *sections, leaf = key.strip().split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {setting}: {section} has no keys below it")
        try:
            target[leaf] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--set {setting[:200]}: the value is not valid YAML; write key=value") from None
    return values


def _schema(values: dict[str, Any], source: str) -> type[Config]:
    task = values.get("task", "dgnet")
    if task not in ("dgnet", "teacher"):
        raise UserError(f"{source}: task: must be dgnet or teacher (got {_shown(task)})")
    return TeacherConfig if task == "teacher" else DGNetConfig


def _section(model: type[BaseModel], location: tuple) -> type[BaseModel]:
    for name in location:
        model = model.model_fields[name].annotation
    return model


def _describe(error: dict, model: type[BaseModel]) -> str:
    location = tuple(part for part in error["loc"] if part not in ("int", "literal['auto']", "constrained-int"))
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        known = list(_section(model, location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return f"unknown key {key}" + (
            f"; did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else ""
        )
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {_shown(error['input'])})" if key else message


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate `values`; `source` names them in messages. Raises UserError that lists every problem in one line."""
    dead = [key for key in DEAD_KEYS if key in values]
    if dead:
        print(f"note: {source}: {', '.join(dead)}: read by nothing, in the release and here", file=sys.stderr)
    values = {key: value for key, value in values.items() if key not in DEAD_KEYS}
    model = _schema(values, source)
    if values.get("new_size") not in (None, values.get("crop_image_width", 128)):
        print(f"note: {source}: new_size: images are resized to crop_image_height x crop_image_width", file=sys.stderr)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(_describe(e, model) for e in error.errors())
        raise UserError(f"{source}: " + "; ".join(problems)) from None


def of_another_version(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A run folder's values with the release's fallbacks and without unknown keys, which are named in a warning."""
    model = _schema(values, source)
    kept: dict[str, Any] = (RELEASE_FALLBACKS if model is DGNetConfig else {}) | {"data_root": ""}
    unknown = []
    for key, value in values.items():
        if key in DEAD_KEYS:
            kept[key] = value
        elif key not in model.model_fields:
            unknown.append(key)
        elif isinstance(value, dict) and key in ("gen", "dis"):
            known = _section(model, (key,)).model_fields
            kept[key] = {k: v for k, v in value.items() if k in known}
            unknown += [f"{key}.{k}" for k in value if k not in known]
        else:
            kept[key] = value
    if unknown:
        print(f"warning: {source}: ignored keys of another version: {', '.join(unknown)}", file=sys.stderr)
    return kept


def load_config(path: Path | str, settings: list[str] = (), *, strict: bool = True) -> Config:
    """The configuration in a YAML file with `--set` overrides applied.

    strict  False: the file may be a release's run folder's or another version's (`of_another_version`)
    """
    values = read_yaml(Path(path))
    if not strict:
        values = of_another_version(values, str(path))
    return parse_config(set_values(values, list(settings)), str(path))


def flat_settings(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values (`model_dump()`) with those of its sections as `gen.dim`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def changed_from_default(cfg: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that are not the schema's default, as key to (value, default); None for the default of those
    that have to be given."""
    required = {name: getattr(cfg, name) for name, field in type(cfg).model_fields.items() if field.is_required()}
    defaults = flat_settings(type(cfg)(**required).model_dump())
    changed = {k: (v, defaults[k]) for k, v in flat_settings(cfg.model_dump()).items() if v != defaults[k]}
    return {k: (v, None) for k, v in required.items() if k != "task"} | changed


def exact_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings among a config's values (`model_dump()`) that decide a run's numbers; sections as `gen.dim`."""
    flat = flat_settings(values)
    # Only the cosine asks how long the run is.
    unread = HARMLESS_KEYS | (set() if flat.get("lr_policy") == "cosine" else {"max_iter"})
    return {key: value for key, value in flat.items() if key not in unread}


def dump_config(cfg: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(cfg.model_dump(), sort_keys=False)
