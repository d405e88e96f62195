"""`ddpm-hf ema`: reconstruct an EMA of any length after training."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.cli.flags import Parser
from ddpm_hf.config import ConfigError
from ddpm_hf.model_folder import find_run


def ema(arguments: Sequence[str]) -> int:
    """Write a pipeline with the reconstructed EMA weights, and return the exit code."""
    parser = Parser(
        prog="ddpm-hf ema",
        description="Save a pipeline with an EMA of any length, reconstructed from the EMAs that a run with\n"
        "training.posthoc_ema stored (Karras et al. 2024).",
        epilog="example: ddpm-hf ema outputs/mnist --length 0.08",
    )
    parser.add_argument("folder", type=Path, help="folder of the run, finished or not, or a folder in it")
    parser.add_argument(
        "--length",
        type=float,
        required=True,
        help="length of the EMA relative to the training: 0.05 is short, 0.10 usual, 0.25 very long",
    )
    parser.add_argument("--step", type=int, help="training step of stored EMAs; by default the last")
    parser.add_argument("--output", type=Path, help="new folder; by default pipeline_ema_LENGTH in the run folder")
    options = parser.parse_args(arguments)

    folder, length, step = options.folder.expanduser(), options.length, options.step
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give that of a run with training.posthoc_ema.")

    from ddpm_hf.training.posthoc_ema import reconstruct

    folder, output = find_run(folder) or folder, options.output and options.output.expanduser()
    if output is None:
        output = folder / f"pipeline_ema_{length:.3f}{'' if step is None else f'_step_{step:08d}'}"
    result = reconstruct(folder, length, step, output)
    print(
        f"{output}: EMA of length {length:g} at step {result.step}, reconstructed from {result.num_stored} stored EMAs "
        f"(error of the profile {result.relative_error:.2%})."
    )
    return 0
