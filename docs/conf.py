"""Settings of the documentation site: ``python3 start.py docs`` builds it into build/site.

Pages are the Markdown of this folder. What is generated (the program's help, the API) and what lies
outside (tutorials, changelog) is written into ``docs/made`` first, by ``pages.py`` beside it.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pages  # noqa: E402
from sphinx.util import logging  # noqa: E402

logger = logging.getLogger(__name__)

project = "captum-dcam"
author = "captum-dcam contributors"
release = version = pages.stated("__version__", "captum_dcam/__init__.py")
REPOSITORY = pages.stated("Repository", "pyproject.toml")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["README.md"]  # the list of pages for those who read the repository
html_theme = "furo"
html_title = f"captum-dcam {release}"
html_static_path = ["_static"]
html_js_files = ["sort.js"]
html_css_files = ["site.css"]
smartquotes = False  # of options: --quiet

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # tutorials are kept as they were run
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types, with shapes and units
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes that are properties too are described once
napoleon_custom_sections = [("Source", "params_style")]

pages.write(REPOSITORY)


def lead_out(app: Any, docname: str, source: list[str]) -> None:
    """Links to files outside of this folder lead to their copies, or to the repository."""
    place = (HERE / docname).parent
    if not docname.startswith("made/"):
        source[0] = pages.moved(source[0], place, place, REPOSITORY)


def all_text(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Comments of data are text alone: napoleon takes what stands before a colon for a type."""
    if what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines.insert(0, "\\")  # which is nothing, and has no colon


def canonical(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A name by which a package offers something leads to where it is described."""
    target = node.get("reftarget", "")
    module, _, name = target.rpartition(".")
    if node.get("refdomain") != "py" or not module.startswith("captum_dcam"):
        return None
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None
    own = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if own in (target, "."):
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], own, node, contnode
    )


def all_there(app: Any, env: Any) -> None:
    """A warning, which fails the build, where a public name is described nowhere."""
    described = {name for name, *_ in env.get_domain("py").get_objects()}
    if missing := sorted(pages.public_names() - described):
        logger.warning("no page describes %s", ", ".join(missing))


def setup(app: Any) -> None:
    app.connect("source-read", lead_out)
    app.connect("autodoc-process-docstring", all_text, priority=400)  # before napoleon
    app.connect("missing-reference", canonical)
    app.connect("env-check-consistency", all_there)
