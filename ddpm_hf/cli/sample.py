"""A folder of pictures: files appear whole, and nothing that is not of an earlier call is overwritten.

settings.json                     what the pictures depend on, and which files are of this call
seed_000007_cat.png               one picture each; .npy where PNG cannot hold the channels
grid.png  strip.png  animation.gif

The flags of `ddpm-hf sample`, and what they forbid each other.

Which pictures `ddpm-hf sample` draws: seeds, labels, and the names of the files.

Images that sampling starts from: read from files, and fitted to a network where nothing is lost by it.

The overviews beside the pictures of `ddpm-hf sample`: a labelled grid, a strip and a film of the way from noise.

`ddpm-hf sample`: draws images from any DDPM into a folder.
"""

import json
import math
import platform
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_hf import __version__
from ddpm_hf.cli.common import (
    CALL_FLAGS,
    NATIVE_SCHEDULER,
    Parser,
    add_model_flags,
    add_sampling_flags,
    check_ranges,
    check_sampling_flags,
    check_scheduler,
    commit_of,
    complain,
    find_model,
    label_list,
    load_pipeline,
    out_of_memory,
)
from ddpm_hf.config import ConfigError, DataConfig
from ddpm_hf.files import write_whole
from ddpm_hf.plots import UInt8Array, denoising_strip, image_grid, save_animation

if TYPE_CHECKING:
    import torch

    from ddpm_hf.diffusion import GaussianDiffusionPipeline


SETTINGS = "settings.json"
SCHEMA_VERSION = 1
CHANNELS_OF_PNG = (1, 3, 4)


class PictureFolder:
    """Where the pictures of one call go.

    Args:
        path: The folder; new or empty, or, to overwrite, that of an earlier call.
        overwrites: Whether pictures of an earlier call may be replaced.

    Attributes:
        path: The folder.

    Raises:
        ConfigError: The folder holds something else.
    """

    def __init__(self, path: Path, overwrites: bool) -> None:
        self.path = path.expanduser()
        self._content: dict[str, Any] = {}
        self._former: list[str] = []
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file; give a new folder.")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not overwrites:
            raise ConfigError(
                f"--output {self.path} is not empty; choose another folder, or give --overwrite to replace the "
                "pictures of an earlier call."
            )
        self._former = self._files_of_an_earlier_call()

    def _files_of_an_earlier_call(self) -> list[str]:
        """Returns the names of the files that are ours to replace."""
        try:
            content = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            names = [str(name) for name in content["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output {self.path} holds something else than the pictures of an earlier call (no {SETTINGS} that "
                "names them); choose another folder."
            ) from None
        return [name for name in names if Path(name).name == name]

    def begin(self, settings: dict[str, Any], files: Sequence[str]) -> None:
        """Removes the files of an earlier call and writes the settings of this one.

        Args:
            settings: What the pictures depend on.
            files: The names of all files that this call may write.

        Raises:
            ConfigError: One of these names is taken by a file of another origin.
            OSError: The folder cannot be written.
        """
        for name in files:
            if name not in self._former and (self.path / name).exists():
                raise ConfigError(
                    f"{self.path / name} is in the way and not of an earlier call; move it, or choose another --output."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        # The old list of files goes last: a kill in between leaves a folder that still says what is ours.
        for name in self._former:
            (self.path / name).unlink(missing_ok=True)
        self._content = {"schema_version": SCHEMA_VERSION, "finished": False} | settings | {"files": list(files)}
        self._write_settings()

    def finish(self) -> None:
        """Says in the settings that all files are there."""
        self._content["finished"] = True
        self._write_settings()

    def write_pixels(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Writes one image, uint8 (height, width, channels), as its name says: PNG or .npy."""
        if name.endswith(".npy"):
            self.write(name, lambda path: _save_array(path, pixels))
        else:
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            self.write(name, lambda path: picture.save(path, "PNG"))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes a file; what stops it leaves nothing."""
        write_whole(self.path / name, write)

    def _write_settings(self) -> None:
        text = json.dumps(self._content, indent=2, ensure_ascii=False) + "\n"
        self.write(SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))


def overviews_in(folder: Path) -> set[str]:
    """Returns the names of the pictures that show others of the folder; none where `sample` has drawn nothing."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return set(content["files"]) - {image["file"] for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _save_array(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Writes an array under just this name; numpy would add an ending."""
    with path.open("wb") as file:
        np.save(file, pixels)


NUM_IMAGES, NUM_RESAMPLES, JUMP_LENGTH, STRENGTH = 16, 10, 10, 0.5
MOST_SEEDS, SEED_LIMIT = 1_000_000, 2**64
_TURN = "Of n labels, seed s has the one in place s modulo n, counted from 0, so a seed keeps its label"
_EXAMPLES = """examples:
  ddpm-hf sample google/ddpm-cifar10-32 --num_inference_steps 50 --eta 0
  ddpm-hf sample outputs/digits --labels 3,8 --seeds 0-15 --strip --animation --output threes_and_eights
  ddpm-hf sample user/model --revision v1.0 --seeds 7 --dtype bfloat16 --device cuda:1
  ddpm-hf sample user/model --image cat.png --strength 0.4 --seeds 0-3 --output variants
  ddpm-hf sample user/model --image cat.png --mask hole.png --num_inference_steps 50 --output filled"""


def parse(arguments: Sequence[str]) -> Namespace:
    """Reads the command line; `seeds` becomes a list of whole numbers.

    Raises:
        ConfigError: A number is outside its range, or flags contradict each other.
    """
    parser = Parser(
        prog="ddpm-hf sample",
        description="Draw images from any DDPM: a folder, or a repository of the Hub. One seed gives one\npicture, "
        "whatever the batch, and the same as a generator with that seed gives in Python.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    _add_what(parser)
    group = parser.add_argument_group("how they are drawn")
    add_sampling_flags(group.add_argument, batch_size=16, turn=_TURN)
    group.add_argument("--device", help="cpu, cuda, cuda:1 or mps; by default a GPU where there is one")
    _add_editing(parser)
    options = parser.parse_args(arguments)
    check_ranges(options, {
        "seed": (0, SEED_LIMIT - 1), "num_images": (1, MOST_SEEDS), "num_resamples": (1, math.inf),
        "jump_length": (1, math.inf),
    })  # fmt: skip
    if options.strength is not None and not 0 < options.strength <= 1:
        raise ConfigError(f"--strength is {options.strength}, but must be above 0 and at most 1.")
    check_sampling_flags(options)
    _check_contradictions(options)
    options.seeds = _seeds(options)
    return options


def _add_what(parser: ArgumentParser) -> None:
    """Adds which images are drawn, and where they go."""
    add = parser.add_argument_group("which images, and where they go").add_argument
    add("--seeds", metavar="LIST", help="one image a seed: 7,8,9 or 0-15 or both")
    add("--seed", type=int, help="the first of --num_images seeds in a row; by default 0")
    add("--num_images", type=int, help=f"by default {NUM_IMAGES}, or 1 of each --image")
    add("--output", type=Path, default=Path("samples"), help="new folder for the images; by default samples")
    add("--overwrite", action="store_true", help="replace what an earlier call put into that folder, and nothing else")
    add("--strip", action="store_true", help="also write strip.png, the way from noise to the first images")
    add("--animation", action="store_true", help="also write animation.gif, the same as a film")


def _add_editing(parser: ArgumentParser) -> None:
    """Adds what to start from instead of noise."""
    group = parser.add_argument_group("start from images instead of noise")
    group.add_argument("--image", nargs="+", type=Path, metavar="FILE", help="noise these part of the way and denoise")
    group.add_argument("--strength", type=float, help=f"how far, above 0, to 1, all of the way; by default {STRENGTH}")
    group.add_argument("--mask", nargs="+", type=Path, metavar="FILE",
        help="fill instead what is white in this picture: one for all images, or one for each")  # fmt: skip
    group.add_argument("--num_resamples", type=int, help=f"how often a stretch is drawn; by default {NUM_RESAMPLES}")
    group.add_argument("--jump_length", type=int, help=f"steps of a stretch; by default {JUMP_LENGTH}")


def _check_contradictions(options: Namespace) -> None:
    """Refuses flags that another one, or its absence, would leave without effect."""

    def given(name: str) -> bool:
        return getattr(options, name) is not None and getattr(options, name) is not False

    for flag, needed in (("mask", "image"), ("strength", "image"), ("num_resamples", "mask"), ("jump_length", "mask")):
        if given(flag) and not given(needed):
            raise ConfigError(f"--{flag} is given without --{needed}; give --{needed} too, or leave it out.")
    for flag, other, why in (
        ("seeds", "seed", "both say which seeds"),
        ("seeds", "num_images", "both say how many images"),
        ("strength", "mask", "a filled image has no strength"),
        ("strip", "image", "it shows the way from noise, and an image is another start"),
        ("animation", "image", "it shows the way from noise, and an image is another start"),
    ):
        if given(flag) and given(other):
            raise ConfigError(f"--{flag} and --{other} do not go together: {why}; leave one out.")
    if options.scheduler not in (None, NATIVE_SCHEDULER) and options.image:
        raise ConfigError(f"--image needs {NATIVE_SCHEDULER}; leave --scheduler out.")
    if options.mask and len(options.mask) not in (1, len(options.image)):
        raise ConfigError(
            f"--mask names {len(options.mask)} files for {len(options.image)} images; give one for all or one for each."
        )


def _seeds(options: Namespace) -> list[int]:
    """Returns the seeds in their order.

    Raises:
        ConfigError: They are no list of different seeds.
    """
    if options.seeds is None:
        first, number = options.seed or 0, options.num_images or (1 if options.image else NUM_IMAGES)
        if first + number > SEED_LIMIT:
            raise ConfigError(f"--seed {first} with {number} images goes beyond the largest seed, {SEED_LIMIT - 1}.")
        return list(range(first, first + number))
    seeds: list[int] = []
    for part in options.seeds.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})(?:\s*-\s*(\d{1,20}))?\s*", part, re.ASCII)
        if not match:
            raise ConfigError(f"--seeds has {part!r}; give whole numbers from 0 and ranges, such as 7,8,9 or 0-15.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= SEED_LIMIT or last - first + len(seeds) >= MOST_SEEDS:
            raise ConfigError(
                f"--seeds has {part!r}; a range goes upwards, to {SEED_LIMIT - 1} at most, and all have at most "
                f"{MOST_SEEDS:,} seeds."
            )
        seeds.extend(range(first, last + 1))
    ((seed, number),) = Counter(seeds).most_common(1)
    if number > 1:
        raise ConfigError(f"--seeds has {seed} twice, which would be one picture twice; leave one out.")
    return seeds


@dataclass(frozen=True)
class Picture:
    """One image that is asked for.

    Attributes:
        name: Of its file.
        seed: Of all its noise.
        label: The number of its class.
        class_name: What the class is called.
        source: Which of the given images it starts from.
    """

    name: str
    seed: int
    label: int | None
    class_name: str | None
    source: int | None


def pictures_of(options: Namespace, pipeline: "GaussianDiffusionPipeline") -> list[Picture]:
    """Returns what is asked for: each seed once, or once for each given image."""
    labels = label_list(options.labels, pipeline)
    class_names = pipeline.config.get("class_names") or {}
    ending = "png" if pipeline.num_channels in CHANNELS_OF_PNG else "npy"
    stems = [_as_file_name(path.stem) for path in options.image or []]
    if len({stem.casefold() for stem in stems}) < len(stems):
        stems = [f"{index}_{stem}" for index, stem in enumerate(stems)]
    found = []
    for source, stem in enumerate(stems) if stems else [(None, None)]:
        for seed in options.seeds:
            label = labels[seed % len(labels)] if labels else None
            class_name = None if label is None else class_names.get(str(label))
            if label is not None and label == pipeline.num_classes:
                class_name = "no class"
            words = [stem, f"seed_{seed:06d}"]
            if label is not None:
                words.append(_as_file_name(class_name) if class_name else f"label_{label}")
            name = f"{'_'.join(word for word in words if word)}.{ending}"
            found.append(Picture(name, seed, label, class_name, source))
    used = {picture.label for picture in found}
    unused = [label for label in dict.fromkeys(labels or []) if options.labels is not None and label not in used]
    if unused:
        print(
            f"note: no seed falls on {', '.join(class_names.get(str(label), str(label)) for label in unused)}; of the "
            f"{len(labels or [])} labels, seed s has the one in place s modulo {len(labels or [])}, counted from 0."
        )
    return found


def _as_file_name(text: str) -> str:
    """Returns a short text with nothing in it that a file system could mind."""
    return re.sub(r"[^\w-]+", "_", text)[:40]


ImageArray: TypeAlias = NDArray[np.float32]


def read_images(paths: Sequence[Path]) -> list[ImageArray]:
    """Reads image files, and .npy files (height, width, channels) for other channels than a picture has.

    Returns:
        float32 in [0, 1], (height, width, channels), with the channels and the precision of the file.

    Raises:
        ValueError: A file is missing, or is no image.
    """
    return [_read_array(path) if path.suffix.lower() == ".npy" else _read_picture(path) for path in paths]


def _read_picture(path: Path) -> ImageArray:
    """Reads an image of 8 or 16 bits as it is shown."""
    from ddpm_hf.data.decode import Cell, Geometry, Target, decode, read_header

    cell = Cell(str(path), path.expanduser())
    header = read_header(cell)
    dtype = np.dtype(np.uint16 if header.is_deep else np.uint8)
    geometry = Geometry.of(DataConfig(resolution=None))
    pixels = decode(cell, Target({"L": 1, "RGB": 3, "RGBA": 4}[header.mode], dtype, None, geometry))
    return _to_unit_range(pixels.transpose(1, 2, 0))


def _read_array(path: Path) -> ImageArray:
    """Reads an array of 8 or 16 bits, or of floats in [0, 1]."""
    try:
        pixels = np.load(path.expanduser(), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as an array ({error}).") from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    is_float = np.issubdtype(pixels.dtype, np.floating)
    if pixels.ndim != 3 or pixels.size == 0 or not (is_float or pixels.dtype in (np.uint8, np.uint16)):
        raise ConfigError(
            f"{path} has {pixels.dtype} of shape {pixels.shape}; an image is uint8, uint16 or float in [0, 1], (height,"
            " width, channels)."
        )
    if is_float and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ConfigError(f"{path} has values from {pixels.min():g} to {pixels.max():g}; floats must lie in [0, 1].")
    return pixels.astype(np.float32) if is_float else _to_unit_range(pixels)


def _to_unit_range(pixels: NDArray[np.integer]) -> ImageArray:
    """Maps all of a type's values to [0, 1]."""
    scaled: ImageArray = (pixels / np.float64(np.iinfo(pixels.dtype).max)).astype(np.float32)
    return scaled


def fit(image: ImageArray, path: Path, shape: tuple[int, int, int]) -> ImageArray:
    """Gives an image the channels of a network.

    Args:
        image: As read.
        path: Its file, for messages.
        shape: Height, width and channels of what the network makes.

    Raises:
        ConfigError: It has another size, or would lose colours or transparency.
    """
    height, width, want = shape
    if image.shape[:2] != (height, width):
        raise ConfigError(
            f"{path} is {image.shape[1]} pixels wide and {image.shape[0]} high, but the model makes {width} x {height};"
            " resize or crop it."
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
        lost = {(4, 3): ", some of it transparent", (4, 1): ", some of it transparent", (3, 1): " of different values"}
        raise ConfigError(
            f"{path} has {have} channels{lost.get((have, want), '')}, but the model's images have {want}; convert it."
        )
    return image


def to_mask(image: ImageArray, path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns where a mask is white, (height, width).

    Raises:
        ConfigError: It has another size than the images.
    """
    if image.shape[:2] != size:
        raise ConfigError(
            f"{path} is {image.shape[1]} pixels wide and {image.shape[0]} high, but the images are {size[1]} x "
            f"{size[0]}; draw it in their size."
        )
    if image.shape[2] == 4:  # what is transparent is not white
        image = image * image[..., -1:]
    white: NDArray[np.bool_] = image[..., :3].mean(axis=2) >= 0.5
    return white


MOST_IN_GRID, MOST_COLUMNS, MOST_ROWS = 100, 20, 10
COVERED = 127  # what a mask covers is shown gray


def in_grid(pictures: Sequence[Picture]) -> list[Picture]:
    """Returns those that a grid shows: the first ones, or the first seeds of the first given images."""
    if pictures[0].source is None:
        return list(pictures[:MOST_IN_GRID])
    seeds = [picture.seed for picture in pictures if picture.source == 0][: MOST_COLUMNS - 1]
    return [picture for picture in pictures if (picture.source or 0) < MOST_ROWS and picture.seed in seeds]


def grid(images: Mapping[Picture, UInt8Array]) -> "Image.Image":
    """Shows images with the names of their classes above the columns, as far as these are few.

    Args:
        images: uint8 (height, width, channels) each.
    """
    by_label: dict[int | None, list[UInt8Array]] = {}
    names = {}
    for picture, image in sorted(images.items(), key=lambda item: -1 if item[0].label is None else item[0].label):
        by_label.setdefault(picture.label, []).append(image)
        names[picture.label] = picture.class_name or ("" if picture.label is None else f"label {picture.label}")
    if len(by_label) > MOST_COLUMNS:
        by_label, names = {None: list(images.values())}, {None: ""}
    # A label has as many columns as make the whole about square.
    width = max(1, math.ceil(math.sqrt(len(images)) / len(by_label)))
    width = min(width, max(map(len, by_label.values())))
    num_rows = max(-(-len(column) // width) for column in by_label.values())
    blank = np.full_like(next(iter(images.values())), 255)
    blocks = [column + [blank] * (num_rows * width - len(column)) for column in by_label.values()]
    cells = [block[row * width + place] for row in range(num_rows) for block in blocks for place in range(width)]
    labels = [names[label] for label in by_label for _ in range(width)]
    return image_grid(np.stack(cells), len(labels), column_labels=labels if any(labels) else None)


def grid_of_edits(
    images: Mapping[Picture, UInt8Array], starts: NDArray[np.float32], masks: NDArray[np.bool_] | None
) -> "Image.Image":
    """Shows each given image in a row with what became of it.

    Args:
        images: uint8 (height, width, channels) each; of each given image the same seeds, in one order.
        starts: The given images, (number, height, width, channels) in [0, 1].
        masks: Where they were filled, one for all or one for each, (number, height, width).
    """
    seeds = list(dict.fromkeys(picture.seed for picture in images))
    drawn = iter(images.values())
    cells = []
    for index, start in enumerate(starts[: len(images) // len(seeds)]):
        given = np.rint(start * 255).astype(np.uint8)
        if masks is not None:
            given = np.where(masks[index % len(masks), ..., None], np.uint8(COVERED), given)
        cells += [given, *(next(drawn) for _ in seeds)]
    return image_grid(np.stack(cells), len(seeds) + 1, column_labels=["given", *(f"seed {seed}" for seed in seeds)])


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
    options: Namespace, model: Path | None, folder: PictureFolder, images: list[ImageArray], masks: list[ImageArray]
) -> _Work:
    """Loads the model, and refuses what does not fit before anything is written or drawn."""
    import torch

    from ddpm_hf.diffusion.editing import start_level
    from ddpm_hf.evaluation.generate import Sampler, image_shape
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
    generator = plain_generators(options.seeds[:1])
    num_steps = pipeline.check_inputs(class_labels=label, generator=generator, output_type="uint8", **call)
    if options.image and not options.mask:
        start_level(options.strength or STRENGTH, num_steps)
    return _Work(
        options=options,
        pipeline=pipeline,
        folder=folder,
        pictures=pictures,
        num_steps=num_steps,
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
    from ddpm_hf.evaluation.generate import call_with_trajectory
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
        states = None
        if work.starts is not None:
            images = _edited(work, [picture.source or 0 for picture in pictures], call)
        elif first < num_filmed:
            images, states = call_with_trajectory(pipeline, **call)
            states = states[:, : num_filmed - first]
        else:
            images = pipeline(batch_size=len(pictures), **call).images
        yield pictures, images, states


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
    from ddpm_hf.evaluation.generate import fingerprint

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
