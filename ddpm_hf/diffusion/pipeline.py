"""The pipeline: sampling from a trained network, and saving and loading it.

A folder written by `save_pretrained` loads in three ways: as a stock `DDPMPipeline` by `DiffusionPipeline`, as this
class from the copy of this file in the folder (`custom_pipeline=folder, trust_remote_code=True`), and as this class
where ddpm_hf is installed. See `docs/compatibility.md` of ddpm_hf.
"""

import copy
import difflib
import functools
import inspect
import operator
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel


def _forget_loaded_code() -> None:
    """Remove the modules of this package from sys.modules if diffusers executes this file from a saved folder.

    diffusers gives the code of every local folder the same package name. Without this, the files of the folder loaded
    before, perhaps of another version, would be used in place of the files of this folder.
    """
    if __package__.startswith("diffusers_modules."):
        for name in [name for name in sys.modules if name.rpartition(".")[0] == __package__]:
            del sys.modules[name]
        # A fresh package: the old one has its modules as attributes. It must exist, because a dot in the name of a
        # repository is a dot in the name of the package, for which Python would look for a parent.
        sys.modules[__package__] = ModuleType(__package__)
        sys.modules[__package__].__path__ = [str(Path(__file__).parent)]


_forget_loaded_code()

# From a local folder, diffusers copies only the files that are named here: import from every other file.
from .compiled import CompileMode, compile_network
from .editing import EditingMixin
from .gaussian import classifier_free_guidance
from .guidance import WHOLE_INTERVAL, Guide, check_interval, guided_steps, make_guide, warn, with_self_conditioning
from .images import OUTPUT_TYPES, ImageInput, check_size, check_value_range, from_images, image_size, to_images
from .latents import (
    Statistics,
    check_statistics,
    check_vae,
    decode,
    denormalize,
    downsampling_factor,
    encode_moments,
    image_channels,
    latent_channels,
    load_vae,
    normalize,
    statistics,
)
from .saved_folder import (
    PORTABLE_FILES,
    check_parts,
    check_shards,
    clean_network_config,
    find_file,
    find_second_moments,
    without_list_form,
    write_code,
    write_index,
)
from .schedule import descending_timesteps, is_bool, positive_number, real_number, whole_number
from .scheduler import (
    CHOICES,
    DEFAULT_STEPS,
    DISTILLED_GUIDANCE,
    NATIVE_SCHEDULER,
    GaussianDiffusionScheduler,
    splits_variance,
    takes_eta,
)

# The code of ddpm_hf 0.1 refuses to run beside loaded modules of another version.
_forget_loaded_code()

CALLBACK_TENSORS = ["sample", "model_output", "pred_original_sample"]

_BEGIN_OR_END = threading.Lock()
"""Held while a call begins or ends, so that none begins while an offloaded network leaves the device."""

Generators = torch.Generator | list[torch.Generator] | None
ClassLabels = int | str | Iterable[int | str] | torch.Tensor
Method = TypeVar("Method", bound=Callable[..., Any])

_SOLVERS_WITHOUT_LISTS = ("UniPCMultistepScheduler", "DEISMultistepScheduler")
_ORDER_OF_DDPM_PIPELINE = ("batch_size", "generator", "num_inference_steps", "output_type", "return_dict")
_OTHER_NAMES = {
    "latents": "sample",
    "noise": "sample",
    "num_images": "batch_size",
    "num_images_per_prompt": "batch_size",
    "num_steps": "num_inference_steps",
    "seed": "generator",
    "steps": "num_inference_steps",
}


class UnexpectedArgumentError(TypeError, ValueError):
    """A keyword argument that does not exist: a TypeError as in Python, and a ValueError as any wrong argument."""


def takes_order_of_ddpm_pipeline(method: Method) -> Method:
    """Let a call take positional arguments in the order of DDPMPipeline, too, and name arguments that do not exist.

    The order is told by the second argument, which is a generator there and a number here.
    """
    names = inspect.signature(method).parameters.keys() - {"self"}

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        check_names("the pipeline", options, names)
        second, third = (*args[1:3], None, None)[:2]
        generators = second if isinstance(second, list) else [second]
        has_generator = any(isinstance(one, torch.Generator) for one in generators)
        if has_generator or (second is None and isinstance(third, int | float | np.number)):
            if len(args) > len(_ORDER_OF_DDPM_PIPELINE):
                raise UnexpectedArgumentError(
                    f"There are {len(args)} positional arguments, but DDPMPipeline has {len(_ORDER_OF_DDPM_PIPELINE)}:"
                    f" {', '.join(_ORDER_OF_DDPM_PIPELINE)}; pass the others by name."
                )
            return method(self, **dict(zip(_ORDER_OF_DDPM_PIPELINE, args, strict=False)), **options)
        return method(self, *args, **options)

    return call  # type: ignore[return-value]


@dataclass
class GaussianDiffusionPipelineOutput(BaseOutput):
    """Output of the pipeline.

    Attributes:
        images: As specified by `output_type`.
        trajectory: With `return_trajectory`, every state from the first to the last, mapped to [0, 1] or the value
            range like images, and decoded first by a VAE: float32 on the CPU, (steps + 1, batch, channels, height,
            width). With `output_type="latent"` the states themselves.
    """

    images: Any
    trajectory: torch.Tensor | None = None


@dataclass(eq=False)
class SamplingCall:
    """Arguments and state of one call, passed from step to step. Calls in several threads share no state.

    Attributes:
        scheduler: Copy of the pipeline's scheduler with the timesteps of this call.
        batch_size: Number of images.
        generator: Source of all noise, or one for each image.
        device: Device of the samples.
        dtype: Dtype of the samples: float32, or float64 for a float64 network.
        network_dtype: Dtype of the network's inputs, for which diffusers searches the modules each time.
        labels: (batch,), or with classifier-free guidance (2 batch,) with the null label in the second half; None if
            unconditional.
        options: The other arguments of the call.
        guide: The guide of autoguidance; None without it.
        guided: For each of the timesteps, whether it is guided; empty without guidance.
        step_kwargs: Further arguments of `scheduler.step`.
        keeps_variance: Whether `scheduler.step` needs the variance channels of the network.
        pred_original_sample: The predicted x_0 of the last step, if the scheduler returns it.
        num_steps_done: Number of finished steps.
        states: The trajectory so far.
        interrupt: Whether to stop after this step.
        thread: Identifier of the thread that runs the call.
    """

    scheduler: Any
    batch_size: int
    generator: Generators
    device: torch.device
    dtype: torch.dtype
    network_dtype: torch.dtype
    labels: torch.Tensor | None
    options: SimpleNamespace
    guide: Guide | None
    guided: list[bool]
    step_kwargs: dict[str, Any]
    keeps_variance: bool
    pred_original_sample: torch.Tensor | None = None
    num_steps_done: int = 0
    states: list[torch.Tensor] | None = None
    interrupt: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @property
    def timesteps(self) -> torch.Tensor:
        """The timesteps of the scheduler."""
        timesteps: torch.Tensor = self.scheduler.timesteps
        return timesteps

    def is_guided(self, t: torch.Tensor) -> bool:
        """Return whether an element of `timesteps` is guided, without reading it from the device."""
        timesteps = self.timesteps
        return (
            bool(self.guided) and self.guided[(t.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)]
        )


class GaussianDiffusionPipeline(EditingMixin, DiffusionPipeline):
    """Generates images with a UNet2DModel and any DDPM scheduler of diffusers.

    Args:
        unet: The network: C channels in (2C if self-conditioned), C or, with a learned variance, 2C out.
        scheduler: A GaussianDiffusionScheduler. A DDPMScheduler is converted; others are used as they are.
        class_names: Names of the labels, {"0": "airplane", ...}; labels may then be given by name.
        has_null_label: Whether the last of `num_class_embeds` means "no class", as guidance needs.
        self_conditioned: Whether the network takes the last predicted x_0 as channels C ... 2C of its input (Chen et
            al. 2022), zeros in the first step.
        value_range: The values of the training data, [low, high], that -1 and 1 stand for; None for pictures.
        optimized_timesteps: Timesteps chosen for the network, which `timestep_spacing="optimized"` uses: descending
            lists by number of steps, by the name of the sampler that `sampler_name` returns.
        vae: The AutoencoderKL, AutoencoderTiny or VQModel whose latents the network generates; None if it generates
            pixels.
        latents_mean: Means of the latents per channel: the network generates (z - latents_mean) / latents_std. By
            default z is normalized as the configuration of the VAE says.
        latents_std: Standard deviations of the latents per channel.

    Raises:
        ValueError: If the parts do not fit each other, the value range is not two increasing numbers, or optimized
            timesteps are not descending timesteps of the scheduler.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS
    _portable_code: ClassVar[dict[str, str]] = {
        name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in PORTABLE_FILES
    }

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        class_names: dict[str, str] | None = None,
        has_null_label: bool = False,
        self_conditioned: bool = False,
        value_range: list[float] | None = None,
        optimized_timesteps: dict[str, dict[str, list[int]]] | None = None,
        vae: ModelMixin | None = None,
        latents_mean: Iterable[float] | None = None,
        latents_std: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        self._calls: list[SamplingCall] = []  # those that are running
        self._was_interrupted = False
        if type(scheduler) is DDPMScheduler:
            scheduler = GaussianDiffusionScheduler.from_config(scheduler.config)
        unet = bare_network(unet)
        if not hasattr(unet, "config"):
            raise ValueError(f"unet is a {type(unet).__name__}; it must be a UNet2DModel.")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        means, stds = check_statistics(latents_mean, latents_std)
        extras = {
            "class_names": class_names,
            "has_null_label": has_null_label,
            "self_conditioned": self_conditioned,
            "value_range": check_value_range(value_range),
            "optimized_timesteps": check_optimized(optimized_timesteps, int(scheduler.config["num_train_timesteps"])),
            "latents_mean": means,
            "latents_std": stds,
        }
        self.register_to_config(**{name: value for name, value in extras.items() if value})

        config = unet.config
        if self_conditioned and config.in_channels % 2:
            raise ValueError(f"A self-conditioned unet needs an even number of in_channels, not {config.in_channels}.")
        channels = self.sample_channels
        if config.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"unet has {config.out_channels} out_channels for {'images' if vae is None else 'latents'} of"
                f" {channels} channels; it needs as many, or twice as many with a learned variance. A network that"
                " takes its last prediction as input needs self_conditioned=True."
            )
        self.check_vae()
        if has_null_label and config.num_class_embeds is None:
            raise ValueError("has_null_label is true, but unet has no num_class_embeds.")
        if class_names and set(class_names) != set(map(str, range(self.num_classes))):
            raise ValueError(
                f"class_names must name each of the network's {self.num_classes} classes, by keys that are strings:"
                ' {"0": ..., "1": ...}.'
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A network in DataParallel or DistributedDataParallel is taken out of it."""
        super().__setattr__(name, bare_network(value) if name == "unet" else value)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample, which the network denoises: of an image, or of its latents."""
        return int(self.unet.config.in_channels) // (2 if self.config.get("self_conditioned") else 1)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of a sample."""
        return (self.sample_channels, *image_size(self.unet))

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return self.sample_channels if self.vae is None else image_channels(self.vae)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of an image."""
        factor = 1 if self.vae is None else downsampling_factor(self.vae)
        height, width = image_size(self.unet)
        return self.num_channels, factor * height, factor * width

    @property
    def num_classes(self) -> int:
        """Number of classes without the null label; 0 for an unconditional network."""
        return int(self.unet.config.num_class_embeds or 0) - bool(self.config.get("has_null_label"))

    @property
    def size_divisor(self) -> int:
        """Height and width of a sample must be multiples of it, because the network halves them repeatedly."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def interrupt(self) -> bool:
        """Whether to stop after this step; each call begins with False.

        A callback stops its own call. Set in a thread that runs no call, it stops all that are running.
        """
        own = self._calls_of_this_thread()
        return own[-1].interrupt if own else self._was_interrupted

    @interrupt.setter
    def interrupt(self, interrupt: bool) -> None:
        self._was_interrupted = bool(interrupt)
        for call in self._calls_of_this_thread()[-1:] or tuple(self._calls):
            call.interrupt = bool(interrupt)

    _interrupt = interrupt  # the name in the pipelines of diffusers

    def _calls_of_this_thread(self) -> list[SamplingCall]:
        """Return the running calls of this thread: several if a callback calls the pipeline."""
        return [call for call in tuple(self._calls) if call.thread == threading.get_ident()]

    # Compilation

    def compile(
        self, mode: CompileMode = "default", backend: str = "inductor", channels_last: bool | None = None
    ) -> None:
        """Compile the network in place with torch.compile; a second call with the same arguments changes nothing.

        The first image of each batch size then waits for the compiler, for up to some minutes. The same seeds give the
        same images in every run, and other images than without compilation by rounding only.

        Args:
            mode: `default`; `reduce-overhead`, which replays CUDA graphs and helps where a GPU waits for Python;
                `max-autotune`; `max-autotune-no-cudagraphs`.
            backend: Name of a backend of torch.compile; others than inductor ignore `mode`.
            channels_last: Whether to convert the weights to the memory format channels_last; by default on a CUDA GPU.

        Raises:
            ValueError: If the backend does not exist, or needs a compiler that this machine does not have. A network
                that cannot be compiled raises one in the first call.
        """
        if self.unet.device.type == "cuda" if channels_last is None else channels_last:
            self.unet.to(memory_format=torch.channels_last)
        compile_network(self.unet, mode=mode, backend=backend)

    # Sampling

    @takes_order_of_ddpm_pipeline
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eta: float | None = None,
        sample: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        timestep_spacing: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("sample",),
        return_trajectory: bool = False,
        guidance_interval: tuple[float, float] = WHOLE_INTERVAL,
        guide: Any = None,
    ) -> Any:
        """Generate images. Samples are float32 whatever the dtype of the weights (float64 for float64).

        Positional arguments may also have the order of DDPMPipeline: batch_size, generator, num_inference_steps,
        output_type, return_dict. Numbers may be of any type, also of numpy.

        Args:
            batch_size: Number of images; by default the number of class labels, generators or start samples, or 1.
            num_inference_steps: Number of denoising steps; by default the number of training timesteps, or that of a
                distilled model.
            generator: Source of all noise. With a list of `batch_size` generators, each image depends on its own only.
            class_labels: One label for all images or one for each: names from `class_names`, or numbers. A number that
                is the name of a class means that class.
            guidance_scale: Scale of classifier-free guidance, or of autoguidance by `guide`; 1 turns it off.
            guidance_rescale: Factor phi of the rescaling of guidance, 0 ... 1. Section 3.4, Lin et al. 2024.
            eta: 0 (deterministic) to 1 (ancestral); by default the scheduler's own default.
            sample: Start noise (batch, channels, height, width), a standard normal tensor of floating-point numbers; by
                default drawn from `generator`. With a VAE, noise of the shape of latents.
            timesteps: A custom descending list instead of `num_inference_steps`.
            timestep_spacing: Overrides the scheduler's spacing; may also be `quadratic`, or `optimized` for the list
                that `ddpm-hf timesteps` stored for the sampler; eta and the number of steps are then by default those
                of the list, if there is only one.
            output_type: `pil`; `np`: float32 (batch, height, width, channels) in [0, 1], or in the value range of the
                model if it has one; `uint8`: the same in 0 ... 255; `pt`: as `np`, (batch, channels, height, width);
                `latent`: the samples as the network generates them, neither decoded nor clipped.
            return_dict: Return an output object instead of a tuple.
            callback_on_step_end: `callback(pipeline, step, timestep, tensors)`. It may return {"sample": ...} to
                replace the sample by one of the same shape, dtype and device, and set `pipeline.interrupt = True` to
                stop and return the current sample.
            callback_on_step_end_tensor_inputs: The tensors passed to it: `sample`, `model_output`,
                `pred_original_sample` (x_0).
            return_trajectory: Also return every state from x_T to x_0.
            guidance_interval: (start, stop), the fractions of the steps between which guidance is on, 0 at the noise
                and 1 at the image, as `start` and `stop` of the guiders of diffusers. Other steps evaluate only the
                conditional network. Kynkäänniemi et al. 2024.
            guide: A worse version of the model, which takes the place of the null label in guidance: a pipeline, or the
                folder or repository of one, which is loaded in each call. Karras et al. 2024.

        Raises:
            ValueError: If an argument does not fit the model, the scheduler or another argument, before the network is
                called; or if the callback returns anything else.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "batch_size", "sample")}
        with self._begin(number_of_images(batch_size, class_labels, generator, sample), options) as call:
            x_t = self._start_noise(call, sample) * call.scheduler.init_noise_sigma
            return self._result(call, self._denoise(call, x_t, call.timesteps))

    def check_inputs(self, batch_size: int = 1, **options: Any) -> int:
        """Check the arguments of a call without sampling, and set the timesteps of the scheduler as a call does.

        Args:
            batch_size: Number of images.
            **options: Arguments of the call, except for `sample`.

        Returns:
            The number of denoising steps.

        Raises:
            ValueError: If an argument does not fit the model, the scheduler or another argument.
        """
        return len(self._prepare(self.scheduler, batch_size, options, "check_inputs").timesteps)

    @contextmanager
    def _begin(self, batch_size: int, options: dict[str, Any], method: str = "__call__") -> Iterator[SamplingCall]:
        """Check the options of a call, and count it as running until the end of the context."""
        scheduler = self.scheduler
        call = self._prepare(scheduler, batch_size, options, method)
        state = dict(vars(call.scheduler))
        with _BEGIN_OR_END:
            self._calls.append(call)
        self._was_interrupted = False
        try:
            yield call
        finally:
            show_changes(call.scheduler, state, scheduler)
            with _BEGIN_OR_END:
                self._calls.remove(call)
                if not self._calls:
                    self.maybe_free_model_hooks()

    def _prepare(self, shared: Any, batch_size: int, options: dict[str, Any], method: str) -> SamplingCall:
        """Check the options of a call, whose defaults are those of `__call__`, and set the timesteps of a scheduler."""
        parameters = inspect.signature(GaussianDiffusionPipeline.__call__).parameters
        defaults = {name: parameters[name].default for name in parameters.keys() - {"self", "batch_size", "sample"}}
        own = [name for name in inspect.signature(getattr(self, method)).parameters if name != "options"]
        check_names(method, options, defaults, own)
        given = SimpleNamespace(**defaults | options)
        scheduler = copy_scheduler(shared)
        check_process(scheduler)
        device = self._execution_device

        batch_size = positive_number("batch_size", batch_size)
        check_generator(given.generator, batch_size, device)
        given.output_type = "np" if given.output_type == "numpy" else given.output_type  # as in stock pipelines
        if given.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {given.output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if given.output_type == "pil" and self.num_channels not in (1, 3, 4):
            raise ValueError(
                f"output_type pil cannot show images of {self.num_channels} channels; use np, pt or uint8."
            )
        for name in ("return_dict", "return_trajectory"):
            if not isinstance(getattr(given, name), bool | np.bool_):
                raise ValueError(f"{name} is {getattr(given, name)!r}; it must be True or False.")
        check_callback(given.callback_on_step_end)
        given.callback_on_step_end_tensor_inputs = tensor_inputs(given.callback_on_step_end_tensor_inputs)

        # Labels and guidance
        has_null_label = bool(self.config.get("has_null_label"))
        num_labels, class_names = self.unet.config.num_class_embeds, self.config.get("class_names")
        labels = label_numbers(given.class_labels, batch_size, num_labels, has_null_label, class_names)
        given.guidance_rescale = real_number("guidance_rescale", given.guidance_rescale, 0, 1)
        given.guidance_scale = real_number("guidance_scale", given.guidance_scale)
        given.guidance_interval = check_interval(given.guidance_interval)
        guide = None if given.guide is None else self._make_guide(given.guide, labels)
        is_guided = given.guidance_scale != 1.0
        if is_guided and guide is None:
            if distilled := scheduler.config.get(DISTILLED_GUIDANCE):
                raise ValueError(
                    f"guidance_scale is {given.guidance_scale}, but guidance of scale {distilled} is part of this"
                    " distilled model; leave it out."
                )
            if labels is None or not has_null_label:
                raise ValueError(
                    f"guidance_scale is {given.guidance_scale}, but the model has no null label to guide against; use"
                    " 1.0, a guide, or a model trained with label dropout, whose pipeline has has_null_label=True."
                )
            labels = labels + [self.num_classes] * batch_size
        if not is_guided and (guide is not None or given.guidance_interval != WHOLE_INTERVAL):
            name = "guidance_interval" if guide is None else "guide"
            warn(f"{name} has no effect with guidance_scale 1; set guidance_scale, for example to 2.")

        # Arguments of the scheduler, of which others than GaussianDiffusionScheduler have fewer
        accepted = inspect.signature(scheduler.step).parameters
        step_kwargs: dict[str, Any] = {"generator": given.generator} if "generator" in accepted else {}
        run_parameters = inspect.signature(scheduler.set_timesteps).parameters
        names = ["num_inference_steps", "timesteps", "timestep_spacing"]
        if given.timestep_spacing == "optimized":
            if given.timesteps is not None:
                raise ValueError("timestep_spacing does not apply to a custom list of timesteps; drop one of the two.")
            lists = self.config.get("optimized_timesteps") or {}
            given.eta, given.timesteps = find_optimized(lists, scheduler, given.num_inference_steps, given.eta)
            given.num_inference_steps = given.timestep_spacing = None
        if given.eta is not None:
            given.eta = real_number("eta", given.eta, 0, 1)
            if not takes_eta(scheduler):
                raise ValueError(f"eta is {given.eta}, but {type(scheduler).__name__} has no eta; leave it out.")
            if "eta" in run_parameters:
                names.append("eta")
            else:
                step_kwargs["eta"] = given.eta
        num_train_timesteps = int(scheduler.config["num_train_timesteps"])
        if given.timesteps is not None:
            if given.num_inference_steps is not None:
                raise ValueError("Pass either num_inference_steps or timesteps, not both.")
            given.timesteps = descending_timesteps(given.timesteps, num_train_timesteps)
        else:
            learned = scheduler.config.get(DEFAULT_STEPS)
            if given.num_inference_steps is None:
                given.num_inference_steps = num_train_timesteps if learned is None else learned
            given.num_inference_steps = whole_number("num_inference_steps", given.num_inference_steps)
            if not 1 <= given.num_inference_steps <= num_train_timesteps:
                raise ValueError(
                    f"num_inference_steps {given.num_inference_steps} is not between 1 and {num_train_timesteps}."
                )
            if learned not in (None, given.num_inference_steps):
                warn(
                    f"num_inference_steps is {given.num_inference_steps}, but this distilled model has learned"
                    f" {learned} steps only; leave it out."
                )
        timesteps = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
        set_timesteps = scheduler.set_timesteps
        if "timesteps" in timesteps and type(scheduler).__name__ in _SOLVERS_WITHOUT_LISTS:
            set_timesteps = functools.partial(set_solver_timesteps, scheduler)
        elif unknown := timesteps.keys() - run_parameters.keys():
            raise ValueError(
                f"{type(scheduler).__name__} takes no {' and no '.join(sorted(unknown))}; leave it out, or use"
                " GaussianDiffusionScheduler.from_config(pipe.scheduler.config)."
            )
        try:
            set_timesteps(device=device, **timesteps)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if type(scheduler).__name__ == NATIVE_SCHEDULER:
                raise
            given_as = ", ".join(f"{name} {value}" for name, value in timesteps.items())
            raise ValueError(f"{type(scheduler).__name__} cannot run {given_as} ({error}); change it.") from error
        if self.unet.config.get("time_embedding_type") == "learned" and scheduler.timesteps.is_floating_point():
            raise ValueError(
                f"{type(scheduler).__name__} samples at timesteps between those of training, for which a unet with a"
                " learned time embedding has no values; use GaussianDiffusionScheduler, DDIMScheduler or"
                " DPMSolverMultistepScheduler."
            )
        keeps_variance = splits_variance(scheduler)
        shows_x_0 = given.callback_on_step_end and "pred_original_sample" in given.callback_on_step_end_tensor_inputs
        num_outputs = self.sample_channels * (2 if keeps_variance else 1)
        if (shows_x_0 or self.config.get("self_conditioned")) and not returns_x_0(
            scheduler,
            torch.zeros(1, num_outputs, 1, 1, device=device),
            torch.zeros(1, self.sample_channels, 1, 1, device=device),
        ):
            user = "the callback" if shows_x_0 else "a self-conditioned unet"
            raise ValueError(
                f"{type(scheduler).__name__} does not return pred_original_sample, which {user} needs; use"
                " GaussianDiffusionScheduler or DDIMScheduler."
            )
        show_changes(scheduler, vars(shared), shared)
        network_dtype: torch.dtype = self.unet.dtype
        return SamplingCall(
            scheduler=scheduler,
            batch_size=batch_size,
            generator=given.generator,
            device=device,
            dtype=torch.promote_types(torch.float32, network_dtype),
            network_dtype=network_dtype,
            labels=None if labels is None else torch.tensor(labels, device=device),
            options=given,
            guide=guide,
            guided=guided_steps(given.guidance_interval, scheduler.timesteps) if is_guided else [],
            step_kwargs=step_kwargs,
            keeps_variance=keeps_variance,
            states=[] if given.return_trajectory else None,
        )

    def _make_guide(self, guide: Any, labels: list[int] | None) -> Guide:
        """Return the guide of a call, given a pipeline or its folder."""
        if isinstance(guide, str | PathLike):
            try:
                loaded = GaussianDiffusionPipeline.from_pretrained(guide, dtype=self.unet.dtype)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"guide {guide} cannot be loaded ({error}); pass a pipeline, or the folder of one."
                ) from error
            guide = loaded.to(self._execution_device)
        made = make_guide(self, guide, labels)
        if __package__ == "ddpm_hf.diffusion":
            import_module("ddpm_hf.models").check_same_data(self, guide)
        return made

    def _start_noise(self, call: SamplingCall, sample: torch.Tensor | None) -> torch.Tensor:
        """Check or draw standard normal noise of the shape of the samples."""
        if sample is None:
            return self._draw_noise(call, (call.batch_size, *self.sample_shape))
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            kind = f"a tensor of {sample.dtype}" if isinstance(sample, torch.Tensor) else f"a {type(sample).__name__}"
            raise ValueError(f"sample is {kind}; it must be a tensor of floating-point numbers.")
        if sample.ndim != 4 or sample.shape[:2] != (call.batch_size, self.sample_channels):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; it must be ({call.batch_size}, {self.sample_channels},"
                " height, width), according to batch_size and the network."
            )
        check_size(sample.shape[2], sample.shape[3], self.size_divisor, "sample")
        sample = sample.to(call.device, call.dtype)
        if not sample.isfinite().all():
            raise ValueError("sample has values that are not finite; pass standard normal noise.")
        return sample

    def _draw_noise(self, call: SamplingCall, shape: tuple[int, ...]) -> torch.Tensor:
        noise: torch.Tensor = randn_tensor(shape, generator=call.generator, device=call.device, dtype=call.dtype)
        return noise

    def _denoise(self, call: SamplingCall, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Run the reverse process over timesteps of the scheduler, until the end or an interruption."""
        self._record(call, sample)
        for t in self.progress_bar(timesteps):
            if call.interrupt:
                break
            prev_sample, model_output = self._step(call, sample, t)
            sample = self._end_step(call, prev_sample, t, model_output)
        return sample

    def _step(self, call: SamplingCall, sample: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the previous sample and the model output."""
        model_output = self._predict(call, sample, t)
        result = call.scheduler.step(model_output, t, sample, **call.step_kwargs)
        call.pred_original_sample = result.get("pred_original_sample")
        return result.prev_sample, model_output

    def _predict(self, call: SamplingCall, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Evaluate the network, with guidance if it is on. Keep variance channels if the scheduler uses them."""
        state = call.scheduler.scale_model_input(sample, t)
        x_0 = call.pred_original_sample
        is_guided = call.is_guided(t)
        has_null_half = is_guided and call.guide is None
        labels = call.labels if call.labels is None or has_null_half else call.labels[: call.batch_size]
        x = with_self_conditioning(state, x_0) if self.config.get("self_conditioned") else state
        if has_null_half:
            x = torch.cat([x, x])
        output: torch.Tensor = self.unet(x.to(call.network_dtype), t, class_labels=labels, return_dict=False)[0]
        prediction, variance = output.to(sample.dtype), None
        if prediction.shape[1] == 2 * sample.shape[1]:
            prediction, variance = prediction.chunk(2, dim=1)
        if is_guided:
            if call.guide is None:
                prediction, other = prediction.chunk(2)
            else:
                other = call.guide.predict(state, x_0, t)
            prediction = classifier_free_guidance(
                prediction, other, call.options.guidance_scale, call.options.guidance_rescale
            )
        if variance is not None and call.keeps_variance:
            return torch.cat([prediction, variance[: len(prediction)]], dim=1)
        return prediction

    def _end_step(
        self, call: SamplingCall, sample: torch.Tensor, t: torch.Tensor, model_output: torch.Tensor
    ) -> torch.Tensor:
        """Call the callback and record the sample; return the sample of the next step."""
        if call.options.callback_on_step_end is not None:
            tensors = {
                "sample": sample,
                "model_output": model_output,
                "pred_original_sample": call.pred_original_sample,
            }
            shown = {name: tensors[name] for name in call.options.callback_on_step_end_tensor_inputs}
            changes = call.options.callback_on_step_end(self, call.num_steps_done, t, shown)
            sample = changed_sample(changes, tensors)
        call.num_steps_done += 1
        self._record(call, sample)
        return sample

    def _record(self, call: SamplingCall, sample: torch.Tensor) -> None:
        if call.states is not None:
            call.states.append(sample.cpu())

    def _result(
        self, call: SamplingCall, sample: torch.Tensor, known: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Any:
        """Return the images, and the trajectory if requested.

        Args:
            call: The call.
            sample: Its last state.
            known: Images in [-1, 1], and where they are to be replaced by those of the call.
        """
        output_type, value_range = call.options.output_type, self.config.get("value_range")
        states = None if call.states is None else torch.stack(call.states)
        if output_type == "latent":
            output = GaussianDiffusionPipelineOutput(images=sample, trajectory=states)
        else:
            pixels = self.decode_latents(sample)
            if known is not None:
                given, is_new = (value.to(pixels.device) for value in known)
                pixels = torch.where(is_new, pixels, given.to(pixels.dtype))
            if states is not None:
                states = torch.stack([self.decode_latents(state).cpu() for state in states])
                states = to_images(states, "pt", value_range)
            images = to_images(pixels, output_type, value_range)
            output = GaussianDiffusionPipelineOutput(images=images, trajectory=states)
        return output if call.options.return_dict else output.to_tuple()

    def _to_pixels(self, image: ImageInput, name: str) -> torch.Tensor:
        """Convert images to pixels on the CPU, (batch, channels, height, width) in [-1, 1]."""
        divisor = self.size_divisor * (1 if self.vae is None else downsampling_factor(self.vae))
        return from_images(image, self.num_channels, divisor, name, self.config.get("value_range"))

    # The VAE

    def check_vae(self) -> None:
        """Raise a ValueError if the VAE, where there is one, does not decode what the network generates."""
        if self.vae is None:
            return
        check_vae(self.vae)
        if latent_channels(self.vae) != self.sample_channels:
            raise ValueError(
                f"vae has latents of {latent_channels(self.vae)} channels, but unet generates {self.sample_channels};"
                " pass the VAE that the network was trained with."
            )
        _ = self.latent_statistics  # raises for another number of channels

    @property
    def latent_statistics(self) -> Statistics:
        """Mean and standard deviation of the latents of the VAE, which are 0 and 1 in a sample."""
        return statistics(self.vae, self.config.get("latents_mean"), self.config.get("latents_std"))

    def encode_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the samples of images, without noise; without a VAE the images themselves.

        Args:
            pixels: (batch, channels, height, width) in [-1, 1].

        Returns:
            The normalized means of the latents, float32 (batch, channels, height, width).
        """
        if self.vae is None:
            return pixels
        return normalize(encode_moments(self.vae, pixels.to(self._execution_device))[0], self.latent_statistics)

    def decode_latents(self, sample: torch.Tensor) -> torch.Tensor:
        """Return the images of samples; without a VAE the samples themselves.

        Args:
            sample: (batch, channels, height, width), also of a step.

        Returns:
            (batch, channels, height, width) in [-1, 1], not clipped.
        """
        if self.vae is None:
            return sample
        return decode(self.vae, denormalize(sample.to(self._execution_device), self.latent_statistics))

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline; see `DiffusionPipeline`, which would leave out a network that it does not know.

        Raises:
            ValueError: If the network is none of diffusers.
        """
        network = getattr(self.unet, "_orig_mod", self.unet)
        if not isinstance(network, ModelMixin):
            raise ValueError(
                f"unet is a {type(network).__name__}, which diffusers cannot save; assign the UNet2DModel inside it,"
                " for a PeftModel pipe.unet = pipe.unet.merge_and_unload()."
            )
        super().save_pretrained(
            save_directory, safe_serialization, variant, max_shard_size, push_to_hub=push_to_hub, **kwargs
        )

    def save_config(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write code and index. `save_pretrained` calls this after saving the components and before an upload."""
        write_code(Path(save_directory), self._portable_code)
        clean_network_config(Path(save_directory))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | PathLike[str]) -> None:
        """Write the index."""
        write_index(Path(json_file_path), self)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike[str]) -> dict[str, Any]:
        """Read the index. An index that asks for the code in the folder is read as one of this class."""
        content: dict[str, Any] = super()._dict_from_json_file(json_file)
        check_parts(content)
        return without_list_form(content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load a folder or repository of this class, of a stock DDPMPipeline or LDMPipeline; see `DiffusionPipeline`.

        Where ddpm_hf is installed, the folder may also be that of a run, which stands for its pipeline, or, with a
        warning, for the EMA of its newest valid checkpoint if the run is not finished; a checkpoint, which stands for
        its EMA; or one network of a checkpoint.

        Args:
            pretrained_model_name_or_path: The folder or repository.
            **kwargs: Those of `DiffusionPipeline`, and `subfolder`, a path in a local folder.

        Raises:
            ValueError: If the weights exist only as pickles and `use_safetensors=False` was not given, a part is of a
                module that is not loaded, or a folder holds no model.
        """
        name, folder = pretrained_model_name_or_path, Path(pretrained_model_name_or_path).expanduser()
        if (subfolder := kwargs.pop("subfolder", None)) is not None:
            if not folder.is_dir():
                raise ValueError(
                    f"subfolder is {subfolder!r}, but {name} is not a local folder; download it with"
                    " huggingface_hub.snapshot_download, and pass the path of the subfolder."
                )
            name = folder = folder / subfolder
        is_local = bool(str(name)) and folder.exists()  # the path of an empty name is the working directory
        is_pipeline = (folder / "model_index.json").is_file() or not (is_local or str(name).count("/") > 1)
        if is_pipeline or __package__ != "ddpm_hf.diffusion":
            return cls._load(folder if is_local else name, **kwargs)
        # Not an import statement: diffusers would require its module wherever it runs the code of a saved folder.
        models = import_module("ddpm_hf.models")
        return models.load_model(models.find_model(folder), lambda found: cls._load(found, **kwargs))

    @classmethod
    def _load(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load a folder with a model index, or a repository."""
        if kwargs.get("use_safetensors", True) and Path(pretrained_model_name_or_path).is_dir():
            check_shards(Path(pretrained_model_name_or_path))
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True} | kwargs)
        except OSError as error:
            if "use_safetensors" in kwargs or not re.search(
                "no file named .*safetensors|necessary `safetensors`", str(error)
            ):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights in the safetensors format under the usual name. If it"
                " has those of a variant, pass its name, such as variant='fp16'. If you trust it, pass"
                " use_safetensors=False to read its pickled .bin weights, and save the pipeline again."
            ) from error
        pipeline = loaded[0] if isinstance(loaded, tuple) else loaded
        if "vae" not in kwargs and (file := find_file(pretrained_model_name_or_path, "vqvae/config.json", kwargs)):
            is_safe = kwargs.get("use_safetensors", True)
            pipeline.register_modules(vae=load_vae(file.parent, pipeline.unet.dtype, use_safetensors=is_safe))
            pipeline.check_vae()
        file = find_second_moments(pretrained_model_name_or_path, kwargs)
        if file is not None and isinstance(pipeline.scheduler, GaussianDiffusionScheduler):
            pipeline.scheduler.load_second_moments(file)
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> Any:
        """Download a repository; see `DiffusionPipeline`. `from_pretrained` calls this.

        Raises:
            ValueError: If it names pickles as parts of weights that are requested as safetensors.
        """
        folder = super().download(pretrained_model_name, **kwargs)
        if kwargs.get("use_safetensors"):
            check_shards(Path(folder))
        return folder


def bare_network(network: Any) -> Any:
    """Return the network inside DataParallel or DistributedDataParallel; any other as it is."""
    inside = getattr(network, "_orig_mod", network)  # torch.compile around them
    return inside.module if isinstance(inside, DataParallel | DistributedDataParallel) else network


def check_process(scheduler: Any) -> None:
    """Raise a ValueError if a scheduler of diffusers does not run the process that the network was trained on.

    EDM, flow matching, consistency models, score SDEs and inverse schedulers have other noise levels or other steps,
    and would silently produce wrong images.
    """
    name = type(scheduler).__name__
    remedy = "use the scheduler that the network was trained with, or a pipeline made for this one."
    if "DDPMScheduler" not in getattr(scheduler, "_compatibles", ()):
        raise ValueError(f"{name} does not run a denoising diffusion process (DDPM); {remedy}")
    alpha_bar = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    expected = torch.cumprod(1 - torch.as_tensor(scheduler.betas).double().cpu(), dim=0)
    if (alpha_bar - expected).abs().max() > 1e-3:  # float32 sums, and the 2^-24 that some put where it is 0
        raise ValueError(f"{name} changes the noise levels of its betas; {remedy}")
    if scheduler.timesteps is not None and scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(f"{name} goes from data to noise; {remedy}")
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in CHOICES["prediction_type"]:
        names = ", ".join(map(str, CHOICES["prediction_type"]))
        raise ValueError(f"{name} has prediction_type {prediction_type!r}, which is not one of {names}; {remedy}")


def set_solver_timesteps(scheduler: Any, timesteps: list[int], device: torch.device) -> None:
    """Set the timesteps of a solver of diffusers whose `set_timesteps` takes only their number.

    Raises:
        ValueError: If the solver is configured for other noise levels than those of timesteps.
    """
    for option in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "solver_p"):
        if scheduler.config.get(option):
            raise ValueError(f"{option} does not go with a list of timesteps")
    scheduler.set_timesteps(len(timesteps), device=device)
    alpha_bar = scheduler.alphas_cumprod[timesteps].double()
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().to(scheduler.sigmas)
    scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])
    scheduler.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)


def sampler_name(scheduler: Any, eta: float | None = None) -> str:
    """Return the name under which timesteps are optimized for a scheduler, or a class of them.

    Args:
        scheduler: The scheduler.
        eta: The eta of GaussianDiffusionScheduler; None for its default of 1. Other schedulers ignore it.
    """
    name = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
    return f"{name}(eta={1.0 if eta is None else eta:g})" if name == NATIVE_SCHEDULER else str(name)


def check_optimized(lists: Any, num_train_timesteps: int) -> dict[str, dict[str, list[int]]] | None:
    """Return optimized timesteps by sampler and number of steps; raise a ValueError if they are damaged."""
    if lists is None:
        return None
    try:
        checked = {
            str(sampler): {
                str(number): descending_timesteps(given, num_train_timesteps) for number, given in few.items()
            }
            for sampler, few in lists.items()
        }
        if any(len(given) != int(number) for few in checked.values() for number, given in few.items()):
            raise ValueError("A list does not have the length that it is stored under.")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optimized_timesteps cannot be used ({error}); choose them again with ddpm-hf timesteps."
        ) from error
    return checked


def find_optimized(
    lists: Mapping[str, Mapping[str, list[int]]], scheduler: Any, num_inference_steps: Any, eta: float | None
) -> tuple[float | None, list[int]]:
    """Return eta and the optimized timesteps of a call.

    Args:
        lists: Lists by number of steps, by name of the sampler.
        scheduler: The scheduler of the call.
        num_inference_steps: Their number; None if there is only one list for the sampler.
        eta: That of the call; None takes 0 if there are lists for it.

    Raises:
        ValueError: If there is no such list, or no number is given and there are several.
    """
    if eta is None and sampler_name(scheduler, 0.0) in lists and type(scheduler).__name__ == NATIVE_SCHEDULER:
        eta = 0.0
    name = sampler_name(scheduler, eta)
    found = lists.get(name, {})
    if num_inference_steps is None and len(found) == 1:
        return eta, next(iter(found.values()))
    number = None if num_inference_steps is None else whole_number("num_inference_steps", num_inference_steps)
    if number is not None and str(number) in found:
        return eta, found[str(number)]
    if number is None and found:
        raise ValueError(
            "timestep_spacing is optimized, for several numbers of steps; pass num_inference_steps, one of"
            f" {', '.join(found)}."
        )
    known = "; ".join(f"{one} in {', '.join(lists[one])} steps" for one in lists)
    raise ValueError(
        "timestep_spacing is optimized, but the pipeline has no optimized timesteps for"
        f" {name}{'' if number is None else f' in {number} steps'}{f' (only for {known})' if known else ''}; choose"
        " them with ddpm-hf timesteps, or pass another spacing."
    )


def copy_scheduler(scheduler: Any) -> Any:
    """Copy a scheduler, so that the steps of the copy change nothing in it; tensors and configuration are shared."""
    copied = copy.copy(scheduler)
    for name, value in vars(copied).items():
        if type(value) in (list, dict, set):  # UniPC and others change lists of former outputs in place
            vars(copied)[name] = copy.copy(value)
        elif isinstance(value, SchedulerMixin):  # solver_p of UniPC
            vars(copied)[name] = copy_scheduler(value)
        elif isinstance(value, MethodType) and value.__self__ is scheduler:
            vars(copied)[name] = MethodType(value.__func__, copied)
    return copied


def show_changes(copied: Any, since: Mapping[str, Any], scheduler: Any) -> None:
    """Set the attributes of a scheduler that changed in its copy since they were those of a dictionary."""
    vars(scheduler).update(
        {
            name: copy.copy(value) if type(value) in (list, dict, set) else value
            for name, value in vars(copied).items()
            if (value is not since.get(name) or type(value) in (list, dict, set))
            and not isinstance(value, SchedulerMixin | MethodType)
        }
    )


def returns_x_0(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Return whether `step` of a scheduler returns the predicted x_0; if unknown, by the first step of a copy."""
    if type(scheduler).__name__ == NATIVE_SCHEDULER:
        return True
    trial = copy_scheduler(scheduler)
    takes_generator = "generator" in inspect.signature(trial.step).parameters
    options = {"generator": torch.default_generator.clone_state()} if takes_generator else {}
    result = trial.step(model_output, trial.timesteps[0], sample, **options)
    return result.get("pred_original_sample") is not None


def check_names(method: str, options: Iterable[str], names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise an UnexpectedArgumentError if an option is not among the names; `others` are only proposed."""
    for name in options:
        if name in names:
            continue
        known = [*names, *others]
        meant = _OTHER_NAMES.get(name) or min((one for one in known if name in one.split("_")), key=len, default=None)
        hint = f" (did you mean {meant!r}?)" if meant in known else did_you_mean(name, known)
        raise UnexpectedArgumentError(f"{method} has no argument {name!r}{'' if name in known else hint}.")


def check_generator(generator: object, batch_size: int, device: torch.device) -> None:
    """Raise a ValueError if the generator of a call is not one, or a list of one for each image, for its device."""
    generators: list[Any] = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in generators:
        if not isinstance(one, torch.Generator):
            seed = one if isinstance(one, int | np.integer) and not isinstance(one, bool) else "seed"
            raise ValueError(
                f"generator {'has' if isinstance(generator, list) else 'is'} {one!r}; pass"
                f" torch.Generator().manual_seed({seed}), or a list of one for each image."
            )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator is a list of {len(generator)} for {batch_size} images; pass one for each image.")
    devices = {one.device for one in generators}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"generator is a list on {names}; create all of them on one device.")
    for given in devices:
        is_other_index = None not in (given.index, device.index) and given.index != device.index
        if given.type != "cpu" and (given.type != device.type or is_other_index):
            raise ValueError(f"generator is on {given}, but the network on {device}; create it on the CPU or there.")


def check_callback(callback: object) -> None:
    """Raise a ValueError if a callback cannot be called with (pipeline, step, timestep, tensors)."""
    if callback is None:
        return
    try:
        inspect.signature(callback).bind(None, 0, 0, {})  # type: ignore[arg-type]
    except ValueError:  # a function without a signature
        pass
    except TypeError as error:
        raise ValueError(
            f"callback_on_step_end is {callback!r}; it must be a function of (pipeline, step, timestep, tensors)."
        ) from error


def tensor_inputs(given: object) -> list[str]:
    """Return the names of the tensors that a callback is to get.

    Raises:
        ValueError: If it is not a list, or a name is unknown.
    """
    is_list = isinstance(given, Iterable) and not isinstance(given, str)
    names = list(given) if is_list else []  # type: ignore[call-overload]
    unknown = [name for name in names if name not in CALLBACK_TENSORS]
    if unknown or not is_list:
        found = f"has {unknown}" if is_list else f"is {given!r}"
        raise ValueError(f"callback_on_step_end_tensor_inputs {found}; choose from {CALLBACK_TENSORS}, in a list.")
    return names


def changed_sample(changes: object, tensors: dict[str, Any]) -> torch.Tensor:
    """Return the sample that a callback returned, or the sample of the step.

    Args:
        changes: What the callback returned.
        tensors: The tensors of the step.

    Raises:
        ValueError: If something else than the sample was changed, or its shape, dtype or device.
    """
    sample: torch.Tensor = tensors["sample"]
    if changes is None:
        return sample
    if not isinstance(changes, Mapping):
        raise ValueError(f'callback_on_step_end returned a {type(changes).__name__}; return None or {{"sample": ...}}.')
    for name, value in changes.items():
        if name != "sample" and value is not tensors.get(name, tensors):
            hint = did_you_mean(name, ["sample"]) if name not in tensors else ""
            raise ValueError(f"callback_on_step_end returned {name!r}{hint}; only the sample can be replaced.")
    new = changes.get("sample", sample)
    if not isinstance(new, torch.Tensor):
        raise ValueError(f"callback_on_step_end returned a sample that is a {type(new).__name__}; return a tensor.")
    if (new.shape, new.dtype, new.device) != (sample.shape, sample.dtype, sample.device):
        kinds = [f"{tuple(x.shape)}, {x.dtype}, on {x.device}" for x in (new, sample)]
        raise ValueError(f"callback_on_step_end returned a sample of {kinds[0]}; it must be {kinds[1]}.")
    return new


def number_of_images(
    batch_size: int | None, class_labels: ClassLabels | None, generator: Generators, sample: torch.Tensor | None
) -> int:
    """Return batch_size, or if it is None the number of labels, generators or start samples, or 1."""
    if batch_size is not None:
        return batch_size
    for given in (class_labels, generator, sample):
        is_one = isinstance(given, str | bytes) or getattr(given, "ndim", 1) == 0
        if isinstance(given, Sized) and not is_one:
            return len(given) or 1  # an empty list is refused for what it is
    return 1


def label_numbers(
    class_labels: ClassLabels | None,
    batch_size: int,
    num_class_embeds: int | None,
    has_null_label: bool,
    class_names: dict[str, str] | None,
) -> list[int] | None:
    """Return one label for each image, or None for an unconditional network.

    Args:
        class_labels: One for all images or one for each; see `number_of_label`.
        batch_size: Number of images.
        num_class_embeds: Number of labels of the network, including the null label.
        has_null_label: Whether the last of them means "no class".
        class_names: Names by number, {"0": ...}.

    Raises:
        ValueError: If the labels are missing, superfluous, unknown, or not one for each image.
    """
    if num_class_embeds is None:
        if class_labels is not None:
            raise ValueError("class_labels are given, but the model is unconditional; leave them out.")
        return None
    num_classes = num_class_embeds - has_null_label
    if class_labels is None:
        raise ValueError(f"The model is class-conditional: pass class_labels, numbers from 0 to {num_classes - 1}.")
    if isinstance(class_labels, torch.Tensor | np.ndarray | np.generic):
        if class_labels.ndim > 1:
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}; pass one number for each image:"
                " class_labels.flatten() for a column, class_labels.argmax(1) for one-hot labels."
            )
        class_labels = class_labels.tolist()
    labels_given: Any = class_labels
    is_list = isinstance(class_labels, Iterable) and not isinstance(class_labels, str | bytes | Mapping | Set)
    given = list(labels_given) if is_list else [labels_given] * batch_size
    if len(given) != batch_size:
        raise ValueError(f"class_labels has {len(given)} entries for batch_size {batch_size}; pass one for each image.")
    names = {} if isinstance(class_labels, ClassNumbers) else class_names or {}
    numbers = {names[number]: int(number) for number in sorted(names, key=int)}
    labels = []
    for label in given:
        number = number_of_label(label, numbers, num_classes, has_null_label)
        if number is None:
            null = f", {num_classes} for no class" if has_null_label else ""
            expected = (
                f"a whole number 0 to {num_classes - 1}{null}{', or a name: ' if numbers else ''}{', '.join(numbers)}"
            )
            if numbers_of_numeric_names(numbers):
                expected = f"the name of a class: {', '.join(numbers)}{null}"
            shown = label if isinstance(label, str) and is_number(label) else repr(label)
            raise ValueError(f"class_labels has {shown}{did_you_mean(label, numbers)}; a label is {expected}.")
        labels.append(number)
    return labels


class ClassNumbers(list[int]):
    """Labels that are numbers of the network's classes, also if the classes are named by other numbers."""


def number_of_label(label: Any, numbers: dict[str, int], num_classes: int, has_null_label: bool) -> int | None:
    """Return the number of a label, which may be text or a number; None if there is no such class.

    A label is the name of a class if there is one, else the number of a class. If all names are numbers, a number is
    always a name, except that of the null label.

    Args:
        label: The label.
        numbers: Number of each class by name; empty without names.
        num_classes: Number of classes without the null label, whose number it is.
        has_null_label: Whether there is a null label.
    """
    if isinstance(label, str):
        text = str(label)
    else:
        try:
            text = "" if is_bool(label) else str(operator.index(label))
        except TypeError:  # not a whole number: 1.0, None, [1], b"cat"
            text = ""
    if text in numbers:
        return numbers[text]
    if not is_number(text):
        return None
    number = int(text)
    if numeric := numbers_of_numeric_names(numbers):
        return numeric.get(number, num_classes if has_null_label and number == num_classes else None)
    return number if number < num_classes + has_null_label else None


def numbers_of_numeric_names(numbers: dict[str, int]) -> dict[int, int]:
    """Return the number of each class by the value of its name if all names are numbers, otherwise nothing."""
    if not all(map(is_number, numbers)):
        return {}
    return {int(name): number for name, number in reversed(numbers.items())}


def is_number(name: str) -> bool:
    """Return whether a name is a number, 0 or more."""
    return name.isascii() and name.isdecimal()


def did_you_mean(given: int | str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " (did you mean 'x'?)" for the shortest name that begins like `given` or the most similar one, or ""."""
    if not given or not isinstance(given, str):
        return ""
    folded = {name.casefold(): name for name in names}
    longer = sorted((name for name in folded if name.startswith(given.casefold())), key=len)
    found = longer or difflib.get_close_matches(given.casefold(), folded, n=1, cutoff=cutoff)
    return f" (did you mean {folded[found[0]]!r}?)" if found else ""
