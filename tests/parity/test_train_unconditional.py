"""diffusers' own training script with our scheduler in place of DDPMScheduler, and nothing else changed.

DDPM_HF_TRAIN_UNCONDITIONAL names the script, examples/unconditional_image_generation/train_unconditional.py of
diffusers; it needs torchvision and tensorboard.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from packaging.version import Version
from PIL import Image

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler

REPOSITORY = Path(__file__).parents[2]
STOCK_IMPORT = "from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel\n"
OUR_IMPORT = (
    "from diffusers import DDPMPipeline, UNet2DModel\n"
    "from ddpm_hf.diffusion import GaussianDiffusionScheduler as DDPMScheduler\n"
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script with the one import changed."""
    path = os.environ.get("DDPM_HF_TRAIN_UNCONDITIONAL")
    if not path:
        pytest.skip("DDPM_HF_TRAIN_UNCONDITIONAL does not name diffusers' train_unconditional.py")
    for library in ("torchvision", "tensorboard"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"train_unconditional.py needs {library}")
    text = Path(path).read_text(encoding="utf-8")
    needed = re.search(r'^check_min_version\("(.*)"\)', text, re.MULTILINE)
    if needed and Version(needed[1]) > Version(diffusers.__version__):
        pytest.skip(f"train_unconditional.py needs diffusers {needed[1]}, this is {diffusers.__version__}")
    assert text.count(STOCK_IMPORT) == 1
    changed = tmp_path / "train_unconditional.py"
    changed.write_text(text.replace(STOCK_IMPORT, OUR_IMPORT), encoding="utf-8")
    return changed


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_the_training_script_of_diffusers_runs_with_our_scheduler(
    script: Path, tmp_path: Path, prediction_type: str
) -> None:
    """Two updates of a tiny network on 8 images; the folder that it saves loads and samples."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 32 * i, dtype=np.uint8)).save(images / f"{i}.png")
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).save_config(tmp_path / "network")
    output = tmp_path / "model"
    settings = {
        "train_data_dir": images,
        "output_dir": output,
        "model_config_name_or_path": tmp_path / "network",
        "prediction_type": prediction_type,
        "resolution": 8,
        "train_batch_size": 4,
        "eval_batch_size": 2,
        "num_epochs": 1,
        "ddpm_num_steps": 20,
        "ddpm_num_inference_steps": 3,
        "ddpm_beta_schedule": "squaredcos_cap_v2",
        "lr_warmup_steps": 0,
    }
    run = subprocess.run(
        [sys.executable, script, "--use_ema", *(f"--{name}={value}" for name, value in settings.items())],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert "step=2" in run.stderr

    saved = json.loads((output / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    options = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    stock = json.loads(DDPMScheduler(**options).to_json_string())
    assert saved == stock
    index = json.loads((output / "model_index.json").read_text(encoding="utf-8"))
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    for pipeline_class, scheduler_class in (
        (GaussianDiffusionPipeline, GaussianDiffusionScheduler),
        (DDPMPipeline, DDPMScheduler),
    ):
        pipe = pipeline_class.from_pretrained(output)
        assert type(pipe.scheduler) is scheduler_class
        pipe.set_progress_bar_config(disable=True)
        result = pipe(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
        assert result.shape == (2, 8, 8, 3)
        assert np.isfinite(result).all()
