"""The documentation: ``make docs`` builds it from these pages and the docstrings."""

import sys
from pathlib import Path

from divnorm_kernels import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for mathml

release = __version__
project = "divnorm_kernels"
copyright = "the divnorm_kernels authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser", "mathml"]
html_math_renderer = "mathml"
html_theme = "furo"
highlight_language = "none"
html_static_path = ["static"]
html_css_files = ["pages.css"]
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_type_aliases = {"Window": "Window"}
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
