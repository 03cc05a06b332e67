"""Commands on a spec that run nothing: `validate`, `plan`, `schema`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qsweep.spec import Spec
    from qsweep.study.plan import Plan

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.")]


def validate(spec: SpecPath) -> None:
    """Check a spec, every option and both ends of every range, its files, its Python class and its threads, and say
    what it asks for."""
    from qsweep.cli.console import say
    from qsweep.spec import load_spec
    from qsweep.study.plan import check_engines
    from qsweep.study.points import crowded

    found = load_spec(spec)
    left_out = check_engines(found, crowded)
    found.task.check(spec.parent)
    say(f"{spec}: valid", *_asked(found), *(f"  left out     {reason}" for reason in left_out))


def _asked(spec: Spec) -> Iterator[str]:
    from qsweep.study.points import count, enumerated, tree

    points, trials = count(tree(spec)), spec.search.trials
    engines = dict.fromkeys(target.engine for target in spec.target.configs())
    yield f"  name         {spec.name}"
    yield f"  task         {spec.task.method}"
    yield f"  engines      {', '.join(engines)}"
    yield f"  space        {'a range of real numbers in it: not countable' if points is None else f'{points:,} points'}"
    yield f"  search       {'every point' if enumerated(spec) else f'{trials} trials by {spec.search.sampler}'}"
    yield f"  objectives   {', '.join(spec.objectives)}"
    if (told := spec.task.doubt) is not None:
        yield f"  note         {told}"
    for name, bound in spec.constraints.items():
        yield f"  constraint   {name}: {', '.join(f'{end} {value:g}' for end, value in bound if value is not None)}"


def plan(spec: SpecPath) -> None:
    """Say, before anything runs: how many configs, which stages they share, what is refused and why."""
    from qsweep.cli.console import say
    from qsweep.spec import load_spec
    from qsweep.study.plan import plan as planned

    say(*_planned(planned(load_spec(spec))))


def _planned(plan: Plan) -> Iterator[str]:
    counted = "not countable (a range of real numbers)" if plan.configs is None else f"{plan.configs:,}"
    how = "every one of them, in order" if plan.every_point else "as the sampler proposes"
    yield f"configs    {counted}"
    yield f"trials     {plan.trials:,} at most, {how}"
    yield f"repeats    {plan.repeats:,} at most, of near ties on the front"
    yield f"baselines  {'; '.join(plan.baselines)}"
    if plan.looked_at != plan.configs:
        yield f"Of {plan.looked_at:,} configs drawn at random:"
    for stage in plan.shared:
        yield f"shared     {stage.stage}: computed {_times(stage.distinct)} for {stage.trials:,} configs"
    for refusal in plan.refused:
        yield f"refused    {refusal.configs:,} configs: {refusal.reason}"
    if not plan.refused:
        yield "refused    none"


def schema() -> None:
    """Print the JSON schema of a spec, for editors: descriptions, bounds, completion."""
    import json

    from qsweep.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
