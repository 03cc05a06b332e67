from __future__ import annotations

import itertools
import json
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from qsweep.config import Config
from qsweep.domains import DomainError, behind, ranges
from qsweep.space import Choice, Domain, Range, Space, assignments, complaint, corners, parse, resolve


class Step(Config):
    discriminator: ClassVar[str | None] = "method"


class Cheap(Step):
    method: Literal["cheap"] = "cheap"
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    group: Annotated[int, Field(multiple_of=8)] = 8


class Dear(Step):
    method: Literal["dear"] = "dear"
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.1
    sizes: list[int] = []


class Recipe(Config):
    step: Annotated[Cheap | Dear, Field(discriminator="method")] | None = None
    heat: Annotated[float, Field(ge=0, le=100)] = 1.0
    order: Literal["up", "down"] = "up"


class Spec(Config):
    recipe: Space[Recipe]


def space(recipe: Any) -> Space[Recipe]:
    return Spec.model_validate({"recipe": recipe}).recipe


def refusal(recipe: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        space(recipe)
    return complaint(caught.value)


def lowest(path: str, domain: Domain) -> Any:
    return domain.labels[0] if isinstance(domain, Choice) else domain.low


# --- trees of domains, for properties that hold for all of them -------------------------------------------------------

scalars = st.none() | st.integers(0, 9) | st.sampled_from(["a", "b"])
int_ranges = st.builds(lambda low, more: {"range": [low, low + more]}, st.integers(0, 5), st.integers(1, 2))
step_ranges = st.just({"range": [0.1, 0.3], "step": 0.1})


def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    unique = st.lists(inner, min_size=1, max_size=3, unique_by=lambda node: json.dumps(node, sort_keys=True))
    named = st.builds(lambda method, value: {"method": method, "x": value}, st.sampled_from(["p", "q"]), inner)
    return (
        unique.map(lambda options: {"choice": options})
        | st.dictionaries(st.sampled_from("xyz"), inner, min_size=1, max_size=2)
        | st.lists(inner, min_size=1, max_size=2)
        | named
    )


def parsed(node: Any) -> Any:
    try:
        return parse(node)
    except DomainError:  # nested choices that repeat an option
        return None


trees = st.recursive(scalars | int_ranges | step_ranges, deeper, max_leaves=6).map(parsed)


def as_text(nodes: Any) -> list[str]:
    return [json.dumps(node, sort_keys=True) for node in nodes]


@given(trees)
def test_assignments_hold_every_point_once_and_resolve_to_it(tree: Any) -> None:
    found = list(itertools.islice(assignments(tree), 200))
    assert len({json.dumps(sorted(point.items())) for point in found}) == len(found)
    for point in found:
        asked: list[str] = []

        def suggest(path: str, domain: Domain, point: Any = point, asked: Any = asked) -> Any:
            asked.append(path)
            return point[path]

        plain = resolve(tree, suggest)
        assert asked == list(point)  # every path once: no two domains share a name
        assert point in behind(tree, plain)


def test_what_is_behind_a_config_may_be_left_to_defaults_but_must_be_in_the_space() -> None:
    tree = parse({"choice": [{"method": "a", "x": {"range": [1, 9], "step": 2}}, {"method": "b"}, None]})
    assert list(behind(tree, {"method": "a", "x": 5, "seed": 0})) == [{"": "a", "a.x": 5}]
    assert list(behind(tree, None)) == [{"": None}]
    assert list(behind(parse({"choice": ["a", None, 2]}), {"method": "a"})) == [{"": "a"}]  # in short
    for outside in ({"method": "a", "x": 4}, {"method": "a", "x": 11}, {"method": "a"}, {"method": "c"}, 3):
        assert not list(behind(tree, outside))


@given(trees)
def test_the_points_of_a_space_are_all_combinations_of_its_domains(tree: Any) -> None:
    def every(node: Any) -> list[Any]:
        if isinstance(node, Choice):
            return [point for option in node.options for point in every(option)]
        if isinstance(node, Range):
            return list(node.values or ())
        if isinstance(node, dict):
            rows = itertools.product(*(every(value) for value in node.values()))
            return [dict(zip(node, row, strict=True)) for row in rows]
        return [list(row) for row in itertools.product(*map(every, node))] if isinstance(node, list) else [node]

    expected = every(tree)
    if len(expected) <= 200:
        points = [resolve(tree, lambda path, _, at=at: at[path]) for at in assignments(tree)]
        assert as_text(points) == as_text(expected)


@given(trees)
def test_corners_use_every_option_and_both_ends_of_every_range(tree: Any) -> None:
    unused: set[int] = set()
    seen = {
        json.dumps(leaf)
        for corner in corners(tree, lambda domain: (domain.low, domain.high))
        for leaf in leaves(corner)
    }
    for domain in ranges(tree):
        unused |= {end for end in (domain.low, domain.high) if json.dumps(end) not in seen}  # type: ignore[misc]
    assert not unused
    assert {json.dumps(leaf) for leaf in leaves(tree)} <= seen


def leaves(node: Any) -> list[Any]:
    """Values without domains in them: what stands in some corner whatever the rest."""
    if isinstance(node, Choice):
        return [leaf for option in node.options for leaf in leaves(option)]
    if isinstance(node, Range):
        return []
    if isinstance(node, dict | list):
        return [leaf for value in (node.values() if isinstance(node, dict) else node) for leaf in leaves(value)]
    return [node]


def test_corners_vary_one_domain_at_a_time() -> None:
    tree = parse({"a": {"choice": [1, {"method": "m", "b": {"range": [0, 9]}}]}, "c": {"choice": [True, False]}})
    assert list(corners(tree, lambda domain: (domain.low, domain.high))) == [
        {"a": 1, "c": True},
        {"a": {"method": "m", "b": 0}, "c": True},
        {"a": {"method": "m", "b": 9}, "c": True},
        {"a": 1, "c": False},
    ]


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_only_the_chosen_branch_is_asked_and_its_names_carry_it() -> None:
    both = {"choice": [{"method": m, "bits": {"range": [2, 8]}} for m in ("cheap", "dear")]}
    asked: list[str] = []

    def last(path: str, domain: Domain) -> Any:
        asked.append(path)
        return domain.labels[-1] if isinstance(domain, Choice) else domain.high

    assert space({"step": both}).sample(last) == Recipe(step=Dear(bits=8))
    assert asked == ["recipe.step", "recipe.step.dear.bits"]


def test_two_options_of_one_method_have_names_of_their_own() -> None:
    choice = parse(
        {"choice": [{"method": "cheap", "bits": 2}, {"method": "cheap", "bits": {"range": [4, 8]}}, "cheap#2"]}
    )
    assert choice.labels == ("cheap", "cheap#3", "cheap#2")


def test_a_choice_inside_a_choice_is_one_choice() -> None:
    assert parse({"choice": [1, {"choice": [2, 3]}]}) == Choice((1, 2, 3), (1, 2, 3))


def test_a_range_may_be_an_option_and_has_a_name_of_its_own() -> None:
    found = space({"heat": {"choice": [0, {"range": [1, 9]}]}})
    names: list[str] = []
    found.sample(lambda path, domain: (names.append(path), domain.labels[-1] if isinstance(domain, Choice) else 2.5)[1])
    assert names == ["recipe.heat", "recipe.heat.range"]


def test_domains_inside_lists_are_asked_one_by_one() -> None:
    step = {"method": "dear", "sizes": [{"choice": [1, 2]}, {"range": [3, 4]}]}
    points = list(assignments(space({"step": step}).tree, "recipe"))
    assert [list(at.values()) for at in points] == [[1, 3], [1, 4], [2, 3], [2, 4]]
    assert list(points[0]) == ["recipe.step.sizes.0", "recipe.step.sizes.1"]


def test_lists_may_be_options() -> None:
    found = space({"step": {"method": "dear", "sizes": {"choice": [[1, 2], [3]]}}})
    assert found.sample(lambda path, domain: domain.values[-1]) == Recipe(step=Dear(sizes=[3]))  # type: ignore[index]


def test_numbers_are_ordered_and_booleans_are_not() -> None:
    assert Choice((2, 4.5), (2, 4.5)).ordered
    assert not Choice((True, False), (True, False)).ordered


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[1, 9], [1.0, 9.0], [1, 9.0]])
def test_a_range_is_real_where_its_field_is_however_it_is_written(ends: list[float]) -> None:
    (found,) = ranges(space({"heat": {"range": ends}}).tree)
    assert (found.integer, found.values) == (False, None)


@pytest.mark.parametrize("step", [{}, {"step": 1}, {"step": 1.0}])
def test_a_range_is_integer_where_its_field_is(step: dict[str, float]) -> None:
    (found,) = ranges(space({"step": {"method": "cheap", "bits": {"range": [2, 8]} | step}}).tree)
    assert found.integer
    assert json.dumps(list(found.values or ())) == "[2, 3, 4, 5, 6, 7, 8]"


def test_equal_ranges_are_typed_each_by_its_own_field() -> None:
    same = {"range": [2, 8]}
    found = list(ranges(space({"step": {"method": "cheap", "bits": same}, "heat": same}).tree))
    assert [domain.integer for domain in found] == [True, False]


def test_an_integer_range_can_be_counted_even_on_a_log_scale() -> None:
    assert list(parse({"range": [1, 4], "log": True}).values) == [1, 2, 3, 4]
    assert parse({"range": [1, 10**12]}).values[-1] == 10**12  # not held in memory


def test_steps_are_written_without_rounding_errors() -> None:
    assert parse({"range": [0.1, 0.7], "step": 0.2}).values == (0.1, 0.3, 0.5, 0.7)
    assert parse({"range": [0, 1], "step": 0.4}).values == (0.0, 0.4, 0.8)


@given(st.floats(-1, 2))
def test_a_suggestion_becomes_the_nearest_point_of_its_range(value: float) -> None:
    grid = parse({"range": [0.1, 0.7], "step": 0.2})
    assert grid.snap(value) in grid.values
    assert all(abs(grid.snap(value) - value) <= abs(point - value) + 1e-9 for point in grid.values)


def test_a_sampler_that_accumulates_rounding_errors_makes_no_second_config() -> None:
    found = space({"heat": {"range": [0.1, 0.7], "step": 0.2}})
    assert found.sample(lambda *_: 0.1 + 0.2).uid() == found.sample(lambda *_: 0.3).uid()


def test_a_range_of_real_numbers_has_no_list_of_points() -> None:
    with pytest.raises(ValueError, match=r"`recipe.heat` is a range of real numbers"):
        list(assignments(space({"heat": {"range": [0.5, 1]}}).tree, "recipe"))


# --- refusals: the path in the spec, what must hold, what came --------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"heet": 1},
            "`recipe.heet`: did you mean `heat`? There is no such key; there are `step`, `heat`, `order` (got 1)",
        ),
        ({"heat": "hot"}, "`recipe.heat`: must be a number (got 'hot')"),
        ({"heat": 101}, "`recipe.heat`: must be less than or equal to 100 (got 101)"),
        ({"heat": {"range": [1, 200]}}, "`recipe.heat`: must be less than or equal to 100 (got 200.0)"),
        ({"heat": {"choice": [1, 200]}}, "`recipe.heat.choice.1`: must be less than or equal to 100 (got 200)"),
        ({"heat": {"choice": []}}, "`recipe.heat.choice`: must be a list with at least one option (got [])"),
        ({"heat": {"choice": 4}}, "`recipe.heat.choice`: must be a list with at least one option (got 4)"),
        ({"heat": {"choice": [1, 2, 1]}}, "`recipe.heat.choice`: options must differ (got 1 and 1)"),
        ({"heat": {"choice": [1, True]}}, "`recipe.heat.choice`: options must differ (got 1 and True)"),
        ({"heat": {"choice": [1], "range": [1, 2]}}, "`recipe.heat`: a choice takes no other key (got `range`)"),
        ({"heat": {"range": [2, 1]}}, "`recipe.heat.range`: must be two numbers, the lower first (got [2, 1])"),
        ({"heat": {"range": [1]}}, "`recipe.heat.range`: must be two numbers, the lower first (got [1])"),
        ({"heat": {"range": ["1", 2]}}, "`recipe.heat.range`: must be two numbers, the lower first (got ['1', 2])"),
        (
            {"heat": {"range": [1, float("inf")]}},
            "`recipe.heat.range`: must be two numbers, the lower first (got [1, inf])",
        ),
        (
            {"heat": {"range": [1, 2], "steps": 1}},
            "`recipe.heat`: a range takes `log` and `step` and nothing else (got `steps`)",
        ),
        ({"heat": {"range": [1, 2], "log": "yes"}}, "`recipe.heat.log`: must be true or false (got 'yes')"),
        (
            {"heat": {"range": [0, 2], "log": True}},
            "`recipe.heat.range`: must start above 0 where `log` is true (got [0, 2])",
        ),
        (
            {"heat": {"range": [1, 2], "log": True, "step": 1}},
            "`recipe.heat.step`: must be left out where `log` is true (got 1)",
        ),
        (
            {"heat": {"range": [1, 2], "step": 3}},
            "`recipe.heat.step`: must be above 0 and fit the range [1, 2] (got 3)",
        ),
        ({"order": {"choice": ["up", "left"]}}, "`recipe.order.choice.1`: must be 'up' or 'down' (got 'left')"),
        ({"step": "cheap"}, "`recipe.step`: must be a mapping such as {method: …} (got 'cheap')"),
        ({"step": {"bits": 4}}, "`recipe.step.method`: is required and was not given"),
        ({"step": {"method": "free"}}, "`recipe.step.method`: must be one of 'cheap', 'dear' (got 'free')"),
        (
            {"step": {"method": "cheap", "rate": 0.5}},
            "`recipe.step.rate`: there is no such key; there are `method`, `bits`, `group` (got 0.5)",
        ),
        (
            {"step": {"choice": [None, {"method": "dear", "bits": {"choice": [4, 9]}}]}},
            "`recipe.step.choice.1.bits.choice.1`: must be less than or equal to 8 (got 9)",
        ),
        (
            {"step": {"choice": [None, {"method": "dear", "bits": {"choice": []}}]}},
            "`recipe.step.choice.1.bits.choice`: must be a list with at least one option (got [])",
        ),
        (
            {"step": {"method": "dear", "rate": {"range": [0, 0.5]}}},
            "`recipe.step.rate`: must be greater than 0 (got 0.0)",
        ),
        (
            {"step": {"method": "dear", "bits": {"range": [2.5, 8]}}},
            "`recipe.step.bits`: must be an integer (got 2.5)",
        ),
        (
            {"step": {"method": "dear", "bits": {"range": [2, 8], "step": 1.5}}},
            "`recipe.step.bits`: must be an integer (got 3.5)",
        ),
        ({"heat": "4"}, "`recipe.heat`: must be a number (got '4')"),
        ({"heat": True}, "`recipe.heat`: must be a number (got True)"),
        ({"heat": {"choice": [1, "4"]}}, "`recipe.heat.choice.1`: must be a number (got '4')"),
        ({"heat": {"choice": [2, True]}}, "`recipe.heat.choice.1`: must be a number (got True)"),
        ({"order": {"choice": ["up", 1]}}, "`recipe.order.choice.1`: must be 'up' or 'down' (got 1)"),
        ({"step": {"method": "dear", "bits": "4"}}, "`recipe.step.bits`: must be an integer (got '4')"),
        ({"step": {"method": "dear", "bits": True}}, "`recipe.step.bits`: must be an integer (got True)"),
        ({"step": {"method": "dear", "bits": 4.0}}, "`recipe.step.bits`: must be an integer (got 4.0)"),
        (
            {"step": {"method": "dear", "bits": {"choice": [2, 4.0]}}},
            "`recipe.step.bits.choice.1`: must be an integer (got 4.0)",
        ),
        (
            {"step": {"method": "dear", "bits": {"range": [2.0, 8]}}},
            "`recipe.step.bits`: must be an integer (got 2.0)",
        ),
        (
            {"step": {"method": "dear", "bits": {"range": [2, 8.0]}}},
            "`recipe.step.bits`: must be an integer (got 8.0)",
        ),
        ({"step": {"method": "dear", "sizes": [4, "8"]}}, "`recipe.step.sizes.1`: must be an integer (got '8')"),
        ({"heat": {"range": [True, 2]}}, "`recipe.heat.range`: must be two numbers, the lower first (got [True, 2])"),
        (
            {"step": {"method": "cheap", "group": {"range": [8, 32]}}},
            "`recipe.step.group`: must be a multiple of 8 (got 9)",
        ),
        ([1], "`recipe`: must be a mapping (got [1])"),
    ],
)
def test_a_space_with_a_config_that_cannot_be_is_refused(recipe: Any, message: str) -> None:
    assert refusal(recipe) == message


def test_what_came_is_shortened_where_it_is_long() -> None:
    assert len(refusal({"order": "x" * 5000})) < 200


# --- as a field -------------------------------------------------------------------------------------------------------


def test_a_space_survives_json() -> None:
    spec = Spec.model_validate({"recipe": {"heat": {"range": [1, 9]}, "step": {"choice": [None, {"method": "cheap"}]}}})
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


def test_a_config_is_a_space_of_one_point() -> None:
    found = space(Recipe(step=Dear(rate=0.5)))
    assert list(assignments(found.tree)) == [{}]
    assert found.sample(lowest) == Recipe(step=Dear(rate=0.5))


def test_samples_are_typed_configs() -> None:
    found = Space({"choice": [{"method": "cheap"}, {"method": "dear"}]}, TypeAdapter(Cheap | Dear), "step")
    assert [type(config) for config in found.configs()] == [Cheap, Dear]
