"""What the loaders share: the error of a missing or damaged file, and folders looked into."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Says which file is missing or damaged, what was expected, and where it can be had."""


def read_bytes(path: Path, what: str, source: str) -> bytes:
    """The bytes of a file that ``what`` describes and ``source`` says where to get."""
    if not path.is_file():
        raise DataError(f"{path}: not there; expected {what}, to be had from {source}")
    return path.read_bytes()


def first_there(folder: Path, names: tuple[str, ...], what: str, source: str) -> Path:
    """The first of several names that the folder holds."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder}: got none of {', '.join(names)}; expected {what}, to be had from {source}")
