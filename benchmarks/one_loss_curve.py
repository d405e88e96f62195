"""Draw docs/images/one_loss_curve.png, one loss curve for any split of the batch: python benchmarks/one_loss_curve.py.

The same small run three times: a batch of 8 on one process, on two processes of 4, and on one process as 4 + 4. The
curves coincide, so their differences are drawn below on a scale of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURE = REPOSITORY / "docs" / "images" / "one_loss_curve.png"
SETTINGS = {
    "config": "configs/digits_8.yaml",
    "model.overrides": '{"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.0}',
    "objective.class_dropout": "0.1",
    "data.random_flip": "true",
    "training.cpu": "true",
    "training.num_steps": "400",
    "training.train_batch_size": "8",
    "training.log_every_steps": "4",
    "training.checkpoint_every_steps": "400",
    "preview.every_steps": "0",
    "evaluation.num_samples": "0",
    "evaluation.recognition": "false",
}
# Name -> processes, images of one forward pass, color, line style.
SPLITS: dict[str, tuple[int, int, str, str]] = {
    "one process, 8 images": (1, 8, "#1f5a94", "-"),
    "two processes, 4 images each": (2, 4, "#c4541b", "--"),
    "one process, 4 + 4 images accumulated": (1, 4, "#2e7d32", ":"),
}


def losses_of(num_processes: int, micro_batch_size: int) -> tuple[list[int], list[float]]:
    """Train once and return the steps and losses of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {
            "training.micro_batch_size": str(micro_batch_size),
            "training.output_dir": f"{folder}/run",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(num_processes), "train_ddpm.py"]
        command += [part for name, value in settings.items() for part in (f"--{name}", value)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> float:
    """Draw the curves and their differences; return the largest difference from the first one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2, 1]})
    reference = np.array(next(iter(curves.values()))[1])
    largest = 0.0
    for number, (name, (steps, losses)) in enumerate(curves.items()):
        _, _, color, style = SPLITS[name]
        axes[0].plot(steps, losses, style, lw=3.6 - 1.2 * number, color=color, label=name)
        difference = np.abs(np.array(losses) - reference)
        if number:
            axes[1].plot(steps, difference, lw=1.2, color=color)
            largest = max(largest, float(difference.max()))
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False)
    axes[1].axhline(1e-5, color="#888888", lw=1.0, ls="--")
    axes[1].text(steps[-1], 1e-5, "guaranteed: 1e-5 ", ha="right", va="bottom", color="#666666", fontsize=9)
    axes[1].set_yscale("symlog", linthresh=1e-8)
    axes[1].set_yticks([0, 1e-8, 1e-7, 1e-6, 1e-5], ["0", "1e-8", "1e-7", "1e-6", "1e-5"])
    axes[1].set_ylim(0, 5e-5)
    axes[1].set_ylabel("distance from\none process")
    axes[1].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
        axis.set_xlim(left=0)
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})
    return largest


def main() -> None:
    """Train three times and draw."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    curves = {name: losses_of(num, micro) for name, (num, micro, _, _) in SPLITS.items()}
    largest = draw(curves, PICTURE)
    print(f"{PICTURE} is written; the largest distance is {largest:.1e}.")


if __name__ == "__main__":
    main()
