"""Tunes the tables of the GPU backends on the GPU at hand: ``python -m bench tune``."""
