"""One call of the pipeline under way: the checks before it, the loop, and what it returns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .folder import splits_variance
from .forward_process import check_process
from .images import OUTPUT_TYPES, check_size, image_size, to_images, to_unit_range
from .sampling import ClassLabels, Condition, label_numbers, start_run, step_arguments

CORE_VERSION = "1.2.0"

CALLBACK_TENSORS = ["sample", "model_output", "pred_original_sample"]

Generators = torch.Generator | list[torch.Generator] | None


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments that every sampling method takes; `GaussianDiffusionPipeline.__call__` explains them."""

    num_inference_steps: int | None
    generator: Generators
    class_labels: ClassLabels | None
    guidance_scale: float
    guidance_rescale: float
    eta: float | None
    timesteps: list[int] | None
    timestep_spacing: str | None
    output_type: str
    return_dict: bool
    callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None
    callback_on_step_end_tensor_inputs: Iterable[str]
    return_trajectory: bool


@dataclass
class GaussianDiffusionPipelineOutput(BaseOutput):
    """What a call of the pipeline returns.

    Attributes:
        images: As `output_type` says.
        trajectory: With `return_trajectory`, the first state, ..., the last one, mapped to [0, 1] like images: float32
            on the CPU, (steps + 1, batch, channels, height, width).
    """

    images: Any
    trajectory: torch.Tensor | None = None


class Run:
    """The network, the scheduler with its timesteps set, and what the caller asked for.

    Args:
        pipeline: Whose network and scheduler.
        batch_size: Number of images.
        num_inference_steps: This and the following are those of `GaussianDiffusionPipeline.__call__`.

    Attributes:
        batch_size: Number of images.
        device: Where the states lie.
        dtype: Of the states: float32, or float64 for a network in float64.
        scheduler: The pipeline's.
        generator: Source of all noise, or one for each image.

    Raises:
        ValueError: An argument does not fit the model, the scheduler or another argument.
    """

    def __init__(
        self,
        pipeline: Any,
        batch_size: int,
        *,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eta: float | None = None,
        timesteps: list[int] | None = None,
        timestep_spacing: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("sample",),
        return_trajectory: bool = False,
    ) -> None:
        self.batch_size, self.generator = batch_size, generator
        self.scheduler, self.device = pipeline.scheduler, pipeline._execution_device
        self.dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
        self._pipeline, self._unet = pipeline, pipeline.unet
        self._self_conditioned = bool(pipeline.config.get("self_conditioned"))
        self._output_type = "np" if output_type == "numpy" else output_type  # its older name in diffusers
        self._return_dict = return_dict
        self._callback, self._shown = callback_on_step_end, list(callback_on_step_end_tensor_inputs)
        self._states: list[torch.Tensor] | None = [] if return_trajectory else None
        self._check()
        check_process(self.scheduler)

        has_null_label = pipeline.config.get("has_null_label", False)
        num_embeddings, class_names = self._unet.config.num_class_embeds, pipeline.config.get("class_names")
        labels = label_numbers(class_labels, batch_size, num_embeddings, has_null_label, class_names)
        null_label = pipeline.num_classes if has_null_label else None
        self._condition = Condition.make(labels, null_label, guidance_scale, guidance_rescale, self.device)
        self._step_arguments = step_arguments(self.scheduler, generator, eta)
        start_run(self.scheduler, self.device, num_inference_steps, timesteps, timestep_spacing)
        self.timesteps: torch.Tensor = self.scheduler.timesteps
        self._num_steps_done = 0
        self._last_x_0: torch.Tensor | None = None

    def _check(self) -> None:
        """Refuses arguments that are wrong whatever the scheduler."""
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size!r}; it must be a whole number, at least 1.")
        if isinstance(self.generator, list) and len(self.generator) != self.batch_size:
            raise ValueError(
                f"generator is a list of {len(self.generator)} for {self.batch_size} images; pass one for each image."
            )
        if self._output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {self._output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if self._output_type == "pil" and self._pipeline.num_channels not in (1, 3, 4):
            raise ValueError(
                f"output_type pil cannot show images of {self._pipeline.num_channels} channels; use np, pt or uint8."
            )
        unknown = set(self._shown) - set(CALLBACK_TENSORS)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; choose from {CALLBACK_TENSORS}."
            )

    def start_noise(self, sample: torch.Tensor | None) -> torch.Tensor:
        """Returns x_T before scaling, (batch, channels, height, width), given or drawn."""
        channels = self._pipeline.num_channels
        if sample is None:
            return self.noise((self.batch_size, channels, *image_size(self._unet)))
        if sample.ndim != 4 or sample.shape[:2] != (self.batch_size, channels):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; it must be ({self.batch_size}, {channels}, height, width), as"
                " batch_size and the network say."
            )
        check_size(sample.shape[2], sample.shape[3], self._pipeline.size_divisor, "sample")
        return sample.to(self.device, self.dtype)

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Draws standard normal noise."""
        drawn: torch.Tensor = randn_tensor(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return drawn

    def denoise(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Runs the reverse process over some of the scheduler's timesteps, until the end or an interruption."""
        self.keep(sample)
        for t in self.progress_bar(timesteps):
            if self.is_interrupted:
                break
            sample = self.end_step(*self.step(sample, t))
        return sample

    def step(self, sample: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the previous state, the timestep and the network's output."""
        output = self.predict(sample, t)
        result = self.scheduler.step(output, t, sample, **self._step_arguments)
        self._last_x_0 = result.get("pred_original_sample")
        is_shown = self._callback is not None and "pred_original_sample" in self._shown
        if self._last_x_0 is None and (self._self_conditioned or is_shown):
            who = "a self-conditioned unet takes as input" if self._self_conditioned else "the callback is to see"
            raise ValueError(
                f"{type(self.scheduler).__name__} does not tell its prediction of x_0, which {who}; use"
                " GaussianDiffusionScheduler or DDIMScheduler."
            )
        return result.prev_sample, t, output

    def predict(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Calls the network once, guided if so asked; what it says of the variance stays if the scheduler takes it."""
        x = self.scheduler.scale_model_input(sample, t)
        if self._self_conditioned:
            x = torch.cat([x, torch.zeros_like(x) if self._last_x_0 is None else self._last_x_0], dim=1)
        if self._condition.is_guided:
            x = torch.cat([x, x])
        output: torch.Tensor = self._unet(
            x.to(self._unet.dtype), t, class_labels=self._condition.labels, return_dict=False
        )[0]
        prediction, variance = output.to(sample.dtype), None
        if prediction.shape[1] == 2 * sample.shape[1]:
            prediction, variance = prediction.chunk(2, dim=1)
        if self._condition.is_guided:
            prediction = self._condition.guide(*prediction.chunk(2))
        if variance is not None and splits_variance(self.scheduler):
            return torch.cat([prediction, variance[: len(prediction)]], dim=1)
        return prediction

    def end_step(self, sample: torch.Tensor, t: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """Shows the state to the caller and remembers it; returns the state to go on from."""
        if self._callback is not None:
            tensors = {"sample": sample, "model_output": model_output, "pred_original_sample": self._last_x_0}
            shown = {name: tensors[name] for name in self._shown}
            sample = (self._callback(self._pipeline, self._num_steps_done, t, shown) or {}).get("sample", sample)
        self._num_steps_done += 1
        self.keep(sample)
        return sample

    @property
    def is_self_conditioned(self) -> bool:
        """Whether the network takes its last prediction of x_0 as input."""
        return self._self_conditioned

    @property
    def is_interrupted(self) -> bool:
        """Whether a callback has set `pipe.interrupt`."""
        return bool(self._pipeline.interrupt)

    def progress_bar(self, steps: Iterable[Any]) -> Any:
        """The pipeline's progress bar over some steps."""
        return self._pipeline.progress_bar(steps)

    def keep(self, sample: torch.Tensor) -> None:
        """Remembers a state, on the CPU, if the trajectory is wanted."""
        if self._states is not None:
            self._states.append(sample.cpu())

    def finish(self, sample: torch.Tensor) -> Any:
        """Returns the images, and the trajectory if it is wanted."""
        images = to_images(sample, self._output_type)
        trajectory = None if self._states is None else to_unit_range(torch.stack(self._states))
        self.release()
        output = GaussianDiffusionPipelineOutput(images=images, trajectory=trajectory)
        return output if self._return_dict else output.to_tuple()

    def release(self) -> None:
        """Lets an offloaded network go."""
        self._pipeline.maybe_free_model_hooks()
