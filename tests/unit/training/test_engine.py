"""How the network runs on a device; the CUDA path with the answers of a GPU that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _triton

from ddpm_hf.cli.main import train
from ddpm_hf.config import ConfigError, RunConfig, TrainingConfig, changed_settings, parse_command_line, validate
from ddpm_hf.config.rules import changed_too_late
from ddpm_hf.diffusion import compiled
from ddpm_hf.training.ema import EMA, decay_schedules
from ddpm_hf.training.engine import Engine, compile_for_training, start_engine, use_channels_last
from ddpm_hf.training.optim import build_optimizer
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments, tiny_unet
from tests.fake_compiler import FakeCompiler, install
from tests.runs import EVERYTHING_RANDOM, assert_same_run, loss_columns, metrics_of, tensors_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COMPILED_CUDA = Engine(is_compiled=True, mode="default", backend="inductor", channels_last=True)
EAGER = Engine(is_compiled=False, mode="default", backend="inductor", channels_last=False)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    return install(monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_triton, "has_triton_package", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.usefixtures("gpu")
def test_auto_compiles_in_channels_last_on_a_gpu_and_does_neither_on_a_cpu() -> None:
    assert start_engine(TrainingConfig(), CUDA) == COMPILED_CUDA
    assert str(COMPILED_CUDA) == "compiled (inductor, default), channels_last"
    assert start_engine(TrainingConfig(), CPU) == EAGER
    assert str(EAGER) == "eager"


@pytest.mark.usefixtures("gpu")
def test_each_switch_can_be_turned_off_and_on() -> None:
    off = TrainingConfig(compile=False, channels_last=False, cudnn_benchmark=False)
    assert start_engine(off, CUDA) == EAGER
    assert torch.backends.cudnn.benchmark is False
    on = TrainingConfig(compile=True, channels_last=True, compile_mode="reduce-overhead")
    assert start_engine(on, CPU) == Engine(True, "reduce-overhead", "inductor", True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("version", "is_channels_last"), [("2.14.1+cu130", False), ("2.15.0", True)])
def test_an_eager_gpu_uses_channels_last_where_group_norm_keeps_it(
    monkeypatch: pytest.MonkeyPatch, version: str, is_channels_last: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert start_engine(TrainingConfig(compile=False), CUDA).channels_last is is_channels_last


@pytest.mark.usefixtures("gpu")
def test_cudnn_benchmark_is_on_unless_training_is_deterministic() -> None:
    start_engine(TrainingConfig(), CUDA)
    assert torch.backends.cudnn.benchmark is True
    start_engine(TrainingConfig(deterministic=True), CUDA)
    assert torch.backends.cudnn.benchmark is False


def test_cudnn_benchmark_contradicts_determinism() -> None:
    arguments = ["--data.source", "x", "--training.cudnn_benchmark", "true", "--training.deterministic", "true"]
    with pytest.raises(ConfigError, match=r"training.cudnn_benchmark true .* training.deterministic is true; set one"):
        parse_command_line(arguments)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("target", "name", "answer", "reason"),
    [
        (torch.cuda, "get_device_capability", (6, 1), "compute capability 7.0, but this one has 6.1"),
        (_triton, "has_triton_package", False, "needs Triton"),
    ],
)
def test_auto_warns_and_true_refuses_where_inductor_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: Any,
    name: str,
    answer: object,
    reason: str,
) -> None:
    monkeypatch.setattr(target, name, lambda *_: answer)
    assert start_engine(TrainingConfig(), CUDA) == EAGER
    assert reason in caplog.text and len(caplog.records) == 1
    with pytest.raises(
        ConfigError, match=rf"training.compile is true, but .*{reason}.*; set training.compile to false"
    ):
        start_engine(TrainingConfig(compile=True), CUDA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compile": False, "compile_mode": "max-autotune"}, "has no effect with training.compile false"),
        ({"compile": False, "compile_backend": "eager"}, "has no effect with training.compile false"),
        (
            {"compile": True, "compile_backend": "eager", "compile_mode": "max-autotune"},
            "has no effect with training.compile_backend eager",
        ),
        ({"compile_mode": "max-autotune"}, "has no effect: training.compile auto compiles on CUDA GPUs only"),
    ],
)
def test_settings_without_effect_are_warnings(
    settings: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [f"--training.{name}={str(value).lower()}" for name, value in settings.items()]
    config, _ = parse_command_line(["--data.source", "x", *arguments])
    validate(config)
    start_engine(config.training, CPU)
    assert words in caplog.text


def test_a_run_can_be_resumed_with_other_switches() -> None:
    new = RunConfig(
        training=TrainingConfig(
            compile=True, compile_mode="reduce-overhead", compile_backend="eager", channels_last=True
        )
    )
    fixed, free = changed_settings(RunConfig().to_dict(), new)
    assert fixed == [] and len(free) == 4
    assert changed_too_late(free) == []


# Compiling the network


@pytest.mark.usefixtures("compiler")
def test_a_network_that_cannot_be_compiled_is_trained_without_if_auto_and_refused_if_true(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise RuntimeError("no kernels today\nand more lines")

    unet = tiny_unet()
    engine = Engine(is_compiled=True, mode="default", backend="eager", channels_last=False)
    found = compile_for_training(unet, engine, TrainingConfig(), fail)
    assert str(found) == "eager" and compiled.compiled_call(unet) is None
    assert [record.getMessage() for record in caplog.records] == [
        "The network is not compiled, and trains more slowly: the network cannot be compiled (no kernels today)."
    ]
    with pytest.raises(ConfigError, match=r"training.compile is true, but the network cannot be compiled \(no kernels"):
        compile_for_training(unet, engine, TrainingConfig(compile=True), fail)


@pytest.mark.usefixtures("compiler")
def test_running_out_of_memory_while_compiling_is_not_a_reason_to_train_without() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("full")

    engine = Engine(is_compiled=True, mode="default", backend="eager", channels_last=False)
    with pytest.raises(torch.OutOfMemoryError):
        compile_for_training(tiny_unet(), engine, TrainingConfig(), fail)


COMPILED = {"training__compile": True, "training__compile_backend": "eager", "training__cpu": True}
# Validation in batches of 2, and a preview of 12 images in blocks of 8.
MEASURED = {
    "data__validation_fraction": 0.005,
    "training__num_steps": 2,
    "training__validate_every_steps": 2,
    "training__micro_batch_size": 2,
    "preview__every_steps": 2,
    "preview__num_images": 12,
    "preview__num_inference_steps": 2,
}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("changes", "step"), [(MEASURED, 2), (EVERYTHING_RANDOM, 6)], ids=["measured", "random"])
def test_a_compiled_run_is_the_same_run(
    compiler: FakeCompiler, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    """Here the compiler does not change rounding, so every weight and every number is equal."""
    assert train(run_arguments(tmp_path / "eager", **changes)) == 0
    assert compiler.num_calls == 0
    assert train(run_arguments(tmp_path / "compiled", **changes | COMPILED)) == 0
    assert_same_run(tmp_path / "eager", tmp_path / "compiled", step)
    summary = json.loads((tmp_path / "compiled/pipeline/training_summary.json").read_text())
    assert summary["engine"] == "compiled (eager)"
    if changes is MEASURED:  # training, validation and previews each compile one form of input
        assert sorted((form[:2], form[2][0][0]) for form in compiler.forms) == [
            ((False, False), 2),
            ((False, False), 8),
            ((True, True), 2),
        ]


@pytest.mark.usefixtures("fresh_accelerate")
def test_cuda_graphs_do_not_overwrite_losses_or_accumulated_gradients(
    compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**EVERYTHING_RANDOM, "training__log_every_steps": 1}
    assert train(run_arguments(tmp_path / "eager", **changes)) == 0
    addresses: set[tuple[int, ...]] = set()
    update = Trainer._update

    def update_and_look(self: Trainer, step: int) -> None:
        addresses.add(tuple(parameter.grad.data_ptr() for parameter in self.parameters if parameter.grad is not None))
        update(self, step)

    monkeypatch.setattr(Trainer, "_update", update_and_look)
    graphs = {"training__compile": True, "training__compile_mode": "reduce-overhead", "training__cpu": True}
    assert train(run_arguments(tmp_path / "graphs", **changes | graphs)) == 0
    assert compiler.num_marks == compiler.num_calls > 6
    assert len(addresses) == 1, "gradients must be accumulated in memory that no graph owns"
    assert_same_run(tmp_path / "eager", tmp_path / "graphs", 6)


@pytest.mark.usefixtures("fresh_accelerate")
def test_cuda_graphs_of_a_teacher_do_not_run_between_the_passes_of_its_student(
    compiler: FakeCompiler, tiny_pipeline: Path, tmp_path: Path
) -> None:
    changes = {"training__num_steps": 2, "distillation__teacher": tiny_pipeline, "diffusion__clip_sample": False}
    assert train(run_arguments(tmp_path / "eager", **changes)) == 0
    graphs = {"training__compile": True, "training__compile_mode": "reduce-overhead", "training__cpu": True}
    assert train(run_arguments(tmp_path / "graphs", **changes | graphs)) == 0
    # Two calls of the teacher, then one of the student, whose gradients follow; once on zeros, then in each step.
    assert compiler.has_gradients == [False, False, True] * 3
    assert_same_run(tmp_path / "eager", tmp_path / "graphs", 2)


# channels_last


def test_everything_that_is_combined_with_a_weight_has_its_strides() -> None:
    unet, config = tiny_unet(), TrainingConfig()
    ema, optimizer = EMA(unet, decay_schedules(config)), build_optimizer(unet.parameters(), config)
    unet(torch.zeros(2, 1, 8, 8), 0).sample.sum().backward()
    optimizer.step()
    use_channels_last(unet, ema, optimizer)
    unet(torch.zeros(2, 1, 8, 8), 0).sample.sum().backward()
    parameters = list(unet.parameters())
    assert any(not parameter.is_contiguous() for parameter in parameters)
    for parameter, average in zip(parameters, ema.tensors(), strict=True):
        moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        assert {one.stride() for one in (average, *moments)} == {parameter.stride()}


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_in_channels_last_differs_by_rounding_and_writes_the_same_files(tmp_path: Path) -> None:
    changes = {"training__validate_every_steps": 3, "data__validation_fraction": 0.01, "training__num_steps": 3}
    for name, is_on in (("contiguous", False), ("channels_last", True)):
        assert train(run_arguments(tmp_path / name, **changes, training__channels_last=is_on)) == 0
    expected, found = (
        tensors_of(tmp_path / name / "checkpoints/step_00000006") for name in ("contiguous", "channels_last")
    )
    assert {name: one.shape for name, one in expected.items()} == {name: one.shape for name, one in found.items()}
    for name, one in expected.items():
        # Adam divides by the root of the second moment, so the rounding of a small gradient moves a weight by up to
        # the learning rate; the losses are the proof that it is rounding.
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-3, msg=name)
    torch.testing.assert_close(
        torch.tensor(loss_columns(tmp_path / "channels_last")),
        torch.tensor(loss_columns(tmp_path / "contiguous")),
        rtol=1e-4,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_in_channels_last_resumes_exactly_and_can_go_back(tmp_path: Path) -> None:
    changes = {"training__channels_last": True, "training__log_every_steps": 1}
    assert train(run_arguments(tmp_path / "whole", **changes)) == 0
    assert train(run_arguments(tmp_path / "parts", **changes, training__num_steps=4)) == 0
    assert train(run_arguments(tmp_path / "parts", **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 6)
    back = changes | {"training__channels_last": False, "training__num_steps": 8}
    assert train(run_arguments(tmp_path / "parts", **back)) == 0
    assert metrics_of(tmp_path / "parts")[-1]["step"] == 8
