"""What a card can say of a model: read from the files of the folder that is uploaded, and from nothing else.

Every file but those of the pipeline itself may be missing. Secrets and local paths end here: no string leaves this
module with one.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddpm_hf.hub.card_evaluation import Evaluation, read_evaluation
from ddpm_hf.redaction import redact

INDEX, EVALUATION = "model_index.json", "evaluation.json"
PICTURES = ("samples", "denoising", "loss", "schedule", "evaluation")
DATA_FILES = (".parquet", ".arrow", ".npy", ".npz", ".zip", ".tar", ".tar.gz", ".tgz", ".gz", ".json", ".csv")
# A path that begins at the root of a disk, of the home or of a file URL; only its last part is told.
_ABSOLUTE_PATH = re.compile(r"(?:file:/*|(?<![\w./\\~])(?:~|[A-Za-z]:)?[/\\])(?:[^\s/\\\]]+[/\\])*(?=[^\s/\\])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A folder as its card describes it.

    Args:
        name: What the model is called.
        repo_id: Where it is uploaded to.
        index: model_index.json.
        unet: unet/config.json.
        scheduler: scheduler/scheduler_config.json.
        config: training_config.yaml; empty where there is none.
        summary: training_summary.json; empty where there is none.
        evaluation: evaluation.json, or None.
        files: Names of all files, with / between their parts.
    """

    name: str
    repo_id: str
    index: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluation: Evaluation | None
    files: frozenset[str]

    def setting(self, name: str) -> Any:
        """Returns a setting of the run, "section.name"; None where the configuration does not have it."""
        return _inside(self.config, name)

    def measured(self, name: str) -> Any:
        """Returns what training_summary.json says, "section.name" for what is inside one; None where it is silent."""
        value = _inside(self.summary, name)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return int(self.unet.get("in_channels", 3)) // (2 if self.index.get("self_conditioned") else 1)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of an image; None where the network does not say."""
        side = self.unet.get("sample_size")
        if isinstance(side, int):
            return side, side
        return (int(side[0]), int(side[1])) if isinstance(side, list) and len(side) == 2 else None

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0 for an unconditional model."""
        return int(self.unet.get("num_class_embeds") or 0) - bool(self.index.get("has_null_label"))

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in their order; empty where they have none."""
        names = self.index.get("class_names") or {}
        return [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else []

    @property
    def needs_code(self) -> bool:
        """Whether stock classes refuse the folder, since they would sample wrongly from it."""
        return isinstance(self.index.get("_class_name"), list)

    @property
    def takes_eta(self) -> bool:
        """Whether the scheduler of the loaded pipeline is the native one, or DDIM."""
        return self.scheduler.get("_class_name") in ("DDPMScheduler", "GaussianDiffusionScheduler", "DDIMScheduler")

    @property
    def num_train_timesteps(self) -> int:
        """Length T of the chain."""
        return int(self.scheduler.get("num_train_timesteps", 1000))

    @property
    def variant(self) -> str | None:
        """The variant that must be asked for, since there are no other weights."""
        names = [name for name in self.files if name.startswith("unet/") and name.endswith(".safetensors")]
        variants = [re.fullmatch(r"unet/diffusion_pytorch_model\.(\w+)\.safetensors", name) for name in names]
        return variants[0][1] if len(variants) == 1 and variants[0] else None

    @property
    def data_source(self) -> str | None:
        """What the model was trained on: the id of a Hub data set, or the last part of a path."""
        for known in (self.measured("data.source"), self.evaluation and self.evaluation.data.get("source")):
            if known:
                return public_name(str(known), is_known=True)
        source = self.setting("data.source")
        if not source:
            return None
        # Of all sources only data sets of the Hub have these.
        return public_name(str(source), is_known=bool(self.setting("data.revision") or self.setting("data.subset")))

    @property
    def measured_on(self) -> str | None:
        """The data set of evaluation.json, which may be another one."""
        source = self.evaluation.data.get("source") if self.evaluation else None
        return public_name(str(source), is_known=True) if source else self.data_source

    @property
    def hub_data_set(self) -> str | None:
        """The id of the data set, if it is one of the Hub."""
        source = self.data_source
        return source if source and is_hub_id(source) else None


def is_hub_id(source: str) -> bool:
    """Whether a name is that of a data set on the Hub: an owner, a slash, a name that is not a file's."""
    return bool(_HUB_ID.fullmatch(source)) and not source.lower().endswith(DATA_FILES)


def public_name(source: str, *, is_known: bool) -> str:
    """Returns a source without the folders it lies in.

    Args:
        source: A path, or the id of a data set.
        is_known: Whether an owner and a name with a slash between them are an id, and not a relative path.
    """
    if is_known and is_hub_id(source):
        return source
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1] or "unnamed"


def without_paths(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a content without the folders of this machine in its texts; relative ones stay, as ids look like them."""
    return dict(_edited(content, lambda text: _ABSOLUTE_PATH.sub("", text)))


def read_facts(folder: Path, repo_id: str) -> Facts:
    """Reads a folder.

    Raises:
        ValueError: The folder holds no pipeline, or a file in it is broken.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds no pipeline (it has no {INDEX}); give the folder that training saved.")
    files = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    evaluation = _read(folder, EVALUATION, json.loads) if EVALUATION in files else None
    return Facts(
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        index=_read(folder, INDEX, json.loads),
        unet=_read(folder, "unet/config.json", json.loads),
        scheduler=_read(folder, "scheduler/scheduler_config.json", json.loads),
        config=without_paths(_read(folder, "training_config.yaml", yaml.safe_load)),
        summary=without_paths(_read(folder, "training_summary.json", json.loads)),
        evaluation=None if evaluation is None else read_evaluation(without_paths(evaluation), folder / EVALUATION),
        files=files,
    )


def _read(folder: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Returns the content of a file without secrets; nothing where there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({reason}); write it anew, or take it out of the folder.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no record but {content!r:.40}; write it anew, or take it out of the folder.")
    return dict(_edited(content, redact))


def _edited(value: Any, edit: Callable[[str], str]) -> Any:
    """Returns a value of JSON or YAML with all texts edited, keys included."""
    if isinstance(value, dict):
        return {_edited(key, edit): _edited(entry, edit) for key, entry in value.items()}
    if isinstance(value, list):
        return [_edited(entry, edit) for entry in value]
    return edit(value) if isinstance(value, str) else value


def _inside(content: Mapping[str, Any], name: str) -> Any:
    """Returns the value behind keys with dots between them, or None."""
    value: Any = content
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
