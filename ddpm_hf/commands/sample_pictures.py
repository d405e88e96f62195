"""Which pictures `ddpm-hf sample` draws: seeds, labels, and the names of the files."""

import re
from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm_hf.commands.picture_folder import CHANNELS_OF_PNG
from ddpm_hf.commands.sampling_flags import label_list

if TYPE_CHECKING:
    from ddpm_hf.diffusion import GaussianDiffusionPipeline


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
