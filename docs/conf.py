"""Sphinx configuration."""

from importlib.metadata import version as _version

project = "pogo_torchrl"
author = "The pogo_torchrl authors"
release = _version("pogo_torchrl")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
# Single backticks in docstrings are code, as in Markdown.
default_role = "code"
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
