"""Torchvision beside a torch that its compiled operators were not made for, as timm and transformers import it."""

from importlib.util import find_spec
from pathlib import Path

import torch


def define_operators():
    """Names torchvision's operators, which its import asks for, where its own library does not load."""
    spec = find_spec("torchvision")
    if spec is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
