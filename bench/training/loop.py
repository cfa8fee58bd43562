"""The one training loop: schedule, log, checkpoints, and going on after a kill."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from divnorm_kernels import collect_l1

from . import activations

LOG, CHECKPOINT = "log.json", "checkpoint.pt"
RECORDS = 100
"""Points of a curve, at most."""


class ResumeError(ValueError):
    """Says why what an earlier run left in a folder cannot be gone on with."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained: by which optimizer, at a rate that is multiplied by a factor at parts of the steps."""

    steps: int
    rate: float
    decays: tuple[tuple[float, float], ...] = ()
    """(part of the steps, factor) from there on, one on top of the other."""
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    """The norm that all gradients together are cut to."""
    evaluations: int = 5
    checkpoint_every: int = 200
    optimizer: str = "sgd"
    """Or "adam"."""
    lowest: str | None = None
    """The figure whose lowest value tells the evaluation that counts; the last one does where there is none."""
    patience: int | None = None
    """With ``lowest``: the run ends when so many evaluations in a row have not lowered it, of those behind the first
    decay, where there is one: at the full rate the figure may rise and fall again."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.rate * math.prod(factor for part, factor in self.decays if step >= part * self.steps)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows a step: they are spread evenly, and the last follows the last step."""
        return (step + 1) * self.evaluations // self.steps > step * self.evaluations // self.steps


class Task(ABC):
    """What an experiment hands to the loop. Everything random in it follows from the seed and the step alone."""

    model: nn.Module
    plan: Plan

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of a training step, without the penalty."""

    @abstractmethod
    def evaluate(self, final: bool) -> dict[str, float]:
        """Figures on data that training does not see, after the last step those of the table too."""

    @abstractmethod
    def places(self) -> dict[str, nn.Module]:
        """The modules whose outputs are the activations to analyse, by name."""

    @abstractmethod
    def probe(self) -> None:
        """A forward pass in eval mode over data that training does not see."""

    def attach(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Hooks on an optimizer that has just been made."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and optimizer: tensors, numbers, lists and dicts of them."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes `state` back."""

    def finish(self, folder: Path) -> dict[str, Any]:
        """After training: more for the log, and pictures for the folder."""
        return {}


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and learned sigmas without."""
    named = list(model.named_parameters())
    sigmas = [p for name, p in named if name.rsplit(".", 1)[-1] == "sigma"]
    others = [p for name, p in named if name.rsplit(".", 1)[-1] != "sigma"]
    return [{"params": others, "weight_decay": weight_decay}, {"params": sigmas, "weight_decay": 0.0}]


def _optimizer(model: nn.Module, plan: Plan) -> Optimizer:
    groups = _groups(model, plan.weight_decay)
    if plan.optimizer == "adam":
        return Adam(groups, lr=plan.rate)
    return SGD(groups, lr=plan.rate, momentum=plan.momentum)


def _counted(records: list[dict[str, Any]], plan: Plan) -> tuple[dict[str, Any], bool]:
    """``(record, ended)``: the evaluation that counts of those there are, and whether the patience is at its end."""
    if plan.lowest is None:
        return records[-1], False
    evaluated = [record for record in records if plan.lowest in record]
    best = min(range(len(evaluated)), key=lambda i: evaluated[i][plan.lowest])
    since = [record for record in evaluated[best + 1 :] if not plan.decays or record["rate"] < plan.rate]
    return evaluated[best], plan.patience is not None and len(since) >= plan.patience


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Replaces a file in one step, so that a kill leaves the old one or the new one."""
    part = path.with_suffix(".part")
    write(part)
    os.replace(part, path)


def _write_log(folder: Path, log: dict[str, Any]) -> None:
    _write(folder / LOG, lambda path: path.write_text(json.dumps(log, indent=1) + "\n"))


def _checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run with the same settings left in the folder: tensors and plain values, no other objects."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        log = json.loads(found["log"])
    except Exception as error:
        raise ResumeError(f"{path}: expected a checkpoint of this command ({error}); remove it to start anew") from None
    if log["settings"] != settings:
        other = {k: (v, settings.get(k)) for k, v in log["settings"].items() if settings.get(k) != v}
        differences = ", ".join(f"{name} {was!r} there and {now!r} here" for name, (was, now) in other.items())
        raise ResumeError(
            f"{folder}: expected a run with these settings, got one with others ({differences}); choose another --out"
        )
    return {**found, "log": log}


def finished(folder: Path) -> dict[str, Any] | None:
    """The log of a run that has ended, if the folder holds one."""
    path = folder / LOG
    log = json.loads(path.read_text()) if path.exists() else None
    return log if log is not None and log["finished"] else None


def train(
    make: Callable[[], Task], settings: dict[str, Any], seed: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Trains the task that ``make`` builds after seeding, or goes on where an earlier run was stopped.

    Args:
        make: builds model and data.
        settings: what belongs to the run, as plain values; a run in the folder with others is an error.
        seed: of the initial values; data and its order are the task's.
        folder: receives log.json and the checkpoint.
        advance: called with the number of steps done.

    Returns:
        The log: settings, records of the curve, final figures, median seconds per step, activations.
        A run whose loss is no longer finite ends, with ``diverged`` set and no figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = _checkpoint(folder, settings)
    if saved is not None and saved["log"]["finished"]:
        _write_log(folder, saved["log"])  # it comes after the checkpoint: a kill may have been between them
        advance(saved["step"])
        return saved["log"]
    torch.manual_seed(seed)
    task = make()
    model, plan = task.model, task.plan
    optimizer = _optimizer(model, plan)
    task.attach(optimizer)
    log: dict[str, Any] = {"settings": settings, "finished": False, "diverged": False, "records": []}
    first, times = 0, []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        task.restore(saved["task"])
        first, log, times = saved["step"], saved["log"], saved["times"]
        advance(first)

    def save(step: int) -> None:
        content = {
            "step": step,
            "log": json.dumps(log),
            "times": times,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "task": task.state(),
        }
        _write(folder / CHECKPOINT, lambda path: torch.save(content, path))
        _write_log(folder, log)

    every = max(1, plan.steps // RECORDS)
    for step in range(first, plan.steps):
        model.train()
        begin = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        with collect_l1(model) as collected:
            loss = task.loss(step)
        penalty = collected()
        optimizer.zero_grad()
        (loss + penalty).backward()
        if plan.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        value = loss.item()
        times.append(perf_counter() - begin)
        if not math.isfinite(value):
            log |= {"diverged": True, "finished": True, "figures": {}, "seconds_per_step": median(times)}
            save(step + 1)
            break
        last = step + 1 == plan.steps
        evaluated = {}
        if plan.evaluates_after(step):
            model.eval()
            with torch.no_grad():
                evaluated = task.evaluate(last)
        if (step + 1) % every == 0 or evaluated:
            record = {"step": step + 1, "rate": plan.rate_at(step), "loss": value, "penalty": penalty.item()}
            log["records"].append({**record, **evaluated})
        if evaluated:
            counted, without_patience = _counted(log["records"], plan)
            last = last or without_patience
        if last:
            figures = {name: counted[name] for name in evaluated}
            log |= {"figures": figures, "seconds_per_step": median(times), "finished": True}
            log["activations"] = activations.measure(task.places(), task.probe)
            log |= task.finish(folder)
        if last or (step + 1) % plan.checkpoint_every == 0:
            save(step + 1)
        advance(step + 1)
        if last:
            break
    return log
