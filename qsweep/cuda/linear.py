"""Products of integer matrices: static, dynamic per token, and with weights of 4 bits."""

from __future__ import annotations

from torch import Tensor

from qsweep.cuda.arithmetic import Requantize, Residual, Tile


def pack_weight(weight: Tensor) -> Tensor:
    """Weights int8 (N, K) as `linear` reads them: int8 (N, KP), KP = K rounded up to 16, zeros past K."""
    raise NotImplementedError


def linear(
    x: Tensor,
    weight: Tensor,
    requantize: Requantize,
    out: Tensor,
    *,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Write the product of `x` and the weights' transpose into `out`, and return it.

    `x`: int8 (M, K or KP), any row stride; columns past K may hold anything. `weight`: from `pack_weight`. `out`: int8
    where `requantize.output` is given, else float32, (M, N), any row stride. Loads take 16 bytes where the row stride
    of `x` is a multiple of 16.
    """
    raise NotImplementedError


def linear_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Write x @ (weight * weight_scale).T + bias into `out`, each row of `x` on a symmetric int8 grid of its own.

    `x`: float32, bfloat16 or float16 (M, K), any row stride. `weight`: from `pack_weight`. `weight_scale`, `bias`:
    float32 (N,). `out`: (M, N), float32, bfloat16 or float16, any row stride. The sums are exact; in float32, in this
    order: f32(sum) * row_scale * weight_scale + bias. Rows: see `quantize_rows`.
    """
    raise NotImplementedError


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers int8 (M, KP), zeros past K, and scales float32 (M,), of float rows (M, K).

    scale = max|x| / 127, q = round(x * (1 / scale)) within +-127. Rows whose scale would be under 2^-102 become all 0
    with scale 1 (their inverse would overflow); a NaN or infinity in a row makes its scale NaN, and so its results.
    """
    raise NotImplementedError


def pack_weight4(weight: Tensor) -> Tensor:
    """Weights in [-8, 7], int8 (N, K), as `linear_w4` reads them: two a byte, int8 (N, KP/2), KP a multiple of 32.

    Byte j holds column j in its lower half and column j + KP/2 in its upper.
    """
    raise NotImplementedError


def linear_w4(
    x: Tensor,
    weight: Tensor,
    requantize: Requantize,
    out: Tensor,
    *,
    residual: Residual | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As `linear`, weights from `pack_weight4`, unpacked in the kernel."""
    raise NotImplementedError


def linear_w4_float(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Write x @ (weight * weight_scale).T + bias into `out`: weights from `pack_weight4`, activations in float.

    For sizes bound by reading the weights. `x`: bfloat16, float16 or float32 (M, K), any row stride; `weight_scale`,
    `bias`: float32 (N,); `out`: (M, N) in any of these types. Products in the type of `x`, sums in float32: not exact.
    """
    raise NotImplementedError
