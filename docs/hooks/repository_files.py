"""Pages of the site for files of the repository that other pages link to, such as run files.

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

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|/)[^)#\s]+")
DOCS, FILES = "docs/", "files/"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".sh": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside `docs/` that a page links to, directly or by way of another such file."""
    pages = list(files.documentation_pages())
    for page in pages:
        for link in LINK.findall(page.content_string):
            target = _target(page.src_uri, link)
            if target.startswith(DOCS) or not _exists(target, config) or files.get_file_from_path(_page_of(target)):
                continue
            added = File.generated(config, _page_of(target), content=_content(target, config))
            files.append(added)
            pages.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave `docs/`, or come from outside, to pages of the site."""
    here = page.file.src_uri

    def replaced(link: re.Match[str]) -> str:
        target = _target(here, link[0])
        return posixpath.relpath(_page_of(target), posixpath.dirname(here)) if _exists(target, config) else link[0]

    return LINK.sub(replaced, markdown)


def _target(page: str, link: str) -> str:
    """Return the path of a link's target from the root of the repository."""
    here = page.removeprefix(FILES) if page.startswith(FILES) else DOCS + page
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _page_of(target: str) -> str:
    """Return the path, within the site's sources, of the page or picture that shows a file of the repository."""
    if target.startswith(DOCS):
        return target.removeprefix(DOCS)
    return FILES + target if target.endswith(".md") else f"{FILES}{target}.md"


def _exists(target: str, config: MkDocsConfig) -> bool:
    return not target.startswith("../") and (Path(config.docs_dir).parent / target).is_file()


def _content(target: str, config: MkDocsConfig) -> str:
    text = (Path(config.docs_dir).parent / target).read_text(encoding="utf-8")
    if target.endswith(".md"):
        return text
    return f"# {target}\n\n````{LANGUAGES.get(Path(target).suffix, 'text')}\n{text}\n````\n"
