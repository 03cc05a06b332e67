"""What reads what layers read too: sums and pools in fewer bits, moves between grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, context, digits, network
from torch import Tensor, nn

from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import BINARY, COMPUTE, DEQUANTIZE
from qsweep.hub.nodes import nodes_of
from qsweep.hub.simulate import simulation
from qsweep.quantize import _calibrate as calibrate
from qsweep.quantize.base import Grids
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT


def grids_read(model: QuantizedModel, targets: set[Any]) -> list[int]:
    """Bits of every activation that nodes of `targets` read."""
    given = [value for node in nodes_of(model.graph, targets) for value in node.all_input_nodes]
    grids = [grid_of(value) for value in given if value.target is DEQUANTIZE]
    return [(grid.high - grid.low).bit_length() for grid in grids]


@pytest.mark.parametrize("method", [PTQ, LSQ, QAT], ids=lambda method: method.__name__)
@pytest.mark.parametrize("name", ["digits_cnn", "depthwise", "shortcut", "sequence"])
def test_sums_keep_eight_bits_of_what_layers_read_in_fewer(method: type[Grids], name: str, tmp_path: Path) -> None:
    made = {
        sums: method.model_validate({"activation_bits": 3, "sum_grid": sums, "calibration_samples": 60}).apply(
            network(name), context(tmp_path, name)
        )
        for sums in ("own", "shared")
    }
    assert set(grids_read(made["own"], BINARY)) == {8}
    assert set(grids_read(made["own"], COMPUTE)) == {3}
    assert 3 in grids_read(made["shared"], BINARY)
    inputs = Noise(20).inputs
    assert torch.equal(simulation(made["own"])(inputs), made["own"].graph(inputs))


def test_sums_with_eight_bits_keep_a_trained_network_nearer_to_its_float_outputs() -> None:
    model, found, _ = digits()
    inputs = found.task.transform(found.task.samples("validation").inputs)
    errors = []
    for sums in ("own", "shared"):
        made = PTQ.model_validate({"activation_bits": 3, "sum_grid": sums}).apply(model, found)
        errors.append((simulation(made)(inputs) - model(inputs)).square().mean().item())
    assert errors[0] < errors[1]


def test_who_reads_eight_bits_anyway_has_one_grid(tmp_path: Path) -> None:
    for fields in ({}, {"activation_bits": 16}, {"activation_bits": None}, {"activation_mode": "dynamic"}):
        own, shared = (PTQ.model_validate(fields | {"sum_grid": sums}) for sums in ("own", "shared"))
        assert own.uid() == shared.uid()
        graphs = [config.apply(network("shortcut"), context(tmp_path)).graph for config in (own, shared)]
        assert len(graphs[0].graph.nodes) == len(graphs[1].graph.nodes)
    assert PTQ(activation_bits=4).uid() != PTQ(activation_bits=4, sum_grid="own").uid()


def test_ranges_are_computed_once_whoever_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    for name in ("see_extremes", "see_counts"):
        see = getattr(calibrate, name)
        monkeypatch.setattr(calibrate, name, lambda graph, inputs, see=see: runs.append(1) or see(graph, inputs))
    for bits in (4, 8, 3):
        PTQ(activation_bits=bits, calibration="mse", sum_grid="own").apply(network("shortcut"), context(tmp_path))
    assert len(runs) == 2


class Moved(nn.Module):
    """Two images that layers read, each on a grid of its own, moved together for a float op."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.head, self.tail = nn.Linear(576 if way == "pad" else 256, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        one = F.max_pool2d(F.relu(self.first(x)), 2)
        pool = F.avg_pool2d if self.way == "pooled" else F.max_pool2d
        other = pool(F.relu(self.second(5 * x)), 2)
        rest = self.tail(self.third(one).flatten(1)) + self.tail(self.fourth(other).flatten(1))
        together = torch.cat([one, other], 1)
        moved = F.pad(together, (1, 1, 1, 1), value=-2.0) if self.way == "pad" else together * 0.5
        logits: Tensor = self.head(moved.flatten(1)) + rest
        return logits


@pytest.mark.parametrize("way", ["cat", "pad", "pooled"])
def test_moves_from_several_grids_and_pads_with_other_than_zero_are_of_real_values(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Moved(way).eval()
    inputs = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = PTQ(calibration_samples=40).apply(model, context(tmp_path, "moved", task=Noise(inputs=inputs)))
    torch.testing.assert_close(IntegerInterpreter(made.graph)(inputs), simulation(made)(inputs), rtol=0, atol=0.02)
