"""The folder of one run: whose it is, what lies where, and that nothing of anybody else's is overwritten.

outputs/digits/
    config.yaml      the resolved configuration; its first line marks the folder as a run
    checkpoints/     see checkpoint.py
    ema_snapshots/   see posthoc_ema.py; with training.posthoc_ema
    metrics.jsonl    one line a log interval
    trackers.json    the id of the run in its trackers, where it has some
    previews/        sample grids during training
    hub/             what is being pushed while training lasts; with hub.push_to_hub
    pipeline/        the trained pipeline, for DiffusionPipeline.from_pretrained
"""

import logging
from contextlib import suppress
from pathlib import Path

from ddpm_hf.config import ConfigError
from ddpm_hf.durable import write_text
from ddpm_hf.training.guard import RunLock

logger = logging.getLogger(__name__)

_MARK = "# A run of ddpm_hf. `ddpm-hf train --config` of this file repeats it.\n"
# Ours, but no sign that a run was begun: the lock, and a configuration that a kill left half written.
_TRACES = (".lock", ".config.yaml.writing")


class RunFolder:
    """Paths and ownership of a run folder.

    Args:
        path: training.output_dir.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.ema_snapshots = path / "ema_snapshots"
        self.pipeline = path / "pipeline"
        self.evaluations = path / "evaluations"
        self.previews = path / "previews"
        self.hub = path / "hub"
        self._lock: RunLock | None = None
        self._config = ""
        self._made: list[Path] = []

    def check(self, resume: str) -> None:
        """Makes the folder, makes sure that it is ours or empty, and holds it for this process.

        Args:
            resume: "auto" accepts a folder that holds a run, "none" does not.

        Raises:
            ValueError: If it cannot be written, is in use, or holds something else.
        """
        try:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            content = self._content()
            if content and not self._is_run():
                raise ConfigError(
                    f"training.output_dir {self.path} holds something else ({sorted(content)[0]}); choose an empty or "
                    "a new folder."
                )
            if content and resume == "none":
                raise ConfigError(
                    f"training.output_dir {self.path} holds a run; set training.resume to auto to continue it, or "
                    "choose another folder."
                )
            self._lock = RunLock(self.path)
        except OSError as error:
            raise ConfigError(
                f"training.output_dir {self.path} cannot be written ({error.strerror or error}); choose another folder."
            ) from None

    def hold(self) -> None:
        """Makes sure, before a checkpoint is written, that the folder is there and belongs to this process.

        One that was removed in the middle of a run is made again, so that what the process knows is not lost.

        Raises:
            ValueError: If another process or something else has taken its place.
            OSError: If it cannot be made again.
        """
        if self._lock is None or self._lock.is_held():
            return
        config_path = self.path / "config.yaml"
        is_other = self.path.exists() and bool(self._content())
        if is_other and not (config_path.is_file() and config_path.read_text(encoding="utf-8") == self._config):
            raise ConfigError(
                f"training.output_dir {self.path} was removed while training, and holds something else now "
                f"({sorted(self._content())[0]}); training stops, so that this is left alone."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(self.path)
        except ValueError as error:
            raise ConfigError(f"training.output_dir was removed while training, and now {error}") from None
        logger.warning("training.output_dir %s was removed while training; it is made again.", self.path)
        self._lock.release()
        self._lock = lock
        write_text(config_path, self._config)

    def release(self) -> None:
        """Lets other processes use the folder; folders that nothing was written to go away again."""
        if self._lock is None:
            return
        if self._lock.is_held() and not self._content():
            for name in _TRACES:
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        for folder in self._made:
            with suppress(OSError):  # it is in use, or gone
                folder.rmdir()

    def write_config(self, content: str) -> None:
        """Writes the resolved configuration, which also marks the folder as a run."""
        self._config = _MARK + content
        write_text(self.path / "config.yaml", self._config)

    def _is_run(self) -> bool:
        """Tells whether the folder was begun by `write_config`."""
        config_path = self.path / "config.yaml"
        return config_path.is_file() and config_path.read_bytes().startswith(_MARK.encode())

    def _content(self) -> list[str]:
        """Returns what is in the folder beside traces of a start."""
        return [entry.name for entry in self.path.iterdir() if entry.name not in _TRACES]
