"""Measure quality against network calls: python benchmarks/network_calls.py configs/digits_8.yaml --seeds 0 1 2.

The recipe is trained once for each seed, unless its run is there, and sampled in groups, each of which can be measured
alone:

    samplers      ancestral, DDIM, DPM-Solver++ (2M), UniPC
    optimized     the last three with the timesteps of `ddpm-hf timesteps`
    students      those of `ddpm-hf distill`, which are trained unless they are there
    guidance      classifier-free guidance, in all steps and in an interval (needs objective.class_dropout)
    autoguidance  guidance by the first checkpoint of the run
    criteria      DDIM and the solvers with timesteps chosen by the variational bound (Watson et al. 2021) and by the
                  errors of steps along trajectories; also the difference to the images of many steps

A call is one evaluation of a network for one image; a guided step takes two. All samplers start from the same noise.
Recognized is the share of the samples that a classifier, trained on real images, recognizes as the class asked for. The
Fréchet distance, precision and recall (Kynkäänniemi et al. 2019) are to the training images, in pixels: small images
need no feature network, and the distance is not an FID. Numbers are means over the training seeds, with their standard
errors. Rows are kept in results/network_calls_RECIPE.json; measuring a group replaces its rows, and --draw draws the
figure of all recipes in docs/images.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without installation
RESULTS = Path(__file__).resolve().parent / "results"
FIGURE = REPOSITORY / "docs" / "images" / "network_calls.png"

from ddpm_hf.cli.main import main as ddpm_hf
from ddpm_hf.config import read_config
from ddpm_hf.data import ImageSet, open_images
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import moments_of
from ddpm_hf.evaluation.generate import Sampler, sample_images, scheduler_class
from ddpm_hf.evaluation.likelihood import ReverseProcess, variational_bound
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.recognition import SVC_PENALTY, squared_distances
from ddpm_hf.evaluation.timesteps import NUM_CANDIDATES, candidate_lists, follow_trajectories
from ddpm_hf.training.run_dir import device_name

GROUPS = ("samplers", "optimized", "students", "guidance", "autoguidance", "criteria")
SOLVERS: dict[str, dict[str, Any]] = {
    "DDIM": {"eta": 0.0},
    "DPM-Solver++ (2M)": {"scheduler": "DPMSolverMultistepScheduler"},
    "UniPC": {"scheduler": "UniPCMultistepScheduler"},
}
SHORT = {"DDIM": "ddim", "DPM-Solver++ (2M)": "dpm++", "UniPC": "unipc"}
STUDENTS = (8, 4, 2, 1)
GUIDED_STEPS, SCALES, INTERVAL, AUTO_SCALES = 10, (1.5, 2.0, 3.0), (0.2, 0.8), (1.5, 2.0, 3.0)
NEIGHBORS = 3
BATCH_SIZE = 50
METRICS = ("recognized", "frechet", "precision", "recall")


@dataclass(frozen=True)
class Judge:
    """The real images of a recipe, and what is measured against them."""

    training: ImageSet
    validation: ImageSet

    def measure(self, images: NDArray[np.uint8], labels: Sequence[int]) -> dict[str, float]:
        """Return the metrics of uint8 images (number, height, width, channels) with the classes asked for."""
        rows, (real, _) = images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 127.5 - 1, self.pixels(self.training)
        precision, recall = precision_and_recall(rows, real)
        return {
            "recognized": float((self.classifier().predict(rows) == np.asarray(labels)).mean()),
            "frechet": frechet_distance(moments_of(rows), moments_of(real)),
            "precision": precision,
            "recall": recall,
        }

    def classifier(self) -> Any:
        """Return the classifier of `evaluation.recognition`, trained on the training images."""
        from sklearn.svm import SVC

        if "classifier" not in _CACHE:
            pixels, labels = self.pixels(self.training)
            _CACHE["classifier"] = SVC(C=SVC_PENALTY, kernel="rbf", gamma="scale").fit(pixels, labels)
        return _CACHE["classifier"]

    @staticmethod
    def pixels(images: ImageSet) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the pixels of all images, (number, values), in [-1, 1], and their labels."""
        pixels, labels = images.take(images.positions)
        return pixels.reshape(len(pixels), -1) / 127.5 - 1, labels


_CACHE: dict[str, Any] = {}


def precision_and_recall(samples: NDArray[np.float64], real: NDArray[np.float64]) -> tuple[float, float]:
    """Return the shares of samples near real images, and of real images near samples. Kynkäänniemi et al. 2019."""

    def covered(rows: NDArray[np.float64], others: NDArray[np.float64]) -> float:
        # Nearer to one of the others than its third neighbor among them; the first one is itself.
        radii = np.sort(squared_distances(others, others), axis=1)[:, NEIGHBORS]
        return float((squared_distances(rows, others) <= radii).any(axis=1).mean())

    return covered(samples, real), covered(real, samples)


# ---------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """A trained run, and how many samples are drawn from it."""

    folder: Path
    seed: int
    judge: Judge
    num_samples: int

    def load(self, folder: Path | None = None) -> GaussianDiffusionPipeline:
        """Load the pipeline of the run, or another one."""
        pipeline: GaussianDiffusionPipeline = GaussianDiffusionPipeline.from_pretrained(folder or self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def row(self, group: str, name: str, pipeline: GaussianDiffusionPipeline, **settings: Any) -> dict[str, Any]:
        """Sample with the settings of a `Sampler`, and return the row of the results."""
        sampler = Sampler(**settings)
        prepared = sampler.prepare(pipeline)
        guide = settings.get("guide")
        networks = [prepared.unet] + ([] if guide is None else [guide.unet])
        with counted(networks) as calls:
            images = sample_images(
                prepared, sampler, seed=self.seed, indices=range(self.num_samples), batch_size=BATCH_SIZE
            )
        labels = sampler.labels_of(prepared, range(self.num_samples)) or []
        measured = self.judge.measure(images, labels)
        row = {"group": group, "name": name, "seed": self.seed, "calls": calls[0] / self.num_samples} | measured
        print(
            " ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
        return row


@contextmanager
def counted(networks: Sequence[torch.nn.Module]) -> Iterator[list[int]]:
    """Count the images that networks are called with."""
    count = [0]

    def add(_: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count[0] += len(inputs[0] if inputs else kwargs["sample"])

    handles = [network.register_forward_pre_hook(add, with_kwargs=True) for network in networks]
    yield count
    for handle in handles:
        handle.remove()


def samplers(run: Run, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of samplers with evenly spaced timesteps."""
    pipeline = run.load()
    for name, settings in {"ancestral": {"eta": 1.0}, **SOLVERS}.items():
        for number in steps:
            yield run.row(
                "samplers", name, pipeline, num_inference_steps=number, timestep_spacing="trailing", **settings
            )


def optimized(run: Run, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of solvers with the timesteps that `ddpm-hf timesteps` chooses."""
    chosen = [number for number in steps if number <= 20]
    for name, settings in SOLVERS.items():
        words = ["--steps", ",".join(map(str, chosen)), "--scheduler", SHORT[name]]
        if ddpm_hf(["timesteps", str(run.folder), *words]):
            raise SystemExit(1)
        pipeline = run.load()
        for number in chosen:
            yield run.row(
                "optimized",
                f"{name}, optimized",
                pipeline,
                num_inference_steps=number,
                timestep_spacing="optimized",
                **settings,
            )


def students(run: Run, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of the students, which are trained if they are not there."""
    output = run.folder.with_name(f"{run.folder.name}_distilled")
    if not (output / f"steps_{STUDENTS[-1]}" / "pipeline").is_dir():
        command = ["distill", str(run.folder), "--steps", ",".join(map(str, STUDENTS)), "--output", str(output)]
        if ddpm_hf(command):
            raise SystemExit(1)
    for number in STUDENTS:
        yield run.row("students", "student", run.load(output / f"steps_{number}"))


def guidance(run: Run, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of classifier-free guidance in all steps and in an interval of them."""
    pipeline = run.load()
    if not pipeline.config.get("has_null_label"):
        print("guidance: the recipe has no objective.class_dropout, so there is nothing to measure.")
        return
    common = SOLVERS["UniPC"] | {"num_inference_steps": GUIDED_STEPS}
    for scale in SCALES:
        for name, interval in (("guidance", (0.0, 1.0)), ("guidance in an interval", INTERVAL)):
            settings = common | {"guidance_scale": scale, "guidance_interval": interval}
            yield run.row("guidance", f"{name}, scale {scale:g}", pipeline, **settings)


def autoguidance(run: Run, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of guidance by the first checkpoint of the run."""
    pipeline = run.load()
    guide = run.load(min((run.folder / "checkpoints").glob("step_*")))
    for scale in AUTO_SCALES:
        settings = SOLVERS["UniPC"] | {"num_inference_steps": GUIDED_STEPS, "guidance_scale": scale, "guide": guide}
        yield run.row("autoguidance", f"autoguidance, scale {scale:g}", pipeline, **settings)


def criteria(run: Run, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield rows of lists of ten timesteps by several criteria."""
    pipeline = run.load()
    lists = candidate_lists(follow_trajectories(pipeline, {}, num_images=64, batch_size=BATCH_SIZE, seed=run.seed), 10)
    lists["variational bound"] = list_of_bound(pipeline, run.judge.training, 10)
    for name, settings in SOLVERS.items():
        many = run.load()
        expected = sample_images(
            many,
            Sampler(num_inference_steps=NUM_CANDIDATES, eta=0.0),
            seed=run.seed,
            indices=range(BATCH_SIZE),
            batch_size=BATCH_SIZE,
        )
        for criterion, timesteps in lists.items():
            kind = scheduler_class(settings["scheduler"]).__name__ if "scheduler" in settings else None
            key = kind or "GaussianDiffusionScheduler(eta=0)"
            pipeline.register_to_config(optimized_timesteps={key: {"10": timesteps}})
            arguments = settings | {"num_inference_steps": 10, "timestep_spacing": "optimized"}
            row = run.row("criteria", f"{name}, {criterion}", pipeline, **arguments)
            sampler = Sampler(**arguments)
            images = sample_images(
                sampler.prepare(pipeline), sampler, seed=run.seed, indices=range(BATCH_SIZE), batch_size=BATCH_SIZE
            )
            difference = float(np.sqrt(np.mean((images.astype(float) - expected) ** 2)) / 255)
            yield row | {"difference": difference, "timesteps": timesteps}


def list_of_bound(pipeline: GaussianDiffusionPipeline, images: ImageSet, num_steps: int) -> list[int]:
    """Return the timesteps with the smallest variational bound, for the optimal variance. Watson et al. 2021.

    All terms follow from the error of the predicted x_0 at each timestep (Bao et al. 2022, section 4).
    """
    total = len(pipeline.scheduler)
    timesteps = np.linspace(total - 1, 0, NUM_CANDIDATES).round().astype(int).tolist()
    some = images.split(1 - 100 / len(images), 0)[0] if len(images) > 100 else images
    bound = variational_bound(ReverseProcess(pipeline, timesteps), some, seed=0)
    alpha_bar = np.append(pipeline.scheduler.noise_schedule.alphas_cumprod.numpy()[timesteps], 1.0)
    start, end = np.ogrid[: len(timesteps), : len(timesteps) + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        beta = 1 - alpha_bar[start] / alpha_bar[end]
        variance = beta * (1 - alpha_bar[end]) / (1 - alpha_bar[start])
        coef_x_0 = np.sqrt(alpha_bar[end]) * beta / (1 - alpha_bar[start])
        terms = 0.5 * np.log1p(coef_x_0**2 * bound.x_0_mse[start] / variance)
    # The decoder term, of a normal distribution with the variance of the error, in bins of 2/255
    floor = np.maximum(bound.x_0_mse, (0.5 / 255) ** 2)
    terms[:, -1] = 0.5 * np.log(2 * math.pi * math.e * floor) - math.log(2 / 255)
    costs = np.where(start < end, terms, np.inf)
    best, origins = costs[0], []
    for _ in range(num_steps - 1):
        sums = best[:-1, None] + costs
        origins.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    positions = [len(timesteps)]
    for origin in reversed(origins):
        positions.append(int(origin[positions[-1]]))
    return [timesteps[position] for position in [0, *reversed(positions[1:])]]


MEASURE: dict[str, Callable[[Run, Sequence[int]], Iterator[dict[str, Any]]]] = {
    "samplers": samplers,
    "optimized": optimized,
    "students": students,
    "guidance": guidance,
    "autoguidance": autoguidance,
    "criteria": criteria,
}


# ---------------------------------------------------------------------------------------------- results and figure


def train(recipe: Path, seed: int, folder: Path) -> None:
    """Train a recipe with another seed, unless the run is there."""
    if not (folder / "pipeline").is_dir():
        flags = {"training.seed": seed, "training.output_dir": folder}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(REPOSITORY / "train_ddpm.py"), "--config", str(recipe), *words]
        subprocess.run(command, check=True, cwd=REPOSITORY)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the rows with equal names and calls as one line each: means over the seeds, and their standard errors."""
    yield f"{'':<48}{'calls':>6}  " + "".join(f"{name:>19}" for name in METRICS)
    for group in GROUPS:
        of_group = [row for row in rows if row["group"] == group]
        for key in dict.fromkeys((row["name"], row["calls"]) for row in of_group):
            same = [row for row in of_group if (row["name"], row["calls"]) == key]
            cells = "".join(f"{mean_and_error([row[name] for row in same]):>19}" for name in METRICS)
            differences = [row["difference"] for row in same if "difference" in row]
            extra = f"   difference {mean_and_error(differences)}" if differences else ""
            yield f"{key[0]:<48}{key[1]:>6.1f}  {cells}{extra}"


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean and its standard error."""
    error = f"{statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):.4f} ± {error}"


def draw(results: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the Fréchet distance and the recognized share of each recipe against the network calls."""
    from matplotlib.ticker import ScalarFormatter

    from ddpm_hf.plots import COLORS, new_figure, save_figure

    figure = new_figure(5.2 * len(results), 7.4)
    grid = figure.subplots(2, len(results), squeeze=False)
    for column, (recipe, rows) in enumerate(results.items()):
        shown = [row for row in rows if row["group"] in ("samplers", "optimized", "students")]
        samplers_shown = list(dict.fromkeys(row["name"].removesuffix(", optimized") for row in shown))
        for name in dict.fromkeys(row["name"] for row in shown):
            calls = sorted({row["calls"] for row in shown if row["name"] == name})
            for axes, metric in zip(grid[:, column], ("frechet", "recognized"), strict=True):
                values = [[row[metric] for row in shown if (row["name"], row["calls"]) == (name, x)] for x in calls]
                spread = [statistics.stdev(some) / math.sqrt(len(some)) if len(some) > 1 else 0.0 for some in values]
                style = "--" if name.endswith("optimized") else "-"
                axes.errorbar(
                    calls,
                    [statistics.mean(some) for some in values],
                    spread,
                    label=name,
                    color=COLORS[samplers_shown.index(name.removesuffix(", optimized")) % len(COLORS)],
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                )
        grid[0, column].set_title(recipe)
        grid[0, column].set_ylabel("Fréchet distance in pixels")
        grid[0, column].set_yscale("log")
        for axis_format in (grid[0, column].yaxis.set_major_formatter, grid[0, column].yaxis.set_minor_formatter):
            axis_format(ScalarFormatter())
        grid[1, column].set_ylabel("recognized")
        for axes in grid[:, column]:
            axes.set_xscale("log")
            axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
            axes.set_xlabel("network calls")
            axes.grid(alpha=0.3)
    max(grid[0], key=lambda axes: len(axes.get_legend_handles_labels()[1])).legend(fontsize=7)
    save_figure(figure, FIGURE)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, nargs="?", help="configuration file of a class-conditional recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("outputs/network_calls"), help="folder of the runs")
    parser.add_argument("--draw", action="store_true", help="draw the figure from the results of all recipes")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write the results."""
    arguments = parse()
    RESULTS.mkdir(exist_ok=True)
    if arguments.recipe is not None:
        recipe, name = arguments.recipe, arguments.recipe.stem
        config = read_config(recipe)
        path = RESULTS / f"network_calls_{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        command = shlex.join(["python", "benchmarks/network_calls.py", *sys.argv[1:]])
        command += f"  ({device_name(torch.device('cpu'))}, torch {torch.__version__})"
        for seed in arguments.seeds:
            folder = arguments.work / f"{name}_{seed}"
            train(recipe, seed, folder)
            data = open_images(config.data, with_labels=True)
            judge = Judge(*data.split(config.data.validation_fraction, seed))
            _CACHE.clear()
            real, labels = judge.pixels(judge.validation)
            print(f"seed {seed}: the classifier recognizes {judge.classifier().score(real, labels):.1%} of validation")
            run = Run(folder, seed, judge, arguments.num_samples)
            for group in arguments.groups:
                new = [row | {"command": command} for row in MEASURE[group](run, arguments.steps)]
                rows = [row for row in rows if (row["group"], row["seed"]) != (group, seed)] + new
                path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        lines = [*dict.fromkeys(row["command"] for row in rows), "", *table(rows)]
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines))
    if arguments.draw:
        files = sorted(RESULTS.glob("network_calls_*.json"))
        draw({path.stem.split("_", 2)[2]: json.loads(path.read_text(encoding="utf-8")) for path in files})
    return 0


if __name__ == "__main__":
    sys.exit(main())
