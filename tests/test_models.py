from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsweep.errors import DataError
from qsweep.models import ARCHS, build, load_checkpoint


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_maps_images_of_any_channels_to_logits(arch: str) -> None:
    model = build(arch, classes=7, channels=2).eval()  # type: ignore[arg-type]
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("resnet")])
def test_a_resnet_has_as_many_layers_as_its_name_says(arch: str) -> None:
    layers = [m for m in build(arch, 10, 3).modules() if isinstance(m, nn.Conv2d | nn.Linear)]  # type: ignore[arg-type]
    assert len(layers) == int(arch.removeprefix("resnet"))


def test_the_shortcut_of_a_widening_block_is_every_other_pixel_between_zero_channels() -> None:
    block = build("resnet20", 10, 3).get_submodule("layer2.0").eval()
    nn.init.zeros_(block.get_parameter("conv2.weight"))
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_the_digits_network_stays_small() -> None:
    assert 20_000 <= sum(parameter.numel() for parameter in build("digits_cnn", 10, 1).parameters()) <= 60_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(build("digits_cnn", 10, 1).state_dict(), path)
    return path


def rewrite(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_a_checkpoint_gives_the_model_its_weights(checkpoint: Path) -> None:
    model = build("digits_cnn", 10, 1)
    load_checkpoint(model, checkpoint)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(checkpoint).items())


def test_a_checkpoint_may_lack_the_counters_of_batch_norm(checkpoint: Path) -> None:
    rewrite(checkpoint, stem__bn__num_batches_tracked=None)
    load_checkpoint(build("digits_cnn", 10, 1), checkpoint)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"linear__weight": None}, "missing: `linear.weight`"),
        ({"head__weight": torch.zeros(1)}, "unexpected: `head.weight`"),
        ({"linear__weight": torch.zeros(3, 48)}, r"`linear.weight` must have shape \[10, 48\] \(got \[3, 48\]\)"),
        ({"linear__bias": torch.full((10,), torch.nan)}, "`linear.bias` must hold finite numbers"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    checkpoint: Path, changes: dict[str, Tensor | None], complaint: str
) -> None:
    rewrite(checkpoint, **changes)
    with pytest.raises(DataError, match=complaint) as raised:
        load_checkpoint(build("digits_cnn", 10, 1), checkpoint)
    assert str(checkpoint) in str(raised.value)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_truncated_checkpoint_is_refused_by_name(checkpoint: Path, size: int) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(
        DataError, match=r"must be a whole safetensors file .*; `safetensors.torch.save_file` writes one"
    ):
        load_checkpoint(build("digits_cnn", 10, 1), checkpoint)


def test_a_missing_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such checkpoint"):
        load_checkpoint(build("digits_cnn", 10, 1), tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet56_cifar10", "resnet20_cifar10_jpeg"])
def test_published_checkpoints_fit(data: Path, name: str) -> None:
    load_checkpoint(build(name.split("_")[0], 10, 3), data / "checkpoints" / f"{name}.safetensors")  # type: ignore[arg-type]


def test_configs_and_names_do_not_import_torch() -> None:
    code = "import sys, qsweep.models, qsweep.tasks, qsweep.prune, qsweep.distill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
