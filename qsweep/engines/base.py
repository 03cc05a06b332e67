"""What every engine is: a config that lowers the hub form to an artifact, and runs artifacts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from qsweep.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store
    from qsweep.tasks._parts import Parts

Runner = Callable[["Tensor"], "Tensor"]
"""Takes a float32 batch of exactly the target's batch size, gives the model's output; both on the engine's device.

The output may lie in a buffer that the next call writes to.
"""


class EngineConfig(Config, ABC):
    """The target: which runtime, on what, at which batch size."""

    discriminator: ClassVar[str | None] = "engine"
    preload: ClassVar[tuple[str, ...]] = ()
    """Modules that make the first use quick; imported once, before workers are forked."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What its artifacts need beside qsweep's own requirements, by the names of a package index."""
    export_note: ClassVar[str] = ""
    """What a person has to know who runs what `export` writes."""
    engine: str
    device: Literal["cpu", "cuda"] = "cpu"
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Samples a call; accuracy and latency are measured at it."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of the runtime while it is measured."""

    def available(self) -> str | None:
        """Why this engine cannot work on this machine, or None."""
        from importlib.util import find_spec

        from qsweep.machine import no_gpu

        missing = [name for name in self.packages if find_spec(name.replace("-", "_")) is None]
        if missing:
            return f"`{missing[0]}` is not installed: `pip install 'qsweep[{self.engine}]'`"
        return no_gpu() if self.device == "cuda" else None

    @abstractmethod
    def refuses(self, config: Compression) -> str | None:
        """Why this engine cannot run `config`, or None."""

    def baselines(self) -> dict[str, dict[str, Any]]:
        """What stands beside every trial on this engine by its name, as content of a TrialConfig without its target.

        First the model as it is. Each runs on this engine, or on `float` where this engine refuses it.
        """
        types = ("bf16",) if self.device == "cpu" else ("bf16", "fp16")
        stages = {dtype: {"method": "cast", "dtype": dtype} for dtype in types} | {"int8": {"method": "ptq"}}
        return {"fp32": {}} | {name: {"compress": {"quantize": stage}} for name, stage in stages.items()}

    def stand_in(self) -> dict[str, Any]:
        """Fields of the `float` engine that runs what this one refuses."""
        return {"device": self.device, "batch_size": self.batch_size, "threads": self.threads}

    @abstractmethod
    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        """Write to `folder` every file that `load` needs, and nothing else; `store` keeps what models share."""

    @abstractmethod
    def load(self, folder: Path) -> Runner:
        """An artifact made ready: compiled, warmed up, at the target's batch size and threads.

        Raises Refused when the runtime cannot take it.
        """

    def export(self, artifact: Path, out: Path, parts: Mapping[str, Parts] | None = None) -> None:
        """Write to the folder `out` what the runtime takes without qsweep; by default a program of `torch.export`.

        `parts`: the `inputs` and `outputs` of the model, where they are more than the one tensor of the artifact.
        """
        from qsweep.engines._program import write_program

        write_program(artifact, out, parts or {})

    @abstractmethod
    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        """Multiply-accumulates of a call on `inputs` that ran on integer kernels, as the runtime tells."""
