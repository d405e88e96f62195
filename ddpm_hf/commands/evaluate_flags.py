"""The flags of `ddpm-hf evaluate`."""

import math
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddpm_hf.commands.parser import Parser
from ddpm_hf.commands.sampling_flags import add_model_flags, add_sampling_flags, check_ranges, check_sampling_flags
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, validate


def parse(arguments: Sequence[str]) -> Namespace:
    """Reads the command line.

    Raises:
        ConfigError: A number is outside its range, or settings contradict each other.
    """
    parser = Parser(
        prog="ddpm-hf evaluate",
        description="Measure how good a pipeline is: a table, evaluation.json and evaluation.png. Run the same command "
        "again to go on with one that was stopped.",
        epilog="Example: ddpm-hf evaluate outputs/digits --data data/digits.parquet --metrics bits_per_dim",
    )
    add_model_flags(parser)
    parser.add_argument("--data", required=True, help="the images that it was trained on, as data.source of training")
    for name, (kind, help_text) in _DATA_FLAGS.items():
        default = None if name in SPLIT_FLAGS else getattr(DataConfig(), name)
        parser.add_argument(f"--data.{name}", dest=f"data_{name}", type=kind, default=default, help=help_text)
    parser.add_argument("--data.streaming", dest="data_streaming", nargs="?", const="true", help=SUPPRESS)
    _add_measuring(parser)
    _add_sampling(parser)
    options = parser.parse_args(arguments)
    _check(options)
    if options.metrics is None:
        distances = ["fid", "kid"] if options.features == "inception" else ["frechet_distance", "kernel_distance"]
        options.metrics = [*distances, "precision", "recall", "bits_per_dim"]
    return options


def _add_measuring(parser: ArgumentParser) -> None:
    """Adds what is measured, and where the results go."""
    add = parser.add_argument
    add("--split_seed", type=int,
        help="training.seed of the run, which chose its held-out images; by default the folder's, or 0")  # fmt: skip
    add("--metrics", type=_comma_separated,
        help="comma-separated: fid, kid, inception_score (in Inception features), frechet_distance, kernel_distance "
        "(in any), precision, recall, bits_per_dim")  # fmt: skip
    add("--features", default="inception",
        help="network whose features are compared: inception, dinov2:facebook/dinov2-base or another vision model of "
        "transformers, or package.module:factory, which is imported")  # fmt: skip
    add("--weights", type=Path, help="file with its weights; by default they are found or downloaded")
    add("--num_images", type=int, help="images for bits_per_dim; by default all that are held out, or all")
    add("--num_terms", type=_int_or("all"), default=50, help="terms of the bound for each of them, or all")
    add("--likelihood_steps", type=int, help="length of the chain for bits_per_dim; by default that of training")
    add("--estimate_variance", type=int, default=0, metavar="N",
        help="first estimate the analytic variance on N training images a timestep, and save it in folder")  # fmt: skip
    add("--output", type=Path, help="folder for evaluation.json and evaluation.png; by default that of the pipeline")
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")


def _add_sampling(parser: ArgumentParser) -> None:
    """Adds how samples are drawn."""
    add = parser.add_argument
    add("--num_samples", type=int, help="by default 50000; 64 for the picture, in 50 steps, where no metric needs any")
    add("--seed", type=int, default=0, help="image i is a function of (seed, i)")
    add_sampling_flags(add, batch_size=64, turn="The images have them in turn")
    add("--samples_dir", type=Path, help="folder for the samples; by default evaluation_samples beside the results")
    add("--format", choices=("npy", "png"), default="npy", help="png writes each image as a file too")


def _comma_separated(text: str) -> list[str]:
    """Reads words with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _int_or(word: str) -> Callable[[str], int | str]:
    """Returns a reader of a whole number or a word."""

    def read(text: str) -> int | str:
        if text != word and not text.lstrip("-").isdigit():
            raise ArgumentTypeError(f"{text!r} is neither a whole number nor {word}")
        return word if text == word else int(text)

    return read


def _side_or(number: int) -> Callable[[str], int | list[int]]:
    """Returns a reader of one whole number, or of so many in a list."""

    def read(text: str) -> int | list[int]:
        values = [int(part) for part in text.strip("[]").split(",")]
        if len(values) not in (1, number):
            raise ArgumentTypeError(f"{text!r} is neither one whole number nor {number} with commas between them")
        return values[0] if len(values) == 1 else values

    return read


# Which images were held out; None is what the run says, see evaluate_split.py.
SPLIT_FLAGS = ("validation_split", "validation_fraction")
_DATA_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "subset": (str, "configuration of a Hub data set that has several"),
    "revision": (str, "branch, tag or commit of a Hub data set"),
    "split": (str, "split to compare with, or a part of it"),
    "validation_split": (str, "split that was held out; by default that of the folder's run"),
    "validation_fraction": (
        float,
        "fraction that was held out, chosen by --split_seed; by default that of the folder's run",
    ),
    "image_column": (str, "column or array with the images"),
    "label_column": (str, "column or array with the labels"),
    "crop_before_resize": (_side_or(4), "side of a square in the centre, or left,top,right,bottom"),
    "resolution": (_side_or(2), "side, or height,width; by default those of the network"),
    "resize_to": (int, "shorter side before the crop"),
    "resize_filter": (str, "Pillow's filter"),
    "num_channels": (int, "by default those of the network"),
    "background": (str, "white or black behind transparent pixels"),
    "on_bad_image": (str, "error, or skip"),
    "max_bad_fraction": (float, "how many images may be unreadable"),
    "cache_dir": (str, "folder for decoded images"),
}


def _check(options: Namespace) -> None:
    """Refuses numbers outside their range, and a stream."""
    if options.data_streaming is not None and options.data_streaming != "false":
        raise ConfigError(
            "data.streaming keeps no images to compare with, and an evaluation needs all of them, the same each time; "
            "leave it out, and set --data.cache_dir to a disk with room for them."
        )
    check_ranges(options, {
        "num_samples": (1, math.inf), "num_images": (1, math.inf), "likelihood_steps": (1, math.inf),
        "num_terms": (2, math.inf), "estimate_variance": (0, math.inf), "seed": (0, math.inf),
    })  # fmt: skip
    check_sampling_flags(options)


def data_config(options: Namespace, size: tuple[int, int], num_channels: int) -> DataConfig:
    """Returns which images to compare with; size and channels are those of the network unless told otherwise.

    Raises:
        ConfigError: The settings contradict each other.
    """
    given = {name: getattr(options, f"data_{name}") for name in _DATA_FLAGS}
    defaults = {"resolution": list(size), "num_channels": num_channels, "validation_fraction": 0.0}
    filled = given | {name: default for name, default in defaults.items() if given[name] is None}
    config = DataConfig(source=options.data, **filled)
    validate(RunConfig(data=config))
    return config
