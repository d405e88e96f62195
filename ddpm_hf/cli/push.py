"""`ddpm-hf push`: publish a trained pipeline on the Hugging Face Hub."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from ddpm_hf.cli.common import is_repository_id, temporary_folder
from ddpm_hf.cli.flags import Parser
from ddpm_hf.config import ConfigError
from ddpm_hf.files import format_bytes

_EXAMPLES = """examples:
  ddpm-hf push outputs/digits user/digits --dry_run      list the files and their sizes
  ddpm-hf push outputs/digits user/digits --license mit --private
  ddpm-hf push outputs/digits user/digits --pull_request

Log in first with hf auth login, or set HF_TOKEN. The same command again sends only what has changed."""


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="ddpm-hf push",
        description="Publish a trained pipeline on the Hugging Face Hub in one commit: weights as safetensors, code, "
        "and a model card with samples, settings and evaluation results.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add(
        "folder",
        help="folder of a run, a checkpoint or a pipeline; of a run that is not finished, the EMA of its newest valid "
        "checkpoint is published, and the card says so",
    )
    add("repo_id", help='"user/name", "organization/name", or "name" for your own account')
    add("--private", action="store_true", help="create the repository as private; an existing public one is refused")
    add("--pull_request", action="store_true", help="open a pull request instead of committing")
    add("--branch", help="branch instead of main, created if it does not exist")
    add("--fp16", action="store_true", help='add half-precision weights for from_pretrained(..., variant="fp16")')
    add("--license", help="license identifier for the card, such as mit; default: that of the card, or unknown")
    add(
        "--with_real_images",
        action="store_true",
        help="also publish evaluation.png, which shows training images; only if everybody may see them",
    )
    add("--space", help='also create or update a Space, "user/name", with the page of ddpm-hf demo for this model')
    add("--zero_gpu", action="store_true", help="let the Space ask for a GPU during each action (ZeroGPU hardware)")
    add("--message", help="first line of the commit message")
    add("--dry_run", action="store_true", help="assemble everything, list it, and push nothing")
    return parser.parse_args(arguments)


def push(arguments: Sequence[str]) -> int:
    """Publish a pipeline, print its address, and return the exit code."""
    options = parse(arguments)

    from diffusers.utils import logging
    from huggingface_hub.utils import disable_progress_bars

    from ddpm_hf.hub import push as hub
    from ddpm_hf.hub.space import push_space, space_files

    logging.disable_progress_bar()  # of the parts of the pipeline
    if not sys.stderr.isatty():
        disable_progress_bars()
    if is_repository_id(options.folder):
        raise ConfigError(
            f"{options.folder} is not a local folder; give the folder of a run, a checkpoint or a pipeline."
        )
    target = hub.Target(
        repo_id=options.repo_id,
        private=options.private,
        branch=options.branch,
        as_pull_request=options.pull_request,
        license=options.license,
    )
    if options.zero_gpu and options.space is None:
        raise ConfigError("--zero_gpu is for a Space; add --space user/name.")
    if options.space is not None and options.pull_request:
        raise ConfigError("--space shows a published model, which a pull request is not yet; remove one of them.")
    space = None if options.space is None else hub.Target(repo_id=options.space, private=options.private)
    with temporary_folder(hub.PREFIX) as workspace:
        pushed = hub.push(
            options.folder,
            target,
            fp16=options.fp16,
            with_real_images=options.with_real_images,
            message=options.message,
            dry_run=options.dry_run,
            workspace=workspace,
        )
    for note in pushed.notes:
        print(note)
    if options.dry_run:
        for name, size in pushed.sizes.items():
            print(f"{format_bytes(size):>10}  {name}")
        where = f"{target.repo_id}{f', branch {target.branch}' if target.branch else ''}"
        where += " (private, if it is created)" if target.private else ""
        if target.as_pull_request:
            where = f"a pull request to {target.repo_id}"
        total = format_bytes(sum(pushed.sizes.values()))
        print(f"{total:>10}  in {len(pushed.sizes)} files would go to {where}.")
        if space is not None:
            print(f"{', '.join(space_files(target))} would go to the Space {space.repo_id}.")
        print("No request was sent: whether you may push, and what the card on the Hub keeps, was not checked.")
        return 0
    print(f"{pushed.url}{'' if pushed.is_new else ' was up to date; nothing was sent'}")
    if space is not None:
        print(push_space(space, replace(target, repo_id=pushed.repo_id), zero_gpu=options.zero_gpu))
        if options.private:
            print("The model is private: give the Space a secret HF_TOKEN that can read it, in its settings.")
    return 0
