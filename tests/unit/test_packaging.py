"""Requirements, entry points, the Makefile, and what must not be in the repository."""

import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import ddpm_hf
from ddpm_hf.diffusion.saved_folder import PORTABLE_FILES
from tests.conftest import run_arguments

REPOSITORY = Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")

# Import names that differ from the name of the distribution.
IMPORT_NAMES = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pillow-heif": "pillow_heif",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "torch-fidelity": "torch_fidelity",
}
# Minimum versions with a reason: security (see SECURITY.md), the format of saved folders, or a required function.
FLOORS = {
    "torch": "2.10",
    "diffusers": "0.42",
    "accelerate": "1.13",
    "datasets": "4",
    "huggingface_hub": "1.32",
    "jsonargparse": "4.52",
    "safetensors": "0.8",
    "pillow": "11.3",
    "tqdm": "4.66.3",
    "PyYAML": "6",
}
# Older versions have known vulnerabilities.
VULNERABLE_BELOW = {"torch": "2.10", "diffusers": "0.38", "safetensors": "0.8", "datasets": "4", "jsonargparse": "4.52"}
# Split so that this file does not contain the names.
REGISTRY_HOSTS = ["pypi" + ".org", "python" + "hosted.org", "download.py" + "torch.org", "npm" + "js.org"]
LOCAL_PATHS = ["/work" + "/", "/root" + "/", "/home" + "/"]


def requirements(section: str, key: str) -> list[Requirement]:
    lines = SETUP[section][key].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


INSTALLED_ALWAYS = requirements("options", "install_requires")
EXTRAS = {extra: requirements("options.extras_require", extra) for extra in SETUP["options.extras_require"]}


def git_files() -> list[Path]:
    """Return the tracked files."""
    answer = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip("not a git checkout")
    return [path for line in answer.stdout.splitlines() if (path := REPOSITORY / line).is_file()]


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_dependencies_have_their_minimum_versions(name: str, floor: str) -> None:
    applying = [
        requirement
        for requirement in INSTALLED_ALWAYS
        if requirement.name == name
        and (requirement.marker is None or requirement.marker.evaluate({"python_version": "3.12"}))
    ]
    assert [str(next(s for s in requirement.specifier if s.operator == ">=")) for requirement in applying] == [
        f">={floor}"
    ]


@pytest.mark.parametrize(("name", "version"), VULNERABLE_BELOW.items())
def test_no_python_version_allows_a_vulnerable_release(name: str, version: str) -> None:
    floors = [
        Version(specifier.version)
        for requirement in INSTALLED_ALWAYS
        if requirement.name == name
        for specifier in requirement.specifier
        if specifier.operator == ">="
    ]
    assert floors
    assert min(floors) >= Version(version)


def test_security_md_gives_a_reason_for_every_minimum_version() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    assert [f"{name} {floor}" for name, floor in FLOORS.items() if f"{name} {floor}" not in text] == []


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.14"])
def test_every_python_has_one_requirement_on_diffusers(python_version: str) -> None:
    markers = [requirement.marker for requirement in INSTALLED_ALWAYS if requirement.name == "diffusers"]
    assert sum(marker is None or marker.evaluate({"python_version": python_version}) for marker in markers) == 1


def test_every_imported_library_is_declared() -> None:
    declared = {
        IMPORT_NAMES.get(requirement.name.lower(), requirement.name)
        for requirement in [*INSTALLED_ALWAYS, *(requirement for extra in EXTRAS.values() for requirement in extra)]
    }
    imported = set()
    for path in (REPOSITORY / "ddpm_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    assert sorted(imported - set(sys.stdlib_module_names) - declared - {"ddpm_hf"}) == []


def test_the_command_of_the_package_exists() -> None:
    (line,) = SETUP["options.entry_points"]["console_scripts"].split("\n")[1:]
    name, target = line.split(" = ")
    module, function = target.split(":")
    assert name == "ddpm-hf"
    assert callable(getattr(importlib.import_module(module), function))


def test_the_package_contains_its_types() -> None:
    assert SETUP["options.package_data"]["ddpm_hf"] == "py.typed"
    assert (REPOSITORY / "ddpm_hf" / "py.typed").is_file()


def test_uv_run_makes_an_environment_for_the_script_from_this_checkout() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    text = (REPOSITORY / "train_ddpm.py").read_text(encoding="utf-8")
    header = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)
    assert header is not None
    settings = tomllib.loads("".join(line[2:] + "\n" for line in header[1].splitlines()))
    [requirement] = map(Requirement, settings["dependencies"])
    assert requirement.name == SETUP["metadata"]["name"]
    assert requirement.extras <= EXTRAS.keys()
    assert settings["tool"]["uv"]["sources"][requirement.name]["path"] == "."
    assert settings["requires-python"] == SETUP["options"]["python_requires"]


def build(what: str, source: Path, target: Path) -> None:
    """Build a distribution with the declared backend, without the isolation that would download it."""
    code = f"import sys, setuptools.build_meta as backend; backend.build_{what}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, check=True, capture_output=True)


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_trains_and_publishes_in_an_empty_environment(tmp_path: Path) -> None:
    """The environment has the wheel and its dependencies, which pip checks; those are links to the installed ones."""
    for path in git_files():
        copy = tmp_path / "source" / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    build("sdist", tmp_path / "source", tmp_path)
    with tarfile.open(tmp_path / f"ddpm_hf-{ddpm_hf.__version__}.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    build("wheel", tmp_path / f"ddpm_hf-{ddpm_hf.__version__}", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "ddpm_hf" not in path.name:
            (libraries / path.name).symlink_to(path)
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(program: str, *arguments: str) -> str:
        command = [tmp_path / "venv" / "bin" / program, *arguments]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    run("python", "-m", "pip", "install", "--no-index", f"ddpm_hf-{ddpm_hf.__version__}-py3-none-any.whl")
    assert run("ddpm-hf", "--version") == f"ddpm-hf {ddpm_hf.__version__}\n"
    run("ddpm-hf", "train", *run_arguments(tmp_path / "run", training__num_steps=1))
    saved = {path.name: path for path in (tmp_path / "run" / "pipeline").glob("*.py")}
    assert saved.keys() == set(PORTABLE_FILES)
    assert saved["pipeline.py"].read_bytes() == (packages / "ddpm_hf" / "diffusion" / "pipeline.py").read_bytes()
    assert "README.md" in run("ddpm-hf", "push", "run", "user/digits", "--dry_run")


def make(*arguments: str, directory: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run make without the variables of an outer make that may have started the tests."""
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "TORCH", "CONFIG", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "-f", str(REPOSITORY / "Makefile"), *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def test_make_help_names_every_target() -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert targets is not None
    assert targets[1].split() == ["help", "train", "test", "bench", "lint", "types", "test-slow", "clean"]
    # The help is read from the Makefile in the current directory.
    assert re.findall(r"make ([a-z-]+)", make("help").stdout) == targets[1].split()


def test_make_train_launches_the_digits_from_its_own_environment(tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").touch()
    commands = make("--dry-run", "train", "ARGS=--training.seed 1", directory=tmp_path)
    assert commands.returncode == 0, commands.stderr
    lines = commands.stdout.replace("\\\n", "").splitlines()
    assert any(line == "python3 -m venv .venv" for line in lines)
    launch = " ".join(lines[-1].split())
    assert launch.startswith(".venv/bin/accelerate-launch --quiet --num_processes 1 --num_machines 1")
    assert launch.endswith("train_ddpm.py --config configs/digits_8.yaml --training.seed 1")


def test_make_reports_an_old_python(tmp_path: Path) -> None:
    """The replacement fails at every `python -c`, as a Python that is too old does at the first check."""
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    answer = make("train", f"PYTHON={old}", directory=tmp_path)
    assert answer.returncode != 0
    assert f"ddpm_hf needs Python 3.10 or newer as {old}" in answer.stderr


def test_no_package_registry_and_no_local_path_is_named() -> None:
    found = []
    for path in git_files():
        content = path.read_bytes().decode("utf-8", errors="ignore")
        names = [name for name in [*REGISTRY_HOSTS, *LOCAL_PATHS] if name in content]
        found += [f"{path.relative_to(REPOSITORY)}: {name}" for name in names]
    assert found == []


def test_only_small_files_are_tracked() -> None:
    assert [str(path) for path in git_files() if path.stat().st_size > 3_000_000] == []
