"""metrics.jsonl, trackers and the progress bar.

metrics.jsonl holds one JSON object per log interval. Every line is complete after a kill, and a resume truncates the
file to the checkpoint. Trackers receive copies of these lines.
"""

import importlib.util
import json
import logging
import mmap
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpm_hf.config import ConfigError, TrackingConfig
from ddpm_hf.files import TRACKERS, write_text
from ddpm_hf.redaction import redact

logger = logging.getLogger(__name__)


class Progress:
    """Show a progress bar on the terminal of rank 0, or print lines without a terminal. A context manager.

    Args:
        first_step: Steps done before.
        num_steps: Steps of the whole run.
        is_main_process: Whether this process prints.
    """

    def __init__(self, first_step: int, num_steps: int, *, is_main_process: bool) -> None:
        self._is_main_process = is_main_process
        self._bar: tqdm[Any] = tqdm(
            initial=first_step,
            total=num_steps,
            desc="Training",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            dynamic_ncols=True,
            disable=None if is_main_process else True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is; later lines are printed below it."""
        self._bar.close()

    def update(self) -> None:
        """Count one step."""
        self._bar.update()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show inside the context what training waits for."""
        self._bar.set_description_str(what)
        try:
            yield
        finally:
            self._bar.set_description_str("Training")

    def show(self, row: Mapping[str, Any], train_batch_size: int) -> None:
        """Show a log line."""
        step, loss, speed = row["step"], row["loss"], max(row["images_per_second"], 0.01)
        shown = f"loss {loss:.4f}" if loss is not None else "loss not finite"
        self._bar.set_postfix_str(f"{shown}, {speed:.0f} images/s")
        if self._bar.disable and self._is_main_process:
            left = tqdm.format_interval((self._bar.total - step) * train_batch_size / speed)
            say(f"step {step}/{self._bar.total}  {shown}  {speed:.0f} images/s  {left} left")


class _LossyStream:
    """A stream that loses what cannot be written: no closed terminal, pipe or full disk stops a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __eq__(self, other: object) -> bool:
        return other is self._stream  # tqdm hides the bars of the same stream while it writes

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        """Write a text, or lose it."""
        with suppress(OSError, ValueError):  # ValueError if it is closed
            self._stream.write(text)
            self._stream.flush()


def say(message: str) -> None:
    """Print a line, above the progress bar if there is one. What cannot be printed is lost."""
    if sys.stdout is not None:
        tqdm.write(message, file=_LossyStream(sys.stdout))


class MetricsLog:
    """Append to and read metrics.jsonl.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Append one line, readable by other processes at once; on a full disk print a warning instead."""
        size = None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                size = file.tell()
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("A line of metrics could not be written: %s", error)
            if size is not None:
                with suppress(OSError):
                    os.truncate(self._path, size)  # the next line must not begin in the middle of this one

    def rows(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        if not self._path.exists():
            return []
        rows = (_parse(line) for line in self._path.read_bytes().splitlines())
        return [row for row in rows if row is not None]

    def last(self, name: str) -> dict[str, Any] | None:
        """Return the last line with a value in a column, or None. Only the end of the file is read."""
        if not self._path.exists() or not self._path.stat().st_size:
            return None
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while (found := content.rfind(f'"{name}": '.encode(), 0, end)) >= 0:
                start = content.rfind(b"\n", 0, found) + 1
                stop = content.find(b"\n", found)
                row = _parse(content[start : stop if stop >= 0 else len(content)])
                if row is not None and row.get(name) is not None:
                    return row
                end = start
        return None

    def cut_after(self, step: int) -> None:
        """Remove the lines of later steps, which the run is about to repeat. Only the end of the file is read."""
        try:
            file = open(self._path, "r+b", opener=_open_no_link)
        except FileNotFoundError:
            write_text(self._path, "")
            return
        with file:
            if not file.seek(0, os.SEEK_END):
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = _end_of_step(step, content)
                is_terminated = end == 0 or content[end - 1 : end] == b"\n"
            file.truncate(end)
            if not is_terminated:
                file.seek(end)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line, or None if it is incomplete or has no step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _end_of_step(step: int, content: mmap.mmap) -> int:
    """Return the offset after the last complete line of a step or an earlier one."""
    end = len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        row = _parse(content[start:end])
        if row is not None and row["step"] <= step:
            return end
        end = start
    return 0


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


class Trackers:
    """Log to TensorBoard, W&B and Trackio through Accelerate, from rank 0 only. A context manager around training.

    A tracker that fails to start is an error before the first step. One that fails later is dropped with a warning.

    Args:
        config: The trackers, the project and the name of the run.
        output_dir: The run folder. It holds the files of TensorBoard and W&B, and trackers.json with the id under which
            a resumed run is continued in the trackers.
    """

    def __init__(self, config: TrackingConfig, output_dir: Path) -> None:
        self._config = config
        self._output_dir = output_dir
        self._running: dict[str, Any] = {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self._with_each(lambda name, tracker: tracker.finish())
        self._running = {}

    def check(self) -> None:
        """Check that all trackers are installed and logged in, without a network request.

        Raises:
            ConfigError: A tracker is not installed, or there is no login.
        """
        for name in self._config.trackers:
            spec = importlib.util.find_spec(name)
            # A folder of that name in the working directory, as W&B creates them, is found too, but has no origin.
            if spec is None or spec.origin is None:
                raise ConfigError(
                    f'tracking.trackers names {name}, which is not installed; pip install "ddpm_hf[trackers]", or '
                    f"remove {name} from tracking.trackers."
                )
        if "wandb" in self._config.trackers:
            self._check_login()

    def start(self, step: int, settings: dict[str, dict[str, object]]) -> None:
        """Start or continue the trackers of this run.

        Args:
            step: Steps done before.
            settings: The resolved configuration, which the trackers store.

        Raises:
            ConfigError: A tracker fails to start.
        """
        run_id = self._run_id() if self._config.trackers else ""
        for name in dict.fromkeys(self._config.trackers):
            try:
                self._running[name] = self._start(name, run_id, step, settings)
            except Exception as error:
                raise ConfigError(
                    f"tracking.trackers: {name} failed to start ({_without_secrets(error)}); fix it, or remove {name} "
                    "from tracking.trackers."
                ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a line of metrics."""
        values = {key: value for key, value in row.items() if key != "step"}
        self._with_each(lambda name, tracker: _log_values(name, tracker, row["step"], values))

    def log_preview(self, step: int, path: Path) -> None:
        """Log a preview grid."""
        self._with_each(lambda name, tracker: _log_image(name, tracker, step, path))

    def _start(self, name: str, run_id: str, step: int, settings: dict[str, dict[str, object]]) -> Any:
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        project, run_name = self._config.project, self._config.run_name or self._output_dir.resolve().name
        match name:
            case "tensorboard":
                # Steps after the checkpoint are about to be written again.
                tracker = TensorBoardTracker(name, self._output_dir, purge_step=step + 1 if step else None)
            case "wandb":
                tracker = WandBTracker(project, name=run_name, id=run_id, resume="allow", dir=self._output_dir)
            case _:
                # private=True because a Space that Trackio creates would be public otherwise.
                tracker = TrackioTracker(project, name=f"{run_name}-{run_id}", resume="allow", private=True)
        tracker.start()
        if name == "wandb":
            tracker.tracker.define_metric("*", step_metric="step")
        if name != "tensorboard":
            tracker.store_init_configuration(settings)
        elif step == 0:  # TensorBoard would add a second set of hyperparameters
            tracker.store_init_configuration(_flat(settings))
        return tracker

    def _run_id(self) -> str:
        """Return the id of this run in all trackers; create it if there is none."""
        path = self._output_dir / TRACKERS
        if not path.exists():
            write_text(path, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
        run_id = str(json.loads(path.read_text(encoding="utf-8"))["id"])
        if re.fullmatch("[0-9a-f]{8}", run_id) is None:  # it becomes part of folder names
            raise ConfigError(f"{path} does not hold a run id; remove it to start a new run in the trackers.")
        return run_id

    def _check_login(self) -> None:
        """Raise ConfigError if W&B would prompt for a key."""
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled"):
            return
        try:
            is_logged_in = wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            raise ConfigError(f"tracking.trackers: wandb rejects its key ({_without_secrets(error)}).") from None
        if not is_logged_in:
            raise ConfigError(
                "tracking.trackers names wandb, but there is no login; run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE to offline."
            )

    def _with_each(self, action: Callable[[str, Any], object]) -> None:
        """Call an action for each tracker; drop the trackers that raise."""
        for name, tracker in list(self._running.items()):
            try:
                action(name, tracker)
            except Exception as error:
                del self._running[name]
                logger.warning(
                    "The tracker %s failed (%s) and is dropped; training and metrics.jsonl continue.",
                    name,
                    _without_secrets(error),
                )


def _log_values(name: str, tracker: Any, step: int, values: Mapping[str, object]) -> None:
    """Log values at a step; W&B gets the step as a value, because it drops steps that it has seen before a resume."""
    if name == "wandb":
        tracker.log({"step": step, **values})
    else:
        tracker.log(dict(values), step=step)


def _log_image(name: str, tracker: Any, step: int, path: Path) -> None:
    match name:
        case "tensorboard":
            with Image.open(path) as picture:
                tracker.log_images({"preview": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        case "wandb":
            import wandb

            _log_values(name, tracker, step, {"preview": wandb.Image(str(path))})
        case _:
            import trackio

            _log_values(name, tracker, step, {"preview": trackio.Image(str(path))})


def _flat(settings: dict[str, dict[str, object]]) -> dict[str, object]:
    """Return settings as TensorBoard takes them: one level of numbers, booleans and strings."""
    return {
        f"{section}/{name}": value if isinstance(value, int | float | str) else json.dumps(value)
        for section, values in settings.items()
        for name, value in values.items()
    }


def _without_secrets(error: Exception) -> str:
    """Return the message of an error in one line, with secrets removed."""
    return " ".join(redact(str(error) or type(error).__name__).split())
