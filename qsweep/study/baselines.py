"""What every sweep measures beside its trials, so that each figure has something to stand against."""

from __future__ import annotations

from typing import Any

from qsweep.engines import EngineConfig
from qsweep.engines.float import Float
from qsweep.spec import Compression, Spec, TrialConfig
from qsweep.study.points import working


def baselines(spec: Spec) -> list[TrialConfig]:
    """fp32 on the first engine option, to which all others are compared; then whatever each engine offers, and the
    spec's own.

    What an engine refuses, `float` runs in its place with the same batch size and threads, so that bf16 stands beside
    int8 in every table, eagerly where there is no compiler; what that refuses too is left out.
    """
    offered = [_on(engine, content) for engine in working(spec) for content in engine.baselines()]
    configs = [*(config for config in offered if config is not None), *spec.baselines]
    return list({config.uid(): config for config in configs}.values())


def _on(engine: EngineConfig, content: dict[str, Any]) -> TrialConfig | None:
    instead = Float(**engine.stand_in())
    for target in (engine, instead, instead.model_copy(update={"compile": False})):
        compression = Compression.model_validate(content.get("compress", {}))
        if target.available() is None and target.refuses(compression) is None:
            return TrialConfig.model_validate({"compress": compression.model_dump(), "target": target.model_dump()})
    return None
