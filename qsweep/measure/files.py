"""Files of an artifact: their bytes, and whether they are the same."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

_ZSTD_LEVEL = 19


def file_sizes(artifact: Path) -> dict[str, float]:
    """`size_bytes` of all files under `artifact`, and `size_zstd_bytes` of each compressed by zstd, level 19."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    contents = [content for _, content in _contents(artifact)]
    return {
        "size_bytes": sum(map(len, contents)),
        "size_zstd_bytes": sum(len(compressor.compress(content)) for content in contents),
    }


def digests(artifact: Path) -> dict[str, str]:
    """SHA-256 of every file under `artifact`, by its path in it."""
    return {name: sha256(content).hexdigest() for name, content in _contents(artifact)}


def _contents(artifact: Path) -> Iterator[tuple[str, bytes]]:
    """Every file under `artifact`: its path in it, what it holds."""
    for path in sorted(artifact.rglob("*")):
        if path.is_file():
            yield path.relative_to(artifact).as_posix(), path.read_bytes()
