"""The compiled network. A fake of torch.compile records what a compiler would see; one slow test counts real graphs."""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from torch._dynamo.backends.registry import _COMPILER_FNS, register_backend

from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.compiled import (
    CompiledCall,
    CompileError,
    compile_network,
    compiled_call,
    full_batches,
    uncompile,
)
from tests.conftest import tiny_unet
from tests.fake_compiler import FakeCompiler, install


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    return install(monkeypatch)


def pipeline_of(unet: UNet2DModel, **extras: Any) -> GaussianDiffusionPipeline:
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v_prediction")
    pipeline = GaussianDiffusionPipeline(unet.eval(), scheduler, **extras)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: GaussianDiffusionPipeline, seeds: range, **options: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images: torch.Tensor = pipeline(
        generator=generators, num_inference_steps=3, output_type="pt", **{"class_labels": 1} | options
    ).images
    return images


def test_compilation_leaves_the_state_dict_saving_and_copies_as_they_are(
    compiler: FakeCompiler, tmp_path: Path
) -> None:
    pipeline = pipeline_of(tiny_unet(10))
    keys, images = list(pipeline.unet.state_dict()), sample(pipeline, range(2))
    pipeline.save_pretrained(tmp_path / "before")
    pipeline.compile(channels_last=True)
    assert type(pipeline.unet) is UNet2DModel
    assert list(pipeline.unet.state_dict()) == keys
    torch.testing.assert_close(sample(pipeline, range(2)), images, rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "after")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "after" / weights).read_bytes() == (tmp_path / "before" / weights).read_bytes()
    assert compiled_call(copy.deepcopy(pipeline.unet)) is None
    assert compiler.num_calls > 0


def test_a_second_compilation_changes_nothing_and_other_settings_replace_it(compiler: FakeCompiler) -> None:
    pipeline = pipeline_of(tiny_unet(10))
    pipeline.compile()
    first = compiled_call(pipeline.unet)
    pipeline.compile()
    assert compiled_call(pipeline.unet) is first
    pipeline.compile("max-autotune-no-cudagraphs")
    second = compiled_call(pipeline.unet)
    assert isinstance(second, CompiledCall) and second is not first
    assert compiler.options["mode"] == "max-autotune-no-cudagraphs"
    uncompile(pipeline.unet)
    assert compiled_call(pipeline.unet) is None


def test_threads_that_meet_a_new_batch_size_at_once_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is alone in the compiler, which takes half a second; later calls run at the same time."""
    together, met = threading.Barrier(2, timeout=0.5), []

    def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*inputs: torch.Tensor, **others: Any) -> Any:
            with suppress(threading.BrokenBarrierError):
                together.wait()
                met.append(len(inputs[0]))
            return function(*inputs, **others)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    pipeline = pipeline_of(tiny_unet(10))
    pipeline.compile(backend="eager")
    with ThreadPoolExecutor(2) as pool:
        for expected in ([], [1, 1]):
            calls = [pool.submit(pipeline, class_labels=0, num_inference_steps=1) for _ in range(2)]
            assert all(call.result().images for call in calls)
            assert met == expected
            together = threading.Barrier(2, timeout=60)


def test_only_inductor_is_given_the_mode(compiler: FakeCompiler) -> None:
    compile_network(tiny_unet(), mode="max-autotune", backend="eager")
    assert compiler.options["mode"] is None
    assert compiler.options["fullgraph"] is True


def test_partial_batches_are_padded_so_that_one_form_is_compiled(compiler: FakeCompiler) -> None:
    """Of every batch, timestep and memory format; guidance doubles the batch, which is a second form."""
    pipeline = pipeline_of(tiny_unet(11), has_null_label=True)
    expected = [sample(pipeline, range(stop)) for stop in (8, 5, 1)]
    guided = [sample(pipeline, range(stop), guidance_scale=2.0) for stop in (8, 5)]
    pipeline.compile()
    with full_batches(pipeline.unet, 8):
        found = [sample(pipeline, range(stop)) for stop in (8, 5, 1)]
        with torch.no_grad():
            x = torch.zeros(8, 1, 8, 8).clone(memory_format=torch.channels_last)
            assert x.stride() != torch.zeros(8, 1, 8, 8).stride()
            for timestep in (3, torch.tensor(3), torch.tensor([3]), torch.full((8,), 3)):
                assert pipeline.unet(x, timestep, torch.zeros(8, dtype=torch.int64)).sample.shape == (8, 1, 8, 8)
        assert len(compiler.forms) == 1
        found_guided = [sample(pipeline, range(stop), guidance_scale=2.0) for stop in (8, 5)]
        assert len(compiler.forms) == 2
    for one, other in zip(expected + guided, found + found_guided, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_an_image_of_a_padded_batch_is_the_same_in_every_batch(compiler: FakeCompiler) -> None:
    """Exactly: all batches go through the same kernels."""
    pipeline = pipeline_of(tiny_unet(10))
    pipeline.compile()
    with full_batches(pipeline.unet, 8):
        assert torch.equal(sample(pipeline, range(8))[3:5], sample(pipeline, range(3, 5)))


def test_the_output_of_a_call_survives_the_next_replay_of_its_graph(compiler: FakeCompiler) -> None:
    unet = tiny_unet(self_conditioned=True)
    pipeline = pipeline_of(unet, self_conditioned=True)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [unet(x * scale, 5, return_dict=False)[0] for scale in (1, 2)]
    images = sample(pipeline, range(2), class_labels=None)
    pipeline.compile("reduce-overhead")
    found = [unet(x * scale, 5, return_dict=False)[0] for scale in (1, 2)]
    assert all(map(torch.equal, expected, found))
    assert torch.equal(sample(pipeline, range(2), class_labels=None), images)
    assert compiler.num_marks == compiler.num_calls > 2


def test_half_precision_after_compilation_is_a_form_of_its_own(compiler: FakeCompiler) -> None:
    pipeline = pipeline_of(tiny_unet(10))
    pipeline.compile()
    sample(pipeline, range(2))
    pipeline.to(torch.bfloat16)
    assert sample(pipeline, range(2)).dtype == torch.float32
    assert len(compiler.forms) == 2


def test_any_scheduler_samples_with_a_compiled_network(compiler: FakeCompiler) -> None:
    pipeline = pipeline_of(tiny_unet(10))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = sample(pipeline, range(2))
    pipeline.compile()
    assert torch.equal(sample(pipeline, range(2)), expected)
    assert len(compiler.forms) == 1


# Bad input


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"indutor is not a backend of torch.compile; available are .*inductor"):
        pipeline_of(tiny_unet(10)).compile(backend="indutor")


def test_a_machine_without_a_compiler_is_named() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match=r"needs a C\+\+ compiler on the CPU, and none was found"),
    ):
        pipeline_of(tiny_unet(10)).compile()


class Breaking(torch.nn.Module):
    """A network that reads a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        torch._dynamo.graph_break()
        return (sample * self.weight,)


def test_a_graph_break_is_named_with_its_place() -> None:
    network = Breaking()
    compile_network(network, backend="eager")
    with pytest.raises(CompileError, match=r"the network cannot be compiled \(.*graph_break.*test_compiled.py, line"):
        network(torch.zeros(2, 1, 8, 8), torch.zeros(2))


class Plain(Breaking):
    """A network that can be compiled."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        return (sample * self.weight,)


@pytest.fixture
def counting_backend() -> Iterator[list[torch.fx.GraphModule]]:
    """A backend of torch.compile that runs the graphs as they are, and keeps them."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    register_backend(counting, name="counting")
    yield graphs
    del _COMPILER_FNS["counting"]
    torch._dynamo.reset()


def test_more_batch_sizes_than_the_compiler_keeps_run_without_it(
    counting_backend: list[torch.fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    network = Plain()
    compile_network(network, backend="counting")
    for size in range(1, 11):
        assert network(torch.ones(size, 1, 8, 8), 0, return_dict=False)[0].shape == (size, 1, 8, 8)
    assert len(counting_backend) == torch._dynamo.config.recompile_limit
    assert "too many different batch sizes" in caplog.text


@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="an older torch")
def test_each_network_of_a_process_has_compilations_of_its_own(
    counting_backend: list[torch.fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep over sizes of the network is compiled to its end."""
    num_networks = torch._dynamo.config.recompile_limit + 2
    for size in range(1, num_networks + 1):
        network = Plain()
        network.weight = torch.nn.Parameter(torch.ones(size, 1, 1))
        compile_network(network, backend="counting")
        network(torch.ones(1, size, 8, 8), 0)
    assert len(counting_backend) == num_networks
    assert "too many" not in caplog.text


def test_a_backend_that_fails_is_named() -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no kernels today")

    register_backend(failing, name="failing")
    try:
        network = Plain()
        compile_network(network, backend="failing")
        with pytest.raises(CompileError, match="no kernels today"):
            network(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    finally:
        del _COMPILER_FNS["failing"]


@pytest.mark.slow
def test_sampling_compiles_one_graph_of_the_network_without_breaks(
    counting_backend: list[torch.fx.GraphModule],
) -> None:
    pipeline = pipeline_of(tiny_unet(10))
    expected = [sample(pipeline, range(stop)) for stop in (8, 3)]
    pipeline.compile(backend="counting")
    with full_batches(pipeline.unet, 8):
        found = [sample(pipeline, range(stop)) for stop in (8, 3)]
    assert len(counting_backend) == 1
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
