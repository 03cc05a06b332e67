"""Which block shape is fastest for a layer: a few are measured, once for each shape and GPU, and kept on disk."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from qsweep.cuda.arithmetic import Tile
from qsweep.cuda.capture import graph_of
from qsweep.cuda.layers import FEW_ROWS, Product
from qsweep.machine import cache_folder, cores

MOST = 4
"""Block shapes that are tried for a layer, each also with its sums cut into parts where that may pay."""
_LAUNCHES, _REPLAYS, _ROUNDS = 10, 5, 3
"""Launches captured together, so that their cost on the CPU is not measured; how often they are replayed for one time;
and times taken of each block shape."""
SHAPES = ((128, 128, 128, 4, 3), (128, 64, 128, 4, 4), (128, 128, 64, 4, 3), (64, 64, 128, 4, 4))
"""Rows, columns, depth, warps, stages: of 13 shapes tried on all layers of a ResNet-50 at batch 128 (H100), the four
that together come within 1 % of the best for each. 4 warps mean two blocks a multiprocessor: while one waits for its
products, which Triton's integer products do at every step, the other computes."""
FEW = ((128, 128, 128, 8, 4), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (64, 64, 128, 4, 4))
"""For layers with fewer large blocks than there are multiprocessors: two groups of warps in a block take turns then."""
NARROW = ((64, 128, 128, 4, 4), (64, 64, 128, 4, 4), (64, 32, 256, 4, 4), (64, 32, 512, 4, 3))
"""For layers of at most `FEW_ROWS`, which are bound by reading their weights: narrow and deep blocks put more
multiprocessors to it without sums that must be added up by one more kernel. Not measured yet."""

DEPTHWISE = ((32, 64, 32, 4, 1), (64, 32, 32, 4, 1), (16, 128, 32, 4, 1), (32, 32, 32, 2, 1))
"""Of convolutions channel by channel: 64 sums a thread each. Not measured yet."""


class Tiles:
    """Block shapes by what a layer's speed depends on, for one GPU and version of Triton. A damaged file is empty."""

    def __init__(self, gpu: str, folder: Path | None = None) -> None:
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{gpu} triton {triton.__version__}")
        self.path = (folder or cache_folder()) / f"tiles-{name}.json"
        self.known = _read(self.path)

    def keep(self, found: dict[str, Tile]) -> None:
        """Add `found` to the file. What another process wrote meanwhile stays; where the disk does not let us, no
        matter: it will be measured again."""
        self.known = _read(self.path) | self.known | found
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump({kind: asdict(tile) for kind, tile in sorted(self.known.items())}, file, indent=1)
            os.replace(file.name, self.path)


def _read(path: Path) -> dict[str, Tile]:
    try:
        return {kind: Tile(**fields) for kind, fields in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def candidates(product: Product, multiprocessors: int) -> list[Tile]:
    """At most four block shapes for `product`, no larger than it, and those of them that leave multiprocessors idle
    also with sums that are cut into parts, which run side by side."""
    found: list[Tile] = []
    narrow, few = product.rows <= FEW_ROWS, _blocks(product, 128, 128) <= multiprocessors
    of_a_warp = 512 if product.depthwise else 128 if narrow else 1024
    shapes = DEPTHWISE if product.depthwise else NARROW if narrow else FEW if few else SHAPES
    for rows, columns, depth, warps, stages in shapes:
        down, across = _block(product.rows, 16, rows), _block(product.columns, 16, columns)
        fewer = min(warps, max(1, down * across // of_a_warp))
        tile = Tile(down, across, _block(product.depth, 32, depth), fewer, stages)
        if tile not in found:
            found.append(tile)
    parts = [replace(tile, split=_parts(product, tile, multiprocessors)) for tile in found if product.splits]
    return [*found, *(tile for tile in parts if tile.split > 1)]


def _blocks(product: Product, rows: int, columns: int) -> int:
    return -(-product.rows // rows) * -(-product.columns // columns)


def _parts(product: Product, tile: Tile, multiprocessors: int) -> int:
    """So many that two blocks come to a multiprocessor, with at least two steps each; 1 where all are busy anyway."""
    blocks = _blocks(product, tile.rows, tile.columns)
    if blocks > multiprocessors:
        return 1
    return max(1, min(8, 2 * multiprocessors // blocks, product.depth // (2 * tile.depth)))


def _block(size: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << (size - 1).bit_length()))


def tune(products: Sequence[Product], device: torch.device, tiles: Tiles | None = None) -> None:
    """Give each of `products` its fastest block shape: from `tiles`, or by measuring, which fills their outputs with
    what inputs happen to lie there. Needs a CUDA device."""
    gpu = torch.cuda.get_device_properties(device)
    tiles = tiles or Tiles(gpu.name)
    working = _compiled(((each, tiles.known[each.kind]) for each in products if each.kind in tiles.known), device)
    new = {each.kind: each for each in products if (each.kind, tiles.known.get(each.kind)) not in working}
    trials = {kind: candidates(product, gpu.multi_processor_count) for kind, product in new.items()}
    working |= _compiled(((new[kind], tile) for kind, shapes in trials.items() for tile in shapes), device)
    found = {}
    for kind, product in new.items():
        times = milliseconds(product, [tile for tile in trials[kind] if (kind, tile) in working])
        if times:
            found[kind] = min(times, key=times.__getitem__)
    if found:
        tiles.keep(found)
    for product in products:
        tile = tiles.known.get(product.kind)
        product.tile = tile if tile is not None and (product.kind, tile) in working else None


def _compiled(trials: Iterable[tuple[Product, Tile]], device: torch.device) -> set[tuple[str, Tile]]:
    """Launch each once, on as many threads as there are cores: the compiler works outside of Python's lock.

    Returns those that the GPU can run for all of a kind.
    """
    index = torch.cuda.current_device() if device.index is None else device.index  # of this thread, not of others

    def launch(trial: tuple[Product, Tile]) -> bool:
        product, tile = trial
        torch.cuda.set_device(index)
        try:
            product.launch(tile=tile)
        except triton.TritonError:  # more shared memory than there is, or what this version cannot compile
            return False
        return True

    trials = list(trials)
    with ThreadPoolExecutor(cores()) as pool:
        done = list(pool.map(launch, trials))
    torch.cuda.synchronize(device)
    found: dict[tuple[str, Tile], bool] = {}
    for (product, tile), worked in zip(trials, done, strict=True):
        found[product.kind, tile] = found.get((product.kind, tile), True) and worked
    return {one for one, worked in found.items() if worked}


def milliseconds(product: Product, tiles: Sequence[Tile]) -> dict[Tile, float]:
    """Of one launch with each of `tiles`, between events around launches replayed from a graph.

    They take turns, and the least of each counts: clocks rise while the first ones run.
    """
    graphs = {tile: graph_of(partial(product.launch, tile=tile), _LAUNCHES) for tile in tiles}
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    event: Any = torch.cuda.Event
    for _ in range(_ROUNDS):
        for tile, graph in graphs.items():
            start, end = event(enable_timing=True), event(enable_timing=True)
            graph.replay()
            start.record()
            for _ in range(_REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times[tile].append(float(start.elapsed_time(end)) / (_LAUNCHES * _REPLAYS))
    return {tile: min(found) for tile, found in times.items()}
