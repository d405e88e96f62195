"""What `accelerate launch` says counts: the flags it passes on, open settings, contradictions, what is refused.

Accelerate's own code builds the environment of a training process here; one test starts the launcher.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from ddpm_hf.cli import main
from ddpm_hf.config import (
    ConfigError,
    Launcher,
    RunConfig,
    TrainingConfig,
    parse_command_line,
    read_launcher,
    take_launcher,
)
from ddpm_hf.training.checkpoint import stored_precision
from ddpm_hf.training.trainer import Trainer, describe
from tests.conftest import REPOSITORY, run_arguments, run_process
from tests.runs import assert_same_run

Launch = Callable[..., None]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None) -> Launch:
    """A function that sets the variables that `accelerate launch FLAGS` sets, and no others."""
    for name in ("MASTER_ADDR", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(*flags: str) -> None:
        options = launch_command_parser().parse_args(["--num_machines", "1", *flags, "train_ddpm.py"])
        options, _, _ = _validate_launch_command(options)
        if options.use_deepspeed:
            options.deepspeed_fields_from_accelerate_config = ""
            _, environment = prepare_deepspeed_cmd_env(options)
        elif options.use_fsdp or options.use_megatron_lm or options.multi_gpu:
            environment = prepare_multi_gpu_env(options)
        else:
            _, environment = prepare_simple_launcher_cmd_env(options)
        for name, value in environment.items():
            if name.startswith("ACCELERATE_") or name == "MASTER_ADDR":
                monkeypatch.setenv(name, value)

    return set_variables


def accelerate_config(folder: Path, **changes: Any) -> str:
    """Write a file as `accelerate config` does and return its path."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO",
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 1,
        "use_cpu": True,
    }
    path = folder / "default_config.yaml"
    path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------------ read


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--mixed_precision", "no", "--dynamo_backend", "no"], {}),
        (["--mixed_precision", "bf16"], {"mixed_precision": "bf16"}),
        (["--dynamo_backend", "inductor", "--dynamo_mode", "max-autotune"],
         {"compile_backend": "inductor", "compile_mode": "max-autotune"}),
        (["--dynamo_backend", "eager", "--dynamo_use_dynamic"],
         {"compile_backend": "eager", "without_effect": ("--dynamo_use_dynamic",)}),
        (["--dynamo_mode", "max-autotune"], {"without_effect": ("--dynamo_mode",)}),
        (["--cpu"], {"cpu": True}),
        (["--cpu", "--num_processes", "2"], {"cpu": True, "has_too_few_processes": True}),
    ],
)  # fmt: skip
def test_the_flags_of_the_launcher_are_read(launch: Launch, flags: list[str], expected: dict[str, Any]) -> None:
    launch("--num_processes", "1", *flags)
    assert read_launcher() == Launcher(**expected)


def test_a_process_without_a_launcher_was_given_nothing(launch: Launch) -> None:
    assert read_launcher() == Launcher()


def test_a_file_of_accelerate_config_counts_like_flags(launch: Launch, tmp_path: Path) -> None:
    dynamo = {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "reduce-overhead"}}
    launch("--config_file", accelerate_config(tmp_path, mixed_precision="fp16", **dynamo))
    expected = Launcher(mixed_precision="fp16", compile_backend="inductor", compile_mode="reduce-overhead", cpu=True)
    assert read_launcher() == expected


@pytest.mark.parametrize("is_real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flags_that_the_launcher_keeps_to_itself_are_read_from_its_command_line(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_real: bool
) -> None:
    """The real launcher takes seconds to start, so a program of its name replaces it in one of the cases."""
    script, fake = tmp_path / "script.py", tmp_path / "accelerate"
    script.write_text("from ddpm_hf.config import read_launcher\nprint(read_launcher())\n", encoding="utf-8")
    fake.write_text("import subprocess, sys\nsubprocess.run([sys.executable, sys.argv[-1]])\n", encoding="utf-8")
    launcher = ["-m", "accelerate.commands.launch", "--quiet"] if is_real else [str(fake), "launch"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as the launcher does
    flags = ["--gradient-accumulation-steps", "4", "--gradient_clipping=1.0", "--downcast_bf16"]
    answer = run_process([*launcher, "--num_processes", "1", "--mixed_precision", "no", *flags, str(script)])
    expected = Launcher(gradient_accumulation_steps=4, without_effect=("--gradient_clipping", "--downcast_bf16"))
    assert answer.stdout.strip() == str(expected), answer.stderr


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--use_fsdp"], "--use_fsdp"),
        (["--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config"], "--use_fsdp"),
        (["--use_deepspeed", "--gradient_accumulation_steps", "4"], "--use_deepspeed"),
        (["--use_megatron_lm"], "--use_megatron_lm"),
        (["FSDP"], "--use_fsdp"),
        (["DEEPSPEED"], "--use_deepspeed"),
        (["MEGATRON_LM"], "--use_megatron_lm"),
    ],
)
def test_sharded_networks_are_refused_before_anything_is_built(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], name: str
) -> None:
    if flags[0].isupper():
        flags = ["--config_file", accelerate_config(tmp_path, use_cpu=False, distributed_type=flags[0])]
    launch("--num_processes", "1", *flags)
    commands = [
        ["train", *run_arguments(tmp_path / "run", data__source=tmp_path / "missing")],
        ["train", *run_arguments(tmp_path / "run"), "--dry_run"],
        ["sample", str(tmp_path / "missing"), "--output", str(tmp_path / "run")],
        ["evaluate", str(tmp_path / "missing"), "--data", "missing", "--metrics", "bits_per_dim"],
    ]
    for command in commands:
        assert main.main(command) == 2
        assert f"error: accelerate launch was given {name}, or an accelerate config that" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "--mixed_precision fp8, which is not supported; use bf16, fp16 or no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "--gradient_accumulation_steps 0, but it must be 1 or more"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "--use_parallelism_config, or an accelerate config"),
        ("XLA_USE_BF16", "1", "--tpu, or an accelerate config"),
    ],
)
def test_what_is_not_supported_is_refused(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=sentence):
        read_launcher()


# ------------------------------------------------------------------------------------------------------------ take


def taken(launcher: Launcher, num_processes: int = 1, stored: Any = None, **training: Any) -> TrainingConfig:
    config = RunConfig(training=TrainingConfig(train_batch_size=16, **training))
    return take_launcher(config, launcher, num_processes=num_processes, stored_precision=stored)[0].training


@pytest.mark.parametrize(
    ("configured", "given", "stored", "expected"),
    [
        (None, None, None, "fp32"),
        (None, "bf16", None, "bf16"),
        (None, None, "fp16", "fp16"),
        (None, "bf16", "bf16", "bf16"),
        ("fp32", None, None, "fp32"),
        ("bf16", "bf16", "fp32", "bf16"),
        ("fp32", None, "bf16", "fp32"),
    ],
)
def test_the_precision_is_that_of_the_configuration_else_the_launcher_else_the_run(
    configured: Any, given: Any, stored: Any, expected: str
) -> None:
    launcher = Launcher(mixed_precision=given)
    assert taken(launcher, stored=stored, mixed_precision=configured).mixed_precision == expected


@pytest.mark.parametrize(
    ("given", "num_processes", "configured", "expected"),
    [(4, 1, None, 4), (4, 2, None, 2), (4, 2, 2, 2), (None, 1, None, None), (None, 1, 2, 2), (None, 1, "auto", "auto")],
)
def test_an_open_micro_batch_size_follows_the_accumulation_of_the_launcher(
    given: int | None, num_processes: int, configured: Any, expected: Any
) -> None:
    launcher = Launcher(gradient_accumulation_steps=given)
    assert taken(launcher, num_processes, micro_batch_size=configured).micro_batch_size == expected


@pytest.mark.parametrize(
    ("backend", "mode", "configured", "expected"),
    [
        ("eager", None, {}, (True, "eager", "default")),
        ("inductor", "reduce-overhead", {}, (True, "inductor", "reduce-overhead")),
        ("inductor", "reduce-overhead", {"compile": True}, (True, "inductor", "reduce-overhead")),
        ("inductor", None, {"compile": True, "compile_mode": "max-autotune"}, (True, "inductor", "max-autotune")),
        (None, None, {}, ("auto", "inductor", "default")),
    ],
)
def test_an_open_compilation_follows_the_launcher(
    backend: str | None, mode: str | None, configured: dict[str, Any], expected: tuple[object, ...]
) -> None:
    training = taken(Launcher(compile_backend=backend, compile_mode=mode), **configured)
    assert (training.compile, training.compile_backend, training.compile_mode) == expected


@pytest.mark.parametrize(
    ("launcher", "training", "stored", "names"),
    [
        ({"mixed_precision": "bf16"}, {"mixed_precision": "fp32"}, None,
         ("--mixed_precision bf16", "training.mixed_precision is fp32")),
        ({"mixed_precision": "bf16"}, {}, "fp32", ("--mixed_precision bf16", "was trained in fp32")),
        ({"gradient_accumulation_steps": 4}, {"micro_batch_size": 2}, None,
         ("--gradient_accumulation_steps 4", "training.micro_batch_size is 2")),
        ({"gradient_accumulation_steps": 4}, {"micro_batch_size": "auto"}, None,
         ("--gradient_accumulation_steps 4", "training.micro_batch_size is auto")),
        ({"gradient_accumulation_steps": 3}, {}, None,
         ("--gradient_accumulation_steps 3", "training.train_batch_size 16 on 1 process")),
        ({"compile_backend": "inductor"}, {"compile": False}, None,
         ("--dynamo_backend inductor", "training.compile is false")),
        ({"compile_backend": "eager"}, {"compile": True}, None,
         ("--dynamo_backend eager", "training.compile_backend is inductor")),
        ({"compile_backend": "inductor", "compile_mode": "max-autotune"}, {"compile_mode": "reduce-overhead"}, None,
         ("--dynamo_mode max-autotune", "training.compile_mode is reduce-overhead")),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_sides(
    launcher: dict[str, Any], training: dict[str, Any], stored: Any, names: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        taken(Launcher(**launcher), stored=stored, **training)
    assert all(name in str(raised.value) for name in names), raised.value


def test_flags_without_effect_and_missing_processes_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    taken(Launcher(without_effect=("--gradient_clipping",), has_too_few_processes=True))
    clipping, processes = (record.getMessage() for record in caplog.records)
    assert "--gradient_clipping, which has no effect on training; set training.max_grad_norm" in clipping
    assert "asked for several processes, but started one; use torchrun --nproc_per_node" in processes


# ------------------------------------------------------------------------------------------------------------ runs


def test_the_precision_of_the_launcher_is_shown_recorded_and_kept_without_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after two of four steps and continued by plain python: the same bits as four steps in explicit bf16."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    launch("--num_processes", "1", "--mixed_precision", "bf16")
    assert main.main(["train", *run_arguments(run, training__num_steps=2)]) == 0
    assert "cpu x 1, bf16 (from accelerate launch), batch 8" in capsys.readouterr().out
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert main.main(["train", *run_arguments(run, training__num_steps=4)]) == 0
    assert "cpu x 1, bf16 (as before), batch 8" in capsys.readouterr().out
    assert main.main(["train", *run_arguments(whole, training__num_steps=4, training__mixed_precision="bf16")]) == 0
    assert_same_run(whole, run, 4)
    for name in ("config.yaml", "checkpoints/step_00000002/config.yaml", "pipeline/training_config.yaml"):
        assert yaml.safe_load((run / name).read_text())["training"]["mixed_precision"] == "bf16"


def test_a_run_is_not_continued_in_another_precision_of_the_launcher(
    launch: Launch, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("--num_processes", "1", "--mixed_precision", "bf16")
    assert stored_precision(finished_run / "checkpoints") == "fp32"
    assert main.main(["train", *run_arguments(finished_run)]) == 2
    assert "--mixed_precision bf16, but the run in" in capsys.readouterr().err


def test_accumulation_of_the_launcher_is_shown_and_recorded(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert main.main(["train", *run_arguments(tmp_path / "run", training__num_steps=1)]) == 0
    assert "batch 8 = 1 x 2 x 4 accumulated (from accelerate launch)" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["training"]["micro_batch_size"] == 2


def test_fp16_of_the_launcher_on_a_cpu_names_its_flag(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("--num_processes", "1", "--cpu", "--mixed_precision", "fp16")
    assert main.main(["train", *run_arguments(tmp_path / "run")]) == 2
    assert "accelerate launch --mixed_precision fp16 needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sampling_ignores_the_precision_with_a_warning_and_refuses_several_processes(
    launch: Launch,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    launch("--num_processes", "1", "--mixed_precision", "bf16")
    command = ["sample", str(tiny_pipeline), "--seeds", "0", "--num_inference_steps", "1"]
    assert main.main([*command, "--output", str(tmp_path / "samples")]) == 0
    assert "--mixed_precision bf16, which has an effect on training only; see --dtype" in caplog.text
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main.main([*command, "--output", str(tmp_path / "other")]) == 2
    assert "ddpm-hf sample runs in one process, but the launcher started 2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_gpu_with_bf16_that_is_left_in_fp32_gets_a_hint(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    advice = "training.mixed_precision is left open, so the network runs in fp32; consider bf16"
    for precision, is_advised in ((None, True), ("fp32", False)):
        config, _ = parse_command_line(run_arguments(tmp_path / str(precision), training__mixed_precision=precision))
        trainer = Trainer(config)
        assert advice not in describe(trainer)
        trainer.device = torch.device("cuda")
        assert (advice in describe(trainer)) is is_advised
        trainer.folder.release()


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_leaves_the_precision_open(recipe: Path) -> None:
    assert "mixed_precision" not in yaml.safe_load(recipe.read_text(encoding="utf-8"))["training"]


def test_make_train_trains_in_fp32(launch: Launch) -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    words = next(line for line in text.splitlines() if line.startswith("LAUNCH := ")).split()
    launch(*words[words.index("$(VENV)/bin/accelerate-launch") + 1 :])
    assert taken(read_launcher()).mixed_precision == "fp32"
