"""Write docs/settings.md from configs/ and the configuration schema: python docs/make_training.py."""

import dataclasses
import json
import re
import typing
from pathlib import Path

from docstring_parser import parse

from ddpm_hf.config import RunConfig
from ddpm_hf.config.parse import describe_type

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD = """# Settings

Written by `docs/make_training.py` from the recipes and the configuration schema. Every setting is a key of the YAML
file and a command-line flag, for example `--training.num_steps 1000`. `--print_config` prints all settings of a run.

## Recipes
"""


def document() -> str:
    """Return the content of docs/settings.md."""
    intervals = "Intervals (`..._every_steps`) are numbers of optimizer updates."
    return "\n".join([HEAD, *recipes(), "", "## All settings", "", intervals, *settings(), ""])


def recipes() -> list[str]:
    """Return a table of the comments at the head of each recipe."""
    lines = ["| recipe | data | hardware, time | result |", "| --- | --- | --- | --- |"]
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        head = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        comment = " ".join(line.removeprefix("#").strip() for line in head if line.startswith("#"))
        title, *facts = re.split(r"(Data|Hardware|Time|Result|Command|Then):", comment)
        found = {name: " ".join(text.split()) for name, text in zip(facts[::2], facts[1::2], strict=True)}
        recipe = f"[`{path.stem}`](../configs/{path.name}): {title.strip()}"
        lines.append(f"| {recipe} | {found['Data']} | {found['Hardware']}; {found['Time']} | {found['Result']} |")
    return lines


def settings() -> list[str]:
    """Return a table for each section of the schema: type, default and meaning of every setting."""
    lines = []
    for section, kind in typing.get_type_hints(RunConfig).items():
        about = parse(kind.__doc__)
        meanings = {parameter.arg_name: parameter.description for parameter in about.params}
        hints = typing.get_type_hints(kind)
        lines += ["", f"### {section}", "", f"{about.short_description}", ""]
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
    return lines


if __name__ == "__main__":
    (REPOSITORY / "docs" / "settings.md").write_text(document(), encoding="utf-8")
