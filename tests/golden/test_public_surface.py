"""Names and formats that users depend on. A change here is visible to them, and belongs in CHANGELOG.md."""

import re
from pathlib import Path

import pytest

import ddpm_hf
from ddpm_hf.cli.main import main
from ddpm_hf.config import RunConfig, TrainingConfig
from ddpm_hf.training.batches import UniformTimesteps
from ddpm_hf.training.checkpoint import snapshot_files, write_checkpoint, write_files
from ddpm_hf.training.ema import EMA, decay_schedules
from ddpm_hf.training.optim import build_optimizer
from tests.conftest import tiny_unet

GOLDEN = Path(__file__).parent


def lines_of(name: str) -> list[str]:
    return (GOLDEN / name).read_text(encoding="utf-8").splitlines()


def test_the_schema_and_the_defaults_of_a_run_are_golden() -> None:
    """A changed default changes every run that does not set it."""
    assert RunConfig().to_yaml().splitlines() == lines_of("config_schema.yaml")


def test_the_flags_of_the_commands_are_golden(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `train` and `data` are the settings of a run."""
    expected = lines_of("cli_flags.txt")
    found = []
    for command in dict.fromkeys(line.rpartition(" ")[0] for line in expected):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        found += [
            f"{command} {flag}" for flag in sorted(set(re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.M)))
        ]
    assert found == expected


def test_the_public_names_are_golden() -> None:
    assert sorted(ddpm_hf.__all__) == lines_of("public_names.txt")
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None


def test_the_files_of_a_checkpoint_are_golden(tmp_path: Path) -> None:
    unet = tiny_unet()
    config = TrainingConfig(posthoc_ema=True)
    ema, optimizer = EMA(unet, decay_schedules(config)), build_optimizer(unet.parameters(), config)
    sampler = UniformTimesteps(10, 8, seed=0)
    content = snapshot_files(unet, ema, optimizer, sampler, {}, "")
    path = write_checkpoint(tmp_path, 1, lambda folder: write_files(folder, content)).path
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == lines_of("checkpoint_files.txt")
