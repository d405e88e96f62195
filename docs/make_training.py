"""Writes the recipes and the tables of all settings into training.md, from configs/ and the schema.

Run it after a change of either: python docs/make_training.py
"""

import dataclasses
import json
import re
import typing
from pathlib import Path

from docstring_parser import parse

from ddpm_hf.config import RunConfig
from ddpm_hf.config.parse import describe_type

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / "docs" / "training.md"


def regenerated(document: str) -> str:
    """Returns the document with fresh content between its markers."""
    for name, content in (("recipes", recipes()), ("settings", settings())):
        begin, end = f"<!-- {name}: written by docs/make_training.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = document.split(begin)
        _, after = rest.split(end)
        document = f"{before}{begin}\n{content}\n{end}{after}"
    return document


def recipes() -> str:
    """Lists the recipes with what the comment at the head of each says."""
    parts = []
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        head = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        comment = " ".join(line.removeprefix("#").strip() for line in head if line.startswith("#"))
        title, *facts = re.split(r"(Data|Hardware|Time|Result|Command|Then):", comment)
        found = {name: " ".join(text.split()) for name, text in zip(facts[::2], facts[1::2], strict=True)}
        lines = [f"[`{path.name}`](../configs/{path.name}): {title.strip()}", ""]
        lines += [f"- {name}: {text}" for name, text in found.items() if name not in ("Command", "Then")]
        then = [f"Then {found['Then']}", ""] if "Then" in found else []
        parts.append("\n".join([*lines, "", "```sh", found["Command"], "```", "", *then]))
    return "\n".join(parts)


def settings() -> str:
    """Lists every setting with what it accepts, its default and its meaning, as the schema says them."""
    parts = []
    for section, kind in typing.get_type_hints(RunConfig).items():
        about = parse(kind.__doc__)
        meanings = {parameter.arg_name: parameter.description for parameter in about.params}
        hints = typing.get_type_hints(kind)
        lines = [f"### {section}", "", f"{about.short_description}", ""]
        if about.long_description:
            lines += [" ".join(about.long_description.split()), ""]
        lines += ["| setting | accepts | default | meaning |", "| --- | --- | --- | --- |"]
        for field in dataclasses.fields(kind):
            default = getattr(kind(), field.name)
            cells = [
                f"`{section}.{field.name}`",
                describe_type(hints[field.name]),
                f"`{default if isinstance(default, str) and default else json.dumps(default)}`",
                " ".join((meanings[field.name] or "").split()),
            ]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(regenerated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
