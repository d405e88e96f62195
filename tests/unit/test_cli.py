"""`ddpm-hf` and `ddpm-hf train`: invalid input is one error message and exit code 2, and leaves nothing behind."""

import errno
import gc
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.cli.common import paused_garbage_collection
from tests.conftest import DIGITS, REPOSITORY, run_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run"


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run an invalid `train` command and return its error message."""
    capsys.readouterr()
    assert main.train(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.err.splitlines()[-1] == line, "the error comes last"
    assert "Everything fits together" not in printed.out
    return line.removeprefix("error: ")


def write_images(path: Path, *pixels: np.ndarray, **columns: list[Any]) -> Path:
    images = [Image.fromarray(image) for image in pixels]
    features = datasets.Features({"image": datasets.Image()} | {name: datasets.Value("int64") for name in columns})
    datasets.Dataset.from_dict({"image": images, **columns}, features=features).to_parquet(path)
    return path


# ---------------------------------------------------------------------------------------------------- invalid settings


EPSILON = {"diffusion__beta_schedule": "linear", "diffusion__prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training__num_stepz": 5}, "there is no setting training.num_stepz; did you mean training.num_steps?"),
        (
            {"diffusion__rescale_betas_zero_snr": True, "diffusion__prediction_type": "epsilon"},
            "diffusion.rescale_betas_zero_snr leaves no signal",
        ),
        (
            {"diffusion__beta_schedule": "jsd", "diffusion__prediction_type": "eps"},
            "diffusion.beta_schedule jsd leaves no signal at the last of 1000 timesteps, where x_0 cannot be recovered "
            "from diffusion.prediction_type epsilon; set diffusion.prediction_type to v_prediction or sample.",
        ),
        (
            EPSILON | {"diffusion__num_train_timesteps": 10_000},
            "set diffusion.prediction_type to v_prediction or sample, diffusion.scale_betas_to_timesteps to true for a "
            "long chain, or diffusion.beta_end lower.",
        ),
        (EPSILON | {"diffusion__beta_end": 0.2}, "diffusion.beta_schedule linear leaves no signal"),
        (EPSILON | {"diffusion__beta_start": 0.9}, "diffusion: beta_start is 0.9 and beta_end 0.02; they must be"),
        ({"training__mixed_precision": "fp16", "training__cpu": True}, "fp16 needs a CUDA GPU"),
        (EPSILON | {"diffusion__schedule_shift": 0}, "diffusion.schedule_shift is 0"),
        ({"model__overrides": {"dropuot": 0.1}}, "model.overrides.dropuot is not a setting of UNet2DModel"),
        ({"model__overrides": {"in_channels": 3}}, "model.overrides.in_channels is decided by the data"),
        ({"model__overrides": {"block_out_channels": [5, 10]}}, "model.overrides do not make a UNet2DModel"),
        ({"model__preset": "ddpm_32", "model__overrides": {}, "data__resolution": 12}, "12x12 is not a multiple of 8"),
        (
            {"data__validation_fraction": 0.0001},
            "data.validation_fraction 0.0001 of 1797 images leaves 1797 for training and 0",
        ),
    ],
)
def test_an_invalid_setting_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], output_dir: Path, changes: dict[str, object], sentence: str
) -> None:
    assert sentence in error_of(capsys, run_arguments(output_dir, **changes))
    assert not output_dir.exists()


def test_the_forward_process_is_checked_before_the_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_dir: Path
) -> None:
    """Decoding a large data set takes long."""
    changes = EPSILON | {"diffusion__num_train_timesteps": 10_000, "data__source": tmp_path / "missing.parquet"}
    assert "leaves no signal at the last of" in error_of(capsys, run_arguments(output_dir, **changes))


WITHOUT_EFFECT: dict[str, object] = {
    "data__crop": "random", "data__resize_to": 4, "data__resize_filter": "box", "data__max_bad_fraction": 0.5,
    "data__shuffle_buffer_size": 9, "model__revision": "main", "diffusion__beta_start": 0.5, "diffusion__beta_end": 0.6,
    "diffusion__scale_betas_to_timesteps": True, "objective__huber_delta": 2, "objective__vlb_weight": 1,
    "objective__min_snr_gamma": 1, "objective__p2_gamma": 2, "objective__p2_k": 2, "training__optimizer":
    "torch.optim.SGD", "training__adam_beta1": 0.5, "training__weight_decay": 0.1, "training__ema_inv_gamma": 2,
    "training__ema_power": 0.5, "training__posthoc_ema_every_steps": 2, "evaluation__recognition": True,
    "evaluation__score_metric": "fid", "evaluation__score_features": "x", "evaluation__score_num_samples": 1,
    "evaluation__score_num_terms": 1, "tracking__project": "x", "tracking__run_name": "x", "hub__repo_id": "a/b",
    "hub__push_every_steps": 2, "hub__private": True,
}  # fmt: skip


def test_settings_without_effect_do_not_stop_a_run(
    capsys: pytest.CaptureFixture[str], output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them was exit code 2 in version 0.1."""
    assert main.train([*run_arguments(output_dir, **WITHOUT_EFFECT), "--dry_run"]) == 0
    assert "Everything fits together" in capsys.readouterr().out
    warned = " ".join(line for line in caplog.messages if " no effect with " in line)
    for name in WITHOUT_EFFECT:
        assert f"{name.replace('__', '.')} " in warned or name == "training__optimizer"


# -------------------------------------------------------------------------------------------------------- invalid data


def test_missing_data_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, output_dir: Path) -> None:
    missing = tmp_path / "missing.parquet"
    assert f"data.source {missing} does not exist" in error_of(capsys, run_arguments(output_dir, data__source=missing))
    empty = write_images(tmp_path / "empty.parquet")
    assert "contains no images" in error_of(capsys, run_arguments(output_dir, data__source=empty))
    assert "data.source is not set" in error_of(capsys, ["--training.output_dir", str(output_dir)])


def test_a_missing_column_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, output_dir: Path) -> None:
    message = error_of(capsys, run_arguments(output_dir, data__image_column="picture"))
    assert f"data.image_column 'picture' is not a column of {DIGITS}; it has image, label." in message
    plain = write_images(tmp_path / "plain.parquet", np.zeros((8, 8), np.uint8))
    message = error_of(capsys, run_arguments(output_dir, data__source=plain))
    assert "has no labels, but the network is class-conditional" in message


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (np.zeros((8, 9), np.uint8), "has 9x8 pixels, but the first image has 8x8; set data.resolution"),
        (np.zeros((8, 8, 4), np.uint8), "has transparent pixels, but RGB is expected; set data.num_channels to 4"),
    ],
)
def test_an_image_of_another_size_or_mode_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_dir: Path, second: np.ndarray, sentence: str
) -> None:
    path = write_images(tmp_path / "x.parquet", np.zeros((8, 8), np.uint8), second, label=[0, 1])
    message = error_of(capsys, run_arguments(output_dir, data__source=path))
    assert f"image 1 of {path}" in message
    assert sentence in message


# ------------------------------------------------------------------------------------------------------ invalid folders


def test_a_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for place in ("file", "file/run"):
        message = error_of(capsys, run_arguments(tmp_path / place))
        assert f"training.output_dir {tmp_path / place} cannot be written" in message
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_with_other_files_is_untouched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds something else (thesis.tex)" in error_of(capsys, run_arguments(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --------------------------------------------------------------------------------------------------- valid commands


def test_a_dry_run_checks_everything_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_dir: Path
) -> None:
    assert main.train([*run_arguments(output_dir), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "45,289 parameters, 1,797 training and 0 validation images of 1x8x8\n" in printed
    assert "6 steps of 8 images, 0.0 epochs\ncpu x 1, fp32, batch 8 = 1 x 8 x 1 accumulated\n" in printed
    assert f" a checkpoint, 3 are kept in {output_dir}\n" in printed
    assert f"  output_dir: {output_dir}\n" in printed
    assert "Everything fits together" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("micro", "expected"), [(2, "2 x 4 accumulated"), ("auto", "auto (at most 8)")])
def test_a_dry_run_prints_how_the_batch_is_split(
    capsys: pytest.CaptureFixture[str], output_dir: Path, micro: object, expected: str
) -> None:
    assert main.train([*run_arguments(output_dir, training__micro_batch_size=micro), "--dry_run"]) == 0
    assert f"batch 8 = 1 x {expected}\n" in capsys.readouterr().out


def test_a_dry_run_finds_errors_in_the_data(capsys: pytest.CaptureFixture[str], output_dir: Path) -> None:
    assert "picture" in error_of(capsys, [*run_arguments(output_dir, data__image_column="picture"), "--dry_run"])


def test_the_printed_configuration_repeats_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output_dir: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.train([*run_arguments(output_dir), "--print_config"])
    assert caught.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main.train([*run_arguments(output_dir), "--dry_run"]) == 0
    by_flags = capsys.readouterr().out
    assert main.train(["--config", str(tmp_path / "printed.yaml"), "--dry_run"]) == 0
    assert capsys.readouterr().out == by_flags


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        ([], 2, "no command; choose data, train, "),
        (["tarin"], 2, "unknown command 'tarin'; choose data, train, "),
        (["--help"], 0, ""),
        (["-h"], 0, ""),
    ],
)
def test_without_a_valid_command_the_usage_is_printed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], exit_code: int, expected: str
) -> None:
    assert main.main(arguments) == exit_code
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: ddpm-hf <command> ...")
    assert expected in printed.err
    assert all(name in printed.err for name in main.COMMANDS) or not expected
    assert len(printed.err.splitlines()) == bool(expected)


def test_arguments_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--training.num_stepz", "1"]) == 2
    assert (
        capsys.readouterr().err == "error: there is no setting training.num_stepz; did you mean training.num_steps?\n"
    )


def test_ema_needs_a_length(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """argparse prints the usage and exits."""
    for arguments in ([], [str(tmp_path)], [str(tmp_path), "--length", "long"], [str(tmp_path), "--len", "0.1"]):
        with pytest.raises(SystemExit) as caught:
            main.main(["ema", *arguments])
        assert caught.value.code == 2
    assert main.main(["ema", str(tmp_path), "--length", "0.1"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith(f"error: {tmp_path} has no ema_snapshots; ")


def test_only_rank_0_prints_an_error_of_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main.train(["--training.num_stepz", "1"]) == 2
    assert capsys.readouterr().err == ""


def test_a_terminal_that_lacks_a_character_shows_its_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("caf\udce9", "été"):
        (tmp_path / "x" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "x" / name / "1.png")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    arguments = [f"--data.cache_dir={tmp_path / 'cache'}", f"--picture={tmp_path / 'x.png'}"]
    assert main.main(["data", str(tmp_path / "x"), *arguments]) == 0
    sys.stdout.flush()
    assert rb"classes   2: caf\xe9 (1), \xe9t\xe9 (1)" in printed.getvalue().splitlines()


def test_ctrl_c_before_the_first_step_prints_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_hf.cli.train.parse_command_line", interrupt)
    assert main.train([]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output_dir: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    arguments = run_arguments(
        output_dir, evaluation__recognition=True, evaluation__num_samples=6, data__validation_fraction=0.1
    )
    assert 'pip install "ddpm_hf[recognition]"' in error_of(capsys, arguments)


def test_the_first_import_of_torch_runs_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    num_frozen = gc.get_freeze_count()
    with paused_garbage_collection():
        assert gc.isenabled(), "torch was imported before"
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        with pytest.raises(ImportError), paused_garbage_collection():
            assert not gc.isenabled()
            raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > num_frozen


def test_out_of_memory_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def ask() -> int:
        raise MemoryError("Unable to allocate 2 TiB")

    assert main._exit_code(ask) == 1
    assert capsys.readouterr().err == "error: out of memory (Unable to allocate 2 TiB); reduce the size of the task.\n"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "; free some space, or write to another disk."),
        (errno.EDQUOT, "; free some space, or write to another disk."),
        (errno.EROFS, "; write to a disk that is not read-only."),
        (errno.EACCES, "; change its permissions, or choose another place."),
        (errno.EIO, ""),
    ],
)
def test_a_disk_error_is_one_message_with_advice(capsys: pytest.CaptureFixture[str], number: int, advice: str) -> None:
    def ask() -> int:
        raise OSError(number, os.strerror(number), "outputs/a")

    assert main._exit_code(ask) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(number)}: outputs/a{advice}\n"


def test_a_closed_pipe_is_not_an_error() -> None:
    """As in `ddpm-hf ... | head`: 128 + SIGPIPE, without a message."""
    program = (
        "import sys; from ddpm_hf.cli import main as cli\n"
        "sys.exit(cli._exit_code(lambda: print('x' * 100_000, flush=True) or 0))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, cwd=REPOSITORY, timeout=600
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, b"")
