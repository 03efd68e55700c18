"""Backbones of timm: a convolutional and a transformer one, through training, resuming, evaluation and export."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from conftest import CPU, HEIGHT, TINY_DGNET, TINY_TEACHER, WIDTH, Outcome, contents, merged

from backbones import build_trunk, trunk_channels, trunk_map
from data.folders import read_split
from data.images import decode_images, normalise
from parallel.layers import require_plain_norms
from reid_eval.features import embed_images
from reIDmodel import build_id_net
from runs.folder import RunFolder
from runs.load import load_run_for_test
from runs.weights import load_imagenet
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("timm/test_resnet", "timm/test_vit")


@pytest.mark.parametrize("stride", [1, 2])
def test_the_resnet50_of_timm_is_that_of_torchvision(stride: int) -> None:
    ours, theirs = (build_trunk(name, last_stride=stride).eval() for name in ("resnet50", "timm/resnet50"))
    state = {name: v for name, v in ours.state_dict().items() if not name.startswith("fc.")}
    theirs.net.load_state_dict(state)
    x = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(trunk_map(theirs, x), trunk_map(ours, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_map_keeps_the_places(name: str) -> None:
    trunk = build_trunk(name, last_stride=2).eval()
    m = trunk_map(trunk, torch.randn(2, 3, 128, 64))
    assert m.shape[:2] == (2, trunk_channels(trunk)) and m.shape[2] == 2 * m.shape[3]
    # What is changed at the top of the picture changes the map most at the top.
    x = torch.zeros(1, 3, 128, 64)
    y = x.clone()
    y[:, :, :16] = torch.randn(3, 16, 64)
    change = (trunk_map(trunk, y) - trunk_map(trunk, x)).abs().sum((0, 1, 3))
    assert change.argmax() == 0


def test_pictures_come_as_the_weights_expect_them() -> None:
    trunk = build_trunk("timm/vit_tiny_patch16_224", last_stride=2)  # of mean and deviation 0.5
    pixels = torch.rand(1, 3, 8, 8)
    x = torchvision.transforms.functional.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(x * trunk.scale + trunk.shift, (pixels - 0.5) / 0.5)


def test_weights_come_from_a_file_or_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_resnet", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    trunk = build_trunk("timm/test_resnet", last_stride=2)
    load_imagenet(trunk, "timm/test_resnet", str(tmp_path / "weights.pth"))
    x = torch.randn(1, 3, 64, 32)
    expected = source.eval().forward_features(x * trunk.scale + trunk.shift)
    torch.testing.assert_close(trunk.eval()(x), expected)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        load_imagenet(trunk, "timm/test_resnet", str(tmp_path / "other.pth"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--backbone-weights"):
        load_imagenet(trunk, "timm/test_resnet", None)


@pytest.mark.parametrize("name", ["timm/efficientnet_b0", "timm/ghostnet_050", "timm/swin_tiny_patch4_window7_224"])
def test_channels_are_those_of_the_map(name: str) -> None:
    trunk = build_trunk(name, last_stride=2).train()
    x = torch.randn(2, 3, 128, 64)
    assert trunk(x).shape[1] == trunk_channels(trunk)
    assert not any(getattr(module, "drop_prob", 0) for module in trunk.modules())


def test_norms_with_an_activation_inside_are_not_replaced() -> None:
    with pytest.raises(UserError, match="sync_bn"):
        require_plain_norms(build_trunk("timm/efficientnet_b0", last_stride=2))
    require_plain_norms(build_trunk("timm/test_resnet", last_stride=2))


@pytest.mark.parametrize(
    "name,stride,what",
    [
        ("timm/resnet5", 2, "resnet50"),
        ("timm/zzz", 2, "zzz"),
        ("timm/resnet50.bogus", 2, "bogus"),
        *((f"timm/{name}", 1, "stride") for name in ("test_vit", "resnetaa50", "skresnet50", "res2net50_26w_4s")),
    ],
)
def test_what_timm_does_not_have_is_refused(name: str, stride: int, what: str) -> None:
    with pytest.raises(UserError, match=what):
        build_trunk(name, last_stride=stride)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_trunk("timm/resnet50", last_stride=2)


def test_a_network_of_another_size_is_refused(tiny_data: Path, tmp_path: Path, script: Callable[..., Outcome]) -> None:
    config = TINY_TEACHER | dict(data_root=str(tiny_data), backbone="timm/vit_small_patch14_dinov2")
    (tmp_path / "dino.yaml").write_text(yaml.safe_dump(config))
    outcome = script("train", "--config", tmp_path / "dino.yaml", "--output_path", tmp_path)
    assert "vit_small_patch14_dinov2" in outcome.error and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", [pytest.param(KINDS[0], marks=pytest.mark.slow), KINDS[1]])
def test_a_whole_run(name: str, tiny_data: Path, tmp_path: Path, script: Callable[..., Outcome]) -> None:
    code = build_id_net("AB", 2, backbone=name, stride=2).code_dim
    common = dict(data_root=str(tiny_data), backbone=name)
    dgnet = merged(TINY_DGNET, common | dict(teacher="tutor", ID_stride=2, max_iter=4, snapshot_save_iter=2))
    dgnet |= dict(warm_teacher_iter=0, warm_iter=1)
    dgnet["gen"] = dgnet["gen"] | dict(id_dim=code // 4)
    teacher = TINY_TEACHER | common | dict(epochs=1, warm_epochs=0)
    where = "--output_path", tmp_path, "--threads", 1
    for key, config in (("tutor", teacher), ("pupil", dgnet), ("wrong", merged(dgnet, dict(gen=dict(id_dim=7))))):
        (tmp_path / f"{key}.yaml").write_text(yaml.safe_dump(config))
        outcome = script("train", "--config", tmp_path / f"{key}.yaml", "--name", key, *where)
        if key == "wrong":
            assert f"gen.id_dim to {code // 4}" in outcome.error
        else:
            assert outcome.code == 0, outcome.err
    checkpoints = tmp_path / "outputs" / "pupil" / "checkpoints"
    whole = contents(checkpoints / "00000004")
    shutil.rmtree(checkpoints / "00000004")
    assert script("train", "--resume", "--name", "pupil", *where).code == 0
    tensors = ("gen.pt", "id.pt", "dis.pt", "state.pt")
    assert {n: contents(checkpoints / "00000004")[n] for n in tensors} == {n: whole[n] for n in tensors}

    for which in (("--teacher", "tutor"), ("--name", "pupil")):
        assert script("test", *which, *where).code == 0
    image = read_split(tiny_data, "query").paths[0]
    figure = script(
        "visual_tools/show_activation", "--name", "pupil", "--input", image, "--out", tmp_path / "a.png", *where
    )
    assert figure.code == 0 and (tmp_path / "a.png").is_file(), figure.err
    assert script("export", "--name", "pupil", "--out", tmp_path / "files", *where).code == 0
    pixels = decode_images([image], HEIGHT, WIDTH)
    session = onnxruntime.InferenceSession(tmp_path / "files" / "id.onnx")
    features = session.run(["features"], {"images": pixels.permute(0, 2, 3, 1).numpy()})[0]
    expected = embed_images(load_run_for_test(RunFolder(tmp_path, "pupil"), None, CPU).net, normalise(pixels))
    assert np.abs(features - expected.numpy()).max() < 1e-5
