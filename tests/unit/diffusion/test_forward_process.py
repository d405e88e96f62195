"""Noising, velocity, posterior and predictions: right per sample, in float32, and without a read on the host."""

import pytest
import torch
from oracles import OperationCounter, seeded

from ddpm_hf.diffusion import GaussianDiffusionScheduler

TIMESTEPS = torch.tensor([0, 5, 499, 999])


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and noise, (4, 2, 3, 3)."""
    x_0, noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64, generator=seeded()).to(dtype)
    return x_0.clamp(-1, 1), noise


def test_each_sample_is_noised_at_its_own_timestep() -> None:
    """Two float32 products and a sum of values below 5: atol 1e-6."""
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    x_t = scheduler.add_noise(x_0, noise, TIMESTEPS)
    v = scheduler.get_velocity(x_0, noise, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS.tolist()):
        alpha_bar = scheduler.noise_schedule.alphas_cumprod[t]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        clean, eps = x_0[i].double(), noise[i].double()
        torch.testing.assert_close(x_t[i].double(), alpha * clean + sigma * eps, rtol=0, atol=1e-6)
        torch.testing.assert_close(v[i].double(), alpha * eps - sigma * clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_get_noise_at_every_timestep(dtype: torch.dtype) -> None:
    """The result is the float32 result rounded once; a table in half precision would add no noise at t = 0."""
    scheduler, reference = GaussianDiffusionScheduler(), GaussianDiffusionScheduler()
    x_0, noise = batch(dtype)
    x_t = scheduler.add_noise(x_0, noise, TIMESTEPS)
    v = scheduler.get_velocity(x_0, noise, TIMESTEPS)
    assert torch.equal(x_t, reference.add_noise(x_0.float(), noise.float(), TIMESTEPS).to(dtype))
    assert torch.equal(v, reference.get_velocity(x_0.float(), noise.float(), TIMESTEPS).to(dtype))
    only_noise = scheduler.add_noise(torch.zeros_like(x_0), noise, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(only_noise, noise * 0.01, rtol=0.01, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_predictions_recover_data_and_noise(prediction_type: str, variance_type: str) -> None:
    """Float64 rounding, amplified by 1 / alpha = 157 at t = 999."""
    scheduler = GaussianDiffusionScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = batch(torch.float64)
    x_t = scheduler.add_noise(x_0, noise, TIMESTEPS)
    output = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": scheduler.get_velocity(x_0, noise, TIMESTEPS),
    }[prediction_type]
    if variance_type == "learned_range":
        output = torch.cat([output, torch.zeros_like(output)], dim=1)
    predicted = scheduler.predict_original_sample(output, TIMESTEPS, x_t)
    torch.testing.assert_close(predicted, x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(scheduler.predict_noise(output, TIMESTEPS, x_t), noise, rtol=0, atol=1e-10)


def test_posterior_is_equation_7_at_each_timestep() -> None:
    """Float64 rounding; the log-variance at t = 0 is that of t = 1, the variance is 0."""
    scheduler = GaussianDiffusionScheduler()
    x_0, x_t = batch(torch.float64)
    posterior = scheduler.posterior(x_0, x_t, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS.tolist()):
        beta = scheduler.noise_schedule.betas[t].item()
        alpha_bar = (1 - scheduler.noise_schedule.betas[: t + 1]).prod().item()
        alpha_bar_prev = (1 - scheduler.noise_schedule.betas[:t]).prod().item()
        mean = alpha_bar_prev**0.5 * beta * x_0[i] + (1 - beta) ** 0.5 * (1 - alpha_bar_prev) * x_t[i]
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        torch.testing.assert_close(posterior.mean[i], mean / (1 - alpha_bar), rtol=1e-9, atol=1e-12)
        assert posterior.variance[i].item() == pytest.approx(variance, rel=1e-9)
        if t > 0:
            assert posterior.log_variance[i].exp().item() == pytest.approx(variance, rel=1e-9)
    assert posterior.log_variance[0].item() == pytest.approx(-9.81672513529567, rel=1e-9)
    assert posterior.variance.shape == (4, 1, 1, 1)


def test_snr_keeps_the_shape_of_the_timesteps() -> None:
    """Float32 rounding."""
    snr = GaussianDiffusionScheduler().snr(TIMESTEPS.view(2, 2))
    assert snr.shape == (2, 2)
    assert snr.dtype == torch.float32
    assert snr.flatten()[0].item() == pytest.approx(9999, rel=1e-6)
    assert snr.flatten()[-1].item() == pytest.approx(4.03599265e-05, rel=1e-6)


def test_every_method_gives_each_sample_what_it_gives_it_alone() -> None:
    """One timestep for each sample, in any order: equal, and the rows do not mix."""
    scheduler = GaussianDiffusionScheduler(prediction_type="v_prediction")
    x_0, noise = batch()
    methods = {
        "add_noise": lambda i, t: scheduler.add_noise(x_0[i], noise[i], t),
        "get_velocity": lambda i, t: scheduler.get_velocity(x_0[i], noise[i], t),
        "predict_original_sample": lambda i, t: scheduler.predict_original_sample(noise[i], t, x_0[i]),
        "predict_noise": lambda i, t: scheduler.predict_noise(noise[i], t, x_0[i]),
        "posterior mean": lambda i, t: scheduler.posterior(x_0[i], noise[i], t).mean,
        "posterior variance": lambda i, t: scheduler.posterior(x_0[i], noise[i], t).variance,
        "snr": lambda i, t: scheduler.snr(t),
        "previous_timestep": lambda i, t: scheduler.previous_timestep(t),
    }
    timesteps = torch.tensor([999, 0, 5, 5])
    for name, method in methods.items():
        together = method(slice(None), timesteps)
        for i in range(4):
            alone = method(slice(i, i + 1), timesteps[i : i + 1])
            assert torch.equal(together[i : i + 1], alone.view_as(together[i : i + 1])), name
        assert torch.equal(method(slice(None), timesteps.int()), together), name


def test_snr_of_one_timestep_is_one_number() -> None:
    """Float32 rounding."""
    assert GaussianDiffusionScheduler().snr(0).item() == pytest.approx(9999, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_samples_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    """The result has the dtype of the samples: of integers nothing but 0 and 1 would be left."""
    scheduler = GaussianDiffusionScheduler()
    images, noise = torch.ones(4, 2, 3, 3).to(dtype), torch.zeros(4, 2, 3, 3)
    calls = {
        "add_noise": lambda: scheduler.add_noise(images, noise, TIMESTEPS),
        "get_velocity": lambda: scheduler.get_velocity(images, noise, TIMESTEPS),
        "predict_original_sample": lambda: scheduler.predict_original_sample(noise, TIMESTEPS, images),
        "predict_noise": lambda: scheduler.predict_noise(noise, TIMESTEPS, images),
        "posterior": lambda: scheduler.posterior(noise, images, TIMESTEPS),
        "step": lambda: scheduler.step(noise, 5, images),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"samples are {dtype}; scale images to floating-point"):
            call()


def test_one_timestep_serves_the_whole_batch() -> None:
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    expected = scheduler.add_noise(x_0, noise, torch.full((4,), 499))
    for t in (499, torch.tensor(499), torch.tensor([499])):
        assert torch.equal(scheduler.add_noise(x_0, noise, t), expected)


def test_samples_of_any_rank_are_noised() -> None:
    scheduler = GaussianDiffusionScheduler()
    for shape in ((4,), (4, 7), (4, 2, 3, 3, 3)):
        noise = torch.randn(shape, generator=seeded())
        x_t = scheduler.add_noise(torch.zeros(shape), noise, TIMESTEPS)
        assert torch.equal(x_t, noise * scheduler.gather("sqrt_one_minus_alphas_cumprod", TIMESTEPS, noise))


def test_noising_takes_few_operations_and_never_reads_a_tensor_on_the_host() -> None:
    """Two look-ups, two sums; counts, not times, so exact. The first call also fills the tables of the device."""
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    scheduler.add_noise(x_0, noise, TIMESTEPS)
    calls = {
        "add_noise": lambda: scheduler.add_noise(x_0, noise, TIMESTEPS),
        "predict_original_sample": lambda: scheduler.predict_original_sample(noise, TIMESTEPS, x_0),
        "posterior": lambda: scheduler.posterior(x_0, noise, TIMESTEPS),
        "snr": lambda: scheduler.snr(TIMESTEPS),
    }
    launched = {}
    for name, call in calls.items():
        call()
        with OperationCounter() as counter:
            call()
        assert counter.host_reads == 0, (name, counter.counts)
        launched[name] = counter.launched
    assert launched["add_noise"] == 4


def test_public_tables_are_float32_and_stay_where_they_are() -> None:
    """Float64 tables would turn users' losses to float64; rounded once from float64 they are off by half a unit."""
    scheduler = GaussianDiffusionScheduler()
    before = scheduler.alphas_cumprod
    scheduler.add_noise(*batch(torch.float64), TIMESTEPS)
    assert scheduler.alphas_cumprod is before
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(scheduler, name).dtype == torch.float32
    assert torch.equal(scheduler.alphas_cumprod, scheduler.noise_schedule.alphas_cumprod.float())


def test_tables_that_were_first_used_in_inference_mode_serve_training() -> None:
    """An inference tensor that backward needs would make it raise."""
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    with torch.inference_mode():
        scheduler.predict_original_sample(noise, TIMESTEPS, x_0)
        scheduler.predict_original_sample(noise, 5, x_0)
    output = noise.clone().requires_grad_()
    (scheduler.predict_original_sample(output, TIMESTEPS, x_0) ** 2).sum().backward()
    (scheduler.predict_original_sample(output, 5, x_0) ** 2).sum().backward()
    assert output.grad is not None
    assert bool((output.grad != 0).all())


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        (torch.tensor([0, 1]), "2 timesteps for 4 samples; pass one for all or for each"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "torch.float32; they must be whole numbers"),
        (torch.tensor([True, False, True, False]), "torch.bool; they must be whole numbers"),
        (torch.tensor([], dtype=torch.int64), "0 timesteps for 4 samples"),
        (None, "timesteps is None; it must be a whole number"),
        ("a", "timesteps is 'a'; it must be a whole number"),
        (1.0, "torch.float32; they must be whole numbers"),
        (torch.tensor([0, 1, 2, 1000]), "outside 0 ... 999"),
        (torch.tensor([0, 1, 2, -1]), "outside 0 ... 999"),
        (-1, "outside 0 ... 999"),
    ],
)
def test_wrong_timesteps_are_refused(timesteps: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusionScheduler().add_noise(*batch(), timesteps)
