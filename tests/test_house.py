"""The rules of the source code: which package imports which, where random numbers come from, which calls are forbidden.

Everything is read from the source, so that the rules also hold for code that no test runs. docs/architecture.md states
the imports in words.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ddpm_hf"

# Package or module -> what it may import of ours, beside itself. The longest matching name counts.
MAY_IMPORT: dict[str, set[str]] = {
    "rng": set(),
    "files": set(),
    "redaction": set(),
    "signals": set(),
    "plots": set(),
    "demo": set(),
    "diffusion": set(),
    "config": {"files", "redaction"},
    "distributed": {"config", "files", "rng", "signals"},
    "data": {"config", "files", "rng"},
    "model_folder": {"config", "files"},
    "models": {"config", "diffusion", "files", "model_folder", "redaction"},
    "convert": {"config", "diffusion", "files", "redaction"},
    "evaluation": {"config", "data", "diffusion", "distributed", "files", "plots", "redaction", "rng"},
    "training": {
        "__init__", "config", "data", "diffusion", "distributed", "evaluation", "files", "hub.background",
        "model_folder", "models", "plots", "redaction", "rng", "signals",
    },
    "hub": {
        "config", "data", "diffusion", "evaluation", "files", "model_folder", "models", "plots", "redaction",
        "run_report",
    },
    "run_report": {"evaluation", "files", "plots", "redaction"},
    "cli": {
        "__init__", "config", "convert", "data", "demo", "diffusion", "distributed", "evaluation", "files", "hub",
        "model_folder", "models", "plots", "redaction", "rng", "run_report", "signals", "training",
    },
    "__init__": {"config", "diffusion", "training"},
    "__main__": {"cli"},
}  # fmt: skip
# Imported inside functions, so that a command starts quickly and runs without what it does not use.
LAZY_LIBRARIES = {
    "cv2", "datasets", "matplotlib", "pandas", "pillow_heif", "pyarrow", "pydicom", "scipy", "sklearn",
    "tensorboard", "tifffile", "torch_fidelity", "torchvision", "trackio", "transformers", "wandb",
}  # fmt: skip
# The core travels with every saved pipeline to machines that have no more than this.
CORE_LIBRARIES = {"torch", "diffusers", "numpy", "PIL", "typing_extensions", "huggingface_hub"}

DRAWS = {
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "poisson", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "randn_tensor", "random_", "randperm", "trunc_normal_",
    "uniform_", "xavier_normal_", "xavier_uniform_",
}  # fmt: skip
# Layers initialize themselves from torch's global generator, so the whole initialization does, after rng.py seeded it.
MAY_DRAW_GLOBALLY = {"models": {"xavier_uniform_"}}
SEEDS = {"Generator", "RandomState", "SeedSequence", "default_rng", "manual_seed", "manual_seed_all", "set_seed"}

FORBIDDEN_LIBRARIES = {"cloudpickle", "ctypes", "dill", "joblib", "marshal", "pickle", "runpy", "shelve"}
FORBIDDEN_NAMES = {
    "__import__", "compile", "eval", "exec", "importlib.import_module", "os.popen", "os.system",
    "shutil.unpack_archive", "torch.hub", "torch.jit.load", "torch.load", "torch.save",
    "yaml.FullLoader", "yaml.Loader", "yaml.UnsafeLoader", "yaml.full_load", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
# Accelerate's own states are pickles; extracting an archive writes where its names say.
FORBIDDEN_METHODS = {"extract", "extractall", "register_for_checkpointing", "save_state"}
MUST_BE_FALSE = {"allow_pickle", "shell", "trust_remote_code"}
# Module -> what is meant: an optimizer or feature network by import path is code by its user's own wish, the package
# imports its own modules on first use, torch.hub downloads a file whose sha256 is known, and `verify` runs code that is
# the installed one byte by byte, or that the caller has consented to. `from_pretrained` opens folders of runs with the
# installed package. mallopt of the C library has no other interface.
# The checkpoints of other trainers are pickles, which the benchmark only writes. `convert` writes state dicts of other
# systems, and reads checkpoints of them with weights_only=True, which torch.load is never called without.
ALLOWED = {
    "benchmarks/bench.py": {"ctypes"},
    "benchmarks/peers.py": {"save_state", "torch.save"},
    "ddpm_hf/__init__.py": {"importlib.import_module"},
    "ddpm_hf/cli/convert.py": {"torch.save"},
    "ddpm_hf/convert/checkpoint.py": {"torch.load"},
    "ddpm_hf/diffusion/pipeline.py": {"importlib.import_module"},
    "ddpm_hf/distributed.py": {"ctypes"},
    "ddpm_hf/evaluation/features.py": {"importlib.import_module", "torch.hub"},
    "ddpm_hf/evaluation/verify.py": {"trust_remote_code=True"},
    "ddpm_hf/training/optim.py": {"importlib.import_module"},
}


def module_name(path: Path) -> str:
    """Return `training.loss` for ddpm_hf/training/loss.py, and `training` for its __init__.py."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PROGRAMS = [
    *sorted(path for place in ("ddpm_hf", "benchmarks", "data", "docs") for path in (REPOSITORY / place).rglob("*.py")),
    REPOSITORY / "train_ddpm.py",
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PROGRAMS}


def is_in(module: str, homes: set[str]) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def imported(module: str, tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the full name of each module that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: -node.level] if module not in ("diffusion",) else ["diffusion"]
                base = ".".join(["ddpm_hf", *parts, *([base] if base else [])])
            inside = base.removeprefix("ddpm_hf").lstrip(".")
            for alias in node.names:
                name = f"{inside}.{alias.name}".lstrip(".")
                if base == "ddpm_hf" and name not in MODULES:
                    name = "__init__"
                yield (f"ddpm_hf.{name}" if name in MODULES or name == "__init__" else base), node


def runs_at_import(tree: ast.Module) -> set[ast.stmt]:
    """Return the statements that run when the module is imported, type-checking blocks left out."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or for_types:
                continue
            yield node
            yield from statements([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])

    return set(statements(tree.body))


def full_names(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return the full name of an expression such as np.load, or an empty string."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def dangers(tree: ast.Module, allowed: set[str]) -> list[str]:
    """Return the calls and imports of a program that could run what it reads."""
    names = full_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            found += [
                full
                for full in (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
                if full.split(".")[0] in FORBIDDEN_LIBRARIES - allowed or full in FORBIDDEN_NAMES - allowed
            ]
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = dotted(node, names)
            found += [name] if name in FORBIDDEN_NAMES - allowed else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func, names)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [name] if "." in name and name.split(".")[-1] in FORBIDDEN_METHODS - allowed else []
            found += [
                f"{word}={value}"
                for word, value in words.items()
                if word in MUST_BE_FALSE and value != "False" and f"{word}={value}" not in allowed
            ]
            if name == "torch.load" and words.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name == "numpy.load" and words.get("allow_pickle") != "False":
                found.append("numpy.load without allow_pickle=False")
            if name.endswith("UNet2DModel.from_pretrained") and words.get("use_safetensors") != "True":
                found.append("from_pretrained without use_safetensors=True")
    return found


def test_imports_point_downwards() -> None:
    strays = []
    for module, path in MODULES.items():
        row = max((row for row in MAY_IMPORT if is_in(module or "__init__", {row})), key=len)
        for target, node in imported(module, TREES[path]):
            ours = target.removeprefix("ddpm_hf.")
            if target.startswith("ddpm_hf") and not is_in(ours, MAY_IMPORT[row] | {row}):
                strays.append(f"{path.name}:{node.lineno} imports {ours}")
    assert strays == []


def test_heavy_libraries_are_imported_inside_functions() -> None:
    strays = []
    for module, path in MODULES.items():
        top = runs_at_import(TREES[path])
        strays += [
            f"{module}: {target}"
            for target, node in imported(module, TREES[path])
            if node in top and target.split(".")[0] in LAZY_LIBRARIES
        ]
    assert strays == []


@pytest.mark.parametrize("module", ["ddpm_hf", "ddpm_hf.config", "ddpm_hf.plots", "ddpm_hf.run_report"])
def test_an_import_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'sklearn', 'matplotlib'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert answer.stdout.strip() == "[]"


COMMANDS_WITHOUT_TORCH = [
    "--help",
    "--version",
    "trian",
    "train --help",
    "train --training.num_stepz 5",
    "train --data.source x --training.micro_batch_size 48 --training.train_batch_size 64",
    "data --help",
    "distill --help",
    "distill x --steps 8,3",
    "ema --help",
    "sample --help",
    "sample --num_imagez 5",
    "evaluate --help",
    "timesteps --help",
    "timesteps x --steps 4 --scheduler ddpm",
    "plot --help",
    "push --help",
    "verify --help",
    "convert --help",
    "convert missing.pt out",
]


def test_help_and_invalid_flags_are_answered_without_torch() -> None:
    """Settings are validated before heavy libraries are imported."""
    code = f"""
import contextlib, io, sys
from ddpm_hf.cli.main import main
for command in {COMMANDS_WITHOUT_TORCH}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(command.split())  # the script train_ddpm.py calls the same function as `train`
        except SystemExit as error:
            code = error.code
    heavy = {LAZY_LIBRARIES | {"torch", "diffusers", "accelerate", "huggingface_hub"}} & set(sys.modules)
    print(command, code, sorted(heavy), sep="|")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    found = [line.split("|") for line in answer.stdout.splitlines()]
    is_valid = re.compile("--help|--version")
    assert found == [[line, "0" if is_valid.search(line) else "2", "[]"] for line in COMMANDS_WITHOUT_TORCH]


def test_the_core_needs_nothing_of_ours() -> None:
    """diffusers finds imports with a regular expression, so that even a line of a docstring counts."""
    for module, path in MODULES.items():
        if module.startswith("diffusion."):
            libraries = {target.split(".")[0] for target, _ in imported(module, TREES[path])}
            assert libraries - set(sys.stdlib_module_names) <= CORE_LIBRARIES | {"ddpm_hf"}, module
            assert not re.findall(r"^\s*(?:from|import)\s+ddpm_hf\b", path.read_text(encoding="utf-8"), re.M), module


def test_the_pipeline_imports_every_file_of_the_core() -> None:
    """From a local folder diffusers copies the files that pipeline.py names, not those that these name in turn."""
    core = {module for module in MODULES if module.startswith("diffusion.")}
    named = {
        target.removeprefix("ddpm_hf.")
        for target, _ in imported("diffusion.pipeline", TREES[MODULES["diffusion.pipeline"]])
    }
    assert core - named == {"diffusion.pipeline"}


def test_everything_random_takes_a_generator_and_seeds_are_made_in_rng() -> None:
    strays = []
    for module, path in MODULES.items():
        names = full_names(TREES[path])
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func, names)
            last = name.split(".")[-1]
            draws = last in DRAWS and (name.startswith(("torch.", "diffusers.")) or last.endswith("_"))
            if draws and "generator" not in {word.arg for word in node.keywords}:
                strays += [] if last in MAY_DRAW_GLOBALLY.get(module, set()) else [f"{module}: {name}"]
            # A Space runs the page without ddpm_hf.
            if module not in ("rng", "demo") and (last in SEEDS or name.startswith(("numpy.random.", "random."))):
                strays.append(f"{module}: {name}")
    assert strays == []


def test_no_program_unpickles_or_executes_its_input() -> None:
    found = {
        name: dangers(tree, ALLOWED.get(name, set()))
        for name, tree in ((path.relative_to(REPOSITORY).as_posix(), tree) for path, tree in TREES.items())
    }
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_every_exception_to_the_rules_is_still_needed() -> None:
    for name, allowed in ALLOWED.items():
        found = dangers(TREES[REPOSITORY / name], set())
        assert allowed <= {*found, *(call.split(".")[-1] for call in found)}, name


@pytest.mark.parametrize(
    "line",
    [
        "from pickle import loads",
        "from torch import load as read\nread('x')",
        "run = exec",
        "from yaml import UnsafeLoader",
        "import subprocess\nsubprocess.run('x', shell=is_shell)",
        "import numpy as np\nnp.load('x')",
        "import tarfile\ntarfile.open('x').extractall()",
        "UNet2DModel.from_pretrained('x')",
        "DiffusionPipeline.from_pretrained('x', trust_remote_code=True)",
        "torch.load('x', weights_only=True)",
    ],
)
def test_the_walk_finds_a_dangerous_line(line: str) -> None:
    assert dangers(ast.parse(line), set()) != []


def test_the_walk_lets_harmless_lines_pass() -> None:
    lines = (
        "import re, torch, yaml, numpy as np\nre.compile('x'); torch.compile(f); model.eval(); yaml.safe_load('x')\n"
        "np.load('x', allow_pickle=False); unet.load_state_dict({})\nfrom safetensors.torch import load"
    )
    assert dangers(ast.parse(lines), set()) == []


def test_the_architecture_document_names_every_module() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {path.stem for path in MODULES.values()} - {"__init__", "__main__"}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()
