from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from qsweep.config import Listed
from qsweep.errors import Refused
from qsweep.stage import Context, Stage

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import Layer, QuantizedModel

NO_LAYER = "the model must have a convolution or a linear with a fixed weight to quantize (it has none)"
Scheme = Literal["symmetric", "asymmetric"]
Calibration = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]


def _eight_or_sixteen(bits: int) -> int:
    if 8 < bits < 16:
        raise ValueError("must be 2 to 8, or 16")
    return bits


Bits = Annotated[int, Field(ge=2, le=16), AfterValidator(_eight_or_sixteen)]


class Quantization(Stage):
    """Makes the hub form: a graph whose weights and activations lie on grids."""

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        """Return the hub form of `model`, which is not changed.

        Weights are (C, ...), C the output channels; activations (B, ...), B samples of the task as the model takes
        them. Raises Refused for what does not fit the model (a pattern that matches no layer, a budget too small),
        NotFinite for weights, activations, losses and scores that are NaN or infinite, DataError where there are no
        training samples to look at, ExportFailure for a model that cannot be traced.
        """

    @property
    def not_integer(self) -> str | None:
        """Why integer kernels cannot compute it, or None."""
        return None

    @property
    def in_float(self) -> bool:
        """Whether arithmetic in floating point is what it is for: weights are made smaller, activations are not."""
        return False

    @property
    def weights_alone(self) -> bool:
        """Whether weights are put on equally spaced levels and nothing else is."""
        return False


class LowBit(Quantization):
    """Stores weights in few bits."""

    edge_bits: Annotated[int, Field(ge=8, le=8)] | None = None
    """Bits of the first and the last layer, where they are to have more: weights and, where they are quantized, the
    activations they read."""
    embedding_bits: Annotated[int, Field(ge=2, le=8)] | None = 8
    """Of the tables of embeddings: symmetric integers with a scale for each row. A table that is a layer's weight, too,
    is stored as that. null: they stay in floating point."""
    float_layers: Listed[tuple[str, ...]] = ()
    """Layers that stay in floating point, by patterns of the names of their weights, such as `[front.*, head.weight]`,
    those of LSTMs and GRUs, too, with sums, pools and functions of what they alone give, or alone read: a spectrogram
    in the model, a last layer. Each pattern must match a layer."""

    def canonical(self) -> Self:
        return super().canonical().model_copy(update={"float_layers": tuple(sorted(set(self.float_layers)))})

    def stays_float(self, layer: str) -> bool:
        """Whether the layer with the weight named `layer` is left as it is."""
        return any(fnmatchcase(layer, pattern) for pattern in self.float_layers)

    def check(self, context: Context) -> None:
        from qsweep.hub.export import quantizable_graph

        graph = quantizable_graph(context.original(), context)
        self.check_layers(graph.layers(), graph.recurrent_weights)

    def check_layers(self, layers: Sequence[Layer], recurrent: Sequence[str]) -> None:
        """Raises Refused for a model without layers to quantize, and for a pattern that matches none of these and none
        of the weights of recurrent layers."""
        if not layers:
            raise Refused(NO_LAYER)
        names = [layer.name for layer in layers]
        self._check_patterns("float_layers", self.float_layers, [*names, *recurrent])
        if all(map(self.stays_float, names)):
            raise Refused("`float_layers`: must leave a layer to quantize (it matches all)")

    def _check_patterns(self, field: str, patterns: Iterable[str], names: Sequence[str]) -> None:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = ", ".join(names)
                raise Refused(f"`{field}`: `{pattern}` must match the weight of a layer (there are: {known})")

    def _label_of_layers(self) -> list[str]:
        tables = [] if self.embedding_bits == 8 else [f"emb{self.embedding_bits or 32}"]
        return tables + ([f"float{len(self.float_layers)}"] if self.float_layers else [])


class Grids(LowBit):
    """Equally spaced levels: q = clamp(round(x / scale) + zero_point, low, high), half to even.

    Integer kernels take symmetric weights, per channel or tensor, of 8 bits at most. Scales are float32, those of
    groups 16-bit floats where these hold them; zero points are integers on the grid, so that 0 is exact (Jacob et al.
    2018, section 2.1).
    """

    modes: ClassVar[tuple[str, ...]] = ("static",)
    """What `activation_mode` may be."""
    weight_scheme: Scheme = "symmetric"
    """Symmetric levels are as many below zero as above, 2^bits - 1 of them; asymmetric ones fit both ends."""
    weight_granularity: Literal["channel", "tensor"] = "channel"
    """What shares a scale: an output channel or the whole tensor."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Scales for groups of so many weights of an output channel, in storage order; it must divide their number in some
    layer. A layer it does not divide keeps one scale a channel. Scales of groups take 16 bits each; where a weight has
    some that float16 cannot hold, and with weights of 16 bits, they take 32."""
    weight_range: Literal["minmax", "mse"] = "minmax"
    """What the scale is fitted to: the largest weight, or the least squared error of the rounding (Nagel et al. 2021,
    section 3.1)."""
    activation_bits: Bits | None = 8
    """Of what convolutions and linears read; what only others read (sums, gates, pools) has 8 at least. null:
    activations stay in floating point, only weights are quantized."""
    activation_scheme: Scheme = "asymmetric"
    """Symmetric fixes zero at the middle of the grid (at its lower end for tensors that are never negative, such as a
    ReLU's output); asymmetric fits the grid to the range seen."""
    sum_grid: Literal["shared", "own"] = "shared"
    """What sums, gates and pools read of a value that layers read in less than 8 bits. shared: the bits of the layers.
    own: 8 bits, which the layers round again; the shortcuts of a residual network keep their precision, for one more
    pass over each (in training: one more fake quantizer). Tells most at 2 and 3 bits."""
    activation_mode: Literal["static", "dynamic", "token"] = "static"
    """static: ranges are fixed by calibration. dynamic: each batch sets the range of what convolutions and linears
    read, so that samples of one batch share it and a result depends on its batch; sums and pools stay in floating
    point, and there is no calibration. token: as dynamic, but each row that a linear reads (a token of a transformer)
    sets a symmetric range of its own, so that no result depends on others; convolutions read floating point. Trainings
    take static and, but for `pact`, token. Counts where `activation_bits` is not null."""
    layer_bits: dict[str, Bits] = {}
    """Bits of the weights of some layers, by a pattern of their names, such as `layer1.*: 6`; of several patterns that
    match, the longest counts. Goes before `edge_bits`. Each pattern must match a layer."""
    calibration: Calibration = "minmax"
    """How ranges follow from what calibration saw. minmax: the extremes. moving_average: means of the batches'
    extremes, later ones weighing more (Jacob et al. 2018, section 3.1). percentile: the range of 99.99 % of the values
    (McKinstry et al. 2018). entropy: the range that keeps most of their distribution, by Kullback-Leibler divergence
    (Migacz, "8-bit Inference with TensorRT", 2017). mse: the range that rounds and clips with the least squared error
    (Nagel et al. 2021, section 3.1). The last two need levels of 8 bits at most and are minmax for 16."""
    calibration_samples: Annotated[int, Field(ge=1)] = 512
    """Training samples whose activations set the ranges."""
    calibration_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of their draw; null: the sweep's."""

    @model_validator(mode="after")
    def _one_granularity(self) -> Grids:
        if self.group_size is not None and self.weight_granularity == "tensor":
            raise ValueError("`group_size` must be null where `weight_granularity` is `tensor`")
        return self

    @model_validator(mode="after")
    def _a_mode_of_the_method(self) -> Grids:
        if self.activation_mode not in self.modes:
            known = " or ".join(f"`{mode}`" for mode in self.modes)
            raise ValueError(f"`activation_mode` must be {known} for this method")
        return self

    @property
    def looks_at_samples(self) -> bool:
        """Whether the calibration samples change anything."""
        return self.activation_bits is not None and self.activation_mode == "static"

    def canonical(self) -> Self:
        narrow = self.activation_bits is not None and self.activation_bits < 8 and self.activation_mode == "static"
        idle = [] if narrow else ["sum_grid"]
        if self.activation_bits == 16 and not self.edge_bits and self.calibration in ("minmax", "entropy", "mse"):
            idle.append("calibration")  # levels too fine for the last two
        idle += [] if self.looks_at_samples else ["calibration_samples", "calibration_seed"]
        if self.activation_bits is None:
            idle += ["activation_scheme", "activation_mode", "calibration"]
        elif self.activation_mode != "static":
            idle += ["calibration"] if self.activation_mode == "dynamic" else ["calibration", "activation_scheme"]
        return super().canonical().with_defaults(*idle)

    @property
    def not_integer(self) -> str | None:
        if self.activation_bits is None:
            return "only weights are quantized (`activation_bits: null`)"
        if max(*self._widths(), self.activation_bits) > 8:
            return "they take 8 bits at most"
        if self.activation_mode == "dynamic":
            return "they need ranges fixed beforehand, or set by each token (`activation_mode: static` or `token`)"
        if self.weight_scheme == "asymmetric":
            return "their weights must be symmetric"
        return "their weights have one scale a channel, not `group_size`" if self.group_size else None

    @property
    def by_token(self) -> bool:
        return self.activation_bits is not None and self.activation_mode == "token"

    @property
    def in_float(self) -> bool:
        return self.weights_alone

    @property
    def weights_alone(self) -> bool:
        return self.activation_bits is None

    @abstractmethod
    def _widths(self) -> tuple[int, ...]:
        """Every bit width that weights may have."""

    @abstractmethod
    def _width(self) -> str:
        """The bits of weights as the label has them."""

    def draw(self, context: Context) -> int:
        """The seed that draws the calibration samples."""
        return context.seed if self.calibration_seed is None else self.calibration_seed

    def pattern_of(self, layer: str) -> str | None:
        """The pattern of `layer_bits` that counts for the weight named `layer`."""
        found = sorted(pattern for pattern in self.layer_bits if fnmatchcase(layer, pattern))
        return max(found, key=len, default=None)  # the order of a mapping is no part of its identity

    def check_layers(self, layers: Sequence[Layer], recurrent: Sequence[str]) -> None:
        """Raises Refused as every method, and for a `group_size` that divides the weights of a channel of no layer."""
        super().check_layers(layers, recurrent)
        sizes = sorted({layer.weight[0].numel() for layer in layers})
        if self.group_size and all(size % self.group_size for size in sizes):
            counts = ", ".join(map(str, sizes))
            raise Refused(
                f"`group_size`: must divide the weights of a channel of some layer (got {self.group_size}; they have "
                f"{counts})"
            )
        self._check_patterns("layer_bits", self.layer_bits, [*(layer.name for layer in layers), *recurrent])

    def label(self) -> str:
        """Such as `ptq-w4s-a8a`; what is not the default is appended: `-tensor`, `-g32`, `-wmse`, `-edge8`, `-mse`."""
        parts = [self.method, f"w{self._width()}{self.weight_scheme[0]}"]
        if self.activation_bits is not None:
            parts.append(f"a{self.activation_bits}{'s' if self.by_token else self.activation_scheme[0]}")
        if self.weight_granularity == "tensor":
            parts.append("tensor")
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if self.weight_range != "minmax":
            parts.append(f"w{self.weight_range}")
        if self.sum_grid != type(self).model_fields["sum_grid"].default:
            parts.append(f"{self.sum_grid}sums")
        if self.edge_bits:
            parts.append(f"edge{self.edge_bits}")
        if self.layer_bits:
            parts.append("layers" + ".".join(str(bits) for _, bits in sorted(self.layer_bits.items())))
        parts += self._label_of_layers()
        if self.activation_bits is not None and self.activation_mode != "static":
            parts.append(self.activation_mode)
        elif self.activation_bits is not None:
            parts += [self.calibration] if self.calibration != "minmax" else []
            parts += [f"n{self.calibration_samples}"] if self.calibration_samples != 512 else []
        return "-".join(parts)


class Uniform(Grids):
    """Equally spaced levels, the same number for every layer that no other field singles out."""

    weight_bits: Bits = 8
    """Under 8 bits the kernels stay int8 and the file gets smaller."""

    def canonical(self) -> Self:
        all_eight = self.weight_bits == 8 and self.activation_bits in (8, None)
        return super().canonical().with_defaults(*["edge_bits"] * all_eight)

    def _widths(self) -> tuple[int, ...]:
        return self.weight_bits, *self.layer_bits.values()

    def _width(self) -> str:
        return str(self.weight_bits)

    def bits_of(self, layer: str, *, edge: bool) -> int:
        """The bits of the weight named `layer`; `edge`: the first or the last layer."""
        if (pattern := self.pattern_of(layer)) is not None:
            return self.layer_bits[pattern]
        return self.edge_bits if edge and self.edge_bits else self.weight_bits
