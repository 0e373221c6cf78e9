"""Pages of the site for files of the repository that documentation pages link to, such as run files.

On a forge `[text](../configs/1b_tvr.yaml)` opens the file itself. A site has only what lies below `docs/`, so here the
file becomes the page `files/configs/1b_tvr.yaml.md`, and the link leads there. A link to a file that does not exist is
left as it is, and the strict build refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]*)")
FOLDER = "files/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside `docs/` that a page links to."""
    for page in files.documentation_pages():
        for path in LINK.findall(page.content_string):
            target = _outside(page.src_uri, path, config)
            if target and not files.get_file_from_path(_page_of(target)):
                files.append(File.generated(config, _page_of(target), content=_content(target, config)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave `docs/` to the pages that `on_files` has added."""

    def replaced(link: re.Match[str]) -> str:
        target = _outside(page.file.src_uri, link[1], config)
        return posixpath.relpath(_page_of(target), posixpath.dirname(page.file.src_uri)) if target else link[1]

    return LINK.sub(replaced, markdown)


def _outside(page: str, link: str, config: MkDocsConfig) -> str | None:
    """Return the path, from the root of the repository, of an existing file outside `docs/`, else None."""
    docs = Path(config.docs_dir)
    path = posixpath.normpath(posixpath.join(docs.name, posixpath.dirname(page), link))
    inside = path.startswith(("../", f"{docs.name}/"))
    return None if inside or not (docs.parent / path).is_file() else path


def _page_of(target: str) -> str:
    return f"{FOLDER}{target}" if target.endswith(".md") else f"{FOLDER}{target}.md"


def _content(target: str, config: MkDocsConfig) -> str:
    text = (Path(config.docs_dir).parent / target).read_text(encoding="utf-8")
    if target.endswith(".md"):
        return text
    language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(Path(target).suffix, "text")
    return f"# {target}\n\n````{language}\n{text}\n````\n"
