"""Write notebooks/training_in_python.ipynb from docs/python.md: python docs/make_notebook.py.

Each Python block is a cell, and the text between two blocks another one. A cell that installs ddpm_hf comes first.
"""

import json
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "training_in_python.ipynb"
INTRODUCTION = """This notebook is [docs/python.md](../docs/python.md) with cells to run. It runs on Colab, on Kaggle
(turn on *Internet*) and in a checkout, on a GPU or in a few minutes on a CPU. ddpm_hf is not on PyPI: on Colab and
Kaggle, set `REPOSITORY` to the address of the repository, or upload a checkout and set it to that folder."""
INSTALLATION = """import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # address of the repository, or the folder of a checkout

new = Path("ddpm_hf_checkout")
folders = [Path(REPOSITORY), Path.cwd().parent, new]  # an empty REPOSITORY is the working directory
checkout = next((folder for folder in folders if (folder / "configs/digits_8.yaml").is_file()), new).absolute()
if not checkout.exists():
    if not REPOSITORY:
        raise SystemExit("REPOSITORY is empty; set it to the address of the repository, or the folder of a checkout.")
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(checkout)], check=True)
if importlib.util.find_spec("ddpm_hf") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(checkout)], check=True)
os.chdir(checkout)"""


def document() -> str:
    """Return the content of the notebook."""
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    text = re.sub(rf"\n[^\n]*{NOTEBOOK.name}[^\n]*\n", "", text)
    cells: list[tuple[str, str]] = [("code", INSTALLATION)]
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)):
        if number % 2:
            cells.append(("code", part.strip()))
        elif part.strip():
            links = re.sub(
                r"\]\((?!https?:)(?:\.\./)?", lambda found: f"]({'../' if '..' in found[0] else '../docs/'}", part
            )
            cells.append(("markdown", links.strip()))
    title, _, rest = cells[1][1].partition("\n\n")
    cells[:2] = [("markdown", f"{title}\n\n{INTRODUCTION}"), cells[0], ("markdown", rest)]
    notebook = {
        "cells": [cell(f"cell-{number}", *content) for number, content in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def cell(name: str, kind: str, source: str) -> dict[str, Any]:
    """Return a cell without outputs."""
    outputs: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": {}, **outputs, "source": source.splitlines(keepends=True)}


if __name__ == "__main__":
    NOTEBOOK.write_text(document(), encoding="utf-8")
