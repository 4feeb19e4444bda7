# SPDX-License-Identifier: Apache-2.0
"""Sphinx: ``sphinx-build -W docs docs/_build`` from the root, with the ``docs`` extra installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

project = "Holdfast"
author = "The Holdfast authors"
copyright = "the Holdfast authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "death-protocol-states.md"]  # the latter is included by a page
html_theme = "furo"
html_title = "Holdfast"
myst_heading_anchors = 3
suppress_warnings = ["toc.empty_glob"]  # benchmarks.md is written by a benchmark run
autodoc_member_order = "bysource"
autodoc_type_aliases = {"npt.DTypeLike": "DTypeLike"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
