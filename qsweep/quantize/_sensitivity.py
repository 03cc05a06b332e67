"""What a model suffers from rounding the weights of one layer, by layer and bit width."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qsweep.errors import NotFinite, Refused
from qsweep.evaluate import class_axis
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import Place
from qsweep.hub.nodes import constant
from qsweep.quantize._observers import NearestWeight
from qsweep.quantize._prepare import preparation
from qsweep.quantize.mixed import Mixed
from qsweep.stage import Context
from qsweep.tasks._parts import Parts, by_name
from qsweep.tasks._user import parts_of
from qsweep.tasks.base import Samples, Task

Scores = dict[str, dict[int, float]]
"""By the name of the weight and its bits; the less the better."""
_Rounded = dict[str, dict[int, Tensor]]
_BATCH = 64


def sensitivity(config: Mixed, model: QuantizedModel, context: Context) -> Scores:
    """The scores of every layer of the float graph `model` at every candidate width; computed once for all budgets.

    Raises NotFinite for a score that is not, Refused for `kl` on outputs that are no logits.
    """
    seed = config.draw(context)

    def compute(folder: Path) -> None:
        found = scored(config, model, context.task, _drawn(context.task, config.sensitivity_samples, seed))
        (folder / "scores.json").write_text(json.dumps(found))

    levels = (config.weight_scheme, config.weight_granularity, config.group_size, config.weight_range)
    samples = (config.sensitivity_samples, seed, config.smooth and config.calibration_samples)
    parents = (context.key, torch.__version__, *preparation(config), *samples, *levels)
    key = context.store.key("sensitivity", 7, config.sensitivity, sorted(config.candidates), *parents)
    stored = json.loads((context.store.folder(key, compute) / "scores.json").read_text())
    return {name: {int(bits): score for bits, score in found.items()} for name, found in stored.items()}


def _drawn(task: Task, count: int, seed: int) -> Samples:
    """Training samples as the model takes them, without replacement."""
    inputs, labels = task.samples("train")
    places = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return Samples(task.transform(inputs[places]), labels[places])


def scored(config: Mixed, model: QuantizedModel, task: Task, samples: Samples) -> Scores:
    """See `sensitivity`; nothing is kept."""
    rounded = dict(_rounded(config, model))
    if not rounded:
        return {}
    if config.sensitivity == "fisher":
        found = _by_fisher(model.graph, rounded, task, samples)
    else:
        parts = parts_of(task, "outputs")
        divergence = partial(_divergence, parts=parts, labels=samples.labels)
        distance = divergence if config.sensitivity == "kl" else partial(_error, parts=parts)
        found = _by_outputs(model.graph, rounded, samples.inputs, distance)
    if config.sensitivity == "fisher" and not any(score for scores in found.values() for score in scores.values()):
        raise Refused(
            "`sensitivity`: must be `output_error` or `kl` where the loss of a sample alone is always the same, as one "
            "of pairs is (got `fisher`, which is made of its gradients)"
        )
    for name, scores in found.items():
        if not all(map(math.isfinite, scores.values())):
            raise NotFinite(f"`{name}`: a weight is NaN or infinite, or an activation on the calibration samples is")
    return found


@torch.no_grad()
def _rounded(config: Mixed, model: QuantizedModel) -> Iterator[tuple[str, dict[int, Tensor]]]:
    for layer in model.layers():
        yield layer.name, {bits: _nearest(config, layer.name, layer.weight, bits) for bits in config.candidates}


def _nearest(config: Mixed, name: str, weight: Tensor, bits: int) -> Tensor:
    levels = NearestWeight(config.with_bits({name: bits}), Place((name,), edge=False)).fitted(weight)
    return levels.real(levels.integers(weight))


@torch.no_grad()
def _by_outputs(
    graph: fx.GraphModule, rounded: _Rounded, inputs: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> Scores:
    """Mean `distance` of the outputs with one layer rounded from those of the float model.

    What comes before a layer is computed once for all its widths.
    """
    scores = {name: dict.fromkeys(widths, 0.0) for name, widths in rounded.items()}
    whole, rest = fx.Interpreter(graph, garbage_collect_values=False), fx.Interpreter(graph)
    behind = {name: _behind(graph, name) for name in rounded}
    for batch in torch.split(inputs, _BATCH):
        wanted = whole.run(batch)
        for name, widths in rounded.items():
            kept = {node: value for node, value in whole.env.items() if node not in behind[name]}
            for bits, weight in widths.items():
                found = rest.run(batch, initial_env=kept | dict.fromkeys(_readings(graph, name), weight))
                scores[name][bits] += distance(found, wanted).item() * len(batch) / len(inputs)
    return scores


def _readings(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    """The nodes that are the constant `name`: several where layers share it."""
    return [node for node in graph.graph.nodes if node.op == "get_attr" and node.target == name]


def _behind(graph: fx.GraphModule, name: str) -> set[fx.Node]:
    """The nodes that depend on the constant `name`, and itself."""
    found = set(_readings(graph, name))
    for node in graph.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _divergence(found: Tensor, wanted: Tensor, parts: Parts | None, labels: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) of logits whose classes `labels` (N, ...) number, mean over the rest;
    float64."""
    axis = class_axis(wanted, labels)
    if wanted.dim() < 2 or wanted.shape[axis] < 2 or (parts and parts.several):
        raise Refused(
            "`sensitivity`: must be `output_error` or `fisher` for outputs that are not logits (batch, classes, ...) "
            f"(got `kl` for {tuple(wanted.shape)})"
        )
    logarithms = F.log_softmax(found.double(), axis), F.log_softmax(wanted.double(), axis)
    return F.kl_div(*logarithms, reduction="none", log_target=True).sum(axis).mean().clamp(min=0)


def _error(found: Tensor, wanted: Tensor, parts: Parts | None) -> Tensor:
    """Squared error over the squares of `wanted`; of several outputs the mean."""
    pairs = zip(*(by_name(each.double(), parts).values() for each in (found, wanted)), strict=True)
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([(a - b).square().sum() / b.square().sum().clamp(min=tiny) for a, b in pairs]).mean()


@torch.enable_grad()
def _by_fisher(graph: fx.GraphModule, rounded: _Rounded, task: Task, samples: Samples) -> Scores:
    """sum(F * (w - q)^2) / 2, the second order of the loss, with the diagonal of the empirical Fisher information F.

    F is the mean over samples of the squared gradient of the loss of that sample; one backward pass a sample (Dong et
    al. 2020, "HAWQ-V2", section 3, with the Hessian's trace; Li et al. 2021, "BRECQ", section 3.3, with F).
    """
    weights = {name: _leaf(graph, name) for name in rounded}
    given = {node: weight for name, weight in weights.items() for node in _readings(graph, name)}
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    interpreter = fx.Interpreter(graph)
    for number in range(len(samples.inputs)):
        sample, label = samples.inputs[number : number + 1], samples.labels[number : number + 1]
        loss = task.loss(interpreter.run(sample, initial_env=dict(given)), label)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            total += gradient.square() / len(samples.inputs)
    return {
        name: {bits: _weighted(fisher[name], weights[name] - weight) for bits, weight in widths.items()}
        for name, widths in rounded.items()
    }


def _leaf(graph: fx.GraphModule, name: str) -> Tensor:
    weight = constant(graph, _readings(graph, name)[0])
    assert weight is not None
    return weight.detach().clone().requires_grad_()


def _weighted(fisher: Tensor, error: Tensor) -> float:
    return (fisher.double() * error.detach().double().square()).sum().item() / 2
