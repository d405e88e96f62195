"""Which images a run held out: `ddpm-hf evaluate` of its folder holds out the same unless its flags say otherwise."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from ddpm_hf.commands.evaluate_flags import SPLIT_FLAGS
from ddpm_hf.config import ConfigError, DataConfig, read_config_dict

CONFIGURATION = "training_config.yaml"
# A fraction chosen by a seed holds out the same images only of the same data.
_WHICH_DATA = ("source", "subset", "revision", "split")


def take_split_of_run(options: Namespace, folder: Path | None) -> str | None:
    """Fills in the flags about held-out images that were not given: from the run where it trained on the same data.

    Args:
        options: The flags; changed.
        folder: The pipeline, whose training_config.yaml is read; None for a repository of the Hub.

    Returns:
        A line that says what was taken, or what has to be given where the data are named otherwise; None for neither.

    Raises:
        ConfigError: The file is no configuration of a run.
    """
    path = None if folder is None else folder / CONFIGURATION
    line = _take(options, path) if path is not None and path.is_file() else None
    if options.split_seed is None:
        options.split_seed = 0
    return line


def _take(options: Namespace, path: Path) -> str | None:
    """Fills in what the run says, and returns the line about it."""
    data, seed = _read(path)
    run = {"split_seed": seed} | {f"data_{name}": data[name] for name in SPLIT_FLAGS}
    if any(getattr(options, f"data_{name}") is not None for name in SPLIT_FLAGS):
        run = {"split_seed": seed}  # the two exclude each other, so one that is given stands for both
    if not (options.data_validation_fraction or run.get("data_validation_fraction")):
        del run["split_seed"]  # which chooses a fraction and nothing else
    run = {name: value for name, value in run.items() if value and getattr(options, name) is None}
    if not run:
        return None
    flags = " ".join(f"--{name.replace('data_', 'data.')} {value}" for name, value in run.items())
    if not all(_is_same(name, data[name], options) for name in _WHICH_DATA):
        known = ", ".join(f"data.{name} {data[name]}" for name in _WHICH_DATA if data[name])
        return (
            f"The run was trained on {known}, which may be other images; if they are these, hold out its own: {flags}"
        )
    for name, value in run.items():
        setattr(options, name, value)
    return f"Held out as in training, which {CONFIGURATION} tells: {flags}"


def _is_same(name: str, before: Any, options: Namespace) -> bool:
    """Whether a setting of the run names the data of the flags, a file by whatever path."""
    now = options.data if name == "source" else getattr(options, f"data_{name}")
    if name == "source":
        return bool(before == now or Path(before).expanduser().resolve() == Path(now).expanduser().resolve())
    return bool(before == now)


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the settings of a run's data and its seed; what an older version did not know is the default.

    Raises:
        ConfigError: They are none.
    """
    content = read_config_dict(path)
    data = {name: getattr(DataConfig(), name) for name in (*_WHICH_DATA, *SPLIT_FLAGS)}
    data |= {name: value for name, value in content.get("data", {}).items() if name in data}
    fraction, seed = data.pop("validation_fraction"), content.get("training", {}).get("seed", 0)
    are_names = all(isinstance(value, str | None) for value in data.values())
    if not (are_names and isinstance(data["source"], str) and isinstance(fraction, int | float) and type(seed) is int):
        raise ConfigError(f"{path} is no configuration of a run; restore it, or move it away.")
    return data | {"validation_fraction": fraction}, seed
