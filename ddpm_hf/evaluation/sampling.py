"""Images from a pipeline, one seed an image: image i is a function of (seed, i) in any batch and on any process.

The bits are the same wherever the batches are, since sums in a network depend on the size of a batch in their last
digits; another batch size can move a value by one gray level in float32, and by several in half precision.
"""

from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from numpy.typing import NDArray

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionPipelineOutput, GaussianDiffusionScheduler
from ddpm_hf.diffusion.sampling import nearest
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
        analytic_variance: Add the noise that is optimal for the network (Bao et al. 2022); needs its second moments.
        labels: Classes, which the images have in turn; None takes all of a class-conditional network.
    """

    scheduler: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None
    guidance_scale: float = 1.0
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
        if not labels or not all(0 <= label < pipeline.num_classes for label in labels):
            known = f"0 to {pipeline.num_classes - 1}" if pipeline.num_classes else "none"
            raise ValueError(f"labels are {list(labels)}, but the classes of the network are {known}; change them.")
        return [labels[index % len(labels)] for index in indices]

    def sample(
        self, pipeline: GaussianDiffusionPipeline, seed: int, indices: range, *, return_trajectory: bool = False
    ) -> GaussianDiffusionPipelineOutput:
        """Samples the images of some indices in one batch.

        Args:
            pipeline: What `prepare` returned.
            seed: Image i is drawn from (seed, i).
            indices: Which images.
            return_trajectory: Also return the states on the way from noise.
        """
        was_training = pipeline.unet.training
        pipeline.unet.eval()
        try:
            output = pipeline(
                batch_size=len(indices),
                num_inference_steps=self.num_inference_steps,
                eta=self.eta,
                timestep_spacing=self.timestep_spacing,
                guidance_scale=self.guidance_scale,
                class_labels=self.labels_of(pipeline, indices),
                generator=sampling_generators(seed, "evaluation", indices, pipeline.device),
                output_type="uint8",
                return_trajectory=return_trajectory,
            )
        finally:
            pipeline.unet.train(was_training)
        assert isinstance(output, GaussianDiffusionPipelineOutput)
        return output

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
        parts.append(sampler.sample(pipeline, seed, batch).images)
    return np.concatenate(parts) if parts else np.zeros((0, *image_shape(pipeline)), np.uint8)


def sample_trajectory(pipeline: GaussianDiffusionPipeline, sampler: Sampler, *, seed: int, num_images: int) -> Images:
    """Samples the first images once more and returns every state on the way from noise.

    Returns:
        uint8 states (steps + 1, number, height, width, channels).
    """
    pipeline.set_progress_bar_config(desc=f"Sampling {num_images} images", disable=None, leave=False)
    output = sampler.sample(pipeline, seed, range(num_images), return_trajectory=True)
    states = torch.as_tensor(output.trajectory).clamp(0, 1).mul(255).round().to(torch.uint8)
    return states.permute(0, 1, 3, 4, 2).cpu().numpy()


def image_shape(pipeline: GaussianDiffusionPipeline) -> tuple[int, int, int]:
    """Returns height, width and channels of the images that a pipeline samples.

    Raises:
        ValueError: The configuration of the network does not tell its size.
    """
    size = pipeline.unet.config.sample_size
    if size is None:
        raise ValueError("the network's configuration has no sample_size; set it in unet/config.json.")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, pipeline.num_channels


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
