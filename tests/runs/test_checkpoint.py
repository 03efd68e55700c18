"""Checkpoints: the release's names and numbering, strict reading, damage, and resuming as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import yaml
from conftest import (
    CPU,
    TINY_DGNET,
    load_script,
    merged,
    random_batches,
    tiny_config,
    tiny_teacher_config,
    tiny_trainer,
)
from torch import Tensor

from config import DGNetConfig
from files import read_tensors
from networks import Discriminator, Generator
from reIDmodel import build_id_net, build_teacher
from runs.folder import open_run, run_config, start_folder
from runs.load import (
    build_trainer,
    load_generator,
    load_run_for_test,
    load_teacher,
    load_teacher_for_test,
    num_classes,
    pick_epoch,
    save_teacher,
    training_images,
)
from runs.release import export
from runs.session import build_session
from runs.snapshot import load_snapshot, prune_snapshots, remove_parts, save_snapshot, snapshots
from runs.weights import load_network, plain_names
from trainer import DGNetTrainer, TeacherTrainer
from utils import ROOT, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
Shapes = dict[str, list[int]]


# --------------------------------------------------------------- names, shapes and order of the release
def golden(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "golden" / name).read_text())


OFFICIAL = golden("official_state_dict.json")
VARIANTS = golden("official_state_dict_variants.json")


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def shapes(net: nn.Module, prefix: str = "") -> Shapes:
    return {name: list(value.shape) for name, value in net.state_dict().items() if name.startswith(prefix)}


def assert_same_layout(net: nn.Module, expected: Shapes, prefix: str = "") -> None:
    """The same names with the same shapes in the same order, and the same order of the parameters among them."""
    assert shapes(net, prefix) == expected
    assert list(shapes(net, prefix)) == list(expected)
    buffers = {name for name, _ in net.named_buffers()}
    parameters = [name for name, _ in net.named_parameters() if name.startswith(prefix)]
    assert parameters == [name for name in expected if name not in buffers]


@pytest.mark.parametrize(
    "name,build",
    [
        ("gen", lambda: Generator(code_dim=8192)),
        ("dis", Discriminator),
        ("id", lambda: build_id_net("AB", 751)),
        ("teacher", lambda: build_teacher(751)),
    ],
)
def test_state_dicts_are_those_of_the_release(name: str, build: Callable[[], nn.Module]) -> None:
    assert_same_layout(on_meta(build), OFFICIAL[name])


@pytest.mark.parametrize("dec", ["series", "parallel"])
def test_other_decoders_have_the_names_of_the_default(dec: str) -> None:
    assert VARIANTS["gen, dec: series or parallel"] == "the same names and shapes as the default"
    assert_same_layout(on_meta(lambda: Generator(code_dim=8192, dec=dec)), OFFICIAL["gen"])


@pytest.mark.parametrize(
    "variant,build,prefix",
    [
        ("gen, non_local: 1", lambda: Generator(code_dim=8192, non_local=1), "dec."),
        ("dis, non_local: 1", lambda: Discriminator(non_local=1), "cnns.0."),
        ("dis, non_local: 2", lambda: Discriminator(non_local=2), "cnns.0."),
        ("dis, gan_type: wgan", lambda: Discriminator(gan_type="wgan"), ""),
        ("id, ID_style: PCB", lambda: build_id_net("PCB", 10), "classifier"),
        ("id, ID_style: normal", lambda: build_id_net("normal", 10), "classifier"),
    ],
)
def test_state_dicts_of_the_variants(variant: str, build: Callable[[], nn.Module], prefix: str) -> None:
    net = on_meta(build)
    assert_same_layout(net, VARIANTS[variant], prefix)
    # What the file leaves out is as in the default.
    kind = variant.partition(",")[0]
    same = {"gen": ("enc_content.", "mlp_"), "id": ("model.",), "dis": ()}[kind]
    for part in same:
        assert shapes(net, part) == {name: v for name, v in OFFICIAL[kind].items() if name.startswith(part)}


def test_optimisers_number_their_parameters_as_the_release() -> None:
    """Position i of an optimiser's state belongs to the i-th parameter of the release's list."""
    trainer = tiny_trainer(tiny_config())
    for name, groups in (
        ("gen", [""]),
        ("dis", [""]),
        # The trunk with its unused fc, then a group for each head.
        ("id", ["model.", "classifier1.", "classifier2."]),
    ):
        net = trainer.networks()[name]
        names = {id(p): key for key, p in net.named_parameters()}
        optimizer = trainer.optimizers()[name]
        found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        order = [key for key, _ in net.named_parameters()]
        assert found == [[key for key in order if key.startswith(prefix)] for prefix in groups]
        numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        assert sum(numbers, []) == list(range(len(order)))
    assert "model.fc.weight" in dict(trainer.id_net.named_parameters()), "the unused fc has its number too"


# ------------------------------------------------------------------------------- a folder of the release
def released_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as PyTorch 1.x wrote it: fewer entries in a group, Adam's step a plain number."""
    adam = ("lr", "betas", "eps", "weight_decay", "amsgrad", "initial_lr", "params")
    sgd = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "initial_lr", "params")
    kept = adam if isinstance(optimizer, torch.optim.Adam) else sgd
    state = optimizer.state_dict()
    return {
        "state": {
            number: {key: int(value) if key == "step" else value for key, value in values.items()}
            for number, values in state["state"].items()
        },
        "param_groups": [{key: group[key] for key in kept} for group in state["param_groups"]],
    }


@pytest.fixture(scope="module")
def classes(tiny_data: Path) -> int:
    return training_images(tiny_config(data_root=str(tiny_data))).num_classes


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, classes: int) -> tuple[Path, DGNetTrainer]:
    """A run folder with the release's files alone, and the trainer whose state is in them."""
    # Stride 2, no erasing, constant rates: what the release assumes where the config says nothing.
    cfg = tiny_config(ID_stride=2, erasing_p=0, lr_policy="constant", data_root=str(tiny_data))
    trainer = tiny_trainer(cfg, classes=classes)
    trainer.step(*random_batches(cfg), 0)
    folder = tmp_path_factory.mktemp("released")
    checkpoints = folder / "outputs" / "E" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name, net in trainer.networks().items():
        torch.save({"a": net.state_dict()}, checkpoints / f"{name}_00000100.pt")
    states = {name: released_optimizer(optimizer) for name, optimizer in trainer.optimizers().items()}
    torch.save(states, checkpoints / "optimizer.pt")
    values = merged(TINY_DGNET, dict(data_root=str(tiny_data), ID_class=classes, max_iter=103, teacher_w=0))
    values |= dict(image_dir="./", snapshot_save_iter=2, use_decoder_again=True, gen=values["gen"] | dict(style_dim=8))
    (checkpoints.parent / "config.yaml").write_text(yaml.safe_dump(values))
    return folder, trainer


def test_a_folder_of_the_release_is_resumed_as_it_is(
    released: tuple[Path, DGNetTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source, original = released
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    run = open_run(str(tmp_path), "E")
    cfg = run_config(run)
    assert (cfg.ID_stride, cfg.erasing_p, cfg.T_w, cfg.lr_policy, cfg.precision) == (2, 0, 1, "constant", "fp32")
    assert snapshots(run.checkpoints) == [100]

    session = build_session(cfg, run, CPU, resume=True)
    assert load_snapshot(run.checkpoints, session.trainer) == 100
    for name, net in session.trainer.networks().items():
        assert_same_tensors(net.state_dict(), original.networks()[name].state_dict())
    for name, optimizer in session.trainer.optimizers().items():
        ours, theirs = optimizer.state_dict(), original.optimizers()[name].state_dict()
        assert ours["state"].keys() == theirs["state"].keys()
        for number, values in ours["state"].items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][number][key]))

    before = copy_of(session.trainer.gen)
    load_script("train").train(session, resume="last")
    assert "100 of 103" in caplog.text
    assert snapshots(run.checkpoints) == [100, 102, 103]
    after = session.trainer.gen.state_dict()
    assert not torch.equal(before["mlp_w1.model.0.fc.weight"], after["mlp_w1.model.0.fc.weight"])
    # The published files are as they were.
    for path in (source / "outputs" / "E" / "checkpoints").iterdir():
        assert path.read_bytes() == (run.checkpoints / path.name).read_bytes()


def test_a_folder_of_the_release_is_evaluated_as_it_is(released: tuple[Path, DGNetTrainer]) -> None:
    folder, original = released
    run = open_run(str(folder), "E")
    for which in (None, "last", "100"):
        tested = load_run_for_test(run, which, CPU)
        assert (tested.iteration, tested.size) == (100, (64, 32))
        assert not tested.net.training
        assert_same_tensors(tested.net.state_dict(), original.id_net.state_dict())
    assert tested.net.model.layer4[0].conv1.stride == (2, 2)
    gen = load_generator(run, run_config(run), 100, tested.net.code_dim, CPU)
    assert_same_tensors(gen.state_dict(), original.gen.state_dict())
    with pytest.raises(UserError, match="--which_epoch 7: no such snapshot; there are 100"):
        pick_epoch(run, "7")


def test_a_published_teacher_is_read(tmp_path: Path) -> None:
    """The release's opts.yaml has no key of ours but the stride."""
    folder = tmp_path / "models" / "best"
    folder.mkdir(parents=True)
    net = build_teacher(5, stride=1)
    torch.save(net.state_dict(), folder / "net_last.pth")
    (folder / "opts.yaml").write_text("PCB: false\nbatchsize: 8\nnclasses: 5\nstride: 1\nwarm_epoch: 5\n")
    loaded = load_teacher("best", tmp_path, 5)
    assert_same_tensors(loaded.state_dict(), net.state_dict())
    assert loaded.model.layer4[0].conv2.stride == (1, 1) and not loaded.training
    (folder / "opts.yaml").write_text("nclasses: 5\n")
    assert load_teacher("best", tmp_path).model.layer4[0].conv2.stride == (2, 2)
    with pytest.raises(UserError, match="knows 5 identities, the data 8"):
        load_teacher("best", tmp_path, 8)
    assert load_teacher_for_test(open_run(str(tmp_path), "best"), CPU).size == (256, 128)


# ------------------------------------------------------------------------------------- strict reading
def copy_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def small_id_net(classes: int = 4) -> nn.Module:
    return build_id_net("AB", classes, backbone="resnet10w8")


def test_known_extras_are_let_through_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    gen = Generator(code_dim=256, **tiny_config().gen.model_dump())
    state = copy_of(gen)
    block = "dec.model.1.model.0.model.0.nonloc"
    extras = {f"{block}.{name}": torch.ones(2) for name in ("gamma", "query_conv.weight", "key_conv.weight")}
    load_network(gen, state | extras, Path("gen.pt"))
    (note,) = caplog.messages
    assert "gen.pt" in note and block in note
    assert_same_tensors(gen.state_dict(), state)
    load_network(gen, state, Path("gen.pt"))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("fc", ["absent", "larger", "extra"])
def test_the_unused_fc_may_be_anything(fc: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    state = copy_of(small_id_net())
    if fc == "absent":
        del state["model.fc.weight"], state["model.fc.bias"]
    elif fc == "larger":
        state["model.fc.weight"], state["model.fc.bias"] = torch.ones(1000, 32), torch.ones(1000)
    else:
        state["model.fc.add_block.0.weight"] = torch.ones(3)
    net = small_id_net()
    load_network(net, state, Path("id.pt"))
    assert len(caplog.messages) == (1 if fc == "extra" else 0)
    for name, value in net.state_dict().items():
        assert name.startswith("model.fc.") or torch.equal(value, state[name]), name


def test_every_other_difference_is_refused() -> None:
    state = copy_of(small_id_net())
    missing = {name: value for name, value in state.items() if name != "model.layer2.0.conv1.weight"}
    with pytest.raises(UserError, match="id.pt.* model.layer2.0.conv1.weight"):
        load_network(small_id_net(), missing, Path("id.pt"))
    with pytest.raises(UserError, match="unexpected classifier3.weight"):
        load_network(small_id_net(), state | {"classifier3.weight": torch.ones(1)}, Path("id.pt"))
    with pytest.raises(UserError, match="model.conv1.weight"):
        load_network(small_id_net(), state | {"model.conv1.weight": torch.ones(2, 3, 7, 7)}, Path("id.pt"))
    for other in ({"a": 3}, [1, 2], {"a": state}):
        with pytest.raises(UserError, match="not a state_dict of tensors"):
            load_network(small_id_net(), other, Path("id.pt"))


def test_another_number_of_classes_is_said_in_words() -> None:
    with pytest.raises(UserError, match="id.pt: made for 751 identities, but ID_class is 702"):
        load_network(small_id_net(702), small_id_net(751).state_dict(), Path("id.pt"))
    cfg = tiny_config(ID_class=751, data_root="x")
    images = type("Images", (), {"num_classes": 702})
    with pytest.raises(UserError, match="ID_class is 751, but x has 702 identities"):
        num_classes(cfg, images)
    assert num_classes(tiny_config(ID_class="auto"), images) == 702


# --------------------------------------------------------------------------------------- snapshots
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def two_snapshots(tmp_path: Path) -> tuple[Path, DGNetTrainer]:
    trainer = tiny_trainer(tiny_config())
    for iteration in (1, 2):
        trainer.step(*random_batches(trainer.cfg), iteration)
        save_snapshot(tmp_path, trainer, iteration)
    return tmp_path, trainer


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def place(folder: Path, iteration: int, name: str) -> Path:
    return folder / f"{iteration:08d}" / name


@pytest.mark.parametrize("harm", [flip_a_bit, cut, Path.unlink], ids=["one bit", "cut", "gone"])
@pytest.mark.parametrize("name", ["gen.pt", "id.pt", "state.pt", "manifest.json"])
def test_damage_is_noticed_before_anything_is_loaded(
    two_snapshots: tuple[Path, DGNetTrainer], name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder, trainer = two_snapshots
    if name == "manifest.json" and harm is flip_a_bit:
        harm = lambda path: path.write_text(path.read_text().replace('"iteration": 2', '"iteration": 3'))  # noqa: E731
    harm(place(folder, 2, name))
    before = copy_of(trainer.gen)
    with pytest.raises(UserError, match=f"{name}.*--resume auto.* 1$") as error:
        load_snapshot(folder, trainer)
    assert "\n" not in str(error.value)
    assert_same_tensors(trainer.gen.state_dict(), before)
    assert load_snapshot(folder, trainer, fall_back=True) == 1
    (warning,) = caplog.messages
    assert name in warning
    assert load_snapshot(folder, trainer, 1) == 1


def test_a_manifest_may_hold_anything(two_snapshots: tuple[Path, DGNetTrainer]) -> None:
    folder, trainer = two_snapshots
    manifest = place(folder, 2, "manifest.json")
    whole = json.loads(manifest.read_text())
    contents = [json.dumps(c).encode() for c in ([], {}, whole | dict(iteration=1), whole | dict(config=[]))]
    for content in [*contents, b"", b"\xff\xfe", b"[" * 100_000]:
        manifest.write_bytes(content)
        with pytest.raises(UserError, match="manifest.json"):
            load_snapshot(folder, trainer)


def test_old_snapshots_make_room(two_snapshots: tuple[Path, DGNetTrainer]) -> None:
    folder, trainer = two_snapshots
    for i in range(3, 9):
        save_snapshot(folder, trainer, i)
    (folder / "gen_00000000.pt").write_text("not ours")
    prune_snapshots(folder, 7, keep_last=0, keep_every=0)
    assert snapshots(folder) == list(range(1, 9))
    prune_snapshots(folder, 7, keep_last=2, keep_every=4)
    # 8 is newer than the newest, which a run that fell back to an earlier snapshot will reach again.
    assert snapshots(folder) == [4, 6, 7, 8]
    assert sorted(path.name for path in folder.iterdir()) == [*(f"0000000{i}" for i in (4, 6, 7, 8)), "gen_00000000.pt"]


def test_the_rest_of_an_interrupted_writing_is_removed(two_snapshots: tuple[Path, DGNetTrainer]) -> None:
    folder, trainer = two_snapshots
    save_snapshot(folder, trainer, 3)
    (folder / "00000003").rename(folder / "00000003.part")
    assert snapshots(folder) == [1, 2]
    remove_parts(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]
    save_snapshot(folder, trainer, 2)  # again, as after falling back from a damaged one
    assert load_snapshot(folder, trainer) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]


@pytest.mark.parametrize("file", [1, 3, 5])
def test_a_snapshot_that_cannot_be_written_leaves_nothing(
    two_snapshots: tuple[Path, DGNetTrainer], file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full from the file-th writing on; the fifth is the manifest."""
    folder, trainer = two_snapshots
    left, sync = iter(range(1, 9)), os.fsync

    def full(handle: int) -> None:
        if next(left) >= file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr("runs.snapshot.sync_folder", lambda folder: None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written"):
        save_snapshot(folder, trainer, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]
    assert load_snapshot(folder, trainer) == 2


def test_evaluation_offers_the_snapshot_before_a_damaged_one(tmp_path: Path) -> None:
    cfg = tiny_config()
    run = open_run(str(tmp_path), "run")
    start_folder(run, cfg, resume=False)
    trainer = tiny_trainer(cfg)
    for iteration in (1, 2):
        save_snapshot(run.checkpoints, trainer, iteration)
    cut(place(run.checkpoints, 2, "id.pt"))
    with pytest.raises(UserError, match="id.pt: damaged.*--which_epoch 1$"):
        load_run_for_test(run, None, CPU)
    assert load_run_for_test(run, "1", CPU).iteration == 1
    # The release's files have no manifest to compare them with.
    torch.save({"a": torch.ones(3)}, run.checkpoints / "id_00000003.pt")
    with pytest.raises(UserError, match="id_00000003.pt"):
        load_run_for_test(run, "3", CPU)


def test_a_snapshot_restores_everything(two_snapshots: tuple[Path, DGNetTrainer]) -> None:
    folder, trainer = two_snapshots
    resumed = tiny_trainer(tiny_config(seed=5, lr_g=0.5))
    assert load_snapshot(folder, resumed) == 2
    for name, net in trainer.networks().items():
        assert_same_tensors(resumed.networks()[name].state_dict(), net.state_dict())
    states = read_tensors(place(folder, 2, "state.pt"))
    load_snapshot(folder, resumed)
    assert torch.equal(torch.get_rng_state(), states["rng"])
    # Rates, decay and momenta are the config's, not the file's: a run may continue with others.
    assert resumed.opt_gen.param_groups[0]["initial_lr"] == 0.5
    resumed = tiny_trainer(tiny_config(beta1=0.9, weight_decay=0.25))
    load_snapshot(folder, resumed)
    for optimizer in resumed.optimizers().values():
        assert all(group["weight_decay"] == 0.25 and group["fused"] for group in optimizer.param_groups)
    assert resumed.opt_gen.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_snapshot_of_other_networks_is_refused_in_words(two_snapshots: tuple[Path, DGNetTrainer]) -> None:
    folder, _ = two_snapshots
    with pytest.raises(UserError, match="4 identities.*ID_class is 9"):
        load_snapshot(folder, tiny_trainer(tiny_config(), classes=9))
    with pytest.raises(UserError, match="config"):
        load_snapshot(folder, tiny_trainer(tiny_config(gen=dict(mlp_dim=8))))
    with pytest.raises(UserError, match="iteration 7.*1, 2"):
        load_snapshot(folder, tiny_trainer(tiny_config()), 7)


def test_export_and_back(two_snapshots: tuple[Path, DGNetTrainer], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, trainer = two_snapshots
    out = tmp_path_factory.mktemp("export") / "checkpoints"
    assert export(folder, out) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "dis_00000002.pt",
        "gen_00000002.pt",
        "id_00000002.pt",
        "optimizer.pt",
    ]
    for name, net in trainer.networks().items():
        content = read_tensors(out / f"{name}_00000002.pt")
        assert list(content) == ["a"]
        assert_same_tensors(content["a"], net.state_dict())
        assert list(content["a"]) == list(net.state_dict())
    back = tiny_trainer(tiny_config(seed=4))
    assert load_snapshot(out, back) == 2
    for name, optimizer in trainer.optimizers().items():
        ours, theirs = optimizer.state_dict()["state"], back.optimizers()[name].state_dict()["state"]
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for number in ours:
            assert_same_tensors(*({k: torch.as_tensor(v) for k, v in s[number].items()} for s in (ours, theirs)))
    with pytest.raises(UserError, match="exists"):
        export(folder, out)
    assert export(folder, out.parent / "first", 1) == 1
    with pytest.raises(UserError, match="1, 2"):
        export(folder, out.parent / "second", 7)


# ------------------------------------------------------------------------------------ atomic writing
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["bare", "wrapped"])
def test_prefixes_of_other_tools_are_taken_off(tmp_path: Path, caplog: Any, prefix: str, wrap: Callable) -> None:
    net = build_teacher(4, backbone="resnet10w8")
    folder = tmp_path / "models" / "best"
    folder.mkdir(parents=True)
    torch.save(wrap({f"{prefix}{name}": v for name, v in net.state_dict().items()}), folder / "net_last.pth")
    (folder / "opts.yaml").write_text("backbone: resnet10w8")
    assert_same_tensors(load_teacher("best", tmp_path).state_dict(), net.state_dict())
    assert all(part in caplog.text for part in prefix.split("."))


def test_a_prefix_that_hides_a_second_tensor_is_refused() -> None:
    with pytest.raises(UserError, match="module"):
        plain_names({"a": torch.zeros(1), "module.a": torch.ones(1)}, Path("both.pth"))


def test_a_pickled_model_is_named_as_such(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"state_dict\(\)") as raised:
        read_tensors(tmp_path / "whole.pth")
    assert str(raised.value).isprintable()


# ------------------------------------------------------------------------------------- exact resuming
# ------------------------------------------------------------------------------------------- building
def test_the_id_net_may_start_from_the_teacher(tmp_path: Path) -> None:
    cfg = tiny_config(id_init="teacher", teacher="T", teacher_style=2)
    teacher = TeacherTrainer(tiny_teacher_config(), 4, CPU, steps_per_epoch=1).net
    save_teacher(open_run(str(tmp_path), "T"), tiny_teacher_config(), teacher, 4)

    def build(cfg: DGNetConfig, *, initialise: bool) -> DGNetTrainer:
        torch.manual_seed(1)
        return build_trainer(cfg, 4, CPU, output_path=tmp_path, steps_per_epoch=1, initialise=initialise)

    expected = {name: v for name, v in teacher.state_dict().items() if name.startswith("model.")}
    net = build(cfg, initialise=True).id_net
    assert_same_tensors({f"model.{name}": v for name, v in net.model.state_dict().items()}, expected)
    for head in net.heads():
        assert_same_tensors(head.state_dict(), teacher.heads()[0].state_dict())
    resumed = build(cfg, initialise=False).id_net.state_dict()
    assert not torch.equal(resumed["model.conv1.weight"], expected["model.conv1.weight"])
    wider = cfg.model_copy(update=dict(backbone="resnet10w16", gen=cfg.gen.model_copy(update=dict(id_dim=128))))
    with pytest.raises(UserError, match="id_init.* T .*resnet10w16"):
        build(wider, initialise=True)
