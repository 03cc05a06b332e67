"""Parquet files of encoded images to uint8 tensors, once."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qsweep.errors import DataError
from qsweep.store import Store
from qsweep.tasks._files import file_hash
from qsweep.tasks.base import Samples

VERSION = 1
HELD_OUT = 0.1

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Which images of a file, and how they are read."""

    file: str
    """The path as the spec has it, for messages."""
    rows: tuple[int, int] | None
    share: Literal["train", "validation"] | None
    """None: all of `rows`; `validation`: a tenth of them, drawn at random; `train`: the others."""
    image_column: str
    label_column: str
    mode: Literal["L", "RGB"]
    classes: int


def decoded(source: Source, path: Path, store: Store) -> Samples:
    """The images (N, C, H, W) and labels (N,) of `source`; decoded by the first who asks, mapped into memory later.

    Raises DataError, naming the file and the row, for what cannot be read.
    """
    from safetensors.torch import load_file, save_file

    def fill(folder: Path) -> None:
        images, labels = _decode(source, path)
        save_file({"images": images, "labels": labels}, folder / "images.safetensors")

    content = asdict(replace(source, file=file_hash(path, store)))
    folder = store.folder(Store.key("images", VERSION, metadata.version("pillow"), content), fill)
    tensors = load_file(folder / "images.safetensors")
    return Samples(tensors["images"], tensors["labels"])


def _decode(source: Source, path: Path) -> Samples:
    import pyarrow as pa

    try:
        return _collect(source, path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"`{source.file}`: must be a whole Parquet file ({error})") from None


def _collect(source: Source, path: Path) -> Samples:
    images: list[torch.Tensor] = []
    labels: list[int] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for rows, encoded, group_labels in _groups(source, path):
            labels += _checked_labels(source, rows, group_labels)
            images += pool.map(lambda item: _image(source, *item), zip(rows, encoded, strict=True))
            for row, image in zip(rows, images[-len(rows) :], strict=True):
                if image.shape != images[0].shape:
                    sizes = [" x ".join(str(side) for side in each.shape[1:]) for each in (images[0], image)]
                    raise DataError(f"`{source.file}`, row {row}: the image must be {sizes[0]} (got {sizes[1]})")
    return Samples(torch.stack(images), torch.tensor(labels))


def _groups(source: Source, path: Path) -> Iterator[tuple[list[int], list[bytes | None], list[int | None]]]:
    """Row numbers, encoded images and labels, a row group at a time; groups without a wanted row are not read."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    _check_columns(source, file.schema_arrow)
    wanted = _wanted(source, file.metadata.num_rows)
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        rows = wanted[(wanted >= start) & (wanted < stop)]
        if len(rows):
            table = file.read_row_group(group, columns=[f"{source.image_column}.bytes", source.label_column])
            table = table.take(rows - start)
            encoded = table.column(source.image_column).combine_chunks().field("bytes").to_pylist()
            yield rows.tolist(), encoded, table.column(source.label_column).to_pylist()
        start = stop


def _wanted(source: Source, count: int) -> Rows:
    """The row numbers of `source`, ascending, in a file of `count` rows."""
    first, last = source.rows or (0, count)
    if last > count or first == last:
        raise DataError(f"`{source.file}`: must have rows {first} to {last - 1} (it has {count} rows)")
    if source.share is None:
        return np.arange(first, last)
    order = first + np.random.RandomState(0).permutation(last - first)
    held_out = max(1, round(HELD_OUT * len(order)))
    return np.sort(order[:held_out] if source.share == "validation" else order[held_out:])


def _check_columns(source: Source, schema: object) -> None:
    import pyarrow as pa

    assert isinstance(schema, pa.Schema)
    types = {field.name: field.type for field in schema}
    for name in (source.image_column, source.label_column):
        if name not in types:
            raise DataError(f"`{source.file}`: must have a column `{name}` (it has {', '.join(types) or 'none'})")
    image, label = types[source.image_column], types[source.label_column]
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise DataError(f"`{source.file}`, `{source.image_column}`: must be a struct with `bytes` (got {image})")
    if not pa.types.is_integer(label):
        raise DataError(f"`{source.file}`, `{source.label_column}`: must be integers (got {label})")


def _checked_labels(source: Source, rows: list[int], labels: list[int | None]) -> Iterator[int]:
    for row, label in zip(rows, labels, strict=True):
        if label is None or not 0 <= label < source.classes:
            where = f"`{source.file}`, row {row}: `{source.label_column}`"
            raise DataError(f"{where} must be from 0 to {source.classes - 1} (got {label})")
        yield label


def _image(source: Source, row: int, encoded: bytes | None) -> torch.Tensor:
    """uint8 (C, H, W)."""
    try:
        with Image.open(io.BytesIO(encoded or b"")) as image:
            pixels = np.array(image.convert(source.mode))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # what Pillow raises on bad bytes
        raise DataError(f"`{source.file}`, row {row}: the image must be readable ({error})") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
