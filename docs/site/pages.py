"""A hook of MkDocs: the README as the site's first page, and links between files as links between pages.

The Markdown of the repository stays as GitHub wants it, with links between files. Next: mkdocs.yml.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
PICTURES = ROOT / "benchmarks" / "results"
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What lies outside of docs/ and has a place on the site."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text("utf-8")))
    files.append(File.generated(config, "contributing.md", content=(ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    for path in [*PICTURES.glob("*.*"), *PICTURES.glob("*/*.*"), *EXAMPLES.glob("*.py")]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository, as links between pages of the site."""
    home = {"index.md": ROOT, "contributing.md": ROOT}.get(page.file.src_uri, ROOT / "docs")
    if page.file.src_uri.startswith("site/"):
        return markdown
    return LINK.sub(lambda link: _moved(link, home, files), markdown)


def _moved(link: re.Match[str], home: Path, files: Files) -> str:
    """Where a link of a file in `home` leads, seen from the site's root, where all pages with such links lie."""
    target = (home / link["target"]).resolve()
    if not target.exists():
        return link[0]  # the strict build says so
    name = target.relative_to(ROOT).as_posix().removeprefix("docs/")
    name = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}.get(name, name)
    if target.is_dir():  # a folder has no page; its files are there
        first = next(file.src_uri for file in files if file.src_uri.startswith(name))
        return first
    return name + (link["anchor"] or "")
