"""Measure data loading, compared with the loader of diffusers' train_unconditional.py: python benchmarks/data.py.

That loader is set_transform of `datasets` with torchvision transforms (resize, crop, flip, to float, normalize) in a
torch DataLoader; it is assembled here from the same public parts. Our loader reads decoded images from the cache. Both
return float32 batches in [-1, 1], flipped at random, on the GPU if there is one. Everything runs in one process, in
rounds of alternating order; a ratio is the median over the rounds, with its range. Without torchvision, only our loader
is measured. The 32x32 images are those of --data or of the environment variable DDPM_HF_CIFAR10 (a CIFAR-10 parquet
file), or synthetic; the 256x256 JPEGs are always synthetic.
"""

import argparse
import importlib.util
import io
import itertools
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the checkout is enough, it need not be installed
RESULTS = Path(__file__).resolve().parent / "results"

from ddpm_hf.config import DataConfig
from ddpm_hf.data import ImageLoader, ImageSet, ImageStream, SampleOrder, open_images, open_sets
from ddpm_hf.training.run_dir import device_name

CPU = torch.device("cpu")


@dataclass
class Case:
    """One way to load a dataset.

    Args:
        name: Its name in the table.
        load: Load a number of batches.
        seconds: Seconds per image in each round.
    """

    name: str
    load: Callable[[int], None]
    seconds: list[float]


def make_images(path: Path, size: int, count: int) -> Path:
    """Write a parquet file of synthetic images: PNG at 32x32, JPEG above."""
    import datasets

    random = np.random.default_rng(0)
    cells = []
    for _ in range(count):
        coarse = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noise = random.normal(0, 6, (size, size, 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if size == 32 else "JPEG", quality=90)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(path)
    return path


def peer_batches(source: Path, size: int, batch: int, num_workers: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield batches as train_unconditional.py does."""
    import datasets
    from torchvision import transforms

    augment = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def transform(examples: dict[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
        return {"input": [augment(image.convert("RGB")) for image in examples["image"]]}

    table = datasets.load_dataset("parquet", data_files=str(source), split="train")
    table.set_transform(transform)
    loader = torch.utils.data.DataLoader(
        table,
        batch_size=batch,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )
    while True:
        for batch_of in loader:
            yield batch_of["input"].to(device)


def our_batches(loader: ImageLoader | ImageStream, batch: int) -> Iterator[torch.Tensor]:
    """Yield batches as training does."""
    for start in itertools.count(0, batch):
        yield loader.samples(start, start + batch)[0]


def stored_batches(images: ImageSet, batch: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield batches as they are stored: the work of the host if a GPU flips and normalizes."""
    order = SampleOrder(len(images), 0)
    for start in itertools.count(0, batch):
        yield images.take(order.positions(start, start + batch))[0]


def loading(batches: Iterator[Any], device: torch.device) -> Callable[[int], None]:
    """Return a function that loads a number of batches and waits for the device."""

    def load(count: int) -> None:
        for _ in itertools.islice(batches, count):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()

    return load


def cases_of(source: Path, size: int, batch: int, cache_dir: Path, device: torch.device) -> list[Case]:
    """Return all ways to load one dataset."""
    config = DataConfig(source=str(source), cache_dir=str(cache_dir), resolution=size, num_channels=3, random_flip=True)
    images = open_images(config, with_labels=False)
    cases: dict[str, Iterator[Any]] = {}
    if importlib.util.find_spec("torchvision") is not None:
        for num_workers in (0, 2):
            name = f"train_unconditional.py, {num_workers} workers"
            cases[name] = peer_batches(source, size, batch, num_workers, device)

    plain = ImageLoader(images, replace(config, device_resident=False), 0, device)
    cases["ours, from the file"] = our_batches(plain, batch)
    again = ImageLoader(images, replace(config, device_resident=False), 0, device)
    cases["ours, from the file, again (A/A)"] = our_batches(again, batch)
    resident = ImageLoader(images, replace(config, device_resident=True), 0, device)
    cases["ours, kept on the device"] = our_batches(resident, batch)
    cases["ours, as stored (not flipped, no floats)"] = stored_batches(images, batch)
    cropped = replace(config, resize_to=size * 9 // 8, crop="random")
    loader = ImageLoader(open_images(cropped, with_labels=False), cropped, 0, device)
    cases["ours, random crops of 9/8 the size"] = our_batches(loader, batch)
    streamed = replace(config, streaming=True)
    stream, _ = open_sets(streamed, with_labels=False, seed=0, device=device)
    assert isinstance(stream, ImageStream)
    cases["ours, streamed (decoded while reading)"] = our_batches(stream, batch)
    return [Case(name, loading(batches, device), []) for name, batches in cases.items()]


def measure(cases: list[Case], batch: int, num_rounds: int, seconds: float) -> None:
    """Time all cases in rounds of about `seconds` per case."""
    counts = {}
    for case in cases:
        case.load(2)  # caches, worker processes, the shuffle buffer
        started = time.perf_counter()
        case.load(2)
        counts[case.name] = max(2, round(2 * seconds / (time.perf_counter() - started)))
    for number in range(num_rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            count = counts[case.name]
            time.sleep(0.5)  # workers of the previous case may still be prefetching
            started = time.perf_counter()
            case.load(count)
            case.seconds.append((time.perf_counter() - started) / (count * batch))


def table_of(cases: list[Case], goal: float) -> Iterator[str]:
    """Yield one line per case: images per second, and the speed relative to the first case of the same round."""
    base = cases[0]
    yield f"{'':<42}{'images/s':>12}   times {base.name}"
    for case in cases:
        speed = 1 / statistics.median(case.seconds)
        ratios = sorted(one / other for one, other in zip(base.seconds, case.seconds, strict=True))
        spread = f"{statistics.median(ratios):.1f}  ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        yield f"{case.name:<42}{speed:>12,.0f}   {spread}"
        if case.name == "ours, from the file" and base.name.startswith("train_unconditional"):
            verdict = "reached" if statistics.median(ratios) >= goal else "NOT reached"
            yield f"{'':<42}{'':>12}   goal {goal:g}: {verdict}"


def once(name: str, work: Callable[[], Any], count: int | None = None) -> str:
    """Time a single call."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    rate = f", {count / seconds:,.0f} images/s" if count else ""
    return f"{name:<42}{seconds:>12.3f} s{rate}"


def report(size: int, source: Path, arguments: argparse.Namespace, device: torch.device, goal: float) -> Iterator[str]:
    """Yield the report of one dataset."""
    import pyarrow.parquet

    count = pyarrow.parquet.ParquetFile(source).metadata.num_rows
    batch = arguments.batch if size == 32 else max(1, arguments.batch // 4)
    yield f"\n{size}x{size}: {count:,} images ({source.name}), batches of {batch}, on {device.type}"
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        config = DataConfig(source=str(source), cache_dir=folder, resolution=size, num_channels=3)
        yield once("decode to the cache, once", lambda: open_images(config, with_labels=False), count)
        yield once("open the cache", lambda: open_images(config, with_labels=False))
        images = open_images(config, with_labels=False)
        first = 1_000_000 * batch
        loader = ImageLoader(images, DataConfig(random_flip=True), 0, CPU)
        yield once("first batch of step 1,000,000", lambda: loader.samples(first, first + batch))
        yield once("its second batch", lambda: loader.samples(first + batch, first + 2 * batch))
        cases = cases_of(source, size, batch, Path(folder), device)
        measure(cases, batch, arguments.rounds, arguments.seconds)
        yield from table_of(cases, goal)


def main() -> int:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 as parquet")
    parser.add_argument("--batch", type=int, default=128, help="batch size at 32x32; a quarter of it at 256x256")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="per case and round")
    parser.add_argument("--num_32", type=int, default=50_000, help="synthetic images of 32x32, without --data")
    parser.add_argument("--num_256", type=int, default=1500, help="synthetic images of 256x256")
    parser.add_argument(
        "--work_dir", help="folder for synthetic images and caches (default: the temporary folder of the system)"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = device_name(device)
    lines = [
        f"command: {shlex.join(['python', 'benchmarks/data.py', *sys.argv[1:]])}",
        f"machine: {name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.platform()}",
    ]
    if importlib.util.find_spec("torchvision") is None:
        lines.append("torchvision is not installed: train_unconditional.py is not measured.")
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        given = arguments.data or os.environ.get("DDPM_HF_CIFAR10")
        small = Path(given).resolve() if given else make_images(Path(folder) / "32.parquet", 32, arguments.num_32)
        large = make_images(Path(folder) / "256.parquet", 256, arguments.num_256)
        for size, source, goal in ((32, small, 30.0), (256, large, 3.0)):
            for line in report(size, source, arguments, device, goal):
                print(line, flush=True)
                lines.append(line)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"data_{name.replace(' ', '_').replace('/', '_').replace('(R)', '')}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
