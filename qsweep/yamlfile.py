"""YAML as a spec needs it: no key twice, and `1e-3` is a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qsweep.errors import SpecError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.1 as PyYAML reads it, but strict about keys and with the floats of YAML 1.2."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Keys are compared as they are written: later, others are merged in, which they may override."""
        node = super().compose_mapping_node(anchor)
        keys: list[Any] = []
        for written in [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]:
            key = self.construct_object(written, deep=True)
            if key in keys:
                problem = f"the key `{key}` must stand once"
                raise yaml.constructor.ConstructorError(None, None, problem, written.start_mark)
            keys.append(key)
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if re.search("[\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(
                None, None, "half of a surrogate pair is no character", node.start_mark
            )
        return value


# PyYAML takes `1e-3` for text, for want of a dot.
_FLOAT = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises SpecError with the file, the line, what must hold and what came."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise SpecError(f"`{path}`: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"`{path}`: cannot be read as text ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SpecError(f"`{path}`{line}: must be YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(data, dict):
        raise SpecError(f"`{path}`: must hold a mapping of keys to values (got {type(data).__name__})")
    return data


def line_of(path: Path, where: Sequence[str | int]) -> int:
    """The line, from 1, of what the keys `where` lead to in a YAML file, or of the last of them that is there."""
    node, line = yaml.compose(path.read_text(encoding="utf-8"), _Loader), 0
    for key in where:
        if isinstance(node, yaml.MappingNode):
            found = next(((name.start_mark.line, value) for name, value in node.value if name.value == str(key)), None)
        else:
            items = node.value if isinstance(node, yaml.SequenceNode) else []
            found = next(((item.start_mark.line, item) for i, item in enumerate(items) if i == key), None)
        if found is None:
            break
        line, node = found
    return line + 1
