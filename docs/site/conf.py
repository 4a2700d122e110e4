"""How Sphinx makes the site of docs/: pages from Markdown, the API from docstrings and, by Doxygen, from headers."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "docs_work"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "benchmarks")]

import records  # noqa: E402

import selfattn  # noqa: E402

log = logging.getLogger(__name__)

project = "selfattn"
version = release = (ROOT / "VERSION").read_text().strip()
project_copyright = (ROOT / "LICENSE").read_text().splitlines()[2].removeprefix("Copyright (c) ")

extensions = [
    "breathe",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["site"]
nitpicky = True
smartquotes_action = "De"  # dashes; quotes and primes stay
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [
    ("cpp:identifier", r"(?!selfattn::).*"),  # ATen's, torch's and the standard library's
    ("py:.*", r"(?!selfattn\.).*"),  # torch's, and the words of a docstring's types
]

# ---------------------------------------------------------------- Markdown
myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4

# ---------------------------------------------------------------- Python
autodoc_mock_imports = ["torchtitan", "transformers"]
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "extra_repr"}
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False

# ---------------------------------------------------------------- C++
breathe_projects = {"selfattn": str(WORK / "xml")}
breathe_default_project = "selfattn"
breathe_default_members = ("members",)
breathe_show_include = False
cpp_index_common_prefix = ["selfattn::"]
rst_prolog = """
.. |options| replace:: A field ``T name`` of a struct of options is set by ``.name(value)``, which gives the struct
   back, and read by ``.name()``.
"""
DOXYGEN = f"""
INPUT = {ROOT / "include"}
STRIP_FROM_INC_PATH = {ROOT / "include"}
STRIP_FROM_PATH = {ROOT / "include"}
OUTPUT_DIRECTORY = {WORK}
RECURSIVE = YES
QUIET = YES
WARN_AS_ERROR = FAIL_ON_WARNINGS
GENERATE_HTML = NO
GENERATE_LATEX = NO
GENERATE_XML = YES
XML_PROGRAMLISTING = NO
MACRO_EXPANSION = YES
EXPAND_ONLY_PREDEF = YES
PREDEFINED = SELFATTN_API= "TORCH_ARG(T,name)=T name" "TORCH_MODULE(name)=" "FORWARD_HAS_DEFAULT_ARGS(...)="
"""

# ---------------------------------------------------------------- HTML
html_theme = "furo"
html_title = f"selfattn {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = "$ "

PAGES = {  # what the documents link to beside each other, and where it stands here
    "README": "index",
    "CONTRIBUTING": "contributing",
    "CHANGELOG": "changelog",
    "examples": "examples",
}


def point_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Links to documents outside of docs/, and to folders of examples/, go to the pages that include them."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in doctree.findall(pending_xref):
        place = (here / link["reftarget"]).resolve()
        if link.get("reftype") == "myst" and place.is_relative_to(ROOT):
            page, *folders = place.relative_to(ROOT).parts
            if page in PAGES:
                link["refdomain"], link["reftarget"] = "doc", PAGES[page]
                link["reftargetid"] = folders[0] if folders else link.get("reftargetid")


def read_docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """An indented paragraph is code, as in Markdown; names between double backquotes, and of documents, are links."""
    if what in ("class", "function", "method") and not any(lines):
        log.warning("%s has no docstring", name)
    text = re.sub(r"^(\S.*\n\n)(?=    )", r"\1::\n\n", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(rf"``({'|'.join(selfattn.__all__)})``", r":py:obj:`\1 <.\1>`", text)
    text = re.sub(r"docs/([\w/]+)\.md", r":doc:`/\1`", text)
    if what in ("attribute", "property"):
        text = f"..\n\n{text}"  # an empty comment, or napoleon takes what stands before a colon for a type
    lines[:] = text.splitlines()


def check_completeness(app: Sphinx, env: BuildEnvironment) -> None:
    """Every public name has its place in the reference."""
    python = {name.rpartition(".")[2] for name, *_ in env.domains["py"].get_objects()}
    for name in selfattn.__all__:
        if name not in python:
            log.warning("api/: selfattn.%s is in no page", name)
    cpp = {name for name, *_ in env.domains["cpp"].get_objects()}
    for member in ElementTree.parse(WORK / "xml" / "index.xml").iter():
        name = member.findtext("name") or ""
        if member.get("kind") in ("struct", "class") and name not in cpp:
            log.warning("api/: %s is in no page", name)
        if name == "selfattn":
            for thing in member.iter("member"):
                if thing.get("kind") != "enumvalue" and f"selfattn::{thing.findtext('name')}" not in cpp:
                    log.warning("api/: selfattn::%s is in no page", thing.findtext("name"))


def setup(app: Sphinx) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["doxygen", "-"], input=DOXYGEN, text=True, check=False).returncode:
        raise SystemExit("a public header lacks comments, see above")
    records.write(WORK / "records")
    app.connect("doctree-read", point_to_pages)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
    app.connect("env-check-consistency", check_completeness)
