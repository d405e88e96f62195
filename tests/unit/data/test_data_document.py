"""What docs/data.md tells people to write is accepted, and what it says they will read is said."""

import re
import shlex
from pathlib import Path

import pytest

from ddpm_hf.config import load_config
from ddpm_hf.config.parse import load_data_config
from ddpm_hf.data.sources import IMAGE_SUFFIXES, TAR_SUFFIXES, ZIP_SUFFIXES
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
NAMES = (
    r"\d[\d.,x]*|\(.*?\)|photos\S*|x\.parquet|'\w+'|…|/cache|RGB|GiB|outputs/run|ClassLabel|Value|notes.txt"
    r"|no label(?=;)|other images or labels than before|those(?=;)"
)
CODE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "ddpm_hf").rglob("*.py")))


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", TEXT, re.S))
def test_every_example_is_a_good_configuration(tmp_path: Path, example: str) -> None:
    (tmp_path / "x.yaml").write_text(example)
    assert load_config(["--config", str(tmp_path / "x.yaml")])[0].data.source


@pytest.mark.parametrize("example", re.findall(r"```sh\n(.*?)\n```", TEXT, re.S))
def test_every_command_is_accepted(example: str) -> None:
    program, command, *arguments = shlex.split(example)
    assert [program, command] == ["ddpm-hf", "data"]
    load_data_config(arguments)


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"`data\.(?!png)(\w+)", TEXT))
    assert named
    assert named <= set(load_config(["--data.source", "x"])[0].to_dict()["data"])


def test_every_kind_of_file_that_is_named_is_read() -> None:
    listed = set(
        re.findall(r"(?<![\w.])\.(?:tar\.)?[a-z]\w*", TEXT.partition("## What can be read")[2].partition("###")[0])
    )
    assert listed <= {*IMAGE_SUFFIXES, *ZIP_SUFFIXES, *TAR_SUFFIXES, ".parquet", ".arrow", ".npy", ".npz"}


@pytest.mark.parametrize("sentence", re.findall(r"\| [^|]+ \| (.+?) \|\n", TEXT.partition("## Bad images")[2]))
def test_every_sentence_is_one_that_is_said(sentence: str) -> None:
    """Word for word: each run of words between numbers, names and what is put in by turns stands in the source."""
    if sentence.startswith(("sentence", "-")):
        return
    source = re.sub(r'"\s*f?"', "", re.sub(r"\s+", " ", CODE))
    fixed = re.split(NAMES, sentence)
    pieces = [piece.strip(" .;,") for piece in fixed]
    assert [piece for piece in pieces if len(piece) > 3 and piece not in source] == []
