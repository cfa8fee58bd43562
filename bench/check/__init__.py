"""The check on a GPU, in steps that other runs go on with: ``python -m bench gpu-check``."""
