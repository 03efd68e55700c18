"""The configuration: every key with its type, range, default and meaning. Frozen and validated; no torch here.

Keys and defaults are those of the published release; keys that this project adds follow under a comment that says so.
The text below a key is its only description: `python config.py > docs/configuration.md` makes a page of them.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from utils import ROOT, UserError

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Activation = Literal["lrelu", "relu", "prelu", "selu", "tanh", "none"]
Padding = Literal["reflect", "replicate", "zero"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]

# Marks of a field, in its Annotated type. A field without a mark affects the results of a run that is resumed.
NO_EFFECT = "what is logged and kept, how fast images come, or what a run starts from"
COSINE_ONLY = "affects results only if lr_policy is cosine"

# Keys of the release that nothing reads, neither the release nor this project.
DEAD_KEYS = ("sqrt", "use_decoder_again", "input_dim_b")
# Keys of the release that `translated` turns into today's.
RETIRED_KEYS = (*DEAD_KEYS, "new_size", "input_dim_a", "apex")
# What the release assumes where a run folder's config.yaml does not name a key; other defaults are the schema's.
RELEASE_FALLBACKS = {"ID_stride": 2, "erasing_p": 0.0, "T_w": 1.0, "lr_policy": "constant"}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        allowed = annotation is bool or any(choice is value for choice in get_args(annotation))
        if isinstance(value, bool) and not allowed:
            raise ValueError("must not be true or false")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("must be a smaller number")
        return value


class GenConfig(Section):
    """The generator: structure encoder, AdaIN MLPs and decoder."""

    activ: Activation = "lrelu"
    """Activation."""
    dec: Literal["basic", "series", "parallel"] = "basic"
    """Residual block of the decoder."""
    dim: Count = 16
    """Channels of the first layer; the structure code has 4 * dim * 2^(n_downsample - 1)."""
    dropout: BelowOne = 0.0
    """Dropout on the structure code."""
    id_dim: Count = 2048
    """Length of one chunk of the appearance code; n_res * id_dim must be 4 times the trunk's output channels."""
    init: Literal["kaiming", "gaussian", "xavier", "orthogonal"] = "kaiming"
    """Distribution of the initial weights."""
    mlp_dim: Count = 512
    """Hidden width of the AdaIN MLPs."""
    mlp_norm: Literal["none", "ln"] = "none"
    """Normalisation in the AdaIN MLPs."""
    n_downsample: Annotated[int, Field(ge=1, le=5)] = 2
    """How often the structure encoder halves the resolution."""
    n_res: Count = 4
    """Residual blocks of the encoder and of the decoder; also the number of chunks of the appearance code."""
    non_local: Annotated[int, Field(ge=0, le=1)] = 0
    """1 adds self-attention to the decoder."""
    pad_type: Padding = "reflect"
    """Padding of the convolutions."""
    tanh: bool = False
    """Apply tanh to the structure code."""


class DisConfig(Section):
    """The discriminator."""

    LAMBDA: Weight = 0.01
    """Weight of the gradient penalty."""
    activ: Activation = "lrelu"
    """Activation."""
    dim: Count = 32
    """Channels of the first layer."""
    gan_type: Literal["lsgan", "nsgan", "wgan"] = "lsgan"
    """Loss. wgan is a single network for images of 256 x 128."""
    n_layer: Count = 2
    """How often a network halves the resolution."""
    n_res: CountOrZero = 4
    """Residual blocks."""
    non_local: Annotated[int, Field(ge=0, le=2)] = 0
    """1 adds self-attention after the residual blocks, 2 before them as well."""
    norm: Literal["none", "in", "ln"] = "none"
    """Normalisation: none, instance or layer."""
    num_scales: Count = 3
    """Networks on an image pyramid."""
    pad_type: Padding = "reflect"
    """Padding of the convolutions."""


class CommonConfig(Section):
    """Keys that DG-Net runs and teachers share."""

    data_root: Annotated[str, NO_EFFECT]
    """Data set, prepared or as its archive has it; relative to the current folder, then to the project's. Resuming
    compares the images, not the path."""
    ID_class: Annotated[Count | Literal["auto"], NO_EFFECT] = "auto"
    """Number of identities; auto counts those of the training images."""
    crop_image_height: Count = 256
    """Image height. Images at most 128 pixels high are enlarged to twice their size for the id net."""
    crop_image_width: Count = 128
    """Image width."""
    num_workers: Annotated[CountOrZero, NO_EFFECT] = 8
    """Threads that read images; unused if the images are in memory."""
    weight_decay: Weight = 0.0005
    """Weight decay of every optimiser."""
    # ---- added to the release's keys
    backbone: str = "resnet50"
    """Trunk: a ResNet, ResNeXt or Wide ResNet of torchvision, resnet10 / resnet10wN (N channels) for CPUs, or timm/NAME
    for any network of timm, convolutional or transformer."""
    backbone_weights: Annotated[str | None, NO_EFFECT] = None
    """File of ImageNet weights to use instead of torchvision's or timm's cache."""
    pretrained: Annotated[bool, NO_EFFECT] = True
    """Start the trunk from ImageNet weights."""
    precision: Precision = "fp32"
    """Arithmetic. fp16 needs a GPU; auto is bf16 on a device that computes in it and fp32 elsewhere, and the run's
    config.yaml says which."""
    channels_last: bool = False
    """Memory format; faster in bf16 on CPUs. On a CPU the ResNets use it anyway."""
    cache_images: Annotated[Literal[False, True, "auto", "source", "resized"], NO_EFFECT] = "auto"
    """Keep the decoded training images in memory, in every process: source at the size of their files (Market-1501:
    320 MB), resized or true at the size for training (1,270 MB), auto the smaller of the two; false reads the files
    each time. Images of unequal sizes are kept resized."""
    cache_limit_mb: Annotated[Count, NO_EFFECT] = 4096
    """Images that need more memory than this are read from their files."""
    crop_padding: CountOrZero = 10
    """Pixels added on every side before the random crop."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU too, as a CPU always does; slower."""
    keep_every: Annotated[CountOrZero, NO_EFFECT] = 0
    """With keep_last, also keep the snapshots at multiples of this many steps (of a teacher: epochs)."""
    keep_last: Annotated[CountOrZero, NO_EFFECT] = 0
    """How many of the newest snapshots to keep; 0 keeps all."""
    skip_bad_images: Annotated[bool, NO_EFFECT] = False
    """Leave out unreadable images instead of stopping."""
    train_split: Literal["train_all", "train"] = "train_all"
    """Training images; train leaves out one validation image per identity."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order, augmentation and draws."""
    trust_classes: Annotated[bool, NO_EFFECT] = False
    """Accept a teacher, a snapshot or extra_data whose identities are not those of data_root, though as many."""
    sync_bn: bool = False
    """Compute BatchNorm's statistics over the batch of all processes."""

    @property
    def generates(self) -> bool:
        """Whether this is a DG-Net run, which has a generator, and no teacher's."""
        return self.task == "dgnet"


class DGNetConfig(CommonConfig):
    """Keys of a DG-Net run."""

    task: Literal["dgnet"] = "dgnet"
    """What the run trains."""
    # ---- id net
    ID_stride: Literal[1, 2] = 1
    """Stride of the trunk's last stage (ID_style AB)."""
    ID_style: Literal["AB", "normal", "PCB"] = "AB"
    """Id net: AB has two heads (primary, fine-grained), normal has one, PCB has one per body part."""
    norm_id: bool = False
    """Divide the appearance code by its norm (ID_style normal)."""
    pool: Literal["max", "avg", "gem"] = "max"
    """Pooling of the appearance code and of the heads' input (ID_style AB and normal). gem is the generalised mean with
    exponent 3 (Radenović et al., 2018), which the release does not have."""
    train_bn: bool = True
    """Frozen passes normalise by the statistics of their batch; false: by the running statistics."""
    # ---- networks
    gen: GenConfig = GenConfig()
    """Generator: see the keys gen.*."""
    dis: DisConfig = DisConfig()
    """Discriminator: see the keys dis.*."""
    single: Literal["gray", "edge"] = "gray"
    """What the structure encoder sees: the gray image, or its edges (needs OpenCV)."""
    # ---- loss weights
    B_w: Weight = 0.2
    """Weight of the fine-grained head in the identity and the teacher loss."""
    T_w: Weight = 1.0
    """Weight of the soft labels (primary head) in the teacher loss."""
    gan_w: Weight = 1.0
    """Adversarial loss."""
    id_w: Weight = 1.0
    """Identity loss of the real images."""
    pid_w: Weight = 1.0
    """Identity loss of the other real images of the same identities."""
    recon_x_w: Weight = 5.0
    """Reconstruction from the image's own codes."""
    recon_xp_w: Weight = 5.0
    """Reconstruction with the appearance code of another image of the same identity."""
    recon_id_w: Weight = 0.5
    """Identity loss of the generated images, which trains the generator."""
    recon_f_w: Weight = 0.0
    """Reconstruction of the appearance code; rises to max_w."""
    recon_s_w: Weight = 0.0
    """Reconstruction of the structure code; rises to max_w."""
    recon_x_cyc_w: Weight = 0.0
    """Cycle: the generated images swapped back; rises to max_cyc_w."""
    teacher_w: Weight = 0.0
    """Teacher loss on the generated images, which trains the id net; rises to max_teacher_w."""
    vgg_w: Weight = 0.0
    """Perceptual loss."""
    warm_iter: CountOrZero = 30000
    """Iteration after which recon_f_w, recon_s_w and recon_x_cyc_w rise."""
    warm_scale: Weight = 0.0005
    """Rise of these weights and of teacher_w per iteration."""
    warm_teacher_iter: CountOrZero = 30000
    """Iteration after which teacher_w rises."""
    max_w: Weight = 1.0
    """Ceiling of recon_f_w and recon_s_w."""
    max_cyc_w: Weight = 2.0
    """Ceiling of recon_x_cyc_w."""
    max_teacher_w: Weight = 2.0
    """Ceiling of teacher_w."""
    # ---- teacher and draws
    teacher: str = "best"
    """Name of a teacher under models/; several, separated by commas, are averaged."""
    teacher_style: Annotated[int, Field(ge=0, le=4)] = 0
    """Soft label of a generated image: 0 the teacher's prediction, 1 its maximum, 2 the identity of the clothes,
    3 uniform, 4 the prediction restricted to the two identities."""
    use_encoder_again: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """Probability that the structure encoder learns from the generated images in a step; otherwise it is frozen."""
    erasing_p: Fraction = 0.5
    """Probability of random erasing per image."""
    # ---- optimisers
    batch_size: Annotated[int, Field(ge=2)] = 8
    """Pairs per step, over all processes; BatchNorm needs two or more."""
    max_iter: Annotated[Count, COSINE_ONLY] = 100000
    """Steps."""
    beta1: BelowOne = 0.0
    """Adam's decay of the mean gradient."""
    beta2: BelowOne = 0.999
    """Adam's decay of the mean squared gradient."""
    lr_g: Rate = 0.0001
    """Rate of Adam for structure encoder, MLPs and decoder."""
    lr_d: Rate = 0.0001
    """Rate of Adam for the discriminator."""
    lr2: Rate = 0.002
    """Rate of SGD for the id net's trunk; its heads get head_lr_factor times as much."""
    lr_policy: Literal["constant", "step", "multistep", "cosine"] = "multistep"
    """step multiplies the rates at every step_size; multistep at 1, 1.5 and 1.75 times step_size; cosine ends at 0
    at max_iter and is not a choice of the release."""
    step_size: Count = 60000
    """Steps: see lr_policy."""
    gamma: Fraction = 0.1
    """Factor of generator and discriminator: see lr_policy."""
    gamma2: Fraction = 0.1
    """Factor of the id net: see lr_policy."""
    # ---- logging
    display_size: Annotated[Count, NO_EFFECT] = 16
    """Test pairs in an image grid."""
    image_display_iter: Annotated[Count, NO_EFFECT] = 5000
    """Steps between image grids in TensorBoard."""
    image_save_iter: Annotated[Count, NO_EFFECT] = 5000
    """Steps between image grids in outputs/NAME/images."""
    log_iter: Annotated[Count, NO_EFFECT] = 1
    """Steps between losses in TensorBoard."""
    snapshot_save_iter: Annotated[Count, NO_EFFECT] = 10000
    """Steps between snapshots."""
    # ---- added to the release's keys
    fed_back: Literal["generated", "recoloured"] = "generated"
    """What the id net learns from. recoloured puts a generated image's colours on the brightness of the structure
    image (the mean over its channels). That keeps hair, bag and build sharp, and the old pattern of the clothes."""
    eval_iter: Annotated[CountOrZero, NO_EFFECT] = 0
    """Steps between evaluations on the test images in TensorBoard (embedded data: also of 64 swaps against the true
    ones); the last step is evaluated too. 0: never."""
    detach_f: bool = True
    """false: image reconstruction trains the id net through the appearance code (ID_style AB)."""
    joint_bn: bool = False
    """Merge the id net's passes of one kind, which then share BatchNorm's statistics: faster, but not the published
    method."""
    recompute: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    head_lr_factor: Rate = 10.0
    """Rate of the id net's heads, relative to lr2."""
    id_weight_decay: Weight | None = None
    """Weight decay of the id net's optimiser; null: weight_decay."""
    neck: Literal["linear", "bnneck"] = "linear"
    """What stands between pooled vector and classifier (ID_style AB and normal). bnneck is BatchNorm alone (Luo et al.,
    2019) in place of Linear and BatchNorm."""
    label_smoothing: BelowOne = 0.0
    """Share of the target that the identity losses of real images spread over all identities (Szegedy et al., 2016)."""
    id_init: Annotated[Literal["backbone", "teacher"], NO_EFFECT] = "backbone"
    """teacher: start the id net's trunk and heads from the first teacher."""
    id_freeze_iter: CountOrZero = 0
    """Steps at the start in which the id net is not updated."""
    vgg_weights: str | None = None
    """File of torchvision's VGG-16 weights, for vgg_w."""

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
                "give; increase either"
            )
        if self.dis.gan_type == "wgan":
            if (h, w) != (256, 128):
                raise ValueError("dis.gan_type wgan needs crop_image_height 256 and crop_image_width 128")
        elif min(h, w) // 2 ** (self.dis.num_scales - 1 + self.dis.n_layer) < 2:
            raise ValueError(
                f"crop_image_height {h} x crop_image_width {w} is too small for dis.num_scales {self.dis.num_scales} "
                f"and dis.n_layer {self.dis.n_layer}; reduce either"
            )
        return self

    @model_validator(mode="after")
    def _necks(self) -> DGNetConfig:
        if self.ID_style == "PCB" and self.neck != "linear":
            raise ValueError("neck bnneck: the parts of ID_style PCB have linear necks; use AB or normal")
        return self

    @model_validator(mode="after")
    def _named_teacher(self) -> DGNetConfig:
        if self.needs_teacher and not self.teachers:
            raise ValueError("teacher is empty; name a teacher under models/, or set max_teacher_w: 0")
        return self

    def unreached(self) -> list[str]:
        """What the run is too short for, a phrase each that begins with the key."""
        phrases = []
        if self.id_freeze_iter >= self.max_iter:
            phrases.append(f"id_freeze_iter {self.id_freeze_iter}: the id net never learns")
        rises = self.max_w > min(self.recon_f_w, self.recon_s_w) or self.max_cyc_w > self.recon_x_cyc_w
        if self.warm_scale > 0 and rises and self.warm_iter + 1 >= self.max_iter:
            phrases.append(f"warm_iter {self.warm_iter}: recon_f, recon_s and cyc keep their first weights")
        if self.warm_scale > 0 and self.max_teacher_w > self.teacher_w and self.warm_teacher_iter + 1 >= self.max_iter:
            phrases.append(f"warm_teacher_iter {self.warm_teacher_iter}: the teacher loss keeps its first weight")
        return phrases

    @property
    def teachers(self) -> list[str]:
        """The names in `teacher`."""
        return [name.strip() for name in self.teacher.split(",") if name.strip()]

    @property
    def needs_teacher(self) -> bool:
        """Whether any iteration needs a teacher's predictions or weights."""
        ramps = self.warm_scale > 0 and self.max_teacher_w > 0 and self.max_iter > self.warm_teacher_iter + 1
        labelled = (self.teacher_w > 0 or ramps) and self.teacher_style not in (2, 3)
        return labelled or self.id_init == "teacher"


class TeacherConfig(CommonConfig):
    """Keys of a teacher (or baseline): a one-head net, trained on identities alone."""

    task: Literal["teacher"]
    """What the run trains."""
    stride: Literal[1, 2] = 2
    """Stride of the trunk's last stage."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images per step, over all processes; BatchNorm needs two or more."""
    epochs: Count = 60
    """Passes over the training images."""
    warm_epochs: CountOrZero = 5
    """Epochs over which the rates rise linearly."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with Nesterov momentum 0.9, or Adam."""
    lr: Rate = 0.05
    """Rate of the head."""
    trunk_lr_factor: Fraction = 0.1
    """Rate of the trunk, relative to lr."""
    lr_policy: Literal["step", "multistep", "cosine"] = "step"
    """step: a tenth of the rates after two thirds of the epochs; multistep: after 1/3 and again after 7/12; cosine:
    down to 0."""
    dropout: BelowOne = 0.5
    """Dropout before the classifier."""
    erasing_p: Fraction = 0.0
    """Probability of random erasing per image."""
    pool: Literal["avg", "max", "gem"] = "avg"
    """Pooling of the head's input; gem is the generalised mean with exponent 3 (Radenović et al., 2018), for maps that
    are not negative, as those of a ResNet."""
    neck: Literal["linear", "bnneck"] = "linear"
    """What stands between pooled vector and classifier: linear is Linear and BatchNorm, bnneck BatchNorm alone (Luo et
    al., 2019)."""
    label_smoothing: BelowOne = 0.0
    """Share of the target that is spread over all identities (Szegedy et al., 2016)."""
    images_per_identity: CountOrZero = 0
    """Draw batches of batch_size / images_per_identity identities with as many images each (Hermans et al., 2017); 0:
    draw images without regard to identity."""
    triplet_w: Weight = 0.0
    """Weight of the batch-hard triplet loss on the pooled vector, margin 0.3 (Hermans et al., 2017). Of several
    processes each compares its own images."""
    circle_w: Weight = 0.0
    """Weight of the circle loss on the pooled vector, margin 0.25, scale 64 (Sun et al., 2020); as triplet_w."""
    grayscale_p: Fraction = 0.0
    """Probability that an image becomes gray."""
    jitter: Fraction = 0.0
    """Random factors of brightness, contrast and saturation, 1 plus or minus this; hue is turned by a tenth of it."""
    ema_decay: BelowOne = 0.0
    """Keep an average of the weights, which holds this share of itself in every step, and save it as the teacher (0.999
    remembers about 1,000 steps); 0: save the last weights."""
    extra_data: str | None = None
    """Folder made by generate.py, to train on beside data_root; its identities must be in data_root."""
    extra_labels: Literal["one_hot", "lsro", "soft"] = "one_hot"
    """Label of its images. one_hot: the identity of the clothes; lsro: uniform; soft: the manifest's, whose remainder
    is spread over the identities that it does not name."""
    log_iter: Annotated[Count, NO_EFFECT] = 20
    """Steps between losses in TensorBoard."""
    snapshot_epochs: Annotated[Count, NO_EFFECT] = 10
    """Epochs between snapshots."""

    def unreached(self) -> list[str]:
        """What the run is too short for, a phrase each that begins with the key."""
        if self.warm_epochs < self.epochs:
            return []
        return [f"warm_epochs {self.warm_epochs}: the rate reaches lr in the last step at most"]

    @model_validator(mode="after")
    def _batches_of_identities(self) -> TeacherConfig:
        each = self.images_per_identity
        for key in ("triplet_w", "circle_w"):
            if getattr(self, key) > 0 and each < 2:
                raise ValueError(
                    f"{key} compares images of one identity in a batch; set images_per_identity to 2 or more, usually 4"
                )
        if each and (self.batch_size % each or self.batch_size < 2 * each):
            raise ValueError(
                f"batch_size {self.batch_size} must be images_per_identity {each} times 2 or more identities"
            )
        return self

    @model_validator(mode="after")
    def _labels_of_something(self) -> TeacherConfig:
        if self.extra_data is None and self.extra_labels != "one_hot":
            raise ValueError(f"extra_labels {self.extra_labels} needs extra_data, a folder made by generate.py")
        return self


Config = DGNetConfig | TeacherConfig


# ---------------------------------------------------------------------------------------------- loading
class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses what SafeLoader accepts: equal keys, of which it keeps the last, and aliases of lists and sections, by
    which a few lines could stand for gigabytes (`b: [*a, *a]`, `c: [*b, *b]`)."""

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
    """The mapping in a YAML file. Raises UserError for anything else."""
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
        raise UserError(f"{path}: is empty or does not consist of `key: value` lines")
    return values


def set_values(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A copy of `values` with `--set` overrides such as `batch_size=4` and `gen.dim=8`. Raises UserError."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise UserError(f"--set {setting}: write key=value, as in --set batch_size=4 gen.dim=8")
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
    except ValueError:  # Python refuses to write an integer of more than 4,300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def translated(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A DG-Net run's values without `RETIRED_KEYS`. `source` names them in notes and errors.

    Raises UserError where a retired key asks for something that no longer exists.
    """
    kept = {key: value for key, value in values.items() if key not in RETIRED_KEYS}
    if dead := [key for key in DEAD_KEYS if key in values]:
        logging.info(f"{source}: ignored {', '.join(dead)}, which the release does not read either")
    if (channels := values.get("input_dim_a", 1)) != 1:
        raise UserError(f"{source}: input_dim_a: must be 1, the gray or edge image (got {_shown(channels)})")
    if (apex := values.get("apex", False)) not in (True, False):
        raise UserError(f"{source}: apex: must be true or false (got {_shown(apex)})")
    if apex:
        if values.get("precision", "fp16") != "fp16":
            raise UserError(f"{source}: apex: true means precision: fp16; remove one of the two")
        kept["precision"] = "fp16"
    return kept


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate `values`; `source` names them in messages. Raises UserError that lists every problem in one line."""
    model = _schema(values, source)
    if model is DGNetConfig:
        values = translated(values, source)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(_describe(e, model) for e in error.errors())
        raise UserError(f"{source}: " + "; ".join(problems)) from None


def of_another_version(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A run folder's values with the release's fallbacks. Unknown keys are left out and named in a warning."""
    model = _schema(values, source)
    fallbacks = RELEASE_FALLBACKS if model is DGNetConfig else {}
    kept: dict[str, Any] = {"data_root": ""} | fallbacks
    unknown = []
    for key, value in values.items():
        if key in ("gen", "dis") and isinstance(value, dict) and key in model.model_fields:
            fields = _section(model, (key,)).model_fields
            kept[key] = {k: v for k, v in value.items() if k in fields}
            unknown += [f"{key}.{k}" for k in value if k not in fields]
        elif key in model.model_fields or (key in RETIRED_KEYS and model is DGNetConfig):
            kept[key] = value
        else:
            unknown.append(key)
    if unknown:
        logging.warning(f"{source}: ignored keys of another version: {', '.join(unknown)}")
    return kept


def find_config(text: str) -> Path:
    """The file that `--config` names: from here, from the project's folder, or among its configs."""
    candidates = [Path(text), ROOT / text, ROOT / "configs" / text]
    return next((path for path in candidates if path.is_file()), candidates[0])


def load_config(path: Path | str, settings: list[str] = (), *, strict: bool = True) -> Config:
    """The configuration in a YAML file, with `--set` overrides. Raises UserError.

    strict  False for a run folder's file, which the release or another version may have written: see
            `of_another_version`
    """
    values = read_yaml(Path(path))
    if not strict:
        values = of_another_version(values, str(path))
    return parse_config(set_values(values, list(settings)), str(path))


def flat_settings(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values (`model_dump()`) in one level: a section's key is written `gen.dim`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The schema's fields in one level, named like the keys of `flat_settings`."""
    flat: dict[str, FieldInfo] = {}
    for key, field in model.model_fields.items():
        section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        flat |= {f"{key}.{name}": f for name, f in fields(field.annotation).items()} if section else {key: field}
    return flat


def changed_from_default(cfg: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from the default, as key to (value, default). A required key has the default None."""
    required = {name: getattr(cfg, name) for name, field in type(cfg).model_fields.items() if field.is_required()}
    defaults = flat_settings(type(cfg)(**required).model_dump())
    changed = {k: (v, defaults[k]) for k, v in flat_settings(cfg.model_dump()).items() if v != defaults[k]}
    return {k: (v, None) for k, v in required.items() if k != "task"} | changed


def exact_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings among a config's values (`model_dump()`) that affect a run's results; a section's key is `gen.dim`.

    Keys that the schema does not know are left out: another version wrote them.
    """
    schema = fields(_schema(values, "config"))
    ignored = {NO_EFFECT} if values.get("lr_policy") == "cosine" else {NO_EFFECT, COSINE_ONLY}
    affecting = {key for key, field in schema.items() if ignored.isdisjoint(_marks(field))}
    return {key: value for key, value in flat_settings(values).items() if key in affecting}


def _marks(field: FieldInfo) -> set[str]:
    return {mark for mark in field.metadata if isinstance(mark, str)}


def dump_config(cfg: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(cfg.model_dump(), sort_keys=False)


# ------------------------------------------------------------------------------------ docs/configuration.md
PAGE = """# Configuration

Made by `python config.py > docs/configuration.md` from the schema in `config.py`; change it there.

A run's settings stand in a YAML file (`train.py --config FILE`) and are overridden by `--set batch_size=4 gen.dim=8`.
They are validated before anything starts: an unknown key, a wrong type and a value out of range are errors. The
resolved configuration is written to `config.yaml` in the run's folder.

The last column says whether a key affects the results of a run that is resumed. If such a key differs from the
snapshot, `--resume` prints the old and the new value. The other keys decide {no_effect}.

The release's YAML files work unchanged. `apex: true` is read as `precision: fp16`; `new_size`, `input_dim_a` and the
keys that the release never reads (`{dead}`) are dropped.
"""


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def configuration_page() -> str:
    """The reference page of all keys, as Markdown."""
    page = PAGE.format(no_effect=NO_EFFECT, dead="`, `".join(DEAD_KEYS))
    shared = CommonConfig.model_fields
    for model, prefix in (
        (CommonConfig, ""),
        (DGNetConfig, ""),
        (GenConfig, "gen."),
        (DisConfig, "dis."),
        (TeacherConfig, ""),
    ):
        page += f"\n## {model.__doc__.rstrip('.')}\n\n"
        page += "| key | default | values | meaning | affects results |\n|---|---|---|---|---|\n"
        for name, field in model.model_fields.items():
            if (model is CommonConfig or name not in shared) and name not in ("gen", "dis"):
                page += f"| `{prefix}{name}` | {' | '.join(_cells(field))} |\n"
    return page


def _cells(field: FieldInfo) -> tuple[str, str, str, str]:
    """A field's default, values, meaning and effect."""
    marks = _marks(field)
    effect = "no" if NO_EFFECT in marks else "if `lr_policy` is cosine" if COSINE_ONLY in marks else "yes"
    default = "required" if field.is_required() else _word(field.default)
    return default, _values(field.annotation, field.metadata), " ".join(field.description.split()), effect


def _word(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(annotation: Any, metadata: list[Any]) -> str:
    """What a field of this type and these limits accepts."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _values(inner, [limit for m in more for limit in getattr(m, "metadata", [m])])
    if get_origin(annotation) in (Union, UnionType):
        return ", or ".join(_values(choice, []) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return ", ".join(_word(choice) for choice in get_args(annotation))
    name = {bool: "true, false", int: "integer", float: "number", str: "text", NoneType: "null"}[annotation]
    limits = [f"{sign} {getattr(m, limit)}" for m in metadata for limit, sign in SIGNS.items() if hasattr(m, limit)]
    return ", ".join([name, *limits])


if __name__ == "__main__":
    print(configuration_page(), end="")
