"""Parquet files of encoded images to uint8 tensors, once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qsweep.errors import DataError
from qsweep.machine import cores
from qsweep.store import Store
from qsweep.tasks._files import file_hash
from qsweep.tasks.base import Samples

VERSION = 1
HELD_OUT = 0.1

Rows = NDArray[np.int64]
Pixels = NDArray[np.uint8]


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
    with ThreadPoolExecutor(cores()) as pool:
        for rows, encoded, group_labels in _groups(source, path):
            labels += _checked_labels(source, rows, group_labels)
            parts = [slice(start, start + 100) for start in range(0, len(rows), 100)]
            for part, batch in zip(parts, pool.map(partial(_images, source, rows, encoded), parts), strict=True):
                images.append(batch)
                _check_size(source, rows[part.start], batch.shape[2:], images[0].shape[2:])
    return Samples(torch.cat(images), torch.tensor(labels))


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


def _images(source: Source, rows: list[int], encoded: list[bytes | None], part: slice) -> torch.Tensor:
    """uint8 (B, C, H, W) of one part of a row group, large enough that handing it to a thread costs nothing."""
    rows, encoded = rows[part], encoded[part]
    images = [_image(source, row, content) for row, content in zip(rows, encoded, strict=True)]
    for row, image in zip(rows, images, strict=True):
        _check_size(source, row, image.shape[:2], images[0].shape[:2])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _image(source: Source, row: int, encoded: bytes | None) -> Pixels:
    """uint8 (H, W, C)."""
    try:
        with Image.open(io.BytesIO(encoded or b"")) as image:
            pixels = np.asarray(image.convert(source.mode))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # what Pillow raises on bad bytes
        raise DataError(f"`{source.file}`, row {row}: the image must be readable ({error})") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def _check_size(source: Source, row: int, size: tuple[int, ...], first: tuple[int, ...]) -> None:
    if size != first:
        sizes = [f"{height} x {width}" for height, width in (first, size)]
        raise DataError(
            f"`{source.file}`, row {row}: the image must be {sizes[0]} pixels like the first (got {sizes[1]})"
        )
