"""Write docs/performance.md from bench_*.json and gpu_*.json of benchmarks/results: python docs/make_performance.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
HEAD = """# Performance

Written by `docs/make_performance.py` from the results of `make bench`, which times ddpm_hf and other trainers in one
process on one CPU:

```sh
make bench                             # under 15 minutes
make bench ARGS="--compile"            # also compiled, which takes minutes more
make bench ARGS="--only train sample"  # some rows; their results are in outputs/bench.json
```

All ways to do the same work are timed in interleaved rounds of alternating order. A number such as 1.20 (1.15 to 1.24)
is the median over the rounds, with quartiles, of the time of a way divided by the time of ddpm_hf in the same round:
above 1, ddpm_hf is faster. The control is ddpm_hf against a second ddpm_hf. The result is "within the noise" unless the
quartiles of a ratio lie outside the quartiles of the control, taken in both directions. FLOP counts are those of matrix
products, convolutions and attention. Training and evaluation with ddpm_hf keep freed memory, a setting of the process;
it is undone while a peer is timed.

`python benchmarks/gpu.py` measures one GPU in at most ten minutes, after the checks of benchmarks/gpu_check.py; with
`--rehearse` it runs with a tiny network on the CPU."""
NO_GPU = "**Status: no GPU has been measured yet.**"
UNMEASURED = "No CPU has been measured either since these rows were defined."


def document(paths: list[Path] | None = None) -> str:
    """Return the content of docs/performance.md.

    Args:
        paths: The files of results; None takes those of the repository.
    """
    if paths is None:
        paths = [path for path in sorted(RESULTS.glob("*.json")) if path.name.startswith(("bench_", "gpu_"))]
        paths = [path for path in paths if not path.name.startswith("gpu_check")]
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    gpus = {path: content for path, content in contents.items() if "cells" in content}
    cpus = {path: content for path, content in contents.items() if path not in gpus}
    status = [] if gpus else [NO_GPU]
    status += [] if cpus else [UNMEASURED]
    lines = [HEAD, "", *[" ".join(status), ""] * bool(status)]
    for path, content in gpus.items():
        lines += [*gpu_section(path, content), ""]
    for path, content in cpus.items():
        lines += [*section(path, content), ""]
    return "\n".join(lines)


def gpu_section(path: Path, content: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one GPU, as benchmarks/gpu.py measured it."""
    yield f"## {content['device']}\n"
    yield f"`{content['command']}`; torch {content['torch']}, diffusers {content['diffusers']}, Python"
    yield f"{content['python']}; {content['data']} ([result](../benchmarks/results/{path.name}))."
    cells = [cell for cell in content["cells"] if "error" not in cell]
    proofs = [cell for cell in content["cells"] if cell["table"] == "proofs"]
    if proofs:
        yield f"{sum('error' not in cell for cell in proofs)} of {len(proofs)} checks of gpu_check.py passed."
    for name in ("training", "sampling"):
        rows = [cell for cell in cells if cell["table"] == name]
        for batch in sorted({row["batch"] for row in rows}):
            yield f"\n### {name.capitalize()}, batch {batch}\n"
            yield "| | images/s | first step | memory | GPU idle |\n| --- | --- | --- | --- | --- |"
            for row in (row for row in rows if row["batch"] == batch):
                memory = f"{row['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in row else ""
                idle = f"{row['idle']:.0%}" if "idle" in row else ""
                numbers = f"{number(row['images_per_second'])} | {duration(row['first_step_seconds'])}"
                yield f"| {row['system']} | {numbers} | {memory} | {idle} |"


def section(path: Path, content: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one machine."""
    environment, peak = content["environment"], content["gemm_gflops"]
    cores = f", {environment['num_cores']} cores, {environment['num_threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    yield f"## {environment['device']}\n"
    yield f"`{environment['command']}`{cores}, {content['seconds'] / 60:.0f} minutes; {versions}; commit"
    yield f"{environment['commit']} ([result](../benchmarks/results/{path.name}))."
    if peak:
        speeds = " and ".join(f"{speed:,.0f} GFLOP/s in {precision}" for precision, speed in peak.items())
        yield f"A matrix product reaches {speeds} in the same run."
    if not content["is_complete"]:
        yield "The run was cut off."
    for name, reason in content["missing"].items():
        yield f"{name}: {reason}."
    for row in content["rows"]:
        if row:
            yield from table(row, peak)


def table(row: dict[str, Any], peak: dict[str, float]) -> Iterator[str]:
    """Yield the table of one row."""
    ways, best = row["ways"], peak.get("fp32")
    has_images = any("images_per_second" in way for way in ways)
    has_flops = any("flops" in way for way in ways)
    has_peak = has_flops and best is not None
    names = ["", "time", *["images/s"] * has_images, *["GFLOP/s"] * has_flops, *["of peak"] * has_peak]
    names += ["ddpm_hf is faster by", "by minima", *["per FLOP"] * has_flops, "result"]
    yield f"\n### {row['title']}\n\n{row['about']} {row['num_rounds']} rounds.\n"
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"
    for way in ways:
        cells = [way["name"], duration(way["seconds"]["median"])]
        cells += [number(way.get("images_per_second"))] * has_images
        speed = way.get("gflops_per_second")
        cells += [number(speed)] * has_flops
        cells += ["" if speed is None or best is None else f"{speed / best:.0%}"] * has_peak
        if ratio := way.get("ratio"):
            cells += [f"{ratio['median']:.2f} ({ratio['q25']:.2f} to {ratio['q75']:.2f})", f"{ratio['of_minima']:.2f}"]
            cells += [f"{ratio['per_flop']:.2f}" if "per_flop" in ratio else ""] * has_flops
            cells.append(ratio["verdict"])
        else:
            cells += ["", "", *[""] * has_flops, ""]
        yield f"| {' | '.join(cells)} |"
    if row["is_compiled"]:
        first = ways[0]["first_seconds"]
        yield f"\nThe first call, which compiles with an empty cache, took {first:.0f} s."


def number(value: float | None) -> str:
    """Return a number with three digits, or nothing."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    (REPOSITORY / "docs" / "performance.md").write_text(document(), encoding="utf-8")
