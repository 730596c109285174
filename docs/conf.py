"""How Sphinx builds the manual: ``make docs``, which makes errors of warnings. Needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The manual is about this checkout: its package, and cli.py, whose options command_line.md lists.
sys.path.insert(0, str(ROOT))

from flashcore_cupy import __version__  # noqa: E402

project = "FlashCore for CuPy"
author = copyright = "the authors of flashcore-cupy"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# The docstrings say in words what an argument may be.
autodoc_typehints = "none"
autodoc_mock_imports = ["torch", "jax"]
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False

smartquotes = False  # the command line has two hyphens
html_theme = "pydata_sphinx_theme"
html_title = f"{project} {version}"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
html_copy_source = html_show_sourcelink = False
