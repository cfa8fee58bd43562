"""What the package keeps between calls."""

from divnorm_kernels import fields, functional, prepared


def forget() -> None:
    """Drops what has been planned, but for what layers hold."""
    for kept in (fields._built, prepared.prepared, functional._prepared):
        kept.cache_clear()
