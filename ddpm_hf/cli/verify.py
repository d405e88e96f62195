"""`ddpm-hf verify FOLDER`: is this the pipeline that was saved?"""

from collections.abc import Sequence

from ddpm_hf.cli.common import download_folder, find_folder
from ddpm_hf.cli.flags import Parser


def verify(arguments: Sequence[str]) -> int:
    """Compares a folder with its verification.json, computes again in each way of loading, and says what differs.

    Returns:
        The exit code: 0 if nothing does, 1 if something does.
    """
    parser = Parser(
        prog="ddpm-hf verify",
        description="Compare weights and settings of a saved pipeline with those that were saved, compute again what "
        "it computed then, in each of the three ways of loading it, and say what differs.",
        epilog="example: ddpm-hf verify user/digits",
    )
    parser.add_argument("folder", help="a saved pipeline, the folder of a run, or a repository of the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository of the Hub")
    parser.add_argument("--write", action="store_true", help="write verification.json into the folder instead")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the code in the folder even if it is not the one that is installed",
    )
    options = parser.parse_args(arguments)
    folder = find_folder(options.folder)
    if folder is not None and options.revision:
        raise ValueError(
            f"--revision {options.revision} applies to the Hub, but {options.folder} is here; leave it out."
        )
    if folder is None and options.write:
        raise ValueError(f"--write needs a folder of this machine, and {options.folder} is none; give one.")

    from diffusers.utils import logging

    from ddpm_hf.evaluation import verify
    from ddpm_hf.files import VERIFICATION

    logging.disable_progress_bar()
    folder = folder or download_folder(options.folder, options.revision)
    if options.write:
        verify.write_verification(folder)
        print(f"{folder / VERIFICATION} says what this pipeline computes.")
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
