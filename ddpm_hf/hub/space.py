"""A Space on the Hub that shows the page of `ddpm-hf demo` for a published model."""

from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from ddpm_hf.hub.access import Target, hub_errors

SDK_VERSION = "6.31.0"
"""The version of Gradio that the page was tested with."""
PAGE = Path(__file__).parents[1] / "demo.py"

_APP = """{import_spaces}import torch
from diffusers import DiffusionPipeline

from demo import build

MODEL = {model!r}
REVISION = {revision!r}

pipeline = DiffusionPipeline.from_pretrained(
    MODEL, revision=REVISION, custom_pipeline=MODEL, custom_revision=REVISION, trust_remote_code=True
).to("cuda" if torch.cuda.is_available() else "cpu")

if __name__ == "__main__":
    build(pipeline, MODEL{decorate}).launch()
"""


def space_files(target: Target, *, zero_gpu: bool = False) -> dict[str, bytes]:
    """Return the files of a Space for a model.

    Args:
        target: Where the model was pushed to, with its full repository id.
        zero_gpu: Ask for a GPU during each action, for a Space on ZeroGPU hardware.
    """
    app = _APP.format(
        import_spaces="import spaces  # before torch\n" if zero_gpu else "",
        decorate=", decorate=spaces.GPU" if zero_gpu else "",
        model=target.repo_id,
        revision=target.revision,
    )
    front = {
        "title": target.repo_id.rpartition("/")[2],
        "sdk": "gradio",
        "sdk_version": SDK_VERSION,
        "app_file": "app.py",
        "models": [target.repo_id],
        "tags": ["ddpm", "ddpm_hf"],
    }
    readme = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\nSamples of [{target.repo_id}]({constants.ENDPOINT}/"
    readme += f"{target.repo_id}), a DDPM trained with ddpm_hf.\n"
    requirements = ["accelerate", "diffusers>=0.42", "numpy>=2", "safetensors", "torch>=2.10", *["spaces"] * zero_gpu]
    texts = {
        "app.py": app,
        "demo.py": PAGE.read_text(encoding="utf-8"),
        "README.md": readme,
        "requirements.txt": "\n".join(requirements) + "\n",
    }
    return {name: text.encode() for name, text in texts.items()}


def push_space(space: Target, model: Target, *, zero_gpu: bool = False) -> str:
    """Create or update a Space in one commit, and return its address.

    The hardware of a new Space is CPU Basic; change it in its settings.

    Args:
        space: Repository id of the Space, and whether to create it as private.
        model: Where the model was pushed to, with its full repository id.
        zero_gpu: As in `space_files`.

    Raises:
        HubRefused: The user may not write to the Space.
        HubFailed: The connection or the Hub failed.
    """
    api, name = HfApi(), space.repo_id
    with hub_errors(name, "the model was published, and the Space completely or not at all"):
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        try:
            api.repo_info(name, repo_type="space")
        except RepositoryNotFoundError:
            api.create_repo(name, repo_type="space", space_sdk="gradio", private=space.private or None)
        api.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in space_files(model, zero_gpu=zero_gpu).items()],
            commit_message="Show a model trained by ddpm_hf",
            repo_type="space",
        )
    return f"{constants.ENDPOINT}/spaces/{name}"
