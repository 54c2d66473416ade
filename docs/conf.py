"""Sphinx settings. ``make docs`` builds; what is generated lands in docs/generated/."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import headscope  # noqa: E402
from docs.pages import generate  # noqa: E402

project = "headscope"
author = "headscope authors"
project_copyright = "headscope authors"
version = release = headscope.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "pages"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Pages of the gallery hold headings as their notebooks have them.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False  # "*cell" in a shape would be taken for markup
add_module_names = False
maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = f"headscope {release}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_show_sourcelink = False
# Pages that are alone in their section, or show wide tables, have no empty column beside them.
html_sidebars = {
    page: []
    for page in (
        "architecture", "changes", "circuit_study", "families", "gallery", "generated/benchmarks",
        "methods", "mixers", "sweeps", "tutorial", "validity",
    )
}  # fmt: skip
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def setup(app: Any) -> None:
    """Make the generated pages before Sphinx looks for sources."""
    app.connect("builder-inited", lambda app: generate(HERE, pictures=app.builder.format == "html"))
