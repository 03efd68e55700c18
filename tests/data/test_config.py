"""The configuration: defaults, files, overrides, refusals, and the schedules that are functions of the iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CPU, logged, tiny_config

from config import (
    DEAD_KEYS,
    RETIRED_KEYS,
    DGNetConfig,
    TeacherConfig,
    configuration_page,
    dump_config,
    exact_settings,
    fields,
    find_config,
    load_config,
    of_another_version,
    parse_config,
    set_values,
)
from losses import RAMPED, loss_weights, ramp
from networks import Generator
from reIDmodel import build_id_net
from trainer import TeacherTrainer, lr_factor
from utils import ROOT, UserError

FILE = "settings.yaml"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# The published configuration, written out, but for data_root and the keys that are not kept.
RELEASE = yaml.safe_load(
    """{
    B_w: 0.2, ID_class: 751, ID_stride: 1, ID_style: AB, batch_size: 8, beta1: 0, beta2: 0.999,
    crop_image_height: 256, crop_image_width: 128, display_size: 16, erasing_p: 0.5, gamma: 0.1, gamma2: 0.1,
    gan_w: 1, id_w: 1, image_display_iter: 5000, image_save_iter: 5000, log_iter: 1, lr2: 0.002, lr_d: 0.0001,
    lr_g: 0.0001, lr_policy: multistep, max_cyc_w: 2, max_iter: 100000, max_teacher_w: 2, max_w: 1, norm_id: false,
    num_workers: 8, pid_w: 1, pool: max, recon_s_w: 0, recon_f_w: 0, recon_id_w: 0.5, recon_x_cyc_w: 0,
    recon_x_w: 5, recon_xp_w: 5, single: gray, snapshot_save_iter: 10000, step_size: 60000, teacher: best,
    teacher_w: 0, teacher_style: 0, train_bn: true, use_encoder_again: 0.5, vgg_w: 0, warm_iter: 30000,
    warm_scale: 0.0005, warm_teacher_iter: 30000, weight_decay: 0.0005, T_w: 1
    }"""
)
RELEASE_GEN = yaml.safe_load(
    """{
    activ: lrelu, dec: basic, dim: 16, dropout: 0, id_dim: 2048, mlp_dim: 512, mlp_norm: none, n_downsample: 2,
    n_res: 4, non_local: 0, pad_type: reflect, tanh: false, init: kaiming
    }"""
)
RELEASE_DIS = yaml.safe_load(
    """{
    LAMBDA: 0.01, activ: lrelu, dim: 32, gan_type: lsgan, n_layer: 2, n_res: 4, non_local: 0, norm: none,
    num_scales: 3, pad_type: reflect
    }"""
)


def parse(**values: Any) -> Any:
    return parse_config({"data_root": ""} | values, "file.yaml")


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as error:
        parse(**values)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("file.yaml: ")
    return str(error.value)


def write(folder: Path, text: str) -> Path:
    path = folder / FILE
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------------------- the files
def test_latest_is_the_release_default() -> None:
    cfg = load_config(ROOT / "configs" / "latest.yaml")
    values = cfg.model_dump()
    assert {key: values[key] for key in RELEASE} == RELEASE
    assert values["gen"] == RELEASE_GEN
    assert values["dis"] == RELEASE_DIS
    assert cfg.precision == "fp32"


def test_the_schema_defaults_to_the_release() -> None:
    values = DGNetConfig(data_root="").model_dump()
    expected = RELEASE | dict(ID_class="auto", gen=RELEASE_GEN, dis=RELEASE_DIS, backbone="resnet50", pretrained=True)
    assert {key: values[key] for key in expected} == expected


def test_the_page_of_keys_is_that_of_the_schema() -> None:
    page = configuration_page()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page, (
        "stale: python config.py > docs/configuration.md"
    )
    for model in (DGNetConfig, TeacherConfig):
        assert all(f"| `{key}` |" in page and field.description for key, field in fields(model).items())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_config(path, ["weight_decay=1e-5", "seed=7"])
    assert load_config(write(tmp_path, dump_config(cfg))) == cfg
    assert isinstance(cfg, TeacherConfig if "teacher" in path.stem else DGNetConfig)
    assert logged(caplog) == ""
    if isinstance(cfg, DGNetConfig):
        # Where the code's length and the generator disagree, this refuses.
        code_dim = build_id_net(cfg.ID_style, 2, backbone=cfg.backbone, stride=cfg.ID_stride).code_dim
        Generator(code_dim=code_dim, **cfg.gen.model_dump())


def test_the_release_keys_load_unchanged_with_one_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    retired = dict(sqrt=False, use_decoder_again=True, input_dim_b=1, apex=False, input_dim_a=1, new_size=128)
    assert retired.keys() == set(RETIRED_KEYS)
    values = RELEASE | retired | dict(data_root="../Market/pytorch/", gen=RELEASE_GEN, dis=RELEASE_DIS)
    cfg = load_config(write(tmp_path, yaml.safe_dump(values)))
    assert cfg == load_config(ROOT / "configs" / "latest.yaml")
    (note,) = caplog.messages
    assert all(key in note for key in DEAD_KEYS)


# ------------------------------------------------------------------------------------------- overrides
def test_set_overrides_values_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data_root: x\nbatch_size: 2\ngen: {dim: 4, n_res: 2}\n")
    cfg = load_config(path, ["batch_size=4", "gen.dim=8", "lr_g=1e-4", "teacher=a,b", "train_bn=false", "lr2=3.5E-3"])
    assert (cfg.batch_size, cfg.gen.dim, cfg.gen.n_res) == (4, 8, 2)
    assert cfg.lr_g == 1e-4 and cfg.lr2 == 3.5e-3
    assert cfg.teachers == ["a", "b"]
    assert cfg.train_bn is False

    cfg = load_config(write(tmp_path, "data_root: x\n"), ["dis.num_scales=1", "ID_class=auto"])
    assert cfg.dis.num_scales == 1 and cfg.ID_class == "auto"  # a section that the file lacks
    values = {"gen": {"dim": 16}}
    assert set_values(values, ["gen.dim=8"]) == {"gen": {"dim": 8}}
    assert values == {"gen": {"dim": 16}}


# -------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "values,key,suggestion",
    [
        (dict(batchsize=4), "batchsize", "batch_size?"),
        (dict(gen={"dimm": 8}), "gen.dimm", "gen.dim?"),
        (dict(dis={"gan_typ": "lsgan"}), "dis.gan_typ", "dis.gan_type?"),
        (dict(task="teacher", epoch=3), "epoch", "epochs?"),
        (dict(zzzzqqqq=1), "zzzzqqqq", None),
    ],
)
def test_an_unknown_key_suggests_the_nearest(values: dict[str, Any], key: str, suggestion: str | None) -> None:
    message = refusal(**values)
    assert key in message
    assert suggestion in message if suggestion else "?" not in message


@pytest.mark.parametrize(
    "values,words",
    [
        (dict(batch_size="many"), "batch_size: .*'many'"),
        (dict(batch_size=True), "batch_size: .*True"),
        (dict(lr_g=False), "lr_g: .*False"),
        (dict(gen=5), "gen: "),
        (dict(task="Teacher", epochs=3), "task: .*dgnet.*teacher.*'Teacher'"),
        (dict(gen=dict(tanh="perhaps")), "gen.tanh"),
        (dict(gen=dict(dim=-4)), "gen.dim: .*-4"),
        (dict(ID_class="all"), "ID_class"),
        (dict(erasing_p=1.5), "erasing_p: .*1.5"),
        (dict(lr2=0), "lr2: "),
        (dict(recon_x_w=float("nan")), "recon_x_w: "),
        (dict(ID_stride=3), "ID_stride: .*3"),
        (dict(ID_style="ABC"), "ID_style: .*'AB'"),
        (dict(gen=dict(dec="slim")), "gen.dec: .*basic.*series.*parallel.*slim"),
        (dict(apex=True, precision="bf16"), "apex.*precision"),
        (dict(input_dim_a=3), "input_dim_a: .*3"),
        (dict(task="teacher", batch_size=1), "batch_size: .*2.*1"),
        (dict(task="teacher", lr_policy="constant"), "lr_policy"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_wrong_types_and_ranges_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"file.yaml: .*{words}"):
        parse(**values)


def test_every_problem_is_listed_in_one_line() -> None:
    message = refusal(batch_size=-1, gen=dict(dimm=3), pool="sum")
    assert all(word in message for word in ("batch_size", "gen.dimm", "pool"))
    with pytest.raises(UserError, match="data_root"):
        parse_config({}, "file.yaml")


@pytest.mark.parametrize(
    "text,words",
    [
        ("data_root: x\nbatch_size: 2\nbatch_size: 4\n", "line 3: .*batch_size"),
        ("data_root: x\ngen:\n  dim: 2\n  dim: 4\n", "line 4: .*dim"),
        ("a: &a [1]\nb: [*a, *a]\n", "line 2: "),
        ("3: x\n", "line 1: 3"),
        ("# nothing but a comment\n", ""),
        ("- a\n- b\n", ""),
        ("a: [1\n", ""),
        ("a: !!python/object/apply:os.getcwd []\n", ""),
        ("a: b: c\n", ""),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"{FILE}: .*{words}") as error:
        load_config(write(tmp_path, text))
    assert "\n" not in str(error.value)


SMALL = dict(crop_image_height=64, crop_image_width=32)


@pytest.mark.parametrize(
    "values,keys",
    [
        (dict(crop_image_height=130), ["crop_image_height", "4", "gen.n_downsample"]),
        (dict(crop_image_width=132, gen=dict(n_downsample=3)), ["crop_image_width", "8", "gen.n_downsample"]),
        # The structure code is padded by 9 on every side, and reflection needs more than 9 pixels for that.
        (SMALL, ["crop_image_height", "gen.n_downsample", "gen.pad_type"]),
        (SMALL | dict(gen=dict(n_downsample=1), dis=dict(num_scales=4)), ["dis.num_scales", "dis.n_layer"]),
        (
            dict(crop_image_height=128, crop_image_width=64, dis=dict(gan_type="wgan")),
            ["dis.gan_type", "crop_image_height 256"],
        ),
        (dict(teacher=" , ", max_iter=40000), ["teacher", "max_teacher_w"]),
        # A single number has no deviation, and attention compares codes of an eighth of the channels.
        (dict(gen=dict(mlp_norm="ln", mlp_dim=1)), ["gen.mlp_norm", "gen.mlp_dim"]),
        (dict(gen=dict(dim=1, n_downsample=1, non_local=1)), ["gen.non_local", "gen.dim"]),
        (dict(dis=dict(dim=4, n_layer=1, non_local=1)), ["dis.non_local", "dis.dim", "dis.n_layer"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_keys_that_do_not_go_together(values: dict[str, Any], keys: list[str]) -> None:
    message = refusal(**values)
    assert all(key in message for key in keys)


def test_a_code_that_does_not_fit_the_generator_is_refused() -> None:
    gen = tiny_config().gen.model_dump()
    with pytest.raises(UserError, match="gen.id_dim 64.*gen.n_res 4.*512.*gen.id_dim.*128"):
        Generator(code_dim=512, **gen)
    with pytest.raises(UserError, match="n_res.*128"):
        Generator(code_dim=128, **gen | dict(n_res=3))


# -------------------------------------------------------------------------- folders of the release
def test_the_config_of_a_release_folder_is_read_leniently(caplog: pytest.LogCaptureFixture) -> None:
    values = dict(batch_size=4, ID_class=702, image_dir="x", gen=dict(dim=8, style_dim=3), sqrt=False)
    cfg = parse_config(of_another_version(values, "run/config.yaml"), "run/config.yaml")
    lines = caplog.messages
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "image_dir" in lines[0] and "gen.style_dim" in lines[0]
    assert (cfg.batch_size, cfg.ID_class, cfg.gen.dim) == (4, 702, 8)
    assert (cfg.ID_stride, cfg.precision, cfg.erasing_p, cfg.T_w, cfg.lr_policy) == (2, "fp32", 0, 1, "constant")


# ------------------------------------------------------------------------------------------ what affects results
def test_what_affects_the_results_of_a_resumed_run() -> None:
    unmarked = exact_settings(parse().model_dump())
    assert {"batch_size", "lr_g", "seed", "gen.dim", "dis.num_scales", "precision"} <= unmarked.keys()
    # How long the run is decides the rates of the cosine alone.
    assert "max_iter" not in unmarked
    assert "max_iter" in exact_settings(parse(lr_policy="cosine").model_dump())
    for key in ("log_iter", "data_root", "keep_last", "num_workers", "pretrained"):
        assert key not in unmarked
    teacher = exact_settings(parse(task="teacher").model_dump())
    assert "epochs" in teacher and "snapshot_epochs" not in teacher
    values = parse().model_dump()  # keys of another version are not compared
    assert exact_settings(values | dict(apex=False, gone=3)) == exact_settings(values)


# ---------------------------------------------------------------------------- functions of the iteration
def test_ramp() -> None:
    values = [ramp(0.5, 1.0, 10, 0.125, t) for t in (0, 9, 10, 11, 12, 13, 14, 15, 1000)]
    assert values == [0.5, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0, 1.0]
    # The ceiling holds after warm_start only.
    assert [ramp(2.0, 1.0, 10, 0.125, t) for t in (10, 11)] == [2.0, 1.0]


def ramped(cfg: DGNetConfig, t: int) -> dict[str, float]:
    """The weights that change during training, by their keys."""
    return {key: loss_weights(cfg, t)[term] for term, key in RAMPED.items()}


def test_loss_weights_of_the_release() -> None:
    cfg = DGNetConfig(data_root="")
    for t in (0, 1, 29_999, 30_000):
        assert ramped(cfg, t) == dict(recon_f_w=0, recon_s_w=0, recon_x_cyc_w=0, teacher_w=0)
    # 0.0005 a step: one after 2,000 steps, two after 4,000.
    assert ramped(cfg, 30_001) == pytest.approx(
        dict(recon_f_w=5e-4, recon_s_w=5e-4, recon_x_cyc_w=5e-4, teacher_w=5e-4)
    )
    assert ramped(cfg, 33_000) == pytest.approx(dict(recon_f_w=1, recon_s_w=1, recon_x_cyc_w=1.5, teacher_w=1.5))
    assert ramped(cfg, 99_999) == dict(recon_f_w=1, recon_s_w=1, recon_x_cyc_w=2, teacher_w=2)


def test_lr_factor() -> None:
    def at(policy: str, *iterations: int) -> list[float]:
        return [lr_factor(policy, t, step_size=60_000, gamma=0.1, max_iter=100_000) for t in iterations]

    # Milestones 60,000, 90,000 and 105,000 count from the step after.
    assert at("multistep", 0, 59_998) == [1, 1]
    assert at("multistep", 59_999, 89_998, 89_999, 104_998, 104_999) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    assert at("step", 0, 59_998, 59_999, 119_998, 119_999) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert at("constant", 0, 10**6) == [1, 1]
    assert at("cosine", 0, 25_000, 50_000, 100_000, 200_000) == pytest.approx([1, 0.8535533906, 0.5, 0, 0], abs=1e-9)
    # An odd step size has half milestones: 5, 7.5, 8.75.
    factors = [lr_factor("multistep", t, step_size=5, gamma=0.5, max_iter=10) for t in range(10)]
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.125, 0.125]


def test_teacher_rates() -> None:
    def factors(**changes: Any) -> list[float]:
        cfg = parse(task="teacher", epochs=6, warm_epochs=2, backbone="resnet10w8", pretrained=False, **changes)
        trainer = TeacherTrainer(cfg, 3, CPU, steps_per_epoch=2)
        return [trainer.lr_factor(t) for t in range(12)]

    assert factors() == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])
    cosine = factors(lr_policy="cosine")
    assert cosine[6] == pytest.approx(0.5) and cosine[0] == pytest.approx(0.25) and 0 < cosine[11] < 0.02


@pytest.mark.parametrize(
    "values,needed",
    [
        (dict(), True),  # the release: teacher_w rises after 30,000 of 100,000 steps
        (dict(max_iter=30_001), False),
        (dict(max_iter=30_002), True),
        (dict(max_iter=10, teacher_w=1), True),
        (dict(warm_scale=0), False),
        (dict(max_teacher_w=0), False),
        (dict(teacher_style=2), False),
        (dict(teacher_style=2, id_init="teacher"), True),
    ],
)
def test_whether_a_teacher_is_read(values: dict[str, Any], needed: bool) -> None:
    cfg = parse(**values)
    assert cfg.needs_teacher is needed
    if "teacher_style" not in values:
        assert needed == any(ramped(cfg, t)["teacher_w"] > 0 for t in (0, cfg.max_iter - 1))


@pytest.mark.parametrize("text,value", [("off", False), ("false", False), ("true", True), ("auto", "auto")])
def test_what_may_be_cached(tmp_path: Path, text: str, value: bool | str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data_root: d\ncache_images: {text}\n")
    cfg = load_config(path)
    assert cfg.cache_images == value and type(cfg.cache_images) is type(value)
    assert parse_config(yaml.safe_load(dump_config(cfg)), "again") == cfg
    assert load_config(path, ["cache_images=source", "cache_limit_mb=7"]).cache_images == "source"
    assert parse_config({"data_root": "d"}, "default").cache_images == "auto"


@pytest.mark.parametrize(
    "values,keys",
    [
        (dict(max_iter=10, id_freeze_iter=10), ["id_freeze_iter"]),
        (dict(max_iter=11, id_freeze_iter=10), []),
        (dict(max_iter=11, warm_iter=10, warm_scale=0.1), ["warm_iter"]),
        (dict(max_iter=12, warm_iter=10, warm_scale=0.1), []),
        (dict(max_iter=11, warm_teacher_iter=10, warm_scale=0.1), ["warm_teacher_iter"]),
        (dict(max_iter=11, warm_iter=10, warm_teacher_iter=10, warm_scale=0), []),
        (dict(max_iter=11, warm_teacher_iter=10, warm_scale=0.1, max_teacher_w=0), []),
        (dict(task="teacher", epochs=3, warm_epochs=3), ["warm_epochs"]),
        (dict(task="teacher", epochs=4, warm_epochs=3), []),
    ],
)
def test_what_a_run_is_too_short_for(values: dict, keys: list[str]) -> None:
    """The weights and rates of the last step are those of the first one."""
    task = values.get("task", "dgnet")
    defaults = {} if task == "teacher" else dict(warm_iter=0, warm_teacher_iter=0)
    cfg = parse_config(dict(data_root="") | defaults | values, "short")
    assert [phrase.split()[0] for phrase in cfg.unreached()] == keys
    if task == "dgnet":
        first, last = loss_weights(cfg, 0), loss_weights(cfg, cfg.max_iter - 1)
        assert (first["recon_s"] == last["recon_s"]) == ("warm_iter" in keys or cfg.warm_scale == 0)
        unchanged = first["teacher"] == last["teacher"]
        assert unchanged == ("warm_teacher_iter" in keys or cfg.warm_scale == 0 or cfg.max_teacher_w == 0)


def test_configs_are_sought_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("latest.yaml", "configs/latest.yaml"):
        assert find_config(name) == ROOT / "configs" / "latest.yaml"
    (tmp_path / "latest.yaml").write_text("")
    assert find_config("latest.yaml").resolve() == tmp_path / "latest.yaml", "the file that is here comes first"
    assert str(find_config("nowhere.yaml")) == "nowhere.yaml"
