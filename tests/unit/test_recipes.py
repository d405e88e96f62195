"""Every recipe parses, its settings are consistent, and its network fits its images."""

import re
from pathlib import Path

import pytest
import torch

from ddpm_hf.config import parse_command_line
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.models import build_unet
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))

# Shape and number of classes of the datasets of recipes without a resolution.
DATA: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits_8": ((1, 8, 8), 10),
    "emoji_16": ((3, 16, 16), 9),
    "emoji_500_16": ((3, 16, 16), 9),
    "mnist_28": ((1, 28, 28), 10),
    "cifar10_32": ((3, 32, 32), 10),
    "cifar10_32_cosine_v": ((3, 32, 32), 10),
    "cifar10_32_fast": ((3, 32, 32), 10),
}
PAPER_NETWORKS = {"cifar10_32": 35_746_307, "celebahq_256": 113_673_219, "lsun_256": 113_673_219}

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@every_recipe
def test_the_network_of_every_recipe_fits_its_images(recipe: Path) -> None:
    """`build_unet` runs one forward pass on the meta device."""
    config, _ = parse_command_line(["--config", str(recipe)])
    size = config.data.resolution
    assert (size is None) == (recipe.stem in DATA), "add the shape of the dataset to DATA"
    shape, num_classes = DATA[recipe.stem] if size is None else ((config.data.num_channels or 3, size, size), 0)
    assert config.data.num_channels == shape[0]
    if config.data.vae is not None:  # that of Stable Diffusion
        shape = 4, size // 8, size // 8
    num_embeds = num_classes + (config.objective.class_dropout > 0) if config.model.class_conditional else None
    with torch.device("meta"):
        unet = build_unet(config.model, shape, num_embeds)
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert num_parameters == PAPER_NETWORKS.get(recipe.stem, num_parameters)


@every_recipe
def test_the_forward_process_of_every_recipe_ends_in_noise(recipe: Path) -> None:
    config, _ = parse_command_line(["--config", str(recipe)])
    settings = config.to_dict()["diffusion"]
    scheduler = GaussianDiffusionScheduler.create(**settings)
    assert scheduler.noise_schedule.alphas_cumprod[-1] < 1e-4


@every_recipe
def test_every_recipe_has_a_header_with_data_hardware_time_result_and_command(recipe: Path) -> None:
    header = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for what in ("Data:", "Hardware:", "Time:", "Result:", "Command:"):
        assert sum(line.startswith(f"# {what}") for line in header) == 1, what
    (command,) = [line for line in header if line.startswith("# Command:")]
    assert f"train_ddpm.py --config configs/{recipe.name}" in command


def test_the_times_of_the_recipes_are_in_the_benchmark_results() -> None:
    """2 min 10 s in a recipe is 2:10 in a file of results."""
    records = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "benchmarks/results").glob("*.txt"))
    heads = "".join(recipe.read_text(encoding="utf-8").split("\n\n")[0] for recipe in RECIPES)
    times = re.findall(r"(\d+) min (\d+) s", heads)
    assert times
    for minutes, seconds in times:
        assert re.search(rf"\b{minutes}:{seconds:0>2}\b", records), (
            f"{minutes} min {seconds} s is in no file of results"
        )


def test_the_recipes_of_ho_et_al_2020_have_the_settings_of_the_paper() -> None:
    """Ho et al. 2020, appendix B and their code."""
    steps = {"cifar10_32": 800_000, "celebahq_256": 500_000, "lsun_256": 1_200_000}
    for name, num_steps in steps.items():
        config, _ = parse_command_line(["--config", str(REPOSITORY / "configs" / f"{name}.yaml")])
        is_cifar = name == "cifar10_32"
        training, diffusion = config.training, config.diffusion
        assert training.num_steps == num_steps
        assert training.train_batch_size == (128 if is_cifar else 64)
        assert training.learning_rate == (2e-4 if is_cifar else 2e-5)
        assert (training.learning_rate_warmup_steps, training.ema_decay, training.max_grad_norm) == (5000, 0.9999, 1.0)
        assert diffusion.variance_type == ("fixed_large" if is_cifar else "fixed_small")
        assert (diffusion.beta_schedule, diffusion.beta_start, diffusion.beta_end) == ("linear", 1e-4, 0.02)
        assert (diffusion.num_train_timesteps, diffusion.prediction_type) == (1000, "epsilon")
        assert config.model.overrides.get("dropout", 0.1 if is_cifar else 0.0) == (0.1 if is_cifar else 0.0)
        assert config.data.random_flip
