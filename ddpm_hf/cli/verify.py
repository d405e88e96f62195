"""`ddpm-hf verify`: check whether a saved pipeline is the one that was saved."""

from collections.abc import Sequence

from ddpm_hf.cli.common import download_folder, find_folder
from ddpm_hf.cli.flags import Parser
from ddpm_hf.config import ConfigError
from ddpm_hf.files import VERIFICATION


def verify(arguments: Sequence[str]) -> int:
    """Compare a pipeline with its verification.json, and print what differs.

    Returns:
        The exit code: 0 if nothing differs, 1 if something does.
    """
    parser = Parser(
        prog="ddpm-hf verify",
        description="Compare the weights and settings of a saved pipeline with its verification.json, repeat the\n"
        "recorded sampling steps with each of the three ways of loading it, and print what differs.",
        epilog="example: ddpm-hf verify user/digits",
    )
    parser.add_argument("folder", help="folder of a pipeline or of a run, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--write", action="store_true", help=f"write {VERIFICATION} into the folder instead")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code in the folder even if it is not that installed"
    )
    options = parser.parse_args(arguments)
    folder = find_folder(options.folder, options.revision)
    if folder is None and options.write:
        raise ConfigError(f"--write needs a local folder, but {options.folder} is a Hub repository.")

    from diffusers.utils import logging

    from ddpm_hf.evaluation import verify

    logging.disable_progress_bar()
    folder = folder or download_folder(options.folder, options.revision)
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
