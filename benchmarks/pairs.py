"""Time several ways to do the same work in interleaved rounds, and compare them without naming a winner in the noise.

A round runs every way once, and the order is reversed from round to round (A B C, C B A, ...), so that a slow drift of
the machine cancels. The first way is ours and the last is ours again, built a second time: the control (A/A). A ratio
is the time of a way divided by the time of ours in the same round, so more than 1 means that ours is faster.
"""

import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
MIN_ROUNDS_FOR_A_VERDICT = 4
PACKAGES = ("ddpm_hf", "torch", "torchvision", "diffusers", "accelerate", "datasets", "denoising-diffusion-pytorch")


def _forward_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# torch counts the attention kernels of a GPU only.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


@dataclass
class Way:
    """One way to do the work of a row.

    Args:
        name: Its name in the table.
        run: One call of the work.
        prepare: Called before each call, not timed.
        enter: Called before the calls of a round, not timed; for settings of the whole process.
        close: Called after the last round.
        settle_seconds: Pause after the calls of a round, for processes that still work.
        flops: Floating point operations of a call; 0 if they were not counted.
        seconds: Seconds of a call, one value per round.
        first_seconds: Seconds of the first call, which allocates and may compile, and of compiling before it; not part
            of `seconds`.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None
    enter: Callable[[], object] = lambda: None
    settle_seconds: float = 0.0
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0

    def time(self, count: int, max_seconds: float = math.inf) -> float:
        """Return the mean seconds of a number of calls, or of fewer if they take longer."""
        total, number = 0.0, 0
        while number < count and total <= max_seconds:
            self.prepare()
            started = time.perf_counter()
            self.run()
            total += time.perf_counter() - started
            number += 1
        return total / max(1, number)

    def start(self, counts_flops: bool) -> None:
        """Make the first call; count matrix products, convolutions and attention in it."""
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) if counts_flops else nullcontext()
        with counter:
            self.first_seconds += self.time(1)
        if isinstance(counter, FlopCounterMode):
            self.flops = float(counter.get_total_flops())


@dataclass
class Row:
    """One comparison.

    Args:
        name: Name for --only.
        title: Heading of its table.
        about: The conditions, in a sentence or two.
        build: Returns the ways; the first is ours, the last ours again.
        weight: Share of the time budget.
        images: Images of a call; 0 if a call is not about images.
        counts_flops: Whether to count floating point operations.
        max_rounds: Rounds, if the time suffices.
        call_seconds: A way is called as often in a round as fits into this time, at least once; 0 for once.
        num_warm_calls: Calls before the timed ones in every round.
        is_compiled: Whether the first call of ours compiles.
    """

    name: str
    title: str
    about: str
    build: Callable[[], list[Way]]
    weight: float
    images: int = 0
    counts_flops: bool = False
    max_rounds: int = 12
    call_seconds: float = 0.3
    num_warm_calls: int = 0
    is_compiled: bool = False


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def verdict(ratios: Sequence[float], control: Sequence[float]) -> str:
    """Return "faster" or "slower" if the quartiles of the ratios lie outside the noise, otherwise no winner.

    The noise is the larger distance of a quartile of the control from 1, as a factor in both directions.
    """
    if len(ratios) < MIN_ROUNDS_FOR_A_VERDICT:
        return "too few rounds"
    low, _, high = quartiles(ratios)
    first, _, last = quartiles(control)
    noise = max(first, 1 / first, last, 1 / last)
    if low > noise:
        return "faster"
    return "slower" if high < 1 / noise else "within the noise"


def rounds(ways: list[Way], row: Row, seconds: float) -> Iterator[int]:
    """Time all ways in rounds until the time is used up; yield the number of rounds after each.

    There is at least one round in each order, so that the first result is not one of a single order.
    """
    stop_at = time.monotonic() + seconds
    counts = []
    for way in ways:
        way.enter()
        way.start(row.counts_flops)
        seconds_of_call = way.time(1) if row.call_seconds else math.inf
        counts.append(max(1, min(10_000, round(row.call_seconds / seconds_of_call))))
    number, half_a_round = 0, 0.0
    while number < 2 or (number < row.max_rounds and time.monotonic() + half_a_round < stop_at):
        started = time.monotonic()
        gc.collect()
        order = list(zip(ways, counts, strict=True))
        for way, count in order if number % 2 == 0 else reversed(order):
            way.enter()
            way.time(row.num_warm_calls)
            # A first call that only took a prepared batch says too little about the next ones.
            way.seconds.append(way.time(count, 2 * row.call_seconds or math.inf))
            time.sleep(way.settle_seconds)
        number += 1
        half_a_round = (time.monotonic() - started) / 2
        yield number


def summary(row: Row, ways: list[Way]) -> dict[str, Any]:
    """Return the result of a row as JSON values."""
    ours, control = ways[0], ways[-1]
    control_ratios = [again / first for again, first in zip(control.seconds, ours.seconds, strict=True)]
    results = []
    for way in ways:
        low, median, high = quartiles(way.seconds)
        result: dict[str, Any] = {
            "name": way.name,
            "seconds": {"median": median, "q25": low, "q75": high, "min": min(way.seconds)},
            "rounds": [float(f"{value:.5g}") for value in way.seconds],
            "first_seconds": way.first_seconds,
        }
        if row.images:
            result["images_per_second"] = row.images / median
        if way.flops:
            result |= {"flops": way.flops, "gflops_per_second": way.flops / median / 1e9}
        if way is not ours:
            ratios = [one / base for one, base in zip(way.seconds, ours.seconds, strict=True)]
            low, median, high = quartiles(ratios)
            result["ratio"] = {
                "median": median,
                "q25": low,
                "q75": high,
                "of_minima": min(way.seconds) / min(ours.seconds),
                "verdict": "control" if way is control else verdict(ratios, control_ratios),
            }
            if way.flops and ours.flops:
                result["ratio"]["per_flop"] = median * ours.flops / way.flops
        results.append(result)
    return {
        "name": row.name,
        "title": row.title,
        "about": row.about,
        "num_rounds": len(ours.seconds),
        "is_compiled": row.is_compiled,
        "ways": results,
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show the result of a row in a terminal."""
    yield f"\n{result['title']} ({result['num_rounds']} rounds)"
    yield f"  {'':<52}{'time':>10}   ours is faster by (quartiles), of minima"
    for way in result["ways"]:
        line = f"  {way['name']:<52}{duration(way['seconds']['median']):>10}"
        if ratio := way.get("ratio"):
            line += f"   {ratio['median']:.2f} ({ratio['q25']:.2f} to {ratio['q75']:.2f}), {ratio['of_minima']:.2f}"
            line += f", per FLOP {ratio['per_flop']:.2f}" if "per_flop" in ratio else ""
            line += f"  {ratio['verdict']}"
        yield line


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def gemm_gflops(dtype: torch.dtype, size: int, seconds: float, device: torch.device | str = "cpu") -> float:
    """Measure the best speed of a square matrix product, in GFLOP/s."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, stop_at = math.inf, time.monotonic() + seconds
    while True:
        if left.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(left, right)
        if left.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        if time.monotonic() > stop_at:
            return 2 * size**3 / best / 1e9


def environment(device_name: str) -> dict[str, Any]:
    """Return hardware, versions, commit and command as JSON values."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
        capture_output=True,
        text=True,
    )
    return {
        "device": device_name,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def result_path(device_name: str) -> Path:
    """Return the file of results of a device."""
    plain = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in device_name)
    return RESULTS / f"bench_{'_'.join(part for part in plain.split('_') if part)}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a file of results as a whole, so that a run that is cut off leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
