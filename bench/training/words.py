"""Running text as word numbers: a folder of train/valid/test.txt, or the texts that come with Python."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import DataError, first_there, read_bytes

PARTS = ("train", "valid", "test")
SOURCE = "Salesforce Research (WikiText-2, raw or tokenized) or Mikolov's simple-examples (Penn Treebank)"
UNKNOWN, END = "<unk>", "<eos>"


@dataclass(frozen=True)
class Text:
    """Three texts as numbers of words, each of shape (words,)."""

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: int


def _words(text: str) -> list[str]:
    return [word for line in text.splitlines() if line.strip() for word in (*line.split(), END)]


def _read(folder: Path, part: str) -> list[str]:
    what = f"a text of words separated by spaces, {part}.txt or ptb.{part}.txt"
    path = first_there(folder, (f"{part}.txt", f"ptb.{part}.txt"), what, SOURCE)
    try:
        words = _words(read_bytes(path, what, SOURCE).decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 ({error}); get it from {SOURCE}") from None
    if not words:
        raise DataError(f"{path}: empty; expected {what}, to be had from {SOURCE}")
    return words


def _python_texts() -> dict[str, list[str]]:
    """The help topics of Python, cut in ten: eight to train on."""
    from pydoc_data.topics import topics

    words = _words("\n".join(" ".join(re.findall(r"[a-z]+|[.,:;()]", topics[name].lower())) for name in sorted(topics)))
    tenth = len(words) // 10
    return {"train": words[: 8 * tenth], "valid": words[8 * tenth : 9 * tenth], "test": words[9 * tenth :]}


def load(path: Path | None, vocabulary: int) -> Text:
    """The texts of a folder, or Python's help where none is given, with the ``vocabulary`` most frequent words."""
    texts = _python_texts() if path is None else {part: _read(path, part) for part in PARTS}
    counts = Counter(texts["train"])
    counts.pop(UNKNOWN, None)
    kept = sorted(counts, key=lambda word: (-counts[word], word))[: max(1, vocabulary - 1)]
    numbers = {word: i for i, word in enumerate([UNKNOWN, *kept])}
    coded = {part: torch.tensor([numbers.get(word, 0) for word in words]) for part, words in texts.items()}
    return Text("Python's help" if path is None else path.resolve().name, **coded, vocabulary=len(numbers))
