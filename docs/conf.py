"""How `make docs` builds the site; it fails on any warning."""

from permafrost import __version__

project, author, release = "Permafrost", "the authors of Permafrost", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["notebooks"]
html_theme, html_title = "furo", "Permafrost"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings have the types
numpydoc_show_class_members = False
nitpicky = False
