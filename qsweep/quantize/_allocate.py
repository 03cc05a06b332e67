"""Which layer gets how many bits: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qsweep.errors import Refused


def allocate(scores: Sequence[Mapping[int, float]], sizes: Sequence[int], average_bits: float) -> list[int]:
    """One of the bit widths of each layer, so that sum(size * bits) <= average_bits * sum(sizes).

    `scores`: for each layer what the model suffers by bit width; the sum of those chosen is the least there is.
    `sizes`: what one bit of a layer costs. Raises Refused, naming the least average, where nothing fits. Source: Yao et
    al., "HAWQ-V3: Dyadic Neural Network Quantization" (2021), section 3.4.
    """
    total = sum(sizes)
    least = sum(size * min(options) for size, options in zip(sizes, scores, strict=True))
    if least > average_bits * total:
        least_average = math.ceil(1000 * least / total) / 1000
        raise Refused(f"`average_bits`: must be at least {least_average:g} for this model (got {average_bits:g})")
    return _solved(scores, sizes, math.floor(average_bits * total)) if total else [min(options) for options in scores]


def _solved(scores: Sequence[Mapping[int, float]], sizes: Sequence[int], budget: int) -> list[int]:
    """minimise sum(score * x), x in {0, 1}: one x of each layer is 1, sum(cost * x) <= budget."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(layer, bits) for layer, found in enumerate(scores) for bits in sorted(found)]
    unit = math.gcd(*sizes)  # small whole numbers: the solver's tolerance is far under one of them
    cost = np.array([sizes[layer] // unit * bits for layer, bits in options], dtype=float)
    score = np.array([scores[layer][bits] for layer, bits in options])
    choice = np.array([[float(layer == row) for layer, _ in options] for row in range(len(scores))])
    found = milp(
        score * (1e4 / max(score.max(), 1e-300)),  # the solver stops 1e-6 short of the best
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(choice, 1, 1), LinearConstraint(cost[None], ub=budget // unit)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    chosen = [bits for (_, bits), taken in zip(options, found.x, strict=True) if taken > 0.5]
    assert sum(size * bits for size, bits in zip(sizes, chosen, strict=True)) <= budget
    return chosen
