"""docs/training.md says what the schema, the recipes and the program say."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from ddpm_hf.config import ConfigError, load_config
from tests.conftest import REPOSITORY

DOCUMENT = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_settings_and_recipes_are_those_of_the_program() -> None:
    regenerated = runpy.run_path(str(REPOSITORY / "docs" / "make_training.py"))["regenerated"]
    assert regenerated(DOCUMENT) == DOCUMENT, "run python docs/make_training.py and commit what it changed"


EXAMPLES = re.findall(r"^\$ python train_ddpm\.py (.*)\nerror: (.*)$", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "sentence"), EXAMPLES)
def test_what_bad_input_gets_is_what_it_gets(monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError) as caught:
        load_config(shlex.split(arguments))
    assert str(caught.value) == sentence


def test_there_are_examples_and_their_files_exist() -> None:
    assert len(EXAMPLES) >= 6
    named = set(re.findall(r"configs/\w+\.yaml", DOCUMENT))
    assert named == {f"configs/{path.name}" for path in Path(REPOSITORY / "configs").glob("*.yaml")}
