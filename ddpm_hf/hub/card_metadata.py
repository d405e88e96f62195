"""The metadata of a card: what the Hub lists, filters and compares models by."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ddpm_hf.evaluation.metrics import BITS_PER_DIM
from ddpm_hf.hub.card_evaluation import Measurement
from ddpm_hf.hub.card_facts import Facts
from ddpm_hf.hub.push import check_license

PIPELINE_TAG = "unconditional-image-generation"
UNKNOWN_LICENSE = "unknown"
TAGS = ("ddpm", "diffusers", PIPELINE_TAG, "image-generation", "pytorch", "diffusers-training", "ddpm_hf")
_ARGUMENTS_OF_SAMPLING = ("eta", "guidance_scale", "timestep_spacing", "dtype", "device")
_ARGUMENTS_OF_BOUND = ("num_steps", "num_terms", "variance", "images")


def metadata(facts: Facts, license: str | None) -> dict[str, Any]:
    """Returns the metadata of a folder, as huggingface_hub writes it.

    Raises:
        ValueError: The license is no identifier of the Hub.
    """
    check_license(license)
    measured = [one for one in facts.evaluation.measurements if one.is_finite] if facts.evaluation else []
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        license=license or UNKNOWN_LICENSE,
        tags=[*TAGS, *(["class-conditional"] if facts.num_classes else [])],
        datasets=[facts.hub_data_set] if facts.hub_data_set else None,
        metrics=list(dict.fromkeys(one.metric for one in measured)) or None,
        model_name=facts.name if measured else None,
        eval_results=[_result(one, facts) for one in measured] or None,
    )
    return dict(data.to_dict())  # type: ignore[no-untyped-call]


def _result(one: Measurement, facts: Facts) -> EvalResult:
    """Returns one number, with all that is needed to compare it with that of another model."""
    assert facts.evaluation is not None
    source = facts.measured_on or "unknown"
    sampling, row = facts.evaluation.sampling, one.row
    names = _ARGUMENTS_OF_BOUND if one.metric == BITS_PER_DIM else ("sampler", "num_inference_steps")
    details = {
        "standard_error": one.standard_error,
        "num_samples": one.num_samples,
        "num_reference": row.get("num_reference") or None,
        "features": row.get("features"),
        "seed": row.get("seed"),
        **{name: row.get(name) for name in names},
    }
    if one.metric != BITS_PER_DIM:
        details |= {name: sampling.get(name) for name in _ARGUMENTS_OF_SAMPLING}
    return EvalResult(
        task_type=PIPELINE_TAG,
        dataset_type=source,
        dataset_name=source,
        dataset_split=facts.evaluation.data.get("split"),
        metric_type=one.metric,
        metric_value=one.value,
        metric_name=one.full_title,
        metric_args={name: value for name, value in details.items() if value is not None},
    )
