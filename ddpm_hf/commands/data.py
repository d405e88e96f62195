"""`ddpm-hf data`: shows what a run would read."""

from collections.abc import Sequence

from ddpm_hf.config import load_data_config


def data(arguments: Sequence[str]) -> int:
    """Says what a run would read, draws its first samples, and returns the exit code."""
    config, picture = load_data_config(arguments)

    from ddpm_hf.data import DataError, summarize
    from ddpm_hf.plots import image_grid

    summary = summarize(config.data, seed=config.training.seed, num_samples=64)
    print("\n".join(summary.lines))
    image_grid(summary.samples, 8).save(picture)
    print(f"{'picture':<10}the first {len(summary.samples)} samples of a run are in {picture}")
    if summary.problem is not None:
        raise DataError(summary.problem)
    return 0
