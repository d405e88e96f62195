"""Load saved pipelines in the three ways of docs/compatibility.md and sample from them, here or in another process.

Run as a script, it cannot import ddpm_hf, like a user who has not installed it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[1]
STEPS = 10


@dataclass(frozen=True)
class Task:
    """One pipeline to load and sample from.

    Attributes:
        name: Name of its outcome.
        way: 1: stock classes; 2: the code in the folder, with consent; 3: the installed class.
        source: A folder or the id of a repository.
        load: Further arguments of from_pretrained; a dtype by its name.
        call: Further arguments of the pipeline.
        snapshot: Load from the folder that huggingface_hub.snapshot_download gives for the source.
        save: Where to save the loaded pipeline again.
    """

    name: str
    way: int
    source: str
    load: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    snapshot: bool = False
    save: str | None = None


@dataclass
class Outcome:
    """The images, (2, channels, height, width) in [0, 1], and the classes; or the error message as `refusal`.

    `second_moments` are those of the scheduler, if it has any.
    """

    images: torch.Tensor | None = None
    pipeline_class: str = ""
    scheduler_class: str = ""
    refusal: str = ""
    second_moments: list[float] | None = None


def class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def sample(pipe: Any, **arguments: Any) -> torch.Tensor:
    """Return two images from seed 0."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: torch.Tensor = pipe(
        batch_size=2, num_inference_steps=STEPS, generator=generator, output_type="pt", **arguments
    ).images
    return images.float()


def draws_in_float32(way: int) -> bool:
    """Return whether a half-precision network starts from the noise of a float32 one; stock did not before 0.42."""
    return way > 1 or tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)


def load(task: Task) -> Any:
    """Load in the way of the task."""
    source = snapshot_download(task.source) if task.snapshot else task.source
    arguments = dict(task.load)
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    if task.way == 1:
        return DiffusionPipeline.from_pretrained(source, **arguments)
    if task.way == 2:
        consent = {"custom_pipeline": source, "trust_remote_code": True}
        return DiffusionPipeline.from_pretrained(source, **consent | arguments)
    from ddpm_hf.diffusion import GaussianDiffusionPipeline

    return GaussianDiffusionPipeline.from_pretrained(source, **arguments)


def carry_out(tasks: Sequence[Task]) -> dict[str, Outcome]:
    """Load all pipelines before sampling from any, so that side effects of loading would change the images of others.

    An exception is an outcome, too.
    """
    pipes, outcomes = {}, {}
    for task in tasks:
        outcomes[task.name] = Outcome()
        try:
            pipes[task.name] = load(task)
        except Exception as error:
            outcomes[task.name].refusal = f"{type(error).__name__}: {error}"
            continue
        if task.save:
            pipes[task.name].save_pretrained(task.save)
    for task in tasks:
        if pipe := pipes.get(task.name):
            outcome = outcomes[task.name]
            outcome.pipeline_class, outcome.scheduler_class = class_name(pipe), class_name(pipe.scheduler)
            moments = getattr(pipe.scheduler, "eps_second_moments", None)
            outcome.second_moments = None if moments is None else moments.tolist()
            try:
                outcome.images = sample(pipe, **task.call)
            except Exception as error:
                outcome.refusal = f"{type(error).__name__}: {error}"
    return outcomes


def carry_out_elsewhere(
    tasks: Sequence[Task], folder: Path, home: Path, *, with_ddpm_hf: bool = False, **environment: str
) -> dict[str, Outcome]:
    """Carry out the tasks in a new process in a folder, with `home` for the caches of the Hub, offline by default."""
    results = Path(tempfile.mkdtemp(prefix="results", dir=folder))
    (results / "tasks.json").write_text(json.dumps([asdict(task) for task in tasks]))
    # -I isolates the process from all paths except for installed packages.
    command = ["-m", "tests.load_and_sample"] if with_ddpm_hf else ["-I", __file__]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run(
        [sys.executable, *command, str(results)],
        cwd=folder,
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stderr
    outcomes = {name: Outcome(**said) for name, said in json.loads((results / "said.json").read_text()).items()}
    for name, images in load_file(results / "images.safetensors").items():
        outcomes[name].images = images
    return outcomes


def main(results: Path) -> None:
    """Carry out the tasks of this process."""
    outcomes = carry_out([Task(**task) for task in json.loads((results / "tasks.json").read_text())])
    images = {name: outcome.images.contiguous() for name, outcome in outcomes.items() if outcome.images is not None}
    save_file(images, results / "images.safetensors")
    said = {name: asdict(outcome) | {"images": None} for name, outcome in outcomes.items()}
    (results / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    if __package__ != "tests":
        # From now on an import of ddpm_hf fails as if it were not installed.
        sys.modules["ddpm_hf"] = None
    main(Path(sys.argv[1]))
