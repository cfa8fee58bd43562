"""A small table of the evidence, and logs as its runs leave them."""

from bench.evidence.table import Choice, Table
from bench.training.dense import DenseSettings

SMALL = Table(
    "small",
    "dense",
    DenseSettings("wine", None, 30, evaluations=3, checkpoint_every=10, depth=2),
    ("none", "bn"),
    2,
    1.0,
    choice=Choice((1e-5, 0.1), 20, 0.25),
)


def log_of(figure, diverged=False):
    """Of a run that has ended with this accuracy, or has diverged."""
    return {
        "settings": {},
        "diverged": diverged,
        "finished": True,
        "records": [{"step": 1, "loss": 1.0}, {"step": 30, "loss": 0.123456789, "accuracy": figure}],
        "figures": {} if diverged else {"accuracy": figure},
        "seconds_per_step": 0.5,
        "activations": {},
    }
