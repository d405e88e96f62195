"""What a run on one process refuses, and that sharing with nobody changes nothing. Several processes: distributed/."""

import os

import numpy as np
import pytest
import torch

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, TrainingConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize(
    ("told", "configured"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp16", "bf16"), ("fp8", "bf16")]
)
def test_a_precision_that_the_launcher_was_told_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, told: str, configured: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    with pytest.raises(ConfigError) as caught:
        distributed.start(TrainingConfig(mixed_precision=configured, cpu=True))  # type: ignore[arg-type]
    assert f"--mixed_precision {told}, but training.mixed_precision is {configured};" in str(caught.value)


@pytest.mark.parametrize(("told", "configured"), [("no", "fp32"), ("no", "bf16"), ("bf16", "bf16"), (None, "bf16")])
def test_a_launcher_that_was_told_the_same_or_nothing_is_fine(
    monkeypatch: pytest.MonkeyPatch, told: str | None, configured: str
) -> None:
    if told is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    accelerator = distributed.start(TrainingConfig(mixed_precision=configured, cpu=True))  # type: ignore[arg-type]
    assert accelerator.mixed_precision == {"fp32": "no", "bf16": "bf16"}[configured]
    assert accelerator.device.type == "cpu"
    assert accelerator.gradient_accumulation_steps == 1


def test_an_accumulation_that_the_launcher_was_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError) as caught:
        distributed.start(TrainingConfig(train_batch_size=64, micro_batch_size=8, cpu=True))
    assert "--gradient_accumulation_steps 4" in str(caught.value)
    assert "training.train_batch_size 64 and training.micro_batch_size 8; set those instead" in str(caught.value)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    distributed.start(TrainingConfig(cpu=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("cpu", [True, False])
def test_fp16_without_a_gpu_is_refused(cpu: bool) -> None:
    with pytest.raises(ConfigError, match=r"fp16 needs a CUDA GPU .* but the device is cpu; use bf16 or fp32"):
        distributed.start(TrainingConfig(mixed_precision="fp16", cpu=cpu))


def test_deterministic_asks_torch_for_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    distributed.start(TrainingConfig(cpu=True))
    assert not torch.are_deterministic_algorithms_enabled()
    distributed.start(TrainingConfig(cpu=True, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_reaches_products_and_convolutions(monkeypatch: pytest.MonkeyPatch, is_allowed: bool) -> None:
    """These are the settings that the kernels of a GPU read; torch takes them on a machine without one too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not is_allowed)  # so that it is put back
    distributed.set_tf32(is_allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is is_allowed
    assert torch.backends.cudnn.allow_tf32 is is_allowed
    assert torch.get_float32_matmul_precision() == ("high" if is_allowed else "highest")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tf32_leaves_the_arithmetic_of_a_cpu_alone() -> None:
    distributed.start(TrainingConfig(tf32=True))
    assert torch.get_float32_matmul_precision() == "highest"


def test_alone_everything_is_shared_as_it_is() -> None:
    value = {"step": 3, "names": ["a", "ö"], "none": None}
    assert distributed.share_json(value) is value
    assert distributed.on_rank_0(lambda: value) is value
    tensors = {"a": torch.randn(3), "b": torch.tensor(1)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    distributed.share_tensors(tensors.values())
    assert distributed.share_named_tensors(tensors, torch.device("cpu")) is tensors
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert distributed.share_named_tensors(None, torch.device("cpu")) == {}
    distributed.check_same(tensors)
    distributed.wait()
    array = np.arange(3)
    distributed.join_parts(array)
    assert array.tolist() == [0, 1, 2]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_alone_an_error_keeps_its_type() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        distributed.on_rank_0(fail)
