"""What stands behind the norm: a residual that is added, an activation, and the gradient back through it.

A smooth one is z times a gate that rises from 0 to 1: sigmoid(z) for SiLU, the normal distribution for GELU, for its
tanh form 0.5 (1 + tanh(u)) = sigmoid(2 u). At an infinite z the gate's slope of zero makes the derivative NaN, and at
-inf the gate of zero the value, as in torch; at every finite z both are finite.
"""

import triton
import triton.language as tl

from . import schema
from .device import (
    parameter,
)


@triton.jit
def parameters(weight, bias, threshold, at, mask, AXIS: tl.constexpr):
    """Weight, bias and threshold at the offsets ``at``, float32, along the other axis of a tile; what a norm has
    without them where they are absent.
    """
    return (
        tl.expand_dims(parameter(weight, at, mask, 1.0), AXIS),
        tl.expand_dims(parameter(bias, at, mask, 0.0), AXIS),
        tl.expand_dims(parameter(threshold, at, mask, 0.0), AXIS),
    )


@triton.jit
def with_residual(value, residual, base, at, mask, POLICY: tl.constexpr):
    """The value with the residual added, where there is one, at the offsets ``at`` of a row that begins at ``base``."""
    if residual is not None:
        value += tl.load(residual + base + at, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return value


@triton.jit
def activated(value, tau, ACTIVATION: tl.constexpr):
    """The value, which becomes y, through the activation, whose threshold is ``tau``; a NaN stays one."""
    if ACTIVATION == schema.Activation.NONE:
        found = value
    elif ACTIVATION == schema.Activation.RELU:
        found = tl.where(value < 0, 0.0, value)
    elif ACTIVATION == schema.Activation.TLU:
        found = tl.where(_above(value, tau), value, tau)
    else:
        gate, _ = _gate(value, ACTIVATION)
        found = value * gate
    return found


@triton.jit
def passed(gradient, value, tau, mask, ACTIVATION: tl.constexpr):
    """The gradient for the value from that for y.

    ``mask``: where there are elements. Elsewhere the gradient is zero and stays so, whatever the value overflows to.
    """
    if ACTIVATION == schema.Activation.NONE:
        found = gradient
    elif ACTIVATION == schema.Activation.RELU:
        found = tl.where(value <= 0, 0.0, gradient)
    elif ACTIVATION == schema.Activation.TLU:
        found = tl.where(_above(value, tau), gradient, 0.0)
    else:
        gate, slope = _gate(value, ACTIVATION)
        found = tl.where(mask, gradient * (gate + value * slope), 0.0)
    return found


@triton.jit
def stopped(gradient, value, tau):
    """The gradient for the threshold from that for y; not what `passed` leaves of it, which may be inf - inf."""
    return tl.where(_above(value, tau), 0.0, gradient)


@triton.jit
def _above(value, tau):
    """Whether the value is above the threshold, and y; a NaN is."""
    return (value > tau) | (value != value)


@triton.jit
def _gate(z, ACTIVATION: tl.constexpr):
    """The gate and its derivative, to a few ulp of themselves; that of the tanh form to a few ulp of 1."""
    if ACTIVATION == schema.Activation.SILU:
        gate, slope = _sigmoid(z)
    elif ACTIVATION == schema.Activation.GELU:
        gate, slope = _normal(z)
    else:
        # 2 u = z (c + d z^2), whose slope does not overflow: from 16 on sigmoid has none
        factor = 1.5957691 + 0.071354814 * tl.minimum(z * z, 256.0)
        gate, slope = _sigmoid(z * factor)
        slope *= 3.0 * factor - 3.1915382
    return gate, slope


@triton.jit
def _sigmoid(z):
    """1 / (1 + e^-z) and its derivative. The divisor is within 1 and 2, where the quick division is good to 2 ulp."""
    small = _exp(-tl.abs(z), 0.0)
    large = 1.0 / (1.0 + small)
    below = small * large
    return tl.where(z < 0, below, large), below * large


@triton.jit
def _normal(z):
    """The normal distribution's function and density.

    Below zero erf would cancel against 1. There the function is e^(-z^2/2) times t P(t), t = 1 / (1 + 0.35 abs(z)) with
    the minimax polynomial P, relative to the function, down to -14, where float32 ends.
    """
    a = tl.abs(z)
    # z^2 is exact of 12 digits of z; the rest of it counts where e^(-z^2/2) is small
    leading = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    small = _exp(-0.5 * leading * leading, -0.5 * (a - leading) * (a + leading))
    t = 1.0 / (1.0 + 0.35 * a)
    p = -0.029144967 * t + 0.14396735
    p = p * t - 0.25570596
    p = p * t + 0.15916542
    p = p * t - 0.023104296
    p = p * t + 0.10550584
    p = p * t + 0.11983337
    p = p * t + 0.13986181
    p = p * t + 0.13962141
    below = small * (p * t)
    return tl.where(z < 0, below, 1.0 - below), 0.39894228 * small


@triton.jit
def _exp(x, rest):
    """e^(x + rest) for an x of at most 0 and a ``rest`` next to it; zero below -87, the smallest normal number.

    The instruction behind `tl.exp` alone errs by as many ulp as x is large: here it sees no more than log(2) / 2.
    """
    at_most_87 = tl.maximum(x, -87.0)
    # the sum with 1.5 * 2^23 has the nearest whole number in its last digits
    rounded = at_most_87 * 1.442695 + 12582912.0
    whole = rounded - 12582912.0
    left = (at_most_87 - whole * 0.693145751953125) - whole * 1.4286068e-6
    power = ((rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, tl.exp(left + rest) * power)
