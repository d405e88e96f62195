"""Networks of others: reads the configuration or the weights of a UNet2DModel from a folder or the Hub.

A folder is that of a pipeline (model_index.json, unet/, scheduler/), one with the same files side by side, as the
google/ddpm-* repositories are, or that of a UNet2DModel alone (config.json and weights).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.folder import check_shards
from ddpm_hf.redaction import reason_of

logger = logging.getLogger(__name__)

_CONFIG_FILES = ("config.json", "unet/config.json")
_FILES = (
    *_CONFIG_FILES,
    "model_index.json",
    "scheduler_config.json",
    "scheduler/scheduler_config.json",
    "diffusion_pytorch_model*.safetensors*",
    "unet/diffusion_pytorch_model*.safetensors*",
)


@dataclass(frozen=True)
class Pretrained:
    """A network that was trained before, and what its folder says of it.

    Args:
        name: The setting and its value, for messages.
        unet: The network.
        scheduler: The forward process it was trained for; None if the folder does not tell.
        class_names: Names of its classes; None if the folder does not tell.
        has_null_label: Whether its last label means "no class"; None if the folder does not tell.
    """

    name: str
    unet: UNet2DModel
    scheduler: GaussianDiffusionScheduler | None
    class_names: dict[str, str] | None
    has_null_label: bool | None


def read_config_file(model: ModelConfig) -> dict[str, Any]:
    """Reads the configuration of the UNet2DModel that model.config_file names.

    Raises:
        ConfigError: If there is none, or it cannot be read.
    """
    assert model.config_file is not None
    name = f"model.config_file {model.config_file}"
    path = Path(model.config_file).expanduser()
    if not path.is_file():
        path = _unet_folder(_folder(name, model.config_file, model.revision, _CONFIG_FILES), name) / "config.json"
    return _read_unet_config(path, name)


def load_pretrained(model: ModelConfig) -> Pretrained:
    """Loads the network of model.from_pretrained; its weights must be safetensors.

    Raises:
        ConfigError: If the folder or repository has none, or they cannot be read.
    """
    assert model.from_pretrained is not None
    name = f"model.from_pretrained {model.from_pretrained}"
    folder = _folder(name, model.from_pretrained, model.revision, _FILES)
    unet_folder = _unet_folder(folder, name)
    _read_unet_config(unet_folder / "config.json", name)
    if not any(unet_folder.glob("diffusion_pytorch_model*.safetensors*")):
        raise ConfigError(
            f"{name} has no weights in the safetensors format. If you trust it, load it once with "
            "UNet2DModel.from_pretrained(..., use_safetensors=False), save it anew and give that folder."
        )
    try:
        check_shards(unet_folder)
        unet, loaded = UNet2DModel.from_pretrained(unet_folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise many types for files that do not fit together
        raise ConfigError(f"{name} cannot be loaded ({reason_of(error)}).") from error
    if missing := loaded["missing_keys"]:
        raise ConfigError(f"{name} lacks weights of its own network ({', '.join(sorted(missing)[:3])}, ...).")
    index = _read_json(folder / "model_index.json", name) if (folder / "model_index.json").is_file() else None
    return Pretrained(
        name=name,
        unet=unet,
        scheduler=_scheduler(folder, name),
        class_names=index.get("class_names") if index else None,
        has_null_label=bool(index.get("has_null_label")) if index else None,
    )


def take_weights(
    unet: UNet2DModel,
    pretrained: Pretrained,
    scheduler: GaussianDiffusionScheduler,
    class_names: dict[str, str] | None,
    has_null_label: bool,
) -> None:
    """Copies the weights of a pretrained network into the network of a run.

    What the weights cannot serve is refused; what a run may change on purpose is named in a warning.

    Raises:
        ConfigError: If the networks differ in shape, labels or in what they predict.
    """
    _check_channels(unet, pretrained)
    _check_labels(unet, pretrained, has_null_label)
    if pretrained.class_names is not None and class_names is not None and pretrained.class_names != class_names:
        logger.warning("%s was trained on classes of other names; its labels now mean those of the data.",
                       pretrained.name)  # fmt: skip
    theirs, ours = pretrained.unet.config["sample_size"], unet.config["sample_size"]
    if theirs is not None and _pair(theirs) != _pair(ours):
        logger.warning(
            "%s was made for images of %s; it is now trained on %s.", pretrained.name, _size(theirs), _size(ours)
        )
    _check_process(pretrained, scheduler)
    try:
        unet.load_state_dict(pretrained.unet.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"{pretrained.name} has weights of another shape than model.overrides ask for ({reason_of(error)}); leave "
            "out those that change the shape."
        ) from None


def _check_channels(unet: UNet2DModel, pretrained: Pretrained) -> None:
    """Refuses a network for other images or with another output."""
    for setting, what in (("in_channels", "takes"), ("out_channels", "returns")):
        theirs, ours = pretrained.unet.config[setting], unet.config[setting]
        if theirs != ours:
            raise ConfigError(
                f"{pretrained.name} {what} {theirs} channels, but this run needs {ours}; set data.num_channels to what "
                "it was trained on, or choose another network."
            )


def _check_labels(unet: UNet2DModel, pretrained: Pretrained, has_null_label: bool) -> None:
    """Refuses a network that knows another number of labels, or to which the last one means something else."""
    theirs, ours = pretrained.unet.config["num_class_embeds"], unet.config["num_class_embeds"]
    knows = "is unconditional" if theirs is None else f"knows {theirs} labels"
    needs = "none" if ours is None else f"{ours} (the null label included)" if has_null_label else f"{ours}"
    if theirs is not None and pretrained.has_null_label:
        knows += ", the last of them the null label"
    if theirs == ours and (theirs is None or pretrained.has_null_label in (None, has_null_label)):
        return
    if theirs is None:
        fix = "set model.class_conditional to false"
    elif ours is None:
        fix = "set model.class_conditional to true"
    elif pretrained.has_null_label is not None and pretrained.has_null_label != has_null_label:
        fix = f"set objective.class_dropout {'above 0, for example to 0.1' if pretrained.has_null_label else 'to 0'}"
    else:
        fix = "train on data with as many classes"
    raise ConfigError(f"{pretrained.name} {knows}, but this run needs {needs}; {fix}, or choose another network.")


def _check_process(pretrained: Pretrained, scheduler: GaussianDiffusionScheduler) -> None:
    """Refuses another prediction, which would start from nothing; names another schedule, which may be on purpose."""
    if pretrained.scheduler is None:
        logger.warning(
            "%s does not say what its network predicts; it is taken for %s.",
            pretrained.name,
            scheduler.config["prediction_type"],
        )
        return
    theirs, ours = (each.config["prediction_type"] for each in (pretrained.scheduler, scheduler))
    if theirs != ours:
        raise ConfigError(
            f"{pretrained.name} predicts {theirs}, but diffusion.prediction_type is {ours}; set it to {theirs}, or "
            "choose another network."
        )
    before, after = (each.noise_schedule.alphas_cumprod for each in (pretrained.scheduler, scheduler))
    if len(before) != len(after):
        logger.warning(
            "%s was trained with %d timesteps; diffusion.num_train_timesteps is %d.",
            pretrained.name,
            len(before),
            len(after),
        )
    elif not torch.allclose(before, after, rtol=1e-4, atol=1e-6):
        logger.warning(
            "%s was trained with another noise schedule (%s) than diffusion asks for (%s).",
            pretrained.name,
            *(_schedule(each) for each in (pretrained.scheduler, scheduler)),
        )


def _schedule(scheduler: GaussianDiffusionScheduler) -> str:
    """Says in a few words which schedule it is."""
    kind = scheduler.config["beta_schedule"] if scheduler.config["trained_betas"] is None else "betas of its own"
    return f"{kind}, alpha_bar_T {float(scheduler.noise_schedule.alphas_cumprod[-1]):.2e}"


def _scheduler(folder: Path, name: str) -> GaussianDiffusionScheduler | None:
    """Returns the forward process that a folder describes, whichever scheduler of diffusers it names."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            try:
                scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.from_config(_read_json(path, name))
            except Exception as error:  # whatever torch raises for tables of an absurd size
                raise ConfigError(f"{name} has a scheduler that is no DDPM's ({reason_of(error)}).") from error
            return scheduler
    return None


def _folder(name: str, source: str, revision: str | None, files: Sequence[str]) -> Path:
    """Returns a local folder, downloaded from the Hub where it is not one.

    Raises:
        ConfigError: If there is none, here or there.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(f"model.revision {revision} applies to the Hub, but {source} is here; leave it out.")
        if path.is_dir():
            return path
        raise ConfigError(f"{name} is a file; give the folder of a pipeline or of a UNet2DModel.")
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or path.suffix == ".json":
        raise ConfigError(f"{name} does not exist; check the path (here is {Path.cwd()}).")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the Hub's own errors, those of the network, and those of the disk
        raise ConfigError(
            f"{name} is no folder here and cannot be had from the Hub ({reason_of(error)}); check the name, the "
            "network and, for a private repository, that you are logged in."
        ) from error


def _unet_folder(folder: Path, name: str) -> Path:
    """Returns where config.json and weights of the network lie."""
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    hint = f"; did you mean {folder / 'pipeline'}?" if (folder / "pipeline").is_dir() else "."
    raise ConfigError(f"{name} has neither unet/config.json nor config.json of a UNet2DModel{hint}")


def _read_unet_config(path: Path, name: str) -> dict[str, Any]:
    """Reads a config.json that must be that of a UNet2DModel."""
    config = _read_json(path, name)
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ConfigError(f"{name} is a {kind}; give a UNet2DModel.")
    return config


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """Reads a file of JSON that must hold a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {path.name} cannot be read ({reason_of(error)}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: {path.name} holds no settings.")
    return content


def _pair(size: int | Sequence[int]) -> list[int]:
    """Returns height and width."""
    return [size, size] if isinstance(size, int) else list(size)


def _size(size: int | Sequence[int]) -> str:
    """Says a size as height x width."""
    return "x".join(map(str, _pair(size)))
