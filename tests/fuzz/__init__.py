"""Random calls of the kernels under sanitizers, each compared with the oracle: ``make fuzz TARGET=cpu N=200000``.

- ``cpu``: the CPU kernels under AddressSanitizer and UBSan;
- ``cuda``: the CUDA kernels on the emulated device, under the same;
- ``races``: these with a thread of the system for every thread of a kernel, under ThreadSanitizer.

``run.py`` builds them and starts processes with a sanitizer's library (``child.py``), in which ``calls.py`` draws and
makes some hundreds of calls each. Where one crashes, the same calls are made again in forks, to find the smallest.
"""
