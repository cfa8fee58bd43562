"""Normalized weights and their gradients in numpy, float64, row by row."""

import math

import numpy as np


def rows(v, dim):
    """A view with one row per index of ``dim``, or one in all."""
    return v.reshape(1, -1) if dim is None else np.moveaxis(v, dim, 0).reshape(v.shape[dim], -1)


def unrows(r, shape, dim):
    if dim is None:
        return r.reshape(shape)
    moved = (shape[dim], *(s for d, s in enumerate(shape) if d != dim))
    return np.moveaxis(r.reshape(moved), 0, dim)


def norm(r, p=2):
    """``norm_p`` of every row."""
    if p == math.inf:
        return np.abs(r).max(1)
    return (np.abs(r) ** p).sum(1) ** (1 / p)


def slope(r, p=2):
    """The gradient of ``norm_p``, for rows without ties."""
    if p == 1:
        return np.sign(r)
    if p == math.inf:
        return np.sign(r) * (np.abs(r) == np.abs(r).max(1, keepdims=True))
    return r / norm(r)[:, None]


def scaled(v, gain, dim=0, p=2):
    """``gain_i v_i / norm_p(v_i)``."""
    r = rows(v, dim)
    return unrows(r * (gain / norm(r, p))[:, None], v.shape, dim)


def scaled_gradients(v, gain, dw, dim=0, p=2):
    """Of v and of the gains: dv = gain/norm (dw - k <dw, v>/norm), dgain = <dw, v>/norm."""
    r, d = rows(v, dim), rows(dw, dim)
    n = norm(r, p)
    along = (r * d).sum(1) / n
    dv = (gain / n)[:, None] * (d - slope(r, p) * along[:, None])
    return unrows(dv, v.shape, dim), along


def bounded(gain, rho):
    """``rho g / norm(g)``."""
    return rho * gain / np.sqrt((gain**2).sum())


def bounded_gradient(gain, rho, dgain):
    """What the gradient of the bounded gains is to g."""
    n = np.sqrt((gain**2).sum())
    return rho / n * (dgain - gain * (gain * dgain).sum() / n**2)


def standardized(v, gain, eps, dim=0):
    """``gain_i (v_i - mean) / sqrt(var + eps)``."""
    r = rows(v, dim)
    c = r - r.mean(1, keepdims=True)
    s = np.sqrt((c**2).mean(1) + eps)
    return unrows(c * (gain / s)[:, None], v.shape, dim)


def standardized_gradients(v, gain, eps, dw, dim=0):
    """Of v, centred, and of the gains."""
    r, d = rows(v, dim), rows(dw, dim)
    c = r - r.mean(1, keepdims=True)
    s = np.sqrt((c**2).mean(1) + eps)
    along = (c * d).sum(1) / s
    dv = (gain / s)[:, None] * (d - c * (along / (r.shape[1] * s))[:, None])
    return unrows(dv - dv.mean(1, keepdims=True), v.shape, dim), along
