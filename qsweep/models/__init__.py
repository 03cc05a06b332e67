"""The architectures that ship with qsweep, by name; weights come from safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qsweep.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

Arch = Literal[
    "digits_cnn",
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet26",
    "resnet32",
    "resnet38",
    "resnet44",
    "resnet56",
    "resnet110",
]
ARCHS: tuple[str, ...] = get_args(Arch)

__all__ = ["ARCHS", "Arch", "build", "check_checkpoint", "load_checkpoint"]


def build(arch: Arch, classes: int, channels: int) -> nn.Module:
    """A new `arch` with random weights: float32 images (B, `channels`, H, W) to logits (B, `classes`)."""
    if arch == "digits_cnn":
        from qsweep.models.digits_cnn import DigitsCNN

        return DigitsCNN(classes, channels)
    from qsweep.models.resnet import ResNet

    return ResNet(int(arch.removeprefix("resnet")), classes, channels)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Give `model` the weights of a safetensors file, whose keys and shapes must be the model's.

    Counters of batch norm (`num_batches_tracked`) may be missing. Raises DataError naming the file and what
    does not fit.
    """
    found = _read(path)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    if missing or unexpected:
        raise DataError(
            f"`{path}`: its keys must be the model's (missing: {_few(missing)}; unexpected: {_few(unexpected)})"
        )
    for name, value in found.items():
        if value.shape != wanted[name]:
            raise DataError(f"`{path}`: `{name}` must have shape {list(wanted[name])} (got {list(value.shape)})")
        if value.is_floating_point() and not value.isfinite().all():
            raise DataError(f"`{path}`: `{name}` must hold finite numbers (it holds NaN or infinity)")
    model.load_state_dict(found, strict=False)


def check_checkpoint(path: Path) -> None:
    """Raises DataError where `path` is no safetensors file, without reading more than its header, or PyTorch."""
    from safetensors import safe_open

    with _as_data_errors(path), safe_open(path, framework="numpy"):
        pass


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _as_data_errors(path):
        return load_file(path)


@contextmanager
def _as_data_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise DataError(f"`{path}`: there is no such checkpoint") from None
    except (SafetensorError, OSError) as error:
        how = "; `safetensors.torch.save_file` writes one from a `state_dict()`"
        raise DataError(f"`{path}`: must be a whole safetensors file ({error}){how}") from None


def _few(names: list[str], count: int = 5) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:count]) or "none"
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
