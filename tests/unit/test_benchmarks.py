"""The scripts of benchmarks/: imports and flags exist, bench.py measures and compares, gpu.py can be rehearsed."""

import ast
import importlib
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY, run_process

BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))
SCRIPTS = [path for path in BENCHMARKS if "__main__" in path.read_text(encoding="utf-8")]


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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_has_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(path, "--help", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run for minutes")
@pytest.mark.parametrize("name", ["gpu", "gpu_check"])
def test_a_script_for_a_gpu_needs_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(REPOSITORY / "benchmarks" / f"{name}.py", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}.py needs a CUDA GPU, and torch sees none")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_measures_every_cell_and_gives_a_document(tmp_path: Path) -> None:
    """One that has no time keeps the cells that it began."""
    for name, budget in (("whole", 800), ("cut_off", 1)):
        flags = ["--rehearse", "--seconds", "0.2", "--budget_seconds", budget, "--output", tmp_path / f"{name}.json"]
        run_process([str(REPOSITORY / "benchmarks" / "gpu.py"), *map(str, flags)])
    whole, cut_off = (json.loads((tmp_path / f"{name}.json").read_text())["cells"] for name in ("whole", "cut_off"))
    assert [cell for cell in whole if "error" in cell] == []
    assert {cell["table"] for cell in whole} == {"compile", "limits", "training", "sampling"}
    assert [cell["error"] for cell in cut_off] == ["the time was up"]
    written = runpy.run_path(str(REPOSITORY / "docs" / "make_performance.py"))["document"]([tmp_path / "whole.json"])
    assert re.findall(r"^### (.*)$", written, re.MULTILINE) == ["Training, batch 4", "Sampling, batch 2"]


# ------------------------------------------------------------------------------------------------------- make bench


@pytest.fixture(scope="module")
def pairs() -> Any:
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "benchmarks" / "pairs.py")))


@pytest.mark.parametrize(
    ("ratios", "control", "result"),
    [
        ([1.02, 1.03, 1.03, 1.04], [0.90, 0.95, 1.05, 1.10], "within the noise"),
        ([1.20, 1.21, 1.22, 1.23], [0.75, 0.80, 1.00, 1.01], "within the noise"),  # the noise has no direction
        ([0.80, 0.90, 1.60, 1.90], [0.99, 1.00, 1.00, 1.01], "within the noise"),  # its own spread is noise too
        ([1.20, 1.21, 1.22, 1.23], [0.95, 0.99, 1.01, 1.05], "faster"),
        ([0.80, 0.81, 0.82, 0.83], [0.95, 0.99, 1.01, 1.05], "slower"),
        ([2.00, 2.00, 2.00], [1.00, 1.00, 1.00], "too few rounds"),
    ],
)
def test_no_winner_is_named_inside_the_noise(
    pairs: Any, ratios: list[float], control: list[float], result: str
) -> None:
    assert pairs.verdict(ratios, control) == result


def test_ratios_are_taken_within_each_round(pairs: Any) -> None:
    """The machine is ten times slower in the second half: the medians of the times say nothing, the pairs do."""
    times = {"ours": [1, 1, 10, 10], "peer": [2, 2, 20, 20], "control": [1, 1, 10, 10]}
    ways = [pairs.Way(name, lambda: None, seconds=seconds) for name, seconds in times.items()]
    result = pairs.summary(pairs.Row("row", "Row", "", lambda: ways, 1.0), ways)
    ratio = result["ways"][1]["ratio"]
    assert (ratio["q25"], ratio["median"], ratio["q75"], ratio["verdict"]) == (2, 2, 2, "faster")


def test_the_order_is_reversed_in_every_other_round(pairs: Any) -> None:
    """A small letter is the setting of the process that a way has for its own calls."""
    called: list[str] = []
    ways = [
        pairs.Way(name, lambda name=name: called.append(name), enter=lambda name=name: called.append(name.lower()))
        for name in "ABC"
    ]
    row = pairs.Row("row", "Row", "", lambda: ways, 1.0, max_rounds=3, call_seconds=0.0)
    assert list(pairs.rounds(ways, row, seconds=60)) == [1, 2, 3]
    assert "".join(called) == "aAbBcC" + "aAbBcCcCbBaAaAbBcC"  # the first calls are not timed
    assert [len(way.seconds) for way in ways] == [3, 3, 3]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_quick_benchmark_gives_finite_ratios_and_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "bench.json"
    names = ["train", "scheduler", "checkpoint"]
    flags = ["--quick", "--threads", "1", "--output", str(result), "--only", *names]
    assert run_script(REPOSITORY / "benchmarks" / "bench.py", *flags, monkeypatch=monkeypatch) == 0
    content = json.loads(result.read_text())
    assert content["is_complete"]
    assert [row["name"] for row in content["rows"]] == names
    for row in content["rows"]:
        ratios = [way["ratio"]["median"] for way in row["ways"][1:]]
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios), row["name"]
    written = runpy.run_path(str(REPOSITORY / "docs" / "make_performance.py"))["document"]([result])
    assert [row["title"] for row in content["rows"]] == re.findall(r"^### (.*)$", written, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------- ladders


def test_a_ladder_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And adds nothing to results of other settings."""
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "digits_ladder.py"))
    measured: list[tuple[str, int]] = []

    def measure(system: Any, seed: int, arguments: Any) -> dict[str, Any]:
        measured.append((system.name, seed))
        return {"system": system.name, "images": arguments.num_images, "seed": seed, "frechet": float(seed)}

    monkeypatch.setitem(script["main"].__globals__, "measure", measure)

    def main(*flags: str) -> None:
        output = ["--output", str(tmp_path / "x.json"), "--num_images", "7", "--systems", "ddpm_hf"]
        monkeypatch.setattr(sys, "argv", ["digits_ladder.py", *output, *flags])
        script["main"]()

    main("--seeds", "1")
    main("--seeds", "1", "3")
    assert measured == [("ddpm_hf", 1), ("ddpm_hf", 3)]
    assert re.search(r"^ddpm_hf +7 +2 +2\.000 ± 1\.000$", (tmp_path / "x.txt").read_text(), re.MULTILINE)
    with pytest.raises(SystemExit, match="other settings"):
        main("--num_samples", "9")


def test_a_ladder_that_cannot_measure_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num_images", "128", "--features", "no_such_package:factory", "--runs", str(tmp_path / "runs")]
    code = run_script(REPOSITORY / "benchmarks" / "cifar10_ladder.py", *flags, monkeypatch=monkeypatch)
    assert code == "No feature network can be opened."
    assert capsys.readouterr().out.startswith("not measured in no_such_package:factory: ")
    assert not (tmp_path / "runs").exists()
