"""The pictures of README.md and of docs: windows from the library's geometry, plots from committed results."""
