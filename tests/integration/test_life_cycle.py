"""The life of a Trainer in a process that goes on: folders given back, nothing left behind, threads and forks."""

import gc
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.utils import logging as diffusers_logging

from ddpm_hf.config import ConfigError, RunConfig, parse_command_line
from ddpm_hf.distributed import TrainingStopped
from ddpm_hf.signals import STOP_SIGNALS
from ddpm_hf.training.trainer import Trainer
from tests import forked
from tests.conftest import run_arguments
from tests.runs import assert_same_run, at_step, exit_code_of_child, stop_with_signal_after


def configuration(folder: Path, **changes: object) -> RunConfig:
    return parse_command_line(run_arguments(folder, **changes))[0]


@pytest.fixture(autouse=True)
def _plain_handlers() -> Any:
    """Handlers of a Python process, also where a shell started the tests in the background."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------ folder


def raise_error() -> None:
    raise RuntimeError("in a step")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [None, raise_error, interrupt])
def test_a_trainer_gives_its_folder_back_however_training_ends(
    action: Callable[[], None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one of the same process continues the run, bit by bit, while the first one still exists."""
    with Trainer(configuration(tmp_path / "plain")) as plain:
        plain.fit()
    run = configuration(tmp_path / "run")
    first = Trainer(run)
    with monkeypatch.context() as patch:
        if action is None:
            first = Trainer(configuration(tmp_path / "other"))  # the trainer before it is collected
            first.close()
            first = Trainer(configuration(tmp_path / "run", training__num_steps=3))
            first.fit()
        else:
            at_step(4, action, patch)
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                first.fit()
    second = Trainer(run)
    second.fit()
    assert_same_run(tmp_path / "plain", tmp_path / "run", 6)
    with pytest.raises(ConfigError, match="this Trainer has trained; build another one, which continues the run in"):
        first.fit()


def test_a_context_keeps_the_folder_until_its_end(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", training__num_steps=1)
    with Trainer(config) as trainer:
        trainer.fit()
        with pytest.raises(ValueError, match=r"holds .*run \(`with Trainer\(config\) as trainer:`\); call its close"):
            Trainer(config)
    trainer.close()
    other = Trainer(config)
    other.close()
    other.close()
    with pytest.raises(ConfigError, match="this Trainer is closed; build another one"):
        other.fit()


def test_a_trainer_that_nothing_refers_to_gives_its_folder_back(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", training__num_steps=1)
    trainer = Trainer(config)
    del trainer
    Trainer(config).fit()


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "kind", "exit_code"),
    [
        (signal.SIGINT, KeyboardInterrupt, 130),
        (signal.SIGTERM, SystemExit, 143),
        (signal.SIGUSR1, SystemExit, 143),
        (signal.SIGHUP, SystemExit, 129),
    ],
)
def test_a_signal_saves_and_raises_what_ends_a_script(
    number: signal.Signals, kind: type[BaseException], exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a notebook cell after an interrupt; the next one continues."""
    config = configuration(tmp_path / "run", training__checkpoint_every_steps=100)
    with monkeypatch.context() as patch:
        at_step(2, lambda: signal.raise_signal(number), patch)
        with pytest.raises(kind) as raised:
            Trainer(config).fit()
    assert isinstance(raised.value, TrainingStopped)
    assert raised.value.exit_code == exit_code
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    continued = Trainer(config)
    continued.fit()
    assert continued.global_step == 6


def test_a_signal_after_the_steps_of_a_script_gives_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path / "run", training__num_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_pipeline", lambda self: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit, match="143"):
            Trainer(config).fit()
    Trainer(config).fit()


# ------------------------------------------------------------------------------------------------------------- leaks


def state_of_the_process() -> dict[str, Any]:
    """Return what belongs to the whole process and could be changed by a run."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "fp32_precision": [
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        ],
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic),
        "default": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "python": random.getstate(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "accelerate": [dict(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)],
        "process_group": torch.distributed.is_initialized(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "bars": (diffusers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()),
        "verbosity": diffusers_logging.get_verbosity(),
        "warnings": list(warnings.filters),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "running": [thread.name for thread in threading.enumerate()],
        "hooks": (sys.excepthook, threading.excepthook),
    }


def set_everything(self: Trainer, _: int) -> None:
    """Do to the process, in a step, what training does to it on some machine."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(3)
    torch.rand(5)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__deterministic": True, "training__mixed_precision": "bf16", "training__prefetch_factor": 2},
        {"data__streaming": True, "data__resolution": 8, "data__num_channels": 1, "data__validation_split": "train"},
    ],
)
def test_a_run_leaves_the_process_as_it_was(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between building and training, and afterwards, whatever it sets meanwhile."""
    changes = changes | {"model__overrides": {"block_out_channels": [8, 16], "norm_num_groups": 4, "dropout": 0.1}}
    if "data__streaming" not in changes:
        changes["preview__every_steps"] = 2
    Trainer(configuration(tmp_path / "first", training__num_steps=1, **changes)).fit()  # imports what it needs
    train_step = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", lambda self, step: (train_step(self, step), set_everything(self, step)))
    before = state_of_the_process()
    trainer = Trainer(configuration(tmp_path / "run", training__num_steps=2, **changes))
    between = state_of_the_process()
    assert {name for name in before if between[name] != before[name]} == set()
    trainer.fit()
    after = state_of_the_process()
    assert {name for name in before if after[name] != before[name]} == set()
    assert "forward" not in vars(trainer.unet)


def test_runs_that_differ_in_everything_are_built_and_trained_in_any_order(tmp_path: Path) -> None:
    """Each as if it were alone in its process."""
    settings: dict[str, dict[str, object]] = {
        "plain": {},
        "bf16": {"training__mixed_precision": "bf16", "training__deterministic": True},
    }

    def build(name: str, run: str) -> Trainer:
        return Trainer(configuration(tmp_path / run / name, training__num_steps=2, **settings[name]))

    for name in settings:
        build(name, "alone").fit()
    trainers = [build(name, "together") for name in settings]
    for trainer in trainers:
        assert trainer.accelerator.mixed_precision == {"fp32": "no"}.get(
            str(trainer.config.training.mixed_precision), trainer.config.training.mixed_precision
        )
    for trainer in trainers:
        trainer.fit()
    for name in settings:
        assert_same_run(tmp_path / "alone" / name, tmp_path / "together" / name, 2)


# ----------------------------------------------------------------------------------------------------------- threads


def in_a_thread(action: Callable[[], object]) -> BaseException | None:
    """Run an action in a thread; return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_training_works_in_a_thread(tmp_path: Path) -> None:
    """Without handlers of signals, which belong to the main thread."""
    Trainer(configuration(tmp_path / "main")).fit()
    trainer = Trainer(configuration(tmp_path / "built"))
    assert in_a_thread(trainer.fit) is None
    assert in_a_thread(lambda: Trainer(configuration(tmp_path / "whole")).fit()) is None
    for name in ("built", "whole"):
        assert_same_run(tmp_path / "main", tmp_path / name, 6)


def test_close_stops_training_in_another_thread_after_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path / "run", training__num_steps=100_000, training__checkpoint_every_steps=100_000)
    is_training = threading.Event()
    at_step(2, is_training.set, monkeypatch)
    raised: list[BaseException | None] = []
    with Trainer(config) as trainer:
        thread = threading.Thread(target=lambda: raised.append(in_a_thread(trainer.fit)))
        thread.start()
        assert is_training.wait(60)
    steps = [int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps == [trainer.global_step]
    thread.join()
    assert isinstance(raised[0], TrainingStopped)
    Trainer(config).close()


def test_close_in_a_step_stops_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(configuration(tmp_path / "run"))
    at_step(3, trainer.close, monkeypatch)
    with pytest.raises(TrainingStopped):
        trainer.fit()
    assert trainer.global_step == 3


def test_two_trainers_do_not_train_at_once_in_threads_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, raised = Trainer(configuration(tmp_path / "other")), list[BaseException | None]()
    at_step(2, lambda: raised.append(in_a_thread(other.fit)) if not raised else None, monkeypatch)
    Trainer(configuration(tmp_path / "run")).fit()
    assert isinstance(raised[0], ConfigError)
    assert "another Trainer of this process is at work in another thread" in str(raised[0])
    other.fit()
    assert other.global_step == 6


# ------------------------------------------------------------------------------------------------------------- forks


def test_a_forked_process_trains_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as a rank, whose parent is not the parent of the process that imported the library; and in its threads."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as the launcher
    parents: Trainer | None = Trainer(configuration(tmp_path / "parent", training__num_steps=3))
    torch.set_num_threads(2)
    torch.randn(1000, 1000).square().sum()  # starts the threads of OpenMP, without which a forked process hangs
    try:

        def train() -> None:
            trainer = Trainer(configuration(tmp_path / "child", training__num_steps=3))
            trainer.fit()
            raised = in_a_thread(lambda: Trainer(configuration(tmp_path / "thread", training__num_steps=1)).fit())
            assert parents is not None
            with pytest.raises(ConfigError, match=r"was built in process \d+ and cannot train in process \d+, which"):
                parents.fit()
            os._exit(0 if raised is None and trainer.global_step == 3 else 1)

        assert exit_code_of_child(train) == 0
    finally:
        torch.set_num_threads(1)
    assert parents is not None
    parents.fit()
    assert_same_run(tmp_path / "parent", tmp_path / "child", 3)


def train_as_ranks(folder: str, port: str) -> int:
    """Train twice in two ranks of accelerate's notebook_launcher, after a run of this process."""
    from accelerate import notebook_launcher

    Trainer(configuration(Path(folder, "before"), training__num_steps=1)).fit()

    def ranks() -> None:
        for name in ("first", "second"):
            trainer = Trainer(configuration(Path(folder, name), training__num_steps=3))
            trainer.fit()
            assert trainer.global_step == 3

    notebook_launcher(ranks, num_processes=2, use_port=port)
    return 0


@pytest.mark.slow
@pytest.mark.distributed
def test_notebook_launcher_trains_runs_to_their_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    process = forked.start(train_as_ranks, str(tmp_path), port, log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.err").read_text()
    printed = (tmp_path / "log").read_text()
    assert printed.count("Trained from step 0 to 3") == 2, printed
    assert "Stopped" not in printed


def test_a_signal_in_a_thread_of_another_run_is_left_to_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread alone receives signals; its own handlers stay."""
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    stop_with_signal_after(2, monkeypatch)
    assert in_a_thread(Trainer(configuration(tmp_path / "run")).fit) is None
    assert seen == [signal.SIGTERM]
