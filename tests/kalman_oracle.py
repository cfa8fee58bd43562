"""Kalman normalization as numpy computes it in float64, from its formulas; gradients by theirs."""

import math

import numpy as np

WORST_RATIO = 100


def channels(x):
    """The values of every channel, (C, count)."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def along(t, x):
    """A number a channel beside x."""
    return np.reshape(t, (1, -1, *[1] * (x.ndim - 2)))


def counts(x, prior):
    """Whether a prior is used."""
    if prior is None:
        return False
    with np.errstate(all="ignore"):
        return bool((prior[1] / channels(x).var(1)).mean() < WORST_RATIO)


def posterior(x, prior, p):
    """Mu and V."""
    mean, variance = channels(x).mean(1), channels(x).var(1)
    if not counts(x, prior):
        return mean, variance
    m, v = prior
    return p * m + (1 - p) * mean, p * v + (1 - p) * variance + p * (1 - p) * (mean - m) ** 2


def forward(x, prior, p, eps, weight, bias):
    """Y and (mu, V)."""
    mu, variance = posterior(x, prior, p)
    y = (x - along(mu, x)) / np.sqrt(along(variance, x) + eps)
    return y * along(weight, x) + along(bias, x), (mu, variance)


def backward(x, prior, p, eps, weight, dy, dmu_next, dvariance_next):
    """Gradients of x, weight, bias and the prior's two."""
    mu, variance = posterior(x, prior, p)
    s, v = np.sqrt(along(variance, x) + eps), x - along(mu, x)
    g = dy * along(weight, x)
    dmu = -channels(g / s).sum(1) + dmu_next
    dvariance = -channels(g * v / (2 * s**3)).sum(1) + dvariance_next
    mean, n = channels(x).mean(1), channels(x).shape[1]
    if counts(x, prior):
        gap = 2 * p * (1 - p) * (mean - prior[0])
        dmean, of_variance = (1 - p) * dmu + gap * dvariance, (1 - p) * dvariance
        dprior = p * dmu - gap * dvariance, p * dvariance
    else:
        dmean, of_variance = dmu, dvariance
        dprior = np.zeros_like(dmu), np.zeros_like(dmu)
    dx = g / s + along(dmean, x) / n + 2 * (x - along(mean, x)) * along(of_variance, x) / n
    return dx, channels(dy * v / s).sum(1), channels(dy).sum(1), *dprior


def rectified(mean, variance):
    """First and second moment of a rectified normal."""
    s = np.sqrt(variance)
    t = mean / s
    above = np.array([0.5 * math.erfc(-u / math.sqrt(2)) for u in t])
    density = np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    return mean * above + s * density, (mean**2 + variance) * above + mean * s * density


def convolved(first, second, weight, bias, groups):
    """Moments of a convolution by first and second moments: each output is a sum over its group's inputs."""
    outputs, inputs = weight.shape[:2]
    mean, variance = np.zeros(outputs), np.zeros(outputs)
    for o in range(outputs):
        group = o // (outputs // groups)
        for i in range(inputs):
            c = group * inputs + i
            for w in weight[o, i].ravel():
                mean[o] += w * first[c]
                variance[o] += w**2 * (second[c] - first[c] ** 2)
    return mean + (0 if bias is None else bias), variance
