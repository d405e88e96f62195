"""evaluation.json as a card shows it: names that say how many samples and which features, and how to measure again."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_hf.evaluation.metrics import BITS_PER_DIM, SCHEMA_VERSION, TITLES

_NATIVE_SCHEDULERS = ("GaussianDiffusionScheduler", "DDPMScheduler")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of evaluation.json.

    Args:
        metric: Its plain name, `fid`.
        network: Whose features were compared, as `--features` names it; None where there is none.
        value: The number; NaN and infinities are kept, and shown as what they are.
        standard_error: Of the number, or None.
        row: All that evaluation.json says of it.
    """

    metric: str
    network: str | None
    value: float
    standard_error: float | None
    row: Mapping[str, Any]

    @property
    def is_finite(self) -> bool:
        """Whether there is a number to tell."""
        return math.isfinite(self.value)

    @property
    def num_samples(self) -> int:
        """Samples that were judged; of bits per dimension, real images."""
        return int(self.row["num_samples"])

    @property
    def title(self) -> str:
        """What it is called with the number of samples: FID-50k; of bits per dimension, with what they are of."""
        if self.metric == BITS_PER_DIM:
            kind = "training images" if self.row.get("images") == "all" else "images"
            given = ", given the class" if self.row.get("conditional") else ""
            return f"{TITLES[BITS_PER_DIM][0]} of {self.num_samples:,} {kind}{given}"
        count = f"{self.num_samples // 1000}k" if self.num_samples % 1000 == 0 else str(self.num_samples)
        return f"{TITLES.get(self.metric, (self.metric,))[0]}-{count}"

    @property
    def full_title(self) -> str:
        """The same with the network whose features were compared."""
        return f"{self.title} ({self.network})" if self.network else self.title

    @property
    def better(self) -> str:
        """Which way is better."""
        return TITLES.get(self.metric, ("", ""))[1]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The report of `ddpm-hf evaluate`."""

    measurements: Sequence[Measurement]
    data: Mapping[str, Any]
    sampling: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def of_samples(self) -> list[Measurement]:
        """Those that judge samples."""
        return [one for one in self.measurements if one.metric != BITS_PER_DIM]

    @property
    def of_images(self) -> list[Measurement]:
        """Those that judge how well real images are encoded."""
        return [one for one in self.measurements if one.metric == BITS_PER_DIM]


def read_evaluation(content: Mapping[str, Any], path: Path) -> Evaluation:
    """Returns the report of `ddpm-hf evaluate`.

    Args:
        content: What the file holds.
        path: Where it lies, for errors.

    Raises:
        ValueError: It is none, or one of another version.
    """
    remedy = "measure anew with `ddpm-hf evaluate`, or take the file out of the folder"
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} is no report of `ddpm-hf evaluate` of this version (schema_version "
            f"{content.get('schema_version')!r:.40}, not {SCHEMA_VERSION}); {remedy}."
        )
    try:
        measurements = [_measurement(row) for row in content["metrics"]]
        parts = {name: dict(content.get(name) or {}) for name in ("data", "sampling", "versions")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken ({type(error).__name__}: {str(error)[:100]}); {remedy}.") from None
    return Evaluation(measurements=measurements, **parts)


def _measurement(row: Mapping[str, Any]) -> Measurement:
    """Returns one row of `metrics`."""
    found = re.fullmatch(r"(\w+)(?:\[(.+)\])?", row["name"])
    if found is None:
        raise ValueError(f"metrics has the name {row['name']!r}")
    value, error = row["value"], row.get("standard_error")
    for number in (row["num_samples"], 0 if value is None else value, 0 if error is None else error):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{number!r} is no number")
    if error is not None and not math.isfinite(error):
        error = None
    return Measurement(
        metric=found[1],
        network=found[2] or ("Inception" if row.get("features") else None),
        value=math.nan if value is None else value,
        standard_error=error,
        row=row,
    )


def command(
    evaluation: Evaluation,
    *,
    repo_id: str,
    source: str,
    spacing: str | None,
    length: int,
    num_classes: int,
    config: Mapping[str, Any],
) -> str:
    """Returns the command that measures the same again.

    Args:
        evaluation: The report.
        repo_id: What was measured.
        source: The data.
        spacing: Spacing of timesteps that the scheduler has by itself.
        length: Length of the chain.
        num_classes: Classes that are sampled in turn if nothing else is said; 0 for none.
        config: The settings of the run, which say what was held out.
    """
    sampling, data = evaluation.sampling, config.get("data") or {}
    flags = {"data": source, "data.split": evaluation.data.get("split")}
    flags["data.subset"] = data.get("subset")
    if evaluation.data.get("num_held_out_images"):
        flags |= {f"data.{name}": data.get(name) or None for name in ("validation_split", "validation_fraction")}
        flags["split_seed"] = (config.get("training") or {}).get("seed") or None
    flags["metrics"] = ",".join(dict.fromkeys(one.metric for one in evaluation.measurements))
    flags["features"] = next((one.network for one in evaluation.of_samples if "[" in one.row["name"]), None)
    flags |= {name: sampling.get(name) for name in ("seed", "num_inference_steps", "eta")}
    flags["num_samples"] = next((one.num_samples for one in evaluation.of_samples), None)
    if sampling.get("scheduler") not in _NATIVE_SCHEDULERS:
        flags["scheduler"] = sampling.get("scheduler")
    if sampling.get("timestep_spacing") != spacing:
        flags["timestep_spacing"] = sampling.get("timestep_spacing")
    if sampling.get("guidance_scale") not in (None, 1, 1.0):
        flags["guidance_scale"] = sampling["guidance_scale"]
        flags["guidance_rescale"] = sampling.get("guidance_rescale") or None
    if sampling.get("labels") not in (None, list(range(num_classes))):
        flags["labels"] = ",".join(map(str, sampling["labels"]))
    if sampling.get("analytic_variance"):
        flags["variance"] = "analytic"
    if sampling.get("dtype") in ("bfloat16", "float16"):
        flags["dtype"] = sampling["dtype"]
    for one in evaluation.of_images:
        terms, steps = one.row.get("num_terms"), one.row.get("num_steps")
        flags |= {"num_images": one.num_samples, "num_terms": "all" if terms == steps else terms}
        flags["likelihood_steps"] = steps if steps != length else None
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    if sampling.get("device") == "cpu":  # whose noise is another than that of a GPU
        words.append("--cpu")
    return shlex.join(["ddpm-hf", "evaluate", repo_id, *words, "--output", "evaluation"])
