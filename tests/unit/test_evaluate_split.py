"""`ddpm-hf evaluate` of a run's folder holds out what the run held out, where the data are the same."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.cli.evaluate import data_config, parse, take_split_of_run
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, TrainingConfig

FRACTION = {"source": "digits.parquet", "validation_fraction": 0.15}


def folder_of(folder: Path, seed: int = 3, **data: Any) -> Path:
    """Returns a folder with the configuration of a run on these data, as training writes it."""
    config = RunConfig(data=DataConfig(**data), training=TrainingConfig(seed=seed))
    (folder / "training_config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return folder


def taken(folder: Path | None, *flags: str, data: str = "digits.parquet") -> tuple[Namespace, str | None]:
    options = parse(["x", "--data", data, *flags])
    line = take_split_of_run(options, folder)
    return options, line


def split_of(options: Namespace) -> tuple[str | None, float, int]:
    config = data_config(options, (8, 8), 1)
    return config.validation_split, config.validation_fraction, options.split_seed


def test_what_a_run_held_out_is_held_out_of_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file by another path, too."""
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path, **FRACTION)
    for name in ("digits.parquet", "./digits.parquet", str(tmp_path / "digits.parquet")):
        options, line = taken(folder, data=name)
        assert split_of(options) == (None, 0.15, 3)
        assert line == (
            "Held out as in training, which training_config.yaml tells: --split_seed 3 --data.validation_fraction 0.15"
        )


def test_a_split_that_a_run_held_out_needs_no_seed(tmp_path: Path) -> None:
    options, line = taken(folder_of(tmp_path, source="digits.parquet", validation_split="test"))
    assert split_of(options) == ("test", 0.0, 0)
    assert line is not None
    assert line.endswith("tells: --data.validation_split test")


@pytest.mark.parametrize(
    ("flags", "expected", "words"),
    [
        (["--data.validation_fraction", "0.5"], (None, 0.5, 3), "tells: --split_seed 3"),
        (["--data.validation_fraction", "0"], (None, 0.0, 0), None),
        (["--split_seed", "7"], (None, 0.15, 7), "tells: --data.validation_fraction 0.15"),
        (["--split_seed", "0"], (None, 0.15, 0), "tells: --data.validation_fraction 0.15"),
        (["--data.validation_split", "test"], ("test", 0.0, 0), None),
        (["--data.validation_fraction", "0.5", "--split_seed", "7"], (None, 0.5, 7), None),
    ],
)
def test_flags_that_are_given_win(
    tmp_path: Path, flags: list[str], expected: tuple[Any, ...], words: str | None
) -> None:
    options, line = taken(folder_of(tmp_path, **FRACTION), *flags)
    assert split_of(options) == expected
    assert line is None if words is None else line is not None and line.endswith(words)


@pytest.mark.parametrize("flags", [["--data.split", "test"], ["--data.subset", "b"], ["--data.revision", "c"]])
def test_of_other_data_nothing_is_taken_and_the_flags_are_told(tmp_path: Path, flags: list[str]) -> None:
    options, line = taken(folder_of(tmp_path, **FRACTION), *flags)
    assert split_of(options) == (None, 0.0, 0)
    assert line == (
        "The run was trained on data.source digits.parquet, data.split train, which may be other images; if they are "
        "these, hold out its own: --split_seed 3 --data.validation_fraction 0.15"
    )
    assert (taken(tmp_path, data="others.parquet")[1] or "").startswith("The run was trained on data.source digits")


def test_without_a_run_or_of_one_that_held_out_nothing_all_images_are_taken(tmp_path: Path) -> None:
    for folder in (None, tmp_path, folder_of(tmp_path, source="digits.parquet")):
        options, line = taken(folder)
        assert split_of(options) == (None, 0.0, 0)
        assert line is None


@pytest.mark.parametrize(
    "content",
    ["a: [", "data: 3", "data: {validation_fraction: much}", "data: {source: null}", "training: {seed: x}",
     "data: {validation_split: 3}"],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "training_config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"training_config\.yaml is no configuration of a run"):
        taken(tmp_path)


def test_settings_that_an_older_version_did_not_know_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "training_config.yaml").write_text("data: {source: digits.parquet, validation_fraction: 0.1}\n")
    assert split_of(taken(tmp_path)[0]) == (None, 0.1, 0)
