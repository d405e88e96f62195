"""Progressive distillation: a student that makes one DDIM step of two steps of its teacher (Salimans & Ho 2022).

The student samples with DDIM and eta = 0 in n trailing timesteps, the last of which leads to clean data, alpha_bar = 1.
For x_t at one of its timesteps t, the teacher takes two such steps, t -> t' -> t'', where t'' is the next timestep of
the student. The target is the x_0 from which one step of the student leads to the same x_t''. A student that predicts
its targets therefore samples what the teacher samples in 2n steps.

Legend: as in diffusion/gaussian.py; t' and t'', timesteps after one and two steps of the teacher.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, ObjectiveConfig, RunConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler, gaussian
from ddpm_hf.diffusion.schedule import SMALLEST_ALPHA_BAR, spaced_timesteps
from ddpm_hf.diffusion.scheduler import DEFAULT_STEPS, DISTILLED_GUIDANCE
from ddpm_hf.models import Pretrained, load_network
from ddpm_hf.training.loss import DenoisingLoss


def teacher_timesteps(num_inference_steps: int, num_train_timesteps: int) -> list[int]:
    """Return the timesteps of the teacher: those of the student, and one between each and the next.

    They are the trailing timesteps of twice as many steps, up to the rounding of the student's.
    """
    timesteps = spaced_timesteps("trailing", 2 * num_inference_steps, num_train_timesteps)
    timesteps[::2] = spaced_timesteps("trailing", num_inference_steps, num_train_timesteps)
    return timesteps


@dataclass(frozen=True)
class Teacher:
    """A frozen network and how it is sampled.

    Args:
        unet: The network in evaluation mode, without gradients.
        scheduler: Its forward process, prediction type and clipping.
        null_label: The label that means "no class"; None for a network without one.
        guidance_scale: Classifier-free guidance scale; 1 disables guidance.
        sha256: Digest of its weights.
        autocast: Returns the context in which the network is called.
    """

    unet: Any
    scheduler: GaussianDiffusionScheduler
    null_label: int | None = None
    guidance_scale: float = 1.0
    sha256: str = ""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def predict_x_0(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the predicted x_0, guided and clipped as in sampling, (batch, ...)."""
        x, t, labels = x_t, timesteps, class_labels
        is_guided = self.guidance_scale != 1
        if is_guided:
            assert class_labels is not None
            assert self.null_label is not None
            x, t = torch.cat([x, x]), torch.cat([t, t])
            labels = torch.cat([class_labels, torch.full_like(class_labels, self.null_label)])
        with self.autocast():
            output = self.unet(x, t, labels, return_dict=False)[0]
        output, _ = self.scheduler.split_variance(output.to(x_t.dtype), x)
        if is_guided:
            conditional, null = output.chunk(2)
            output = gaussian.classifier_free_guidance(conditional, null, self.guidance_scale, 0.0)
        alpha = self.scheduler.gather("sqrt_alphas_cumprod", timesteps, x_t)
        sigma = self.scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, x_t)
        prediction_type = self.scheduler.config["prediction_type"]
        return self.scheduler.clip(gaussian.predict_x_0(prediction_type, output, x_t, alpha, sigma))


class DistillationLoss(DenoisingLoss):
    """The loss of a student, whose targets come from its teacher instead of the images.

    Args:
        scheduler: The forward process and the prediction type of the student.
        config: The distance and its weighting.
        null_label: The label that means "no class"; None for a student without one.
        teacher: The teacher, on the device of the samples.
        num_inference_steps: Sampling steps of the student.
    """

    def __init__(
        self,
        scheduler: GaussianDiffusionScheduler,
        config: ObjectiveConfig | None = None,
        null_label: int | None = None,
        *,
        teacher: Teacher,
        num_inference_steps: int,
    ) -> None:
        super().__init__(scheduler, config, null_label)
        self._teacher = teacher
        timesteps = teacher_timesteps(num_inference_steps, len(scheduler))
        steps = scheduler.noise_schedule.transition_columns(timesteps)
        # x_s = coef_x_0 x_0 + coef_x_t x_t in a step from t to s. Eq. 12, Song et al. 2021, eta = 0.
        of_teacher = np.stack(gaussian.reverse_mean_coefficients(steps, 0.0))
        steps = scheduler.noise_schedule.transition_columns(timesteps[::2])
        of_student = np.stack(gaussian.reverse_mean_coefficients(steps, 0.0))
        columns = np.concatenate([of_teacher[:, ::2], of_teacher[:, 1::2], of_student])
        # By timestep, so that no lookup needs a search. Others than the student's are used in warm-up only.
        table = np.repeat(columns[:, -1:], len(scheduler), axis=1)
        table[:, timesteps[::2]] = columns
        middle = np.zeros(len(scheduler), np.int64)
        middle[timesteps[::2]] = timesteps[1::2]
        self._coefficients, self._middle = torch.from_numpy(table), torch.from_numpy(middle)

    @property
    def frozen(self) -> list[UNet2DModel]:
        """The network of the teacher."""
        return [self._teacher.unet]

    def state_dict(self) -> dict[str, Any]:
        """Return the digest of the teacher for trainer_state.json."""
        return {"teacher_sha256": self._teacher.sha256}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the teacher is that of the checkpoint.

        Raises:
            ConfigError: It has other weights.
        """
        if state["teacher_sha256"] != self._teacher.sha256:
            raise ConfigError(
                "distillation.teacher has other weights than when this run began; restore them, or choose another "
                "training.output_dir."
            )

    @torch.no_grad()
    def _target(
        self,
        x_0: torch.Tensor,
        noise: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what the student is to predict. Algorithm 2, Salimans & Ho 2022."""
        if self._middle.device != x_t.device:
            self._coefficients, self._middle = self._coefficients.to(x_t.device), self._middle.to(x_t.device)
        rows = self._coefficients[:, timesteps].to(x_t.dtype).view(6, -1, 1, 1, 1)
        middle = self._middle[timesteps]
        predicted = self._teacher.predict_x_0(x_t, timesteps, class_labels)
        x_middle = rows[0] * predicted + rows[1] * x_t
        predicted = self._teacher.predict_x_0(x_middle, middle, class_labels)
        x_next = rows[2] * predicted + rows[3] * x_middle
        target = (x_next - rows[5] * x_t) / rows[4]
        if self._scheduler.config["prediction_type"] == "sample":
            return target
        alpha = self._scheduler.gather("sqrt_alphas_cumprod", timesteps, x_t)
        sigma = self._scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, x_t)
        return gaussian.velocity(target, gaussian.eps_from_x_0(x_t, target, alpha, sigma), alpha, sigma)


def load_teacher(
    config: RunConfig,
    scheduler: GaussianDiffusionScheduler,
    num_channels: int,
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    latents: Mapping[str, Any] | None = None,
) -> Teacher:
    """Collective: load distillation.teacher. Rank 0 reads it and the other ranks receive it.

    Args:
        config: The configuration of the student's run.
        scheduler: The forward process of the student.
        num_channels: Channels of an image.
        num_classes: Classes of the data, 0 for an unconditional student.
        device: Device of the teacher.
        autocast: Returns the context in which the network is called.
        latents: `latents_mean` and `latents_std` of the student, if its latents are measured.

    Raises:
        ConfigError: It cannot be loaded, or the student cannot learn from it.
    """
    distillation = config.distillation
    assert distillation.teacher is not None

    def read() -> Pretrained:
        found = load_network("distillation.teacher", str(distillation.teacher), distillation.revision)
        _check_teacher(found, config, scheduler, num_channels, num_classes)
        _check_latents(found, latents or {})
        return found

    found = distributed.on_rank_0(read)
    facts: dict[str, Any] = {}  # of rank 0
    if found is not None:
        assert found.scheduler is not None
        facts = {
            "unet": json_config(found.unet.config),
            "scheduler": json_config(found.scheduler.config),
            "null_label": found.unet.config["num_class_embeds"] - 1 if found.has_null_label else None,
            "sha256": _sha256_of(found.unet),
        }
    facts = distributed.broadcast_json(facts)
    unet = found.unet if found is not None else UNet2DModel.from_config(facts["unet"])
    unet.to(device).eval().requires_grad_(False)
    distributed.broadcast_tensors([*unet.parameters(), *unet.buffers()])
    process = GaussianDiffusionScheduler.from_config(facts["scheduler"])
    return Teacher(
        unet=unet,
        scheduler=process,
        null_label=facts["null_label"],
        guidance_scale=1.0 if process.config.get(DISTILLED_GUIDANCE) else distillation.guidance_scale,
        sha256=facts["sha256"],
        autocast=autocast,
    )


def json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of diffusers without its notes, which begin with an underscore."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _sha256_of(unet: UNet2DModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_teacher(
    teacher: Pretrained, config: RunConfig, scheduler: GaussianDiffusionScheduler, num_channels: int, num_classes: int
) -> None:
    """Raise ConfigError if a student of this configuration cannot learn from a teacher."""
    distillation, process = config.distillation, teacher.scheduler
    if process is None:
        raise ConfigError(f"{teacher.name} has no scheduler; give a run, a checkpoint or a pipeline.")
    if teacher.self_conditioned:
        raise ConfigError(
            f"{teacher.name} is self-conditioned, and a student has no earlier prediction to be conditioned on; choose "
            "a teacher without objective.self_conditioning."
        )
    if teacher.unet.config["in_channels"] != num_channels:
        raise ConfigError(
            f"{teacher.name} takes {teacher.unet.config['in_channels']} channels, but the images have {num_channels}; "
            "set data.num_channels to that of its training data."
        )
    _check_labels(teacher, config, num_classes)
    ours, theirs = (one.noise_schedule.alphas_cumprod for one in (scheduler, process))
    if len(ours) != len(theirs) or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
        raise ConfigError(
            f"{teacher.name} was trained with another noise schedule than that of diffusion; set "
            "diffusion.num_train_timesteps, beta_schedule and the other settings of the schedule to those of the "
            "teacher."
        )
    if process.config["prediction_type"] == "epsilon" and theirs[-1] < SMALLEST_ALPHA_BAR:
        raise ConfigError(
            f"{teacher.name} predicts epsilon, but its last timestep holds no signal, so x_0 cannot be recovered "
            "there; choose a teacher that predicts v_prediction or sample, or one without zero terminal SNR."
        )
    known = process.config.get(DEFAULT_STEPS)
    if isinstance(known, int) and known != 2 * distillation.num_inference_steps:
        raise ConfigError(
            f"{teacher.name} is a student that samples in {known} steps, but distillation.num_inference_steps "
            f"{distillation.num_inference_steps} needs a teacher of {2 * distillation.num_inference_steps}; "
            + (f"set it to {known // 2}." if known % 2 == 0 else "choose another teacher.")
        )


def _check_latents(teacher: Pretrained, latents: Mapping[str, Any]) -> None:
    """Raise ConfigError if the latents of a student are normalized otherwise than those of its teacher."""
    for name in ("latents_mean", "latents_std"):
        ours, theirs = latents.get(name), getattr(teacher, name)
        if (ours is None) != (theirs is None) or (ours is not None and not np.allclose(ours, theirs, 0.05, 0.05)):
            raise ConfigError(
                f"{teacher.name} was trained on latents of another {name.removeprefix('latents_')} than those of this "
                "run; set data.vae, data.latent_normalization and the data to those of the teacher."
            )


def _check_labels(teacher: Pretrained, config: RunConfig, num_classes: int) -> None:
    distillation = config.distillation
    theirs = int(teacher.unet.config["num_class_embeds"] or 0) - bool(teacher.has_null_label)
    if theirs != num_classes:
        has = f"has {theirs} classes" if theirs else "is unconditional"
        fix = "train on data with as many classes" if theirs and num_classes else "set model.class_conditional "
        fix += "" if theirs and num_classes else ("to true" if theirs else "to false")
        raise ConfigError(f"{teacher.name} {has}, but the student has {num_classes or 'none'}; {fix}.")
    assert teacher.scheduler is not None
    guidance_scale, known = distillation.guidance_scale, teacher.scheduler.config.get(DISTILLED_GUIDANCE, 1.0)
    if known not in (1, guidance_scale):
        raise ConfigError(
            f"{teacher.name} is a student with guidance of scale {known:g}, but distillation.guidance_scale is "
            f"{guidance_scale:g}; set it to {known:g}."
        )
    for name, value in (
        ("distillation.guidance_scale", guidance_scale != 1 and known == 1 and guidance_scale),
        ("objective.class_dropout", config.objective.class_dropout),
    ):
        if value and not teacher.has_null_label:
            raise ConfigError(
                f"{name} {value:g} needs a teacher that was also trained without labels, which {teacher.name} was not; "
                f"set it to {1 if name.endswith('scale') else 0}, or choose another teacher."
            )
