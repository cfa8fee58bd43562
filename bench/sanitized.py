"""A small call of every kind on the GPU: ``compute-sanitizer python -m bench.sanitized BACKEND...``.

Results are checked too, since a sanitizer changes the timing that hides a missing wait.
"""

from __future__ import annotations

import sys

import torch

from divnorm_kernels import divisive_norm
from divnorm_kernels.backends import KERNELS
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

CALLS = (
    ((3, 8, 6, 7), {"window": 3}),
    ((4, 32, 28, 28), {"window": 5}),
    ((2, 64, 33, 35), {"window": 13, "groups": 4}),
    ((3, 64, 40, 41), {"window": 5}),
    ((1, 8, 400, 400), {"window": 7}),
    ((3, 6, 40, 40), {"window": 3, "over_batch": True}),
    ((3, 64, 20, 20), {"window": "all", "groups": 8}),
    ((2, 64, 50, 50), {"window": "all", "groups": 2}),
    ((3, 16, 20, 20), {"window": "all", "groups": 16, "over_batch": True}),
    ((2, 4, 5, 6, 7), {"window": (3, 2, 5)}),
    ((64, 200), {"window": 60}),
    ((5, 20000), {"window": 60}),
)


def main(backends: list[str], device: str = "cuda") -> None:
    """Runs every call forward and backward on the backends; raises on a wrong result, and where one is missing."""
    torch.manual_seed(0)
    for backend in backends:
        kernels = KERNELS[backend]
        if kernels.missing() is not None:
            raise RuntimeError(f"{backend}: {kernels.missing()}")
        for shape, options in CALLS:
            for channels_last in (False, True) if len(shape) > 2 else (False,):
                x = torch.randn(shape, device=device)
                if channels_last:
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                if kernels.refusal(geometry(Norm(**options), shape), x) is not None:
                    continue
                x.requires_grad_()
                affine = [torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2)]
                sigma = torch.tensor(0.8, device=device, requires_grad=True)
                dy = torch.randn_like(x)
                found = []
                for function, cast in ((divisive_norm, torch.Tensor.float), (reference, torch.Tensor.double)):
                    named = {"backend": backend} if function is divisive_norm else {}
                    inputs = [cast(t.detach()).requires_grad_() for t in (x, *affine, sigma)]
                    y, l1 = function(*inputs[:3], sigma=inputs[3], return_l1=True, **options, **named)
                    gradients = torch.autograd.grad([y, l1], inputs, [cast(dy), torch.ones_like(l1)])
                    found.append((y.detach(), l1.detach(), *gradients))
                for got, want in zip(*found, strict=True):
                    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
                print(backend, shape, options, "channels_last" if channels_last else "")


if __name__ == "__main__":
    main(sys.argv[1:])
