"""Each weighting is its published formula, and those of x_0 are one loss whatever the network predicts."""

from typing import Any

import pytest
import torch

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler, NoiseSchedule, make_betas
from ddpm_hf.diffusion.schedule import rescale_to_zero_terminal_snr
from ddpm_hf.training.loss import DenoisingLoss, loss_weight

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEPS = [0, 1, 57, 129, 130, 258, 259, 500, 900, 998, 999]
LINEAR, COSINE = make_betas("linear"), make_betas("cosine")
ZERO_SNR = rescale_to_zero_terminal_snr(LINEAR)

# {weighting: {prediction: weight at an SNR of s}}, as the papers and their code print them.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Salimans & Ho 2022, section 4.
    "snr": {"epsilon": lambda s: 1.0, "sample": lambda s: s, "v_prediction": lambda s: s / (s + 1)},
    "truncated_snr": {"sample": lambda s: max(s, 1), "v_prediction": lambda s: max(s, 1) / (s + 1)},
    # Hang et al. 2023, gamma = 5.
    "min_snr": {
        "epsilon": lambda s: min(s, 5) / s,
        "sample": lambda s: min(s, 5),
        "v_prediction": lambda s: min(s, 5) / (s + 1),
    },
    # Choi et al. 2022, k = 1, gamma = 1; their code does not ask what is predicted.
    "p2": dict.fromkeys(PREDICTION_TYPES, lambda s: 1 / (1 + s)),
}


CASES = [(weighting, prediction_type) for weighting, kinds in PUBLISHED.items() for prediction_type in kinds]


def objective(weighting: str, **changes: float) -> ObjectiveConfig:
    return ObjectiveConfig(weighting=weighting, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("weighting", "prediction_type"), CASES)
@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_a_weight_is_its_published_formula(betas: torch.Tensor, weighting: str, prediction_type: str) -> None:
    """In float64 to its rounding, from t = 0 (SNR 9999 or 24222) to the last, at both sides of the thresholds."""
    snr = NoiseSchedule.from_betas(betas).snr[TIMESTEPS]
    found = loss_weight(objective(weighting), prediction_type, snr)
    expected = [PUBLISHED[weighting][prediction_type](s) for s in snr.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_constants_of_a_weighting_are_those_of_the_configuration() -> None:
    snr = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64)
    p2 = loss_weight(objective("p2", p2_gamma=0.5, p2_k=2.0), "epsilon", snr)
    torch.testing.assert_close(p2, 1 / (2 + snr).sqrt(), rtol=1e-14, atol=0)
    min_snr = loss_weight(objective("min_snr", min_snr_gamma=1.0), "sample", snr)
    assert min_snr is not None
    assert min_snr.tolist() == [0.5, 1.0, 1.0]
    assert loss_weight(objective("none"), "sample", snr) is None
    no_p2 = loss_weight(objective("p2", p2_gamma=0.0), "epsilon", snr)
    assert no_p2 is not None
    assert no_p2.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weighting", "prediction_type"), CASES)
def test_no_signal_gives_no_infinite_weight_and_no_untrained_timestep(
    weighting: str, prediction_type: str, dtype: torch.dtype
) -> None:
    """At an SNR of exactly 0 every weight is 1, as in the code of Hang et al.; so is p2 with k = 1 by itself."""
    schedule = NoiseSchedule.from_betas(ZERO_SNR)
    assert schedule.snr[-1] == 0
    weights = loss_weight(objective(weighting), prediction_type, schedule.snr.to(dtype))
    assert weights is not None
    assert weights[-1] == 1
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


def test_truncated_snr_of_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match="truncated_snr grows beyond all bounds"):
        loss_weight(objective("truncated_snr"), "epsilon", torch.ones(2))


@pytest.mark.parametrize("weighting", ["snr", "truncated_snr", "min_snr"])
def test_one_prediction_in_three_forms_has_one_loss(weighting: str) -> None:
    """The losses of x_0, epsilon and v that say the same differ by float32 rounding alone.

    It is amplified where x_0 is small against x_t: errors are of size 1, and 1e-4 is left of 6e-8 at an SNR of 1e-4.
    """
    generator = torch.Generator().manual_seed(0)
    x_0, noise, error = (torch.randn(8, 2, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 1, 57, 129, 130, 258, 500, 700])
    losses = {}
    for prediction_type in PUBLISHED[weighting]:
        scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type)
        alpha = scheduler.gather("sqrt_alphas_cumprod", timesteps, x_0)
        sigma = scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, x_0)
        predicted_x_0 = x_0 + sigma * error
        predicted_noise = noise - alpha * error  # what is left of x_t
        output = {
            "epsilon": predicted_noise,
            "sample": predicted_x_0,
            "v_prediction": alpha * predicted_noise - sigma * predicted_x_0,
        }[prediction_type]
        loss = DenoisingLoss(scheduler, objective(weighting))
        losses[prediction_type] = loss(lambda *_, output=output, **__: (output,), x_0, noise, timesteps)
    for prediction_type in losses:
        torch.testing.assert_close(losses[prediction_type], losses["sample"], rtol=1e-4, atol=0)


def test_the_snr_weighting_of_x_0_is_the_simple_loss_of_epsilon() -> None:
    """Salimans & Ho 2022, section 4; float32 rounding as above."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise, predicted_noise = (torch.randn(8, 2, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 1, 57, 129, 130, 258, 500, 700])
    scheduler = GaussianDiffusionScheduler.create(prediction_type="epsilon")
    simple = DenoisingLoss(scheduler)(lambda *_, **__: (predicted_noise,), x_0, noise, timesteps)
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    predicted_x_0 = scheduler.predict_original_sample(predicted_noise, timesteps, x_t)
    weighted = DenoisingLoss(GaussianDiffusionScheduler.create(prediction_type="sample"), objective("snr"))
    losses = weighted(lambda *_, **__: (predicted_x_0,), x_0, noise, timesteps)
    torch.testing.assert_close(losses, simple, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", PUBLISHED)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_losses_are_finite_where_there_is_no_signal_and_where_there_is_hardly_noise(
    prediction_type: str, weighting: str
) -> None:
    scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    generator = torch.Generator().manual_seed(0)
    x_0, noise, output = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(3))
    output.requires_grad_(True)
    loss = DenoisingLoss(scheduler, objective(weighting))
    losses = loss(lambda *_, **__: (output,), x_0, noise, torch.tensor([0, 999]))
    (slope,) = torch.autograd.grad(losses.sum(), output)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slope).all()
    assert slope.flatten(1).any(dim=1).all()
