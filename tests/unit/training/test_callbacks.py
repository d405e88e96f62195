"""Callbacks follow a run and may stop it; they are those of transformers, too. The pipeline of a trainer."""

import logging
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback
from transformers import TrainerCallback as CallbackOfTransformers
from transformers.integrations import TensorBoardCallback

from ddpm_hf.config import ConfigError, parse_command_line
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.training.callbacks import EVENTS, TrainerCallback
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.trainer import Trainer, TrainOutput
from tests.conftest import run_arguments
from tests.runs import EVERYTHING_RANDOM, metrics_of, tensors_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
VALIDATED: dict[str, Any] = {"data__validation_fraction": 0.1, "training__validate_every_steps": 2}


def trainer_of(folder: Path, *callbacks: Any, **changes: object) -> Trainer:
    config, _ = parse_command_line(run_arguments(folder, **changes))
    return Trainer(config, callbacks=callbacks)


def fit(folder: Path, *callbacks: Any, **changes: object) -> TrainOutput:
    trainer = trainer_of(folder, *callbacks, **changes)
    try:
        return trainer.fit()
    finally:
        trainer.folder.release()


class Recorder(TrainerCallback):
    """Notes the events, their steps, and what came with them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.values: list[dict[str, Any]] = []

    def note(self, event: str, state: Any, values: dict[str, Any]) -> None:
        self.events.append(f"{event} {state.global_step}")
        self.values.append(values)


for _event in EVENTS:

    def _note(self: Any, args: Any, state: Any, control: Any, _event: str = _event, **kwargs: Any) -> None:
        self.note(_event, state, kwargs)

    setattr(Recorder, _event, _note)


class At(TrainerCallback):
    """Asks for something after a step."""

    def __init__(self, step: int, request: str) -> None:
        self.step, self.request = step, request

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.request, True)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_events_come_in_the_order_of_transformers(tmp_path: Path) -> None:
    recorder = Recorder()
    changes = VALIDATED | {"training__num_steps": 2, "training__log_every_steps": 2}
    fit(tmp_path / "run", recorder, **changes)
    assert recorder.events == [
        "on_init_end 0", "on_train_begin 0", "on_step_begin 0", "on_step_end 1", "on_step_begin 1", "on_step_end 2",
        "on_log 2", "on_log 2", "on_evaluate 2", "on_save 2", "on_train_end 2",
    ]  # fmt: skip
    values = dict(zip(recorder.events, recorder.values, strict=True))
    assert values["on_evaluate 2"]["metrics"]["eval_loss"] == metrics_of(tmp_path / "run")[-1]["validation_loss"]
    assert values["on_save 2"]["checkpoint"] == tmp_path / "run" / "checkpoints" / "step_00000002"
    assert {"trainer", "model", "optimizer"} <= values["on_init_end 0"].keys()


def test_a_checkpoint_is_complete_when_a_callback_is_told(tmp_path: Path) -> None:
    seen = []

    class Listing(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((kwargs["checkpoint"] / "manifest.json").is_file())

    fit(tmp_path / "run", Listing, training__async_checkpoint=True)
    assert seen == [True] * 3


def test_a_callback_that_stops_a_run_saves_it_and_the_next_training_continues(tmp_path: Path) -> None:
    """The losses and weights at the end are those of a run that was not stopped."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    output = fit(stopped, At(3, "should_training_stop"))
    assert output.global_step == 3
    assert output.training_loss == metrics_of(stopped)[-1]["loss"]
    assert steps_of(stopped) == ["step_00000002", "step_00000003"]
    assert GaussianDiffusionPipeline.from_pretrained(stopped / "pipeline").unet is not None
    assert fit(stopped).global_step == 6
    fit(whole)
    assert metrics_of(stopped) == metrics_of(whole)
    ends = [tensors_of(run / "checkpoints" / "step_00000006") for run in (stopped, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.parametrize(
    ("request_", "column", "steps"),
    [("should_log", "loss", [3, 6]), ("should_evaluate", "validation_loss", [3, 6])],
)
def test_a_callback_asks_for_more_lines(tmp_path: Path, request_: str, column: str, steps: list[int]) -> None:
    changes = {"training__log_every_steps": 6, "training__validate_every_steps": 6, "data__validation_fraction": 0.1}
    fit(tmp_path / "run", At(3, request_), **changes)
    assert [row["step"] for row in metrics_of(tmp_path / "run") if column in row] == steps


def test_a_callback_asks_while_it_follows_a_line_of_metrics(tmp_path: Path) -> None:
    class Asking(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = state.global_step == 4

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = True

    changes = {
        "training__checkpoint_every_steps": 100,
        "training__log_every_steps": 2,
        "data__validation_fraction": 0.1,
    }
    assert fit(tmp_path / "run", Asking, **changes).metrics.keys() == {"loss", "validation_loss"}
    assert steps_of(tmp_path / "run") == ["step_00000004"]


def test_a_callback_asks_for_a_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path / "run", At(3, "should_save"), training__checkpoint_every_steps=100)
    assert steps_of(tmp_path / "run") == ["step_00000003", "step_00000006"]


class Vandal(TrainerCallback):
    """Draws from all global generators, samples, and changes the mode of the network and its own arguments."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)
        torch.rand(5), np.random.rand(5), random.random()  # noqa: S311
        kwargs["model"].eval()
        kwargs["trainer"].pipeline(batch_size=1, num_inference_steps=2, class_labels=[1])
        control.should_log = control.should_save = False
        state.global_step = 100
        state.log_history.clear()
        args.world_size = 7

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs.clear()


def test_a_callback_does_not_change_the_losses(tmp_path: Path) -> None:
    """With dropout, and everything else that is random. Score, validation and log lines are due at different steps."""
    changes: dict[str, Any] = EVERYTHING_RANDOM | {
        "data__validation_fraction": 0.1, "training__validate_every_steps": 3, "evaluation__score_every_steps": 2,
        "evaluation__score_metric": "bits_per_dim", "evaluation__score_num_terms": 2,
        "evaluation__score_num_samples": 4,
    }  # fmt: skip
    fit(tmp_path / "alone", **changes)
    fit(tmp_path / "observed", Vandal, **changes)
    assert metrics_of(tmp_path / "observed") == metrics_of(tmp_path / "alone")
    assert steps_of(tmp_path / "observed") == steps_of(tmp_path / "alone")


def test_an_error_of_a_callback_propagates(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        fit(tmp_path / "run", Broken)


def test_callbacks_of_transformers_work(tmp_path: Path) -> None:
    seen = []

    class Stop(CallbackOfTransformers):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
            seen.append(
                (args.output_dir, args.max_steps, args.eval_steps, state.is_world_process_zero, metrics["step"])
            )
            control.should_training_stop = True
            return control

    assert fit(tmp_path / "run", Stop(), **VALIDATED).global_step == 2
    assert seen == [(str(tmp_path / "run"), 6, 2, True, 2)]


def test_early_stopping_of_transformers_stops_when_the_loss_no_longer_improves(tmp_path: Path) -> None:
    """No loss improves by a hundred. The first evaluation has nothing to compare with; a resume knows the best one."""
    patient = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    changes = VALIDATED | {"training__validate_every_steps": 1}
    assert fit(tmp_path / "run", patient, **changes).global_step == 2
    again = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    assert fit(tmp_path / "run", again, **changes).global_step == 3
    with pytest.raises(ConfigError, match=r"EarlyStoppingCallback compares .* set training\.validate_every_steps"):
        fit(tmp_path / "other", EarlyStoppingCallback())


@pytest.mark.parametrize(
    ("callbacks", "sentence"),
    [
        ([print], "callbacks holds a builtin_function_or_method, but must hold callbacks; derive it from"),
        ([None], "callbacks holds a NoneType"),
        ([TensorBoardCallback], "callbacks holds TensorBoardCallback, which reports runs of transformers only; set "),
        (TrainerCallback(), "callbacks is a TrainerCallback; give a list of callbacks."),
    ],
)
def test_what_is_not_a_callback_is_refused(tmp_path: Path, callbacks: Any, sentence: str) -> None:
    config, _ = parse_command_line(run_arguments(tmp_path / "run"))
    with pytest.raises(ConfigError) as caught:
        Trainer(config, callbacks=callbacks)
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_an_event_that_never_happens_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Epochs(CallbackOfTransformers):  # type: ignore[misc]
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            pass

    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path / "run", Epochs, EarlyStoppingCallback(), **VALIDATED).folder.release()
    assert "Epochs.on_epoch_end has no effect" in caplog.text
    assert "EarlyStopping" not in caplog.text


def test_callbacks_are_added_and_removed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", Recorder)
    added = At(2, "should_training_stop")
    trainer.add_callback(added)
    assert isinstance(trainer.remove_callback(Recorder), Recorder)
    assert trainer.remove_callback(Recorder) is None
    assert trainer.fit().global_step == 2
    trainer.folder.release()


# ---------------------------------------------------------------------------------------------------------- pipeline


def images_of(pipeline: GaussianDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    labels = ["3", "7"]
    return np.asarray(
        pipeline(batch_size=2, class_labels=labels, num_inference_steps=3, generator=generator, output_type="np").images
    )


def test_a_trainer_has_a_pipeline_before_during_and_after_training(tmp_path: Path) -> None:
    """With the EMA weights of that moment: those of the saved pipeline and of the checkpoint."""
    seen: dict[str, np.ndarray] = {}

    class Sampling(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[f"step {state.global_step}"] = images_of(kwargs["trainer"].pipeline)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[f"evaluation {state.global_step}"] = images_of(kwargs["trainer"].pipeline)

    trainer = trainer_of(tmp_path / "run", Sampling, **VALIDATED)
    state = torch.get_rng_state()
    seen["before"] = images_of(trainer.pipeline)
    assert torch.equal(torch.get_rng_state(), state)
    trainer.fit()
    pipeline = trainer.pipeline
    assert pipeline is trainer.pipeline
    assert not any(module.training for module in pipeline.unet.modules())
    trainer.folder.release()
    saved = images_of(GaussianDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline"))
    assert np.array_equal(images_of(pipeline), saved)
    assert np.array_equal(seen["step 6"], saved)
    assert np.array_equal(seen["evaluation 6"], saved)
    assert not np.array_equal(seen["before"], saved)
    assert not np.array_equal(seen["step 2"], saved)
    again = trainer_of(tmp_path / "run", **VALIDATED)
    again.folder.release()
    assert np.array_equal(images_of(again.pipeline), saved), "of the newest checkpoint, before fit"


class Signal(torch.Tensor):
    """An average that starts a thread when it is written to, and gives it time."""

    start: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and cls.start is not None:
            start, cls.start = cls.start, None
            start()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_another_thread_never_copies_weights_that_are_exchanged() -> None:
    """During a validation the network has the EMA weights, and the EMA those of the network."""
    model = torch.nn.Linear(3, 3)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    expected = [tensor.clone() for tensor in ema.tensors()]
    copies: list[list[torch.Tensor]] = []

    def copy_in_a_thread(waits: bool) -> threading.Thread:
        thread = threading.Thread(target=lambda: copies.append(ema.copy()))
        thread.start()
        thread.join(None if waits else 0.2)
        return thread

    threads: list[threading.Thread] = []
    ema._averages["ema"][-1] = ema._averages["ema"][-1].as_subclass(Signal)
    Signal.start = lambda: threads.append(copy_in_a_thread(waits=False))  # in the middle of the exchange
    with ema.swapped_in():
        copy_in_a_thread(waits=True)
        copies.append(ema.copy())
    threads[0].join()
    assert len(copies) == 3
    for copied in copies:
        assert all(torch.equal(one, other) for one, other in zip(copied, expected, strict=True))
