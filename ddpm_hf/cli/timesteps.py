"""`ddpm-hf timesteps`: choose the timesteps of few sampling steps for a trained network."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ddpm_hf.cli.common import find_device, find_folder, load_pipeline, out_of_memory_advice
from ddpm_hf.cli.flags import ModelFlags, Parser, flag, read_flags
from ddpm_hf.config import NATIVE_SCHEDULER, ConfigError, log_warning, scheduler_and_eta
from ddpm_hf.files import format_count


def _numbers_of_steps(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise ArgumentTypeError(f"{text!r} is not a list of numbers of steps, at least 1, separated by commas")
    return numbers


@dataclass(frozen=True, kw_only=True)
class TimestepsFlags(ModelFlags):
    """Timesteps.

    Args:
        steps: Numbers of sampling steps, separated by commas; each gets a list of timesteps.
        scheduler: The sampler: unipc, dpm++, ddim, deis, euler, or the name of a class of diffusers that takes
            timesteps; by default that of `ddpm-hf sample`.
        guidance_scale: Scale of classifier-free guidance that the timesteps are for; 1 is none.
        num_images: Images whose trajectories are measured; as many others compare the lists that are found.
        seed: Seed of the noise.
        batch_size: Images per network call.
        dtype: Precision of the network.
        device: cpu, cuda, cuda:1 or mps; by default a GPU if there is one.
    """

    steps: list[int] = flag(parse=_numbers_of_steps)
    scheduler: str | None = None
    guidance_scale: float = flag(1.0, minimum=0)
    num_images: int = flag(64, minimum=1)
    seed: int = flag(0, minimum=0)
    batch_size: int = flag(32, minimum=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None


def timesteps(arguments: Sequence[str]) -> int:
    """Choose timesteps, save them with the model and print them, and return the exit code."""
    parser = Parser(
        prog="ddpm-hf timesteps",
        description="Choose the timesteps of few sampling steps for a trained network and a deterministic sampler:\n"
        "those whose images are nearest to the images of many steps from the same noise. They are stored with the\n"
        'model, and used by the name timestep_spacing="optimized".',
        epilog="example: ddpm-hf timesteps outputs/digits --steps 5,10",
    )
    flags = read_flags(parser, TimestepsFlags, arguments)
    scheduler, eta = None, None
    if flags.scheduler is not None:
        scheduler, eta = scheduler_and_eta("--scheduler", flags.scheduler, None)
        if eta == 1:
            raise ConfigError(
                f"--scheduler is {flags.scheduler}, which draws noise in each step, but timesteps are chosen for a "
                "deterministic sampler; give ddim, unipc or dpm++."
            )
    with out_of_memory_advice(f"lower --batch_size, which is {flags.batch_size}"):
        _choose(flags, scheduler)
    return 0


def _choose(flags: TimestepsFlags, scheduler: str | None) -> None:
    import torch

    from ddpm_hf.diffusion import GaussianDiffusionScheduler
    from ddpm_hf.diffusion.pipeline import sampler_name
    from ddpm_hf.evaluation.generate import Sampler, default_sampling, scheduler_class
    from ddpm_hf.evaluation.timesteps import EVEN, NUM_CANDIDATES, choose_timesteps, follow_trajectories
    from ddpm_hf.models import save_optimized_timesteps

    device, model = find_device(flags.device), find_folder(flags.folder, flags.revision)
    if model is not None and model.kind == "checkpoint" and model.evaluation is None:
        raise ConfigError(f"{flags.folder} is a checkpoint outside of a run, which would keep the timesteps.")
    pipeline = load_pipeline(
        flags.folder, model, dtype=getattr(torch, flags.dtype), revision=flags.revision, variant=flags.variant
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    if number := config.get("default_num_inference_steps"):
        raise ConfigError(
            f"{flags.folder} is a student distilled for {number} sampling steps, whose timesteps are part of its "
            "training; choose those of its teacher."
        )
    scheduler = scheduler or default_sampling(pipeline)["scheduler"] or NATIVE_SCHEDULER
    target = scheduler_class(scheduler).from_config(config)
    total = int(config["num_train_timesteps"])
    if (most := flags.steps[-1]) > (limit := min(NUM_CANDIDATES, total) // 2):
        raise ConfigError(
            f"--steps has {most}, but timesteps are chosen for at most {limit} steps; more steps differ little from "
            "evenly spaced ones."
        )
    call: dict[str, Any] = {} if flags.guidance_scale == 1 else {"guidance_scale": flags.guidance_scale}
    pipeline.scheduler = target
    pipeline.check_inputs(timesteps=[total - 1], class_labels=Sampler().labels_of(pipeline, range(1)), **call)
    pipeline.scheduler = GaussianDiffusionScheduler.from_config(config)
    sampling = {"batch_size": flags.batch_size, "seed": flags.seed}
    lists = {}
    trajectories = follow_trajectories(pipeline, call, num_images=flags.num_images, **sampling)
    name = sampler_name(target, 0.0)
    for number in flags.steps:
        others = range(flags.num_images, 2 * flags.num_images)
        choice = choose_timesteps(pipeline, target, trajectories, number, call, indices=others, **sampling)
        lists[number] = choice.timesteps
        print(f"{name} in {format_count(number, 'step')}: {choice.timesteps}")
        print(
            f"  root mean square difference to the images of {len(trajectories)} steps: "
            f"{choice.errors[choice.name]:.2%} of the value range; evenly spaced: {choice.errors[EVEN]:.2%}"
        )
    if model is None:
        log_warning(f"{flags.folder} is a Hub repository, to which nothing is added; pass the list as timesteps=[...].")
        return
    file = save_optimized_timesteps(model, name, lists)
    print(f"Saved in {file}; used with --timestep_spacing optimized by ddpm-hf sample and ddpm-hf evaluate.")
