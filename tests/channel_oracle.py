"""A channel normalization's results from any backend, and the error that its arithmetic may make.

The oracle is the reference in float64 on the very numbers the implementation received.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from divnorm_kernels.channels.pool import Pool
from divnorm_kernels.channels.reference import evaluate as reference
from divnorm_kernels.checks import compute_dtype

NAMES = ("k", "a", "beta", "rho")
NUMBERS = (1.25, 0.3, 0.75, 0.8)
"""Of a call that is not told others: k, a, beta and rho."""


@dataclass
class Call:
    """A pool, its inputs and the gradient of y; ``learned`` is of the type of the sums, as a backend takes it."""

    pool: Pool
    x: Tensor
    dy: Tensor
    learned: Tensor | None

    def in_double(self) -> Call:
        """The same numbers in float64."""
        return Call(
            self.pool, self.x.double(), self.dy.double(), None if self.learned is None else self.learned.double()
        )

    @property
    def needs(self) -> tuple[bool, bool]:
        """Of all gradients that there are."""
        return True, self.learned is not None


def call(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    box: tuple[int, int] | None,
    squared: bool = False,
    learns: str = "",
    channels_last: bool = False,
    **numbers: float,
) -> Call:
    """Random inputs; ``learns`` has the first letters of the numbers that do; a box is cut to the channels."""
    values = [numbers.get(name, value) for name, value in zip(NAMES, NUMBERS, strict=True)]
    scalars = tuple(math.nan if name[0] in learns else value for name, value in zip(NAMES, values, strict=True))
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    if channels_last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    learned = torch.tensor(values, dtype=compute_dtype(x)) if learns else None
    most = max(shape[1] - 1, 0)
    return Call(Pool(box and (min(box[0], most), min(box[1], most)), squared, scalars), x, dy, learned)


def evaluate(kernels: ModuleType, call: Call) -> tuple[Tensor | None, ...]:
    """y, dx and dlearned of a backend of `divnorm_kernels.channels.backends`."""
    y = kernels.forward(call.pool, call.x, call.learned)
    return y, *kernels.backward(call.pool, call.dy, call.x, call.learned, call.needs)


def exact(call: Call) -> tuple[Tensor | None, ...]:
    """The same of the reference in float64."""
    double = call.in_double()
    inputs = [t.detach().requires_grad_() for t in (double.x, double.learned) if t is not None]
    y = reference(double.pool, inputs[0], None if len(inputs) == 1 else inputs[1])
    found = torch.autograd.grad(y, inputs, double.dy, materialize_grads=True)
    return y.detach(), *found, *[None] * (2 - len(inputs))


def _weights(call: Call, rho: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What channel c's sum weighs channel j by, and its derivative by rho, [c, j]; and how often either term rounds.

    A window of k terms rounds each of them k times at most. A recursion multiplies and adds once more with every
    channel, by a rho that has been rounded itself, and by a power of it from one segment to the next.
    """
    place = torch.arange(call.x.shape[1], dtype=torch.float64)
    offset = place - place.unsqueeze(1)
    if call.pool.box is None:
        distance = offset.abs()
        weight, slope = rho**distance, distance * rho ** (distance - 1).clamp_min(0)
        return weight, slope, 4 * distance + 4, 4 * distance + 8
    before, after = call.pool.box
    weight = ((offset >= -before) & (offset <= after)).double()
    rounds = torch.full_like(weight, min(before + after + 1, len(place)) + 3)
    return weight, torch.zeros_like(weight), rounds, rounds


def limits(call: Call, expected: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The largest error of each number of y, dx and dlearned: epsilon times how often terms round times their sizes.

    S and D are sums of what is not negative and keep a relative error. D^-beta has beta times that of D, and that of a
    logarithm times beta; u = dy n D^-beta / D that of both. A half type rounds once more, where it is stored.
    """
    exact = call.in_double()
    k, a, beta, rho = (
        float(exact.learned[i]) if learns else value
        for i, (value, learns) in enumerate(zip(exact.pool.scalars, exact.pool.learns, strict=True))
    )
    x, dy = (t.movedim(1, -1) for t in (exact.x, exact.dy))
    epsilon = torch.finfo(compute_dtype(call.x)).eps
    weight, slope, rounds, slope_rounds = _weights(call, rho)
    square = x * x
    total = square @ weight.T
    rounds_of_divisor = (square @ (weight * rounds).T) / total.clamp_min(1e-300) + 2
    divisor = k + a * total
    logarithm = divisor.log().abs()
    power = divisor**-beta
    rounds_of_power = abs(beta) * (rounds_of_divisor + 2 * logarithm) + 4
    numerator, derivative = (square, 2 * x) if call.pool.squared else (x, torch.ones_like(x))
    product = (dy * numerator * power).abs()
    u, rounds_of_u = product / divisor, rounds_of_power + rounds_of_divisor + 4
    pooled = u @ weight
    error_of_pooled = (u * rounds_of_u) @ weight + u @ (weight * rounds)
    of_y = (numerator * power).abs() * (rounds_of_power + 4)
    of_dx = (dy * derivative * power).abs() * (rounds_of_power + 6)
    of_dx += 2 * abs(a * beta) * x.abs() * (error_of_pooled + 4 * pooled)

    def stored(error: Tensor, value: Tensor) -> Tensor:
        kind = torch.finfo(call.x.dtype)
        return epsilon * error.movedim(-1, 1) + kind.eps * (value.abs() + kind.smallest_normal)

    y, dx, _ = expected
    of_all = [stored(of_y, y), stored(of_dx, dx), None]
    if call.learned is None:
        return tuple(of_all)
    # a thread of a GPU adds up the channels of a position, a lane of the CPU's those of 16 at most, and these are added
    depth = 16 * call.x.shape[1] + 64
    slopes = (u * rounds_of_u) @ slope + u @ (slope * slope_rounds)
    sums = (
        abs(beta) * (u * (rounds_of_u + depth)).sum(),
        abs(beta) * (u * total * (rounds_of_u + rounds_of_divisor + depth)).sum(),
        (product * (logarithm * (rounds_of_power + depth + 4) + rounds_of_divisor)).sum(),
        abs(beta * a) * (square * (slopes + depth * (u @ slope))).sum(),
    )
    of_all[2] = epsilon * torch.stack(sums)
    return tuple(of_all)


def check(kernels: ModuleType, call: Call) -> tuple[Tensor | None, ...]:
    """Compares all results of a backend with the oracle's, number by number; returns them."""
    got, expected = evaluate(kernels, call), exact(call)
    for name, have, want, limit in zip(("y", "dx", "dlearned"), got, expected, limits(call, expected), strict=True):
        if want is None:
            assert have is None, name
            continue
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        learns = call.x.new_tensor(call.pool.learns, dtype=torch.bool) if name == "dlearned" else True
        want = want * learns
        error = (have.double() - want).abs()
        assert (error <= limit).all(), f"{name}: {(error / limit).max():.3g} of its limit, for {call.pool}"
    return got
