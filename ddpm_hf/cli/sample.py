"""`ddpm-hf sample`: sample images from any DDPM into a folder.

settings.json                     everything the images depend on, and the names of all files of this call
seed_000007_cat.png               one image; .npy with --format npy, or if PNG cannot hold its channels
grid.png  strip.png  animation.gif
"""

import math
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_hf import __version__
from ddpm_hf.cli.common import commit_of, find_device, find_folder, load_pipeline, out_of_memory_advice, print_error
from ddpm_hf.cli.flags import (
    CALL_FLAGS,
    CompilationFlags,
    ModelFlags,
    Parser,
    SamplingFlags,
    flag,
    read_flags,
)
from ddpm_hf.config import (
    NATIVE_SCHEDULER,
    ConfigError,
    DataConfig,
    log_warning,
    read_launcher,
    warn_of_training_flags,
)
from ddpm_hf.files import SAMPLING_SETTINGS, atomic_write, format_count, read_json, save_array, write_json
from ddpm_hf.plots import UInt8Array, as_drawn, denoising_strip, image_grid, save_animation

if TYPE_CHECKING:
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.diffusion.pipeline import ClassNumbers
    from ddpm_hf.model_folder import ModelFolder

ImageArray: TypeAlias = NDArray[np.float32]
"""An image in [0, 1], (height, width, channels)."""

GRID, STRIP, ANIMATION = "grid.png", "strip.png", "animation.gif"
SCHEMA_VERSION = 1  # of settings.json
PNG_CHANNELS = (1, 3, 4)
MAX_SEEDS, SEED_LIMIT = 1_000_000, 2**64
NUM_IMAGES, STRENGTH, NUM_RESAMPLES, JUMP_LENGTH = 16, 0.5, 10, 10
MAX_IN_GRID, MAX_COLUMNS, MAX_ROWS = 100, 20, 10
MAX_IN_STRIP, MAX_IN_ANIMATION, ANIMATION_COLUMNS = 8, 16, 4
MASK_GRAY = 127  # color of the masked region in the grid

_EXAMPLES = """examples:
  ddpm-hf sample google/ddpm-cifar10-32
  ddpm-hf sample google/ddpm-cifar10-32 --scheduler ddim --num_inference_steps 50
  ddpm-hf sample outputs/digits --labels 3,8 --seeds 0-15 --strip --animation --output threes_and_eights
  ddpm-hf sample user/model --revision v1.0 --seeds 7 --dtype bfloat16 --device cuda:1
  ddpm-hf sample user/model --image cat.png --strength 0.4 --seeds 0-3 --output variants
  ddpm-hf sample user/model --image cat.png --mask hole.png --num_inference_steps 50 --output filled"""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Images and output.

    Args:
        seeds: One image per seed: a list such as 7,8,9, a range such as 0-15, or both.
        seed: First of --num_images consecutive seeds; by default 0.
        num_images: Number of images; by default 16, or 1 per --image.
        output: New folder for the images.
        overwrite: Replace the images of an earlier call in that folder, and nothing else.
        format: png; npy: arrays (height, width, channels), uint8, or float32 in the value range of the model if it has
            one; by default png, if it can hold the channels, of which four are transparency without a value range.
        strip: Also write strip.png, the denoising trajectory of the first images.
        animation: Also write animation.gif, the same as an animation.
    """

    seeds: str | None = None
    seed: int | None = flag(None, minimum=0, maximum=SEED_LIMIT - 1)
    num_images: int | None = flag(None, minimum=1, maximum=MAX_SEEDS)
    output: Path = Path("samples")
    overwrite: bool = False
    format: Literal["png", "npy"] | None = None
    strip: bool = False
    animation: bool = False


@dataclass(frozen=True, kw_only=True)
class EditingFlags:
    """Editing of given images.

    Args:
        image: Images to noise part of the way and denoise (SDEdit).
        strength: Fraction of the way, above 0, at most 1; by default 0.5.
        mask: Inpaint the white part of these masks instead: one for all images or one for each.
        num_resamples: Resampling steps of inpainting; by default 10.
        jump_length: Jump length of inpainting in steps; by default 10.
    """

    image: list[Path] | None = None
    strength: float | None = None
    mask: list[Path] | None = None
    num_resamples: int | None = flag(None, minimum=1)
    jump_length: int | None = flag(None, minimum=1)


@dataclass(frozen=True, kw_only=True)
class SampleFlags(ModelFlags, OutputFlags, SamplingFlags, EditingFlags, CompilationFlags):
    """Device, and defaults of sampling.

    Args:
        device: cpu, cuda, cuda:1 or mps; by default a GPU if there is one.
        scheduler: unipc, dpm++, ddim, ddpm, deis, heun, euler, euler_a, dpm2, dpm2_a, lms, pndm, sa, or the name of a
            class of diffusers; by default unipc, or ddim where unipc cannot be used.
        num_inference_steps: Sampling steps; by default 20, or 50 with ddim, 250 with --mask, and all of the training
            with ddpm. A distilled model has its own default.
    """

    device: str | None = None
    scheduler: str | None = None
    num_inference_steps: int | None = flag(None, minimum=1)

    def check(self) -> None:
        """Refuse contradictions, and warn about flags without effect."""
        self.check_compilation()
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"--strength is {self.strength}, but must be above 0 and at most 1.")
        if self.mask and not self.image:
            raise ConfigError("--mask needs an image to inpaint; give --image too, or remove it.")
        if self.mask and self.image and len(self.mask) not in (1, len(self.image)):
            raise ConfigError(
                f"--mask names {len(self.mask)} files for {len(self.image)} images; give one for all or one for each."
            )
        if self.image and self.scheduler not in (None, NATIVE_SCHEDULER):
            raise ConfigError(f"--image needs {NATIVE_SCHEDULER}; remove --scheduler {self.scheduler}.")
        for name in ("strip", "animation"):
            if self.image and getattr(self, name):
                raise ConfigError(f"--{name} shows sampling from noise, but --image starts from images; remove one.")
        for name in ("seed", "num_images"):
            if self.seeds is not None and getattr(self, name) is not None:
                raise ConfigError(f"--seeds and --{name} both set the seeds; remove one of them.")
        for name in ("num_resamples", "jump_length"):
            if getattr(self, name) is not None and not self.mask:
                log_warning(f"--{name} {getattr(self, name)} has no effect without --mask.")
        if self.strength is not None and (self.mask or not self.image):
            log_warning(
                f"--strength {self.strength} has no effect {'with --mask' if self.mask else 'without --image'}."
            )

    def with_defaults(self, pipeline: "GaussianDiffusionPipeline") -> "SampleFlags":
        """Return the flags with the scheduler, eta and number of steps that a pipeline is sampled with."""
        from ddpm_hf.evaluation.generate import default_sampling

        if self.mask:  # the defaults of `inpaint`
            num_steps = self.num_inference_steps or min(250, int(pipeline.scheduler.config["num_train_timesteps"]))
            return replace(self, num_inference_steps=num_steps)
        names = ("scheduler", "num_inference_steps", "eta", "timestep_spacing")
        given = {name: getattr(self, name) for name in names}
        needs_native = bool(self.image) or self.variance == "analytic"
        return replace(self, **default_sampling(pipeline, **given, needs_native=needs_native))

    def seed_list(self) -> list[int]:
        """Return the seeds, all different, in the order given."""
        if self.seeds is None:
            first, number = self.seed or 0, self.num_images or (1 if self.image else NUM_IMAGES)
            if first + number > SEED_LIMIT:
                raise ConfigError(f"--seed {first} with {number} images exceeds the largest seed, {SEED_LIMIT - 1}.")
            return list(range(first, first + number))
        seeds: list[int] = []
        for part in self.seeds.split(","):
            match = re.fullmatch(r"\s*(\d{1,20})(?:\s*-\s*(\d{1,20}))?\s*", part, re.ASCII)
            if not match:
                raise ConfigError(f"--seeds has {part!r}; give whole numbers from 0 and ranges, such as 7,8,9 or 0-15.")
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last or last >= SEED_LIMIT or last - first + len(seeds) >= MAX_SEEDS:
                raise ConfigError(
                    f"--seeds has {part!r}; ranges must increase, up to {SEED_LIMIT - 1}, with at most {MAX_SEEDS:,} "
                    "seeds in total."
                )
            seeds.extend(range(first, last + 1))
        ((seed, number),) = Counter(seeds).most_common(1)
        if number > 1:
            raise ConfigError(f"--seeds has {seed} twice, which would give the same image twice; remove one.")
        return seeds


def parse(arguments: Sequence[str]) -> SampleFlags:
    """Parse and check the command line."""
    parser = Parser(
        prog="ddpm-hf sample",
        description="Sample images from any DDPM: a folder or a Hub repository. A seed gives the same image in any\n"
        "batch, and in Python with a generator of that seed.",
        epilog=_EXAMPLES,
    )
    flags = read_flags(parser, SampleFlags, arguments).checked_sampling()
    flags.check()
    flags.seed_list()
    return flags


def sample(arguments: Sequence[str]) -> int:
    """Sample and write the images, and return the exit code."""
    flags = parse(arguments)
    launcher = read_launcher()
    if (num_processes := os.environ.get("WORLD_SIZE", "1")) != "1" and "LOCAL_RANK" in os.environ:
        raise ConfigError(
            f"ddpm-hf sample runs in one process, but the launcher started {num_processes}; start one, with other "
            "--seeds for each GPU, or use ddpm-hf evaluate."
        )
    warn_of_training_flags(launcher)
    model = find_folder(flags.folder, flags.revision)
    output = OutputFolder(flags.output, flags.overwrite)
    images = read_images(flags.image or [])
    masks = [
        to_unit_range(mask, path) for mask, path in zip(read_images(flags.mask or []), flags.mask or [], strict=True)
    ]
    with out_of_memory_advice(f"lower --batch_size, which is {flags.batch_size}"):
        return _sample_all(_prepare(flags, model, images, masks), output)


# -------------------------------------------------------------------------------------------------- the output folder


class OutputFolder:
    """The folder of one call: new, empty, or with `overwrite` that of an earlier call, of which files are replaced."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path.expanduser()
        self._settings: dict[str, Any] = {}
        self._old_files: list[str] = []
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file; give a new folder.")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not overwrite:
            raise ConfigError(
                f"--output {self.path} is not empty; choose another folder, or give --overwrite to replace the images "
                "of an earlier call."
            )
        try:
            names = [str(name) for name in read_json(self.path / SAMPLING_SETTINGS)["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output {self.path} contains files of another origin (there is no {SAMPLING_SETTINGS} that lists "
                "them); choose another folder."
            ) from None
        self._old_files = [name for name in names if Path(name).name == name]

    def begin(self, settings: dict[str, Any], files: Sequence[str]) -> None:
        """Remove the files of an earlier call, and write the settings of this one and the files it may write."""
        for name in files:
            if name not in self._old_files and (self.path / name).exists():
                raise ConfigError(f"{self.path / name} is not from an earlier call; move it, or change --output.")
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self._old_files:  # the settings that list them are replaced last, so a killed call can be repeated
            (self.path / name).unlink(missing_ok=True)
        self._settings = {"schema_version": SCHEMA_VERSION, "finished": False} | settings | {"files": list(files)}
        write_json(self.path / SAMPLING_SETTINGS, self._settings)

    def finish(self) -> None:
        """Mark the settings as finished."""
        write_json(self.path / SAMPLING_SETTINGS, self._settings | {"finished": True})

    def write_pixels(self, name: str, pixels: NDArray[Any]) -> None:
        """Write one image (height, width, channels) as PNG or .npy, as its name says."""
        if name.endswith(".npy"):
            save_array(self.path / name, pixels)
        else:
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            self.write(name, lambda path: picture.save(path, "PNG"))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file atomically."""
        atomic_write(self.path / name, write)


def overviews_in(folder: Path) -> set[str]:
    """Return the names of grid, strip and animation in a folder of `sample`; empty for other folders."""
    try:
        settings = read_json(folder / SAMPLING_SETTINGS)
        return set(settings["files"]) - {image["file"] for image in settings["images"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@dataclass(frozen=True)
class Picture:
    """One image to sample."""

    name: str  # of its file
    seed: int
    label: int | None  # None without classes
    class_name: str | None
    source: int | None  # index of the given image that it starts from; None starts from noise


def pictures_of(flags: SampleFlags, pipeline: "GaussianDiffusionPipeline") -> list[Picture]:
    """Return one picture per seed, or per given image and seed."""
    seeds, labels, class_names = flags.seed_list(), flags.label_list(pipeline), pipeline.config.get("class_names") or {}
    is_picture = pipeline.num_channels in (PNG_CHANNELS[:2] if pipeline.config.get("value_range") else PNG_CHANNELS)
    ending = flags.format or ("png" if is_picture else "npy")
    if ending == "png" and pipeline.num_channels not in PNG_CHANNELS:
        raise ConfigError(f"--format png cannot hold {pipeline.num_channels} channels; use npy, or remove it.")
    stems = [_as_file_name(path.stem) for path in flags.image or []]
    if len({stem.casefold() for stem in stems}) < len(stems):
        stems = [f"{index}_{stem}" for index, stem in enumerate(stems)]
    pictures = []
    for source, stem in enumerate(stems) if stems else [(None, None)]:
        for seed in seeds:
            label = labels[seed % len(labels)] if labels else None
            class_name = None if label is None else class_names.get(str(label))
            if label is not None and label == pipeline.num_classes:
                class_name = "no class"
            words = [stem, f"seed_{seed:06d}"]
            if label is not None:
                words.append(_as_file_name(class_name) if class_name else f"label_{label}")
            name = f"{'_'.join(word for word in words if word)}.{ending}"
            pictures.append(Picture(name, seed, label, class_name, source))
    if flags.labels is not None and labels:
        used = {picture.label for picture in pictures}
        if unused := [class_names.get(str(label), str(label)) for label in dict.fromkeys(labels) if label not in used]:
            print(f"note: no seed has label {', '.join(unused)}; seed s has label s modulo {len(labels)} of the list.")
    return pictures


def _as_file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)[:40]


# ------------------------------------------------------------------------------------------------------ given images


def read_images(paths: Sequence[Path]) -> list[NDArray[Any]]:
    """Read image files, and .npy files, to (height, width, channels), without loss of channels or precision."""
    from ddpm_hf.data.decode import MODE_OF_CHANNELS, EncodedImage, Geometry, OutputFormat, decode, read_header

    images = []
    for path in paths:
        if path.suffix.lower() == ".npy":
            images.append(_read_array(path))
            continue
        encoded = EncodedImage(str(path), path.expanduser())
        header = read_header(encoded)
        num_channels = next((number for number, mode in MODE_OF_CHANNELS.items() if mode == header.mode), None)
        target = OutputFormat(num_channels or int(header.mode), np.dtype(header.dtype), None, Geometry.of(DataConfig()))
        images.append(decode(encoded, target).transpose(1, 2, 0))
    return images


def _read_array(path: Path) -> NDArray[Any]:
    """Read an array of numbers, (height, width, channels) or (height, width)."""
    try:
        pixels: NDArray[Any] = np.load(path.expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as an array ({error}).") from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.size == 0 or pixels.dtype.kind not in "uif":
        raise ConfigError(
            f"{path} has {pixels.dtype} of shape {pixels.shape}, but an image must be numbers of shape (height, width, "
            "channels)."
        )
    return pixels


def to_unit_range(pixels: NDArray[Any], path: Path, value_range: Sequence[float] | None = None) -> ImageArray:
    """Map an image to [0, 1].

    Args:
        pixels: (height, width, channels): uint8; without a value range also uint16, or floats in [0, 1]; with one,
            other numbers are values in it.
        path: Its file.
        value_range: That of the model.
    """
    if pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and value_range is None):
        low, high = 0.0, float(np.iinfo(pixels.dtype.name).max)
    elif value_range is not None:
        low, high = value_range
    elif pixels.dtype.kind == "f":
        low, high = 0.0, 1.0
    else:
        raise ConfigError(f"{path} has {pixels.dtype} values, but an image must be uint8, uint16 or float in [0, 1].")
    unit = (pixels - np.float64(low)) / (high - low)
    if not (unit.min() >= -1e-6 and unit.max() <= 1 + 1e-6):
        limits = "floats must be in [0, 1]" if value_range is None else f"those of the model are in [{low:g}, {high:g}]"
        raise ConfigError(f"{path} has values from {pixels.min():g} to {pixels.max():g}, but {limits}.")
    image: ImageArray = unit.clip(0, 1).astype(np.float32)
    return image


def fit(image: ImageArray, path: Path, shape: tuple[int, int, int]) -> ImageArray:
    """Convert an image to the (height, width, channels) of a network, if that loses no color or transparency."""
    height, width, want = shape
    if image.shape[:2] != (height, width):
        raise ConfigError(
            f"{path} has {image.shape[1]}x{image.shape[0]} pixels, but the model has {width}x{height}; resize or "
            "crop it."
        )
    have = image.shape[2]
    if have == 4 and want in (1, 3) and (image[..., 3] == 1).all():
        image = image[..., :3]
    if image.shape[2] == 3 and want == 1 and (image == image[..., :1]).all():
        image = image[..., :1]
    if image.shape[2] == 1 and want in (3, 4):
        image = np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and want == 4:
        image = np.concatenate([image, np.ones_like(image[..., :1])], axis=2)
    if image.shape[2] != want:
        lost = {(4, 3): ", partly transparent", (4, 1): ", partly transparent", (3, 1): " with colors"}
        raise ConfigError(
            f"{path} has {format_count(have, 'channel')}{lost.get((have, want), '')}, but the model has {want}; "
            "convert it."
        )
    return image


def to_mask(image: ImageArray, path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where a mask is white and opaque, (height, width)."""
    if image.shape[:2] != size:
        raise ConfigError(
            f"{path} has {image.shape[1]}x{image.shape[0]} pixels, but the images have {size[1]}x{size[0]}; resize it."
        )
    if image.shape[2] == 4:
        image = image * image[..., -1:]
    white: NDArray[np.bool_] = image[..., :3].mean(axis=2) >= 0.5
    return white


# ----------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class _Work:
    """Everything that is sampled."""

    flags: SampleFlags
    pipeline: "GaussianDiffusionPipeline"
    pictures: list[Picture]
    starts: NDArray[np.float32] | None  # the given images, (number, height, width, channels) in [0, 1]
    masks: NDArray[np.bool_] | None  # one for all of them or one for each, (number, height, width)
    call: dict[str, Any]  # arguments of the pipeline that all images share
    step: int | None  # of a checkpoint

    @property
    def value_range(self) -> Sequence[float] | None:
        """The value range of the model."""
        value_range: Sequence[float] | None = self.pipeline.config.get("value_range")
        return value_range


def _prepare(
    flags: SampleFlags, model: "ModelFolder | None", images: list[NDArray[Any]], masks: list[ImageArray]
) -> _Work:
    """Load the model, and check everything before a folder is created."""
    import torch

    from ddpm_hf.diffusion.editing import start_level
    from ddpm_hf.distributed import keep_freed_memory
    from ddpm_hf.evaluation.generate import Sampler, check_step, image_shape
    from ddpm_hf.rng import plain_generators

    device = find_device(flags.device)
    if device.type == "cpu":
        keep_freed_memory()
    flags.check_scheduler()
    dtype = getattr(torch, flags.dtype)
    loaded = load_pipeline(flags.folder, model, dtype=dtype, revision=flags.revision, variant=flags.variant)
    flags = flags.with_defaults(loaded)
    sampler = Sampler(
        scheduler=flags.scheduler,
        timestep_spacing=flags.timestep_spacing,
        analytic_variance=flags.variance == "analytic",
    )
    pipeline = sampler.prepare(loaded.to(device))
    flags.set_up_network(pipeline)
    scheduler_name = type(pipeline.scheduler).__name__
    if flags.image and scheduler_name != NATIVE_SCHEDULER:
        raise ConfigError(
            f"--image needs {NATIVE_SCHEDULER}, but the model has {scheduler_name}; add --scheduler {NATIVE_SCHEDULER}."
        )
    shape, value_range = image_shape(pipeline), pipeline.config.get("value_range")
    fitted = [
        fit(to_unit_range(image, path, value_range), path, shape)
        for image, path in zip(images, flags.image or [], strict=True)
    ]
    covers = [to_mask(mask, path, shape[:2]) for mask, path in zip(masks, flags.mask or [], strict=True)]
    call = {name: getattr(flags, name) for name in CALL_FLAGS}
    if scheduler_name != NATIVE_SCHEDULER and flags.timestep_spacing != "optimized":
        call["timestep_spacing"] = None  # `prepare` has set it
    if (guide := flags.load_guide(pipeline)) is not None:
        call["guide"] = guide
    pictures = pictures_of(flags, pipeline)
    generator = plain_generators([pictures[0].seed])
    num_steps = pipeline.check_inputs(
        class_labels=_labels_of(pictures[:1]), generator=generator, output_type="uint8", **call
    )
    check_step(pipeline)
    if flags.image and not flags.mask:
        start_level(flags.strength or STRENGTH, num_steps)
    starts, cover = np.stack(fitted) if fitted else None, np.stack(covers) if covers else None
    batch = pictures[: flags.batch_size]
    flags.compile_network(pipeline, len(batch), call | {"class_labels": _labels_of(batch), "generator": generator[0]})
    return _Work(flags, pipeline, pictures, starts, cover, call, None if model is None else model.step)


def _sample_all(work: _Work, output: OutputFolder) -> int:
    """Sample and write all images and overviews, and return the exit code."""
    flags, pictures = work.flags, work.pictures
    overviews = [GRID, *([STRIP] if flags.strip else []), *([ANIMATION] if flags.animation else [])]
    output.begin(_settings(work), [*(picture.name for picture in pictures), *overviews])
    in_grid = set(pictures[:MAX_IN_GRID])
    if work.starts is not None:
        seeds = [picture.seed for picture in pictures if picture.source == 0][: MAX_COLUMNS - 1]
        in_grid = {picture for picture in pictures if (picture.source or 0) < MAX_ROWS and picture.seed in seeds}
    shown: dict[Picture, UInt8Array] = {}
    trajectories: list[UInt8Array] = []
    try:
        for batch, images, states in _batches(work):
            for picture, image in zip(batch, images, strict=True):
                output.write_pixels(picture.name, image)
                if picture in in_grid:
                    shown[picture] = _as_picture(image, work.value_range)
            if states is not None:
                trajectories.append(as_drawn(states, work.value_range))
        grid = _grid(shown) if work.starts is None else _grid_of_edits(shown, work)
        output.write(GRID, lambda path: grid.save(path, "PNG"))
        if flags.strip:
            strip = denoising_strip(np.concatenate(trajectories, axis=1)[:, :MAX_IN_STRIP])
            output.write(STRIP, lambda path: strip.save(path, "PNG"))
        if flags.animation:
            animated = np.concatenate(trajectories, axis=1)[:, :MAX_IN_ANIMATION]
            num_columns = min(ANIMATION_COLUMNS, animated.shape[1])
            output.write(ANIMATION, lambda path: save_animation(animated, path, num_columns=num_columns))
        output.finish()
    except KeyboardInterrupt:
        num_written = sum((output.path / picture.name).exists() for picture in pictures)
        print_error(f"interrupted; {num_written} of {len(pictures)} images are in {output.path}.")
        return 130
    if flags.format is None and not pictures[0].name.endswith(".png"):
        print(f"PNG cannot hold {work.pipeline.num_channels} channels: images are arrays (height, width, channels).")
    number = format_count(len(pictures), "image")
    print(f"{number} in {output.path}, starting with {pictures[0].name}; overview in {output.path / GRID}.")
    return 0


def _labels_of(pictures: Sequence[Picture]) -> "ClassNumbers | None":
    """Return the argument `class_labels` for pictures; None without classes."""
    from ddpm_hf.diffusion.pipeline import ClassNumbers

    return ClassNumbers(picture.label for picture in pictures if picture.label is not None) or None


def _as_picture(image: NDArray[Any], value_range: Sequence[float] | None) -> UInt8Array:
    """Return an image that was sampled as uint8 or as values as an 8-bit picture."""
    if value_range is not None and image.dtype != np.uint8:
        from ddpm_hf.data import to_uint8

        image = to_uint8(image, (value_range[0], value_range[1]))
    return as_drawn(image, value_range)


def _batches(work: _Work) -> Iterator[tuple[list[Picture], NDArray[Any], UInt8Array | None]]:
    """Yield batches of images; for the first images also states of the trajectory, (frames, number, ...)."""
    from ddpm_hf.evaluation.generate import call_with_trajectory
    from ddpm_hf.rng import plain_generators

    flags, pipeline, size = work.flags, work.pipeline, work.flags.batch_size
    num_with_states = max(MAX_IN_STRIP * flags.strip, MAX_IN_ANIMATION * flags.animation)
    for first in range(0, len(work.pictures), size):
        batch = work.pictures[first : first + size]
        progress = f"Images {first + 1} to {first + len(batch)} of {len(work.pictures)}"
        pipeline.set_progress_bar_config(desc=progress, disable=None, leave=False)
        call = work.call | {
            "class_labels": _labels_of(batch),
            "generator": plain_generators([picture.seed for picture in batch]),
            "output_type": "np" if work.value_range and batch[0].name.endswith(".npy") else "uint8",
        }
        states = None
        if work.starts is not None:
            sources = [picture.source or 0 for picture in batch]
            starts = work.starts[sources]
            if work.value_range:
                starts = starts * (work.value_range[1] - work.value_range[0]) + work.value_range[0]
            if work.masks is None:
                images = pipeline.denoise_from(starts, flags.strength or STRENGTH, **call).images
            else:
                masks = work.masks[[source % len(work.masks) for source in sources]]
                resampling = (flags.num_resamples or NUM_RESAMPLES, flags.jump_length or JUMP_LENGTH)
                images = pipeline.inpaint(starts, masks, *resampling, **call).images
        elif first < num_with_states:
            images, states = call_with_trajectory(pipeline, **call)
            states = states[:, : num_with_states - first]
        else:
            images = pipeline(batch_size=len(batch), **call).images
        yield batch, images, states


def _grid(images: Mapping[Picture, UInt8Array]) -> Image.Image:
    """Return a grid with a column, or several, for each class."""
    columns: dict[int | None, list[UInt8Array]] = {}
    names = {}
    for picture, image in sorted(images.items(), key=lambda item: -1 if item[0].label is None else item[0].label):
        columns.setdefault(picture.label, []).append(image)
        names[picture.label] = picture.class_name or ("" if picture.label is None else f"label {picture.label}")
    if len(columns) > MAX_COLUMNS:
        columns, names = {None: list(images.values())}, {None: ""}
    # The number of columns per class that makes the grid about square.
    width = max(1, math.ceil(math.sqrt(len(images)) / len(columns)))
    width = min(width, max(map(len, columns.values())))
    num_rows = max(-(-len(column) // width) for column in columns.values())
    blank = np.full_like(next(iter(images.values())), 255)
    blocks = [column + [blank] * (num_rows * width - len(column)) for column in columns.values()]
    cells = [block[row * width + column] for row in range(num_rows) for block in blocks for column in range(width)]
    labels = [names[label] for label in columns for _ in range(width)]
    return image_grid(np.stack(cells), len(labels), column_labels=labels if any(labels) else None)


def _grid_of_edits(images: Mapping[Picture, UInt8Array], work: _Work) -> Image.Image:
    """Return a grid with a row for each given image, which comes first, its masked part in gray."""
    seeds = list(dict.fromkeys(picture.seed for picture in images))
    edited = iter(images.values())
    cells = []
    assert work.starts is not None
    for index, start in enumerate(work.starts[: len(images) // len(seeds)]):
        given = np.rint(start * 255).astype(np.uint8)
        if work.masks is not None:
            given = np.where(work.masks[index % len(work.masks), ..., None], np.uint8(MASK_GRAY), given)
        cells += [as_drawn(given, work.value_range), *(next(edited) for _ in seeds)]
    return image_grid(np.stack(cells), len(seeds) + 1, column_labels=["given", *(f"seed {seed}" for seed in seeds)])


def _settings(work: _Work) -> dict[str, Any]:
    """Return everything that the images depend on, for JSON."""
    from ddpm_hf.diffusion.scheduler import default_num_inference_steps
    from ddpm_hf.evaluation.generate import fingerprint

    flags, pipeline, scheduler = work.flags, work.pipeline, work.pipeline.scheduler
    settings = {
        "model": flags.folder,
        "revision": flags.revision,
        "variant": flags.variant,
        "commit": commit_of(pipeline),
        **({} if work.step is None else {"step": work.step}),
        "sha256": fingerprint(pipeline),
        "scheduler": type(scheduler).__name__,
        **{name: value for name, value in work.call.items() if name != "guide"},
        **({} if "guide" not in work.call else {"guide": flags.guide, "guide_sha256": fingerprint(work.call["guide"])}),
        "num_inference_steps": work.call["num_inference_steps"] or default_num_inference_steps(scheduler),
        "timestep_spacing": flags.timestep_spacing or scheduler.config.get("timestep_spacing"),
        "variance": flags.variance,
        "dtype": flags.dtype,
        "device": str(pipeline.device),
        "batch_size": flags.batch_size,
        "compile": [flags.compile_backend, flags.compile_mode] if flags.compile else None,
        "channels_last": flags.channels_last,
    }
    if flags.timestep_spacing == "optimized":
        settings["timesteps"] = scheduler.timesteps.tolist()
        settings["num_inference_steps"] = len(settings["timesteps"])
    given = flags.image or []
    if given:
        settings["image"] = [str(path) for path in given]
        if flags.mask:
            settings["mask"] = [str(path) for path in flags.mask]
            settings["num_resamples"] = flags.num_resamples or NUM_RESAMPLES
            settings["jump_length"] = flags.jump_length or JUMP_LENGTH
        else:
            settings["strength"] = flags.strength or STRENGTH
    images = [
        {"file": picture.name, "seed": picture.seed}
        | ({} if picture.label is None else {"label": picture.label, "class_name": picture.class_name})
        | ({} if picture.source is None else {"image": str(given[picture.source])})
        for picture in work.pictures
    ]
    versions = {"python": platform.python_version(), "ddpm_hf": __version__}
    versions |= {library: version(library) for library in ("torch", "diffusers", "numpy", "pillow")}
    return settings | {"versions": versions, "images": images}
