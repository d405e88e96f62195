"""Push a trained pipeline to the Hugging Face Hub in one commit, as the user of `hf auth login` or HF_TOKEN.

A new folder is assembled from a fixed list of files: weights, configurations and code are written from the loaded
pipeline, records and pictures are copied by name. Large files are uploaded first and are not visible before the commit
names them, so an interrupted push publishes nothing.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from safetensors import safe_open

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.generate import Sampler, default_sampling, sample_images, sample_trajectory
from ddpm_hf.evaluation.verify import verify_contents, write_verification
from ddpm_hf.files import (
    CONVERSION,
    DENOISING_ANIMATION,
    DENOISING_STRIP,
    EVALUATION,
    EVALUATION_PICTURE,
    LOSS_PICTURE,
    README,
    RECOGNITION,
    RUN_CONFIG,
    SAMPLES_PICTURE,
    TRAINING_CONFIG,
    TRAINING_SUMMARY,
    VERIFICATION,
    write_json,
)
from ddpm_hf.hub import card
from ddpm_hf.hub.access import HubFailed as HubFailed  # part of this interface
from ddpm_hf.hub.access import HubRefused as HubRefused
from ddpm_hf.hub.access import Target as Target
from ddpm_hf.hub.access import check_access, hub_errors
from ddpm_hf.model_folder import ModelFolder, find_model, rows_until, summary_of
from ddpm_hf.models import pipeline_folder
from ddpm_hf.plots import as_drawn, points, schedule_plot, training_curves
from ddpm_hf.redaction import reason_of
from ddpm_hf.run_report import draw_samples

MESSAGE = "Push a pipeline trained by ddpm_hf"
PREFIX = "ddpm-hf-push-"  # of temporary folders
PICTURES_DIR = "samples"
EVAL_RESULTS_DIR = ".eval_results"
SCHEDULE_PICTURE = "schedule.png"
NUM_SAMPLES, BATCH_SIZE = 16, 8
MAX_CLASSES, NUM_SAMPLES_PER_CLASS = 10, 4

# Files of an earlier push that are removed if this push does not have them. All other files of a repository stay.
_OURS = (
    "unet/diffusion_pytorch_model*", "vae/config.json", "vae/diffusion_pytorch_model*",
    "scheduler/reverse_variance.json", "training_config.yaml", "training_summary.json",
    "evaluation.json", "recognition.json", "conversion.json", "samples/samples.png", "samples/denoising.*",
    "samples/loss.png", "samples/evaluation.png", ".eval_results/ddpm_hf_*.yaml",
)  # fmt: skip
# Code of version 0.1 that is removed if all of it is there; a single file of such a name may belong to the user.
_CODE_0_1 = {
    "denoising.py", "folder.py", "forward_process.py", "noise_schedule.py", "reverse_variance.py", "sampling.py",
    "timesteps.py",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Result of a push.

    Args:
        repo_id: Full id of the repository; after a dry run as it was given.
        url: Page of the repository, branch or pull request; None after a dry run.
        is_new: Whether a commit was made; False if the repository was up to date.
        sizes: Bytes of each published file by its path.
        notes: Sentences about the card.
    """

    repo_id: str
    url: str | None
    is_new: bool
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def push(
    folder: str | Path,
    target: Target,
    *,
    fp16: bool = False,
    with_real_images: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    workspace: Path | None = None,
) -> Pushed:
    """Publish the pipeline of a run with a model card, in one commit.

    Args:
        folder: A saved pipeline, a checkpoint or a run. A run that is not finished stands for the EMA of its newest
            valid checkpoint; the card states its step.
        target: Where to push.
        fp16: Add half-precision weights.
        with_real_images: Also publish evaluation.png, which shows training images.
        message: First line of the commit message; None writes one.
        dry_run: Assemble everything, send no request, and push nothing.
        workspace: Folder for temporary files; None uses that of the system.

    Returns:
        The address and the files.

    Raises:
        ValueError: The pipeline cannot be published; HubRefused if the user may not push.
        OSError: HubFailed if the Hub cannot be reached.
    """
    model = find_model(folder)
    repo_id = target.repo_id if dry_run else check_access(target)
    with ExitStack() as stack:
        pipeline_dir = stack.enter_context(pipeline_folder(model))
        if model.kind == "checkpoint":
            write_records(model, pipeline_dir)
        card.Facts(pipeline_dir, repo_id)  # broken records are refused before any work
        assembled = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=workspace))) / "repository"
        run = pipeline_dir if model.kind == "checkpoint" else model.run
        assemble(pipeline_dir, assembled, run=run, fp16=fp16, with_real_images=with_real_images)
        remote = Remote(repo_id) if dry_run else look_up(target, repo_id)
        written = card.make_card(assembled, repo_id=repo_id, license=target.license, existing=remote.card)
        (assembled / README).write_text(written.text, encoding="utf-8", newline="")
        for name, text in card.eval_results(assembled, repo_id).items():
            (assembled / EVAL_RESULTS_DIR).mkdir(exist_ok=True)
            (assembled / EVAL_RESULTS_DIR / name).write_text(text, encoding="utf-8")
        sizes = {name: path.stat().st_size for name, path in _files(assembled).items()}
        if dry_run:
            return Pushed(repo_id=repo_id, url=None, is_new=False, sizes=sizes)
        step = "" if model.step is None or model.is_finished else f": {model.progress}"
        url, is_new = upload(assembled, target, remote, message or MESSAGE + step)
    return Pushed(repo_id=repo_id, url=url, is_new=is_new, sizes=sizes, notes=written.notes)


# What is published


def write_records(model: ModelFolder, folder: Path) -> None:
    """Write the records of a checkpoint that a finished run would have saved with its pipeline."""
    with safe_open(model.weights / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        num_parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    write_json(folder / TRAINING_SUMMARY, summary_of(model, num_parameters))
    shutil.copyfile(model.path / RUN_CONFIG, folder / TRAINING_CONFIG)
    if points(rows := rows_until(model), "loss")[1].size:
        training_curves({"": rows}, folder / LOSS_PICTURE)
    for name in (EVALUATION, EVALUATION_PICTURE):
        if model.evaluation is not None and (model.evaluation / name).is_file():
            shutil.copyfile(model.evaluation / name, folder / name)


def assemble(
    pipeline_dir: Path, target: Path, *, run: Path | None = None, fp16: bool = False, with_real_images: bool = False
) -> None:
    """Write everything that is published, except the card, into a new folder.

    Args:
        pipeline_dir: A saved pipeline.
        target: The new folder.
        run: Folder with the report of the run; without one, samples are drawn.
        fp16: Add half-precision weights.
        with_real_images: Copy evaluation.png, which shows training images.

    Raises:
        ValueError: The pipeline does not load, differs from its verification.json, or has weights that are not finite.
    """
    run = run or pipeline_dir
    try:
        pipeline = GaussianDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{pipeline_dir} holds no pipeline that loads: {reason_of(error)}.") from error
    if (pipeline_dir / VERIFICATION).is_file():
        for finding in verify_contents(pipeline_dir, pipeline):
            if finding.is_bad:
                raise ValueError(
                    f"{pipeline_dir} is not the pipeline that was saved ({finding.way}: {finding.problem}); restore "
                    f"it, or accept it with ddpm-hf verify {pipeline_dir} --write."
                )
    _check_finite(pipeline, pipeline_dir, "float32")
    pipeline.save_pretrained(target)
    write_verification(target)

    pictures = target / PICTURES_DIR
    pictures.mkdir()
    scheduler = GaussianDiffusionScheduler.from_config(pipeline.scheduler.config)
    schedule_plot({"": scheduler.noise_schedule.alphas_cumprod.double().numpy()}, pictures / SCHEDULE_PICTURE)
    _copy_picture(run / LOSS_PICTURE, pictures)
    has_denoising = all((run / name).is_file() for name in (DENOISING_STRIP, DENOISING_ANIMATION))
    if not _copy_picture(run / SAMPLES_PICTURE, pictures):
        _draw_samples(pipeline, pictures)
    elif has_denoising:
        for name in (DENOISING_STRIP, DENOISING_ANIMATION):
            _copy_picture(run / name, pictures)
    if with_real_images and not _copy_picture(pipeline_dir / EVALUATION_PICTURE, pictures):
        raise ValueError(
            f"{pipeline_dir} has no {EVALUATION_PICTURE}, which shows real images; run ddpm-hf evaluate, or remove "
            "with_real_images."
        )

    step = card.read_record(pipeline_dir / TRAINING_SUMMARY).get("step")
    records = (*(pipeline_dir / name for name in (TRAINING_SUMMARY, EVALUATION, CONVERSION)), run / RECOGNITION)
    for path in records:
        if path.is_file() and not path.is_symlink():
            content = card.read_record(path)
            if content.get("step", step) != step:  # measured before training continued
                continue
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (target / path.name).write_text(text, encoding="utf-8")
    if settings := card.public_settings(pipeline_dir):
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (target / TRAINING_CONFIG).write_text(text, encoding="utf-8")

    if fp16:
        pipeline.to(dtype=torch.float16)
        _check_finite(pipeline, pipeline_dir, "float16")
        pipeline.save_pretrained(target, variant="fp16")


def _files(folder: Path) -> dict[str, Path]:
    """Return all files of a folder by their paths in the repository."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _check_finite(pipeline: GaussianDiffusionPipeline, folder: Path, dtype: str) -> None:
    """Refuse weights that are not finite; half precision turns large weights into infinity."""
    modules = [pipeline.unet] if pipeline.vae is None else [pipeline.unet, pipeline.vae]
    for name, parameter in chain.from_iterable(module.named_parameters() for module in modules):
        if not bool(torch.isfinite(parameter).all()):
            advice = "remove fp16" if dtype == "float16" else "use an earlier checkpoint"
            raise ValueError(f"{folder} has weights that are not finite in {dtype} ({name}); {advice}.")


def _draw_samples(pipeline: GaussianDiffusionPipeline, folder: Path) -> None:
    """Draw samples and the denoising process of a pipeline without a report."""
    num_classes = min(pipeline.num_classes, MAX_CLASSES)
    count = num_classes * NUM_SAMPLES_PER_CLASS or NUM_SAMPLES
    sampler = Sampler(**default_sampling(pipeline), labels=tuple(range(num_classes)) or None)
    prepared = sampler.prepare(pipeline)
    samples = sample_images(prepared, sampler, seed=0, indices=range(count), batch_size=BATCH_SIZE)
    trajectory = sample_trajectory(prepared, sampler, seed=0, num_images=count, batch_size=BATCH_SIZE)
    names = pipeline.config.get("class_names")
    draw_samples(
        folder,
        as_drawn(samples, pipeline.config.get("value_range")),
        np.arange(count) % num_classes if num_classes else None,
        [names[str(label)] for label in range(pipeline.num_classes)] if names else None,
        as_drawn(trajectory, pipeline.config.get("value_range")),
    )


def _copy_picture(path: Path, folder: Path) -> bool:
    """Copy a PNG or GIF and return whether there was one; symbolic links are not followed."""
    if not path.is_file() or path.is_symlink():
        return False
    try:
        with Image.open(path, formats=["PNG", "GIF"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a valid PNG or GIF ({reason_of(error)}); remove it and push again.") from error
    shutil.copyfile(path, folder / path.name)
    return True


# Upload


@dataclass(frozen=True)
class Remote:
    """A repository before a push.

    Args:
        repo_id: Full id.
        commit: Parent of the new commit; None if the repository does not exist.
        card: Content of README.md, or None.
        has_branch: Whether the branch exists; otherwise it starts at `commit`.
    """

    repo_id: str
    commit: str | None = None
    card: str | None = None
    has_branch: bool = True


def look_up(target: Target, repo_id: str) -> Remote:
    """Read the latest commit and the card of a repository.

    Args:
        target: Where to push.
        repo_id: Result of `check_access`.

    Raises:
        HubRefused: The user may not read it.
        HubFailed: The Hub cannot be reached.
    """
    api, has_branch = HfApi(), True
    is_default = target.revision == constants.DEFAULT_REVISION
    with hub_errors(repo_id):
        try:
            commit = api.repo_info(repo_id, revision=target.revision).sha
        except RepositoryNotFoundError:
            return Remote(repo_id, has_branch=is_default)  # the default branch is created with the repository
        except RevisionNotFoundError:
            commit, has_branch = api.repo_info(repo_id).sha, False
        try:
            path = Path(api.hf_hub_download(repo_id, README, revision=commit))
            text = path.read_bytes().decode("utf-8", "replace")
        except EntryNotFoundError:
            text = None
    return Remote(repo_id, commit, text, has_branch)


def upload(folder: Path, target: Target, remote: Remote, message: str) -> tuple[str, bool]:
    """Make a folder the content of a repository, in one commit on top of `remote`.

    A missing repository or branch is created first. One that was created or changed after `look_up` is not
    modified.

    Args:
        folder: Everything that is published.
        target: Where to push.
        remote: Result of `look_up`.
        message: First line of the commit message.

    Returns:
        The address, and whether a commit was made.

    Raises:
        HubRefused: The user may not push, or the repository has changed.
        HubFailed: The connection or the Hub failed.
    """
    # The answer can be lost after the commit was made.
    with hub_errors(remote.repo_id, "the commit was made completely or not at all"):
        api, parent = HfApi(), remote.commit
        if parent is None:
            api.create_repo(remote.repo_id, private=target.private or None)
            parent = api.repo_info(remote.repo_id).sha
        if not remote.has_branch:
            api.create_branch(remote.repo_id, branch=target.revision, revision=parent)
        existing = api.list_repo_files(remote.repo_id, revision=parent)
        # upload_folder may split the files into several commits, and keep some of them when another one fails.
        commit = api.create_commit(
            remote.repo_id,
            _operations(folder, existing),
            commit_message=message,
            revision=target.revision,
            create_pr=target.as_pull_request,
            parent_commit=None if target.as_pull_request else parent,
        )
    if commit.pr_url:
        return commit.pr_url, True
    home = f"{constants.ENDPOINT}/{remote.repo_id}"
    return f"{home}/tree/{target.branch}" if target.branch else home, commit.oid != parent


def _operations(folder: Path, existing: Collection[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations of the commit; the client leaves out files that have not changed."""
    files = _files(folder)
    old = {name for name in existing if any(fnmatchcase(name, pattern) for pattern in _OURS)}
    if _CODE_0_1 <= set(existing):
        old |= _CODE_0_1
    return [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in sorted(old - files.keys())),
    ]
