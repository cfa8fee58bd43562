"""The documentation: ``make docs`` builds it from these pages and the docstrings."""

from divnorm_kernels import __version__

release = __version__
project = "divnorm_kernels"
copyright = "the divnorm_kernels authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_display_short_literal_types = True
myst_heading_anchors = 2
