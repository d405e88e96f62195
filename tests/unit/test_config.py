"""What a configuration accepts, what it refuses, and in which words."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpm_hf.config import (
    ConfigError,
    RunConfig,
    changed_settings,
    changed_too_late,
    load_config,
    read_config_dict,
    validate,
)
from tests.conftest import REPOSITORY

SOURCE = ("--data.source", "images.parquet")
SECTIONS = dataclasses.fields(RunConfig)
ALL_SETTINGS = [
    f"{section.name}.{setting.name}"
    for section in SECTIONS
    for setting in dataclasses.fields(getattr(RunConfig(), section.name))
]


def load(*arguments: str) -> RunConfig:
    return load_config([*SOURCE, *arguments])[0]


def refusal(*arguments: str) -> str:
    """Returns the sentence with which a command line is refused."""
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    """Writes YAML and returns the arguments that read it."""

    def write(content: str) -> tuple[str, str]:
        path = tmp_path / "run.yaml"
        path.write_text(content, encoding="utf-8")
        return "--config", str(path)

    return write


def with_changes(**changes: object) -> RunConfig:
    """Returns a good configuration with settings like `training__seed` changed."""
    config = dataclasses.replace(RunConfig(), data=dataclasses.replace(RunConfig().data, source="images"))
    for name, value in changes.items():
        section, setting = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{setting: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def test_a_flag_overrides_the_file_and_the_file_the_default(yaml_file: Any) -> None:
    config = load(*yaml_file("training: {seed: 3, num_steps: 10}\nmodel: {preset: digits_8}\n"), "--training.seed", "4")
    assert (config.training.seed, config.training.num_steps, config.model.preset) == (4, 10, "digits_8")
    assert config.training.train_batch_size == RunConfig().training.train_batch_size


def test_a_number_may_be_written_as_people_write_it(yaml_file: Any) -> None:
    """PyYAML reads 1e-4 as text."""
    assert load(*yaml_file("training: {learning_rate: 1e-4}\n")).training.learning_rate == 1e-4
    assert load("--training.learning_rate", "1e-4").training.learning_rate == 1e-4
    assert load(*yaml_file("training: {learning_rate: 1}\n")).training.learning_rate == 1.0


@pytest.mark.parametrize("channels", ["1", "3", "4", "null"])
def test_a_choice_of_numbers_reads_from_the_command_line(channels: str) -> None:
    assert load("--data.num_channels", channels).data.num_channels == yaml.safe_load(channels)


def test_overrides_keep_their_types() -> None:
    overrides = '{"block_out_channels": [8, 16], "dropout": 0.1, "act_fn": "gelu", "attention_head_dim": null}'
    assert load("--model.overrides", overrides).model.overrides == {
        "block_out_channels": [8, 16],
        "dropout": 0.1,
        "act_fn": "gelu",
        "attention_head_dim": None,
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("training: {num_stepz: 1}", "there is no setting training.num_stepz; did you mean training.num_steps?"),
        ("trainig: {seed: 1}", "there is no setting trainig.seed; did you mean training.seed?"),
        ("zebra: {stripes: 1}", "there is no setting zebra.stripes; --help lists all of them."),
        ("training: {train_batch_size: 64.7}", "training.train_batch_size is 64.7, but must be a whole number."),
        ("training: {learning_rate: fast}", "training.learning_rate is fast, but must be a number."),
        ("training: {learning_rate: true}", "training.learning_rate is True, but must be a number."),
        ("training: {tf32: maybe}", "training.tf32 is maybe, but must be true or false."),
        ("training: {num_steps: null}", "training.num_steps is null, but must be a whole number."),
        ("data: {split: null}", "data.split is null, but must be text."),
        ("data: {num_channels: 2}", "data.num_channels is 2, but must be 1, 3, 4 or null."),
        ("data: {cache_dir: 5}", "data.cache_dir is 5, but must be text or null."),
        ("model: {preset: huge}", "model.preset is huge, but must be ddpm_32 or digits_8."),
        ("model: {overrides: [1]}", "model.overrides is [1], but must be a mapping."),
        ("training: [1, 2]", "training is [1, 2], but must be a section of settings; see --help."),
        ("training:\ndata: {}", "training is null, but must be a section of settings; see --help."),
        ("some words", "--config must name a YAML file with sections of settings, but it holds some words."),
        ("", "--config must name a YAML file with sections of settings, but it holds nothing."),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(yaml_file: Any, content: str, sentence: str) -> None:
    assert refusal(*yaml_file(content)) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--training.num_stepz", "1"], "there is no setting training.num_stepz; did you mean training.num_steps?"),
        (["--training.see=1"], "there is no setting training.see; did you mean training.seed?"),
        (["--training.train_batch_size", "64.7"], "training.train_batch_size is 64.7, but must be a whole number."),
        (["--training.num_steps", "1e3"], "training.num_steps is 1000.0, but must be a whole number; write 1000."),
        (
            ["--training.micro_batch_size", "8.0"],
            "training.micro_batch_size is 8.0, but must be a whole number, auto or null; write 8.",
        ),
        (
            ["--tracking.trackers", "wandb"],
            "tracking.trackers is wandb, but must be a list of tensorboard, wandb or trackio, like [tensorboard].",
        ),
        (["--objective.loss", "MSE"], "objective.loss is MSE, but must be mse, l1 or huber."),
        (["--model.overrides", "{"], "model.overrides is {, but must be a mapping."),
        (["--config", "/nowhere/run.yaml"], "--config: File does not exist: '/nowhere/run.yaml'"),
        (["run.yaml"], "unrecognized arguments: run.yaml"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    assert refusal(*arguments) == sentence


@pytest.mark.parametrize("is_one_word", [False, True])
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, is_one_word: bool) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("training: {seed: 1}\n")
    bad.write_text("training:\n  num_steps: [1\n  seed: 2\n")
    if is_one_word:
        arguments = [f"--config={good}", f"--config={bad}"]
    else:
        arguments = ["--config", str(good), "--config", str(bad)]
    assert refusal(*arguments).startswith(f"--config {bad}, line 3, column 7: expected ',' or ']'")
    bad.write_bytes(b"training: \xff\n")
    assert refusal(*arguments) == f"--config {bad} is not text in UTF-8; save it as such."


def test_yaml_that_is_code_is_refused_and_not_run(yaml_file: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system"):
        assert "could not determine a constructor" in refusal(*yaml_file(f"data: {tag} ['touch {trace}']"))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data__source": ""}, "data.source is not set"),
        ({"objective__class_dropout": 0.1}, "set model.class_conditional to true"),
        ({"preview__guidance_scale": 2.0}, "preview.guidance_scale 2 needs"),
        ({"evaluation__guidance_scale": 0.0}, "evaluation.guidance_scale 0 needs"),
        ({"evaluation__recognition": True}, "evaluation.recognition asks for classes"),
        ({"evaluation__recognition": True, "model__class_conditional": True}, "data.validation_fraction above 0"),
        ({"diffusion__rescale_betas_zero_snr": True}, "set diffusion.prediction_type to v_prediction or sample"),
        ({"training__micro_batch_size": 48}, "train_batch_size 128 is not a multiple of training.micro_batch_size 48"),
        ({"training__num_checkpoints_kept": 1}, "must be at least 2"),
        ({"preview__num_inference_steps": 1001}, "must be at most diffusion.num_train_timesteps, 1000"),
        ({"evaluation__eta": 1.1}, "evaluation.eta is 1.1, but must be between 0 and 1"),
        ({"preview__eta": -0.1}, "preview.eta is -0.1, but must be between 0 and 1"),
        ({"training__learning_rate": 0.0}, "training.learning_rate is 0.0, but must be greater than 0"),
        ({"training__learning_rate": math.nan}, "training.learning_rate is nan, but must be greater than 0"),
        ({"training__max_grad_norm": math.inf}, "training.max_grad_norm is inf, but must be greater than 0"),
        ({"training__num_steps": 0}, "training.num_steps is 0, but must be greater than 0"),
        ({"training__micro_batch_size": 0}, "training.micro_batch_size is 0, but must be greater than 0"),
        ({"training__seed": -1}, "training.seed is -1, but must be 0 or more"),
        ({"training__ema_decay": 1.0}, "training.ema_decay is 1.0, but must be at least 0 and below 1"),
        ({"data__validation_fraction": 1.0}, "data.validation_fraction is 1.0, but must be at least 0 and below 1"),
        ({"data__resolution": 0}, "data.resolution is 0, but must be greater than 0"),
        ({"training__validate_every_steps": -1}, "training.validate_every_steps is -1, but must be 0 or more"),
        ({"training__validate_every_steps": 9}, "training.validate_every_steps 9 needs held-out images; set data.val"),
        ({"training__micro_batch_size": -2}, "training.micro_batch_size is -2, but must be greater than 0"),
        ({"tracking__project": ""}, "tracking.project is empty"),
        ({"training__output_dir": ""}, "training.output_dir is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], sentence: str) -> None:
    validate(with_changes())
    with pytest.raises(ConfigError) as caught:
        validate(with_changes(**changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("batch", "micro", "advice"), [(128, 48, "use 96 or 144."), (4, 48, "; use 48.")])
def test_a_batch_that_cannot_be_divided_comes_with_one_that_can(batch: int, micro: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"{advice}$"):
        validate(with_changes(training__train_batch_size=batch, training__micro_batch_size=micro))


@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion__rescale_betas_zero_snr": True, "diffusion__prediction_type": "v"},
        {"diffusion__rescale_betas_zero_snr": True, "diffusion__prediction_type": "sample"},
        {"model__class_conditional": True, "objective__class_dropout": 0.1, "preview__guidance_scale": 3.0},
        {"training__max_grad_norm": None},
        {"evaluation__num_samples": 0, "preview__every_steps": 0},
        {"training__micro_batch_size": 32},
        {"training__micro_batch_size": "auto"},
        {"tracking__trackers": ["tensorboard", "wandb"]},
        {"training__validate_every_steps": 9, "data__validation_fraction": 0.1},
    ],
)
def test_settings_that_fit_together_are_accepted(changes: dict[str, object]) -> None:
    validate(with_changes(**changes))


def test_a_configuration_comes_back_from_its_own_yaml(yaml_file: Any) -> None:
    config = with_changes(
        model__overrides={"dropout": 0.2, "block_out_channels": [8, 16], "act_fn": "silu", "attention_head_dim": None},
        data__source="Bilder/ä ö: # 'x'.parquet",
        training__adam_epsilon=1e-12,
        training__max_grad_norm=None,
        data__num_channels=3,
    )
    arguments = yaml_file(config.to_yaml())
    assert load_config(arguments) == (config, False)
    assert read_config_dict(Path(arguments[1])) == config.to_dict()


def test_dry_run_is_told() -> None:
    assert load_config([*SOURCE, "--dry_run"])[1] is True
    assert load_config(SOURCE)[1] is False


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_good_configuration(recipe: Path) -> None:
    config, _ = load_config(["--config", str(recipe)])
    assert config.data.source
    assert recipe.read_text(encoding="utf-8").startswith("# "), "a recipe says what it is"


def test_help_tells_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split()).partition(" options:")[2].partition(" Example: ")[0]
    _, *entries = re.split(r" --([a-z]+\.\w+) ", text)
    told = dict(zip(entries[::2], entries[1::2], strict=True))
    assert list(told) == ALL_SETTINGS
    silent = {name: entry for name, entry in told.items() if not re.match(r"\S+ .{9,} \(type: .*default: ", entry)}
    assert not silent


def test_print_config_prints_what_config_reads(yaml_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--training.seed", "5", "--print_config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert load_config(yaml_file(printed))[0] == load("--training.seed", "5")


def test_a_configuration_cannot_be_changed_behind_a_run() -> None:
    config = RunConfig()
    for section in SECTIONS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, section.name, None)
        part = getattr(config, section.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@pytest.mark.parametrize(
    ("changes", "is_fixed"),
    [
        ({"training__seed": 1}, True),
        ({"training__train_batch_size": 64}, True),
        ({"data__random_flip": True}, True),
        ({"data__validation_fraction": 0.1}, True),
        ({"model__overrides": {"dropout": 0.1}}, True),
        ({"diffusion__beta_schedule": "cosine"}, True),
        ({"objective__loss": "l1"}, True),
        ({"training__num_steps": 9}, False),
        ({"training__learning_rate": 1e-5}, False),
        ({"training__micro_batch_size": 32}, False),
        ({"training__mixed_precision": "bf16"}, False),
        ({"data__cache_dir": "/tmp/elsewhere"}, False),
        ({"preview__every_steps": 7}, False),
        ({"tracking__trackers": ["tensorboard"]}, False),
    ],
)
def test_a_changed_setting_is_named_with_both_values(changes: dict[str, object], is_fixed: bool) -> None:
    """Fixed are those that weights, order of the data or noise depend on."""
    before, after = with_changes(), with_changes(**changes)
    ((name, value),) = changes.items()
    section, setting = name.split("__")
    old_value = getattr(getattr(before, section), setting)
    line = f"{section}.{setting} was {old_value!r}, is {value!r}"
    assert changed_settings(before.to_dict(), after) == (([line], []) if is_fixed else ([], [line]))


@pytest.mark.parametrize(
    ("changes", "is_too_late"),
    [
        ({"training__learning_rate": 1e-5}, True),
        ({"training__mixed_precision": "bf16"}, True),
        ({"training__ema_decay": 0.5}, True),
        ({"training__cpu": True}, False),
        ({"training__log_every_steps": 7}, False),
        ({"training__validate_every_steps": 7}, False),
        ({"data__cache_dir": "/tmp/elsewhere"}, False),
        ({"evaluation__num_samples": 7}, False),
        ({"preview__eta": 0.5}, False),
        ({"tracking__project": "x"}, False),
    ],
)
def test_a_finished_run_cannot_follow_what_would_have_shaped_its_weights(
    changes: dict[str, object], is_too_late: bool
) -> None:
    _, free = changed_settings(with_changes().to_dict(), with_changes(**changes))
    assert len(free) == 1
    assert changed_too_late(free) == (free if is_too_late else [])


def test_a_moved_run_folder_or_a_setting_of_a_newer_version_is_no_change() -> None:
    before = with_changes(training__output_dir="elsewhere").to_dict()
    del before["training"]["tf32"]
    del before["evaluation"]
    assert changed_settings(before, with_changes()) == ([], [])
    assert changed_settings(yaml.safe_load(with_changes().to_yaml()), with_changes()) == ([], [])
