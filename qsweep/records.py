"""What a trial leaves behind. Field names of `Metrics` are an interface: MLflow shows them as they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from qsweep.config import Config, Listed, content_hash

Direction = Literal["maximize", "minimize"]
State = Literal["complete", "failed", "refused"]


def _metric(direction: Direction | None = None) -> Any:
    """A metric; one with a direction may be an objective."""
    return Field(default=None, json_schema_extra={"direction": direction} if direction else None)


SHARES = frozenset({
    "accuracy", "accuracy_test", "accuracy_mean", "accuracy_spread", "accuracy_simulated", "parity_top1", "sparsity",
    "int8_mac_fraction",
})  # fmt: skip
"""Metrics from 0 to 1, which are shown in per cent."""
OF_THE_TASK = frozenset(name for name in SHARES if name.startswith("accuracy"))
"""Those of them that may have another unit: the task's `metric` says which."""


class Metrics(Config):
    """Everything measured on one artifact. None: not measured (yet)."""

    accuracy: float | None = _metric("maximize")
    """Of the deployed artifact, reloaded in a fresh process, over the whole validation split; 0 to 1, or in the unit of
    the task's `metric`."""
    accuracy_test: float | None = _metric()
    """The same over the test split; of members of the final front, and of the fp32 baseline."""
    accuracy_mean: float | None = _metric()
    """Mean of this artifact's accuracy and that of its repetitions; None: it was not repeated."""
    accuracy_spread: float | None = _metric()
    """Standard deviation of the same."""
    accuracy_simulated: float | None = _metric()
    """Of the simulation (quantize-dequantize in float) on the parity samples."""
    accuracy_drop_pp: float | None = _metric("minimize")
    """Accuracy of the fp32 baseline less this one, in percentage points, or in the unit of the task's `metric`."""
    size_bytes: float | None = _metric("minimize")
    """Bytes of the files that the engine needs, as shipped; weights under 8 bits are packed."""
    size_zstd_bytes: float | None = _metric("minimize")
    """The same files after zstd, level 19."""
    size_theoretical_bytes: float | None = _metric("minimize")
    """Weights at their bit width, scales, zero points and biases; no container."""
    latency_ms: float | None = _metric("minimize")
    """Median of one call at the target's batch size."""
    latency_p95_ms: float | None = _metric("minimize")
    latency_low_ms: float | None = _metric()
    """Lower end of the 95 % interval of the median."""
    latency_high_ms: float | None = _metric()
    """Upper end of the 95 % interval of the median."""
    latency_ratio: float | None = _metric("minimize")
    """Median over that of the fp32 baseline at the same batch size, interleaved in the same process: the figure to
    compare."""
    throughput: float | None = _metric("maximize")
    """Samples a second: the target's batch size over `latency_ms`; what compares batch sizes."""
    parity_top1: float | None = _metric()
    """Share of parity samples on which artifact and simulation agree: `measure.parity_top1` says when."""
    parity_max_abs: float | None = _metric()
    """Largest absolute difference between outputs of artifact and simulation."""
    int8_mac_fraction: float | None = _metric("maximize")
    """Share of multiply-accumulates that ran on integer kernels, from what was really executed."""
    macs: float | None = _metric("minimize")
    """Multiply-accumulates of one sample."""
    bit_operations: float | None = _metric("minimize")
    """Multiply-accumulates times weight bits times activation bits, of one sample."""
    params: float | None = _metric("minimize")
    sparsity: float | None = _metric("maximize")
    """Share of weights (of convolutions and linears) that are exactly zero."""
    peak_memory_bytes: float | None = _metric("minimize")
    """Peak resident memory of the measuring process above its level before the artifact was loaded."""
    peak_device_memory_bytes: float | None = _metric("minimize")
    """On a GPU: what tensors and captured graphs take on it at the peak of a call, above the level before the artifact
    was loaded; not what compiling and tuning take for a while."""
    energy_mj: float | None = _metric("minimize")
    """Millijoules of one sample at the target's batch size, where the machine tells its power: on NVIDIA GPUs with NVML
    (`pip install nvidia-ml-py`) the integral over half a second of back-to-back calls."""
    gpu_power_w: float | None = _metric()
    """Mean over the same time."""
    gpu_clock_mhz: float | None = _metric()
    """Of the streaming multiprocessors, mean over the same time."""
    gpu_temperature_c: float | None = _metric()
    """The highest of the same time."""

    @classmethod
    def directions(cls) -> dict[str, Direction]:
        """The metrics that may be objectives, each with the way it is better."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name: extra["direction"] for name, extra in extras.items() if isinstance(extra, dict)}  # type: ignore[misc]


class Failure(Config):
    """Why a trial has no metrics. `kind` is a class name of `qsweep.errors`."""

    kind: str
    message: str


class Repetition(Config):
    """A config evaluated once more, with another seed: another calibration draw, another order of the training data."""

    round: Annotated[int, Field(ge=1)]
    seed: int
    metrics: Metrics = Metrics()
    kernels: str = ""
    """As of the record."""
    failure: Failure | None = None
    folder: str
    """Relative to the sweep's folder."""


class Call(NamedTuple):
    """How an artifact is called."""

    device: str
    batch_size: int
    threads: int


class Record(BaseModel):  # no Config: its `uid` is that of the config it was made from
    """One trial: durable as `record.json` in its folder before Optuna or MLflow hear of it."""

    model_config = Config.model_config

    number: Annotated[int, Field(ge=0)]
    uid: str
    """Identity of the config: equal configs are evaluated once."""
    name: str
    """Decodes: `qat-w4s-a8-prune50-T4`."""
    kind: Literal["baseline", "trial"] = "trial"
    state: State
    config: dict[str, Any]
    """The TrialConfig as plain data."""
    engine: str
    metrics: Metrics = Metrics()
    seconds: dict[str, float] = {}
    """Wall time by stage."""
    failure: Failure | None = None
    duplicate_of: int | None = None
    """The number of the record whose metrics these are, when an equal config had been evaluated before, or one that has
    given the same artifact, byte for byte."""
    repetitions: Listed[tuple[Repetition, ...]] = ()
    """What other seeds gave, by round. The artifact that ships is that of the record itself."""
    attempts: int = 1
    folder: str
    """Relative to the sweep's folder; holds `artifact/`, `config.yaml` and logs."""
    front: Literal["certain", "probable"] | None = None
    """Membership of the final Pareto front; None: not on it."""
    simulated: bool = False
    """Whether integers were computed in floating point: its latency is not that of the integers."""
    layer_bits: dict[str, int] = {}
    """Bits of the weights of each layer as they are stored, whoever chose them, by the name of the weight."""
    kernels: str = ""
    """Identity of the code that runs, numbers left out: records that share it differ in latency by noise alone."""
    machine: str = ""
    """Fingerprint of the machine that measured it."""

    @property
    def evaluated(self) -> bool:
        """Whether something was run for it: one of an equal config has the folder of that one."""
        return self.state != "refused" and self.folder.endswith(f"{self.number:04d}")

    @property
    def call(self) -> Call:
        """What its latency is that of."""
        target = self.config.get("target", {})
        return Call(target.get("device", "cpu"), target.get("batch_size", 1), target.get("threads", 1))

    @property
    def compressed(self) -> str:
        """What records share whose configs differ in their target alone: one network, and one training of each seed."""
        return content_hash(self.config["compress"])
