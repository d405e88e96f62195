"""Samples by any scheduler, one seed an image; a sample folder that an interrupted evaluation continues.

How large the images of a pipeline are.

The way from noise, kept as 8-bit pictures of some states while images are drawn.

Images from a pipeline, one seed an image: image i is a function of (seed, i) in any batch and on any process.

The bits are the same on any process. Another batch size changes the last digits of the sums in a network, which can
move a value by one gray level in float32, and by several in half precision.

What tells a pipeline from others: a hash of everything that its samples depend on.

Samples in a folder: written in parts while they are drawn, so that a killed evaluation goes on where it was.

    settings.json                     what the images depend on
    parts/00000000-00000064.npy       a batch, until all are there
    samples.npy                       uint8 (number, height, width, channels), in the end
    png/000000.png                    the same as pictures, if asked for

Every file is written under another name and renamed. Since image i depends on (seed, i) alone, a finished folder can be
extended to more images, and gives its first ones where fewer are asked for.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
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

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.images import image_size, to_images
from ddpm_hf.diffusion.pipeline import did_you_mean
from ddpm_hf.distributed import ALONE, Ranks
from ddpm_hf.files import write_text, write_whole
from ddpm_hf.plots import UInt8Array
from ddpm_hf.rng import sampling_generators


def image_shape(pipeline: GaussianDiffusionPipeline) -> tuple[int, int, int]:
    """Returns height, width and channels of the images that a pipeline samples.

    Raises:
        ValueError: The configuration of the network does not tell its size.
    """
    return (*image_size(pipeline.unet), pipeline.num_channels)


NUM_FRAMES = 40


class Film:
    """Keeps some states of a run as 8-bit pictures, since all of them might not fit into memory."""

    def __init__(self, num_steps: int) -> None:
        count = min(num_steps + 1, NUM_FRAMES)
        self._wanted = {round(frame * num_steps / (count - 1)) for frame in range(count)}
        self._states: list[UInt8Array] = []

    def begin(self, pipeline: GaussianDiffusionPipeline, generators: list[torch.Generator]) -> torch.Tensor:
        """Draws the start noise, as a call of the pipeline would, and returns it."""
        height, width, channels = image_shape(pipeline)
        dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
        shape = (len(generators), channels, height, width)
        noise: torch.Tensor = randn_tensor(shape, generator=generators, device=pipeline.device, dtype=dtype)
        self._keep(noise)
        return noise

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Is called after each step of the run."""
        if step + 1 in self._wanted:
            self._keep(tensors["sample"])
        return {}

    def states(self) -> UInt8Array:
        """Returns what was kept, (frames, number, height, width, channels)."""
        return np.stack(self._states)

    def _keep(self, sample: torch.Tensor) -> None:
        self._states.append(to_images(sample, "uint8"))


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
        return pipeline.check_inputs(**self._call(pipeline, 0, range(1)))

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
        meant = did_you_mean(name, known, cutoff=0.8)  # all names end alike, so any two are a little similar
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


def fingerprint(pipeline: GaussianDiffusionPipeline) -> str:
    """Returns the sha256 of weights and configurations, and of second moments that are in use.

    It is the same on any device, before and after saving, and another one in another precision.
    """
    digest = hashlib.sha256()
    scheduler = pipeline.scheduler
    own = {name: pipeline.config.get(name) or None for name in ("class_names", "has_null_label", "self_conditioned")}
    for config in (pipeline.unet.config, scheduler.config, own, {"scheduler": type(scheduler).__name__}):
        digest.update(_as_json(config))
    tensors = dict(pipeline.unet.state_dict())
    if getattr(scheduler, "analytic_variance", False):
        tensors["eps_second_moments"] = scheduler.eps_second_moments
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_json(config: Mapping[str, Any]) -> bytes:
    """Returns the settings of a configuration without the names and versions that diffusers adds."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.dumps(settings, sort_keys=True, default=str).encode()


SCHEMA_VERSION = 1
SETTINGS, SAMPLES, PARTS, PICTURES = "settings.json", "samples.npy", "parts", "png"
_PART_NAME = re.compile(r"(\d{8})-(\d{8})\.npy")
_CHANNELS_OF_PNG = (1, 3, 4)


def settings_of(
    pipeline: GaussianDiffusionPipeline, sampler: Sampler, seed: int, batch_size: int | None = None
) -> dict[str, Any]:
    """Returns everything that samples depend on, as JSON can hold it; the device, as each kind draws other noise.

    The batch size is a setting in half precision alone, where sums that depend on it move a value by several gray
    levels.

    Args:
        pipeline: What `Sampler.prepare` returned.
        sampler: How to sample.
        seed: Image i is drawn from (seed, i).
        batch_size: Images sampled at once.
    """
    is_half = pipeline.unet.dtype in (torch.float16, torch.bfloat16)
    return {
        "schema_version": SCHEMA_VERSION,
        "pipeline": fingerprint(pipeline),
        "seed": seed,
        **sampler.to_dict(pipeline),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
    } | ({"batch_size": batch_size} if is_half else {})


def sample_to_folder(
    pipeline: GaussianDiffusionPipeline,
    sampler: Sampler,
    folder: Path,
    *,
    seed: int,
    num_images: int,
    batch_size: int = 64,
    as_png: bool = False,
    ranks: Ranks = ALONE,
) -> Images:
    """Collective: samples images into a folder, each process its batches, and goes on where an earlier call was killed.

    Args:
        pipeline: What `Sampler.prepare` returned.
        sampler: How to sample.
        folder: New, or begun by this function with the same settings; all processes see the same.
        seed: Image i is drawn from (seed, i).
        num_images: How many.
        batch_size: Images sampled at once by a process; the same batches give the same bits. In half precision it is
            one of the settings of the folder.
        as_png: Write each image as a PNG too.
        ranks: The processes.

    Returns:
        uint8 (num_images, height, width, channels), memory-mapped.

    Raises:
        ValueError: The folder holds something else or samples of other settings, or PNG has no such channels.
        OSError: The disk does not take the images.
    """
    shape, settings = image_shape(pipeline), settings_of(pipeline, sampler, seed, batch_size)
    check_channels(shape, as_png=as_png)
    ranks.on_rank_0(lambda: _open(folder, settings))
    # Of the others' views of the folder, some may already have further parts.
    done = _done(folder, num_images, shape) if ranks.rank == 0 else np.zeros(0, bool)
    missing = ~ranks.gather(done)
    mine = batches(missing, batch_size)[ranks.rank :: ranks.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(
        total=sum(map(len, mine)), desc="Sampling", unit="img", disable=True if ranks.rank else None, leave=False
    ) as bar:
        for batch in mine:
            images = sampler.sample(pipeline, seed, batch)
            write_whole(folder / PARTS / f"{batch.start:08d}-{batch.stop:08d}.npy", partial(_save, images))
            bar.update(len(batch))
    ranks.gather(np.zeros(1))  # until all parts are there
    ranks.on_rank_0(lambda: _join(folder, num_images, shape))
    samples = _samples(folder)
    if as_png:
        _write_pictures(folder / PICTURES, samples, ranks.part(num_images))
    return samples[:num_images]


def check_channels(shape: tuple[int, int, int], *, as_png: bool) -> None:
    """Refuses pictures of images (height, width, channels) that no PNG can hold.

    Raises:
        ValueError: With what to do.
    """
    if as_png and shape[2] not in _CHANNELS_OF_PNG:
        raise ValueError(f"a PNG has 1, 3 or 4 channels, but the images have {shape[2]}; keep samples.npy alone.")


def check_folder(folder: Path, settings: dict[str, Any], *, undecided: Collection[str] = ()) -> None:
    """Makes sure that a folder is new or empty, or was begun with the same settings; touches nothing.

    Args:
        folder: For samples.
        settings: What `settings_of` returns.
        undecided: Settings that are not known yet and may be anything.

    Raises:
        ValueError: The folder holds something else or samples of other settings.
    """
    path = folder / SETTINGS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds no samples, but something else; choose a new or an empty folder.")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        raise ValueError(f"{path} is damaged; remove {folder} to sample anew, or choose another folder.") from None
    for name in dict.fromkeys((*settings, *before)):
        if name not in undecided and (old := before.get(name)) != (new := settings.get(name)):
            raise ValueError(
                f"{folder} holds samples of other settings ({name} was {_shown(old)}, is {_shown(new)}); restore that, "
                "or choose another folder."
            )


def _open(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or makes sure that what it holds was begun with the same settings."""
    check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    (folder / PARTS).mkdir(exist_ok=True)


def _shown(value: object) -> str:
    """Returns a setting as a person wants to see it: a hash by its beginning."""
    text = json.dumps(value)
    return text if len(text) <= 50 else f"{text[:13]}…"


def _done(folder: Path, num_images: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Returns which images are there; a file that is damaged is removed."""
    done = np.zeros(num_images, bool)
    if (folder / SAMPLES).exists():
        done[: len(_samples(folder))] = True
    for path, images in _parts(folder):
        if _load(path, (len(images), *shape)) is not None:
            done[images.start : images.stop] = True
        else:
            path.unlink()
    return done


def _parts(folder: Path) -> list[tuple[Path, range]]:
    """Returns the files of batches, and which images they hold; of what a kill left half written, none."""
    found = []
    for path in sorted((folder / PARTS).iterdir()):
        match = _PART_NAME.fullmatch(path.name)
        found.append((path, range(*map(int, match.groups())) if match else range(0)))
    return found


def _load(path: Path, shape: tuple[int, ...]) -> Images | None:
    """Maps the images of a file; None if it is damaged or of another shape."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError):
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None


def _samples(folder: Path) -> Images:
    """Maps the finished images."""
    path = folder / SAMPLES
    try:
        samples: Images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); remove it to sample anew. Of several machines, all need to see the same "
            "folder."
        ) from None
    return samples


def _save(images: Images, path: Path) -> None:
    """Writes an array under exactly this name."""
    with path.open("wb") as file:
        np.save(file, images)


def _join(folder: Path, num_images: int, shape: tuple[int, ...]) -> None:
    """Joins what is there into one file, and removes the parts that it holds whole."""
    path, parts = folder / SAMPLES, _parts(folder)
    old = _samples(folder) if path.exists() else np.zeros((0, *shape), np.uint8)
    if len(old) < num_images:

        def write(temporary: Path) -> None:
            joined = np.lib.format.open_memmap(temporary, "w+", np.uint8, (num_images, *shape))
            joined[: len(old)] = old
            for part, images in parts:
                stop = max(images.start, min(images.stop, num_images))
                joined[images.start : stop] = np.load(part, allow_pickle=False)[: stop - images.start]
            joined.flush()

        write_whole(path, write)
    for part, images in parts:
        if images.stop <= num_images:
            part.unlink()
    if not any((folder / PARTS).iterdir()):
        (folder / PARTS).rmdir()


def _write_pictures(folder: Path, samples: Images, indices: range) -> None:
    """Writes those PNG files that are not there."""
    folder.mkdir(exist_ok=True)
    for index in tqdm(indices, "Writing PNG", disable=None, leave=False):
        path = folder / f"{index:06d}.png"
        if not path.exists():
            pixels = samples[index]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            write_whole(path, partial(picture.save, format="PNG"))
