"""From the folder of a pipeline to a repository of the Hub: put together, written about, pushed."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ddpm_hf.hub.card import FILE_NAME, make_card
from ddpm_hf.hub.export import assemble
from ddpm_hf.hub.push import Pushed, Remote, Target, check_access, check_license, look_up, push

MESSAGE = "Push a pipeline trained by ddpm_hf"
PREFIX = "ddpm-hf-push-"  # of the name of the folder that is published, among the temporary ones


@dataclass(frozen=True)
class Prepared:
    """What is about to be published.

    Args:
        folder: All of it, the card included.
        remote: The repository as it is.
        kept: Sections of the card that somebody edited on the Hub, which stay.
    """

    folder: Path
    remote: Remote
    kept: tuple[str, ...]


def prepare(
    source: Path,
    folder: Path,
    target: Target,
    *,
    run: Path | None = None,
    fp16: bool = False,
    license: str | None = None,
    with_real_images: bool = False,
    is_dry_run: bool = False,
) -> Prepared:
    """Puts together what is published.

    Args:
        source: Folder of a pipeline.
        folder: Where it is put together; made anew.
        target: Where it goes.
        run: Folder of the run that it was trained in, whose pictures are taken.
        fp16: Add half-precision weights.
        license: Identifier of the licence for the card; None leaves what the card says.
        with_real_images: Publish evaluation.png too, which shows training images.
        is_dry_run: Ask the Hub nothing, as if there were no repository.

    Raises:
        ValueError: The pipeline cannot be published, or this user may not.
        OSError: The Hub cannot be reached.
    """
    check_license(license)
    name = target.repo_id if is_dry_run else check_access(target)
    make_card(source, repo_id=name)  # before the work too: records that are broken are refused where they lie
    assemble(source, folder, run=run, fp16=fp16, with_real_images=with_real_images)
    remote = Remote(name, None, None) if is_dry_run else look_up(target, name)
    card = make_card(folder, repo_id=name, license=license, existing=remote.card)
    (folder / FILE_NAME).write_text(card.text, encoding="utf-8", newline="")
    return Prepared(folder, remote, card.kept)


def publish(
    source: Path,
    target: Target,
    *,
    run: Path | None = None,
    fp16: bool = False,
    license: str | None = None,
    with_real_images: bool = False,
    message: str = MESSAGE,
) -> Pushed:
    """Publishes a pipeline in one commit, as whoever is logged in.

    Args:
        source: As in `prepare`.
        target: As in `prepare`.
        run: As in `prepare`.
        fp16: As in `prepare`.
        license: As in `prepare`.
        with_real_images: As in `prepare`.
        message: First line of the commit.

    Raises:
        ValueError: As in `prepare`, or somebody else was faster.
        OSError: As in `prepare`.
    """
    with tempfile.TemporaryDirectory(prefix=PREFIX) as temporary:
        folder = Path(temporary) / "repository"
        work = prepare(source, folder, target, run=run, fp16=fp16, license=license, with_real_images=with_real_images)
        return push(folder, target, work.remote, message)
