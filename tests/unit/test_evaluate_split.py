"""`ddpm-hf evaluate` of a run uses the validation set of the run, if the data are the same."""

from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.cli.evaluate import EvaluateFlags, given_flags, parse, use_validation_set_of_run
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, TrainingConfig

FRACTION = {"source": "digits.parquet", "validation_fraction": 0.15}


def folder_of(folder: Path, seed: int = 3, **data: Any) -> Path:
    """Write the configuration of a run on this data into a folder, as training does, and return the folder."""
    config = RunConfig(data=DataConfig(**data), training=TrainingConfig(seed=seed))
    (folder / "training_config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return folder


def read(folder: Path | None, *flags: str, data: str = "digits.parquet") -> tuple[EvaluateFlags, str | None]:
    return use_validation_set_of_run(parse(["x", "--data", data, *flags]), folder and folder / "training_config.yaml")


def split_of(flags: EvaluateFlags) -> tuple[str | None, float, int | None]:
    config = flags.data_config((8, 8), 1)
    return config.validation_split, config.validation_fraction, flags.split_seed


def test_the_validation_set_of_the_run_is_used_for_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file by another path, too."""
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path, **FRACTION)
    for name in ("digits.parquet", "./digits.parquet", str(tmp_path / "digits.parquet")):
        flags, line = read(folder, data=name)
        assert split_of(flags) == (None, 0.15, 3)
        assert line == (
            "Validation set of the run (training_config.yaml): --split_seed 3 --data.validation_fraction 0.15"
        )


def test_a_validation_split_needs_no_seed(tmp_path: Path) -> None:
    flags, line = read(folder_of(tmp_path, source="digits.parquet", validation_split="test"))
    assert split_of(flags) == ("test", 0.0, 0)
    assert line is not None
    assert line.endswith("(training_config.yaml): --data.validation_split test")


@pytest.mark.parametrize(
    ("flags", "expected", "words"),
    [
        (["--data.validation_fraction", "0.5"], (None, 0.5, 3), "(training_config.yaml): --split_seed 3"),
        (["--data.validation_fraction", "0"], (None, 0.0, 0), None),
        (["--split_seed", "7"], (None, 0.15, 7), "(training_config.yaml): --data.validation_fraction 0.15"),
        (["--split_seed", "0"], (None, 0.15, 0), "(training_config.yaml): --data.validation_fraction 0.15"),
        (["--data.validation_split", "test"], ("test", 0.0, 0), None),
        (["--data.validation_fraction", "0.5", "--split_seed", "7"], (None, 0.5, 7), None),
    ],
)
def test_given_flags_take_precedence(
    tmp_path: Path, flags: list[str], expected: tuple[Any, ...], words: str | None
) -> None:
    found, line = read(folder_of(tmp_path, **FRACTION), *flags)
    assert split_of(found) == expected
    assert line is None if words is None else line is not None and line.endswith(words)


@pytest.mark.parametrize("flags", [["--data.split", "test"], ["--data.subset", "b"], ["--data.revision", "c"]])
def test_for_other_data_the_flags_are_only_printed(tmp_path: Path, flags: list[str]) -> None:
    found, line = read(folder_of(tmp_path, **FRACTION), *flags)
    assert split_of(found) == (None, 0.0, 0)
    assert line == (
        "The run was trained on data.source digits.parquet, data.split train. If these are the same images, give its "
        "validation set: --split_seed 3 --data.validation_fraction 0.15"
    )
    assert (read(tmp_path, data="others.parquet")[1] or "").startswith("The run was trained on data.source digits")


def test_without_a_run_or_of_one_that_held_out_nothing_all_images_are_read(tmp_path: Path) -> None:
    for folder in (None, tmp_path, folder_of(tmp_path, source="digits.parquet")):
        flags, line = read(folder)
        assert split_of(flags) == (None, 0.0, 0)
        assert line is None


@pytest.mark.parametrize(
    "content",
    ["a: [", "data: 3", "data: {validation_fraction: much}", "data: {source: null}", "training: {seed: x}",
     "data: {validation_split: 3}"],
)  # fmt: skip
def test_an_invalid_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "training_config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"training_config\.yaml "):
        read(tmp_path)


def test_settings_that_the_version_of_the_run_lacked_have_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "training_config.yaml").write_text("data: {source: digits.parquet, validation_fraction: 0.1}\n")
    assert split_of(read(tmp_path)[0]) == (None, 0.1, 0)


def test_the_flags_in_evaluation_json_repeat_the_evaluation_and_hold_no_local_path(tmp_path: Path) -> None:
    data = tmp_path / "my digits.parquet"
    data.touch()
    local = ["--output", str(tmp_path), "--weights", str(data), "--data.cache_dir", str(tmp_path)]
    local += ["--estimate_variance", "5", "--variant", "fp16"]
    shared = [
        "--data.subset", "a b", "--data.crop_before_resize", "1,2,3,4", "--data.validation_fraction", "0.15",
        "--split_seed", "3", "--metrics", "fid,bits_per_dim", "--features", "inception", "--num_samples", "50",
        "--num_terms", "all", "--labels=-x,1", "--seed", "9", "--scheduler", "DDIMScheduler", "--eta", "0.5",
        "--num_inference_steps", "4", "--guidance_scale", "2", "--dtype", "bfloat16", "--cpu",
        "--guidance_interval", "0.2,0.8",
    ]  # fmt: skip
    guide = tmp_path / "step_00000400"
    guide.mkdir()
    words = given_flags(parse([str(tmp_path), "--data", str(data), *local, *shared, "--guide", str(guide)]))
    assert str(tmp_path) not in " ".join(words)
    named = ["--data", data.name, "--guide", guide.name]
    assert parse(["user/model", *words]) == parse(["user/model", *named, *shared])


def test_a_model_with_a_value_range_reads_data_of_this_range(tmp_path: Path) -> None:
    """Bits per dimension, which are those of 8-bit images, are no default then."""
    flags, _ = read(None)
    assert flags.data_config((8, 8), 1, (-1000.0, 400.0)).value_range == [-1000, 400]
    assert "bits_per_dim" in flags.metric_names()
    assert "bits_per_dim" not in flags.metric_names(has_bits=False)
