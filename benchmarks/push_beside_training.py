"""What a push beside it costs a training: python benchmarks/push_beside_training.py.

The digits' training with its averaged weights pushed to a Hub on loopback without a pause, beside the same training
without any push, in turns, and the latter beside itself (A/A). Each is a process of one thread; the push is another, as
on a machine that has a core to spare. Images a second are those between the middle half of the lines of metrics, so
neither the start of Python nor the last push counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the checkout is enough, it need not be installed
RESULTS = Path(__file__).resolve().parent / "results"

from tests.loopback_hub import LoopbackHub

EVERY_STEPS = 20


def images_per_second(hub: LoopbackHub, num_steps: int, *, pushes: bool) -> float:
    """Trains once and returns the median speed of the middle of the run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "config": "configs/digits_8.yaml",
            "training.cpu": "true",
            "training.num_steps": num_steps,
            "training.log_every_steps": 10,
            "training.checkpoint_every_steps": num_steps,
            "preview.every_steps": 0,
            "evaluation.num_samples": 0,
            "evaluation.recognition": "false",
            "training.output_dir": f"{folder}/run",
        }
        if pushes:
            settings |= {"hub.push_to_hub": "true", "hub.repo_id": "digits", "hub.push_every_steps": EVERY_STEPS}
        command = [sys.executable, "train_ddpm.py"]
        command += [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": f"{folder}/home",
        }
        subprocess.run(
            command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [row["images_per_second"] for row in map(json.loads, lines)]
    return statistics.median(speeds[len(speeds) // 4 : -len(speeds) // 4])


def main() -> int:
    """Measures in turns and writes benchmarks/results/push_beside_training_<machine>.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()

    import torch

    from ddpm_hf.training.run_dir import device_name

    speeds: dict[str, list[float]] = {"no push": [], "no push, again (A/A)": [], "pushes without a pause": []}
    with LoopbackHub() as hub:
        for number in range(arguments.rounds):
            for name in list(speeds) if number % 2 == 0 else list(reversed(speeds)):
                speeds[name].append(images_per_second(hub, arguments.steps, pushes="without" in name))
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
        num_pushes = len(hub.uploaded)
    machine = device_name(torch.device("cpu"))
    base = speeds["no push"]
    lines = [
        f"command: python benchmarks/push_beside_training.py --rounds {arguments.rounds} --steps {arguments.steps}",
        f"machine: {machine}, {os.cpu_count()} CPUs, torch {torch.__version__}, 1 thread a process",
        f"digits_8, {arguments.steps} steps of 64 images; {num_pushes} pushes in {arguments.rounds} runs; medians",
        "",
        f"{'':<26}{'images/s':>10}{'of no push in the same round':>32}",
    ]
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"{name:<26}{statistics.median(values):>10.0f}{spread:>32}")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"push_beside_training_{machine.replace(' ', '_')}.txt").write_text(
        "\n".join(lines) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
