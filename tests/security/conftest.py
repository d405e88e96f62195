"""The oracle of all hostile inputs: the audit events of Python for processes, pickles and files."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Events of running a program or unpickling a class.
RAN = {
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pickle.find_class",
    "pty.spawn", "subprocess.Popen",
}  # fmt: skip
CHANGES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Record forbidden events while a hostile input is read.

    Args:
        folder: The only place, beside the caches of the tests, where anything may be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.canary = folder / "canary"
        self.is_on = False
        self.found: list[str] = []
        # PyTorch makes this folder when the first optimizer is built.
        caches = [
            *(os.environ[name] for name in ("XDG_CACHE_HOME", "HF_HOME")),
            f"{tempfile.gettempdir()}/torchinductor_",
        ]
        self._allowed = [str(folder), *caches, os.devnull]

    def see(self, event: str, arguments: Sequence[Any]) -> None:
        """Record an event that must not happen."""
        if event in RAN:
            self.found.append(f"{event} {arguments}")
        paths = []
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITES:
            paths = [arguments[0]]
        elif event in CHANGES:
            paths = [path for path in arguments[:2] if isinstance(path, str | bytes)]
        for path in map(os.path.abspath, map(os.fsdecode, paths)):
            if not path.startswith(tuple(self._allowed)) and "__pycache__" not in path:
                self.found.append(f"{event} {path}")


_watch: Watch | None = None
_is_hooked = False


def _hook(event: str, arguments: Sequence[Any]) -> None:
    if _watch is not None and _watch.is_on:
        _watch.is_on = False  # for what the watch does itself
        try:
            _watch.see(event, arguments)
        finally:
            _watch.is_on = True


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Fail the test if a program ran, the canary was made, or a file was written outside.

    The test runs in an empty folder, where a file with a relative path would be found.
    """
    global _watch, _is_hooked
    if not _is_hooked:  # a hook cannot be removed
        sys.addaudithook(_hook)
        _is_hooked = True
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    escaped_before = _escaped()
    _watch = Watch(tmp_path)
    _watch.is_on = True
    yield _watch
    _watch.is_on = False
    found, canary = _watch.found, _watch.canary
    _watch = None
    assert found == []
    assert not canary.exists(), "hostile code ran"
    assert list((tmp_path / "here").iterdir()) == []
    assert _escaped() == escaped_before, "a file was written outside"


def _escaped() -> set[Path]:
    """Return the files that the hostile inputs would write outside; earlier runs may have left some."""
    return set(Path(tempfile.gettempdir()).glob("ddpm_hf-escaped*"))
