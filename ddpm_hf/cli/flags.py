"""Command-line flags as fields of dataclasses, and the flags that `ddpm-hf sample` and `ddpm-hf evaluate` share."""

import csv
import dataclasses
import math
import types
import typing
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from docstring_parser import parse as parse_docstring

from ddpm_hf.config import NATIVE_SCHEDULER, ConfigError, check_interval, log_warning, scheduler_and_eta
from ddpm_hf.config.schema import CompileMode
from ddpm_hf.redaction import redact

if TYPE_CHECKING:
    from ddpm_hf.diffusion import GaussianDiffusionPipeline

Flags = TypeVar("Flags")
AnySamplingFlags = TypeVar("AnySamplingFlags", bound="SamplingFlags")

CALL_FLAGS = (
    "num_inference_steps",
    "eta",
    "timestep_spacing",
    "guidance_scale",
    "guidance_rescale",
    "guidance_interval",
)
"""Flags that are arguments of a pipeline call under the same name."""


class Parser(ArgumentParser):
    """An argument parser without abbreviations, which prints no secrets and exits with 2."""

    def __init__(self, **options: Any) -> None:
        options = {"allow_abbrev": False, "formatter_class": RawDescriptionHelpFormatter, **options}
        super().__init__(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words, which may be numbers and paths if they are not from a shell."""
        return super().parse_known_args(None if args is None else [str(word) for word in args], namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and error, and exit with 2."""
        super().error(redact(message))


def flag(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    is_positional: bool = False,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Define a field of a dataclass of flags.

    Args:
        default: Value of a flag that is not given; without a default the flag is required.
        minimum: Smallest valid number.
        maximum: Largest valid number.
        is_positional: Whether it is an argument without a name.
        parse: Converts the text; by default the type of the field does.
    """
    metadata = {"minimum": minimum, "maximum": maximum, "is_positional": is_positional, "parse": parse}
    return dataclasses.field(default=default, metadata=metadata)


def read_flags(parser: ArgumentParser, kind: type[Flags], arguments: Sequence[str]) -> Flags:
    """Parse a command line into a dataclass.

    Each class that `kind` inherits from is a group of the help: the docstring has the title and the help of each flag,
    the types have the choices. A bool is a switch, a list takes several words, and `data_split` is `--data.split`.

    Raises:
        ConfigError: A number is out of range.
        SystemExit: `--help`, or with exit code 2 an invalid command line.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    remaining = dict(fields)
    for owner in (*kind.__mro__[1:-1], kind):
        about = parse_docstring(owner.__doc__ or "")
        helps = {entry.arg_name: " ".join((entry.description or "").split()) for entry in about.params}
        group = parser.add_argument_group((about.short_description or "").rstrip(".").lower())
        for name in owner.__annotations__:
            if (field := remaining.pop(name, None)) is None:
                continue
            text = helps[name].replace("%", "%%")
            if field.default not in (None, False, dataclasses.MISSING):
                text += " (default: %(default)s)"
            options = _argument_options(hints[name], field) | {"help": text}
            if field.metadata.get("is_positional"):
                group.add_argument(name, **options)
            else:
                spelling = f"--{name.replace('data_', 'data.', 1) if name.startswith('data_') else name}"
                is_required = field.default is dataclasses.MISSING
                default = None if is_required else field.default
                group.add_argument(spelling, dest=name, default=default, required=is_required, **options)
    found = vars(parser.parse_args(arguments))
    for name, field in fields.items():
        limits, value = field.metadata, found[name]
        if limits and isinstance(value, int | float) and not isinstance(value, bool):
            lowest, highest = limits["minimum"], limits["maximum"]
            if not (lowest <= value <= highest and abs(value) < math.inf):
                expected = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
                raise ConfigError(f"--{name} is {value}, but must be {expected}.")
    return kind(**{name: found[name] for name in fields})


def _argument_options(hint: Any, field: "dataclasses.Field[Any]") -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kind = next(part for part in parts if part is not type(None))
    is_list = any(typing.get_origin(part) in (list, tuple) for part in (*parts, hint))
    if (parse := field.metadata.get("parse")) is not None:
        return {"type": parse, "metavar": field.metadata.get("metavar") or ("LIST" if is_list else "N")}
    if kind is bool:
        return {"action": "store_true"}
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if is_list:
        return {"type": typing.get_args(kind)[0], "nargs": "+", "metavar": "FILE"}
    if field.metadata.get("is_positional"):
        return {"type": kind}
    last_word = field.name.rpartition("_")[2].upper()
    return {"type": kind, "metavar": {int: "N", float: "X", Path: "PATH"}.get(kind, last_word)}


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model.

    Args:
        folder: Folder of a run, a checkpoint or a pipeline, or a Hub repository. A run that is not finished stands for
            the EMA of its newest valid checkpoint.
        revision: Branch, tag or commit of a Hub repository.
        variant: Variant of the weights, such as fp16.
    """

    folder: str = flag(is_positional=True)
    revision: str | None = None
    variant: str | None = None


def _numbers(text: str) -> tuple[float, ...]:
    """Parse numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.strip("[]()").split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from None


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How images are sampled.

    Args:
        labels: Class names or numbers, separated by commas; by default all. Image i, counted by seed in `sample` and
            from 0 in `evaluate`, gets label i modulo their number. A name with a comma goes in double quotes. If the
            first name begins with a dash, write --labels=LIST.
        num_inference_steps: Sampling steps; by default as many as in training.
        scheduler: unipc, dpm++, ddim, ddpm, deis, heun, euler, euler_a, dpm2, dpm2_a, lms, pndm, sa, or the name of a
            class of diffusers; by default that of the model.
        eta: 0 samples with DDIM, 1 with DDPM; by default that of the scheduler.
        timestep_spacing: Spacing of the timesteps; by default that of the scheduler. optimized are those that
            `ddpm-hf timesteps` chose for the model.
        guidance_scale: Scale of classifier-free guidance, or of autoguidance with --guide; 1 disables guidance.
        guidance_rescale: Rescaling of guided predictions, 0 to 1 (Lin et al. 2024).
        guidance_interval: start,stop: the fractions of the steps between which guidance is on, from the noise (0) to
            the image (1) (Kynkäänniemi et al. 2024).
        guide: Folder or repository of a worse version of the model, such as an earlier checkpoint, from which guidance
            goes away instead of from the null label (Karras et al. 2024).
        variance: Reverse variance; analytic is the optimal one for the network (Bao et al. 2022), which
            `ddpm-hf evaluate --estimate_variance` estimates.
        batch_size: Images per forward pass on one device; smaller values need less memory.
        dtype: Precision of the network.
    """

    labels: str | None = None
    num_inference_steps: int | None = flag(None, minimum=1)
    scheduler: str | None = None
    eta: float | None = flag(None, minimum=0, maximum=1)
    timestep_spacing: Literal["leading", "trailing", "linspace", "quadratic", "optimized"] | None = None
    guidance_scale: float = flag(1.0, minimum=0)
    guidance_rescale: float = flag(0.0, minimum=0, maximum=1)
    guidance_interval: tuple[float, ...] = flag((0.0, 1.0), parse=_numbers)
    guide: str | None = None
    variance: Literal["trained", "analytic"] = "trained"
    batch_size: int = flag(16, minimum=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def checked_sampling(self: AnySamplingFlags) -> AnySamplingFlags:
        """Refuse contradictions, warn about flags without effect, and return flags with the class of --scheduler."""
        flags = self
        if self.scheduler is not None:
            scheduler, eta = scheduler_and_eta("--scheduler", self.scheduler, self.eta)
            flags = dataclasses.replace(self, scheduler=scheduler, eta=eta)
        if flags.scheduler not in (None, NATIVE_SCHEDULER) and self.variance == "analytic":
            raise ConfigError(f"--variance analytic needs {NATIVE_SCHEDULER}; remove --scheduler {self.scheduler}.")
        check_interval("--guidance_interval", self.guidance_interval)
        of_guidance: dict[str, Any] = {"guidance_rescale": 0.0, "guidance_interval": (0.0, 1.0), "guide": None}
        for name, default in of_guidance.items() if self.guidance_scale == 1 else ():
            if (value := getattr(self, name)) != default:
                numbers = value if isinstance(value, tuple) else (value,)
                shown = ",".join(one if isinstance(one, str) else f"{one:g}" for one in numbers)
                log_warning(f"--{name} {shown} has no effect with --guidance_scale 1; set --guidance_scale to use it.")
        return dataclasses.replace(flags, **of_guidance) if self.guidance_scale == 1 else flags

    def check_scheduler(self) -> None:
        """Refuse a scheduler that does not exist, or that has no eta if --eta is given. Imports torch."""
        from ddpm_hf.diffusion.scheduler import takes_eta
        from ddpm_hf.evaluation.generate import scheduler_class

        if self.scheduler is None:
            return
        if self.eta is not None and not takes_eta(scheduler_class(self.scheduler)):
            raise ConfigError(f"--eta is {self.eta}, but {self.scheduler} has no eta; remove one of them.")

    def load_guide(self, pipeline: "GaussianDiffusionPipeline") -> "GaussianDiffusionPipeline | None":
        """Load the guide of a pipeline, in its precision and on its device. Imports torch."""
        from ddpm_hf.cli.common import find_folder, load_pipeline

        if self.guide is None:
            return None
        try:
            found = find_folder(self.guide)
        except ConfigError as error:
            raise ConfigError(f"--guide {error}") from None
        guide = load_pipeline(self.guide, found, dtype=pipeline.unet.dtype)
        guide.to(pipeline.device)
        return guide

    def label_list(self, pipeline: "GaussianDiffusionPipeline") -> list[int] | None:
        """Return the numbers of the labels, all classes by default; None for an unconditional network."""
        from ddpm_hf.diffusion.pipeline import label_numbers

        if self.labels is None:
            return list(range(pipeline.num_classes)) or None
        class_names = pipeline.config.get("class_names") or {}
        names = set(class_names.values())
        words = [self.labels]
        if self.labels not in names:
            words = [word.strip() for word in next(csv.reader([self.labels], skipinitialspace=True), [])]
        if not words or not all(words):
            raise ConfigError(f"--labels is {self.labels!r}; give names or numbers separated by commas.")
        num_labels, has_null_label = pipeline.unet.config.num_class_embeds, bool(pipeline.config.get("has_null_label"))
        try:
            return label_numbers(words, len(words), num_labels, has_null_label, class_names)
        except ValueError as error:
            raise ConfigError(str(error).replace("class_labels", "--labels", 1)) from None


@dataclass(frozen=True, kw_only=True)
class CompilationFlags:
    """Speed of the network.

    Args:
        compile: Compile the network with torch.compile, which takes up to some minutes and pays off with many images.
        compile_mode: Mode of inductor; reduce-overhead and max-autotune use CUDA graphs.
        compile_backend: Name of a backend of torch.compile.
        channels_last: Convert the weights to the memory format channels_last; --compile does so on CUDA GPUs.
    """

    compile: bool = False
    compile_mode: CompileMode = "default"
    compile_backend: str = "inductor"
    channels_last: bool = False

    def check_compilation(self) -> None:
        """Warn about flags without effect."""
        defaults = {"compile_mode": "default", "compile_backend": "inductor"}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default and not self.compile:
                log_warning(f"--{name} {value} has no effect without --compile.")
        if self.compile and self.compile_backend != "inductor" and self.compile_mode != "default":
            log_warning(
                f"--compile_mode {self.compile_mode} has no effect with --compile_backend {self.compile_backend}."
            )

    def set_up_network(self, pipeline: "GaussianDiffusionPipeline") -> None:
        """Convert the network, and set up its compilation; refuse a backend that does not exist or lacks its compiler.

        Imports torch.
        """
        import torch

        if self.channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
        if self.compile:
            with _compilation_advice():
                pipeline.compile(self.compile_mode, self.compile_backend, self.channels_last or None)

    def compile_network(self, pipeline: "GaussianDiffusionPipeline", batch_size: int, call: dict[str, Any]) -> None:
        """Compile the network by sampling a batch in few steps; refuse a network that cannot be compiled.

        Args:
            pipeline: A pipeline of the network of `set_up_network`.
            batch_size: Images of a full batch; smaller batches will be padded.
            call: Arguments of the pipeline for a full batch.
        """
        from ddpm_hf.diffusion.compiled import compiled_call
        from ddpm_hf.diffusion.scheduler import default_num_inference_steps

        if (compiled := compiled_call(pipeline.unet)) is None:
            return
        compiled.batch_size = batch_size
        pipeline.set_progress_bar_config(disable=True)
        num_steps = default_num_inference_steps(pipeline.scheduler, 2)
        with _compilation_advice():
            pipeline(**call | {"batch_size": batch_size, "num_inference_steps": num_steps, "output_type": "uint8"})


@contextmanager
def _compilation_advice() -> Iterator[None]:
    from ddpm_hf.diffusion.compiled import CompileError

    try:
        yield
    except CompileError as error:
        raise ConfigError(f"--compile is given, but {error}; remove --compile.") from None
