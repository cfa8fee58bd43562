"""What is to run, as data: the tables, their order, and what they are to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..training import cifar, superres, text
from ..training.dense import DenseSettings
from ..training.settings import ClassSettings
from ..training.stream import StreamSettings
from ..training.superres import SuperresSettings
from ..training.text import TextSettings
from .table import Choice, Table

CIFAR, TEXT, PICTURES = "cifar-10-batches-bin", "wikitext-2-small", "super-resolution"
PAPERS = ("none", "bn", "bn*", "ln", "ln*", "dn", "dn*")
WITHOUT_BATCHES = ("bn", "kalman", "gn", "ln*", "dn*")
STUDIED = ("bn", "ln", "in", "gn", "frn", "vn", "evo-b0", "evo-s0", "wn", "sws", "dn")
"""Those of "Beyond BatchNorm", and divisive normalization."""
PASS = 612
"""Steps of a pass over the text, or one more."""


def _cifar(model: str, steps: int, evaluations: int = 10, **more: Any) -> ClassSettings:
    return ClassSettings(model, None, steps, evaluations=evaluations, checkpoint_every=250, **more)


def _text(model: str, **more: Any) -> TextSettings:
    """Thirteen passes, an evaluation behind each, as in the paper; then two in vain end a run."""
    passes = {"steps": 13 * PASS, "evaluations": 13, "checkpoint_every": PASS // 2, "patience": 2}
    return TextSettings(model, None, vocabulary=5000, **passes, **more)


def _dense(model: str, depth: int) -> DenseSettings:
    return DenseSettings(model, None, 2000, evaluations=4, checkpoint_every=1000, depth=depth)


def _dense_table(model: str, depth: int) -> Table:
    choice = Choice((0.003, 0.01, 0.03, 0.1), 2000, 0.25, seeds=2, further=(0.0001, 0.0003, 0.001))
    norms = ("none", "selu", "bn", "ln", "ln*", "dn", "dn*")
    return Table(f"dense-{model}-{depth}", "dense", _dense(model, depth), norms, 5, 0.2 + 0.12 * depth, None, choice)


def _small_batch(batch: int, step_ms: float) -> Table:
    """Ten passes; rates around the main table's, scaled with the batch."""
    steps = 200_000 // batch
    rates, further = (tuple(rate * batch / 100 for rate in of) for of in ((0.003, 0.01, 0.03), (0.0003, 0.001, 0.1)))
    settings = ClassSettings("cnn", None, steps, evaluations=10, checkpoint_every=2000, batch=batch)
    return Table(
        f"cifar-batch-{batch}",
        "cifar",
        settings,
        WITHOUT_BATCHES,
        3,
        step_ms,
        CIFAR,
        Choice(rates, steps // 4, 2000, further=further),
    )


_STREAM = {
    f"stream-{name}": Table(
        f"stream-{name}",
        "stream",
        StreamSettings("cnn-he", None, 6000, checkpoint_every=250, tasks=40, projected=name == "projected"),
        ("ln", "ln*", "dn*"),
        2,
        63,
        CIFAR,
    )
    for name in ("free", "projected")
}

TABLES = {
    table.name: table
    for table in (
        *(_dense_table(model, depth) for depth in (8, 32) for model in ("digits", "breast-cancer")),
        Table(
            "cifar-cnn",
            "cifar",
            _cifar("cnn", 6000),
            PAPERS,
            3,
            42,
            CIFAR,
            Choice((0.001, 0.003, 0.01), 2000, 2000, further=(0.0001, 0.0003, 0.03, 0.1)),
            cifar.PAPER["CIFAR-10"],
        ),
        _small_batch(4, 3.5),
        _small_batch(8, 5.0),
        *(
            Table(f"text-{model}", "text", _text(model), PAPERS, 2, step_ms, TEXT, paper=text.PAPER[model])
            for model, step_ms in (("relu", 37), ("lstm", 56))
        ),
        Table("text-relu-slow", "text", _text("relu", rate=0.1), ("bn*",), 2, 37, TEXT, paper=text.PAPER["relu"]),
        Table(
            "superres",
            "superres",
            SuperresSettings("srcnn", None, 15_000, evaluations=15, checkpoint_every=1000),
            ("none", "bn", "dn*"),
            2,
            14,
            PICTURES,
            paper=superres.PAPER[3],
        ),
        *_STREAM.values(),
        *(
            Table(
                f"batch-norms-{precision}",
                "cifar",
                _cifar("cnn-he", 2000, 5, rate=0.01, precision=precision),
                ("bn", "l1bn", "topk"),
                3,
                60,
                CIFAR,
            )
            for precision in ("float32", "bfloat16")
        ),
        Table(
            "weights",
            "cifar",
            _cifar("cnn-he", 2000, 5),
            ("none", "weight-norm", "bwn-l2", "bwn-l1", "bwn-linf", "bn"),
            2,
            54,
            CIFAR,
            Choice((0.003, 0.01, 0.03), 1000, 2000, further=(0.1, 0.3)),
        ),
        *(
            Table(
                f"sigma-{name}",
                "cifar",
                _cifar("cnn-he", 2000, 10, rate=0.01, projected=name == "projected"),
                ("ln", "ln-s", "ln*", "dn", "dn*"),
                2,
                55,
                CIFAR,
            )
            for name in ("free", "projected")
        ),
        Table(
            "probes",
            "deep",
            ClassSettings("plain", None, 1000, evaluations=4, checkpoint_every=250),
            STUDIED,
            2,
            85,
            CIFAR,
            Choice((0.003, 0.01, 0.03), 400, 2000, further=(0.1, 0.3)),
        ),
    )
}

ORDER: tuple[tuple[str, int], ...] = (
    ("cifar-cnn", 3),
    ("text-lstm", 1),
    ("text-relu", 1),
    ("text-relu-slow", 1),
    ("cifar-batch-4", 1),
    ("cifar-batch-8", 1),
    ("dense-digits-8", 5),
    ("dense-breast-cancer-8", 5),
    ("weights", 2),
    ("superres", 2),
    ("dense-digits-32", 5),
    ("dense-breast-cancer-32", 5),
    ("probes", 1),
    ("text-relu", 2),
    ("text-relu-slow", 2),
    ("text-lstm", 2),
    ("stream-free", 2),
    ("stream-projected", 2),
    ("sigma-free", 2),
    ("sigma-projected", 2),
    ("batch-norms-float32", 2),
    ("batch-norms-bfloat16", 2),
    ("probes", 2),
    ("cifar-batch-4", 2),
    ("cifar-batch-8", 2),
    ("batch-norms-float32", 3),
    ("batch-norms-bfloat16", 3),
    ("cifar-batch-4", 3),
    ("cifar-batch-8", 3),
)
"""(table, seeds), most worth first: whole comparisons before more of their seeds."""


@dataclass(frozen=True)
class Contrast:
    """Whether ``norm`` of ``table`` does better than another norm, of the same table or of the one that is named."""

    table: str
    norm: str
    than: str
    than_table: str | None = None


_DENSE = tuple(name for name in TABLES if name.startswith("dense"))
_RECURRENT = ("text-relu", "text-lstm")
QUESTIONS: dict[str, tuple[Contrast, ...]] = {
    "sigma": (
        Contrast("cifar-cnn", "bn*", "bn"),
        Contrast("cifar-cnn", "ln*", "ln"),
        Contrast("sigma-free", "ln-s", "ln"),
        *(Contrast(table, f"{norm}*", norm) for table in _RECURRENT for norm in ("bn", "ln")),
        Contrast("text-relu-slow", "bn*", "bn", "text-relu"),
    ),
    "penalty": (
        Contrast("sigma-free", "ln*", "ln-s"),
        *(Contrast(table, "dn*", "dn") for table in ("cifar-cnn", "sigma-free", *_RECURRENT)),
    ),
    "parity": (
        *(Contrast("cifar-cnn", "dn*", other) for other in ("bn*", "bn", "ln*", "none")),
        Contrast("cifar-cnn", "bn", "none"),
    ),
    "small batches": tuple(
        Contrast(f"cifar-batch-{batch}", norm, "bn") for batch in (4, 8) for norm in ("kalman", "gn", "ln*", "dn*")
    ),
    "recurrent": (
        *(
            Contrast(table, norm, other)
            for table in _RECURRENT
            for norm, others in (("ln*", ("bn*",)), ("dn*", ("bn*", "ln*", "ln", "none")), ("bn", ("none",)))
            for other in others
        ),
        *(Contrast("text-relu", norm, "bn*", "text-relu-slow") for norm in ("ln*", "dn*")),
    ),
    "pictures": (Contrast("superres", "bn", "none"), Contrast("superres", "dn*", "none")),
    "precision": (
        *(
            Contrast(f"batch-norms-{precision}", norm, "bn")
            for precision in ("float32", "bfloat16")
            for norm in ("l1bn", "topk")
        ),
        *(Contrast("batch-norms-bfloat16", norm, norm, "batch-norms-float32") for norm in ("bn", "l1bn", "topk")),
    ),
    "weights": (
        *(Contrast("weights", norm, "none") for norm in ("weight-norm", "bwn-l2", "bwn-l1", "bwn-linf", "bn")),
        Contrast("weights", "bwn-l2", "bn"),
    ),
    "self-normalizing": tuple(
        Contrast(table, "selu", other) for table in _DENSE for other in ("none", "bn", "ln", "dn*")
    ),
    "plasticity": tuple(Contrast("stream-projected", norm, norm, "stream-free") for norm in ("ln", "ln*", "dn*")),
    "projection": tuple(
        Contrast("sigma-projected", norm, norm, "sigma-free") for norm in ("ln", "ln-s", "ln*", "dn", "dn*")
    ),
}
