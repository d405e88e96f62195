"""Scaling efficiency of two processes on one machine: python benchmarks/scaling.py.

Training steps of the digits network, on one process of one thread and on two of one thread each, for the same batch on
each process (weak scaling) and for the same batch in all (strong scaling). Each case is a torchrun of its own that
trains the real Trainer and times steps after a warm-up; the cases follow each other in rounds whose order is reversed
every time, and a ratio is the median over the rounds, with its range. One process against one process is the control:
its ratio says how much of a difference the machine makes by itself. What is in a step beside the gradient all-reduce is
the same, so the loss of efficiency is the all-reduce, and what two cores take from each other (caches, memory, clock).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the checkout is enough, it need not be installed
RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP_STEPS = 10


@dataclass
class Case:
    """One case.

    Args:
        name: What it is called in the table.
        num_processes: Each of one thread.
        batch: Images of a step on one process.
        seconds: Of a step, one value a round.
    """

    name: str
    num_processes: int
    batch: int
    seconds: list[float] = field(default_factory=list)

    @property
    def images_per_second(self) -> list[float]:
        """Images per second of all processes together, one value per round."""
        return [self.num_processes * self.batch / seconds for seconds in self.seconds]


def train_and_time(folder: Path, batch: int, num_steps: int) -> None:
    """Train on this rank of a torchrun; rank 0 writes the median time of a step and the number of parameters."""
    from ddpm_hf.config import parse_command_line
    from ddpm_hf.training.trainer import Trainer

    num_processes = int(os.environ["WORLD_SIZE"])
    settings = {
        "config": REPOSITORY / "configs" / "digits_8.yaml",
        "data.source": REPOSITORY / "data" / "digits.parquet",
        "training.cpu": "true",
        "training.output_dir": folder / "run",
        "training.train_batch_size": batch * num_processes,
        "training.num_steps": num_steps + WARM_UP_STEPS,
        "training.log_every_steps": num_steps,
        "training.checkpoint_every_steps": 10 * num_steps,
        "preview.every_steps": 0,
        "evaluation.num_samples": 0,
        "evaluation.recognition": "false",
    }
    config, _ = parse_command_line([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    trainer = Trainer(config)
    train_step, ends = trainer._train_step, []

    def timed(step: int) -> None:
        train_step(step)
        ends.append(time.perf_counter())

    trainer._train_step = timed  # type: ignore[method-assign]
    trainer.fit()
    trainer.folder.release()
    durations = [end - start for start, end in zip(ends[WARM_UP_STEPS:], ends[WARM_UP_STEPS + 1 :], strict=False)]
    if trainer.is_main_process:
        num_parameters = sum(parameter.numel() for parameter in trainer.unet.parameters())
        result = {"seconds": statistics.median(durations), "num_parameters": num_parameters}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    trainer.shutdown()


def measure(case: Case, num_steps: int) -> int:
    """Train once, add the time of a step to the case, and return the number of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(case.num_processes), __file__]
        command += ["--worker", folder, "--batch", str(case.batch), "--steps", str(num_steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case.name} failed:\n{done.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    case.seconds.append(result["seconds"])
    return int(result["num_parameters"])


def ratio(case: Case, base: Case) -> str:
    """Return median and range over the rounds of the ratio of images per second to another case."""
    pairs = zip(case.images_per_second, base.images_per_second, strict=True)
    ratios = sorted(mine / other for mine, other in pairs)
    return f"{statistics.median(ratios):5.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def table_of(cases: list[Case], base: Case) -> list[str]:
    """Return one line per case."""
    lines = [f"{'':<40}{'ms/step':>9}{'images/s':>10}   times one process (2.00 is all of two)"]
    for case in cases:
        milliseconds = 1000 * statistics.median(case.seconds)
        images = statistics.median(case.images_per_second)
        lines.append(f"{case.name:<40}{milliseconds:>9.1f}{images:>10,.0f}   {ratio(case, base)}")
    return lines


def main() -> int:
    """Measure all cases and write benchmarks/results/scaling_<machine>.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images of a step on one process")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a case in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--machine", help="name of the result file; by default the processor")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        train_and_time(arguments.worker, arguments.batch, arguments.steps)
        return 0

    import torch

    from ddpm_hf.training.run_dir import device_name

    batch = arguments.batch
    base = Case(f"1 process, {batch} images", 1, batch)
    cases = [
        base,
        Case(f"1 process, {batch} images, again (A/A)", 1, batch),
        Case(f"2 processes, {batch} images each", 2, batch),
        Case(f"2 processes, {batch // 2} images each", 2, batch // 2),
    ]
    for number in range(arguments.rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            num_parameters = measure(case, arguments.steps)
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    machine = arguments.machine or device_name(torch.device("cpu"))
    lines = [
        f"{machine}, {os.cpu_count()} CPUs, 1 thread a process, gloo on loopback",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}",
        f"digits_8, {num_parameters:,} parameters; {2 * (2 - 1) / 2 * 4 * num_parameters / 1e6:.1f} MB sent by each of"
        f" 2 processes a step; {arguments.rounds} rounds of {arguments.steps} steps, medians",
        "",
        *table_of(cases, base),
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"scaling_{machine.replace(' ', '_').replace('/', '_').replace('(R)', '')}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
