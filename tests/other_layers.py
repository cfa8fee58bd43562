"""Every layer, an x for it, and the form in which its parameters broadcast against x; all take more keywords."""

from functools import partial

import divnorm_kernels as dk

IMAGE = (3, 4, 5, 6)
EVERY = {
    "DivisiveNorm2d": (partial(dk.DivisiveNorm2d, 4, 3), IMAGE, (4, 1, 1)),
    "DivisiveNorm1d": (partial(dk.DivisiveNorm1d, 4, 3, norm_window=dk.Span(2, 0)), (3, 4, 9), (4, 1)),
    "LocalContrastNorm2d": (partial(dk.LocalContrastNorm2d, 4, 3), IMAGE, (4, 1, 1)),
    "PositionalNorm2d": (partial(dk.PositionalNorm2d, 4), IMAGE, (4, 1, 1)),
    "DivisiveNormFeatures": (partial(dk.DivisiveNormFeatures, 6, 3), (3, 6), (6,)),
    "DivisiveNormFeatures, tokens": (partial(dk.DivisiveNormFeatures, 6, 3), (3, 2, 6), (6,)),
    "FilterResponseNorm2d": (partial(dk.FilterResponseNorm2d, 4), IMAGE, (4, 1, 1)),
    "BatchNorm1d, rows": (partial(dk.BatchNorm1d, 4), (5, 4), (4,)),
    "BatchNorm2d": (partial(dk.BatchNorm2d, 4), IMAGE, (4, 1, 1)),
    "VarianceNorm2d": (partial(dk.VarianceNorm2d, 4), IMAGE, (4, 1, 1)),
    "TopKBatchNorm2d": (partial(dk.TopKBatchNorm2d, 4), IMAGE, (4, 1, 1)),
    "InstanceNorm2d": (partial(dk.InstanceNorm2d, 4, affine=True), IMAGE, (4, 1, 1)),
    "InstanceNorm1d, no batch": (partial(dk.InstanceNorm1d, 4), (4, 6), (4, 1)),
    "LayerNorm": (partial(dk.LayerNorm, 6), IMAGE, (6,)),
    "LayerNorm of images": (partial(dk.LayerNorm, (4, 5, 6)), IMAGE, (4, 5, 6)),
    "RMSNorm": (partial(dk.RMSNorm, (5, 6)), IMAGE, (5, 6)),
    "GroupNorm": (partial(dk.GroupNorm, 2, 4), IMAGE, (4, 1, 1)),
    "GroupNorm, six dimensions": (partial(dk.GroupNorm, 2, 4), (2, 4, 2, 3, 2, 3), (4, 1, 1, 1, 1)),
}
