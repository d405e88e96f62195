"""A run goes on with the data it began with, and a stream where it was."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from ddpm_hf.config import ConfigError, DataConfig
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.training import checkpoint
from ddpm_hf.training.checkpoint import TrainerState
from tests.unit.data.helpers import encode, write_parquet


def image_set(num_images: int = 4, digest: str = "abc") -> ImageSet:
    return ImageSet(np.zeros((num_images, 1, 2, 2), np.uint8), None, None, np.arange(num_images), digest=digest)


@pytest.fixture
def stream(tmp_path: Path) -> ImageStream:
    """Twelve images, alone in the world."""
    images = [encode(np.full((4, 4), number, np.uint8)) for number in range(12)]
    path = write_parquet(tmp_path / "x.parquet", images, [0] * 12, datasets.ClassLabel(names=["cat"]))
    config = DataConfig(source=str(path), streaming=True, resolution=4, num_channels=1, shuffle_buffer_size=4)
    return ImageStream(config, with_labels=False, seed=0, rank=0, num_processes=1, device=torch.device("cpu"))


def test_the_same_data_are_accepted_and_others_refused() -> None:
    state = TrainerState()
    checkpoint.write_state(image_set(), state)
    checkpoint.check_state(image_set(), state, "photos", Path("run"))
    with pytest.raises(ConfigError, match="photos has 5 training images, but the run in run began with 4"):
        checkpoint.check_state(image_set(5), state, "photos", Path("run"))
    with pytest.raises(ConfigError, match="photos has other images or labels than before"):
        checkpoint.check_state(image_set(digest="xyz"), state, "photos", Path("run"))


def test_a_checkpoint_without_a_digest_goes_by_the_number_of_images() -> None:
    state = TrainerState(num_images=4)
    checkpoint.check_state(image_set(), state, "photos", Path("run"))
    with pytest.raises(ConfigError, match="photos has 5 training images"):
        checkpoint.check_state(image_set(5), state, "photos", Path("run"))


def test_a_stream_goes_on_where_it_was(stream: ImageStream) -> None:
    stream.samples(0, 14)
    state = TrainerState()
    checkpoint.write_state(stream, state)
    expected, _ = stream.samples(14, 20)
    checkpoint.check_state(stream, state, "photos", Path("run"))
    checkpoint.go_to(stream, state, rank=0, num_processes=1)
    assert torch.equal(stream.samples(14, 20)[0], expected)


def test_a_stream_shared_otherwise_begins_its_epoch_again(
    stream: ImageStream, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the epochs that the processes were in, the earliest."""
    stream.samples(0, 12)
    expected, _ = stream.samples(12, 18)
    state = TrainerState(streams=[{"epoch": 2, "number": 3}, {"epoch": 1, "number": 5}])
    checkpoint.go_to(stream, state, rank=0, num_processes=1)
    assert torch.equal(stream.samples(0, 6)[0], expected)
    assert "The stream was shared by 2 processes and is now by 1: it begins again with epoch 1" in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "rank", "told"), [(1, 2, 0, "was on 1 process and is now on 2"), (1, 2, 1, ""), (2, 2, 0, "")]
)
def test_another_number_of_processes_is_said_once(
    caplog: pytest.LogCaptureFixture, before: int, now: int, rank: int, told: str
) -> None:
    checkpoint.go_to(image_set(), TrainerState(loss_sums=[[0.0, 0.0]] * before), rank=rank, num_processes=now)
    assert told in caplog.text
    assert len(caplog.records) == bool(told)
