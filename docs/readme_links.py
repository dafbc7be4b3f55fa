"""A mkdocs hook: the front page is the README, whose links start at the repository's root and not at docs/."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page, before snippets are put in: the README is read here in their stead."""
    if page.file.src_uri != "index.md":
        return markdown
    with open("README.md", encoding="utf-8") as readme:
        return readme.read().replace("](docs/", "](")
