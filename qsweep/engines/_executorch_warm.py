"""Imported by the fork server: traces the graphs that XNNPACK's passes look for, so that no worker does.

They trace them when they first run: 3 s of the 6 s of a first small network, in every fresh process.
"""

from __future__ import annotations

import warnings

from qsweep.engines import _executorch  # noqa: F401  # with all that it imports
from qsweep.engines._forkable import forkable
from qsweep.engines._silent import silent


def _warm_up() -> None:
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    with forkable(), silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bilinear_2d.get_graphs()
        sdpa.get_graphs()


_warm_up()
