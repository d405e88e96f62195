"""`ddpm-hf push`: publishes a trained pipeline on the Hub, with a card that says what it is."""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
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

    from ddpm_hf.hub import push as hub
    from ddpm_hf.hub.card import FILE_NAME
    from ddpm_hf.hub.export import contents
    from ddpm_hf.hub.publish import MESSAGE, PREFIX, prepare

    logging.disable_progress_bar()  # the pipeline is loaded several times
    if not sys.stderr.isatty():
        hub.hide_progress()
    source = find_folder(options.folder)
    if source is None:
        raise ConfigError(f"{options.folder} is no folder of this machine; give that of a run or of a pipeline.")
    target = hub.Target(
        repo_id=options.repo_id,
        private=options.private,
        branch=options.branch,
        as_pull_request=options.pull_request,
    )
    with temporary_folder(PREFIX) as temporary:
        work = prepare(
            source,
            temporary / "repository",
            target,
            run=Path(options.folder).expanduser(),
            fp16=options.fp16,
            license=options.license,
            with_real_images=options.with_real_images,
            is_dry_run=options.dry_run,
        )
        for section in work.kept:
            print(f"{FILE_NAME}: {section} was edited on the Hub, and stays as it is there.")
        if options.license is None and work.remote.card is None and not options.dry_run:
            print("The card says that the licence is unknown; --license mit, for example, would state it.")
        if options.dry_run:
            sizes = contents(work.folder)
            print("\n".join(f"{_size(size):>10}  {name}" for name, size in sizes.items()))
            print(f"{_size(sum(sizes.values())):>10}  in {len(sizes)} files would go to {_where(target)}.")
            print("The Hub was not asked whether you may push there, nor what its card keeps.")
            return 0
        pushed = hub.push(work.folder, target, work.remote, options.message or MESSAGE)
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
