"""The scripts of benchmarks/: their imports and flags exist, and gpu_check asks for a GPU where there is none."""

import ast
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY

BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))


def run_script(path: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a script in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    return left.value.code


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_import_of_a_benchmark_exists(path: Path) -> None:
    """Also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm_hf"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_has_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(path, "--help", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run for minutes")
def test_gpu_check_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(REPOSITORY / "benchmarks" / "gpu_check.py", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "error: gpu_check needs a CUDA GPU, and torch sees none.\n"
