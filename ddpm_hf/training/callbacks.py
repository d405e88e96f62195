"""Callbacks with the names of transformers: what they are called with, and what they may ask for.

A callback derives from `TrainerCallback` here or in transformers, which is not imported. Every rank calls its own
callbacks, at the same moments and with the same values.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, RunConfig

logger = logging.getLogger(__name__)


@dataclass
class TrainerControl:
    """What a callback asks for by setting a field to True.

    At `on_step_end` the fields show what is due after this step anyway, and setting them to False changes nothing. They
    are reset before each step, except `should_training_stop`. With several processes the request of one rank counts for
    all, one step later.

    Args:
        should_training_stop: Save a checkpoint and the pipeline, and end `Trainer.fit`.
        should_save: Save a checkpoint.
        should_evaluate: Measure the validation loss if there is a validation set, and the score if
            evaluation.score_every_steps is set.
        should_log: Write a line of metrics.
    """

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


@dataclass
class TrainerState:
    """Where a run is. The trainer updates it and does not read it, so changes by a callback have no effect.

    Args:
        global_step: Optimizer updates so far.
        max_steps: training.num_steps.
        epoch: Passes over the training images; None for a stream, whose length is unknown.
        log_history: The lines of metrics since `Trainer.fit` began.
        best_metric: The best value of `TrainerArguments.metric_for_best_model` so far, updated after `on_evaluate`.
        is_local_process_zero: Whether this is the first process of its machine.
        is_world_process_zero: Whether this is rank 0.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass
class TrainerArguments:
    """The settings of a run, for callbacks, also under the names that they have in transformers.TrainingArguments.

    Args:
        config: All settings.
        metric_for_best_model: "score" with evaluation.score_every_steps, otherwise "loss", the validation loss, with
            training.validate_every_steps, otherwise None.
        greater_is_better: Whether a greater value of it is better.
        process_index: The rank.
        world_size: Number of processes.
    """

    config: RunConfig
    metric_for_best_model: str | None = None
    greater_is_better: bool = False
    process_index: int = 0
    world_size: int = 1
    load_best_model_at_end: bool = False

    def __getattr__(self, name: str) -> Any:
        """Return a setting by its name in transformers."""
        if name.startswith("__") or "config" not in self.__dict__:
            raise AttributeError(name)
        training, tracking, hub = self.config.training, self.config.tracking, self.config.hub
        settings = {
            "output_dir": training.output_dir,
            "run_name": tracking.run_name,
            "seed": training.seed,
            "max_steps": training.num_steps,
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
            "warmup_steps": training.learning_rate_warmup_steps,
            "max_grad_norm": training.max_grad_norm,
            "per_device_train_batch_size": training.train_batch_size // self.world_size,
            "train_batch_size": training.train_batch_size // self.world_size,
            "logging_steps": training.log_every_steps,
            "save_steps": training.checkpoint_every_steps,
            "eval_steps": training.validate_every_steps or self.config.evaluation.score_every_steps or None,
            "logging_strategy": "steps",
            "save_strategy": "steps",
            "eval_strategy": "no" if self.metric_for_best_model is None else "steps",
            "push_to_hub": hub.push_to_hub,
            "hub_model_id": hub.repo_id,
        }
        if name not in settings:
            raise AttributeError(f"args has no {name}; args.config has all settings of the run.")
        return settings[name]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as nested dictionaries."""
        return self.config.to_dict()


class TrainerCallback:
    """Override any of these methods to follow a run. They have the names and arguments of transformers.

    `kwargs` holds `trainer`, `model` (the network in training), `optimizer`, and what a method names below. A callback
    does not change the losses: data and noise do not depend on the global random generators, and a network that was set
    to evaluation is set back. An error ends the run as an error of the training does.
    """

    def on_init_end(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow the end of `Trainer(...)`."""

    def on_train_begin(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow the begin of `Trainer.fit`, after a checkpoint was restored."""

    def on_step_begin(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Precede each optimizer update."""

    def on_step_end(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow each optimizer update, before what is due after it. Reading a loss here would wait for the device."""

    def on_log(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow a line of metrics, `logs`."""

    def on_evaluate(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow validation or scoring. `metrics` has the columns of metrics.jsonl, `eval_loss` and `eval_score`."""

    def on_save(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow a checkpoint, whose folder is `checkpoint`. If a callback has this method, training waits for it."""

    def on_train_end(
        self, args: TrainerArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Follow the end of training, after the pipeline was saved; not after a signal or an error."""


Callback: TypeAlias = Any
"""A `TrainerCallback`, or one of transformers."""

_REQUESTS = tuple(field.name for field in dataclasses.fields(TrainerControl))
EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
# Events of transformers that do not happen here, and what to use instead.
_NEVER_CALLED = {
    "on_epoch_begin": "on_step_begin and state.epoch",
    "on_epoch_end": "on_step_end and state.epoch",
    "on_pre_optimizer_step": "on_step_end",
    "on_optimizer_step": "on_step_end",
    "on_substep_end": "on_step_end",
    "on_predict": "on_evaluate",
    "on_prediction_step": "on_evaluate",
    "on_push_begin": "on_save",
}


class Callbacks:
    """The callbacks of one run on this rank, and the requests that all ranks agree on.

    Args:
        callbacks: Callbacks or classes of callbacks.

    Attributes:
        args: The settings; set by the trainer.
        state: Where the run is.
        control: What the callbacks of this rank ask for.
        context: Further keyword arguments of each event.
        is_used: Whether any rank has callbacks; known after `start`.
        must_wait_for_saves: Whether any rank has a callback that follows checkpoints.
    """

    def __init__(self, callbacks: Iterable[Callback] | None) -> None:
        self._callbacks: list[Callback] = []
        self.args: TrainerArguments
        self.state = TrainerState()
        self.control = TrainerControl()
        self.context: dict[str, Any] = {}
        self.is_used = self.must_wait_for_saves = False
        self._due: dict[str, bool] = {}
        self._agreement: distributed.Agreement | None = None
        self._agreed = TrainerControl()
        if isinstance(callbacks, str | Mapping) or not isinstance(callbacks, Iterable | None):
            raise ConfigError(f"callbacks is a {type(callbacks).__name__}; give a list of callbacks.")
        for callback in callbacks or ():
            self.add(callback)

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def add(self, callback: Callback) -> None:
        """Add a callback, or create one of a class.

        Raises:
            ConfigError: It is not a callback.
        """
        created = callback() if isinstance(callback, type) else callback
        if not any(callable(getattr(created, name, None)) for name in EVENTS):
            raise ConfigError(
                f"callbacks holds a {type(created).__name__}, but must hold callbacks; derive it from "
                "ddpm_hf.TrainerCallback, and override on_step_end, for example."
            )
        module = type(created).__module__
        if module.startswith("transformers.integrations."):
            raise ConfigError(
                f"callbacks holds {type(created).__name__}, which reports runs of transformers only; set "
                "tracking.trackers, or log in on_log of a callback of your own."
            )
        is_of_transformers = module.startswith("transformers.")
        for name, instead in _NEVER_CALLED.items():
            if _overrides(created, name) and not is_of_transformers:
                logger.warning(
                    "%s.%s has no effect, because it is never called; use %s.", type(created).__name__, name, instead
                )
        self._callbacks.append(created)

    def remove(self, callback: Callback) -> Callback | None:
        """Remove and return the first callback that is this one, or of this class; return None if there is none."""
        for index, one in enumerate(self._callbacks):
            if one is callback or (isinstance(callback, type) and isinstance(one, callback)):
                return self._callbacks.pop(index)
        return None

    def check(self) -> None:
        """Raise ConfigError if a callback of transformers that stops early would have nothing to compare."""
        names = {base.__name__ for callback in self._callbacks for base in type(callback).__mro__}
        if "EarlyStoppingCallback" in names and self.args.metric_for_best_model is None:
            raise ConfigError(
                "EarlyStoppingCallback compares validation losses or scores; set training.validate_every_steps and a "
                "validation set, or evaluation.score_every_steps."
            )

    def start(self) -> None:
        """Collective: forget the requests of an earlier training, and learn whether a rank has callbacks."""
        self.control, self._agreed, self._due = TrainerControl(), TrainerControl(), {}
        self.state.log_history = []
        needs = [bool(self), any(_overrides(callback, "on_save") for callback in self._callbacks)]
        self.is_used, self.must_wait_for_saves = (distributed.reduce(float(need), "sum") > 0 for need in needs)
        self._agreement = None
        if self.is_used and distributed.world_size() > 1:
            self._agreement = distributed.Agreement(len(_REQUESTS))

    @property
    def requested(self) -> TrainerControl:
        """What to do after this step beyond what is due, the same on all ranks.

        With several ranks, what any of them asked for in the step before.
        """
        return self._of_this_rank() if self._agreement is None else self._agreed

    def _of_this_rank(self) -> TrainerControl:
        requests = {name: getattr(self.control, name) and not self._due.get(name, False) for name in _REQUESTS}
        return TrainerControl(**requests)

    def call(self, event: str, **values: Any) -> None:
        """Call a method of each callback; what it raises propagates."""
        for callback in self._callbacks:
            if (method := getattr(callback, event, None)) is not None:
                control = method(self.args, self.state, self.control, **self.context, **values)
                if control is not None and control is not self.control:  # transformers has a class of its own
                    self.control = TrainerControl(**{name: bool(getattr(control, name, False)) for name in _REQUESTS})

    def begin_step(self) -> None:
        """Reset the requests, except that to stop, and call `on_step_begin`."""
        self.control.should_save = self.control.should_evaluate = self.control.should_log = False
        self.call("on_step_begin")

    def end_step(self, **due: bool) -> None:
        """Collective: learn what was asked for in the step before; call `on_step_end`, showing what is due."""
        if self._agreement is not None:
            agreed = map(bool, self._agreement.receive())
            self._agreed = TrainerControl(**dict(zip(_REQUESTS, agreed, strict=True)))
        self._due = due
        for name, is_due in due.items():
            if is_due:
                setattr(self.control, name, True)
        self.call("on_step_end")

    def agree(self) -> bool:
        """Collective: call after everything that is due after a step; return whether to stop.

        With several ranks, tell the others what this one asks for. The host does not wait.
        """
        if self._agreement is not None:
            mine = self._of_this_rank()
            self._agreement.send([int(getattr(mine, name)) for name in _REQUESTS])
        return self.requested.should_training_stop

    def finish(self) -> None:
        """Collective: end what `start` began."""
        if self._agreement is not None:
            self._agreement.close()
            self._agreement = None


def _overrides(callback: Callback, event: str) -> bool:
    """Return whether a callback has its own method for an event, not the empty one of `TrainerCallback`."""
    kind = type(callback)
    base = next((base for base in kind.__mro__ if base.__name__ == "TrainerCallback"), None)
    return hasattr(callback, event) and getattr(kind, event, None) is not getattr(base, event, None)
