"""`ddpm-hf push`: publishes a trained pipeline on the Hub, with a card that says what it is."""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddpm_hf.cli.common import find_folder, temporary_folder
from ddpm_hf.cli.flags import Parser
from ddpm_hf.config import ConfigError

if TYPE_CHECKING:
    from ddpm_hf.hub.push import Target


_EXAMPLES = """examples:
  ddpm-hf push outputs/digits user/digits --dry_run      what would be published, with sizes
  ddpm-hf push outputs/digits user/digits --license mit --private
  ddpm-hf push outputs/digits user/digits --pull_request

Log in beforehand with hf auth login, or set HF_TOKEN. The same command again sends only what has changed."""


def parse(arguments: Sequence[str]) -> Namespace:
    """Reads the command line."""
    parser = Parser(
        prog="ddpm-hf push",
        description="Publish a trained pipeline on the Hugging Face Hub: weights as safetensors, code, a model card "
        "with samples, settings and measurements.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", help="folder of a finished run, or of a pipeline")
    add("repo_id", help='"user/name", "organisation/name", or "name" for your own')
    add(
        "--private",
        action="store_true",
        help="make the repository private, if it is made now; one that is public is refused",
    )
    add("--pull_request", action="store_true", help="propose the change instead of making it")
    add("--branch", help="push to this branch instead of main; it is made if it does not exist")
    add("--fp16", action="store_true", help='add half-precision weights, for from_pretrained(..., variant="fp16")')
    add("--license", help="identifier of the licence for the card, such as mit; by default it is marked as unknown")
    add("--with_real_images", action="store_true",
        help="publish evaluation.png too, which shows training images: only where anybody may see them")  # fmt: skip
    add("--message", help="first line of the commit")
    add("--dry_run", action="store_true", help="put all together, list it with sizes, and push nothing")
    return parser.parse_args(arguments)


def push(arguments: Sequence[str]) -> int:
    """Puts together what is published, publishes it, prints where, and returns the exit code."""
    options = parse(arguments)

    from diffusers.utils import logging
    from huggingface_hub.utils import disable_progress_bars

    from ddpm_hf.hub import push as hub

    logging.disable_progress_bar()  # of the parts of the pipeline
    if not sys.stderr.isatty():
        disable_progress_bars()
    if find_folder(options.folder) is None:
        raise ConfigError(f"{options.folder} is not a local folder; give the folder of a run or of a pipeline.")
    target = hub.Target(
        repo_id=options.repo_id,
        private=options.private,
        branch=options.branch,
        as_pull_request=options.pull_request,
        license=options.license,
    )
    with temporary_folder(hub.PREFIX) as workspace:
        pushed = hub.push(
            options.folder,
            target,
            fp16=options.fp16,
            with_real_images=options.with_real_images,
            message=options.message or hub.MESSAGE,
            dry_run=options.dry_run,
            workspace=workspace,
        )
    for note in pushed.notes:
        print(note)
    if options.dry_run:
        print("\n".join(f"{_size(size):>10}  {name}" for name, size in pushed.sizes.items()))
        print(f"{_size(sum(pushed.sizes.values())):>10}  in {len(pushed.sizes)} files would go to {_where(target)}.")
        print("No request was sent: whether you may push, and what the card on the Hub keeps, was not checked.")
        return 0
    print(f"{pushed.url}{'' if pushed.is_new else ' was up to date; nothing was sent'}")
    return 0


def _where(target: "Target") -> str:
    """Says where a push would go."""
    if target.as_pull_request:
        return f"a pull request to {target.repo_id}"
    branch = f", branch {target.branch}" if target.branch else ""
    return f"{target.repo_id}{branch}{' (private, if it is made)' if target.private else ''}"


def _size(number: int) -> str:
    """Says a number of bytes as a person would."""
    amount, unit = float(number), "B"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
