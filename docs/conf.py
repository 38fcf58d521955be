"""Configuration of the documentation: `make docs` builds it into build/docs."""

import dataclasses
from importlib import metadata

project = "sid_fast"
author = "The sid_fast authors"
copyright = author
release = metadata.version("sid-fast")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
highlight_language = "none"  # of blocks that name no language
myst_heading_anchors = 3  # links to a heading are checked: page.md#heading

autodoc_member_order = "bysource"
napoleon_use_ivar = True
default_role = "literal"  # `name` in docstrings
html_theme = "alabaster"
html_static_path = ["_static"]
html_theme_options = {
    "description": "One-step generators from EDM diffusion models",
    "page_width": "1200px",
    "body_max_width": "920px",
    "sidebar_width": "230px",
    "fixed_sidebar": True,
}
toc_object_entries = False
html_copy_source = html_show_sourcelink = False


def describe_fields(app, what, name, obj, options, lines):
    """List the fields of a dataclass of settings with their defaults and help texts."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return
    fields = [f for f in dataclasses.fields(obj) if "help" in f.metadata]
    for f in fields:
        lines += ["", f"- **{f.name}** = {f.default!r}: {f.metadata['help']}"]


def setup(app):
    """Connect the hook above."""
    app.connect("autodoc-process-docstring", describe_fields)
