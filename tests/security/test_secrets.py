"""A secret of the user appears in no file, log, tracker or traceback; a setting that holds one is refused."""

import dataclasses
import logging
import re
import sys
from pathlib import Path

import pytest

from ddpm_hf.cli import main
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, TrackingConfig, validate
from ddpm_hf.redaction import find_secret, redact
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TOKEN = "hf_" + "CanaryCanaryCanaryCanaryCanary0123"  # of the shape of a token of the Hub
KEY = "canary7890123456789012345678901234567890"
PASSWORD = "pass-canary-word"  # noqa: S105 - it opens nothing
URL = f"https://someone:{PASSWORD}@example.org/images"
SECRETS = (TOKEN, KEY, PASSWORD)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a user who is logged in everywhere."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the command line replaces it


def test_the_tokens_here_have_the_shape_of_real_ones() -> None:
    assert re.fullmatch(r"hf_[A-Za-z0-9]{34}", TOKEN)


class Everything(logging.Handler):
    """Keep every log record, with its arguments and traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record) + repr(record.__dict__))


def test_a_run_writes_no_secret_to_any_file_or_stream(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, previews, TensorBoard, checkpoints, the pipeline, the report and its README, and a second start."""
    payloads: list[str] = []
    log = SummaryWriterOf(payloads)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", log)
    run = tmp_path / "run"
    arguments = run_arguments(
        run,
        training__num_steps=2,
        preview__every_steps=1,
        preview__num_images=2,
        preview__num_inference_steps=1,
        evaluation__num_samples=4,
        evaluation__num_inference_steps=2,
        tracking__trackers='["tensorboard"]',
    )
    handler = Everything()
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    try:
        assert main.train(arguments) == 0
        assert main.train(arguments) == 0
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
    printed = capfd.readouterr()
    texts = {"stdout": printed.out, "stderr": printed.err, "log": "\n".join(handler.lines), "payload": str(payloads)}
    files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written = {Path(name).name for name in files}
    assert {"config.yaml", "README.md", "model_index.json", "metrics.jsonl", "trainer_state.json"} <= written
    assert any(name.startswith("events.out") for name in written)
    assert payloads
    assert "Sampling" in texts["stdout"]
    for secret in SECRETS:
        assert [name for name, text in texts.items() if secret in text] == []
        assert [name for name, content in files.items() if secret.encode() in content] == []


class SummaryWriterOf:
    """Replace TensorBoard's method and keep its arguments."""

    def __init__(self, payloads: list[str]) -> None:
        self._payloads = payloads

    def __call__(self, *arguments: object, **settings: object) -> None:
        self._payloads.append(f"{arguments} {settings}")


SETTINGS = ["data.source", "data.revision", "model.from_pretrained", "model.config_file", "tracking.run_name"]
OTHER_SECRETS = [TOKEN, KEY, f"https://{TOKEN}@host/x", "https://host/x.zip?token=abcdef"]


@pytest.mark.parametrize(
    ("setting", "secret"),
    [*((setting, URL) for setting in SETTINGS), *(("data.source", each) for each in OTHER_SECRETS)],
)
def test_a_setting_with_a_secret_is_refused_without_repeating_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], setting: str, secret: str
) -> None:
    arguments = [*run_arguments(tmp_path / "run"), f"--{setting}", secret]
    if setting in ("model.from_pretrained", "model.config_file"):
        arguments += ["--model.preset", "null"]
    assert main.train(arguments) == 2
    printed = capfd.readouterr()
    assert f"error: {setting} holds " in printed.err
    assert "set HF_TOKEN" in printed.err
    for hidden in (*SECRETS, "abcdef"):
        assert hidden not in printed.out + printed.err
    assert not (tmp_path / "run").exists()


def test_secrets_inside_lists_and_mappings_are_found_too() -> None:
    config = RunConfig()
    for section, changes in (
        ("model", {"overrides": {"act_fn": TOKEN}}),
        ("training", {"optimizer_kwargs": {"url": URL}}),
    ):
        changed = dataclasses.replace(getattr(config, section), **changes)
        with pytest.raises(ConfigError, match=rf"^{section}\.{next(iter(changes))} holds "):
            validate(dataclasses.replace(config, **{section: changed}))


def test_the_trainer_refuses_secrets_in_settings_too() -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.project holds the value of HF_TOKEN"):
        Trainer(RunConfig(data=DataConfig(source="x"), tracking=TrackingConfig(project=TOKEN + "x")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", URL],
        ["data", "--data.source", TOKEN],
        ["train", "--training.seed", TOKEN],
        ["train", "--training.seed", URL],
        ["train", "--config", URL],
        ["train", "--config", f"{TOKEN}.yaml"],
        ["train", f"--{TOKEN}"],
        ["train", "--data.sourze", URL],
        ["train", "--data.source", "x", "--training.output_dir", f"/dev/null/{TOKEN}"],
        ["ema", f"/nowhere/{TOKEN}", "--length", "0.1"],
        [TOKEN],
    ],
)
def test_mistakes_on_the_command_line_repeat_no_secret(
    capfd: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.err
    assert [secret for secret in SECRETS if secret in printed.out + printed.err] == []
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_contains_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    """Of a bug, including the exceptions that caused it, after the command line has started."""
    main.main(["data", "--help-me"])
    capfd.readouterr()
    try:
        try:
            raise OSError(f"GET {URL}?token=abcdef: {TOKEN}")
        except OSError as error:
            raise RuntimeError(f"training failed with {KEY}") from error
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    text = capfd.readouterr().err
    assert "Traceback" in text
    assert "RuntimeError: training failed with $WANDB_API_KEY" in text
    assert "OSError: GET https://***@example.org/images?token=*** $HF_TOKEN" in text


def test_there_is_no_setting_for_a_secret() -> None:
    names = [
        f"{section.name}.{setting.name}"
        for section in dataclasses.fields(RunConfig)
        for setting in dataclasses.fields(getattr(RunConfig(), section.name))
    ]
    words = ("token", "password", "secret", "credential", "api_key", "auth", "login")
    assert [name for name in names if any(word in name for word in words)] == []
    assert len(names) > 50


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:word@host/x", "https://***@host/x"),
        ("https:/user:word@host/x", "https:/***@host/x"),
        ("s3://key@bucket and s3://other", "s3://***@bucket and s3://other"),
        ("https://host/x?a=1&X-Amz-Signature=0af&b=2", "https://host/x?a=1&X-Amz-Signature=***&b=2"),
        ("hf_" + "a" * 34, "***"),
        ("ghp_" + "b" * 36, "***"),
        (f"Bearer {TOKEN}", "Bearer $HF_TOKEN"),
    ],
)
def test_secrets_are_recognized_by_their_format(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "outputs/run", "C:/Users/me@corp/photos", "someone/ddpm_hf", "https://host/x.zip?download=true", "a@b",
        "3f786850e387550fdab836ed7e6dc881de23001b", "hf_hub/photos", "digits.parquet", "",
    ],
)  # fmt: skip
def test_harmless_text_is_not_a_secret(text: str) -> None:
    assert find_secret(text) is None


def test_a_short_environment_value_is_not_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "1")
    assert redact("step 1 of 10") == "step 1 of 10"
