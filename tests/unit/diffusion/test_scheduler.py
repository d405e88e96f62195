"""The scheduler's contract: configuration, dtypes, timesteps, cost of a step, and what it refuses."""

import copy
import inspect
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from oracles import OperationCounter, seeded

from ddpm_hf.diffusion import GaussianDiffusionScheduler

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Model output and sample."""
    output, sample = torch.randn(2, *shape, dtype=torch.float64, generator=seeded()).to(dtype)
    return output, sample


def started(count: int = 10, **config) -> GaussianDiffusionScheduler:
    scheduler = GaussianDiffusionScheduler(**config)
    scheduler.set_timesteps(count)
    return scheduler


# Configuration


def test_configuration_has_the_keys_and_defaults_of_ddpm_scheduler() -> None:
    stock = {key: value for key, value in DDPMScheduler().config.items() if not key.startswith("_")}
    assert dict(GaussianDiffusionScheduler().config) == stock


def test_attributes_that_other_code_reads_are_those_of_ddpm_scheduler() -> None:
    ours, stock = GaussianDiffusionScheduler(variance_type="fixed_large"), DDPMScheduler(variance_type="fixed_large")
    for name in ("init_noise_sigma", "order", "variance_type", "custom_timesteps", "num_inference_steps", "one"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert len(ours) == len(stock)
    sample = torch.zeros(1)
    assert ours.scale_model_input(sample, 5) is sample


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "sigmoid", "variance_type": "learned_range", "timestep_spacing": "trailing"},
        {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2, "prediction_type": "v_prediction"},
        {"variance_type": "fixed_large_log", "steps_offset": 1},
    ],
)
def test_stock_configuration_survives_a_round_trip_byte_for_byte(tmp_path: Path, changes: dict) -> None:
    """But for the class name, which the pipeline's folder puts back."""
    DDPMScheduler(**changes).save_pretrained(tmp_path / "stock")
    GaussianDiffusionScheduler.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    stock, ours = ((tmp_path / name / "scheduler_config.json").read_text() for name in ("stock", "ours"))
    assert ours.replace("GaussianDiffusionScheduler", "DDPMScheduler") == stock
    again = GaussianDiffusionScheduler.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "scheduler_config.json").read_text() == ours


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"beta_schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}),
        ({"beta_schedule": "quad"}, {"beta_schedule": "scaled_linear", "trained_betas": None}),
        ({"prediction_type": "eps"}, {"prediction_type": "epsilon"}),
        ({"prediction_type": "x0"}, {"prediction_type": "sample"}),
        ({"prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({"variance_type": "fixed_large_log"}, {"variance_type": "fixed_large"}),
    ],
)
def test_create_stores_aliases_under_the_names_of_diffusers(given: dict, stored: dict) -> None:
    config = GaussianDiffusionScheduler.create(**given).config
    assert {key: config[key] for key in stored} == stored


@pytest.mark.parametrize("name", ["sigmoid", "laplace", "sigmoid_alpha_bar", "warmup10", "warmup50", "const", "jsd"])
def test_create_stores_other_schedules_as_betas_that_survive_json(name: str) -> None:
    created = GaussianDiffusionScheduler.create(beta_schedule=name, num_train_timesteps=20, prediction_type="v")
    assert created.config.beta_schedule == "linear"
    reloaded = GaussianDiffusionScheduler.from_config(json.loads(created.to_json_string()))
    assert torch.equal(created.noise_schedule.betas, reloaded.noise_schedule.betas)
    assert DDPMScheduler.from_config(created.config).betas.tolist() == created.betas.tolist()


def test_options_that_stock_accepts_in_silence_are_refused_with_a_sentence() -> None:
    refused = {
        "'cosine' is not one of linear.*create also takes aliases": {"beta_schedule": "cosine"},
        "'warmup10' is not one of linear.*every schedule": {"beta_schedule": "warmup10"},
        "'v' is not one of epsilon, sample, v_prediction": {"prediction_type": "v"},
        "'other' is not one of fixed_small": {"variance_type": "other"},
        "Pass quadratic to set_timesteps": {"timestep_spacing": "quadratic"},
        "beta_start is 0.0001 and beta_end 2.0": {"beta_end": 2.0},
        "beta_start is 0.1 and beta_end 0.02.*trained_betas": {"beta_start": 0.1},
        "2 values, num_train_timesteps is 1000": {"trained_betas": [0.1, 0.2]},
        r"pass betas.tolist\(\)": {"trained_betas": torch.tensor([0.1] * 1000)},
        "trained_betas is 0.1; it must be a list of 1000 numbers": {"trained_betas": 0.1},
        "num_train_timesteps is 0; it must be a whole number": {"num_train_timesteps": 0},
        "num_train_timesteps is 10.0; it must be a whole number": {"num_train_timesteps": 10.0},
        "num_train_timesteps is True": {"num_train_timesteps": True},
        "steps_offset is -1; it must be a whole number of at least 0": {"steps_offset": -1},
        "clip_sample_range is 0; it must be a number above 0": {"clip_sample_range": 0},
        "clip_sample_range is nan": {"clip_sample_range": float("nan")},
        "sample_max_value is '1'; it must be a number above 0": {"sample_max_value": "1"},
        "dynamic_thresholding_ratio is 1.5; it must be a number between 0 and 1": {"dynamic_thresholding_ratio": 1.5},
        "clip_sample 'no' is not one of True, False": {"clip_sample": "no"},
        "thresholding None is not one of True, False": {"thresholding": None},
        "rescale_betas_zero_snr needs at least 2 timesteps": {"num_train_timesteps": 1, "rescale_betas_zero_snr": True},
    }
    for sentence, config in refused.items():
        with pytest.raises(ValueError, match=sentence):
            GaussianDiffusionScheduler(**config)
    with pytest.raises(ValueError, match="Pass quadratic to set_timesteps"):
        GaussianDiffusionScheduler.create(timestep_spacing="quadratic")
    with pytest.raises(ValueError, match=r"'cosinus' is unknown; choose one of .*sigmoid_alpha_bar, .*cosine, quad"):
        GaussianDiffusionScheduler.create(beta_schedule="cosinus")


def test_ranges_of_betas_are_not_looked_at_where_they_mean_nothing() -> None:
    """As in diffusers, whose saved configurations always have them."""
    for config in ({"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}):
        betas = GaussianDiffusionScheduler(**config, beta_start=0.5, beta_end=0.1).betas
        assert torch.equal(betas, GaussianDiffusionScheduler(**config).betas)


def test_create_takes_every_option_of_the_constructor() -> None:
    options = {
        "num_train_timesteps": 100,
        "beta_start": 0.001,
        "beta_end": 0.2,
        "beta_schedule": "scaled_linear",
        "variance_type": "learned_range",
        "clip_sample": False,
        "prediction_type": "sample",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "clip_sample_range": 2.0,
        "sample_max_value": 3.0,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "rescale_betas_zero_snr": True,
    }
    parameters = set(inspect.signature(GaussianDiffusionScheduler.__init__).parameters) - {"self"}
    assert set(options) | {"trained_betas"} == parameters
    assert dict(GaussianDiffusionScheduler.create(**options).config) == options | {"trained_betas": None}
    created = GaussianDiffusionScheduler.create(num_train_timesteps=2, trained_betas=[0.2, 0.1])
    assert created.config.trained_betas == [0.2, 0.1]
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta_stop'"):
        GaussianDiffusionScheduler.create(beta_stop=0.1)


def test_betas_scaled_with_the_length_are_stored_as_plain_betas() -> None:
    """So every scheduler reads them; a schedule that stock lacks is stored as betas. Stock's tables are float32."""
    created = GaussianDiffusionScheduler.create(num_train_timesteps=100, scale_betas_to_timesteps=True)
    assert (created.config.beta_start, created.config.beta_end) == (0.001, 0.2)
    assert created.config.trained_betas is None
    assert "scale_betas_to_timesteps" not in created.config
    torch.testing.assert_close(DDPMScheduler.from_config(created.config).betas, created.betas)
    warmup = GaussianDiffusionScheduler.create(
        num_train_timesteps=100, scale_betas_to_timesteps=True, beta_schedule="warmup50"
    )
    assert warmup.config.trained_betas[0] == pytest.approx(0.001, rel=1e-15)
    assert warmup.config.trained_betas[-1] == pytest.approx(0.2, rel=1e-15)
    plain = GaussianDiffusionScheduler.create(num_train_timesteps=100)
    assert (plain.config.beta_start, plain.config.beta_end) == (0.0001, 0.02)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale_betas_to_timesteps": True, "beta_schedule": "cosine"}, "does not apply to beta_schedule"),
        ({"scale_betas_to_timesteps": True, "beta_schedule": "jsd"}, "does not apply to beta_schedule"),
        ({"scale_betas_to_timesteps": True, "num_train_timesteps": 19}, "must be at least 20"),
        ({"scale_betas_to_timesteps": True, "trained_betas": [0.1] * 1000}, "leave these out"),
        ({"beta_schedule": "cosine", "trained_betas": [0.1] * 1000}, "leave these out"),
    ],
)
def test_options_of_create_without_effect_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusionScheduler.create(**options)


def test_scheduler_survives_copy_and_pickle() -> None:
    """Data loaders' workers and deepcopy of a pipeline need it."""
    scheduler = started()
    output, sample = tensors(1, 1, 2, 2)
    expected = scheduler.step(output, scheduler.timesteps[3], sample, generator=seeded()).prev_sample
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):  # noqa: S301
        for t in (scheduler.timesteps[3], twin.timesteps[3], 600):
            assert torch.equal(twin.step(output, t, sample, generator=seeded()).prev_sample, expected)


# Timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("count", [1, 3, 7, 61, 999, 1000])
def test_previous_timestep_is_the_next_of_the_list_whatever_the_spacing(spacing: str, count: int) -> None:
    scheduler = GaussianDiffusionScheduler()
    scheduler.set_timesteps(count, timestep_spacing=spacing)
    steps = scheduler.timesteps.tolist()
    assert len(steps) == scheduler.num_inference_steps == count
    assert [scheduler.previous_timestep(t).item() for t in steps] == [*steps[1:], -1]


def test_previous_timestep_is_t_minus_1_before_a_run_is_started() -> None:
    scheduler = GaussianDiffusionScheduler()
    assert [scheduler.previous_timestep(t).item() for t in (999, 500, 0)] == [998, 499, -1]
    assert scheduler.num_inference_steps is None
    assert len(scheduler) == 1000


def test_custom_timesteps_come_as_any_sequence_of_integers() -> None:
    steps = [100, 87, 50, 1, 0]
    for given in (steps, tuple(steps), np.array(steps), torch.tensor(steps)):
        scheduler = GaussianDiffusionScheduler()
        scheduler.set_timesteps(timesteps=given)
        assert scheduler.timesteps.tolist() == steps
        assert scheduler.custom_timesteps
        assert [scheduler.previous_timestep(t).item() for t in steps] == [87, 50, 1, 0, -1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 5, "timesteps": [3, 2]}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "0 is not between 1 and 1000"),
        ({"num_inference_steps": 1001}, "1001 is not between 1 and 1000"),
        ({"timesteps": []}, "empty"),
        ({"timesteps": [1, 2]}, "strictly descending"),
        ({"timesteps": [2, 2]}, "strictly descending"),
        ({"timesteps": [1000, 2]}, "from 1000 to 2, outside 0 ... 999"),
        ({"timesteps": [2, -1]}, "from 2 to -1, outside 0 ... 999"),
        ({"timesteps": [2.5, 1]}, "A timestep is 2.5; it must be a whole number"),
        ({"timesteps": ["a"]}, "A timestep is 'a'; it must be a whole number"),
        ({"timesteps": [2, True]}, "A timestep is True; it must be a whole number"),
        ({"timesteps": 5}, "timesteps is 5; it must be a list of whole numbers"),
        ({"num_inference_steps": "a"}, "num_inference_steps is 'a'; it must be a whole number"),
        ({"num_inference_steps": 1.5}, "num_inference_steps is 1.5; it must be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps is True; it must be a whole number"),
        ({"num_inference_steps": [5]}, r"num_inference_steps is \[5\]; it must be a whole number"),
        ({"num_inference_steps": float("nan")}, "num_inference_steps is nan; it must be a whole number"),
        ({"num_inference_steps": -5}, "-5 is not between 1 and 1000"),
        ({"timesteps": [2, 1], "timestep_spacing": "leading"}, "does not apply to a custom list"),
        ({"num_inference_steps": 5, "timestep_spacing": "karras"}, "'karras' is unknown"),
        ({"num_inference_steps": 5, "timestep_spacing": ""}, "'' is unknown"),
    ],
)
def test_impossible_runs_are_refused_with_a_sentence(arguments: dict, sentence: str) -> None:
    """And the run that was there goes on."""
    scheduler = started(10)
    with pytest.raises(ValueError, match=sentence):
        scheduler.set_timesteps(**arguments)
    assert (scheduler.num_inference_steps, scheduler.custom_timesteps) == (10, False)
    assert len(scheduler.timesteps) == 10


def test_an_offset_that_leaves_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 1000 to 1, outside.*; lower num_inference_steps or steps_offset"):
        GaussianDiffusionScheduler(steps_offset=1).set_timesteps(1000)


def test_every_way_to_name_a_timestep_means_the_same_row() -> None:
    """Views of the list are mapped by where they lie, all else by value: never a wrong row."""
    scheduler = started(10)
    output, sample = tensors(1, 1, 2, 2)
    run = scheduler.timesteps
    for row, t in enumerate(run.tolist()):
        expected = scheduler.step(output, t, sample, generator=seeded()).prev_sample
        ways = {
            "element": run[row],
            "iteration": list(run)[row],
            "of a slice": run[row:][0],
            "of a reversal": run.flip(0)[9 - row],
            "of a strided slice": run[row % 2 :: 2][row // 2],
            "one-element slice": run[row : row + 1],
            "column": run.view(5, 2)[row // 2, row % 2],
            "copy": run[row].clone(),
            "other list": torch.tensor([7, t, 9])[1],
            "int32": run[row].int(),
            "low word of the same storage": run.view(torch.int32)[2 * row],
            "float": run[row].float(),
            "numpy": np.int64(t),
        }
        for way, timestep in ways.items():
            result = scheduler.step(output, timestep, sample, generator=seeded()).prev_sample
            assert torch.equal(result, expected), (way, t)


def test_previous_timesteps_of_a_batch_keep_its_shape() -> None:
    scheduler = started(10)
    timesteps = torch.tensor([[900, 0], [100, 500]])
    assert scheduler.previous_timestep(timesteps).tolist() == [[800, -1], [0, 400]]
    assert scheduler.previous_timestep(timesteps[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="timestep 50 is not in the list"):
        scheduler.previous_timestep(torch.tensor([900, 50]))


def test_elements_of_an_earlier_run_are_read_by_value() -> None:
    """The same place in another run's list holds another timestep."""
    scheduler = started(10)
    earlier = list(scheduler.timesteps)
    scheduler.set_timesteps(20)
    assert scheduler.previous_timestep(earlier[3]).item() == 550
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep 600 is not in the list of 3 timesteps"):
        scheduler.previous_timestep(earlier[3])


def test_a_list_changed_in_place_is_read_by_value() -> None:
    scheduler = started(10)
    scheduler.timesteps[0] = 300
    assert scheduler.previous_timestep(scheduler.timesteps[0]).item() == 200


def test_an_assigned_list_is_the_one_that_is_run() -> None:
    """Image-to-image pipelines assign the tail of the list."""
    scheduler = started(10)
    scheduler.timesteps = scheduler.timesteps[7:]
    assert scheduler.timesteps.tolist() == [200, 100, 0]
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [100, 0, -1]
    scheduler.timesteps = torch.tensor([200, 50])
    assert scheduler.previous_timestep(scheduler.timesteps[0]).item() == 50


def test_calls_may_come_in_any_order() -> None:
    """No counter is kept, so a step repeated or skipped gives what it gives in order."""
    scheduler = started(10)
    output, sample = tensors(2, 1, 2, 2)
    in_order = [scheduler.step(output, t, sample, generator=seeded()).prev_sample for t in scheduler.timesteps]
    for row in (9, 0, 5, 5, 2):
        result = scheduler.step(output, scheduler.timesteps[row], sample, generator=seeded()).prev_sample
        assert torch.equal(result, in_order[row])


@pytest.mark.parametrize(
    "timestep", [901, -1, 1000, 900.5, None, "900", True, [900], torch.tensor(901), torch.tensor(900.5)]
)
def test_a_timestep_that_is_not_in_the_list_is_refused(timestep: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"is not in the list of 10 timesteps being run \(900 ... 0\)"):
        started(10).step(*reversed_arguments(timestep))


def reversed_arguments(timestep: float | torch.Tensor) -> tuple:
    output, sample = tensors(1, 1, 2, 2)
    return output, timestep, sample


# The step


@pytest.mark.parametrize("sample_dtype", DTYPES)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_a_step_computes_in_float32_or_float64_and_returns_the_dtype_of_the_sample(
    sample_dtype: torch.dtype, output_dtype: torch.dtype
) -> None:
    """Equal to the step on widened inputs, rounded once."""
    wide = torch.float64 if sample_dtype == torch.float64 else torch.float32
    output, sample = tensors(2, 2, 3, 3)
    output, sample = output.to(output_dtype), sample.to(sample_dtype)
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = started(prediction_type=prediction_type)
        result = scheduler.step(output, 500, sample, generator=seeded())
        expected = scheduler.step(output.to(wide), 500, sample.to(wide), generator=seeded())
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == sample_dtype
        assert torch.equal(result.prev_sample, expected.prev_sample.to(sample_dtype))
        assert torch.equal(result.pred_original_sample, expected.pred_original_sample.to(sample_dtype))


MOST_OPERATIONS = {"fixed_small": 7, "fixed_large": 7, "learned_range": 9, "learned": 10}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", MOST_OPERATIONS)
def test_a_step_launches_few_operations_and_never_reads_a_tensor_on_the_host(
    variance_type: str, prediction_type: str
) -> None:
    """Counts of what reaches the dispatcher, views left out: exact on any machine."""
    scheduler = started(prediction_type=prediction_type, variance_type=variance_type)
    channels = 2 if "learned" in variance_type else 1
    output, sample = torch.randn(2, channels, 4, 4), torch.randn(2, 1, 4, 4)
    for timestep, eta in itertools.product((500, scheduler.timesteps[4]), (1.0, 0.5)):
        with OperationCounter() as counter:
            scheduler.step(output, timestep, sample, generator=seeded(), eta=eta)
        assert counter.host_reads == 0, counter.counts
        assert counter.launched <= MOST_OPERATIONS[variance_type], counter.counts
    with OperationCounter() as counter:
        scheduler.step(output, scheduler.timesteps[4], sample, eta=0.0)
    assert counter.host_reads == 0, counter.counts
    assert counter.launched <= 5, counter.counts
    half_sample = sample.half()
    with OperationCounter() as counter:
        scheduler.step(output, 500, half_sample, generator=seeded())
    assert counter.counts["_to_copy"] == 3
    with OperationCounter() as counter:
        scheduler.step(output, 500, sample, generator=[seeded(0), seeded(1)])
    assert counter.launched <= MOST_OPERATIONS[variance_type] + 2


def test_predictions_of_x_0_are_clipped_and_the_direction_follows_the_clipped_one() -> None:
    """eta = 0: x_prev = sqrt(a_prev) x_0 + sqrt(1 - a_prev) (x_t - sqrt(a) x_0) / sqrt(1 - a). Float64 rounding."""
    output, sample = tensors(2, 1, 3, 3, dtype=torch.float64)
    for limit in (1.0, 0.25):
        scheduler = started(clip_sample_range=limit)
        step = scheduler.noise_schedule.transitions([500, 400])[0]
        a, a_prev = step.alpha_bar, step.alpha_bar_prev
        x_0 = ((sample - (1 - a) ** 0.5 * output) / a**0.5).clamp(-limit, limit)
        assert bool((x_0.abs() == limit).any())
        eps = (sample - a**0.5 * x_0) / (1 - a) ** 0.5
        result = scheduler.step(output, 500, sample, eta=0.0)
        torch.testing.assert_close(result.pred_original_sample, x_0, rtol=0, atol=1e-12)
        expected = a_prev**0.5 * x_0 + (1 - a_prev) ** 0.5 * eps
        torch.testing.assert_close(result.prev_sample, expected, rtol=0, atol=1e-12)
    unclipped = started(clip_sample=False).step(output, 500, sample, eta=0.0).pred_original_sample
    assert unclipped.abs().max().item() > 1


def test_dynamic_thresholding_is_that_of_ddpm_scheduler() -> None:
    """Float32: the same operations on predictions that differ by 1e-6 relative."""
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    output, sample = tensors(2, 1, 8, 8)
    ours, stock = started(**config), DDPMScheduler(**config)
    stock.set_timesteps(10)
    expected = stock.step(output, 500, sample, generator=seeded()).pred_original_sample
    result = ours.step(output, 500, sample, generator=seeded()).pred_original_sample
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_thresholding_and_clipping_take_samples_of_any_rank() -> None:
    for config in ({"thresholding": True, "sample_max_value": 2.0}, {}, {"clip_sample": False}):
        scheduler = started(**config)
        image, sample = tensors(2, 1, 3, 4)
        expected = scheduler.step(image, 500, sample, eta=0.0).prev_sample
        for shape in ((2, 12), (2, 1, 1, 3, 4), (2, 3, 4)):
            result = scheduler.step(image.reshape(shape), 500, sample.reshape(shape), eta=0.0).prev_sample
            assert torch.equal(result, expected.reshape(shape))
        flat, start = tensors(12)
        assert scheduler.step(flat, 500, start, seeded()).prev_sample.shape == (12,)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_the_last_step_draws_no_noise_whatever_its_timestep(timestep_spacing: str) -> None:
    scheduler = started(timestep_spacing=timestep_spacing, variance_type="fixed_large")
    output, sample = tensors(1, 1, 2, 2)
    generator = seeded()
    before = generator.get_state()
    result = scheduler.step(output, scheduler.timesteps[-1], sample, generator=generator)
    assert torch.equal(generator.get_state(), before)
    torch.testing.assert_close(result.prev_sample, result.pred_original_sample, rtol=0, atol=0)


def test_a_generator_for_each_sample_makes_it_independent_of_its_batch() -> None:
    scheduler = started()
    output, sample = tensors(3, 1, 4, 4)
    together = scheduler.step(output, 500, sample, generator=[seeded(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(output[i : i + 1], 500, sample[i : i + 1], generator=[seeded(i)]).prev_sample
        assert torch.equal(together[i : i + 1], alone)


def test_results_come_as_object_or_tuple() -> None:
    scheduler = started()
    output, sample = tensors(1, 1, 2, 2)
    result = scheduler.step(output, 500, sample, generator=seeded())
    prev_sample, pred_original_sample = scheduler.step(output, 500, sample, generator=seeded(), return_dict=False)
    assert torch.equal(result.prev_sample, prev_sample)
    assert torch.equal(result["pred_original_sample"], pred_original_sample)
    assert torch.equal(result[0], prev_sample)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf"), "x", None, [0.5], torch.tensor(0.5)])
def test_an_eta_outside_0_and_1_is_refused(eta: float) -> None:
    """A tensor too: reading it would make the host wait."""
    output, sample = tensors(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"eta is .*; it must be a number between 0 \(deterministic\) and 1"):
        started().step(output, 500, sample, eta=eta)


def test_an_eta_may_be_a_number_of_any_type() -> None:
    output, sample = tensors(1, 1, 2, 2)
    expected = started().step(output, 500, sample, seeded(), eta=0.5).prev_sample
    for eta in (np.float64(0.5), np.float32(0.5)):
        assert torch.equal(started().step(output, 500, sample, seeded(), eta=eta).prev_sample, expected)


def test_outputs_that_do_not_fit_are_refused() -> None:
    output, sample = torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\) for .*; variance_type fixed_small needs \(2, 1, 4, 4\)"):
        started().step(output, 500, sample)
    with pytest.raises(ValueError, match=r"variance_type learned_range needs \(2, 2, 4, 4\)"):
        started(variance_type="learned_range").step(sample, 500, sample)
    for other in (sample[:1], sample[:, :, :1], sample[..., 0]):
        with pytest.raises(ValueError, match=r"needs \(2, 1, 4, 4\)"):
            started().step(other, 500, sample)
    with pytest.raises(ValueError, match="generator is a list of 3 for a batch of 2"):
        started().step(sample, 500, sample, generator=[seeded()] * 3)
    with pytest.raises(ValueError, match="takes one for the whole batch"):
        started().step(sample, torch.tensor([500, 400]), sample)


def test_noise_predictions_are_refused_where_no_signal_is_left_and_only_there() -> None:
    scheduler = started(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    output, sample = tensors(1, 1, 2, 2)
    with pytest.raises(ValueError, match="x_999 holds no signal"):
        scheduler.step(output, 999, sample)
    assert bool(scheduler.step(output, 899, sample).prev_sample.isfinite().all())


def test_noise_predictions_are_refused_where_float32_cannot_hold_the_signal() -> None:
    """Alpha_bar falls to 1e-43 here: its root overflows in the division, inf - inf is not a number."""
    scheduler = GaussianDiffusionScheduler(beta_start=0.1, beta_end=0.1)
    output, sample = tensors(1, 1, 2, 2)
    assert 0 < scheduler.noise_schedule.alphas_cumprod[940].item() < 1e-42
    with pytest.raises(ValueError, match="x_940 holds no signal"):
        scheduler.step(output, 940, sample)
    assert bool(scheduler.step(output, 800, sample).prev_sample.isfinite().all())
    other = GaussianDiffusionScheduler(beta_start=0.1, beta_end=0.1, prediction_type="v_prediction")
    assert bool(other.step(output, 940, sample).prev_sample.isfinite().all())


def test_a_run_started_in_inference_mode_works_outside() -> None:
    scheduler = GaussianDiffusionScheduler()
    with torch.inference_mode():
        scheduler.set_timesteps(10)
    output, sample = tensors(1, 1, 2, 2)
    with OperationCounter() as counter:
        scheduler.step(output, scheduler.timesteps[3], sample)
    assert counter.host_reads == 0
