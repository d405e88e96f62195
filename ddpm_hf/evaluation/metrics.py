"""What can be measured, and how a number is kept; knows neither torch nor diffusers."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

SCHEMA_VERSION = 1
"""Of evaluation.json."""

BITS_PER_DIM = "bits_per_dim"
# What a reader knows each metric as, and which way is better.
TITLES = {
    "fid": ("FID", "lower"),
    "kid": ("KID", "lower"),
    "inception_score": ("Inception Score", "higher"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "kernel_distance": ("kernel distance", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    BITS_PER_DIM: ("bits per dimension", "lower"),
}
METRICS = tuple(TITLES)
OF_SAMPLES = tuple(name for name in METRICS if name != BITS_PER_DIM)
LOWER_IS_BETTER = tuple(name for name, (_, better) in TITLES.items() if better == "lower")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number with what is needed to compare it.

    Args:
        name: What was measured, with the network in brackets where it is not the one that the metric is known by.
        value: The number.
        standard_error: Of the number, over the choice of images; None where it is not known.
        features: The network, its weights and resize, and the versions of the libraries; None where there is none.
        num_samples: Samples that were judged; of bits per dimension, real images.
        num_reference: Real images that they were compared with; 0 if with none.
    """

    name: str
    value: float
    standard_error: float | None
    features: str | None
    num_samples: int
    num_reference: int


def check_metrics(metrics: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Refuses metrics that do not exist, and none at all.

    Raises:
        ValueError: With the names that do.
    """
    if not metrics:
        raise ValueError(f"metrics is empty; choose from {', '.join(known)}.")
    for metric in metrics:
        if metric not in known:
            nearest = difflib.get_close_matches(metric, known, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"metrics has {metric!r}, which is none{hint}; choose from {', '.join(known)}.")
