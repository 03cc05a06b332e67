"""Two specs of one sweep held against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qsweep.spec import Spec


def as_now(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec of an earlier version with the fields that have come since at their defaults."""
    try:
        return dict(json.loads(Spec.model_validate(spec).model_dump_json()))
    except ValueError:  # no longer a spec: the differences will say why
        return spec


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path}.{index}")
    elif old != new:
        yield path, old, new
