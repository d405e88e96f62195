"""Samples by any scheduler with one seed per image, and the sample folder that a stopped evaluation continues.

Image i is a function of (seed, i), on any process. A different batch size changes the last digits of the sums in a
network, which can move a value by one gray level in float32 and by several in half precision.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ddpm_hf import distributed
from ddpm_hf.config import EvaluationConfig
from ddpm_hf.config.schema import SCHEDULERS, SCHEDULERS_WITH_ETA
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.compiled import compiled_call
from ddpm_hf.diffusion.images import to_images
from ddpm_hf.diffusion.pipeline import ClassNumbers, did_you_mean, find_optimized, returns_x_0
from ddpm_hf.diffusion.scheduler import NATIVE_SCHEDULER, default_num_inference_steps
from ddpm_hf.files import SAMPLING_SETTINGS, atomic_write, format_value, read_json, save_array, write_json
from ddpm_hf.rng import sampling_generators

Images = NDArray[np.uint8]
"""uint8 images (number, height, width, channels)."""

NUM_SOLVER_STEPS, NUM_DDIM_STEPS = 20, 50
"""Default number of steps of UniPC and other solvers, and of DDIM."""
MAX_FRAMES = 40
"""Most states kept of a denoising trajectory."""
SCHEMA_VERSION = 1
"""Version of the sample folder."""
SAMPLES, PARTS, PICTURES = "samples.npy", "parts", "png"
_PART_NAME = re.compile(r"(\d{8})-(\d{8})\.npy")
_PNG_CHANNELS = (1, 3, 4)
_STOCK_SPACINGS = ("leading", "trailing", "linspace")
OPTIMIZED = "optimized"
"""The spacing that stands for the timesteps chosen by `ddpm-hf timesteps`."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings for sampling.

    Args:
        scheduler: Name of a scheduler of diffusers; None takes that of the pipeline.
        num_inference_steps: Number of reverse steps; None takes all training timesteps.
        eta: 0 (DDIM) to 1 (DDPM); None takes the default of the scheduler.
        timestep_spacing: None takes that of the scheduler.
        guidance_scale: Scale of classifier-free guidance; 1 disables it.
        guidance_rescale: Rescale factor phi of Lin et al. 2024, 0 to 1.
        guidance_interval: The fractions of the steps between which guidance is on.
        guide: Pipeline of a worse version of the model, in place of the null label; None for classifier-free guidance.
        analytic_variance: Use the optimal reverse variance (Bao et al. 2022); needs the second moments of the network.
        labels: Labels that the images have in turn; None takes all classes of the network.
    """

    scheduler: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    guide: GaussianDiffusionPipeline | None = None
    analytic_variance: bool = False
    labels: tuple[int, ...] | None = None

    @classmethod
    def from_config(cls, config: EvaluationConfig) -> "Sampler":
        """Return the sampler of a training run's report and score."""
        return cls(
            num_inference_steps=config.num_inference_steps,
            eta=config.eta,
            guidance_scale=config.guidance_scale,
            guidance_interval=tuple(config.guidance_interval),
        )

    def prepare(self, pipeline: GaussianDiffusionPipeline) -> GaussianDiffusionPipeline:
        """Return a pipeline of the same network with a scheduler for these settings.

        Raises:
            ValueError: The scheduler is unknown or has no analytic variance, or a label does not exist.
        """
        self.labels_of(pipeline, range(1))
        scheduler_type = scheduler_class(self.scheduler) if self.scheduler else type(pipeline.scheduler)
        changes: dict[str, Any] = {}
        if self.timestep_spacing not in (None, OPTIMIZED) and scheduler_type is not GaussianDiffusionScheduler:
            if self.timestep_spacing not in _STOCK_SPACINGS or "timestep_spacing" not in _settings_of(scheduler_type):
                raise ValueError(
                    f"timestep_spacing is {self.timestep_spacing}, which {scheduler_type.__name__} does not have; use "
                    f"{NATIVE_SCHEDULER} (ddim or ddpm), or leave it out."
                )
            changes["timestep_spacing"] = self.timestep_spacing
        is_heun = scheduler_type is diffusers.HeunDiscreteScheduler and self.timestep_spacing is None
        if is_heun and pipeline.scheduler.alphas_cumprod[-1] < 1e-6:
            # The average of the slopes at both ends of a step diverges if the noise level falls by a factor of 1000, as
            # it does in the first step of cosine schedules.
            changes["use_exponential_sigmas"] = True
        scheduler = scheduler_type.from_config(pipeline.scheduler.config, **changes)
        settings = inspect.signature(GaussianDiffusionPipeline).parameters.keys() - pipeline.components.keys()
        extras = {name: pipeline.config[name] for name in settings if pipeline.config.get(name)}
        prepared = GaussianDiffusionPipeline(pipeline.unet, scheduler, vae=pipeline.vae, **extras)
        if isinstance(prepared.scheduler, GaussianDiffusionScheduler):
            moments = getattr(pipeline.scheduler, "eps_second_moments", None)
            if moments is not None:
                prepared.scheduler.eps_second_moments = moments
            prepared.scheduler.analytic_variance = self.analytic_variance
        elif self.analytic_variance:
            raise ValueError(
                f"the analytic variance needs a GaussianDiffusionScheduler, but the scheduler is "
                f"{scheduler_type.__name__}; leave one of them out."
            )
        return prepared

    def labels_of(self, pipeline: GaussianDiffusionPipeline, indices: range) -> ClassNumbers | None:
        """Return the label of each image; None for an unconditional network.

        Raises:
            ValueError: A label does not exist.
        """
        if self.labels is None and not pipeline.num_classes:
            return None
        labels = tuple(range(pipeline.num_classes)) if self.labels is None else self.labels
        num_labels = pipeline.unet.config.num_class_embeds or 0
        if not labels or not all(0 <= label < num_labels for label in labels):
            known = f"0 to {num_labels - 1}" if num_labels else "none"
            raise ValueError(f"labels are {list(labels)}, but the labels of the network are {known}; change them.")
        return ClassNumbers(labels[index % len(labels)] for index in indices)

    def call_arguments(self) -> dict[str, Any]:
        """Return the settings that are keyword arguments of the pipeline, without those at their default."""
        names = (
            "num_inference_steps", "eta", "timestep_spacing", "guidance_scale", "guidance_rescale", "guidance_interval",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) != getattr(Sampler, name)}

    def call(self, pipeline: GaussianDiffusionPipeline, seed: int, indices: range) -> dict[str, Any]:
        """Return all keyword arguments of the pipeline for the images of some indices.

        Args:
            pipeline: Returned by `prepare`.
            seed: Image i is drawn from (seed, i).
            indices: Indices of the images.
        """
        arguments = self.call_arguments()
        if type(pipeline.scheduler) is not GaussianDiffusionScheduler and self.timestep_spacing != OPTIMIZED:
            arguments.pop("timestep_spacing", None)  # `prepare` has set it
        return arguments | {
            **({} if self.guide is None else {"guide": self.guide}),
            "class_labels": self.labels_of(pipeline, indices),
            "generator": sampling_generators(seed, "evaluation", indices, pipeline.device),
            "output_type": "uint8",
        }

    def sample(self, pipeline: GaussianDiffusionPipeline, seed: int, indices: range) -> Images:
        """Sample the images of some indices in one batch; arguments are those of `call`."""
        with eval_mode(pipeline.unet):
            images: Images = pipeline(batch_size=len(indices), **self.call(pipeline, seed, indices)).images
        return images

    def check(self, pipeline: GaussianDiffusionPipeline) -> None:
        """Raise ValueError if a call of the pipeline that `prepare` returned would; does not call the network."""
        pipeline.check_inputs(**self.call(pipeline, 0, range(1)))
        check_step(pipeline)

    def to_dict(self, pipeline: GaussianDiffusionPipeline) -> dict[str, Any]:
        """Return the settings for JSON, with the defaults of the pipeline filled in."""
        scheduler, labels = pipeline.scheduler, self.labels_of(pipeline, range(len(self.labels or ())))
        settings = {each.name: getattr(self, each.name) for each in fields(self)}
        # Left out at their defaults, so that samples of versions without them can be continued.
        interval = settings.pop("guidance_interval")
        if interval != Sampler.guidance_interval:
            settings["guidance_interval"] = list(interval)
        if (guide := settings.pop("guide")) is not None:
            settings["guide"] = fingerprint(guide)
        num_steps = self.num_inference_steps or default_num_inference_steps(scheduler)
        if self.timestep_spacing == OPTIMIZED:
            lists = pipeline.config.get("optimized_timesteps") or {}
            settings["timesteps"] = find_optimized(lists, scheduler, self.num_inference_steps, self.eta)[1]
            num_steps = len(settings["timesteps"])
        return settings | {
            "scheduler": type(scheduler).__name__,
            "num_inference_steps": num_steps,
            "timestep_spacing": self.timestep_spacing or scheduler.config.get("timestep_spacing"),
            "labels": labels or (list(range(pipeline.num_classes)) or None),
        }


def _settings_of(scheduler_type: Any) -> Collection[str]:
    return inspect.signature(scheduler_type).parameters


def default_sampling(
    pipeline: GaussianDiffusionPipeline,
    *,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    timestep_spacing: str | None = None,
    needs_native: bool = False,
) -> dict[str, Any]:
    """Return these settings of a `Sampler`, with defaults for those that are not given.

    If neither scheduler nor eta is given, a DDPM is sampled by UniPC, which benchmarks/few_steps.py finds to be best at
    5 to 20 network calls, or by DDIM where UniPC cannot be used. A model that stores a number of steps or another
    scheduler keeps them, and optimized timesteps the sampler that they were chosen for. By default, UniPC and other
    solvers take 20 steps, DDIM 50, and DDPM all of the training.

    Args:
        pipeline: The pipeline.
        scheduler: Name of a class of diffusers, or a short name.
        num_inference_steps: Number of steps.
        eta: 0 (DDIM) to 1 (DDPM).
        timestep_spacing: Spacing of the timesteps; trailing by default with UniPC, which needs the last timestep.
        needs_native: Whether only GaussianDiffusionScheduler can be used.
    """
    config, own = pipeline.scheduler.config, type(pipeline.scheduler).__name__
    num_stored = config.get("default_num_inference_steps")
    if timestep_spacing == OPTIMIZED:
        stored: Mapping[str, Any] = pipeline.config.get("optimized_timesteps") or {}
        if (scheduler, eta, own, needs_native) == (None, None, NATIVE_SCHEDULER, False):
            solvers = [name for name in stored if not name.startswith(NATIVE_SCHEDULER)]
            scheduler = SCHEDULERS["unipc"] if SCHEDULERS["unipc"] in solvers else next(iter(solvers), None)
        return {
            "scheduler": scheduler,
            "num_inference_steps": num_inference_steps,
            "eta": eta,
            "timestep_spacing": timestep_spacing,
        }
    if scheduler is None and eta is None and own == NATIVE_SCHEDULER:
        needs_native |= timestep_spacing not in (None, *_STOCK_SPACINGS)
        if num_stored or needs_native or pipeline.config.get("self_conditioned"):
            eta = 0.0
        else:
            scheduler, timestep_spacing = SCHEDULERS["unipc"], timestep_spacing or "trailing"
    if num_inference_steps is None and not num_stored:
        name = SCHEDULERS.get(scheduler or own, scheduler or own)
        default = NUM_SOLVER_STEPS
        if name in SCHEDULERS_WITH_ETA:
            is_ddim = eta is not None and eta < 1 if name == NATIVE_SCHEDULER else not eta
            default = NUM_DDIM_STEPS if is_ddim else int(config["num_train_timesteps"])
        num_inference_steps = min(default, int(config["num_train_timesteps"]))
    return {
        "scheduler": scheduler,
        "num_inference_steps": num_inference_steps,
        "eta": eta,
        "timestep_spacing": timestep_spacing,
    }


def scheduler_class(name: str) -> Any:
    """Return a scheduler class by its name, which may be a short one.

    Raises:
        ValueError: diffusers has no scheduler of this name, or it does not run a DDPM process.
    """
    name = SCHEDULERS.get(name, name)
    if name == NATIVE_SCHEDULER:
        return GaussianDiffusionScheduler
    found = getattr(diffusers, name, None)
    examples = "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        names = [one for one in dir(diffusers) if one.endswith("Scheduler")]
        known = [NATIVE_SCHEDULER, *(one for one in names if _runs_ddpm(getattr(diffusers, one)))]
        hint = did_you_mean(name, known, cutoff=0.8)  # all names end alike, so any two are similar
        raise ValueError(
            f"scheduler is {name}, which diffusers {diffusers.__version__} does not have{hint}; give a name such as "
            f"{examples}."
        )
    if not _runs_ddpm(found):
        raise ValueError(
            f"scheduler is {name}, which does not run a denoising diffusion process (DDPM); give a name such as "
            f"{examples}."
        )
    return found


def check_step(pipeline: GaussianDiffusionPipeline) -> None:
    """Raise ValueError if the scheduler, after `check_inputs`, has no step for the prediction type of the network."""
    scheduler = pipeline.scheduler
    zeros = torch.zeros(1, pipeline.sample_channels, 1, 1, device=pipeline.device)
    try:
        if not isinstance(scheduler, GaussianDiffusionScheduler):
            returns_x_0(scheduler, zeros, zeros)
    except (NotImplementedError, ValueError):
        prediction_type = scheduler.config["prediction_type"]
        raise ValueError(
            f"{type(scheduler).__name__} cannot sample from a network that predicts {prediction_type}; use another "
            "scheduler, such as unipc."
        ) from None


def _runs_ddpm(found: object) -> bool:
    """Tell whether a class of diffusers declares that DDPMScheduler can replace it."""
    return "DDPMScheduler" in getattr(found, "_compatibles", ())


@contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and restore its mode on exit."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def image_shape(pipeline: GaussianDiffusionPipeline) -> tuple[int, int, int]:
    """Return (height, width, channels) of the images that a pipeline samples.

    Raises:
        ValueError: The network configuration has no size.
    """
    channels, height, width = pipeline.image_shape
    return height, width, channels


def sample_images(
    pipeline: GaussianDiffusionPipeline, sampler: Sampler, *, seed: int, indices: range, batch_size: int
) -> Images:
    """Sample images in batches into memory; only the last batch may be smaller.

    Args:
        pipeline: Returned by `Sampler.prepare`.
        sampler: The sampler.
        seed: Image i is drawn from (seed, i).
        indices: Indices of the images.
        batch_size: Images per batch.

    Returns:
        uint8 images (number, height, width, channels).
    """
    parts = []
    for start in range(indices.start, indices.stop, batch_size):
        batch = range(start, min(start + batch_size, indices.stop))
        pipeline.set_progress_bar_config(desc=f"Sampling {len(batch)} images", disable=None, leave=False)
        parts.append(sampler.sample(pipeline, seed, batch))
    return np.concatenate(parts) if parts else np.zeros((0, *image_shape(pipeline)), np.uint8)


def sample_trajectory(
    pipeline: GaussianDiffusionPipeline, sampler: Sampler, *, seed: int, num_images: int, batch_size: int
) -> Images:
    """Sample the first images again and return their denoising trajectory.

    Args:
        pipeline: Returned by `Sampler.prepare`.
        sampler: The sampler.
        seed: Image i is drawn from (seed, i).
        num_images: Number of images.
        batch_size: Images per batch; with the batches of `sample_images`, the last states equal the samples exactly.

    Returns:
        uint8 states (frames, number, height, width, channels), at most MAX_FRAMES, evenly spaced, the noise first.
    """
    pipeline.set_progress_bar_config(desc=f"Sampling {num_images} images", disable=None, leave=False)
    parts = []
    for batch in split_into_batches(np.ones(num_images, bool), batch_size):
        with eval_mode(pipeline.unet):
            parts.append(call_with_trajectory(pipeline, **sampler.call(pipeline, seed, batch))[1])
    return np.concatenate(parts, axis=1)


def call_with_trajectory(
    pipeline: GaussianDiffusionPipeline, *, generator: list[torch.Generator], **options: Any
) -> tuple[Any, Images]:
    """Call a pipeline and keep states of the denoising trajectory in 8 bits, in less memory than `return_trajectory`.

    Args:
        pipeline: The pipeline.
        generator: One generator per image.
        **options: Other keyword arguments of the pipeline.

    Returns:
        The images, and uint8 states (frames, number, height, width, channels) as in `sample_trajectory`.
    """
    noise = randn_tensor(
        (len(generator), *pipeline.sample_shape),
        generator=generator,
        device=pipeline.device,
        dtype=torch.promote_types(torch.float32, pipeline.unet.dtype),
    )
    states: list[Images] = [to_images(pipeline.decode_latents(noise), "uint8")]
    num_steps = pipeline.check_inputs(len(generator), generator=generator, **options)
    intervals = min(num_steps, MAX_FRAMES - 1)

    def keep_state(pipeline: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if step + 1 in {round(frame * num_steps / intervals) for frame in range(1, intervals + 1)}:
            states.append(to_images(pipeline.decode_latents(tensors["sample"]), "uint8"))
        return {}

    images = pipeline(sample=noise, generator=generator, callback_on_step_end=keep_state, **options).images
    return images, np.stack(states)


def split_into_batches(is_wanted: NDArray[np.bool_], batch_size: int) -> list[range]:
    """Split the wanted indices into batches on one grid, so that missing indices do not move the other batches.

    Args:
        is_wanted: Whether each index is wanted.
        batch_size: Largest number of indices in a batch; a batch ends at an index that is not wanted.
    """
    batches: list[range] = []
    for index in np.flatnonzero(is_wanted).tolist():
        if batches and index == batches[-1].stop and index % batch_size:
            batches[-1] = range(batches[-1].start, index + 1)
        else:
            batches.append(range(index, index + 1))
    return batches


def fingerprint(pipeline: GaussianDiffusionPipeline) -> str:
    """Return the sha256 of everything that images depend on: weights, configurations, and second moments in use.

    It is independent of the device and of saving, and depends on the precision. (verification.json has one digest per
    tensor, in float32, in order to name the tensors that differ.)
    """
    digest = hashlib.sha256()
    scheduler = pipeline.scheduler
    names = ("class_names", "has_null_label", "self_conditioned")
    extras = {name: pipeline.config.get(name) or None for name in names}
    # Left out where they are not used, so that samples of versions without them can be continued.
    for name in ("value_range", "latents_mean", "latents_std"):
        if values := pipeline.config.get(name):
            extras[name] = list(values)
    vaes = [] if pipeline.vae is None else [pipeline.vae]
    configs = [pipeline.unet.config, scheduler.config, extras, {"scheduler": type(scheduler).__name__}]
    config: Mapping[str, Any]
    for config in (*configs, *(vae.config for vae in vaes)):
        # Names with an underscore are notes of diffusers, among them its version.
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = dict(pipeline.unet.state_dict())
    tensors |= {f"vae.{name}": tensor for vae in vaes for name, tensor in vae.state_dict().items()}
    if getattr(scheduler, "analytic_variance", False):
        tensors["eps_second_moments"] = scheduler.eps_second_moments
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_of(
    pipeline: GaussianDiffusionPipeline, sampler: Sampler, seed: int, batch_size: int | None = None
) -> dict[str, Any]:
    """Return everything that samples depend on, for JSON.

    The device is part of it, because each kind of device draws different noise; the batch size and compilation only in
    half precision, where they move values by several gray levels.

    Args:
        pipeline: Returned by `Sampler.prepare`.
        sampler: The sampler.
        seed: Image i is drawn from (seed, i).
        batch_size: Images per batch.
    """
    is_half = pipeline.unet.dtype in (torch.float16, torch.bfloat16)
    compiled = compiled_call(pipeline.unet)
    rounding = {"batch_size": batch_size} | ({"compile": [compiled.backend, compiled.mode]} if compiled else {})
    return {
        "schema_version": SCHEMA_VERSION,
        "pipeline": fingerprint(pipeline),
        "seed": seed,
        **sampler.to_dict(pipeline),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
    } | (rounding if is_half else {})


# The sample folder:
#
#   settings.json                     everything the images depend on
#   parts/00000000-00000064.npy       one batch, until all images are sampled
#   samples.npy                       all images, uint8 (number, height, width, channels)
#   png/000000.png                    the same as pictures, if requested
#
# A finished folder can be extended to more images, and fewer images are its first ones.


def sample_to_folder(
    pipeline: GaussianDiffusionPipeline,
    sampler: Sampler,
    folder: Path,
    settings: dict[str, Any],
    *,
    num_images: int,
    batch_size: int = 64,
    as_png: bool = False,
) -> Images:
    """Collective: sample images into a folder, or continue a folder that was stopped; the processes share the batches.

    Args:
        pipeline: Returned by `Sampler.prepare`.
        sampler: The sampler.
        folder: New, or started with the same settings; on a file system that all processes see.
        settings: Returned by `settings_of`.
        num_images: Number of images.
        batch_size: Images per batch of a process; the same batch size gives exactly the same images.
        as_png: Also write each image as a PNG.

    Returns:
        uint8 (num_images, height, width, channels), memory-mapped.

    Raises:
        ValueError: The folder holds other files or samples of other settings, or a PNG cannot hold the channels.
        OSError: The images cannot be written.
    """
    shape, seed = image_shape(pipeline), settings["seed"]
    check_channels(shape, as_png=as_png)
    distributed.on_rank_0(lambda: _create_folder(folder, settings))
    # Rank 0 decides what is missing: other ranks may already see parts that were written since.
    done = _find_done(folder, num_images, shape) if distributed.rank() == 0 else np.zeros(0, bool)
    missing = ~distributed.gather_rows(done)
    batches = split_into_batches(missing, batch_size)[distributed.rank() :: distributed.world_size()]
    pipeline.set_progress_bar_config(disable=True)
    is_hidden = True if distributed.rank() else None
    with tqdm(total=sum(map(len, batches)), desc="Sampling", unit="img", disable=is_hidden, leave=False) as bar:
        for batch in batches:
            images = sampler.sample(pipeline, seed, batch)
            save_array(folder / PARTS / f"{batch.start:08d}-{batch.stop:08d}.npy", images)
            bar.update(len(batch))
    distributed.barrier()
    distributed.on_rank_0(lambda: _join_parts(folder, num_images, shape))
    samples = _open_samples(folder)
    if as_png:
        _write_png(folder / PICTURES, samples, distributed.rank_range(num_images))
    return samples[:num_images]


def check_channels(shape: tuple[int, int, int], *, as_png: bool) -> None:
    """Raise ValueError if a PNG cannot hold images of shape (height, width, channels)."""
    if as_png and shape[2] not in _PNG_CHANNELS:
        raise ValueError(f"a PNG has 1, 3 or 4 channels, but the images have {shape[2]}; keep samples.npy only.")


def check_folder(folder: Path, settings: dict[str, Any], *, unknown: Collection[str] = ()) -> None:
    """Check that a sample folder is new or empty, or was started with the same settings; changes nothing.

    Args:
        folder: The folder.
        settings: Returned by `settings_of`.
        unknown: Names of settings that are not final yet and are not compared.

    Raises:
        ValueError: The folder holds other files or samples of other settings.
    """
    path = folder / SAMPLING_SETTINGS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not a folder of samples; choose a new or an empty folder.")
        return
    before = read_json(path, fix=f"remove {folder} to sample again, or choose another folder")
    for name in dict.fromkeys((*settings, *before)):
        if name not in unknown and (old := before.get(name)) != (new := settings.get(name)):
            raise ValueError(
                f"{folder} holds samples of other settings ({name} was {format_value(old, 20)}, is "
                f"{format_value(new, 20)}); restore the setting, or choose another folder."
            )


def _create_folder(folder: Path, settings: dict[str, Any]) -> None:
    check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SAMPLING_SETTINGS).exists():
        write_json(folder / SAMPLING_SETTINGS, settings)
    (folder / PARTS).mkdir(exist_ok=True)


def _find_done(folder: Path, num_images: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which images are in the folder; remove damaged parts."""
    done = np.zeros(num_images, bool)
    if (folder / SAMPLES).exists():
        done[: len(_open_samples(folder))] = True
    for path, indices in _find_parts(folder):
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            is_whole = images.dtype == np.uint8 and images.shape == (len(indices), *shape)
        except (ValueError, OSError):
            is_whole = False
        if is_whole:
            done[indices.start : indices.stop] = True
        else:
            path.unlink()
    return done


def _find_parts(folder: Path) -> list[tuple[Path, range]]:
    """Return the files of batches with the indices they hold; a temporary file of a killed process holds none."""
    parts = []
    for path in sorted((folder / PARTS).iterdir()):
        match = _PART_NAME.fullmatch(path.name)
        parts.append((path, range(*map(int, match.groups())) if match else range(0)))
    return parts


def _open_samples(folder: Path) -> Images:
    """Map the finished images."""
    path = folder / SAMPLES
    try:
        samples: Images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); remove it to sample again. On several machines, the folder must be on a "
            "shared file system."
        ) from None
    return samples


def _join_parts(folder: Path, num_images: int, shape: tuple[int, ...]) -> None:
    """Join all parts into samples.npy, and remove the parts that it holds completely."""
    path, parts = folder / SAMPLES, _find_parts(folder)
    old = _open_samples(folder) if path.exists() else np.zeros((0, *shape), np.uint8)
    if len(old) < num_images:

        def write(temporary: Path) -> None:
            joined = np.lib.format.open_memmap(temporary, "w+", np.uint8, (num_images, *shape))
            joined[: len(old)] = old
            for part, indices in parts:
                stop = max(indices.start, min(indices.stop, num_images))
                joined[indices.start : stop] = np.load(part, allow_pickle=False)[: stop - indices.start]
            joined.flush()

        atomic_write(path, write)
    for part, indices in parts:
        if indices.stop <= num_images:
            part.unlink()
    if not any((folder / PARTS).iterdir()):
        (folder / PARTS).rmdir()


def _write_png(folder: Path, samples: Images, indices: range) -> None:
    """Write the PNG files that do not exist yet."""
    folder.mkdir(exist_ok=True)
    for index in tqdm(indices, "Writing PNG", disable=None, leave=False):
        path = folder / f"{index:06d}.png"
        if not path.exists():
            pixels = samples[index]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            atomic_write(path, partial(picture.save, format="PNG"))
