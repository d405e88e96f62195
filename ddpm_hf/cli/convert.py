"""`ddpm-hf convert`: make a pipeline folder of a checkpoint of another system, and back."""

import csv
import inspect
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm_hf.cli.flags import Parser, flag, read_flags
from ddpm_hf.config import ConfigError, log_warning
from ddpm_hf.convert.options import ConversionOptions
from ddpm_hf.files import (
    CONVERSION,
    MODEL_CONFIG,
    MODEL_INDEX,
    README,
    SCHEDULER_CONFIG,
    TRAINER_STATE,
    TRAINING_CONFIG,
    TRAINING_SUMMARY,
    UNET_CONFIG,
    atomic_write,
    read_json,
    replace_folder,
    sha256_of_file,
    write_json,
    write_text,
)
from ddpm_hf.redaction import find_secret

if TYPE_CHECKING:
    from ddpm_hf.convert.conversion import Conversion
    from ddpm_hf.diffusion import GaussianDiffusionPipeline

_EXAMPLES = """examples:
  ddpm-hf convert 256x256_diffusion_uncond.pt outputs/imagenet_256 --license mit
  ddpm-hf convert ema_0.9999_200000.pt outputs/faces --image_size 64 --num_heads 4
  ddpm-hf convert ema_0.9999_100000.pt outputs/pets --image_size 64,96 --num_heads 4 --class_names cat,dog
  ddpm-hf convert sd-outputs/checkpoint-5000 outputs/butterflies
  ddpm-hf convert model-100.pt recipe.yaml --recipe_only
  ddpm-hf convert outputs/imagenet_256 weights.pt --to guided_diffusion

Checkpoints are read as tensors without code. docs/convert.md lists the systems, and what to give for each."""
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Values of the EMA that diffusers' EMAModel writes into the configuration of a network.
_EMA_KEYS = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip
_MIN_CORRELATION = 0.5


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What is read and written.

    Args:
        checkpoint: Checkpoint file of another system, folder of diffusers' train_unconditional.py or of one of its
            checkpoints, or folder of a run or a checkpoint of ddpm_hf.
        output: New folder of the pipeline; with --recipe_only a YAML file, with --to a .pt or .safetensors file.
        recipe_only: Write the configuration that trains the same recipe, and no pipeline; also for lucidrains.
        to: Write the network of a pipeline folder as a state dict of another system.
        class_names: Names of the classes in the order of their numbers, separated by commas; or a text file with one
            name per line, or a JSON file with a list of names, or with a name for each number.
        source: Where the checkpoint is from, for the model card, such as a URL.
        license: License identifier of the weights for the model card, such as mit.
    """

    checkpoint: Path = flag(is_positional=True)
    output: Path = flag(is_positional=True)
    recipe_only: bool = False
    to: (
        Literal["pesser", "ddpm_torch", "improved_diffusion", "guided_diffusion", "abarankab", "pytorch_ddpm"] | None
    ) = None
    class_names: str | None = None
    source: str | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertFlags(OutputFlags, ConversionOptions):
    """Flags of `ddpm-hf convert`."""

    def options(self) -> ConversionOptions:
        """Return the settings of the network."""
        return ConversionOptions(**{name: getattr(self, name) for name in ConversionOptions.__dataclass_fields__})


def convert(arguments: Sequence[str]) -> int:
    """Convert a checkpoint, print what was found, and return the exit code."""
    parser = Parser(
        prog="ddpm-hf convert",
        description="Make a pipeline folder, which diffusers loads, of a checkpoint of another system.",
        epilog=_EXAMPLES,
    )
    flags = read_flags(parser, ConvertFlags, arguments)
    source, output = flags.checkpoint.expanduser(), flags.output.expanduser()
    _check(flags, source, output)

    from diffusers.utils import logging

    logging.disable_progress_bar()
    if flags.to is not None:
        return _convert_back(source, output, flags.to)
    if flags.recipe_only:
        return _write_recipe(source, output, flags.options())
    if source.is_dir():
        _convert_folder(source, output, flags)
    else:
        _convert_file(source, output, flags)
    print(f"{output}: a pipeline; ddpm-hf sample {output} --num_images 4 samples from it.")
    if flags.license is None:
        print(f"{README} states no license; give that of the weights, for example --license mit.")
    return 0


def _check(flags: ConvertFlags, source: Path, output: Path) -> None:
    """Refuse contradictions, a source that does not exist, and an output that does, before torch is imported."""
    if not source.exists():
        raise ConfigError(f"{source} does not exist; give a checkpoint file or a folder.")
    if flags.to is not None and flags.recipe_only:
        raise ConfigError("--to writes weights and --recipe_only none; remove one of them.")
    if flags.to is not None or flags.recipe_only:
        other = f"--to {flags.to}" if flags.to is not None else "--recipe_only"
        described = ("class_names", "source", "license")
        if unused := next((name for name in described if getattr(flags, name) is not None), None):
            log_warning(f"--{unused} has no effect with {other}.")
        suffixes = (".pt", ".pth", ".ckpt", ".safetensors") if flags.to is not None else (".yaml", ".yml")
        if output.suffix not in suffixes:
            raise ConfigError(f"{output} must end in {', '.join(suffixes)} with {other}.")
        if not output.parent.is_dir():
            raise ConfigError(f"{output.parent} is not a folder; create it first.")
    elif output.suffix in (".pt", ".pth", ".safetensors", ".yaml"):
        raise ConfigError(
            f"{output} is the name of a file, but a pipeline is a folder; give --to or --recipe_only, or another name."
        )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} exists; give a new name, or remove it.")
    if flags.to is not None:
        options = flags.options()
        if given := sorted(
            {*options.given(), *(name for name in ("family", "ema") if getattr(options, name) is not None)}
        ):
            raise ConfigError(f"--{given[0]} is of the conversion from another system, not --to {flags.to}; remove it.")
    if flags.source is not None and (secret := find_secret(flags.source)):
        raise ConfigError(f"--source contains {secret}, and would be published in the model card; leave it out.")
    if flags.license is not None and flags.to is None and not flags.recipe_only:
        from ddpm_hf.hub.access import Target

        Target(repo_id="unused", license=flags.license)


def _convert_file(path: Path, output: Path, flags: ConvertFlags) -> None:
    """Convert a checkpoint file of another system."""
    if path.name in _WEIGHTS and (path.parent / MODEL_CONFIG).is_file():
        return _convert_folder(path.parent, output, flags)

    from ddpm_hf.convert.checkpoint import read_checkpoint
    from ddpm_hf.convert.conversion import convert as convert_network
    from ddpm_hf.diffusion import GaussianDiffusionPipeline

    conversion = convert_network(read_checkpoint(path), flags.options())
    for line in _describe(path, conversion):
        print(line)
    pipeline = GaussianDiffusionPipeline(conversion.unet, conversion.scheduler)
    _name_classes(pipeline, flags.class_names, path)
    _check_prediction(pipeline)
    record = conversion.record() | {"file": path.name, "sha256": sha256_of_file(path)}
    _save(pipeline, output, record, flags)
    return None


def _describe(path: Path, conversion: "Conversion") -> list[str]:
    """Return what was found, and what was assumed."""
    family, settings = conversion.family, conversion.settings
    count = sum(parameter.numel() for parameter in conversion.unet.parameters())
    place = f", {conversion.place}" if conversion.place else ""
    lines = [f"{path}: a network of {family.title} ({family.name}){place}, {count:,} parameters."]
    if conversion.assumed:
        values = ((name, settings[name]) for name in conversion.assumed)
        listed = ", ".join(f"{name} {str(one).lower() if isinstance(one, bool) else one}" for name, one in values)
        published = conversion.published
        origin = f"the published network with these layers ({published.name})" if published else "its training script"
        lines.append(f"By {origin}: {listed}. Give a flag where your training differed.")
    folder = path.parent
    if (match := re.fullmatch(r"model(\d+)\.pt", path.name)) and (found := sorted(folder.glob(f"ema_*_{match[1]}.pt"))):
        lines.append(f"{found[0]} holds the EMA weights of the same step, which sample better; convert it instead.")
    return lines


def _name_classes(pipeline: "GaussianDiffusionPipeline", given: str | None, source: Path) -> None:
    """Give a pipeline the names of --class_names, if there are any."""
    if given is None:
        return
    if (count := pipeline.num_classes) == 0:
        raise ConfigError(f"--class_names is given, but {source} is an unconditional network; remove it.")
    if pipeline.config.get("class_names"):
        raise ConfigError(f"--class_names is given, but {source} has names of its classes; remove it.")
    names = _read_names(given)
    if len(names) != count or not all(names):
        raise ConfigError(f"--class_names has {sum(map(bool, names))} names, but {source} has {count} classes.")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        first, second = [number for number, name in enumerate(names) if name == repeated][:2]
        raise ConfigError(
            f"--class_names calls classes {first} and {second} {repeated!r}; give each class a name of its own."
        )
    pipeline.register_to_config(class_names={str(number): name for number, name in enumerate(names)})


def _read_names(given: str) -> list[str]:
    """Return the names in a list or a file; an empty name for a number without one."""
    path = Path(given).expanduser()
    if not path.is_file():
        if path.suffix in (".txt", ".json"):
            raise ConfigError(f"--class_names is {given}, which does not exist; give a file, or names.")
        return [name.strip() for name in next(csv.reader([given], skipinitialspace=True), [])]
    if path.suffix != ".json":
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--class_names is {given}, which is not JSON ({error}).") from None
    if isinstance(content, dict):
        content = [content.get(str(number), "") for number in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f'--class_names is {given}, which is neither ["cat", ...] nor {{"0": "cat", ...}}.')
    return [name.strip() for name in content]


def _check_prediction(pipeline: "GaussianDiffusionPipeline") -> None:
    """Warn if the network does not return the noise at the last timestep, where x_T is noise, or does so by mistake."""
    import torch

    from ddpm_hf.diffusion.images import image_size
    from ddpm_hf.rng import torch_generator

    unet, last = pipeline.unet, len(pipeline.scheduler) - 1
    if float(pipeline.scheduler.alphas_cumprod[last]) > 0.05:
        return
    size = [min(side, 64) for side in image_size(unet)]
    noise = torch.randn(1, pipeline.sample_channels, *size, generator=torch_generator("cpu", 0, "conversion"))
    labels = torch.zeros(1, dtype=torch.int64) if pipeline.num_classes else None
    with torch.no_grad():
        output = unet(noise, torch.tensor([last]), labels).sample[:, : pipeline.sample_channels]
    correlation = float(torch.corrcoef(torch.stack([noise.flatten(), output.flatten()]))[0, 1].nan_to_num())
    prediction_type = pipeline.scheduler.config.prediction_type
    returns_noise = correlation > _MIN_CORRELATION
    if prediction_type == "epsilon" and not returns_noise:
        log_warning(
            f"Given noise at the last timestep, the network returns something else (correlation {correlation:.2f}), "
            "unlike a trained epsilon network. If it is trained, check --prediction_type, --num_heads or "
            "--num_head_channels, --attention_order and --rescale_timesteps."
        )
    if prediction_type != "epsilon" and returns_noise:
        log_warning(
            f"Given noise at the last timestep, the network returns the noise (correlation {correlation:.2f}), as "
            f"an epsilon network does; check --prediction_type {prediction_type}."
        )


def _convert_folder(folder: Path, output: Path, flags: ConvertFlags) -> None:
    """Convert a folder of diffusers or ddpm_hf."""
    from ddpm_hf.model_folder import find_model, locate
    from ddpm_hf.models import load_model

    given = set(flags.options().given())
    if flags.family is not None:
        raise ConfigError(f"--family is for checkpoint files, but {folder} is a folder of diffusers; remove it.")
    if (network := _network_folder(folder, flags)) is not None:
        allowed = {
            "image_size", "num_train_timesteps", "schedule", "beta_start", "beta_end", "prediction_type",
            "variance_type",
        }  # fmt: skip
        if extra := sorted(given - allowed):
            raise ConfigError(f"--{extra[0]} is told by {network / MODEL_CONFIG}; remove it.")
        pipeline = _load_network(network, flags)
        _name_classes(pipeline, flags.class_names, folder)
        _check_prediction(pipeline)
        weights = next(network / name for name in _WEIGHTS if (network / name).is_file())
        record = {
            "family": "diffusers", "repository": "diffusers", "file": f"{network.name}/{weights.name}",
            "sha256": sha256_of_file(weights), "is_ema": True if "ema" in network.name else None,
        }  # fmt: skip
        return _save(pipeline, output, record, flags)
    if given or flags.ema is not None:
        name = min(given) if given else "ema"
        raise ConfigError(f"--{name} is told by the configuration in {folder}; remove it.")
    locate(folder)
    model = find_model(folder)

    from functools import partial

    import torch

    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.hub.push import write_records

    pipeline = load_model(model, partial(GaussianDiffusionPipeline.from_pretrained, dtype=torch.float32))
    _name_classes(pipeline, flags.class_names, folder)

    def write_more(path: Path) -> None:
        if model.kind == "checkpoint":
            write_records(model, path)
        for name in (TRAINING_CONFIG, TRAINING_SUMMARY, CONVERSION):
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, path / name)

    return _save(pipeline, output, None, flags, write_more)


def _network_folder(folder: Path, flags: ConvertFlags) -> Path | None:
    """Return the network in a folder of train_unconditional.py or of a UNet2DModel; None for a folder of ddpm_hf."""
    checkpoints = [one for one in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(one.name) and one.is_dir()]
    if checkpoints and not (folder / UNET_CONFIG).is_file():
        folder = max(checkpoints, key=lambda one: int(one.name.rpartition("-")[2]))
    if (folder.parent / TRAINER_STATE).is_file() or (folder.name == "unet" and (folder.parent / MODEL_INDEX).is_file()):
        return None  # what is beside it tells more
    if (folder / MODEL_CONFIG).is_file() and any((folder / name).is_file() for name in _WEIGHTS):
        return folder  # also of an early repository, which has all files side by side
    networks = [name for name in ("unet_ema", "unet") if (folder / name / MODEL_CONFIG).is_file()]
    has_pickle_only = (folder / "unet" / _WEIGHTS[1]).is_file() and not (folder / "unet" / _WEIGHTS[0]).is_file()
    if not (_CHECKPOINT.fullmatch(folder.name) or "unet_ema" in networks or has_pickle_only) or not networks:
        return None
    if flags.ema == "none":
        networks = [name for name in networks if name != "unet_ema"]
    elif flags.ema is not None:
        networks = [name for name in networks if name == flags.ema]
    if not networks:
        raise ConfigError(f"--ema is {flags.ema!r}, but {folder} has no such network; give unet_ema, or none.")
    return folder / networks[0]


def _load_network(folder: Path, flags: ConvertFlags) -> "GaussianDiffusionPipeline":
    """Load a UNet2DModel of diffusers, and the process that is beside it or given."""
    from diffusers import UNet2DModel

    from ddpm_hf.convert.checkpoint import read_checkpoint
    from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
    from ddpm_hf.redaction import reason_of

    config = {name: value for name, value in read_json(folder / MODEL_CONFIG).items() if name not in _EMA_KEYS}
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ConfigError(f"{folder} is a {kind}; give a UNet2DModel.")
    if flags.image_size is not None:
        config["sample_size"] = flags.image_size
    elif config.get("sample_size") is None:
        raise ConfigError(f"{folder / MODEL_CONFIG} has no sample_size; add --image_size N.")
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ConfigError(f"{folder} holds no {' or '.join(_WEIGHTS)}; restore it.")
    state = read_checkpoint(weights).content
    try:
        unet = UNet2DModel.from_config({name: one for name, one in config.items() if name != "_name_or_path"})
        # Weights of diffusers 0.18 and earlier have other names for attention, which loading replaces.
        unet._fix_state_dict_keys_on_load(state)
        unet.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except Exception as error:  # diffusers and torch raise many types for files that do not fit together
        raise ConfigError(f"{folder} cannot be loaded: {reason_of(error)}.") from None
    process = dict(flags.options().given())
    process.pop("image_size", None)
    if "schedule" in process:
        process["beta_schedule"] = process.pop("schedule")
    places = [one / "scheduler" / SCHEDULER_CONFIG for one in (folder, folder.parent, folder.parent.parent)]
    found = next((one for one in (folder / SCHEDULER_CONFIG, *places) if one.is_file()), None)
    if found is not None:
        if process:
            raise ConfigError(f"--{min(process)} is told by {found}; remove it.")
        known = inspect.signature(GaussianDiffusionScheduler.__init__).parameters
        stored = {name: value for name, value in read_json(found).items() if name in known}
        scheduler = GaussianDiffusionScheduler.from_config(stored)
        print(f"{folder}: a network of diffusers with the process of {found}.")
    else:
        if unet.config["out_channels"] == 2 * unet.config["in_channels"]:
            process.setdefault("variance_type", "learned_range")
        scheduler = GaussianDiffusionScheduler.create(**process)
        told = scheduler.config
        print(
            f"{folder}: a network of diffusers without a process. By train_unconditional.py: num_train_timesteps "
            f"{told.num_train_timesteps}, schedule {told.beta_schedule}, prediction_type {told.prediction_type}. Give "
            "a flag where your training differed."
        )
    return GaussianDiffusionPipeline(unet.eval(), scheduler)


def _save(
    pipeline: "GaussianDiffusionPipeline",
    output: Path,
    record: dict[str, Any] | None,
    flags: ConvertFlags,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder of a pipeline with its records and its card, completely or not at all."""
    from ddpm_hf.evaluation.verify import write_verification
    from ddpm_hf.hub.card import make_card

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        if record is not None:
            write_json(folder / CONVERSION, {"source": flags.source, "license": flags.license} | record)
        if write_more is not None:
            write_more(folder)
        write_verification(folder)
        write_text(folder / README, make_card(folder, repo_id=output.name, license=flags.license).text)

    if output.is_dir():
        output.rmdir()  # an empty folder
    replace_folder(output, write)


def _write_recipe(source: Path, output: Path, options: ConversionOptions) -> int:
    """Write the configuration of a checkpoint."""
    if source.is_dir():
        raise ConfigError(f"--recipe_only needs a checkpoint file, but {source} is a folder; a run has a config.yaml.")

    from ddpm_hf.convert.checkpoint import read_checkpoint
    from ddpm_hf.convert.recipe import recipe

    write_text(output, recipe(read_checkpoint(source), options))
    print(f"{output}: a configuration; ddpm-hf train --config {output} --data.source IMAGES trains it.")
    return 0


def _convert_back(folder: Path, output: Path, name: str) -> int:
    """Write the network of a pipeline as a state dict of another system."""
    if not folder.is_dir():
        raise ConfigError(f"--to {name} needs the folder of a pipeline, but {folder} is a file; give a folder.")

    import torch
    from safetensors.torch import save_file

    from ddpm_hf.convert.conversion import convert_back
    from ddpm_hf.convert.families import FAMILIES
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.model_folder import find_model
    from ddpm_hf.models import load_model

    model = find_model(folder)
    pipeline = load_model(model, lambda path: GaussianDiffusionPipeline.from_pretrained(path, dtype=torch.float32))
    record = read_json(model.path / CONVERSION) if (model.path / CONVERSION).is_file() else {}
    state = convert_back(pipeline.unet, FAMILIES[name], record, str(folder))
    save = save_file if output.suffix == ".safetensors" else torch.save
    atomic_write(output, lambda path: save(state, path))
    print(f"{output}: a state dict of {FAMILIES[name].title}, {len(state)} tensors.")
    return 0
