"""Timesteps chosen for a network: errors equal the steps of the schedulers, and no list has a smaller sum of them."""

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation import timesteps
from ddpm_hf.evaluation.timesteps import EVEN, Trajectories, choose_timesteps, follow_trajectories, start_noise
from tests.conftest import tiny_unet

OPTIONS: dict[str, Any] = {"batch_size": 2, "seed": 0}


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> GaussianDiffusionPipeline:
    """A network that predicts something else than its input, 60 timesteps and nine candidates."""
    monkeypatch.setattr(timesteps, "NUM_CANDIDATES", 9)
    unet = tiny_unet(10)
    torch.manual_seed(1)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    scheduler = GaussianDiffusionScheduler.create(
        num_train_timesteps=60, beta_schedule="cosine", prediction_type="v_prediction", clip_sample=False
    )
    made = GaussianDiffusionPipeline(unet, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def follow(pipeline: GaussianDiffusionPipeline) -> tuple[Trajectories, torch.Tensor, torch.Tensor]:
    """Return the trajectories of three images, and their states and predicted x_0 from an ordinary call."""
    made = follow_trajectories(pipeline, {}, num_images=3, **OPTIONS)
    states, predictions = [start_noise(pipeline, 0, range(3))], []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> None:
        states.append(tensors["sample"])
        predictions.append(tensors["pred_original_sample"])

    pipeline(
        sample=states[0],
        class_labels=[0, 1, 2],
        timesteps=made.timesteps.tolist(),
        eta=0.0,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["sample", "pred_original_sample"],
    )
    return made, torch.stack(states), torch.stack(predictions)


def test_an_error_is_that_of_a_step_of_the_scheduler(pipeline: GaussianDiffusionPipeline) -> None:
    """From the states of the trajectory, with the predictions there; 1e-4: the schedulers compute in float32."""
    made, states, predictions = follow(pipeline)
    assert made.timesteps.tolist() == [59, 52, 44, 37, 30, 22, 15, 7, 0]

    def v_of(position: int) -> torch.Tensor:
        alpha, sigma = made.alphas[position], made.sigmas[position]
        return (alpha * states[position] - predictions[position]) / sigma

    for before, start, end in ((0, 2, 4), (1, 4, 7), (3, 5, 9)):
        chosen = [int(made.timesteps[position]) for position in (before, start, end) if position < 9]
        ddim = pipeline.scheduler
        ddim.set_timesteps(timesteps=chosen, eta=0.0)
        solver = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)
        solver.set_timesteps(timesteps=chosen)
        solver.step(v_of(before), chosen[0], states[before])
        for error, scheduler in (
            (made.errors(start, end), ddim),
            (made.errors(start, end, before), solver),
        ):
            reached = scheduler.step(v_of(start), chosen[1], states[start]).prev_sample
            expected = float((reached - states[end]).double().square().mean())
            assert expected > 1e-8
            assert float(error) == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("order", [1, 2])
def test_no_list_has_a_smaller_sum_of_errors(pipeline: GaussianDiffusionPipeline, order: int) -> None:
    made = follow(pipeline)[0]
    weights = np.linspace(2, 1, len(made) + 1)

    def total(chosen: tuple[int, ...]) -> float:
        path = [0, *chosen, len(made)]
        before = [None, *path] if order == 2 else [None] * len(path)
        steps = zip(before, path[:-1], path[1:], strict=False)
        return float(sum(weights[end] * made.errors(start, end, earlier) for earlier, start, end in steps))

    best = min(itertools.combinations(range(1, len(made)), 3), key=total)
    assert made.shortest(4, order, weights) == made.timesteps[[0, *best]].tolist()


def test_the_list_with_the_nearest_images_is_chosen(pipeline: GaussianDiffusionPipeline) -> None:
    made = follow(pipeline)[0]
    solver = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    own = pipeline.scheduler
    choice = choose_timesteps(pipeline, solver, made, 4, {}, indices=range(3, 5), **OPTIONS)
    assert pipeline.scheduler is own
    assert len(choice.errors) == 5 and choice.errors[choice.name] == min(choice.errors.values())
    start = start_noise(pipeline, 0, range(3, 5))
    arguments: dict[str, Any] = {"sample": start, "class_labels": [3, 4], "output_type": "pt"}
    expected = pipeline(**arguments, timesteps=made.timesteps.tolist(), eta=0.0).images
    pipeline.scheduler = solver
    images = pipeline(**arguments, timesteps=choice.timesteps).images
    assert float((images - expected).square().mean().sqrt()) == pytest.approx(choice.errors[choice.name], rel=1e-5)
    images = pipeline(**arguments, timesteps=[59, 44, 29, 14]).images
    assert float((images - expected).square().mean().sqrt()) == pytest.approx(choice.errors[EVEN], rel=1e-5)
