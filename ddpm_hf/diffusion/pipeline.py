"""Sampling from a trained network, and the folder that keeps it.

The folder that `save_pretrained` writes loads in three ways: as a stock `DDPMPipeline` by `DiffusionPipeline`, as this
class from the copy of this file inside the folder (`custom_pipeline=folder, trust_remote_code=True`), and as this class
where ddpm_hf is installed. `docs/compatibility.md` of ddpm_hf has the details.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# All siblings are named here, although some import each other: from a local folder diffusers copies only the files that
# this one names.
from .folder import CORE_VERSION as FOLDER_VERSION
from .folder import clean_component_configs, splits_variance, without_list_form, write_code, write_index
from .forward_process import CORE_VERSION as FORWARD_PROCESS_VERSION
from .gaussian import CORE_VERSION as GAUSSIAN_VERSION
from .noise_schedule import CORE_VERSION as NOISE_SCHEDULE_VERSION
from .sampling import CORE_VERSION as SAMPLING_VERSION
from .sampling import ClassLabels, Condition, StepEnd, label_numbers, start_run, step_arguments, to_images
from .scheduler import CORE_VERSION as SCHEDULER_VERSION
from .scheduler import GaussianDiffusionScheduler

CORE_VERSION = "1.0.0"
PORTABLE_FILES = (
    "pipeline.py",
    "sampling.py",
    "folder.py",
    "scheduler.py",
    "forward_process.py",
    "gaussian.py",
    "noise_schedule.py",
)

_loaded = (
    SAMPLING_VERSION,
    FOLDER_VERSION,
    SCHEDULER_VERSION,
    FORWARD_PROCESS_VERSION,
    GAUSSIAN_VERSION,
    NOISE_SCHEDULE_VERSION,
)
if set(_loaded) != {CORE_VERSION}:
    raise ImportError(
        f"pipeline.py has version {CORE_VERSION}, but the files beside it are already loaded in version"
        f" {' / '.join(sorted(set(_loaded)))}, from another model's folder. Restart Python before loading this one, or"
        " install ddpm_hf, whose classes load both."
    )

OUTPUT_TYPES = ("pil", "np", "pt", "uint8")


@dataclass
class GaussianDiffusionPipelineOutput(BaseOutput):
    """What a call of the pipeline returns.

    Attributes:
        images: As `output_type` says.
        trajectory: With `return_trajectory`, x_T, ..., x_0 mapped to [0, 1] like images: float32 on the CPU,
            (steps + 1, batch, channels, height, width).
    """

    images: Any
    trajectory: torch.Tensor | None = None


class GaussianDiffusionPipeline(DiffusionPipeline):
    """Generates images with a UNet2DModel and any scheduler of diffusers.

    Args:
        unet: The network: C channels in (2C if self-conditioned), C or, with a learned variance, 2C out.
        scheduler: A GaussianDiffusionScheduler; an exact DDPMScheduler is turned into one; others are used as they are.
        class_names: Names of the labels, {"0": "airplane", ...}; labels may then be given by name.
        has_null_label: Whether the last of `num_class_embeds` means "no class", as guidance needs.
        self_conditioned: Whether the network takes the last prediction of x_0 as channels C ... 2C of its input
            (Chen et al. 2022), zeros in the first step.

    Raises:
        ValueError: The parts do not fit each other.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample", "model_output"]
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
    ) -> None:
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = GaussianDiffusionScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        extras = {"class_names": class_names, "has_null_label": has_null_label, "self_conditioned": self_conditioned}
        self.register_to_config(**{name: value for name, value in extras.items() if value})

        config = unet.config
        if self_conditioned and config.in_channels % 2:
            raise ValueError(f"A self-conditioned unet needs an even number of in_channels, not {config.in_channels}.")
        if config.out_channels not in (self.num_channels, 2 * self.num_channels):
            raise ValueError(
                f"unet has {config.out_channels} out_channels for images of {self.num_channels} channels; it needs as"
                " many, or twice as many with a learned variance."
            )
        if has_null_label and config.num_class_embeds is None:
            raise ValueError("has_null_label is true, but unet has no num_class_embeds.")
        if class_names and set(class_names) != set(map(str, range(self.num_classes))):
            raise ValueError(
                f"class_names must name each of the network's {self.num_classes} classes, by keys that are strings:"
                ' {"0": ..., "1": ...}.'
            )

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return int(self.unet.config.in_channels) // (2 if self.config.get("self_conditioned") else 1)

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for, the null label not counted; 0 for an unconditional network."""
        return int(self.unet.config.num_class_embeds or 0) - bool(self.config.get("has_null_label"))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
    ) -> Any:
        """Generates images; the state is float32 whatever the dtype of the weights (float64 for float64).

        Args:
            batch_size: Number of images.
            num_inference_steps: Denoising steps; by default as many as in training.
            generator: Source of all noise. A list of `batch_size` generators makes each image depend on its own alone.
            class_labels: One label for all images or one for each: numbers, or names from `class_names`.
            guidance_scale: Classifier-free guidance, null + scale (conditional - null); 1 is none.
            guidance_rescale: How far to bring the deviation back to that of the conditional prediction, 0 ... 1.
            eta: 0, deterministic, to 1, ancestral; by default what the scheduler does by itself.
            sample: Start noise (batch, channels, height, width), standard normal; by default drawn from `generator`.
            timesteps: A custom descending list instead of `num_inference_steps`.
            timestep_spacing: Overrides the scheduler's spacing for this call; may also be `quadratic`.
            output_type: `pil`; `np`: float32 (batch, height, width, channels) in [0, 1]; `uint8`: that in 0 ... 255;
                `pt`: float32 (batch, channels, height, width) in [0, 1].
            return_dict: Return an output object instead of a tuple.
            callback_on_step_end: `callback(pipeline, step, timestep, tensors)`; may return {"sample": ...} to go on.
            callback_on_step_end_tensor_inputs: Names of these tensors: `sample`, `model_output`.
            return_trajectory: Also return every state from x_T to x_0.

        Raises:
            ValueError: An argument does not fit the model, the scheduler or another argument.
        """
        device = self._execution_device
        on_step_end = StepEnd(self, callback_on_step_end, list(callback_on_step_end_tensor_inputs), return_trajectory)
        self._check_call(batch_size, generator, output_type, on_step_end.tensor_inputs)
        condition = self._condition(class_labels, batch_size, guidance_scale, guidance_rescale, device)
        step_kwargs = step_arguments(self.scheduler, generator, eta)
        start_run(self.scheduler, device, num_inference_steps, timesteps, timestep_spacing)
        sample = self._start_noise(sample, batch_size, generator, device) * self.scheduler.init_noise_sigma
        on_step_end.keep(sample)
        sample = self._denoise(sample, self.scheduler.timesteps, condition, step_kwargs, on_step_end)
        images = to_images(sample, output_type)
        self.maybe_free_model_hooks()
        output = GaussianDiffusionPipelineOutput(images=images, trajectory=on_step_end.trajectory())
        return output if return_dict else output.to_tuple()

    def _denoise(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        step_kwargs: dict[str, Any],
        on_step_end: StepEnd,
    ) -> torch.Tensor:
        """Runs the reverse process over some of the scheduler's timesteps; `on_step_end` returns the state to go on."""
        x_0 = torch.zeros_like(sample)
        for step, t in enumerate(self.progress_bar(timesteps)):
            model_output = self._predict(sample, t, x_0, condition)
            result = self.scheduler.step(model_output, t, sample, **step_kwargs)
            sample = on_step_end(step, t, {"sample": result.prev_sample, "model_output": model_output})
            if self.config.get("self_conditioned"):
                x_0 = result.get("pred_original_sample")
                if x_0 is None:
                    raise ValueError(
                        f"{type(self.scheduler).__name__} does not tell its prediction of x_0, which a self-conditioned"
                        " unet takes as input; use GaussianDiffusionScheduler or DDIMScheduler."
                    )
        return sample

    def _predict(self, sample: torch.Tensor, t: torch.Tensor, x_0: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Calls the network once, guided if so asked; what it says of the variance stays if the scheduler takes it."""
        x = self.scheduler.scale_model_input(sample, t)
        if self.config.get("self_conditioned"):
            x = torch.cat([x, x_0], dim=1)
        if condition.is_guided:
            x = torch.cat([x, x])
        x = x.to(self.unet.dtype)
        prediction: torch.Tensor = self.unet(x, t, class_labels=condition.labels, return_dict=False)[0]
        prediction, variance = prediction.to(sample.dtype), None
        if prediction.shape[1] == 2 * self.num_channels:
            prediction, variance = prediction.chunk(2, dim=1)
        if condition.is_guided:
            prediction = condition.guide(*prediction.chunk(2))
        if variance is not None and splits_variance(self.scheduler):
            return torch.cat([prediction, variance[: len(prediction)]], dim=1)
        return prediction

    def _condition(
        self,
        class_labels: ClassLabels | None,
        batch_size: int,
        guidance_scale: float,
        guidance_rescale: float,
        device: torch.device,
    ) -> Condition:
        """Turns labels and guidance into what the network takes."""
        num_embeddings, has_null_label = self.unet.config.num_class_embeds, self.config.get("has_null_label", False)
        class_names = self.config.get("class_names")
        labels = label_numbers(class_labels, batch_size, num_embeddings, has_null_label, class_names)
        null_label = self.num_classes if has_null_label else None
        return Condition.make(labels, null_label, guidance_scale, guidance_rescale, device)

    def _check_call(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_inputs: list[str],
    ) -> None:
        """Refuses arguments that are wrong whatever the scheduler."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)} for batch_size {batch_size}; pass one for each image."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if output_type == "pil" and self.num_channels not in (1, 3, 4):
            raise ValueError(
                f"output_type pil cannot show images of {self.num_channels} channels; use np, pt or uint8."
            )
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; choose from {self._callback_tensor_inputs}."
            )

    def _start_noise(
        self,
        sample: torch.Tensor | None,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Returns x_T before scaling, (batch, channels, height, width), given or drawn."""
        dtype = torch.promote_types(torch.float32, self.unet.dtype)
        if sample is not None:
            if sample.ndim != 4 or sample.shape[:2] != (batch_size, self.num_channels):
                raise ValueError(
                    f"sample has shape {tuple(sample.shape)}; it must be ({batch_size}, {self.num_channels}, height,"
                    " width), as batch_size and the network say."
                )
            return sample.to(device, dtype)
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("The network has no sample_size; pass start noise as sample.")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.num_channels, height, width)
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise

    def save_config(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes code and index; `save_pretrained` calls this last, after the components and before an upload."""
        write_code(Path(save_directory), self._portable_code)
        clean_component_configs(Path(save_directory), self.scheduler)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | PathLike[str]) -> None:
        """Writes the index, portable."""
        write_index(Path(json_file_path), self)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | PathLike[str]) -> dict[str, Any]:
        """Reads an index; what asks for the code in the folder asks for this class."""
        content: dict[str, Any] = super()._dict_from_json_file(json_file)
        return without_list_form(content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Loads a folder or repository of this class or of a stock DDPMPipeline, see `DiffusionPipeline`.

        Raises:
            ValueError: The weights exist only as pickles and `use_safetensors=False` was not given.
        """
        if "use_safetensors" in kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **kwargs)
        except OSError as error:
            if not re.search("no file named .*safetensors|necessary `safetensors`", str(error)):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights in the safetensors format. If you trust it, pass"
                " use_safetensors=False to read its pickled .bin weights, and save the pipeline anew."
            ) from error
