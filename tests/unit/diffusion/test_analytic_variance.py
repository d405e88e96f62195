"""The analytic variance equals that of the true reverse step of Gaussian data; its file is part of the pipeline."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.gaussian import optimal_variance
from ddpm_hf.diffusion.scheduler import SECOND_MOMENTS_FILE
from tests.conftest import tiny_unet
from tests.unit.evaluation.gaussian_pipeline import DEVIATION

ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
MOMENTS = (1 - ALPHA_BARS) / (ALPHA_BARS * DEVIATION**2 + 1 - ALPHA_BARS)
"""E[eps^2] of the best prediction for N(m, DEVIATION^2): 1 - Var(eps | x_t)."""


@pytest.mark.parametrize("pair", [(999, 998), (999, 500), (500, 499), (500, 3), (40, 0), (1, 0)])
def test_the_variance_is_that_of_the_true_reverse_step(pair: tuple[int, int]) -> None:
    """q(x_s | x_t) of Gaussian data by conditioning their joint Gaussian, to the 1e-9 that cancellation leaves."""
    t, s = pair
    now, then = ALPHA_BARS[t], ALPHA_BARS[s]
    variance_s, variance_t = (bar * DEVIATION**2 + 1 - bar for bar in (then, now))
    covariance = math.sqrt(now / then) * variance_s
    scheduler = GaussianDiffusionScheduler()
    step = scheduler.noise_schedule.transitions([t, s])[0]
    assert optimal_variance(step, 1.0, MOMENTS[t]) == pytest.approx(variance_s - covariance**2 / variance_t, rel=1e-9)


def test_at_eta_0_only_the_variance_of_x_0_is_added() -> None:
    """Eq. 8 of Bao et al. with lambda = 0, in their notation."""
    step = GaussianDiffusionScheduler().noise_schedule.transitions([500, 300])[0]
    alpha = step.alpha_bar / step.alpha_bar_prev
    factor = math.sqrt((1 - step.alpha_bar) / alpha) - math.sqrt(1 - step.alpha_bar_prev)
    assert optimal_variance(step, 0.0, 0.99) == pytest.approx(factor**2 * 0.01, rel=1e-9)
    assert optimal_variance(step, 0.0, 1.2) == 0


@pytest.mark.parametrize("second_moment", [0.0, 0.9])
def test_data_in_the_range_bound_the_variance(second_moment: float) -> None:
    """Without signal, x_0 is unknown and its variance is at most 1; the ratio of the formula would be infinite."""
    scheduler = GaussianDiffusionScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    step = scheduler.noise_schedule.transitions([999, 300])[0]
    assert step.alpha_bar == 0
    variance = optimal_variance(step, 1.0, second_moment)
    assert variance == pytest.approx(step.posterior_variance + step.alpha_bar_prev, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_adds_the_analytic_variance(eta: float) -> None:
    scheduler = GaussianDiffusionScheduler(clip_sample=False)
    scheduler.eps_second_moments = torch.from_numpy(MOMENTS)
    scheduler.set_timesteps(10)
    x_t, output = torch.zeros(1, 1, 64, 64, dtype=torch.float64), torch.zeros(1, 1, 64, 64, dtype=torch.float64)

    def noise_of(*, is_analytic: bool) -> torch.Tensor:
        scheduler.analytic_variance = is_analytic
        return scheduler.step(output, 500, x_t, torch.Generator().manual_seed(0), eta=eta).prev_sample

    ancestral = scheduler.step(output, 500, x_t, torch.Generator().manual_seed(0), eta=1.0).prev_sample
    step = scheduler.noise_schedule.transitions([500, 400])[0]
    unit = ancestral / math.sqrt(step.posterior_variance)
    torch.testing.assert_close(
        noise_of(is_analytic=True), unit * math.sqrt(optimal_variance(step, eta, MOMENTS[500])), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(noise_of(is_analytic=False), eta * ancestral, rtol=1e-9, atol=0)


def added_noise(scheduler: GaussianDiffusionScheduler, t: int, eta: float) -> float:
    """Return the standard deviation of the noise that a step adds to a mean of 0."""
    zeros = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    added = scheduler.step(zeros, t, zeros, torch.Generator().manual_seed(0), eta=eta).prev_sample
    unit = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float((added / unit).mean())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_step_to_the_last_timestep_adds_no_visible_analytic_noise(eta: float) -> None:
    """At most a gray level on average (Bao et al.), or the 0.01 of noise in x_0 of this schedule."""
    scheduler = GaussianDiffusionScheduler(clip_sample=False, timestep_spacing="linspace")
    scheduler.eps_second_moments = torch.zeros(1000)
    scheduler.analytic_variance = True
    scheduler.set_timesteps(timesteps=[999, 40, 0])
    first, second, _ = scheduler.noise_schedule.transitions([999, 40, 0])
    assert optimal_variance(second, eta, 0.0) > 0.05**2, "the variance before clipping is larger"
    assert added_noise(scheduler, 40, eta) == pytest.approx(0.01, rel=1e-9)
    assert float(scheduler._get_variance(40)) == pytest.approx(1e-4, rel=1e-6)
    unclipped = optimal_variance(first, eta, 0.0)
    assert unclipped > 1 - first.alpha_bar_prev
    assert added_noise(scheduler, 999, eta) == pytest.approx(math.sqrt(unclipped), rel=1e-9)
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", clip_sample=False)
    scheduler.eps_second_moments = torch.zeros(1000)
    scheduler.analytic_variance = True
    scheduler.set_timesteps(timesteps=[300, 0])
    assert added_noise(scheduler, 300, eta) * math.sqrt(2 / math.pi) == pytest.approx(2 / 255, rel=1e-9)


def test_noise_that_the_last_step_removes_is_added() -> None:
    """Timesteps that end at 200, as with `trailing`: without noise, x_200 would differ from the training data."""
    scheduler = GaussianDiffusionScheduler(clip_sample=False)
    scheduler.eps_second_moments = torch.from_numpy(MOMENTS)
    scheduler.analytic_variance = True
    scheduler.set_timesteps(timesteps=[400, 200])
    step = scheduler.noise_schedule.transitions([400, 200])[0]
    assert added_noise(scheduler, 400, 1.0) == pytest.approx(math.sqrt(optimal_variance(step, 1.0, MOMENTS[400])))


def test_only_analytic_noise_is_clipped_and_only_in_samples() -> None:
    """The bound uses the variance before clipping; the fixed variances are those of the papers in every step."""
    scheduler = GaussianDiffusionScheduler(clip_sample=False)
    scheduler.eps_second_moments = torch.zeros(1000)
    scheduler.set_timesteps(timesteps=[300, 0])
    step = scheduler.noise_schedule.transitions([300, 0])[0]
    for variance_type in ("fixed_small", "fixed_large"):
        other = GaussianDiffusionScheduler(clip_sample=False, variance_type=variance_type)
        other.set_timesteps(timesteps=[300, 0])
        expected = step.posterior_variance if variance_type == "fixed_small" else step.beta
        assert added_noise(other, 300, 1.0) == pytest.approx(math.sqrt(expected), rel=1e-9)
    scheduler.analytic_variance = True
    assert scheduler.fixed_variance(step) == optimal_variance(step, 1.0, 0.0)


def test_the_moments_are_saved_with_the_pipeline_and_stock_ignores_them(tmp_path: Path) -> None:
    pipeline = GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler())
    pipeline.scheduler.eps_second_moments = torch.from_numpy(MOMENTS)
    pipeline.save_pretrained(tmp_path)
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.scheduler.eps_second_moments, torch.from_numpy(MOMENTS), rtol=0, atol=0)
    assert not loaded.scheduler.analytic_variance, "it is used only on request"
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is DDPMScheduler
    assert stock.scheduler.config.variance_type == "fixed_small"
    (tmp_path / "scheduler" / SECOND_MOMENTS_FILE).unlink()
    assert GaussianDiffusionPipeline.from_pretrained(tmp_path).scheduler.eps_second_moments is None


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """A limit on the size of files replaces a full disk."""
    scheduler = GaussianDiffusionScheduler()
    scheduler.eps_second_moments = torch.from_numpy(MOMENTS)
    scheduler.save_second_moments(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            scheduler.save_second_moments(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [SECOND_MOMENTS_FILE]
    GaussianDiffusionScheduler().load_second_moments(tmp_path / SECOND_MOMENTS_FILE)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04pickle", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"other": [1.0]}', "cannot be read"),
        (b'{"eps_second_moments": ["a", {}]}', "cannot be read"),
        (json.dumps({"eps_second_moments": [1.0] * 10}).encode(), "it must be 1000 finite numbers"),
        (json.dumps({"eps_second_moments": [math.nan] * 1000}).encode(), "it must be 1000 finite numbers"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / SECOND_MOMENTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusionScheduler().load_second_moments(tmp_path / SECOND_MOMENTS_FILE)


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_large", "fixed_large_log"])
def test_the_analytic_variance_does_not_depend_on_the_fixed_variance(variance_type: str) -> None:
    variances = []
    for kind in ("fixed_small", variance_type):
        scheduler = GaussianDiffusionScheduler(variance_type=kind)
        scheduler.eps_second_moments = torch.from_numpy(MOMENTS)
        scheduler.analytic_variance = True
        variances += [[scheduler.fixed_variance(step) for step in scheduler.noise_schedule.transitions([999, 500, 9])]]
    assert variances[0] == variances[1]


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_has_no_analytic_one(variance_type: str) -> None:
    with pytest.raises(ValueError, match="the analytic one replaces a fixed one only"):
        GaussianDiffusionScheduler(variance_type=variance_type).eps_second_moments = torch.ones(1000)


def test_the_analytic_variance_is_refused_before_the_moments_are_known() -> None:
    with pytest.raises(ValueError, match="analytic_variance needs the second moments"):
        GaussianDiffusionScheduler().analytic_variance = True
