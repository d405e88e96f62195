"""No program of the project reads a pickle, runs a string, unpacks an archive to disk or takes remote code for its own.

The walk sees names, also those that are not called, through whatever an import calls them. What is built at run time,
such as getattr(torch, "lo" + "ad"), it cannot see; that is what reviews are for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = sorted(
    path
    for place in ("ddpm_hf", "benchmarks", "data", "docs")
    for path in [*(REPOSITORY / place).rglob("*.py"), REPOSITORY / "train_ddpm.py"]
)
PROGRAMS = list(dict.fromkeys(PROGRAMS))

FORBIDDEN_LIBRARIES = {
    "_pickle", "cPickle", "cloudpickle", "code", "ctypes", "dill", "joblib", "jsonpickle", "marshal", "pickle", "pty",
    "runpy", "shelve", "tensordict", "zipimport",
}  # fmt: skip
FORBIDDEN_NAMES = {
    "__import__", "compile", "eval", "exec",
    "importlib.import_module", "importlib.reload", "importlib.util.module_from_spec",
    "numpy.fromregex", "os.popen", "os.startfile", "os.system", "pandas.read_pickle",
    "shutil.unpack_archive", "subprocess.getoutput", "subprocess.getstatusoutput",
    "torch.hub", "torch.jit.load", "torch.load", "torch.package", "torch.save", "torch.serialization",
    "yaml.CLoader", "yaml.FullLoader", "yaml.Loader", "yaml.UnsafeLoader", "yaml.full_load", "yaml.full_load_all",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
# Accelerate's own states are pickles; what unpacks archives writes where their names say.
FORBIDDEN_METHODS = {"extract", "extractall", "load_state", "register_for_checkpointing", "save_state"}
FORBIDDEN_STARTS = ("os.exec", "os.spawn", "os.posix_spawn")
MUST_BE_FALSE = {"allow_pickle", "shell", "trust_remote_code"}
# What loads weights and arrays must say itself what it refuses.
MUST_SAY = {"numpy.load": ("allow_pickle", "False"), "UNet2DModel.from_pretrained": ("use_safetensors", "True")}

# Program -> names that are meant: an optimiser or a network for features by import path is code by its own user's wish,
# the package imports its own modules when they are asked for, and torch.hub downloads a file whose sha256 is known.
ALLOWED = {
    "ddpm_hf/evaluation/features.py": {"importlib.import_module"},
    "ddpm_hf/evaluation/inception.py": {"torch.hub"},
    # Code that is the installed one byte by byte, or that the caller has consented to.
    "ddpm_hf/evaluation/verification.py": {"trust_remote_code=True"},
    "ddpm_hf/training/optim.py": {"importlib.import_module"},
    "ddpm_hf/__init__.py": {"importlib.import_module"},
}
# Methods of ours that happen to be called so.
OUR_METHODS = {"self._timestep_sampler.load_state"}


def full_names(tree: ast.Module) -> dict[str, str]:
    """Returns what each name that an import made stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Returns the full name of an expression such as np.load; empty if it is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def libraries(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def dangers(path: Path, allowed: set[str]) -> list[str]:
    """Returns what a program does that none may do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = full_names(tree)
    found = [f"imports {library}" for library in libraries(tree) if library in FORBIDDEN_LIBRARIES]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if name in FORBIDDEN_NAMES - allowed or name.startswith(FORBIDDEN_STARTS):
                    found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node, names)
            if name in FORBIDDEN_NAMES - allowed or name.startswith(FORBIDDEN_STARTS):
                found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.Call):
            name, keywords = dotted(node.func, names), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name.split(".")[-1] in FORBIDDEN_METHODS and "." in name and name not in OUR_METHODS:
                found.append(f"line {node.lineno}: {name}()")
            found += [
                f"line {node.lineno}: {word}={value}"
                for word, value in keywords.items()
                if word in MUST_BE_FALSE and value != "False" and f"{word}={value}" not in allowed
            ]
            for loader, (word, value) in MUST_SAY.items():
                if name.endswith(loader) and keywords.get(word) != value:
                    found.append(f"line {node.lineno}: {loader} without {word}={value}")
    return found


@pytest.mark.parametrize("program", [str(path.relative_to(REPOSITORY)) for path in PROGRAMS])
def test_no_program_reads_a_pickle_or_runs_what_it_reads(program: str) -> None:
    assert dangers(REPOSITORY / program, ALLOWED.get(program, set())) == []


def test_every_program_is_looked_at() -> None:
    names = {str(path.relative_to(REPOSITORY)) for path in PROGRAMS}
    assert {"train_ddpm.py", "ddpm_hf/cli.py", "ddpm_hf/diffusion/pipeline.py", "benchmarks/data.py"} <= names


def test_what_is_allowed_is_still_needed() -> None:
    for program, names in ALLOWED.items():
        assert {line.split(": ")[1] for line in dangers(REPOSITORY / program, set())} == names


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import _pickle as p",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import torch\nread = torch.load",
        "import torch.hub\ntorch.hub.load('x', 'y')",
        "eval('1')",
        "run = exec",
        "compile('1', 'x', 'eval')",
        "import os\nos.system('x')",
        "import os\nos.execv('x', [])",
        "from os import popen",
        "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)",
        "from yaml import UnsafeLoader",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nsubprocess.run('x', shell=is_shell)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import importlib\nimportlib.import_module('x')",
        "import tarfile\ntarfile.open('x').extractall()",
        "archive.extract('x')",
        "accelerator.load_state('x')",
        "accelerator.register_for_checkpointing(x)",
        "UNet2DModel.from_pretrained('x')",
        "DiffusionPipeline.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_walk_sees_what_it_is_for(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.py").write_text(line + "\n")
    assert dangers(tmp_path / "bad.py", set()) != []


def test_harmless_lines_are_let_pass(tmp_path: Path) -> None:
    lines = [
        "import re, torch, yaml, json, numpy as np",
        "re.compile('x'); torch.compile(f); model.eval(); yaml.safe_load('x'); json.load(f)",
        "np.load('x', allow_pickle=False); unet.load_state_dict({}); loss_evaluation = 1",
        "from safetensors.torch import load, load_file",
    ]
    (tmp_path / "good.py").write_text("\n".join(lines) + "\n")
    assert dangers(tmp_path / "good.py", set()) == []


def test_ruff_looks_for_the_same() -> None:
    """Its S rules know more calls; the only one of them that a program may break is starting our own commands."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert '"S", ' in text.split("select = [")[1].split("]")[0]
    assert [line for line in text.split("ignore = [")[1].split("]")[0].splitlines() if '"S' in line] == [
        '    "S101",   # asserts catch our own mistakes; users get a ValueError with a sentence'
    ]
