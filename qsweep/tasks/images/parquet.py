from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from qsweep.config import Config, Listed, content_hash
from qsweep.errors import DataError
from qsweep.tasks._files import file_hash, locate, store_of
from qsweep.tasks.base import Samples, SplitName
from qsweep.tasks.images.base import ImageData, Images


class Rows(Config):
    """Rows of a Parquet file; a plain path means all of them."""

    file: str
    """Relative to the spec's folder; `~` and `$VARIABLES` are expanded."""
    rows: Listed[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]] | None = None
    """The first row and the one after the last; null: all rows."""

    @model_validator(mode="after")
    def _not_empty(self) -> Rows:
        if self.rows and self.rows[0] >= self.rows[1]:
            raise ValueError("`rows` must be [first, one after the last], the first one lower")
        return self

    def overlaps(self, other: Rows) -> bool:
        """Whether rows are in both, which are of one file."""
        if self.rows is None or other.rows is None:
            return True
        return self.rows[0] < other.rows[1] and other.rows[0] < self.rows[1]


def _from_path(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


Part = Annotated[Rows, BeforeValidator(_from_path, json_schema_input_type=str | Rows)]


_APART = "`train`, `validation` and `test` must share no rows"


def _shared(parts: list[tuple[str, Rows]]) -> str | None:
    """The file of which two of the parts take the same rows, or None."""
    for i, (file, part) in enumerate(parts):
        if any(file == other and part.overlaps(rows) for other, rows in parts[:i]):
            return file
    return None


class Parquet(ImageData):
    """Images in Parquet files as Hugging Face lays them out: a struct with the encoded `bytes`, and an integer label.

    All images must have one size. They are decoded once and kept as uint8; one channel of mean and deviation means
    grey images, three mean RGB.
    """

    method: Literal["parquet"] = "parquet"
    train: Part
    validation: Part | None = None
    """null: a tenth of the train rows, drawn at random, is held out. No validation set for a checkpoint that was
    trained on those rows."""
    test: Part
    classes: Annotated[int, Field(ge=2)]
    """Labels go from 0 to one less."""
    mean: Listed[tuple[float, ...]] = (0.485, 0.456, 0.406)
    """Of each channel, for pixels from 0 to 1."""
    std: Listed[tuple[Annotated[float, Field(gt=0)], ...]] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, likewise."""
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """Augmentation: training images are padded by this many black pixels and cropped to their size at random."""
    flip: bool = True
    """Augmentation: half of the training images are mirrored."""
    image_column: str = "image"
    label_column: str = "label"

    @model_validator(mode="after")
    def _fits(self) -> Parquet:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(f"`mean` and `std` must have 1 value each or 3 (got {len(self.mean)} and {len(self.std)})")
        if (twice := _shared([(part.file, part) for part in self._parts])) is not None:
            raise ValueError(f"{_APART} (`{twice}` is used twice)")
        return self

    @property
    def _parts(self) -> list[Rows]:
        return [part for part in (self.train, self.validation, self.test) if part is not None]

    @property
    def files(self) -> list[str]:
        return [part.file for part in self._parts]

    def open(self, root: Path) -> Images:
        twice = _shared([(str(locate(part.file, root)), part) for part in self._parts])
        if twice is not None:  # under two spellings
            raise DataError(f"{_APART} (`{twice}` is used twice)")
        return Images(
            classes=self.classes,
            mean=tuple(255 * value for value in self.mean),
            std=tuple(255 * value for value in self.std),
            padding=self.crop_padding,
            flip=self.flip,
            load=lambda split: self._load(split, root),
        )

    def fingerprint(self, root: Path) -> str:
        store = store_of(root)
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        files = {name: part and [file_hash(locate(part.file, root), store), part.rows] for name, part in parts.items()}
        return content_hash([self.version, files, self.model_dump(mode="json", exclude=set(parts))])

    def _load(self, split: SplitName, root: Path) -> Samples:
        from qsweep.tasks.images._decode import Source, decoded

        part, share = {"train": self.train, "validation": self.validation, "test": self.test}[split], None
        if self.validation is None and split != "test":
            part, share = self.train, split
        assert part is not None
        source = Source(
            file=part.file,
            rows=part.rows,
            share=share,
            image_column=self.image_column,
            label_column=self.label_column,
            mode="L" if len(self.mean) == 1 else "RGB",
            classes=self.classes,
        )
        return decoded(source, locate(part.file, root), store_of(root))
