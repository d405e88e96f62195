"""The folder of one run: whose it is, what lies where, and that nothing of anybody else's is overwritten.

outputs/digits/
    config.yaml      the resolved configuration; its first line marks the folder as a run
    checkpoints/     see checkpoint.py
    metrics.jsonl    one line a log interval
    previews/        sample grids during training
    pipeline/        the trained pipeline, for DiffusionPipeline.from_pretrained
"""

from pathlib import Path

from ddpm_hf.config import ConfigError
from ddpm_hf.training.checkpoint import replace_file
from ddpm_hf.training.guard import RunLock

_MARK = "# A run of ddpm_hf. `ddpm-hf train --config` of this file repeats it.\n"


class RunFolder:
    """Paths and ownership of a run folder.

    Args:
        path: training.output_dir.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.pipeline = path / "pipeline"
        self._lock: RunLock | None = None

    def check(self, resume: str) -> None:
        """Makes the folder, makes sure that it is ours or empty, and holds it for this process.

        Args:
            resume: "auto" accepts a folder that holds a run, "none" does not.

        Raises:
            ConfigError: If it cannot be written, is in use, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = [entry.name for entry in self.path.iterdir() if entry.name != ".lock"]
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

    def release(self) -> None:
        """Lets other processes use the folder; one that was made for a dry run goes away again."""
        if self._lock is None:
            return
        self._lock.release()
        if [entry.name for entry in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()

    def write_config(self, content: str) -> None:
        """Writes the resolved configuration, which also marks the folder as a run."""
        replace_file(self.path / "config.yaml", _MARK + content)

    def _is_run(self) -> bool:
        """Tells whether the folder was begun by `write_config`."""
        config_path = self.path / "config.yaml"
        return config_path.is_file() and config_path.read_text(encoding="utf-8").startswith(_MARK)
