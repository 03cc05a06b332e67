from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from qsweep.config import Config


class _Rounding(Config):
    """How weights get their levels."""

    discriminator: ClassVar[str | None] = "method"
    method: str

    @property
    def by_outputs(self) -> bool:
        """Whether levels are chosen by what layers give."""
        return True

    def label(self) -> str:
        """This part of a trial's name, such as `adaround`."""
        return self.method


class Nearest(_Rounding):
    """Each weight goes to the nearest level; no sample is looked at."""

    method: Literal["nearest"] = "nearest"

    @property
    def by_outputs(self) -> bool:
        return False


class AdaRound(_Rounding):
    """Each weight goes up or down, as a layer's output is kept best; never worse for a layer than nearest rounding.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), equations 21 to 25.
    """

    method: Literal["adaround"] = "adaround"
    iterations: Annotated[int, Field(ge=1)] = 1000
    """Steps for each layer."""

    def label(self) -> str:
        """Such as `adaround`, or `adaround200` with other than the usual steps."""
        usual = type(self).model_fields["iterations"].default
        return self.method if self.iterations == usual else f"{self.method}{self.iterations}"


class GPTQ(_Rounding):
    """One weight after the other goes to the nearest level, the rest of its channel making up for each; takes about a
    third of AdaRound's time.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023),
    section 3.3, algorithm 1; convolutions as products of their patches.
    """

    method: Literal["gptq"] = "gptq"


def _named(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


_Methods = Annotated[Nearest | AdaRound | GPTQ, Field(discriminator="method")]
_Written = Literal["nearest", "adaround", "gptq"] | _Methods
Rounding = Annotated[_Methods, BeforeValidator(_named, json_schema_input_type=_Written)]
"""A method of rounding; `adaround` is short for `{method: adaround}`."""
