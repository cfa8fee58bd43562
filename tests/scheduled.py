"""The devices and geometries that the tests of the Triton backend's host side choose tiles for."""

from divnorm_kernels.backends.triton.tiles import Device
from divnorm_kernels.fields import Geometry, geometry
from divnorm_kernels.norm import Norm

H200 = Device("sm_90", "cuda", 132, 60 << 20)
DEVICES = [H200, Device("gfx942", "hip", 304, 4 << 20), Device("interpreter", "interpreter", 2, 1 << 14)]


def geometry_of(shape, **options) -> Geometry:
    """A window of 5, unless the options say otherwise, on a shape."""
    return geometry(Norm(**{"window": 5} | options), shape)
