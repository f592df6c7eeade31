"""Sphinx configuration."""

import os
import sys
from importlib.metadata import version as _version
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "extensions"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the tutorials, which are executed
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # TorchRL's notes about its storages

project = "pogo_torchrl"
author = "The pogo_torchrl authors"
release = _version("pogo_torchrl")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "pogo_reference",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "auto"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings and progress bars
# Single backticks in docstrings are code, as in Markdown.
default_role = "code"
html_theme = "furo"
html_title = f"pogo_torchrl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "jupyter_execute"]
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
