"""Images from a pipeline, one seed an image: image i is a function of (seed, i) in any batch and on any process.

The bits are the same on any process. Another batch size changes the last digits of the sums in a network, which can
move a value by one gray level in float32, and by several in half precision.
"""

from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from numpy.typing import NDArray

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.denoising import Run
from ddpm_hf.diffusion.sampling import nearest
from ddpm_hf.evaluation.film import Film
from ddpm_hf.evaluation.image_shape import image_shape
from ddpm_hf.rng import sampling_generators

Images = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn.

    Args:
        scheduler: Name of a scheduler of diffusers; None takes that of the pipeline.
        num_inference_steps: None takes as many as training had.
        eta: 0 (DDIM) to 1 (DDPM); None is what the scheduler does by itself.
        timestep_spacing: None takes that of the scheduler.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_rescale: How far guidance keeps the contrast, 0 to 1.
        analytic_variance: Add the noise that is optimal for the network (Bao et al. 2022); needs its second moments.
        labels: Classes, or the null label, which the images have in turn; None takes all classes of the network.
    """

    scheduler: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    analytic_variance: bool = False
    labels: tuple[int, ...] | None = None

    def prepare(self, pipeline: GaussianDiffusionPipeline) -> GaussianDiffusionPipeline:
        """Returns a pipeline with the same network and a scheduler of its own, as these settings ask for.

        Raises:
            ValueError: There is no such scheduler, it has no analytic variance, or a class does not exist.
        """
        self.labels_of(pipeline, range(1))
        wanted = scheduler_class(self.scheduler) if self.scheduler else type(pipeline.scheduler)
        scheduler = wanted.from_config(pipeline.scheduler.config)
        names = ("class_names", "has_null_label", "self_conditioned")
        extras = {name: pipeline.config[name] for name in names if pipeline.config.get(name)}
        prepared = GaussianDiffusionPipeline(pipeline.unet, scheduler, **extras)
        if isinstance(prepared.scheduler, GaussianDiffusionScheduler):
            moments = getattr(pipeline.scheduler, "eps_second_moments", None)
            if moments is not None:
                prepared.scheduler.eps_second_moments = moments
            prepared.scheduler.analytic_variance = self.analytic_variance
        elif self.analytic_variance:
            raise ValueError(
                f"the analytic variance is one of GaussianDiffusionScheduler, and the scheduler is {wanted.__name__}; "
                "leave one of them out."
            )
        return prepared

    def labels_of(self, pipeline: GaussianDiffusionPipeline, indices: range) -> list[int] | None:
        """Returns the class of each image; None for an unconditional network.

        Raises:
            ValueError: The network has no such class.
        """
        if self.labels is None and not pipeline.num_classes:
            return None
        labels = tuple(range(pipeline.num_classes)) if self.labels is None else self.labels
        num_labels = pipeline.unet.config.num_class_embeds or 0
        if not labels or not all(0 <= label < num_labels for label in labels):
            known = f"0 to {num_labels - 1}" if num_labels else "none"
            raise ValueError(f"labels are {list(labels)}, but those of the network are {known}; change them.")
        return [labels[index % len(labels)] for index in indices]

    def sample(
        self, pipeline: GaussianDiffusionPipeline, seed: int, indices: range, *, film: Film | None = None
    ) -> Images:
        """Samples the images of some indices in one batch.

        Args:
            pipeline: What `prepare` returned.
            seed: Image i is drawn from (seed, i).
            indices: Which images.
            film: Keeps states on the way from noise.

        Returns:
            uint8 images (number, height, width, channels).
        """
        call = self._call(pipeline, seed, indices)
        if film is not None:
            call |= {"sample": film.begin(pipeline, call["generator"]), "callback_on_step_end": film}
        was_training = pipeline.unet.training
        pipeline.unet.eval()
        try:
            images: Images = pipeline(batch_size=len(indices), **call).images
        finally:
            pipeline.unet.train(was_training)
        return images

    def check(self, pipeline: GaussianDiffusionPipeline) -> int:
        """Refuses what a call of the pipeline would refuse, and returns the number of steps that the scheduler makes.

        Args:
            pipeline: What `prepare` returned.

        Raises:
            ValueError: The settings do not fit the model, the scheduler or each other.
        """
        return len(Run(pipeline, 1, **self._call(pipeline, 0, range(1))).timesteps)

    def _call(self, pipeline: GaussianDiffusionPipeline, seed: int, indices: range) -> dict[str, Any]:
        """Returns the keyword arguments of the pipeline for some images."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "eta": self.eta,
            "timestep_spacing": self.timestep_spacing,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "class_labels": self.labels_of(pipeline, indices),
            "generator": sampling_generators(seed, "evaluation", indices, pipeline.device),
            "output_type": "uint8",
        }

    def to_dict(self, pipeline: GaussianDiffusionPipeline) -> dict[str, Any]:
        """Returns the settings as JSON can hold them, with what was left to the pipeline filled in."""
        scheduler, labels = pipeline.scheduler, self.labels_of(pipeline, range(len(self.labels or ())))
        return asdict(self) | {
            "scheduler": type(scheduler).__name__,
            "num_inference_steps": self.num_inference_steps or int(scheduler.config["num_train_timesteps"]),
            "timestep_spacing": self.timestep_spacing or scheduler.config.get("timestep_spacing"),
            "labels": labels or (list(range(pipeline.num_classes)) or None),
        }


def scheduler_class(name: str) -> Any:
    """Returns the class of a scheduler by its name.

    Raises:
        ValueError: There is none of that name, or it runs another process.
    """
    if name == GaussianDiffusionScheduler.__name__:
        return GaussianDiffusionScheduler
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        names = [one for one in dir(diffusers) if one.endswith("Scheduler")]
        known = [GaussianDiffusionScheduler.__name__, *(one for one in names if _runs_ddpm(getattr(diffusers, one)))]
        meant = nearest(name, known, cutoff=0.8)  # all names end alike, so any two are a little similar
        raise ValueError(
            f"scheduler is {name}, which diffusers {diffusers.__version__} does not have{meant}; give a "
            "name such as DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler."
        )
    if not _runs_ddpm(found):
        raise ValueError(
            f"scheduler is {name}, which does not run a denoising diffusion process (DDPM); give a name such as "
            "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler."
        )
    return found


def _runs_ddpm(found: object) -> bool:
    """Whether something of diffusers is a scheduler that says that DDPMScheduler can stand in its place."""
    return "DDPMScheduler" in getattr(found, "_compatibles", ())


def sample_images(
    pipeline: GaussianDiffusionPipeline, sampler: Sampler, *, seed: int, indices: range, batch_size: int
) -> Images:
    """Samples images in batches into memory.

    Args:
        pipeline: What `Sampler.prepare` returned.
        sampler: How.
        seed: Image i is drawn from (seed, i).
        indices: Which images.
        batch_size: Images sampled at once.

    Returns:
        uint8 images (number, height, width, channels).
    """
    parts = []
    for batch in batches(np.ones(indices.stop, bool), batch_size, first=indices.start):
        pipeline.set_progress_bar_config(desc=f"Sampling {len(batch)} images", disable=None, leave=False)
        parts.append(sampler.sample(pipeline, seed, batch))
    return np.concatenate(parts) if parts else np.zeros((0, *image_shape(pipeline)), np.uint8)


def sample_film(
    pipeline: GaussianDiffusionPipeline, sampler: Sampler, *, seed: int, num_images: int, batch_size: int
) -> Images:
    """Samples the first images once more, in batches, and returns states on the way from noise.

    Args:
        pipeline: What `Sampler.prepare` returned.
        sampler: How.
        seed: Image i is drawn from (seed, i).
        num_images: How many.
        batch_size: Images sampled at once; in the same batches, the last states are the samples to the bit.

    Returns:
        uint8 states (frames, number, height, width, channels), at most NUM_FRAMES, evenly spaced, the noise first.
    """
    num_steps = sampler.check(pipeline)
    pipeline.set_progress_bar_config(desc=f"Sampling {num_images} images", disable=None, leave=False)
    parts = []
    for batch in batches(np.ones(num_images, bool), batch_size):
        film = Film(num_steps)
        sampler.sample(pipeline, seed, batch, film=film)
        parts.append(film.states())
    return np.concatenate(parts, axis=1)


def batches(is_wanted: NDArray[np.bool_], batch_size: int, *, first: int = 0) -> list[range]:
    """Cuts the wanted indices into batches on the grid of all batches, so that what is left out moves no other one.

    Args:
        is_wanted: For each index.
        batch_size: Most indices in a batch; a batch is cut where one is not wanted.
        first: Where to begin.
    """
    found: list[range] = []
    for index in (np.flatnonzero(is_wanted[first:]) + first).tolist():
        if found and index == found[-1].stop and index % batch_size:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found
