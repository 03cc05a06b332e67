"""What every sweep measures beside its trials, so that each figure has something to stand against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qsweep.engines import EngineConfig
from qsweep.engines.float import Float
from qsweep.errors import Refused
from qsweep.records import Record
from qsweep.spec import UNCOMPRESSED, Compression, Spec, TrialConfig
from qsweep.study.points import working


def baselines(spec: Spec) -> list[TrialConfig]:
    """fp32 on the first engine option, to which all others are compared; then what each engine offers of
    `standard_baselines`, and the spec's own.

    What an engine refuses, `float` runs in its place with the same batch size and threads, so that bf16 stands beside
    int8 in every table, eagerly where there is no compiler; what that refuses too is left out.
    """
    asked = {UNCOMPRESSED, *spec.standard_baselines}
    offered = [
        _on(engine, content)
        for engine in working(spec)
        for name, content in engine.baselines().items()
        if name in asked
    ]
    configs = [*(config for config in offered if config is not None), *spec.baselines]
    return list({config.uid(): config for config in configs}.values())


def _on(engine: EngineConfig, content: dict[str, Any]) -> TrialConfig | None:
    instead = Float(**engine.stand_in())
    for target in (engine, instead, instead.model_copy(update={"compile": False})):
        compression = Compression.model_validate(content.get("compress", {}))
        if target.available() is None and target.refuses(compression) is None:
            return TrialConfig.model_validate({"compress": compression.model_dump(), "target": target.model_dump()})
    return None


def numbered(kept: Any) -> dict[int, TrialConfig]:
    """Baselines by number, as `spec.json` has them; of earlier versions a list."""
    pairs = enumerate(kept) if isinstance(kept, list) else kept.items()
    return {int(number): TrialConfig.model_validate(config) for number, config in pairs}


def with_new(
    baselines: list[TrialConfig], before: dict[int, TrialConfig], recorded: set[int]
) -> dict[int, TrialConfig]:
    """`baselines` with the numbers that they had `before`, or those after all that are `recorded`, and of `before` what
    has been evaluated and what all are compared to."""
    if not recorded:
        return dict(enumerate(baselines))
    wanted = {config.uid(): config for config in baselines}
    left = {n: config for n, config in before.items() if n == 0 or n in recorded or config.uid() in wanted}
    known = {config.uid() for config in left.values()}
    new = [config for uid, config in wanted.items() if uid not in known]
    return left | dict(enumerate(new, max(recorded | left.keys()) + 1))


def refusal(engine: str, baselines: Iterable[Record]) -> str | None:
    """Why `engine` takes no version of the model, or None: it has refused the model as it is, and each baseline."""
    own = [record for record in baselines if record.engine == engine]
    reasons = [record.failure.message for record in own if record.failure and record.failure.kind == Refused.__name__]
    if len(reasons) < len(own) or not any(record.name == UNCOMPRESSED for record in own):
        return None
    return f"`{engine}` has refused the model itself: {reasons[0]}"
