"""Sampling from a trained network, and the folder that keeps it.

The folder that `save_pretrained` writes loads in three ways: as a stock `DDPMPipeline` by `DiffusionPipeline`, as this
class from the copy of this file inside the folder (`custom_pipeline=folder, trust_remote_code=True`), and as this class
where ddpm_hf is installed. `docs/compatibility.md` of ddpm_hf has the details.
"""

import re
import sys
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

CORE_VERSION = "1.2.0"


def _refuse_other_versions(versions: set[str]) -> None:
    """Refuses siblings of another version.

    When a second folder is loaded in one process, diffusers executes its pipeline.py beside the first one's files.
    """
    if versions - {CORE_VERSION}:
        raise ImportError(
            f"pipeline.py has version {CORE_VERSION}, but the files beside it are already loaded in version"
            f" {' / '.join(sorted(versions))}, from another model's folder. Restart Python before loading this one, or"
            " install ddpm_hf, whose classes load both."
        )


# Diffusers calls the package of this file after the repository. A dot in that name means a parent package to Python,
# which looks for it in vain unless the package is there already.
if __package__ not in sys.modules:
    sys.modules[__package__] = ModuleType(__package__)
    sys.modules[__package__].__path__ = [str(Path(__file__).parent)]

# Before the imports, as names may be missing in another version.
_siblings = [module for name, module in sys.modules.items() if name.rpartition(".")[0] == __package__]
_refuse_other_versions({module.CORE_VERSION for module in _siblings if hasattr(module, "CORE_VERSION")})

# All siblings are named here, although some import each other: from a local folder diffusers copies only the files that
# this one names.
from .denoising import CALLBACK_TENSORS, Generators, Run
from .denoising import CORE_VERSION as DENOISING_VERSION
from .editing import CORE_VERSION as EDITING_VERSION
from .editing import Editing
from .folder import CORE_VERSION as FOLDER_VERSION
from .folder import check_parts, check_shards, clean_component_configs, without_list_form, write_code, write_index
from .forward_process import CORE_VERSION as FORWARD_PROCESS_VERSION
from .gaussian import CORE_VERSION as GAUSSIAN_VERSION
from .images import CORE_VERSION as IMAGES_VERSION
from .images import ImageInput, from_images
from .noise_schedule import CORE_VERSION as NOISE_SCHEDULE_VERSION
from .reverse_variance import CORE_VERSION as REVERSE_VARIANCE_VERSION
from .reverse_variance import find_second_moments
from .sampling import CORE_VERSION as SAMPLING_VERSION
from .sampling import ClassLabels, number_of_images
from .scheduler import CORE_VERSION as SCHEDULER_VERSION
from .scheduler import GaussianDiffusionScheduler
from .timesteps import CORE_VERSION as TIMESTEPS_VERSION

PORTABLE_FILES = (
    "pipeline.py",
    "editing.py",
    "denoising.py",
    "sampling.py",
    "images.py",
    "folder.py",
    "scheduler.py",
    "reverse_variance.py",
    "forward_process.py",
    "gaussian.py",
    "timesteps.py",
    "noise_schedule.py",
)

_refuse_other_versions(
    {
        EDITING_VERSION,
        DENOISING_VERSION,
        SAMPLING_VERSION,
        IMAGES_VERSION,
        FOLDER_VERSION,
        SCHEDULER_VERSION,
        REVERSE_VARIANCE_VERSION,
        FORWARD_PROCESS_VERSION,
        GAUSSIAN_VERSION,
        TIMESTEPS_VERSION,
        NOISE_SCHEDULE_VERSION,
    }
)


class GaussianDiffusionPipeline(Editing, DiffusionPipeline):
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
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS
    _interrupt = False
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

    @property
    def size_divisor(self) -> int:
        """What height and width of an image must be multiples of: the network halves them that often."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def interrupt(self) -> bool:
        """Whether to stop after this step; a callback may set it, and each call begins with False."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, interrupt: bool) -> None:
        self._interrupt = interrupt

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
    ) -> Any:
        """Generates images; the state is float32 whatever the dtype of the weights (float64 for float64).

        Args:
            batch_size: Number of images; by default as many as there are class labels, generators or start states.
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
            callback_on_step_end: `callback(pipeline, step, timestep, tensors)`; may return {"sample": ...} to go on
                from, and set `pipeline.interrupt = True` to stop with the state that has been reached.
            callback_on_step_end_tensor_inputs: Which tensors: `sample`, `model_output`, `pred_original_sample` (x_0).
            return_trajectory: Also return every state from x_T to x_0.

        Raises:
            ValueError: An argument does not fit the model, the scheduler or another argument.
        """
        run = self._begin(
            number_of_images(batch_size, class_labels, generator, sample),
            num_inference_steps=num_inference_steps,
            generator=generator,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            timesteps=timesteps,
            timestep_spacing=timestep_spacing,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_trajectory=return_trajectory,
        )
        x_t = run.start_noise(sample) * self.scheduler.init_noise_sigma
        return run.finish(run.denoise(x_t, run.timesteps))

    def _begin(self, batch_size: int, **options: Any) -> Run:
        """Checks the arguments of a call and sets the scheduler's timesteps."""
        self._interrupt = False
        return Run(self, batch_size, **options)

    def _to_states(self, image: ImageInput, name: str) -> torch.Tensor:
        """Turns images into states on the CPU, (batch, channels, height, width) in [-1, 1]."""
        return from_images(image, self.num_channels, self.size_divisor, name)

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
        """Reads an index; what asks for the code in the folder asks for this class.

        Raises:
            ValueError: It names a module that nobody has imported.
        """
        content: dict[str, Any] = super()._dict_from_json_file(json_file)
        check_parts(content)
        return without_list_form(content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Loads a folder or repository of this class or of a stock DDPMPipeline, see `DiffusionPipeline`.

        Raises:
            ValueError: The weights exist only as pickles and `use_safetensors=False` was not given, or a part is of
                a module that nobody has imported.
        """
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
                " use_safetensors=False to read its pickled .bin weights, and save the pipeline anew."
            ) from error
        pipeline = loaded[0] if isinstance(loaded, tuple) else loaded
        file = find_second_moments(pretrained_model_name_or_path, kwargs)
        if file is not None and isinstance(pipeline.scheduler, GaussianDiffusionScheduler):
            pipeline.scheduler.load_second_moments(file)
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> Any:
        """Downloads a repository, see `DiffusionPipeline`; `from_pretrained` calls this.

        Raises:
            ValueError: It names pickles as parts of weights that are asked for as safetensors.
        """
        folder = super().download(pretrained_model_name, **kwargs)
        if kwargs.get("use_safetensors"):
            check_shards(Path(folder))
        return folder
