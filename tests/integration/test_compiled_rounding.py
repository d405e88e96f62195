"""How much inductor changes: the numbers of docs/training.md and docs/sampling.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_hf import GaussianDiffusionPipeline
from ddpm_hf.cli.main import train
from ddpm_hf.diffusion.compiled import uncompile
from tests.conftest import REPOSITORY
from tests.runs import loss_columns

NUM_STEPS = 100


def train_digits(output_dir: Path, *flags: str) -> np.ndarray:
    """Train the digits recipe for some steps and return its losses, one for each step."""
    recipe = (
        "--config",
        str(REPOSITORY / "configs/digits_8.yaml"),
        "--data.source",
        str(REPOSITORY / "data/digits.parquet"),
    )
    changes = {
        "training.output_dir": output_dir,
        "training.num_steps": NUM_STEPS,
        "training.log_every_steps": 1,
        "training.validate_every_steps": 0,
        "preview.every_steps": 0,
        "evaluation.num_samples": 0,
        "training.cpu": "true",
    }
    assert train([*recipe, *(f"--{name}={value}" for name, value in changes.items()), *flags]) == 0
    return np.array([row[0] for row in loss_columns(output_dir)])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the compiler takes minutes
@pytest.mark.usefixtures("fresh_accelerate")
def test_inductor_changes_a_run_and_its_images_by_rounding_only(tmp_path: Path) -> None:
    eager = train_digits(tmp_path / "eager")
    compiled = train_digits(tmp_path / "compiled", "--training.compile", "true")
    assert len(eager) == NUM_STEPS
    difference = np.abs(compiled / eager - 1).max()

    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "eager" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.arange(8) * 100, torch.arange(8)

    def measure() -> tuple[torch.Tensor, np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        images = pipeline(8, 50, generators, list(range(8)), output_type="uint8").images
        with torch.no_grad():
            return pipeline.unet(x, t, labels, return_dict=False)[0], images.astype(int)

    output, images = measure()
    pipeline.compile()
    compiled_output, compiled_images = measure()
    _, again = measure()
    uncompile(pipeline.unet)
    print(
        f"loss {difference:.2e}; output {(compiled_output - output).abs().max():.2e}; "
        f"images {np.abs(compiled_images - images).max()} levels"
    )
    assert difference < 1e-5
    assert (compiled_output - output).abs().max() < 1e-5
    assert np.abs(compiled_images - images).max() <= 1
    assert (again == compiled_images).all()
