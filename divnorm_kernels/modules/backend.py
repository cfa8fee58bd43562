"""A layer's backend, which is checked where it is set."""

from __future__ import annotations

from ..backends import check_name


class WithBackend:
    """What a layer has beside `torch.nn.Module` that names a backend at each call."""

    @property
    def backend(self) -> str | None:
        """Which kernels compute, by a name as the layer's function takes it, ``None`` for the best."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        check_name(backend)
        self._backend = backend
