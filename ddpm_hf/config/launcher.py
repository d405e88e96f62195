"""What `accelerate launch` and `accelerate config` ask for, and the settings that a configuration leaves to them.

The launcher passes its flags on in environment variables, "no" and 1 where it was given nothing, so these values stand
for nothing. A few flags it does not pass on; they are read from its command line.
"""

import dataclasses
import os
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ddpm_hf.config.rules import ConfigError, log_warning
from ddpm_hf.config.schema import RunConfig, TrainingConfig
from ddpm_hf.files import format_count

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
LAUNCHER = "from accelerate launch"
"""Where a value came from, for the summary of a run."""
STORED = "as before"
DEFAULT = "default"

_TRUE = ("1", "true", "yes", "y", "t", "on")
# Variable -> its flag of the launcher.
_UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
    "ACCELERATE_IN_TPU_POD": "--tpu",
    "XLA_USE_BF16": "--tpu",
    "XLA_DOWNCAST_BF16": "--tpu",
}
_DYNAMO_FLAGS = ("--dynamo_use_fullgraph", "--dynamo_use_dynamic", "--dynamo_use_regional_compilation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """What `accelerate launch` was given.

    Args:
        mixed_precision: --mixed_precision; None if it was "no" or not given.
        gradient_accumulation_steps: --gradient_accumulation_steps; None if it was 1 or not given.
        compile_backend: --dynamo_backend in lower case; None if it was "no" or not given.
        compile_mode: --dynamo_mode; None if it was "default" or not given, or without a backend.
        cpu: --cpu.
        has_too_few_processes: Whether it was asked for several processes and started this one alone.
        without_effect: Given flags that have no effect on training.
    """

    mixed_precision: Literal["bf16", "fp16"] | None = None
    gradient_accumulation_steps: int | None = None
    compile_backend: str | None = None
    compile_mode: str | None = None
    cpu: bool = False
    has_too_few_processes: bool = False
    without_effect: tuple[str, ...] = ()


def read_launcher() -> Launcher:
    """Return what the launcher was given; everything is None or False without a launcher.

    Raises:
        ConfigError: The launcher asks for something that is not supported.
    """
    environment = os.environ
    for variable, flag in _UNSUPPORTED.items():
        if _is_set(variable):
            raise ConfigError(
                f"accelerate launch was given {flag}, or an accelerate config that says so, but every process holds "
                "the whole network (DDP) on a CPU or GPU; leave it out, or run `accelerate config` again."
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    supported: dict[str, Literal["bf16", "fp16"] | None] = {"no": None, "bf16": "bf16", "fp16": "fp16"}
    if precision not in supported:
        raise ConfigError(
            f"accelerate launch was given --mixed_precision {precision}, which is not supported; use bf16, fp16 or no."
        )
    given, _ = _flag_parser().parse_known_args(_launcher_command())
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or given.gradient_accumulation_steps or "1"
    if not accumulation.isdecimal() or int(accumulation) < 1:
        raise ConfigError(
            f"accelerate launch was given --gradient_accumulation_steps {accumulation}, but it must be 1 or more."
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    mode = environment.get("ACCELERATE_DYNAMO_MODE", "default")
    given_without_effect = {
        "--gradient_clipping": given.gradient_clipping is not None,
        "--downcast_bf16": given.downcast_bf16,
        "--dynamo_mode": backend == "no" and mode != "default",
    } | {flag: _is_set(f"ACCELERATE_{flag[2:].upper()}") for flag in _DYNAMO_FLAGS}
    return Launcher(
        mixed_precision=supported[precision],
        gradient_accumulation_steps=None if int(accumulation) == 1 else int(accumulation),
        compile_backend=None if backend == "no" else backend,
        compile_mode=None if backend == "no" or mode == "default" else mode,
        cpu=_is_set("ACCELERATE_USE_CPU"),
        # The simple launcher sets this address for several processes, but starts them with MPI or not at all.
        has_too_few_processes="ACCELERATE_MIXED_PRECISION" in environment
        and "MASTER_ADDR" in environment
        and not {"RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & environment.keys(),
        without_effect=tuple(flag for flag, is_given in given_without_effect.items() if is_given),
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE


def _flag_parser() -> ArgumentParser:
    """Return a parser of the flags that the launcher does not pass on to a process without DeepSpeed."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    parser.add_argument("--downcast_bf16", "--downcast-bf16", action="store_true")
    return parser


def _launcher_command() -> list[str]:
    """Return the command line of `accelerate launch`, the parent of this process; without one an empty list."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return []
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):  # not Linux, or the launcher has exited
        return []
    return words if any("accelerate" in word for word in words[:3]) else []


def take_launcher(
    config: RunConfig, launcher: Launcher, *, num_processes: int = 1, stored_precision: Precision | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """Fill the settings that a configuration leaves open; warn about flags of the launcher without effect.

    Args:
        config: A valid configuration.
        launcher: What the launcher was given.
        num_processes: Number of processes.
        stored_precision: training.mixed_precision of the run that is continued; None for a new run.

    Returns:
        The configuration with a precision, and setting -> where its value came from, for the values that are not those
        of the configuration.

    Raises:
        ConfigError: The launcher contradicts the configuration or the run that is continued.
    """
    training = config.training
    origins: dict[str, str] = {}
    asked = launcher.mixed_precision
    if training.mixed_precision is None:
        if asked and stored_precision not in (None, asked):
            raise ConfigError(
                f"accelerate launch was given --mixed_precision {asked}, but the run in {training.output_dir} was "
                f"trained in {stored_precision}; set training.mixed_precision to {asked} to continue in it, or leave "
                "out the launcher's."
            )
        training = dataclasses.replace(training, mixed_precision=asked or stored_precision or "fp32")
        origins["training.mixed_precision"] = LAUNCHER if asked else STORED if stored_precision else DEFAULT
    elif asked not in (None, training.mixed_precision):
        raise ConfigError(
            f"accelerate launch was given --mixed_precision {asked}, but training.mixed_precision is "
            f"{training.mixed_precision}; set both to the same value, or leave out one of them."
        )

    if (steps := launcher.gradient_accumulation_steps) is not None:
        micro_batch_size, remainder = divmod(training.train_batch_size, num_processes * steps)
        if remainder:
            raise ConfigError(
                f"accelerate launch was given --gradient_accumulation_steps {steps}, but training.train_batch_size "
                f"{training.train_batch_size} on {format_count(num_processes, 'process')} cannot be split into as many "
                f"equal parts; use a multiple of {num_processes * steps}."
            )
        if training.micro_batch_size not in (None, micro_batch_size):
            raise ConfigError(
                f"accelerate launch was given --gradient_accumulation_steps {steps}, which is "
                f"training.micro_batch_size {micro_batch_size}, but training.micro_batch_size is "
                f"{training.micro_batch_size}; set it to null, or leave out the launcher's."
            )
        if training.micro_batch_size is None:
            training = dataclasses.replace(training, micro_batch_size=micro_batch_size)
            origins["training.micro_batch_size"] = LAUNCHER

    if launcher.compile_backend is not None:
        if training.compile == "auto":
            origins["training.compile"] = LAUNCHER
        training = _take_compilation(training, launcher.compile_backend, launcher.compile_mode)

    for flag in launcher.without_effect:
        advice = "; set training.max_grad_norm" if flag == "--gradient_clipping" else ""
        log_warning(f"accelerate launch was given {flag}, which has no effect on training{advice}.")
    if launcher.has_too_few_processes:
        log_warning(
            "accelerate launch was asked for several processes, but started one; use torchrun --nproc_per_node on a "
            "CPU, and --num_processes with at most the number of GPUs otherwise."
        )
    return dataclasses.replace(config, training=training), origins


def _take_compilation(training: TrainingConfig, backend: str, mode: str | None) -> TrainingConfig:
    """Compile as the launcher asks, with the backend and mode that the configuration leaves at their defaults."""
    default = TrainingConfig()
    if training.compile is False:
        raise ConfigError(
            f"accelerate launch was given --dynamo_backend {backend}, but training.compile is false; set it to auto, "
            "or leave out the launcher's."
        )
    taken = {"compile_backend": backend} | ({"compile_mode": mode} if mode is not None else {})
    for name, asked in taken.items():
        value = getattr(training, name)
        is_left_open = value == getattr(default, name) and (training.compile == "auto" or name == "compile_mode")
        if value != asked and not is_left_open:
            flag = name.replace("compile", "--dynamo")
            raise ConfigError(
                f"accelerate launch was given {flag} {asked}, but training.{name} is {value}; set both to the same "
                "value, or leave out one of them."
            )
    return dataclasses.replace(training, compile=True, **taken)  # type: ignore[arg-type]


def warn_of_training_flags(launcher: Launcher) -> None:
    """Warn about flags of the launcher that have an effect on training only."""
    for flag, value, instead in (
        ("--mixed_precision", launcher.mixed_precision, "--dtype"),
        ("--gradient_accumulation_steps", launcher.gradient_accumulation_steps, "--batch_size"),
        ("--dynamo_backend", launcher.compile_backend, "--compile"),
    ):
        if value is not None:
            log_warning(
                f"accelerate launch was given {flag} {value}, which has an effect on training only; see {instead}."
            )
