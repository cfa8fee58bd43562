"""Normalization layers as other libraries write them, and modules that only look like them."""

import torch
from torch import nn
from torch.nn import functional as F


class LlamaRMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, size, eps=1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        return (
            self.weight
            * hidden_states
            * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )


class GemmaRMSNorm(LlamaRMSNorm):
    """One is added to the weight."""

    def forward(self, x):
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OtherEpsNorm(LlamaRMSNorm):
    """Its eps is not what it says."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * self.variance_epsilon)


class LpNorm(nn.Module):
    """Of any size."""

    eps = 1e-3

    def forward(self, x):
        return F.normalize(x, eps=self.eps)


class GatedRMSNorm(LlamaRMSNorm):
    """A caller may pass more than x."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class LayerNorm2d(nn.LayerNorm):
    """As timm and torchvision write it."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class LayerNormNd(nn.LayerNorm):
    """Of any number of dimensions."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RmsNorm2d(nn.RMSNorm):
    """As timm's."""

    def forward(self, x):
        return F.rms_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.eps).permute(0, 3, 1, 2)


class LayerNorm32(nn.LayerNorm):
    """Computes in float32, as ours does anyway; over two dimensions too."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, size, eps=1e-3):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(size) + 0.5)

    def forward(self, x):
        weight, bias, mean, variance = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        return (x - mean) * (variance + self.eps).rsqrt() * weight + bias


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, size, drop=None, act=None, **options):
        super().__init__(size, **options)
        self.drop, self.act = drop or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class ActBeforeDropNorm(BatchNormAct2d):
    """Another order."""

    def forward(self, x):
        return self.drop(self.act(nn.BatchNorm2d.forward(self, x)))


class SlowBatchNorm2d(nn.BatchNorm2d):
    """Its running statistics move by half the momentum."""

    def forward(self, x):
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum / 2, self.eps)


class HalfTrackedNorm(LlamaRMSNorm):
    """As timm's EvoNorm, without a running mean."""

    def __init__(self, size):
        super().__init__(size)
        self.eps = 1e-3
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(self.running_var.view(-1, 1, 1) + self.eps)


class GroupNormOfAnySize(nn.GroupNorm):
    """A subclass with a forward that does the same."""

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class StandardizedInstanceNorm1d(nn.InstanceNorm1d):
    """Written out."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance + self.eps).sqrt()


class DetachedLayerNorm(nn.LayerNorm):
    """Values of a layer normalization, and half of its gradients."""

    def forward(self, x):
        y = super().forward(x) / 2
        return y + y.detach()


class DetachedRMSNorm(nn.Module):
    """As `LlamaRMSNorm`, with a scale that has no gradient."""

    def __init__(self, size, eps=1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


class AlwaysEvaluatingNorm(nn.BatchNorm2d):
    """Frozen as people freeze it."""

    def train(self, mode=True):
        return super().train(False)


class DoublingNorm(nn.BatchNorm2d):
    """Does something around its forward."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class BiasedRMSNorm(nn.Module):
    """As diffusers writes it."""

    def __init__(self, size, eps=1e-3):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) + self.bias
