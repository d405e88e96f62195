"""`ddpm-hf sample`: draws images from any DDPM into a folder."""

import platform
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf import __version__
from ddpm_hf.commands.complaints import complain, out_of_memory
from ddpm_hf.commands.folders import commit_of, find_model, load_pipeline
from ddpm_hf.commands.overviews import grid, grid_of_edits, in_grid
from ddpm_hf.commands.picture_folder import PictureFolder
from ddpm_hf.commands.sample_flags import JUMP_LENGTH, NUM_RESAMPLES, STRENGTH, parse
from ddpm_hf.commands.sample_pictures import Picture, pictures_of
from ddpm_hf.commands.sampling_flags import CALL_FLAGS, NATIVE_SCHEDULER, check_scheduler
from ddpm_hf.commands.start_images import Image, fit, read_images, to_mask
from ddpm_hf.config import ConfigError
from ddpm_hf.plots import UInt8Array, denoising_strip, save_animation

if TYPE_CHECKING:
    import torch

    from ddpm_hf.diffusion import GaussianDiffusionPipeline

GRID, STRIP, ANIMATION = "grid.png", "strip.png", "animation.gif"
MOST_IN_STRIP, MOST_IN_ANIMATION, ANIMATION_COLUMNS = 8, 16, 4


def sample(arguments: Sequence[str]) -> int:
    """Draws the images, writes them, and returns the exit code."""
    options = parse(arguments)

    model = find_model(options.folder, options.revision)
    folder = PictureFolder(options.output, options.overwrite)
    images, masks = read_images(options.image or []), read_images(options.mask or [])

    with out_of_memory(f"lower --batch_size, which is {options.batch_size}"):
        work = _prepare(options, model, folder, images, masks)
        return _draw_all(work)


@dataclass(frozen=True)
class _Work:
    """What is drawn, from what, and where it goes.

    Attributes:
        num_steps: Steps that the scheduler makes, which may call the network more often than once for each asked for.
        starts: The given images, (number, height, width, channels) in [0, 1].
        masks: bool, one for all of them or one for each, (number, height, width).
        call: The keyword arguments of the pipeline that all images share.
    """

    options: Namespace
    pipeline: "GaussianDiffusionPipeline"
    folder: PictureFolder
    pictures: list[Picture]
    num_steps: int
    starts: NDArray[np.float32] | None
    masks: NDArray[np.bool_] | None
    call: dict[str, Any]


def _prepare(
    options: Namespace, model: Path | None, folder: PictureFolder, images: list[Image], masks: list[Image]
) -> _Work:
    """Loads the model, and refuses what does not fit before anything is written or drawn."""
    import torch

    from ddpm_hf.diffusion.denoising import Run
    from ddpm_hf.diffusion.editing import start_level
    from ddpm_hf.evaluation.image_shape import image_shape
    from ddpm_hf.evaluation.sampling import Sampler
    from ddpm_hf.rng import plain_generators

    device = _device(options.device)
    check_scheduler(options)
    loaded = load_pipeline(
        options.folder,
        model,
        dtype=getattr(torch, options.dtype),
        revision=options.revision,
        variant=options.variant,
    )
    sampler = Sampler(scheduler=options.scheduler, analytic_variance=options.variance == "analytic")
    pipeline = sampler.prepare(loaded.to(device))
    if options.image and type(pipeline.scheduler).__name__ != NATIVE_SCHEDULER:
        name = type(pipeline.scheduler).__name__
        raise ConfigError(
            f"--image needs {NATIVE_SCHEDULER}, and the model has {name}; add --scheduler {NATIVE_SCHEDULER}."
        )
    shape = image_shape(pipeline)
    fitted = [fit(image, path, shape) for image, path in zip(images, options.image or [], strict=True)]
    covers = [to_mask(mask, path, shape[:2]) for mask, path in zip(masks, options.mask or [], strict=True)]
    call = {name: getattr(options, name) for name in CALL_FLAGS}
    if options.mask and call["num_inference_steps"] is None:
        call["num_inference_steps"] = min(250, len(pipeline.scheduler))  # as the method does by itself
    pictures = pictures_of(options, pipeline)
    # What a call of the pipeline checks, it checks here once before the folder is touched.
    label = None if pictures[0].label is None else [pictures[0].label]
    run = Run(
        pipeline, 1, class_labels=label, generator=plain_generators(options.seeds[:1]), output_type="uint8", **call
    )
    if options.image and not options.mask:
        start_level(options.strength or STRENGTH, len(run.timesteps))
    return _Work(
        options=options,
        pipeline=pipeline,
        folder=folder,
        pictures=pictures,
        num_steps=len(run.timesteps),
        starts=np.stack(fitted) if fitted else None,
        masks=np.stack(covers) if covers else None,
        call=call,
    )


def _device(name: str | None) -> "torch.device":
    """Returns the device of that name, or the best one that there is.

    Raises:
        ConfigError: There is no such device.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if num_gpus else "mps" if has_mps else "cpu")
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise ConfigError(f"--device is {name}, but must be cpu, cuda, cuda:1 or mps.")
    if (name == "mps" and not has_mps) or (name.startswith("cuda") and int(match[1] or 0) >= num_gpus):
        gpus = f"{num_gpus} CUDA GPU{'s' if num_gpus != 1 else ''}" if num_gpus else "no CUDA GPU that torch can use"
        here = "no Apple GPU (mps) that torch can use" if name == "mps" else gpus
        raise ConfigError(f"--device is {name}, but this machine has {here}; give another, or leave it out.")
    return torch.device(name)


def _draw_all(work: _Work) -> int:
    """Draws and writes everything, and returns the exit code."""
    options, folder = work.options, work.folder
    others = [GRID, *([STRIP] if options.strip else []), *([ANIMATION] if options.animation else [])]
    folder.begin(_settings(work), [*(picture.name for picture in work.pictures), *others])
    wanted = set(in_grid(work.pictures))
    shown: dict[Picture, UInt8Array] = {}
    films: list[UInt8Array] = []
    try:
        for pictures, images, states in _batches(work):
            for picture, image in zip(pictures, images, strict=True):
                folder.write_pixels(picture.name, image)
                if picture in wanted:
                    shown[picture] = image
            if states is not None:
                films.append(states)
        _write_overviews(work, shown, films)
        folder.finish()
    except KeyboardInterrupt:
        num_written = sum((folder.path / picture.name).exists() for picture in work.pictures)
        complain(f"interrupted; {num_written} of {len(work.pictures)} images are in {folder.path}.")
        return 130
    if not work.pictures[0].name.endswith(".png"):
        print(
            f"A PNG cannot hold {work.pipeline.num_channels} channels, so each image is an array (height, width, "
            "channels), .npy."
        )
    number = f"{len(work.pictures)} image{'s' if len(work.pictures) != 1 else ''}"
    print(f"{number} in {folder.path}, from {work.pictures[0].name} on; look at {folder.path / GRID}.")
    return 0


def _batches(work: _Work) -> Iterator[tuple[list[Picture], UInt8Array, UInt8Array | None]]:
    """Draws the pictures a batch at a time; of the first ones also states on the way, (frames, number, ...)."""
    from ddpm_hf.evaluation.film import Film
    from ddpm_hf.rng import plain_generators

    options, pipeline, size = work.options, work.pipeline, work.options.batch_size
    num_filmed = max(MOST_IN_STRIP * options.strip, MOST_IN_ANIMATION * options.animation)
    for first in range(0, len(work.pictures), size):
        pictures = work.pictures[first : first + size]
        last = first + len(pictures)
        progress = f"Images {first + 1} to {last} of {len(work.pictures)}"
        pipeline.set_progress_bar_config(desc=progress, disable=None, leave=False)
        call = work.call | {
            "class_labels": None if pictures[0].label is None else [picture.label for picture in pictures],
            "generator": plain_generators([picture.seed for picture in pictures]),
            "output_type": "uint8",
        }
        film = None
        if work.starts is not None:
            images = _edited(work, [picture.source or 0 for picture in pictures], call)
        elif first < num_filmed:
            film = Film(work.num_steps)
            start = film.begin(pipeline, call["generator"])
            images = pipeline(sample=start, callback_on_step_end=film, **call).images
        else:
            images = pipeline(batch_size=len(pictures), **call).images
        yield pictures, images, None if film is None else film.states()[:, : num_filmed - first]


def _edited(work: _Work, sources: list[int], call: dict[str, Any]) -> Any:
    """Draws one batch from given images."""
    options, pipeline = work.options, work.pipeline
    assert work.starts is not None
    images = work.starts[sources]
    if work.masks is None:
        return pipeline.denoise_from(images, options.strength or STRENGTH, **call).images
    masks = work.masks[[source % len(work.masks) for source in sources]]
    resampling = (options.num_resamples or NUM_RESAMPLES, options.jump_length or JUMP_LENGTH)
    return pipeline.inpaint(images, masks, *resampling, **call).images


def _write_overviews(work: _Work, shown: dict[Picture, UInt8Array], films: list[UInt8Array]) -> None:
    """Writes the grid and, where asked for, the way from noise."""
    overview = grid(shown) if work.starts is None else grid_of_edits(shown, work.starts, work.masks)
    work.folder.write(GRID, lambda path: overview.save(path, "PNG"))
    if not films:
        return
    states = np.concatenate(films, axis=1)
    if work.options.strip:
        strip = denoising_strip(states[:, :MOST_IN_STRIP])
        work.folder.write(STRIP, lambda path: strip.save(path, "PNG"))
    if work.options.animation:
        filmed = states[:, :MOST_IN_ANIMATION]
        columns = min(ANIMATION_COLUMNS, filmed.shape[1])
        work.folder.write(ANIMATION, lambda path: save_animation(filmed, path, num_columns=columns))


def _settings(work: _Work) -> dict[str, Any]:
    """Returns everything that the pictures depend on, as JSON can hold it."""
    from ddpm_hf.evaluation.fingerprint import fingerprint

    options, pipeline, scheduler = work.options, work.pipeline, work.pipeline.scheduler
    settings = {
        "model": options.folder,
        "revision": options.revision,
        "variant": options.variant,
        "commit": commit_of(pipeline),
        "sha256": fingerprint(pipeline),
        "scheduler": type(scheduler).__name__,
        **work.call,
        "num_inference_steps": work.call["num_inference_steps"] or int(scheduler.config["num_train_timesteps"]),
        "timestep_spacing": options.timestep_spacing or scheduler.config.get("timestep_spacing"),
        "variance": options.variance,
        "dtype": options.dtype,
        "device": str(pipeline.device),
        "batch_size": options.batch_size,
    }
    if options.image:
        settings["image"] = [str(path) for path in options.image]
        if options.mask:
            settings["mask"] = [str(path) for path in options.mask]
            settings["num_resamples"] = options.num_resamples or NUM_RESAMPLES
            settings["jump_length"] = options.jump_length or JUMP_LENGTH
        else:
            settings["strength"] = options.strength or STRENGTH
    libraries = ("torch", "diffusers", "numpy", "pillow")
    pictures = [
        {"file": picture.name, "seed": picture.seed}
        | ({} if picture.label is None else {"label": picture.label, "class_name": picture.class_name})
        | ({} if picture.source is None else {"image": str(options.image[picture.source])})
        for picture in work.pictures
    ]
    return settings | {
        "versions": {"python": platform.python_version(), "ddpm_hf": __version__}
        | {library: version(library) for library in libraries},
        "images": pictures,
    }
