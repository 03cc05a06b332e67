from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

import qsweep.distill
import qsweep.engines
import qsweep.prune
import qsweep.quantize
from qsweep.config import Config, Listed, content_hash, members
from qsweep.tasks import AnyTask


class Plain(Config):
    size: Annotated[int, Field(ge=1)] = 3
    rate: float = 0.5


class Typed(Config):
    size: int = 1
    rate: float = 1.0
    on: bool = False
    name: str = ""
    sizes: Listed[tuple[int, ...]] = ()


class Shape(Config, ABC):
    discriminator: ClassVar[str | None] = "method"
    method: str
    width: int = 1

    @abstractmethod
    def area(self) -> int: ...


class Square(Shape):
    method: Literal["square"] = "square"

    def area(self) -> int:
        return self.width**2


class Circle(Shape):
    method: Literal["circle"] = "circle"

    def area(self) -> int:
        return 3 * self.width**2


class RoundCircle(Circle):
    version = 2


class Holder(Config):
    shape: Square | Circle | RoundCircle | None = None


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Plain().size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "content", [{"sise": 1}, {"size": 0}, {"size": "many"}, {"rate": float("nan")}, {"rate": float("inf")}]
)
def test_a_config_refuses_what_its_fields_do_not_allow(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Plain.model_validate(content)


def test_the_uid_leaves_out_values_that_equal_their_default() -> None:
    assert Plain().uid() == Plain(size=3).uid() == Plain(size=3, rate=0.5).uid()


@given(st.integers(1, 9), st.integers(1, 9))
def test_uids_are_equal_exactly_when_values_are(a: int, b: int) -> None:
    assert (Plain(size=a).uid() == Plain(size=b).uid()) == (a == b)


@given(st.integers(-1000, 1000))
def test_a_number_has_one_uid_however_it_is_written(value: int) -> None:
    assert Plain(rate=value).uid() == Plain(rate=float(value)).uid()


def test_the_uid_separates_methods_whose_fields_are_all_default() -> None:
    assert Square().uid() != Circle().uid()
    assert Holder(shape=Square()).uid() != Holder(shape=Circle()).uid() != Holder().uid()


def test_the_uid_changes_with_the_version_of_a_method_wherever_it_stands() -> None:
    assert Circle().uid() != RoundCircle().uid()
    assert Holder(shape=Circle()).uid() != Holder(shape=RoundCircle()).uid()


def test_the_version_is_no_part_of_the_data() -> None:
    assert "version" not in RoundCircle(width=2).model_dump()
    assert RoundCircle.model_validate(RoundCircle(width=2).model_dump()) == RoundCircle(width=2)


def test_the_uid_is_the_same_in_every_process() -> None:
    assert Plain(size=7).uid() == content_hash({"size": 7})
    assert content_hash({"b": [1, None], "a": "ü"}) == hashlib.sha256(rb'{"a":"\u00fc","b":[1,null]}').hexdigest()


@given(st.dictionaries(st.text(), st.integers() | st.none() | st.booleans()))
def test_a_content_hash_does_not_depend_on_the_order_of_keys(content: dict[str, object]) -> None:
    assert content_hash(content) == content_hash(dict(reversed(content.items())))


def test_a_family_holds_every_concrete_class_of_its_folder_and_nothing_from_elsewhere() -> None:
    class Elsewhere(qsweep.quantize.Quantization):
        method: Literal["elsewhere"] = "elsewhere"

        def apply(self, model: object, context: object) -> object:  # type: ignore[override]
            return model

    names = {cls.__name__ for cls in members(qsweep.quantize.Quantization, "qsweep.quantize")}
    assert {"PTQ", "QAT", "Cast"} <= names
    assert not names & {"Uniform", "Elsewhere"}


@pytest.mark.parametrize(
    ("base", "package"),
    [(qsweep.quantize.Quantization, "qsweep.quantize"), (qsweep.engines.EngineConfig, "qsweep.engines")],
)
def test_members_of_a_family_differ_in_their_discriminator_and_are_documented(base: type[Config], package: str) -> None:
    found = members(base, package)
    keys = [cls.model_fields[str(base.discriminator)].default for cls in found]
    assert len(set(keys)) == len(keys)
    assert all(cls.__doc__ for cls in found)


@pytest.mark.parametrize(
    "content",
    [
        *({"rate": value} for value in ("0.5", True, b"1")),
        *({"size": value} for value in ("3", True, 3.0, 3.5)),
        *({"on": value} for value in ("yes", 1, 0.0)),
        *({"name": value} for value in (7, True, b"x")),
        *({"sizes": value} for value in ([1, "2"], [True], [1.0], {"1": 2}, "12")),
    ],
)
def test_a_value_of_another_type_is_refused_even_where_it_could_be_read(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        Typed.model_validate(content)
    assert caught.value.errors()[0]["loc"][0] == next(iter(content))


def test_an_integer_is_taken_for_a_number_and_a_list_for_a_tuple() -> None:
    made = Typed.model_validate({"rate": 2, "sizes": [1, 2]})
    assert (repr(made.rate), made.sizes) == ("2.0", (1, 2))


def stored_configs() -> list[Config]:
    """One config of every kind that a spec can hold, each tuple filled."""
    rows = {"file": "a", "rows": [0, 9]}
    images = {"method": "parquet", "train": rows, "test": "b", "classes": 2, "mean": [0.5], "std": [0.5]}
    image_task = {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": images}
    own = {"method": "python", "file": "a.py:T", "depends_on": ["b"], "arguments": {"n": [1]}}
    packages = (
        (qsweep.quantize.Quantization, "qsweep.quantize"),
        (qsweep.engines.EngineConfig, "qsweep.engines"),
        (qsweep.prune.Pruning, "qsweep.prune"),
        (qsweep.distill.Distillation, "qsweep.distill"),
    )
    found = [cls() for base, package in packages for cls in members(base, package)]
    schedule = [cls(bits_schedule=(8, 6)) for cls in map(type, found) if "bits_schedule" in cls.model_fields]
    return [*found, *schedule, *(TypeAdapter(AnyTask).validate_python(content) for content in (image_task, own))]


@pytest.mark.parametrize("config", stored_configs(), ids=lambda config: type(config).__name__)
def test_every_config_is_read_back_from_its_json_and_its_yaml(config: Config) -> None:
    plain = config.model_dump(mode="json")
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config
    assert type(config).model_validate(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert type(config).model_validate_json(config.model_dump_json()) == config
