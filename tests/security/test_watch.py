"""The oracle of the security tests records forbidden events and allows the others."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.security.conftest import Watch

OUTSIDE = Path(tempfile.gettempdir()) / f"ddpm_hf-watched-{os.getpid()}"

ACTIONS: dict[str, Callable[[], object]] = {
    "open": lambda: OUTSIDE.write_text("x"),
    "os.rename": lambda: OUTSIDE.rename(f"{OUTSIDE}-2"),
    "os.remove": lambda: os.remove(f"{OUTSIDE}-2"),
    "os.mkdir": lambda: OUTSIDE.mkdir(),
    "os.rmdir": lambda: OUTSIDE.rmdir(),
    "pickle.find_class": lambda: pickle.loads(pickle.dumps(Path)),  # noqa: S301
    "subprocess.Popen": lambda: subprocess.run([sys.executable, "--version"], capture_output=True, check=True),
    "os.system": lambda: os.system("true"),  # noqa: S605
}


def test_the_watch_records_forbidden_events(watch: Watch) -> None:
    for event, action in ACTIONS.items():
        action()
        assert any(line.startswith(event) for line in watch.found), event
        watch.found.clear()


def test_the_watch_allows_files_inside_its_folder(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").read_text()
    (tmp_path / "file").unlink()
    Path(__file__).read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        Path("/nowhere/at/all").read_text()
    assert watch.found == []
