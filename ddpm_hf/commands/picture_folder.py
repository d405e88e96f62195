"""A folder of pictures: files appear whole, and nothing that is not of an earlier call is overwritten.

settings.json                     what the pictures depend on, and which files are of this call
seed_000007_cat.png               one picture each; .npy where PNG cannot hold the channels
grid.png  strip.png  animation.gif
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_hf.config import ConfigError
from ddpm_hf.durable import write_whole

SETTINGS = "settings.json"
SCHEMA_VERSION = 1
CHANNELS_OF_PNG = (1, 3, 4)


class PictureFolder:
    """Where the pictures of one call go.

    Args:
        path: The folder; new or empty, or, to overwrite, that of an earlier call.
        overwrites: Whether pictures of an earlier call may be replaced.

    Attributes:
        path: The folder.

    Raises:
        ConfigError: The folder holds something else.
    """

    def __init__(self, path: Path, overwrites: bool) -> None:
        self.path = path.expanduser()
        self._content: dict[str, Any] = {}
        self._former: list[str] = []
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file; give a new folder.")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not overwrites:
            raise ConfigError(
                f"--output {self.path} is not empty; choose another folder, or give --overwrite to replace the "
                "pictures of an earlier call."
            )
        self._former = self._files_of_an_earlier_call()

    def _files_of_an_earlier_call(self) -> list[str]:
        """Returns the names of the files that are ours to replace."""
        try:
            content = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            names = [str(name) for name in content["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output {self.path} holds something else than the pictures of an earlier call (no {SETTINGS} that "
                "names them); choose another folder."
            ) from None
        return [name for name in names if Path(name).name == name]

    def begin(self, settings: dict[str, Any], files: Sequence[str]) -> None:
        """Removes the files of an earlier call and writes the settings of this one.

        Args:
            settings: What the pictures depend on.
            files: The names of all files that this call may write.

        Raises:
            ConfigError: One of these names is taken by a file of another origin.
            OSError: The folder cannot be written.
        """
        for name in files:
            if name not in self._former and (self.path / name).exists():
                raise ConfigError(
                    f"{self.path / name} is in the way and not of an earlier call; move it, or choose another --output."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        # The old list of files goes last: a kill in between leaves a folder that still says what is ours.
        for name in self._former:
            (self.path / name).unlink(missing_ok=True)
        self._content = {"schema_version": SCHEMA_VERSION, "finished": False} | settings | {"files": list(files)}
        self._write_settings()

    def finish(self) -> None:
        """Says in the settings that all files are there."""
        self._content["finished"] = True
        self._write_settings()

    def write_pixels(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Writes one image, uint8 (height, width, channels), as its name says: PNG or .npy."""
        if name.endswith(".npy"):
            self.write(name, lambda path: _save_array(path, pixels))
        else:
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            self.write(name, lambda path: picture.save(path, "PNG"))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes a file; what stops it leaves nothing."""
        write_whole(self.path / name, write)

    def _write_settings(self) -> None:
        text = json.dumps(self._content, indent=2, ensure_ascii=False) + "\n"
        self.write(SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))


def overviews_in(folder: Path) -> set[str]:
    """Returns the names of the pictures that show others of the folder; none where `sample` has drawn nothing."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return set(content["files"]) - {image["file"] for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _save_array(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Writes an array under just this name; numpy would add an ending."""
    with path.open("wb") as file:
        np.save(file, pixels)
