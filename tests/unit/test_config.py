"""What a configuration accepts, what it refuses, and in which words."""

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddpm_hf.config import (
    ConfigError,
    DiffusionConfig,
    RunConfig,
    changed_settings,
    changed_too_late,
    load_config,
    read_config_dict,
    validate,
)
from ddpm_hf.diffusion.schedule import BETA_SCHEDULE_ALIASES, BETA_SCHEDULES, make_betas
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


STREAMED = {"data__streaming": True, "data__resolution": 32, "data__num_channels": 3}
RECOGNISED = {
    "evaluation__recognition": True,
    "model__class_conditional": True,
    "data__validation_split": "test",
}


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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_channels", "3"), ("num_channels", "null"), ("resolution", "32"), ("resolution", "[32, 48]"),
        ("resolution", "null"), ("crop_before_resize", "[40, 15, 188, 163]"), ("crop_before_resize", "148"),
        ("device_resident", "auto"), ("device_resident", "true"), ("device_resident", "false"),
    ],
)  # fmt: skip
def test_a_setting_of_several_types_reads_from_the_command_line(setting: str, value: str) -> None:
    given = ["--data.resolution", "32"] if setting == "crop_before_resize" else []
    assert getattr(load(*given, f"--data.{setting}", value).data, setting) == yaml.safe_load(value)


def test_arguments_of_an_optimizer_keep_their_types() -> None:
    arguments = '{"momentum": 0.9, "nesterov": true, "betas": [0.9, 0.99], "foreach": null, "maximize": false, "k": 3}'
    found = load("--training.optimizer", "torch.optim.SGD", "--training.optimizer_kwargs", arguments).training
    assert found.optimizer_kwargs == {
        "momentum": 0.9,
        "nesterov": True,
        "betas": [0.9, 0.99],
        "foreach": None,
        "maximize": False,
        "k": 3,
    }
    assert {type(value) for value in found.optimizer_kwargs.values()} == {float, bool, list, type(None), int}


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
        ("data: {crop: middle}", "data.crop is middle, but must be center or random."),
        ("data: {device_resident: maybe}", "data.device_resident is maybe, but must be auto or true or false."),
        (
            "data: {resolution: big}",
            "data.resolution is big, but must be a whole number, a list of whole numbers or null.",
        ),
        ("data: {cache_dir: 5}", "data.cache_dir is 5, but must be text or null."),
        (
            "model: {preset: huge}",
            "model.preset is huge, but must be ddpm_32, ddpm_64, ddpm_256, improved_32, improved_64, digits_8, "
            "mnist_28, flowers_64 or null.",
        ),
        ("model: {overrides: [1]}", "model.overrides is [1], but must be a mapping."),
        ("training: {ema_warmup: true}", "training.ema_warmup is True, but must be none, ramp or power."),
        ("training: {optimizer_kwargs: 5}", "training.optimizer_kwargs is 5, but must be a mapping."),
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
        (["--objective.loss", "MSE"], "objective.loss is MSE, but must be mse, l1, huber, vlb or hybrid."),
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
        (
            {"training__validate_every_steps": 9},
            "needs held-out images; set data.validation_fraction, for example to 0.05.",
        ),
        (
            STREAMED | {"training__validate_every_steps": 9},
            "training.validate_every_steps 9 needs held-out images; set data.validation_split.",
        ),
        (
            STREAMED | {"objective__immiscible_noise": True},
            "data.streaming gives to one process alone; set one of them to false.",
        ),
        ({"training__micro_batch_size": -2}, "training.micro_batch_size is -2, but must be greater than 0"),
        ({"tracking__project": ""}, "tracking.project is empty"),
        ({"data__resolution": [3]}, "data.resolution is [3], but a list must be [height, width] in pixels"),
        ({"data__resolution": [3, 0]}, "data.resolution is [3, 0], but a list must be [height, width] in pixels"),
        ({"data__crop_before_resize": 0}, "data.crop_before_resize is 0, but must be greater than 0"),
        ({"data__crop_before_resize": [1, 2, 3]}, "a list must be [left, top, right, bottom] in pixels"),
        ({"data__crop_before_resize": [5, 2, 5, 9]}, "a list must be [left, top, right, bottom] in pixels"),
        ({"data__crop": "random"}, "data.crop random needs the size to cut out; set data.resolution"),
        ({"data__resize_to": 70}, "data.resize_to 70 needs the size to cut out; set data.resolution"),
        ({"data__resize_to": -1}, "data.resize_to is -1, but must be 0 or more"),
        ({"data__resize_to": 60, "data__resolution": 64}, "data.resize_to 60 is less than data.resolution 64"),
        ({"data__max_bad_fraction": 1.0}, "data.max_bad_fraction is 1.0, but must be at least 0 and below 1"),
        ({"data__shuffle_buffer_size": 0}, "data.shuffle_buffer_size is 0, but must be greater than 0"),
        ({"data__num_channels": 0}, "data.num_channels is 0, but must be greater than 0"),
        (
            {"data__validation_split": "test", "data__validation_fraction": 0.1},
            "both hold out images; give one of them",
        ),
        ({"data__streaming": True}, "set data.resolution, and data.num_channels to 1, 3 or 4"),
        (STREAMED | {"data__num_channels": 2}, "set data.resolution, and data.num_channels to 1, 3 or 4"),
        (STREAMED | {"data__validation_fraction": 0.1}, "data.streaming knows no number of images to hold out"),
        (STREAMED | {"data__device_resident": True}, "data.streaming and data.device_resident exclude each other"),
        (
            STREAMED | RECOGNISED,
            "data.validation_fraction above 0 or data.validation_split, and data.streaming to false",
        ),
        ({"training__output_dir": ""}, "training.output_dir is not set"),
        ({"objective__huber_delta": 0.0}, "objective.huber_delta is 0.0, but must be greater than 0"),
        ({"objective__vlb_weight": 0.0}, "objective.vlb_weight is 0.0, but must be greater than 0"),
        ({"objective__min_snr_gamma": 0.0}, "objective.min_snr_gamma is 0.0, but must be greater than 0"),
        ({"objective__p2_k": 0.0}, "objective.p2_k is 0.0, but must be greater than 0"),
        ({"objective__p2_gamma": -1.0}, "objective.p2_gamma is -1.0, but must be 0 or more"),
        ({"objective__offset_noise": -0.1}, "objective.offset_noise is -0.1, but must be 0 or more"),
        ({"objective__self_conditioning": 1.1}, "objective.self_conditioning is 1.1, but must be between 0 and 1"),
        (
            {"objective__huber_delta": 2.0},
            "objective.huber_delta 2 has no effect with objective.loss mse; leave it out",
        ),
        ({"objective__vlb_weight": 1.0}, "or set objective.loss to hybrid."),
        ({"objective__min_snr_gamma": 1.0, "objective__weighting": "p2"}, "set objective.weighting to min_snr."),
        ({"objective__p2_gamma": 0.5}, "objective.p2_gamma 0.5 has no effect with objective.weighting none"),
        ({"objective__p2_k": 2.0}, "set objective.weighting to p2."),
        ({"model__preset": None}, "model.preset is null; name a preset, or give model.config_file or model.from_pre"),
        (
            {"model__preset": "digits_8", "model__config_file": "x"},
            "model.preset digits_8 and model.config_file both name a network; set one of them to null.",
        ),
        ({"model__preset": "ddpm_256", "model__from_pretrained": "x"}, "ddpm_256 and model.from_pretrained both name"),
        (
            {"model__config_file": "x", "model__from_pretrained": "y"},
            "model.config_file and model.from_pretrained both",
        ),
        ({"model__revision": "main"}, "model.revision main needs a repository; set model.from_pretrained"),
        (
            {"model__from_pretrained": "x", "model__initialization": "torch"},
            "model.initialization torch does not apply to a network from model.from_pretrained; leave it out.",
        ),
        ({"training__optimizer": "lion"}, "training.optimizer lion is unknown; use adamw, adam or an import path such"),
        ({"training__optimizer": "torch.optim."}, "training.optimizer torch.optim. is unknown"),
        ({"training__optimizer": "a b.C"}, "training.optimizer a b.C is unknown"),
        (
            {"training__optimizer": "torch.optim.SGD", "training__adam_beta1": 0.5},
            "training.adam_beta1 applies to adamw and adam only; tell torch.optim.SGD by training.optimizer_kwargs.",
        ),
        ({"training__optimizer": "torch.optim.SGD", "training__weight_decay": 0.1}, "training.weight_decay applies to"),
        (
            {"training__ema_power": 0.5},
            "training.ema_power 0.5 has no effect with training.ema_warmup ramp; leave it out, or set "
            "training.ema_warmup to power.",
        ),
        (
            {"training__ema_inv_gamma": 2.0, "training__ema_warmup": "none"},
            "training.ema_inv_gamma 2 has no effect with training.ema_warmup none; leave it out, or set",
        ),
        (
            {"training__ema_inv_gamma": 0.0, "training__ema_warmup": "power"},
            "training.ema_inv_gamma is 0.0, but must be",
        ),
        (
            {"training__ema_power": -1.0, "training__ema_warmup": "power"},
            "training.ema_power is -1.0, but must be grea",
        ),
        ({"training__ema_every_steps": 0}, "training.ema_every_steps is 0, but must be greater than 0"),
        ({"training__ema_start_step": -1}, "training.ema_start_step is -1, but must be 0 or more"),
        (
            {"training__posthoc_ema_every_steps": 5},
            "training.posthoc_ema_every_steps 5 has no effect with training.posthoc_ema false; leave it out, or set "
            "training.posthoc_ema to true.",
        ),
        (
            {"training__posthoc_ema_every_steps": 0, "training__posthoc_ema": True},
            "training.posthoc_ema_every_steps is 0, but must be greater than 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], sentence: str) -> None:
    validate(with_changes())
    with pytest.raises(ConfigError) as caught:
        validate(with_changes(**changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


LEARNED = {"diffusion__variance_type": "learned_range"}
VLB, HYBRID = {"objective__loss": "vlb"}, {"objective__loss": "hybrid"} | LEARNED


@pytest.mark.parametrize(
    ("changes", "both_sides", "fix"),
    [
        *(
            (LEARNED | {"objective__loss": loss}, ("diffusion.variance_type learned_range", f"objective.loss {loss}"),
             "set objective.loss to hybrid or vlb, or diffusion.variance_type to fixed_small or fixed_large.")
            for loss in ("mse", "l1", "huber")
        ),
        ({"diffusion__variance_type": "learned"}, ("diffusion.variance_type learned", "objective.loss mse"),
         "set objective.loss to hybrid or vlb"),
        ({"objective__loss": "hybrid"}, ("objective.loss hybrid", "diffusion.variance_type is fixed_large"),
         "set diffusion.variance_type to learned_range, or objective.loss to mse."),
        *(
            (VLB | {"objective__weighting": weighting}, (f"objective.weighting {weighting}", "objective.loss vlb"),
             "set objective.weighting to none, or objective.loss to mse or hybrid.")
            for weighting in ("p2", "min_snr", "snr")
        ),
        *(
            ({"objective__weighting": "truncated_snr", "diffusion__prediction_type": name},
             ("objective.weighting truncated_snr", f"diffusion.prediction_type {name}"),
             "set diffusion.prediction_type to v_prediction or sample, or objective.weighting to min_snr.")
            for name in ("epsilon", "eps")
        ),
        *(
            (loss | {"objective__offset_noise": 0.1}, ("objective.offset_noise 0.1", "objective.loss"),
             "leave objective.offset_noise out, or set objective.loss to mse.")
            for loss in (VLB, HYBRID)
        ),
        *(
            (loss | {"objective__immiscible_noise": True}, ("objective.immiscible_noise true", "objective.loss"),
             "leave objective.immiscible_noise out, or set objective.loss to mse.")
            for loss in (VLB, HYBRID)
        ),
    ],
)  # fmt: skip
def test_objectives_that_make_no_sense_are_refused_with_both_sides_and_the_fix(
    changes: dict[str, object], both_sides: tuple[str, str], fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_changes(**changes))
    sentence = str(caught.value)
    assert all(side in sentence for side in both_sides)
    assert sentence.endswith(fix) or fix in sentence.partition("; ")[2]
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data__resize_filter": "box"}, "box has no effect with data.resolution null; leave it out, or set data.res"),
        (
            {"data__max_bad_fraction": 0.1},
            "0.1 has no effect with data.on_bad_image error; leave it out, or set data.on",
        ),
        ({"data__shuffle_buffer_size": 9}, "9 has no effect with data.streaming false; leave it out, or set data.stre"),
        (
            {"diffusion__beta_end": 0.5, "diffusion__beta_schedule": "cosine"},
            "0.5 has no effect with diffusion.beta_sc",
        ),
        ({"diffusion__beta_start": 0.01, "diffusion__beta_schedule": "const"}, "has no effect with diffusion.beta_sch"),
        ({"diffusion__scale_betas_to_timesteps": True, "diffusion__beta_schedule": "jsd"}, "true has no effect with"),
        (
            {"evaluation__score_metric": "fid"},
            "fid has no effect with evaluation.score_every_steps 0; leave it out, or",
        ),
        ({"evaluation__score_num_samples": 5}, "5 has no effect with evaluation.score_every_steps 0; leave it out, or"),
        ({"evaluation__score_features": "x"}, "x has no effect with evaluation.score_every_steps 0; leave it out, or"),
        (
            {"tracking__run_name": "x"},
            "x has no effect with tracking.trackers []; leave it out, or set tracking.tracke",
        ),
        ({"tracking__project": "x"}, "x has no effect with tracking.trackers []; leave it out, or set tracking.tracke"),
        (RECOGNISED | {"evaluation__num_samples": 0}, "true has no effect with evaluation.num_samples 0; leave it out"),
        (
            {"hub__repo_id": "x"},
            "x has no effect with hub.push_to_hub false; leave it out, or set hub.push_to_hub to tr",
        ),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        validate(with_changes(**changes))


@pytest.mark.parametrize("schedule", [*BETA_SCHEDULES, *BETA_SCHEDULE_ALIASES])
def test_the_betas_of_a_range_may_be_set_and_those_of_a_formula_may_not(schedule: str) -> None:
    """As the schedules themselves read them."""
    before = make_betas(schedule)
    for name, value in (("beta_start", 2e-4), ("beta_end", 0.03)):
        config = with_changes(**{"diffusion__beta_schedule": schedule, f"diffusion__{name}": value})
        if torch.equal(make_betas(schedule, **{name: value}), before):
            with pytest.raises(
                ConfigError, match=f"diffusion.{name} {value:g} has no effect with diffusion.beta_sched"
            ):
                validate(config)
        else:
            validate(config)


def test_the_noise_schedules_of_the_schema_are_those_there_are() -> None:
    hint = typing.get_type_hints(DiffusionConfig)["beta_schedule"]
    assert set(typing.get_args(hint)) == {*BETA_SCHEDULES, *BETA_SCHEDULE_ALIASES}


def test_a_run_with_a_setting_that_nothing_read_goes_on_without_it() -> None:
    """It was accepted once, and weights and order do not depend on it; a setting that was read, they do."""
    old = with_changes(diffusion__beta_schedule="cosine", diffusion__beta_end=0.5).to_dict()
    del old["data"]["max_bad_fraction"]
    free = ["diffusion.beta_end was 0.5, is 0.02"]
    assert changed_settings(old, with_changes(diffusion__beta_schedule="cosine")) == ([], free)
    fixed, _ = changed_settings(with_changes(diffusion__beta_end=0.03).to_dict(), with_changes())
    assert fixed == ["diffusion.beta_end was 0.03, is 0.02"]


def test_a_recipe_whose_previews_and_report_are_switched_off_is_accepted() -> None:
    """How they would be drawn may stay."""
    off = ["--preview.every_steps", "0", "--evaluation.num_samples", "0"]
    for recipe in sorted((REPOSITORY / "configs").glob("*.yaml")):
        load_config(["--config", str(recipe), *off, "--evaluation.recognition", "false"])


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
        HYBRID | {"objective__weighting": "p2", "objective__p2_gamma": 0.5, "objective__vlb_weight": 0.01},
        VLB | {"objective__timestep_sampling": "loss_aware"},
        VLB | {"diffusion__variance_type": "learned", "objective__self_conditioning": 1.0},
        {"objective__loss": "huber", "objective__huber_delta": 0.1, "objective__weighting": "min_snr"},
        {"objective__weighting": "truncated_snr", "diffusion__prediction_type": "v"},
        {"objective__weighting": "snr", "diffusion__prediction_type": "x0", "diffusion__rescale_betas_zero_snr": True},
        {"objective__offset_noise": 0.1, "objective__immiscible_noise": True, "objective__loss": "l1"},
        {"model__preset": None, "model__config_file": "x", "model__revision": "main"},
        {"model__from_pretrained": "x", "model__overrides": {"dropout": 0.1}},
        {"training__optimizer": "torch.optim.SGD", "training__optimizer_kwargs": {"momentum": 0.9}},
        {"training__optimizer": "adam", "training__weight_decay": 0.1},
        {"training__ema_warmup": "power", "training__ema_power": 0.5, "training__ema_inv_gamma": 2.0},
        {"training__posthoc_ema": True},
        {"data__resolution": [64, 48], "data__crop": "random", "data__resize_to": 50},
        {"data__resolution": 64, "data__resize_to": 0, "data__crop_before_resize": [40, 15, 188, 163]},
        STREAMED | {"data__validation_split": "test", "training__validate_every_steps": 9},
        {"data__validation_split": "test", "training__validate_every_steps": 9},
        RECOGNISED,
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
        ({"model__from_pretrained": "elsewhere"}, True),
        ({"training__optimizer": "adam"}, True),
        ({"training__optimizer_kwargs": {"amsgrad": True}}, True),
        ({"training__posthoc_ema": True}, True),
        ({"model__gradient_checkpointing": True}, False),
        ({"training__ema_every_steps": 2}, False),
        ({"training__ema_warmup": "power"}, False),
        ({"training__posthoc_ema_every_steps": 7}, False),
        ({"training__num_steps": 9}, False),
        ({"training__learning_rate": 1e-5}, False),
        ({"training__micro_batch_size": 32}, False),
        ({"training__mixed_precision": "bf16"}, False),
        ({"data__cache_dir": "/tmp/elsewhere"}, False),
        ({"data__device_resident": "true"}, False),
        ({"data__device_resident": False}, False),
        ({"data__resolution": 8}, True),
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


def test_a_setting_that_the_checkpoint_does_not_know_of_counts_as_its_default() -> None:
    before = with_changes().to_dict()
    del before["objective"]["timestep_sampling"]
    after = with_changes(objective__timestep_sampling="loss_aware")
    line = "objective.timestep_sampling was 'uniform', is 'loss_aware'"
    assert changed_settings(before, after) == ([line], [])


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
        ({"data__device_resident": "true"}, False),
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
