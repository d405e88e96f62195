"""What a run is about to do names settings that are more likely forgotten than meant."""

from pathlib import Path

import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.config import ModelConfig
from ddpm_hf.training.trainer import nearest_preset
from tests.conftest import run_arguments


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_that_ends_inside_of_its_warm_up_or_has_another_size_of_network_is_told_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training__num_steps": 300, "training__learning_rate_warmup_steps": 5000, "training__cpu": True}
    changes |= {"model__preset": "ddpm_32", "model__overrides": '{"dropout": 0.0}'}
    assert train([*run_arguments(tmp_path / "run", **changes), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "warning: training.learning_rate_warmup_steps 5,000 is more than training.num_steps 300: the run ends at 6% of "
        "training.learning_rate; lower it unless the run is to be continued.\n"
    ) in printed
    assert "warning: model.preset ddpm_32 is made for images of another size than 8x8; digits_8 is nearer.\n" in printed


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_without_such_settings_is_told_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warm-up of as many steps as the run has reaches the full rate."""
    changes = {"training__num_steps": 6, "training__learning_rate_warmup_steps": 6, "training__cpu": True}
    assert train([*run_arguments(tmp_path / "run", **changes), "--dry_run"]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "size", "nearest"),
    [
        ("ddpm_32", (256, 256), "ddpm_256"),
        ("ddpm_32", (64, 64), "ddpm_64"),
        ("improved_32", (64, 64), "improved_64"),
        ("ddpm_256", (32, 32), "ddpm_32"),
        ("ddpm_32", (8, 8), "digits_8"),
        ("ddpm_32", (48, 192), "ddpm_256"),
        ("ddpm_32", (28, 28), None),
        ("ddpm_32", (48, 48), None),
        ("ddpm_256", (512, 512), None),
    ],
)
def test_a_preset_that_is_off_by_a_factor_of_two_comes_with_a_nearer_one(
    preset: str, size: tuple[int, int], nearest: str | None
) -> None:
    assert nearest_preset(ModelConfig(preset=preset), (3, *size)) == nearest  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"config_file": "x"}, {"overrides": {"block_out_channels": [8, 16]}}])
def test_a_network_of_the_users_own_is_left_alone(changes: dict[str, object]) -> None:
    assert nearest_preset(ModelConfig(**changes), (3, 256, 256)) is None  # type: ignore[arg-type]
