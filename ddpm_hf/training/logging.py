"""Metrics, trackers and the progress bar.

What a person sees of a run: a progress bar, or lines where there is no terminal.

What the metrics say of the loss: its mean, and its mean in each quartile of the timesteps.

All sums stay on the device; the host reads them when a line of metrics is due, in one copy.

What a run measures of itself: sums on the device, read by the host once a log interval, and the time they took.

Where metrics go: metrics.jsonl for programs, always, and the trackers that were asked for.

metrics.jsonl has one line of JSON a log interval, whole after any kill, cut back to the checkpoint on resume.
"""

import importlib.util
import json
import logging
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpm_hf.config import ConfigError, TrackingConfig
from ddpm_hf.files import write_text
from ddpm_hf.redaction import redact


class Progress:
    """A progress bar on rank 0's terminal; without a terminal, lines. Use it as a context manager.

    Args:
        first_step: Steps that were done before.
        num_steps: Steps of the whole run.
        is_main_process: Whether this process speaks.
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
        """Leaves the bar as it is; lines come below it from here on."""
        self._bar.close()

    def update(self) -> None:
        """Counts one step."""
        self._bar.update()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says on the bar what training waits for."""
        self._bar.set_description_str(what)
        try:
            yield
        finally:
            self._bar.set_description_str("Training")

    def show(self, row: Mapping[str, Any], train_batch_size: int) -> None:
        """Shows where the run is, from a line of metrics."""
        step, loss, speed = row["step"], row["loss"], max(row["images_per_second"], 0.01)
        shown = f"loss {loss:.4f}" if loss is not None else "loss not finite"
        self._bar.set_postfix_str(f"{shown}, {speed:.0f} images/s")
        if self._bar.disable and self._is_main_process:
            left = tqdm.format_interval((self._bar.total - step) * train_batch_size / speed)
            say(f"step {step}/{self._bar.total}  {shown}  {speed:.0f} images/s  {left} left")


def say(message: str) -> None:
    """Prints a line, above the progress bar where there is one."""
    tqdm.write(message)


logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[0-9a-f]{8}")


class MetricsLog:
    """Appends to and reads metrics.jsonl.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Writes one line, at once readable by others; on a full disk training goes on without it."""
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
        """Returns all whole lines; a last line that a kill tore is left out."""
        if not self._path.exists():
            return []
        rows = (_row(line) for line in self._path.read_bytes().splitlines())
        return [row for row in rows if row is not None]

    def last(self, name: str) -> dict[str, Any] | None:
        """Returns the last line with a column, None if there is none; looked for from the end."""
        if not self._path.exists() or not self._path.stat().st_size:
            return None
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while (found := content.rfind(f'"{name}": '.encode(), 0, end)) >= 0:
                start = content.rfind(b"\n", 0, found) + 1
                stop = content.find(b"\n", found)
                row = _row(content[start : stop if stop >= 0 else len(content)])
                if row is not None and row.get(name) is not None:
                    return row
                end = start
        return None

    def cut_after(self, step: int) -> None:
        """Forgets what came after a step, since the run is about to do it again; what came before is not even read."""
        try:
            file = open(self._path, "r+b", opener=_open_no_link)
        except FileNotFoundError:
            write_text(self._path, "")
            return
        with file:
            if not file.seek(0, os.SEEK_END):
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = _end_of(step, content)
                is_ended = end == 0 or content[end - 1 : end] == b"\n"
            file.truncate(end)
            if not is_ended:
                file.seek(end)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns what a line says, or None for one that a kill or a power cut tore, or that says nothing of a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _end_of(step: int, content: mmap.mmap) -> int:
    """Returns where the last whole line of a step ends, or of an earlier one; looked for from the end."""
    end = len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        row = _row(content[start:end])
        if row is not None and row["step"] <= step:
            return end
        end = start
    return 0


def _open_no_link(path: str, flags: int) -> int:
    """Opens a file, but not one that a link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW)


class Trackers:
    """TensorBoard, W&B and Trackio beside metrics.jsonl, through Accelerate; only rank 0 starts any.

    A tracker that cannot be started is refused before the first step. One that fails later is left out from there on:
    it must not stop training. Use it as a context manager around training, which finishes what was started.

    Args:
        config: Which trackers, and under which names.
        output_dir: The run folder, which holds the files of TensorBoard and W&B, and `trackers.json` with the id under
            which a run that is continued is found again.
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
        """Finds out what is missing, without a word to a server.

        Raises:
            ConfigError: If a tracker is not installed, or nobody is logged in.
        """
        for name in self._config.trackers:
            spec = importlib.util.find_spec(name)
            # A folder of that name in the working directory, as W&B leaves them, is found too, but has no origin.
            if spec is None or spec.origin is None:
                raise ConfigError(
                    f'tracking.trackers names {name}, which is not installed; pip install "ddpm_hf[trackers]", or '
                    "leave it out."
                )
        if "wandb" in self._config.trackers:
            self._check_login()

    def start(self, step: int, settings: dict[str, dict[str, object]]) -> None:
        """Starts or continues the trackers of this run.

        Args:
            step: Steps done before.
            settings: The resolved configuration, which the trackers keep.

        Raises:
            ConfigError: If one cannot be started.
        """
        run_id = self._run_id() if self._config.trackers else ""
        for name in dict.fromkeys(self._config.trackers):
            try:
                self._running[name] = self._start(name, run_id, step, settings)
            except Exception as error:
                raise ConfigError(
                    f"tracking.trackers: {name} cannot be started ({_without_secrets(error)}); mend that, or leave it "
                    "out."
                ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Passes a line of metrics on."""
        values = {key: value for key, value in row.items() if key != "step"}
        self._with_each(lambda name, tracker: _log_values(name, tracker, row["step"], values))

    def log_preview(self, step: int, path: Path) -> None:
        """Shows a preview grid."""
        self._with_each(lambda name, tracker: _log_image(name, tracker, step, path))

    def _start(self, name: str, run_id: str, step: int, settings: dict[str, dict[str, object]]) -> Any:
        """Starts one tracker and gives it the settings."""
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        project, run_name = self._config.project, self._config.run_name or self._output_dir.resolve().name
        match name:
            case "tensorboard":
                # What was written after the checkpoint is about to be written again.
                tracker = TensorBoardTracker(name, self._output_dir, purge_step=step + 1 if step else None)
            case "wandb":
                tracker = WandBTracker(project, name=run_name, id=run_id, resume="allow", dir=self._output_dir)
            case _:
                # A Space that Trackio makes would be public otherwise.
                tracker = TrackioTracker(project, name=f"{run_name}-{run_id}", resume="allow", private=True)
        tracker.start()
        if name == "wandb":
            tracker.tracker.define_metric("*", step_metric="step")
        if name != "tensorboard":
            tracker.store_init_configuration(settings)
        elif step == 0:  # it would add a second set, not replace the first
            tracker.store_init_configuration(_flat(settings))
        return tracker

    def _run_id(self) -> str:
        """Returns the id of this run in all trackers, made when it is first needed."""
        path = self._output_dir / "trackers.json"
        if not path.exists():
            write_text(path, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
        run_id = str(json.loads(path.read_text(encoding="utf-8"))["id"])
        if _RUN_ID.fullmatch(run_id) is None:  # it becomes part of the names of folders
            raise ConfigError(f"{path} holds no id of a run; remove it to start a new one in the trackers.")
        return run_id

    def _check_login(self) -> None:
        """Raises ConfigError if W&B would ask for a key."""
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled"):
            return
        try:
            is_logged_in = wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            raise ConfigError(f"tracking.trackers: wandb refuses its key ({_without_secrets(error)}).") from None
        if not is_logged_in:
            raise ConfigError(
                "tracking.trackers names wandb, but nobody is logged in; run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE to offline."
            )

    def _with_each(self, action: Callable[[str, Any], object]) -> None:
        """Does something with every tracker; whatever goes wrong there costs the tracker and not the run."""
        for name, tracker in list(self._running.items()):
            try:
                action(name, tracker)
            except Exception as error:
                del self._running[name]
                logger.warning(
                    "The tracker %s failed (%s) and gets nothing more; training and metrics.jsonl go on.",
                    name,
                    _without_secrets(error),
                )


def _log_values(name: str, tracker: Any, step: int, values: Mapping[str, object]) -> None:
    """Gives values to a tracker in its own way.

    W&B drops what comes with a step that it has seen, as after a resume; there the step is one of the values.
    """
    if name == "wandb":
        tracker.log({"step": step, **values})
    else:
        tracker.log(dict(values), step=step)


def _log_image(name: str, tracker: Any, step: int, path: Path) -> None:
    """Gives a picture to a tracker in its own way."""
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
    """Returns settings as TensorBoard takes them: one level, numbers, truth values and text."""
    return {
        f"{section}/{name}": value if isinstance(value, int | float | str) else json.dumps(value)
        for section, values in settings.items()
        for name, value in values.items()
    }


def _without_secrets(error: Exception) -> str:
    """Returns what an error says in one line, without keys and tokens."""
    return " ".join(redact(str(error) or type(error).__name__).split())
