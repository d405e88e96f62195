"""What is handed over to be published while training lasts is whole, one at a time, and never a reason to stop."""

import logging
from pathlib import Path

import pytest

from ddpm_hf.training.checkpoint import publish
from ddpm_hf.training.optim import NonFiniteTraining


class Shelf:
    """A publisher that keeps what it was given."""

    def __init__(self) -> None:
        self.free = True
        self.given: list[tuple[int, dict[str, str]]] = []

    def is_free(self) -> bool:
        return self.free

    def start(self, folder: Path, step: int) -> None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.given.append((step, {path.relative_to(folder).as_posix(): path.read_text() for path in files}))


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("new")


def test_the_pipeline_goes_with_the_newest_preview_and_nothing_older(tmp_path: Path) -> None:
    shelf, folder, previews = Shelf(), tmp_path / "hub" / "run", tmp_path / "previews"
    previews.mkdir()
    for step in (5, 10):
        (previews / f"step_{step:08d}.png").write_text(f"of step {step}")
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "left over").write_text("old")
    publish(shelf, folder, 12, previews, write)
    assert shelf.given == [(12, {"pipeline/weights": "new", "samples.png": "of step 10"})]


def test_while_a_push_is_under_way_its_folder_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    publish(shelf, tmp_path / "run", 1, tmp_path, write)
    shelf.free = False
    with caplog.at_level(logging.WARNING):
        publish(shelf, tmp_path / "run", 2, tmp_path, lambda folder: pytest.fail("it was written to"))
    assert "Step 2 is not pushed to the Hub: the push before it is not done." in caplog.text
    assert [step for step, _ in shelf.given] == [1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), NonFiniteTraining("weights are not finite")])
def test_what_cannot_be_written_is_told_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    shelf = Shelf()

    def fail(folder: Path) -> None:
        raise error

    with caplog.at_level(logging.WARNING):
        publish(shelf, tmp_path / "run", 3, tmp_path, fail)
    assert shelf.given == []
    assert f"Step 3 is not pushed to the Hub ({error}); training goes on." in caplog.text
