"""The command for machines with a GPU, on one without."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the command would run for minutes")
def test_gpu_check_says_that_it_needs_a_gpu() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: gpu_check needs a CUDA GPU, and torch sees none.\n"
