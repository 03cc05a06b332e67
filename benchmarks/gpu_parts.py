"""The parts of the GPU benchmark: what each measures, in which order, and which rows are its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import gpu_asked as asked
import torch
from gpu_clock import Bench
from gpu_prepare import Preparation, Wanted
from gpu_rows import Rows

if TYPE_CHECKING:
    from gpu_kernels import Convolutions, Roofs
    from gpu_networks import Networks

_PREPARE = 0.3
"""Share of the budget after which compiling beside each other ends."""


class Session:
    """What parts share; made when it is first needed, so that what fails to import takes its own part along only."""

    def __init__(self, bench: Bench, rows: Rows) -> None:
        self.bench, self.rows = bench, rows
        self.batches = (128, 1) if bench.tiny else asked.NETWORK_BATCHES
        self.prepared: Preparation | None = None

    def prepare(self, parts: Sequence[str]) -> None:
        """Begin to compile the networks that `parts` will time, but for what is settled."""
        cases: list[Wanted] = [(*asked.MAIN, False), (*asked.MAIN, True)] if "main" in parts else []
        if "networks" in parts and not self.bench.tiny:
            cases += [(name, batch, False) for name, batch in self._others()]
        cases = [case for case in cases if not self.rows.settled(asked.network(*case[:2]))]
        if cases:
            self.prepared = Preparation(cases, self.bench.device.type, tiny=self.bench.tiny)

    def settle(self) -> None:
        """Nothing but this process works from now on."""
        if self.prepared is not None:
            self.prepared.wait(_PREPARE * self.bench.budget - (self.bench.budget - self.bench.left))

    def stop(self) -> None:
        if self.prepared is not None:
            self.prepared.stop()

    def run(self, part: str) -> None:
        names = {
            "equality": [asked.EQUAL_CONVOLUTIONS, asked.EQUAL_LINEARS, *map(asked.equal_network, asked.NETWORKS)],
            "roofs": [asked.COPY, asked.BF16, asked.INT8, asked.MATRIX],
            "main": [asked.network(*asked.MAIN)],
            "convolutions": [asked.convolution(shape, n) for shape in asked.SHAPES for n in asked.CONVOLUTION_BATCHES],
            "trainings": asked.trainings(),
            "qat": [*asked.QAT.values()],
            "networks": [asked.network(name, batch) for name in asked.NETWORKS for batch in asked.NETWORK_BATCHES],
            "linears": [*map(asked.linear, asked.LINEAR_ROWS)],
            "energy": [asked.MEMORY, asked.ENERGY],
            "sweeps": [*asked.SWEEPS.values()],
        }
        own = names.get(part, [])
        needed = names["convolutions"] if part == "roofs" else []  # floors are told by roofs
        if own and self.rows.settled(*own, *needed):
            return
        with self.rows.guard(own):
            getattr(self, part)()
        if self.sound():
            self.bench.clear()

    def sound(self) -> bool:
        """Whether the device still works."""
        try:
            if self.bench.gpu:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    @cached_property
    def convolutions_(self) -> Convolutions:
        from gpu_kernels import Convolutions

        return Convolutions(self.bench)

    @cached_property
    def roofs_(self) -> Roofs:
        from gpu_kernels import Roofs

        return Roofs()

    @cached_property
    def networks_(self) -> Networks:
        from gpu_networks import Networks

        return Networks(self.bench, self.rows, self.prepared)

    def equality(self) -> None:
        checks = (
            (asked.EQUAL_CONVOLUTIONS, 20, self.convolutions_.equality),
            (asked.EQUAL_LINEARS, 5, self.convolutions_.linear_equality),
        )
        for name, seconds, check in checks:
            if not self.rows.settled(name):
                with self.rows.guard(name):
                    self.bench.need(seconds)
                    check(self.rows)
        for name in asked.NETWORKS:
            if not self.rows.settled(asked.equal_network(name)):
                self.networks_.equality(name)

    def roofs(self) -> None:
        from gpu_kernels import roofs

        roofs(self.bench, self.rows, self.roofs_)

    def main(self) -> None:
        self.networks_.quick(*asked.MAIN)
        self._compiled([asked.MAIN], tuned=False)

    def tuned(self) -> None:
        self._compiled([asked.MAIN], tuned=True)

    def convolutions(self) -> None:
        from gpu_kernels import summary

        try:
            names = {n: [asked.convolution(shape, n) for shape in asked.SHAPES] for n in asked.CONVOLUTION_BATCHES}
            wanted = [batch for batch in names if not self.rows.settled(*names[batch])]
            for batch in wanted[: 1 if self.bench.tiny else None]:
                self.convolutions_.speed(self.rows, self.roofs_, batch)
        finally:
            summary(self.rows)

    def trainings(self) -> None:
        from gpu_training import trainings

        trainings(self.bench, self.rows)

    def qat(self) -> None:
        from gpu_qat import steps

        steps(self.bench, self.rows)

    def networks(self) -> None:
        from gpu_networks import floor

        for name, batch in self._others():
            self.networks_.quick(name, batch)
        floor(self.rows)

    def linears(self) -> None:
        from gpu_linear import linears

        linears(self.bench, self.rows)

    def energy(self) -> None:
        for name, measure in ((asked.MEMORY, self.networks_.memory), (asked.ENERGY, self.networks_.energy)):
            if not self.rows.settled(name):
                measure()

    def compiled(self) -> None:
        self._compiled(self._others(), tuned=False)

    def autotune(self) -> None:
        self._compiled(self._others(), tuned=True)

    def _others(self) -> list[tuple[str, int]]:
        return [(name, batch) for batch in self.batches for name in asked.NETWORKS if (name, batch) != asked.MAIN]

    def _compiled(self, cases: list[tuple[str, int]], *, tuned: bool) -> None:
        from gpu_baselines import compiled
        from gpu_networks import floor

        for name, batch in cases:
            for way in compiled(name, batch, tuned=tuned):
                self.networks_.compiled(name, batch, way)
        floor(self.rows)

    def sweeps(self) -> None:
        from gpu_sweep import sweeps

        sweeps(self.bench, self.rows)
