"""Samples in a folder: written in parts while they are drawn, so that a killed evaluation goes on where it was.

    settings.json                     what the images depend on
    parts/00000000-00000064.npy       a batch, until all are there
    samples.npy                       uint8 (number, height, width, channels), in the end
    png/000000.png                    the same as pictures, if asked for

Every file is written under another name and renamed. Since image i depends on (seed, i) alone, a finished folder can be
extended to more images, and gives its first ones where fewer are asked for.
"""

import json
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.durable import write_text, write_whole
from ddpm_hf.evaluation.fingerprint import fingerprint
from ddpm_hf.evaluation.image_shape import image_shape
from ddpm_hf.evaluation.ranks import ALONE, Ranks
from ddpm_hf.evaluation.sampling import Images, Sampler, batches

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
