"""`ddpm-hf verify`: check whether a saved pipeline or checkpoint is the one that was saved."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.cli.common import download_folder, is_repository_id
from ddpm_hf.cli.flags import Parser
from ddpm_hf.config import ConfigError
from ddpm_hf.files import CHECKPOINTS_DIR, MANIFEST, VERIFICATION
from ddpm_hf.model_folder import CheckpointError, checkpoint_folders, locate, verify_checkpoint


def verify(arguments: Sequence[str]) -> int:
    """Compare a pipeline with its verification.json, or checkpoints with their manifests, and print what differs.

    Returns:
        The exit code: 0 if nothing differs, 1 if something does.
    """
    parser = Parser(
        prog="ddpm-hf verify",
        description="Compare the weights and settings of a saved pipeline with its verification.json, repeat the\n"
        "recorded sampling steps with each of the three ways of loading it, and print what differs. The files of a\n"
        "checkpoint, or of all checkpoints of a run that is not finished, are compared with its manifest.",
        epilog="example: ddpm-hf verify user/digits",
    )
    parser.add_argument("folder", help="folder of a pipeline, a run or a checkpoint, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--write", action="store_true", help=f"write {VERIFICATION} into the folder instead")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code in the folder even if it is not that installed"
    )
    options = parser.parse_args(arguments)
    if (is_local := not is_repository_id(options.folder)) and options.revision is not None:
        raise ConfigError(f"--revision is for Hub repositories, but {options.folder} is a local folder; remove it.")
    model = locate(options.folder) if is_local else None
    if options.write and (model is None or model.kind != "pipeline"):
        kinds = {"run": "a run that is not finished", "checkpoint": f"a checkpoint, which has a {MANIFEST}"}
        what = "a Hub repository" if model is None else kinds[model.kind]
        raise ConfigError(f"--write needs the folder of a pipeline, but {options.folder} is {what}; remove --write.")
    if model is not None and model.kind == "run":
        return _verify_checkpoints(checkpoint_folders(model.path / CHECKPOINTS_DIR))
    if model is not None and model.kind == "checkpoint":
        return _verify_checkpoints([model.path], any_name=True)

    from diffusers.utils import logging

    from ddpm_hf.evaluation import verify

    logging.disable_progress_bar()
    folder = download_folder(options.folder, options.revision) if model is None else model.path
    if options.write:
        verify.write_verification(folder)
        print(f"{folder / VERIFICATION} records what this pipeline computes.")
        return 0
    findings = verify.verify(folder, run_code=options.trust_remote_code)
    for finding in findings:
        if finding.problem:
            print(f"{finding.way:<31} {'differs' if finding.is_bad else 'note'}: {finding.problem}")
        else:
            print(f"{finding.way:<31} the same, to {finding.difference:.1e} of the range")
    is_bad = any(finding.is_bad for finding in findings)
    same = "holds the same as" if any(finding.is_other_file for finding in findings) else "is"
    rest = ", but for what the notes leave open" if not is_bad and any(one.is_open for one in findings) else ""
    print(f"{options.folder} {'is NOT' if is_bad else same} the pipeline that was saved{rest}.")
    return int(is_bad)


def _verify_checkpoints(paths: Sequence[Path], *, any_name: bool = False) -> int:
    """Compare checkpoints with their manifests, and return the exit code."""
    num_damaged = 0
    for path in paths:
        try:
            step = verify_checkpoint(path.resolve(), any_name=any_name).step
            print(f"{path} holds the checkpoint of step {step} that was saved.")
        except CheckpointError as error:
            print(f"{path} is NOT the checkpoint that was saved: {error}.")
            num_damaged += 1
    return int(num_damaged > 0)
