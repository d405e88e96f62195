"""Read the Markdown documents of the repository."""

import re
from pathlib import Path

from tests.conftest import REPOSITORY

DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced code blocks of a document in one language."""
    return [block for _, name, block in FENCED.findall(document) if name == language]
