"""Two specs of one sweep held against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qsweep.spec import Spec

SEARCHED = "compress", "target", "objectives", "constraints", "baselines", "standard_baselines"
"""What a search is about."""
MAY_CHANGE = (*SEARCHED, "search.sampler", "search.trials", "search.timeout", "search.repeats", "run", "track")
"""What a sweep that goes on may have different from the spec it began with: no result depends on it."""


def as_now(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec of an earlier version with the fields that have come since at their defaults."""
    try:
        return dict(json.loads(Spec.model_validate(spec).model_dump_json()))
    except ValueError:  # no longer a spec: the differences will say why
        return spec


def searched_anew(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether what is searched differs, so that the study must be taught what is on record."""
    return any(old[name] != new[name] for name in SEARCHED)


def refused(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs and may not, each by its path with both values."""
    return [
        f"`{path}` was {before!r} and is {after!r}"
        for path, before, after in differences(old, new)
        if not any(path == free or path.startswith(f"{free}.") for free in MAY_CHANGE)
    ]


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path}.{index}")
    elif old != new:
        yield path, old, new
