"""The marked sections of a card: ours are renewed, those that somebody edited stay, as does all around them.

A section begins with `<!-- ddpm_hf: begin NAME sha256=... -->` and ends with `<!-- ddpm_hf: end NAME -->`. The hash is
that of the text between, without the empty lines around it and with line breaks of one kind. A mark is a line of its
own; marks that do not pair are somebody's text.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BEGIN = re.compile(r"<!-- ddpm_hf: begin ([\w-]+)(?: sha256=([0-9a-f]{64}))? -->\s*")
_END = re.compile(r"<!-- ddpm_hf: end ([\w-]+) -->\s*")


@dataclass(frozen=True)
class Part:
    """A section, or a text between sections.

    Args:
        text: All of it, marks included, as it is.
        name: Of the section; None for a text between sections.
        content: What is between the marks, as it is hashed.
        sha256: What its mark says; None where it says none.
    """

    text: str
    name: str | None = None
    content: str = ""
    sha256: str | None = None

    @property
    def was_edited(self) -> bool:
        """Whether the content is not the one that was written."""
        return self.sha256 != _sha256(self.content)


def has_marks(text: str) -> bool:
    """Whether any mark is left in a text."""
    return any(_BEGIN.fullmatch(line) or _END.fullmatch(line) for line in text.splitlines())


def read_parts(text: str) -> Iterator[Part]:
    """Yields a text in parts that make it up, byte for byte."""
    lines, between, at = text.splitlines(keepends=True), "", 0
    while at < len(lines):
        begin = _BEGIN.fullmatch(lines[at])
        if begin and (stop := _end_of(lines, at, begin[1])):
            if between:
                yield Part(between)
            content = "".join(lines[at + 1 : stop]).replace("\r\n", "\n").strip("\n")
            yield Part("".join(lines[at : stop + 1]), begin[1], content, begin[2])
            between, at = "", stop + 1
        else:
            between, at = between + lines[at], at + 1
    if between:
        yield Part(between)


def _end_of(lines: list[str], begin: int, name: str) -> int | None:
    """Returns the line that ends a section; None if another mark comes first, or none."""
    for number in range(begin + 1, len(lines)):
        if end := _END.fullmatch(lines[number]):
            return number if end[1] == name else None
        if _BEGIN.fullmatch(lines[number]):
            return None
    return None


def _sha256(content: str) -> str:
    """Returns the hash of a section's text."""
    return hashlib.sha256(content.encode()).hexdigest()


def section(name: str, content: str, line_break: str = "\n") -> str:
    """Returns a section with its marks."""
    content = content.strip("\n")
    inside = f"\n{content}\n\n" if content else ""
    text = f"<!-- ddpm_hf: begin {name} sha256={_sha256(content)} -->\n{inside}<!-- ddpm_hf: end {name} -->\n"
    return text.replace("\n", line_break)


def merged_body(text: str, sections: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Renews the sections of a card that nobody edited.

    Args:
        text: The card without its metadata.
        sections: The content of today's sections.

    Returns:
        The text, and the names of the sections that somebody edited or whose marks are broken.
    """
    line_break = "\r\n" if "\r\n" in text else "\n"
    written, kept = "", []
    for part in read_parts(text):
        if part.name is None:
            marks = [_BEGIN.fullmatch(line) or _END.fullmatch(line) for line in part.text.splitlines()]
            kept += [mark[1] for mark in marks if mark]
            written += part.text
        elif part.was_edited:
            kept.append(part.name)
            written += part.text
        elif part.name in sections and sections[part.name].strip("\n") != part.content:
            written += section(part.name, sections[part.name], line_break)
        else:
            written += part.text
    return written, tuple(dict.fromkeys(kept))
