"""Config models: frozen data that is at once validation, search space, identity and documentation.

A component is one file: its fields, its docstring and its code. A family is a folder of components that
are told apart by one field (`method`, or `engine`); adding a member is adding a file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, SerializationInfo, Strict, model_serializer, model_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import SerializerFunctionWrapHandler

T = TypeVar("T")
Listed = Annotated[T, Strict(False)]
"""The type of a field that holds a tuple: YAML and JSON have lists. What is in it is as strict as elsewhere."""


class Config(BaseModel):
    """Base of every model that a spec can hold: immutable, strict about names and types, hashable by content.

    `"4"` or `true` is no number, `4.0` no integer and `"yes"` no boolean; an integer is a number. A field that holds a
    tuple is `Listed[tuple[...]]`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    version: ClassVar[int] = 1
    """Raise it when the same fields come to mean other numerics: identities change with it."""
    discriminator: ClassVar[str | None] = None
    """The field that tells this config from its siblings in a family, if it has any."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content: Any) -> Any:
        """Pydantic refuses other keys too, but does not say which ones there are."""
        for key in content if isinstance(content, Mapping) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_key", "there is no such key", {"key": key, "known": list(cls.model_fields)}
                )
        return content

    @model_serializer(mode="wrap")
    def _keep_discriminator(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        content = handler(self.canonical() if info.context == "identity" else self)
        if self.discriminator:  # `exclude_defaults` drops it, and then siblings with default fields look alike
            content = {self.discriminator: getattr(self, self.discriminator)} | content
        if self.version != 1 and info.context == "identity":
            content["version"] = self.version
        return content

    def canonical(self) -> Self:
        """The config that stands for all that do the same work: fields that count for nothing beside the values of the
        others are at their defaults. The identity is made from it."""
        return self

    def with_defaults(self, *names: str) -> Self:
        """The config with these fields at their defaults, not validated again."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in names})

    def uid(self) -> str:
        """SHA-256 of the canonical config. Values equal to their default are left out: a new knob keeps old uids."""
        return content_hash(self.model_dump(mode="json", exclude_defaults=True, context="identity"))


def content_hash(content: Any) -> str:
    """SHA-256, in hex, of JSON-like `content` written in one canonical way."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


C = TypeVar("C", bound=Config)


def members(base: type[C], package: str) -> tuple[type[C], ...]:
    """Import every module of `package`; return the concrete classes under `base` there, sorted by name."""
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
    found = {cls for cls in _descendants(base) if not inspect.isabstract(cls) and cls.__module__.startswith(package)}
    return tuple(sorted(found, key=lambda cls: cls.__name__))


def _descendants(base: type[C]) -> Iterator[type[C]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _descendants(cls)


def family(base: type[Config], package: str) -> Any:
    """The union of the members of `base`'s family, told apart by their discriminator field."""
    found = members(base, package)
    if len(found) == 1:  # pydantic refuses a discriminator without a union
        return found[0]
    return Annotated[Union[found], Field(discriminator=base.discriminator)]  # noqa: UP007
