"""Processes on one machine: what is refused at the start, collectives without a group, stop signals.

Several processes: tests/distributed.
"""

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError
from ddpm_hf.distributed import StopWatcher
from ddpm_hf.signals import STOP_SIGNALS
from tests import forked
from tests.runs import exit_code_of_child

# ----------------------------------------------------------------------------------------------------------- start


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_itself_takes_nothing_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is in the settings by then; Accelerate would compile a second time."""
    for name, value in (("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "EAGER"), ("GRADIENT_ACCUMULATION_STEPS", "4")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    accelerator = distributed.start(mixed_precision="fp32", cpu=True)
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
    network = torch.nn.Linear(1, 1)
    assert accelerator.prepare(network) is network
    assert accelerator.state.dynamo_plugin.backend == "NO"


@pytest.mark.usefixtures("fresh_accelerate")
def test_cpu_of_the_launcher_selects_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert distributed.start().device.type == "cpu"


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("cpu", [True, False])
def test_fp16_without_a_gpu_is_refused(cpu: bool) -> None:
    with pytest.raises(ConfigError, match=r"fp16 needs a CUDA GPU .* but the device is cpu; use bf16 or fp32"):
        distributed.start(mixed_precision="fp16", cpu=cpu)


@pytest.mark.usefixtures("fresh_accelerate")
def test_deterministic_enables_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    distributed.start(cpu=True)
    assert not torch.are_deterministic_algorithms_enabled()
    distributed.start(cpu=True, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_reaches_products_and_convolutions(monkeypatch: pytest.MonkeyPatch, is_allowed: bool) -> None:
    """The settings that GPU kernels read; torch accepts them on a machine without one too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not is_allowed)  # so that it is restored
    distributed.set_tf32(is_allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is is_allowed
    assert torch.backends.cudnn.allow_tf32 is is_allowed
    assert torch.get_float32_matmul_precision() == ("high" if is_allowed else "highest")


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tf32_does_not_change_the_arithmetic_of_a_cpu() -> None:
    distributed.start(tf32=True)
    assert torch.get_float32_matmul_precision() == "highest"


class _CLibrary(SimpleNamespace):
    """A C library that records mallopt, and like glibc before 2.35 refuses thresholds above a limit."""

    def __init__(self, limit: int = 2**31 - 1) -> None:
        self.settings: dict[int, int] = {}
        self.limit = limit

    def mallopt(self, parameter: int, value: int) -> int:
        if value > self.limit:
            return 0
        self.settings[parameter] = value
        return 1


@pytest.fixture
def c_library(monkeypatch: pytest.MonkeyPatch) -> _CLibrary:
    library = _CLibrary()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return library


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_start_on_the_cpu_keeps_freed_memory(c_library: _CLibrary) -> None:
    distributed.start(cpu=True)
    assert c_library.settings == {-1: 2**30, -3: 2**30}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_the_allocator_of_the_environment_is_left_alone(
    c_library: _CLibrary, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    distributed.keep_freed_memory()
    assert c_library.settings == {}


def test_an_older_c_library_is_left_alone(c_library: _CLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trim threshold alone would end the automatic growth of the other one, and make the step slower."""
    c_library.limit = 2**25
    distributed.keep_freed_memory()
    assert c_library.settings == {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl
    distributed.keep_freed_memory()


class _AllocatorState(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _allocate_and_free() -> int:
    """Return 0 if six blocks of 8 MiB come from the heap, and the heap is as large after they are freed."""
    distributed.keep_freed_memory()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _AllocatorState
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    before = library.mallinfo2()
    blocks = [library.malloc(2**23) for _ in range(6)]
    held = library.mallinfo2()
    for block in blocks:
        library.free(block)
    freed = library.mallinfo2()
    print(f"mapped: {before.hblkhd} {held.hblkhd}; heap: {before.arena} {held.arena} {freed.arena}")
    return int(held.hblkhd != before.hblkhd or freed.arena != held.arena)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or float(platform.libc_ver()[1]) < 2.35, reason="needs glibc 2.35 or later"
)
def test_freed_memory_stays_in_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the allocator says, in a process of its own; without the setting all six blocks are mapped."""
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    process = forked.start(_allocate_and_free, log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text() + (tmp_path / "log.err").read_text()


# ----------------------------------------------------------------------------------------------------- collectives


def test_collectives_on_one_process_return_their_input() -> None:
    value = {"step": 3, "names": ["a", "ö"], "none": None}
    assert distributed.broadcast_json(value) is value
    assert distributed.gather_json(value) == [value]
    assert distributed.on_rank_0(lambda: value) is value
    tensors = {"a": torch.randn(3), "b": torch.tensor(1)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    distributed.broadcast_tensors(tensors.values())
    assert distributed.broadcast_named_tensors(tensors, torch.device("cpu")) is tensors
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert distributed.broadcast_named_tensors(None, torch.device("cpu")) == {}
    distributed.check_same(tensors)
    distributed.barrier()
    array = np.arange(3)
    distributed.sum_arrays(array)
    assert array.tolist() == distributed.gather_rows(array).tolist() == [0, 1, 2]
    assert distributed.reduce(2.5, "sum") == 2.5
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_items", [0, 1, 7, 20])
def test_the_parts_of_all_ranks_are_contiguous_and_cover_everything_once(
    monkeypatch: pytest.MonkeyPatch, num_items: int, num_processes: int
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: num_processes)
    parts = []
    for rank in range(num_processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(distributed.rank_range(num_items))
    assert [item for part in parts for item in part] == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_error_on_one_process_keeps_its_type() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        distributed.on_rank_0(fail)


# --------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_is_remembered_and_the_step_continues(number: signal.Signals, exit_code: int) -> None:
    with StopWatcher(os.getppid()) as watcher:
        assert watcher.exit_code_if_stopped() == 0
        os.kill(os.getpid(), number)
        assert watcher.exit_code_if_stopped() == exit_code
        assert watcher.exit_code_if_stopped() == exit_code


@pytest.mark.usefixtures("no_launcher")
def test_the_first_signal_decides_the_exit_code() -> None:
    with StopWatcher(os.getppid()) as watcher:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.exit_code_if_stopped() == 130


@pytest.mark.usefixtures("no_launcher")
def test_the_previous_handlers_are_restored_even_after_an_error() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(RuntimeError, match="in a step"), StopWatcher(os.getppid()):
        assert all(signal.getsignal(number) != before[number] for number in before)
        raise RuntimeError("in a step")
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.usefixtures("no_launcher")
def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough after the first; sooner it is the same request, which a launcher has passed on once more."""

    def send_two(pause: float) -> None:
        monkeypatch.setattr(distributed, "_SAME_REQUEST_SECONDS", pause)
        with StopWatcher(os.getppid()) as watcher:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(watcher.exit_code_if_stopped())

    assert exit_code_of_child(lambda: send_two(pause=-1)) == -signal.SIGTERM
    assert exit_code_of_child(lambda: send_two(pause=100)) == 143


def test_a_second_interrupt_of_a_notebook_does_not_end_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises what the first one would have raised without training."""
    monkeypatch.setattr(distributed, "_SAME_REQUEST_SECONDS", -1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopWatcher(os.getppid()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_sighup_that_is_ignored_stays_so_except_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    try:
        for exit_code in (0, 129):
            with StopWatcher(os.getppid()) as watcher:
                signal.raise_signal(signal.SIGHUP)
                assert watcher.exit_code_if_stopped() == exit_code
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("name", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_a_launcher_that_went_away_stops_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`accelerate launch` does not pass SIGTERM on; the worker is left without its parent."""
    monkeypatch.setenv(name, "0")
    with StopWatcher(os.getppid()) as watcher:
        assert watcher.exit_code_if_stopped() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watcher.exit_code_if_stopped() == 143


@pytest.mark.usefixtures("no_launcher")
def test_a_launcher_that_went_away_while_the_data_were_decoded_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    parent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with StopWatcher(parent) as watcher:
        assert watcher.exit_code_if_stopped() == 143


@pytest.mark.usefixtures("no_launcher")
def test_without_a_launcher_a_parent_that_went_away_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with nohup or a closed terminal."""
    with StopWatcher(os.getppid()) as watcher:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watcher.exit_code_if_stopped() == 0
