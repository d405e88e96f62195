"""Which configurations are accepted, which are refused or warned about, and which a run can be resumed with."""

import dataclasses
import logging
import math
import re
import threading
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonargparse._common import parsing_settings

from ddpm_hf.config import (
    ConfigError,
    DiffusionConfig,
    RunConfig,
    changed_settings,
    changed_too_late,
    load_config,
    parse,
    parse_command_line,
    read_config,
    read_config_dict,
    validate,
)
from tests import version_0_1
from tests.conftest import REPOSITORY

SOURCE = ("--data.source", "images.parquet")
ALL_SETTINGS = [
    f"{section.name}.{setting.name}"
    for section in dataclasses.fields(RunConfig)
    for setting in dataclasses.fields(getattr(RunConfig(), section.name))
]
STREAMED = {"data__streaming": True, "data__resolution": 32, "data__num_channels": 3}
RECOGNITION = {"evaluation__recognition": True, "model__class_conditional": True, "data__validation_split": "test"}
LEARNED = {"diffusion__variance_type": "learned_range"}
VLB, HYBRID = {"objective__loss": "vlb"}, {"objective__loss": "hybrid"} | LEARNED
SCORED = {"evaluation__score_every_steps": 10}
SCORED_BOUND = SCORED | {"evaluation__score_metric": "bits_per_dim", "data__validation_fraction": 0.1}


def load(*arguments: str) -> RunConfig:
    return parse_command_line([*SOURCE, *arguments])[0]


def refusal(*arguments: str) -> str:
    """Return the sentence with which a command line is refused."""
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_changes(**changes: object) -> RunConfig:
    """Return a valid configuration with settings such as `training__seed` changed."""
    config = dataclasses.replace(RunConfig(), data=dataclasses.replace(RunConfig().data, source="images"))
    for name, value in changes.items():
        section, setting = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{setting: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    """Write YAML and return the arguments that read it."""

    def write(content: str) -> tuple[str, str]:
        path = tmp_path / "run.yaml"
        path.write_text(content, encoding="utf-8")
        return "--config", str(path)

    return write


# ------------------------------------------------------------------------------------------------------------- parsing


def test_a_flag_overrides_the_file_and_the_file_the_default(yaml_file: Any) -> None:
    config = load(*yaml_file("training: {seed: 3, num_steps: 10}\nmodel: {preset: digits_8}\n"), "--training.seed", "4")
    assert (config.training.seed, config.training.num_steps, config.model.preset) == (4, 10, "digits_8")
    assert config.training.train_batch_size == RunConfig().training.train_batch_size


def test_scientific_notation_is_a_number(yaml_file: Any) -> None:
    """PyYAML reads 1e-4 as text."""
    assert load(*yaml_file("training: {learning_rate: 1e-4}\n")).training.learning_rate == 1e-4
    assert load("--training.learning_rate", "1e-4").training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--data.num_channels", "3"], "data.num_channels"),
        (["--data.num_channels", "null"], "data.num_channels"),
        (["--data.resolution", "[32, 48]"], "data.resolution"),
        (["--data.value_range", "[-1000.0, 400.0]"], "data.value_range"),
        (["--data.value_range", "auto"], "data.value_range"),
        (["--data.crop_before_resize", "[40, 15, 188, 163]"], "data.crop_before_resize"),
        (["--data.device_resident", "auto"], "data.device_resident"),
        (["--data.device_resident", "false"], "data.device_resident"),
        (
            ["--training.optimizer_kwargs", '{"a": 0.9, "b": true, "c": [0.9, 0.99], "d": null, "e": 3}'],
            "training.optimizer_kwargs",
        ),
        (
            ["--model.overrides", '{"block_out_channels": [8, 16], "dropout": 0.1, "act_fn": "gelu", "x": null}'],
            "model.overrides",
        ),
    ],
)
def test_values_keep_their_types_on_the_command_line(flags: list[str], setting: str) -> None:
    section, name = setting.split(".")
    found, expected = getattr(getattr(load(*flags), section), name), yaml.safe_load(flags[1])
    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("training: {num_stepz: 1}", "there is no setting training.num_stepz; did you mean training.num_steps?"),
        ("trainig: {seed: 1}", "there is no setting trainig.seed; did you mean training.seed?"),
        ("zebra: {stripes: 1}", "there is no setting zebra.stripes; "),
        ("training: {train_batch_size: 64.7}", "training.train_batch_size is 64.7, but must be a whole number."),
        ("training: {learning_rate: true}", "training.learning_rate is True, but must be a number."),
        ("training: {tf32: maybe}", "training.tf32 is maybe, but must be true or false."),
        ("training: {num_steps: null}", "training.num_steps is null, but must be a whole number."),
        ("data: {split: null}", "data.split is null, but must be text."),
        ("data: {resolution: big}", "data.resolution is big, but must be a whole number, a list of whole numbers or "),
        ("data: {cache_dir: 5}", "data.cache_dir is 5, but must be text or null."),
        ("model: {preset: huge}", "model.preset is huge, but must be ddpm_32, ddpm_64, "),
        ("model: {overrides: [1]}", "model.overrides is [1], but must be a mapping."),
        ("training: {ema_warmup: true}", "training.ema_warmup is True, but must be none, ramp or power."),
        ("training: [1, 2]", "training is [1, 2], but must be a section of settings; see --help."),
        ("training:\ndata: {}", "training is null, but must be a section of settings; see --help."),
        ("some words", "--config must name a YAML file with sections of settings, but it holds some words."),
        ("", "--config must name a YAML file with sections of settings, but it holds nothing."),
    ],
)
def test_an_invalid_file_is_refused_in_one_sentence(yaml_file: Any, content: str, sentence: str) -> None:
    assert refusal(*yaml_file(content)).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--training.see=1"], "there is no setting training.see; did you mean training.seed?"),
        (["--training.num_steps", "1e3"], "training.num_steps is 1000.0, but must be a whole number; write 1000."),
        (["--training.micro_batch_size", "8.0"], "training.micro_batch_size is 8.0, but must be a whole number, auto"),
        (["--tracking.trackers", "wandb"], "tracking.trackers is wandb, but must be a list of tensorboard, wandb or "),
        (["--objective.loss", "MSE"], "objective.loss is MSE, but must be mse, l1, huber, vlb or hybrid."),
        (["--model.overrides", "{"], "model.overrides is {, but must be a mapping."),
        (["--config", "/nowhere/run.yaml"], "--config: File does not exist: '/nowhere/run.yaml'"),
        (["run.yaml"], "unrecognized arguments: run.yaml"),
    ],
)
def test_an_invalid_flag_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    assert refusal(*arguments).startswith(sentence)


@pytest.mark.parametrize("is_one_word", [False, True])
def test_a_file_that_is_not_yaml_is_named_with_the_place(tmp_path: Path, is_one_word: bool) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("training: {seed: 1}\n")
    bad.write_text("training:\n  num_steps: [1\n  seed: 2\n")
    files = (good, bad)
    arguments = [f"--config={path}" for path in files] if is_one_word else ["--config", str(good), "--config", str(bad)]
    assert refusal(*arguments).startswith(f"--config {bad} is not valid YAML (line 3, column 7: ")
    bad.write_bytes(b"training: \xff\n")
    assert refusal(*arguments).startswith(f"--config {bad} is not UTF-8")


def test_yaml_with_code_is_refused_and_not_run(yaml_file: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system"):
        assert "could not determine a constructor" in refusal(*yaml_file(f"data: {tag} ['touch {trace}']"))
    assert not trace.exists()


def test_a_configuration_is_read_from_its_own_yaml(yaml_file: Any) -> None:
    config = with_changes(
        model__overrides={"dropout": 0.2, "block_out_channels": [8, 16], "act_fn": "silu", "attention_head_dim": None},
        data__source="Bilder/ä ö: # 'x'.parquet",
        training__adam_epsilon=1e-12,
        training__max_grad_norm=None,
        data__num_channels=3,
    )
    arguments = yaml_file(config.to_yaml())
    assert parse_command_line(arguments) == (config, False)
    assert read_config_dict(Path(arguments[1])) == config.to_dict()
    assert parse_command_line([*arguments, "--dry_run"]) == (config, True)


def test_print_config_prints_what_config_reads(yaml_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--training.seed", "5", "--print_config")
    assert caught.value.code == 0
    assert parse_command_line(yaml_file(capsys.readouterr().out))[0] == load("--training.seed", "5")


def test_help_lists_every_setting_with_its_type_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split()).partition(" options:")[2].partition(" Example: ")[0]
    _, *entries = re.split(r" --([a-z]+\.\w+) ", text)
    found = dict(zip(entries[::2], entries[1::2], strict=True))
    assert list(found) == ALL_SETTINGS
    assert not {name for name, entry in found.items() if not re.match(r"\S+ .{9,} \(type: .*default: ", entry)}


def test_every_recipe_and_run_of_0_1_is_valid_also_without_previews_and_report(
    caplog: pytest.LogCaptureFixture,
) -> None:
    off = ["--preview.every_steps", "0", "--evaluation.num_samples", "0"]
    recipes = sorted((REPOSITORY / "configs").glob("*.yaml"))
    runs = [*version_0_1.RUN.rglob("config.yaml"), version_0_1.SAVED / "training_config.yaml"]
    assert len(recipes) > 5 and runs
    for path in (*recipes, *runs):
        config, _ = parse_command_line(["--config", str(path)])
        assert config.data.source
        assert caplog.messages == [], path
        parse_command_line(["--config", str(path), *off])
        assert all("evaluation.recognition true has no effect" in line for line in caplog.messages), path
        caplog.clear()


# ------------------------------------------------------------------------------------------------------------- Python

DIGITS_YAML = REPOSITORY / "configs" / "digits_8.yaml"


def test_python_and_the_command_line_give_the_same_configuration() -> None:
    expected, _ = parse_command_line(["--config", str(DIGITS_YAML), "--training.num_steps", "7", "--data.split", "x"])
    settings = yaml.safe_load(DIGITS_YAML.read_text())  # it reads 2e-3 as text
    changes = {"training.num_steps": 7, "data": {"split": "x"}}
    for config in (DIGITS_YAML, str(DIGITS_YAML), settings, load_config(DIGITS_YAML)):
        assert load_config(config, changes) == expected
    assert load_config() == RunConfig()
    assert load_config(overrides={"data.source": "x"}) == load("--data.source", "x")


def test_values_of_python_become_those_of_the_settings() -> None:
    """Numbers of numpy, tuples, paths; the repr tells a number of numpy from one of Python."""
    config = load_config(
        {
            "data": {"source": Path("images"), "resolution": (np.int32(32), 48), "random_flip": np.bool_(True)},
            "training.num_steps": np.int64(5),
            "training.learning_rate": np.float32(0.5),
            "training.max_grad_norm": 2,
            "training.output_dir": Path("runs") / "a",
            "training.optimizer_kwargs": {"betas": (0.9, np.float64(0.99))},
            "model.overrides": {"block_out_channels": np.array([8, 16]), "dropout": "1e-1", "act_fn": np.str_("silu")},
            "training.compile": False,
        }
    )
    expected = with_changes(
        data__source="images", data__resolution=[32, 48], data__random_flip=True,
        training__num_steps=5, training__learning_rate=0.5, training__max_grad_norm=2.0, training__output_dir="runs/a",
        training__optimizer_kwargs={"betas": [0.9, 0.99]}, training__compile=False,
        model__overrides={"block_out_channels": [8, 16], "dropout": 0.1, "act_fn": "silu"},
    )  # fmt: skip
    assert repr(config) == repr(expected)
    assert load_config(config.to_dict()) == config


def test_one_key_of_a_mapping_is_set_by_its_name() -> None:
    base = {"model.overrides": {"dropout": 0.1, "act_fn": "silu"}}
    assert load_config(base, {"model.overrides.dropout": 0.2}).model.overrides == {"dropout": 0.2, "act_fn": "silu"}
    assert load_config(base, {"model": {"overrides": {"dropout": 0.2}}}).model.overrides == {"dropout": 0.2}


def test_a_loaded_configuration_shares_nothing_with_what_it_was_made_of() -> None:
    overrides = {"block_out_channels": [8, 16]}
    config = load_config({"model.overrides": overrides})
    again = load_config(config)
    overrides["block_out_channels"].append(32)
    config.model.overrides["dropout"] = 0.5
    assert again.model.overrides == {"block_out_channels": [8, 16]}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"training.num_stepz": 1}, "there is no setting training.num_stepz; did you mean training.num_steps?"),
        ({"training": {"num_stepz": 1}}, "there is no setting training.num_stepz; did you mean training.num_steps?"),
        ({"num_steps": 1}, "there is no setting num_steps; did you mean training.num_steps?"),
        ({"seed": 1}, "there is no setting seed; did you mean training.seed?"),
        ({"trainig": {"seed": 1}}, "there is no setting trainig.seed; did you mean training.seed?"),
        ({"training.num_steps.x": 1}, "there is no setting training.num_steps.x; did you mean training.num_steps?"),
        ({1: 2}, "there is no setting 1; "),
        ({"training": None}, "training is null, but must be a section of settings; see --help."),
        ({"training": {"seed": 1}, "training.seed": 2}, "training.seed is given twice; give it once."),
        ({"training.num_steps": "4"}, "training.num_steps is '4', but must be a whole number; write 4."),
        ({"training.num_steps": 4.0}, "training.num_steps is 4.0, but must be a whole number; write 4."),
        ({"training.num_steps": np.float64(4.5)}, "training.num_steps is 4.5, but must be a whole number."),
        ({"training.num_steps": True}, "training.num_steps is True, but must be a whole number."),
        ({"training.num_steps": None}, "training.num_steps is null, but must be a whole number."),
        ({"training.learning_rate": "fast"}, "training.learning_rate is 'fast', but must be a number."),
        ({"training.mixed_precision": "no"}, "training.mixed_precision is 'no', but must be fp32, bf16, fp16 or null."),
        ({"training.tf32": 1}, "training.tf32 is 1, but must be true or false."),
        ({"data.source": 5}, "data.source is 5, but must be text."),
        ({"data.resolution": (8, 8.5)}, "data.resolution is [8, 8.5], but must be a whole number, a list of whole "),
        ({"model.overrides": [1]}, "model.overrides is [1], but must be a mapping."),
        ({"model.overrides": {"x": {"y": 1}}}, "model.overrides.x is {'y': 1}, but must be a whole number, a number, "),
        ({"diffusion.prediction_type": ["v"]}, "diffusion.prediction_type is ['v'], but must be epsilon, sample, "),
        ({"training.ema_decay": 1.5}, "training.ema_decay is 1.5, but must be at least 0 and below 1."),
        ({"training.log_every_steps": np.int64(0)}, "training.log_every_steps is 0, but must be greater than 0."),
        ({"training.micro_batch_size": 48}, "training.train_batch_size 128 is not a multiple of "),
        ({"model.from_pretrained": "", "model.preset": None}, "model.from_pretrained is empty; give a path, or set it"),
        ({"data.cache_dir": ""}, "data.cache_dir is empty; give a folder, or set it to null."),
        (["--training.seed", "1"], "load_config was given a list; give the path of a YAML file, a dictionary or a "),
        ("nowhere/run.yaml", "there is no configuration file nowhere/run.yaml; give the path of a YAML file."),
    ],
)
def test_python_gets_the_sentences_of_the_command_line(config: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert str(caught.value).startswith(sentence)
    if isinstance(config, dict):
        with pytest.raises(ConfigError) as caught:
            load_config(overrides=config)
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("training: {num_stepz: 1}", "there is no setting training.num_stepz; did you mean training.num_steps?"),
        ("training: [1", "{path} is not valid YAML (line 1, column 13: "),
        ("some words", "{path} must be a YAML file with sections of settings, but it holds some words."),
    ],
)
def test_python_reads_a_file_with_the_same_sentences(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(sentence.format(path=path))


def test_python_does_not_read_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Jupyter it holds the kernel's arguments."""
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel-1.json", "--training.seed", "7"])
    assert load_config(DIGITS_YAML).training.seed == 0


# -------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("name", "values", "requirement"),
    [
        ("training__learning_rate", (0.0, math.nan, math.inf), "greater than 0"),
        ("training__num_steps", (0, -2), "greater than 0"),
        ("data__resolution", (0,), "greater than 0"),
        ("data__crop_before_resize", (0,), "greater than 0"),
        ("training__seed", (-1,), "0 or more"),
        ("data__resize_to", (-1,), "0 or more"),
        ("objective__offset_noise", (-0.1, math.inf), "0 or more"),
        ("objective__input_perturbation", (-0.1, math.inf), "0 or more"),
        ("training__ema_decay", (1.0, -0.1), "at least 0 and below 1"),
        ("data__max_bad_fraction", (1.0,), "at least 0 and below 1"),
        ("preview__eta", (1.1, -0.1), "between 0 and 1"),
        ("data__augmentation", (1.1, -0.1, float("nan")), "between 0 and 1"),
        ("preview__num_inference_steps", (1001,), "at most diffusion.num_train_timesteps, 1000"),
        ("training__num_checkpoints_kept", (1,), "at least 2"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, values: tuple[float, ...], requirement: str) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            validate(with_changes(**{name: value}))
        assert f"{name.replace('__', '.')} is {value}, but must be {requirement}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__source": ""}, "data.source is not set"),
        ({"training__output_dir": ""}, "training.output_dir is not set"),
        ({"data__augmentation": 0.1, "data__augmentation_transforms": []}, "is empty, but data.augmentation is 0.1"),
        ({"tracking__project": ""}, "tracking.project is empty"),
        ({"hub__push_to_hub": True}, "set hub.repo_id"),
        ({"training__resume_from_hub": True}, "training.resume_from_hub needs a repository; set hub.repo_id"),
        (
            {"training__resume_from_hub": True, "hub__repo_id": "a/b", "hub__checkpoint_branch": "main"},
            "hub.checkpoint_branch is main, but checkpoints replace all",
        ),
        ({"objective__class_dropout": 0.1}, "set model.class_conditional to true"),
        ({"preview__guidance_scale": 2.0}, "preview.guidance_scale 2 needs"),
        ({"evaluation__guidance_scale": 0.0}, "evaluation.guidance_scale 0 needs"),
        ({"evaluation__guidance_interval": [0.5, 0.2]}, "evaluation.guidance_interval is 0.5,0.2, but must be"),
        ({"preview__guidance_interval": [0.5]}, "preview.guidance_interval is 0.5, but must be start,stop"),
        (
            {"objective__loss": "vlb", "objective__input_perturbation": 0.1},
            "objective.input_perturbation 0.1 changes the input that objective.loss vlb assumes",
        ),
        (
            {"training__learning_rate_schedule": "inverse_sqrt", "training__learning_rate_warmup_steps": 0},
            "training.learning_rate_schedule inverse_sqrt needs the steps after which it decreases",
        ),
        (
            {"training__learning_rate_schedule": "inverse_sqrt", "training__learning_rate_reference_steps": 10},
            "training.learning_rate_reference_steps 10 is less than training.learning_rate_warmup_steps 5000",
        ),
        ({"preview__scheduler": "uinpc"}, "preview.scheduler is uinpc, which is no scheduler (did you mean 'unipc'?)"),
        ({"preview__scheduler": "heun", "preview__eta": 0.0}, "preview.eta is 0, but preview.scheduler heun has"),
        ({"evaluation__recognition": True}, "evaluation.recognition needs classes"),
        (RECOGNITION | {"data__validation_split": None}, "data.validation_fraction above 0"),
        (STREAMED | RECOGNITION, "data.streaming to false"),
        ({"training__micro_batch_size": 48}, "train_batch_size 128 is not a multiple of training.micro_batch_size 48; "
         "use 96 or 144."),
        ({"training__micro_batch_size": 48, "training__train_batch_size": 4}, "; use 48."),
        ({"training__validate_every_steps": 9}, "set data.validation_fraction, for example to 0.05."),
        (STREAMED | {"training__validate_every_steps": 9}, "set data.validation_split."),
        ({"training__optimizer": "lion"}, "training.optimizer lion is unknown; use adamw, adam or an import path such"),
        ({"training__optimizer": "torch.optim."}, "training.optimizer torch.optim. is unknown"),
        (STREAMED | {"objective__immiscible_noise": True}, "data.streaming"),
        ({"data__resolution": [3]}, "data.resolution is [3], but a list must be [height, width]"),
        ({"data__resolution": [3, 0]}, "data.resolution is [3, 0], but a list must be [height, width]"),
        ({"data__crop_before_resize": [1, 2, 3]}, "a list must be [left, top, right, bottom]"),
        ({"data__crop_before_resize": [5, 2, 5, 9]}, "a list must be [left, top, right, bottom]"),
        ({"data__resize_to": 60, "data__resolution": 64}, "data.resize_to 60 is less than data.resolution 64"),
        ({"data__validation_split": "x", "data__validation_fraction": 0.1}, "both define the validation set"),
        ({"data__streaming": True}, "set data.resolution, and data.num_channels to 1, 3 or 4"),
        (STREAMED | {"data__num_channels": 2}, "set data.resolution, and data.num_channels to 1, 3 or 4"),
        (STREAMED | {"data__value_range": "auto"}, "set data.value_range to [low, high]."),
        ({"data__value_range": [0.0]}, "data.value_range is [0.0], but must be [low, high] with low < high, or auto."),
        ({"data__value_range": [1.0, 1.0]}, "must be [low, high] with low < high, or auto."),
        ({"data__value_range": [0.0, float("inf")]}, "must be [low, high] with low < high, or auto."),
        (SCORED_BOUND | {"data__value_range": "auto"}, "bits_per_dim is that of 8-bit images, but data.value_range is"),
        (STREAMED | {"data__validation_fraction": 0.1}, "set data.validation_split instead"),
        (STREAMED | {"data__device_resident": True}, "data.streaming and data.device_resident exclude each other"),
        ({"model__preset": None}, "model.preset is null"),
        ({"model__preset": "digits_8", "model__config_file": "x"}, "model.preset digits_8 and model.config_file both"),
        ({"model__config_file": "x", "model__from_pretrained": "y"}, "model.config_file and model.from_pretrained bot"),
        (LEARNED, "diffusion.variance_type learned_range is learned, but objective.loss mse"),
        (LEARNED | {"objective__loss": "huber"}, "set objective.loss to hybrid or vlb"),
        ({"objective__loss": "hybrid"}, "set diffusion.variance_type to learned_range, or objective.loss to mse."),
        (VLB | {"objective__weighting": "p2"}, "objective.weighting p2 cannot be combined with objective.loss vlb"),
        ({"objective__weighting": "truncated_snr", "diffusion__prediction_type": "eps"}, "prediction_type epsilon; "),
        (HYBRID | {"objective__offset_noise": 0.1}, "objective.offset_noise 0.1"),
        (VLB | {"objective__immiscible_noise": True}, "objective.immiscible_noise true"),
        (SCORED_BOUND | {"data__validation_fraction": 0.0}, "bits_per_dim needs a validation set"),
        (SCORED_BOUND | {"evaluation__score_num_terms": 1}, "must be between 2 and diffusion.num_train"),
        (SCORED | {"evaluation__score_metric": "fid"}, "evaluation.score_metric fid needs at least 2049"),
        (SCORED | STREAMED, "evaluation.score_metric kid compares with all training images"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_fix(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_changes(**changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective__huber_delta": 2.0}, "objective.huber_delta 2.0 has no effect with objective.loss mse; set obj"),
        ({"objective__min_snr_gamma": 1.0, "objective__weighting": "p2"}, "set objective.weighting to min_snr "),
        ({"objective__p2_gamma": 0.5, "objective__p2_k": 2.0}, "objective.p2_gamma 0.5, objective.p2_k 2.0 have no"),
        (
            {"training__prefetch_factor": 1, "objective__timestep_sampling": "loss_aware"},
            "training.prefetch_factor 1 has no effect with objective.timestep_sampling loss_aware; set obj",
        ),
        ({"training__ema_power": 0.5}, "training.ema_power 0.5 has no effect with training.ema_warmup ramp; set train"),
        ({"training__posthoc_ema_every_steps": 5}, "set training.posthoc_ema to true to use it."),
        ({"training__optimizer": "torch.optim.SGD", "training__adam_beta1": 0.5}, "training.adam_beta1 0.5 has no eff"),
        ({"diffusion__beta_schedule": "cosine", "diffusion__beta_end": 0.5}, "to linear, scaled_linear, "),
        ({"data__crop": "random"}, "data.crop random has no effect with data.resolution null; set data.resolution "),
        ({"data__resize_to": 70}, "data.resize_to 70 has no effect"),
        ({"data__augmentation_transforms": ["hue"]}, "augmentation_transforms [\"hue\"] has no effect with data.augm"),
        ({"data__augmentation": 0.1, "data__random_flip": True}, "xflip has no effect with data.random_flip true"),
        ({"data__max_bad_fraction": 0.5}, "set data.on_bad_image to skip "),
        ({"model__revision": "main"}, "no effect with model.from_pretrained or model.config_file null"),
        ({"model__from_pretrained": "x", "model__initialization": "torch"}, "set model.from_pretrained to null "),
        (RECOGNITION | {"evaluation__num_samples": 0}, "no effect with evaluation.num_samples 0; set evaluation.num"),
        ({"evaluation__recognition": True, "evaluation__num_samples": 0}, "; set evaluation.num_samples to use it."),
        ({"evaluation__score_features": "x"}, "evaluation.score_features x has no effect with evaluation.score_every"),
        (SCORED_BOUND | {"evaluation__score_features": "x"}, "with evaluation.score_metric bits_per_dim"),
        ({"tracking__run_name": "x"}, "tracking.run_name x has no effect with tracking.trackers []"),
        ({"hub__license": "mit", "hub__fp16": True}, "hub.fp16 true, hub.license mit have no effect with hub.push_to"),
        ({"hub__repo_id": "a/b"}, "hub.repo_id a/b has no effect with hub.push_to_hub or training.resume_from_hub"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_one_warning_of_rank_0(
    changes: dict[str, object], named: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate(with_changes(**changes))
    (line,) = caplog.messages
    assert named in line
    assert caplog.records[0].levelno == logging.WARNING
    monkeypatch.setenv("RANK", "1")
    validate(with_changes(**changes))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion__rescale_betas_zero_snr": True, "diffusion__prediction_type": "v"},
        {"model__class_conditional": True, "objective__class_dropout": 0.1, "preview__guidance_scale": 3.0},
        {"training__max_grad_norm": None, "training__micro_batch_size": 32},
        {"training__micro_batch_size": "auto", "tracking__trackers": ["tensorboard", "wandb"]},
        HYBRID | {"objective__weighting": "p2", "objective__p2_gamma": 0.5, "objective__vlb_weight": 0.01},
        VLB | {"diffusion__variance_type": "learned", "objective__self_conditioning": 1.0},
        {"objective__loss": "huber", "objective__huber_delta": 0.1, "objective__weighting": "min_snr"},
        {"objective__weighting": "truncated_snr", "diffusion__prediction_type": "v"},
        {"objective__offset_noise": 0.1, "objective__immiscible_noise": True, "objective__loss": "l1"},
        {"model__preset": None, "model__config_file": "x", "model__revision": "main"},
        {"model__from_pretrained": "x", "model__overrides": {"dropout": 0.1}},
        {"training__optimizer": "torch.optim.SGD", "training__optimizer_kwargs": {"momentum": 0.9}},
        {"training__optimizer": "adam", "training__weight_decay": 0.1},
        {"training__ema_warmup": "power", "training__ema_power": 0.5, "training__posthoc_ema": True},
        {"data__resolution": [64, 48], "data__crop": "random", "data__resize_to": 50},
        STREAMED | {"data__validation_split": "test", "training__validate_every_steps": 9},
        {"diffusion__beta_schedule": "quad", "diffusion__beta_end": 0.01},
        RECOGNITION | SCORED,
        SCORED_BOUND,
    ],
)
def test_valid_combinations_are_accepted_silently(changes: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    validate(with_changes(**changes))
    assert caplog.messages == []


def test_a_configuration_is_immutable() -> None:
    config = RunConfig()
    for owner, name in ((config, "data"), (config.training, "seed")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, None)


# ------------------------------------------------------------------------------------------------------------- aliases


ALIASES = [
    ("prediction_type", "eps", "epsilon"),
    ("prediction_type", "x0", "sample"),
    ("prediction_type", "v", "v_prediction"),
    ("beta_schedule", "cosine", "squaredcos_cap_v2"),
    ("beta_schedule", "quad", "scaled_linear"),
]


@pytest.mark.parametrize(("name", "alias", "full"), ALIASES)
def test_an_alias_is_the_setting_that_it_stands_for(yaml_file: Any, name: str, alias: str, full: str) -> None:
    """Also on resume, in both directions: version 0.1 wrote aliases as they were given."""
    settings = with_changes(**{f"diffusion__{name}": full})
    assert settings == with_changes(**{f"diffusion__{name}": alias})
    arguments = yaml_file(f"data: {{source: images}}\ndiffusion: {{{name}: {alias}}}\n")
    assert parse_command_line(arguments)[0] == settings
    assert read_config(Path(arguments[1])) == settings
    of_0_1 = settings.to_dict()
    of_0_1["diffusion"][name] = alias
    assert changed_settings(of_0_1, settings) == changed_settings(settings.to_dict(), settings) == ([], [])
    other = next(value for key, _, value in ALIASES if key == name and value != full)
    line = f"diffusion.{name} was {full!r}, is {other!r}"
    assert changed_settings(of_0_1, with_changes(**{f"diffusion__{name}": other})) == ([line], [])


def test_names_and_aliases_are_those_of_the_scheduler() -> None:
    from ddpm_hf.diffusion import GaussianDiffusionScheduler

    hints = typing.get_type_hints(DiffusionConfig)
    for prediction_type in typing.get_args(hints["prediction_type"]):
        stored = GaussianDiffusionScheduler.create(prediction_type=prediction_type).config.prediction_type
        assert stored == DiffusionConfig(prediction_type=prediction_type).prediction_type
    for beta_schedule in typing.get_args(hints["beta_schedule"]):
        tables = [
            GaussianDiffusionScheduler.create(num_train_timesteps=20, beta_schedule=name).betas.tolist()
            for name in (beta_schedule, DiffusionConfig(beta_schedule=beta_schedule).beta_schedule)
        ]
        assert tables[0] == tables[1]


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("changes", "is_fixed", "is_too_late"),
    [
        ({"training__seed": 1}, True, False),
        ({"training__train_batch_size": 64}, True, False),
        ({"training__optimizer": "adam"}, True, False),
        ({"training__posthoc_ema": True}, True, False),
        ({"data__random_flip": True}, True, False),
        ({"data__resolution": 8}, True, False),
        ({"data__value_range": "auto"}, True, False),
        ({"model__overrides": {"dropout": 0.1}}, True, False),
        ({"diffusion__beta_schedule": "squaredcos_cap_v2"}, True, False),
        ({"objective__loss": "l1"}, True, False),
        ({"training__learning_rate": 1e-5}, False, True),
        ({"training__mixed_precision": "bf16"}, False, True),
        ({"training__micro_batch_size": 32}, False, True),
        ({"training__ema_warmup": "power"}, False, True),
        ({"training__num_steps": 9}, False, False),
        ({"training__cpu": True}, False, False),
        ({"training__validate_every_steps": 7}, False, False),
        ({"model__gradient_checkpointing": True}, False, False),
        ({"data__cache_dir": "elsewhere"}, False, False),
        ({"data__device_resident": False}, False, False),
        ({"data__layout": "flat"}, False, False),
        ({"preview__every_steps": 7}, False, False),
        ({"evaluation__num_samples": 7}, False, False),
        ({"tracking__trackers": ["tensorboard"]}, False, False),
    ],
)
def test_a_change_prevents_resuming_if_weights_data_order_or_noise_depend_on_it(
    changes: dict[str, object], is_fixed: bool, is_too_late: bool
) -> None:
    before, after = with_changes(), with_changes(**changes)
    ((name, value),) = changes.items()
    section, setting = name.split("__")
    line = f"{section}.{setting} was {getattr(getattr(before, section), setting)!r}, is {value!r}"
    fixed, free = changed_settings(before.to_dict(), after)
    assert (fixed, free) == (([line], []) if is_fixed else ([], [line]))
    assert changed_too_late(free) == ([line] if is_too_late else [])


def test_the_layout_of_a_stream_is_fixed() -> None:
    """Whether a stream has the same images is not known otherwise."""
    streamed = {
        "data__streaming": True,
        "data__resolution": 8,
        "data__num_channels": 1,
        "data__validation_fraction": 0.0,
    }
    before, after = with_changes(**streamed), with_changes(**streamed, data__layout="flat")
    assert changed_settings(before.to_dict(), after) == (["data.layout was None, is 'flat'"], [])


def test_a_setting_that_the_checkpoint_lacks_had_its_default() -> None:
    before = with_changes(training__output_dir="elsewhere").to_dict()
    del before["training"]["tf32"], before["evaluation"], before["objective"]["timestep_sampling"]
    assert changed_settings(before, with_changes()) == ([], [])
    line = "objective.timestep_sampling was 'uniform', is 'loss_aware'"
    assert changed_settings(before, with_changes(objective__timestep_sampling="loss_aware")) == ([line], [])


def test_a_setting_without_effect_in_both_runs_may_change() -> None:
    old = with_changes(diffusion__beta_schedule="cosine", diffusion__beta_end=0.5).to_dict()
    free = ["diffusion.beta_end was 0.5, is 0.02"]
    assert changed_settings(old, with_changes(diffusion__beta_schedule="cosine")) == ([], free)
    fixed, _ = changed_settings(with_changes(diffusion__beta_end=0.03).to_dict(), with_changes())
    assert fixed == ["diffusion.beta_end was 0.03, is 0.02"]


def test_parsing_leaves_the_settings_of_jsonargparse_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with threads: one parses while the other waits, so that the two never meet."""
    check_nulls, together, before = parse._check_nulls, threading.Barrier(2), dict(parsing_settings)

    def meet(parsed: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        check_nulls(parsed)

    monkeypatch.setattr(parse, "_check_nulls", meet)
    with ThreadPoolExecutor(2) as pool:
        configs = pool.map(lambda seed: parse_command_line(["--data.source", "x", "--training.seed", seed])[0], "12")
    assert [config.training.seed for config in configs] == [1, 2]
    assert together.broken
    assert parsing_settings == before
