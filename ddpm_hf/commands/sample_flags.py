"""The flags of `ddpm-hf sample`, and what they forbid each other."""

import math
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.commands.parser import Parser
from ddpm_hf.commands.sampling_flags import (
    NATIVE_SCHEDULER,
    add_model_flags,
    add_sampling_flags,
    check_ranges,
    check_sampling_flags,
)
from ddpm_hf.config import ConfigError

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
