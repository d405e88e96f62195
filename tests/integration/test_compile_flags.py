"""`--compile` and `--channels_last` of `ddpm-hf sample` and `ddpm-hf evaluate`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.cli.main import main
from ddpm_hf.diffusion.compiled import CompiledCall, CompileError
from tests.conftest import DIGITS
from tests.fake_compiler import FakeCompiler, install
from tests.runs import files_of


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    return install(monkeypatch)


def sample(pipeline: Path, output: Path, *flags: str) -> int:
    call = ("--num_images", "5", "--batch_size", "3", "--num_inference_steps", "2", "--device", "cpu")
    return main(["sample", str(pipeline), *call, "--output", str(output), *flags])


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("seed_*.png"))}


def test_a_compiled_sampler_draws_the_same_images_from_one_form(
    compiler: FakeCompiler, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Five images in batches of three: the last batch is padded."""
    assert sample(tiny_pipeline, tmp_path / "eager") == 0
    flags = ("--compile", "--compile_mode", "max-autotune-no-cudagraphs", "--channels_last")
    assert sample(tiny_pipeline, tmp_path / "compiled", *flags) == 0
    assert len(compiler.forms) == 1 and compiler.options["mode"] == "max-autotune-no-cudagraphs"
    expected, found = pictures(tmp_path / "eager"), pictures(tmp_path / "compiled")
    assert list(expected) == list(found) and len(found) == 5
    assert max(np.abs(found[name] - expected[name]).max() for name in found) <= 1
    settings = json.loads((tmp_path / "compiled/settings.json").read_text())
    assert settings["compile"] == ["inductor", "max-autotune-no-cudagraphs"] and settings["channels_last"] is True


def test_a_network_that_cannot_be_compiled_leaves_earlier_images_as_they_are(
    compiler: FakeCompiler,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sample(tiny_pipeline, tmp_path) == 0
    before = files_of(tmp_path)

    def fail(*_: Any) -> None:
        raise CompileError("the network cannot be compiled (a break)")

    monkeypatch.setattr(CompiledCall, "_evaluate", fail)
    assert sample(tiny_pipeline, tmp_path, "--compile", "--overwrite") == 2
    message = "error: --compile is given, but the network cannot be compiled (a break); remove --compile."
    assert message in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_an_unknown_backend_is_refused_and_flags_without_effect_are_warnings(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert sample(tiny_pipeline, tmp_path / "out", "--compile", "--compile_backend", "indutor") == 2
    assert "--compile is given, but indutor is not a backend of torch.compile" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert sample(tiny_pipeline, tmp_path / "out", "--compile_mode", "max-autotune") == 0
    assert "--compile_mode max-autotune has no effect without --compile." in caplog.text


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_compiled_evaluation_measures_the_same_from_one_form(
    compiler: FakeCompiler, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Seven samples and five images of the bound in batches of four."""
    call = ["evaluate", str(tiny_pipeline), "--data", str(DIGITS), "--cpu", "--metrics", "bits_per_dim"]
    call += ["--num_images", "5", "--num_terms", "2", "--num_samples", "7", "--num_inference_steps", "2"]
    call += ["--batch_size", "4"]
    assert main([*call, "--output", str(tmp_path / "eager")]) == 0
    assert main([*call, "--output", str(tmp_path / "compiled"), "--compile"]) == 0
    assert {form[2][0][0] for form in compiler.forms} == {4}
    expected, found = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("eager", "compiled"))
    values = [content["metrics"][0]["value"] for content in (expected, found)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert "--compile" in found["flags"]
