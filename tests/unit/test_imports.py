"""Who may import whom, and what nobody may call: the house rules that a reader would otherwise have to trust.

Everything is read from the source, so a rule holds for code that no test runs. A new module needs a row in MAY_IMPORT.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ddpm_hf"
LONGEST_MODULE, LONGEST_FUNCTION = 350, 60

# Module or package -> what it may import of ours; a package stands for everything in it. The row with the longest name
# that fits counts.
MAY_IMPORT: dict[str, set[str]] = {
    "diffusion.noise_schedule": set(),
    "diffusion.timesteps": {"diffusion.noise_schedule"},
    "diffusion.gaussian": {"diffusion.noise_schedule"},
    "diffusion.forward_process": {"diffusion.noise_schedule", "diffusion.gaussian"},
    "diffusion.reverse_variance": {"diffusion.noise_schedule", "diffusion.gaussian"},
    "diffusion.scheduler": {
        "diffusion.noise_schedule",
        "diffusion.reverse_variance",
        "diffusion.timesteps",
        "diffusion.gaussian",
        "diffusion.forward_process",
    },
    "diffusion.folder": set(),
    "diffusion.sampling": set(),
    "diffusion.images": set(),
    "diffusion.denoising": {
        "diffusion.folder",
        "diffusion.forward_process",
        "diffusion.images",
        "diffusion.sampling",
    },
    "diffusion.editing": {"diffusion.denoising", "diffusion.folder", "diffusion.gaussian", "diffusion.images"},
    "diffusion.pipeline": {"diffusion"},
    "diffusion.__init__": {"diffusion"},
    "config": {"config", "redaction"},
    "durable": set(),
    "redaction": set(),
    "rng": set(),
    "plots": {"plots"},
    "unet": {"config"},
    "pretrained": {"config", "diffusion", "redaction"},
    "data": {"durable", "data", "config", "rng"},
    "training.__init__": set(),
    "training.batches": {"config", "data", "rng", "training.noise", "training.timestep_sampling"},
    "training.checkpoint": {"durable"},
    "training.data_state": {"config", "data", "training.processes", "training.snapshot"},
    "training.due": {"config", "training.posthoc_ema"},
    "training.earlier_pipeline": {"durable"},
    "training.ema": {"config", "training.power_function"},
    "training.guard": {"training.processes"},
    "training.loss_meter": set(),
    "training.metrics": {"training.loss_meter"},
    "training.micro_batch": {"config", "training.objective", "training.processes", "training.progress"},
    "training.network": {"config", "diffusion", "pretrained", "training.checkpoint", "training.processes", "unet"},
    "training.noise": {"config", "rng"},
    "training.objective": {"config", "diffusion", "training.weighting"},
    "training.optim": {"config", "training.optimizer_state"},
    "training.optimizer_state": {"config", "redaction"},
    "training.posthoc_ema": {"durable",
        "config", "diffusion", "evaluation.verification", "training.checkpoint", "training.ema",
        "training.power_function",
    },
    "training.power_function": set(),
    "training.preview": {"config", "diffusion", "plots", "rng", "training.processes"},
    "training.processes": {"config"},
    "training.progress": set(),
    "training.resume": {"config", "training.checkpoint", "training.run_folder"},
    "training.run_folder": {"durable", "config", "training.checkpoint", "training.guard"},
    "training.scoring": {"data", "diffusion"},
    "training.publishing": {"training.guard"},
    "training.record": {"ddpm_hf", "config", "data", "training.tracking"},
    "training.saving": {"durable",
        "config", "data", "diffusion", "evaluation.verification", "training.checkpoint", "training.data_state",
        "training.earlier_pipeline", "training.ema", "training.guard", "training.posthoc_ema", "training.processes",
        "training.progress",
        "training.publishing", "training.record", "training.resume", "training.run_folder", "training.snapshot",
        "training.timestep_sampling", "training.tracking",
    },
    "training.setup": {"config", "data", "diffusion", "training.processes"},
    "training.snapshot": {"training.ema", "training.optimizer_state"},
    "training.summary": {"config", "data", "training.optim", "training.trainer", "unet"},
    "training.timestep_sampling": {"config", "rng"},
    "training.tracking": {"durable", "config", "redaction", "training.checkpoint"},
    "training.validation": {"config", "data", "rng", "training.objective", "training.processes"},
    "training.trainer": {"config", "data", "diffusion", "rng", "training"},
    "training.weighting": {"config"},
    "evaluation.__init__": set(),
    "evaluation.film": {"diffusion", "evaluation.image_shape", "plots"},
    "evaluation.image_shape": {"diffusion"},
    "evaluation.fingerprint": {"diffusion"},
    "evaluation.ranks": set(),
    "evaluation.neighbours": {"data", "evaluation.pixel_distance"},
    "evaluation.picture": {"evaluation.likelihood", "plots"},
    "evaluation.evaluate": {
        "data", "diffusion", "evaluation.fidelity", "evaluation.likelihood", "evaluation.metrics", "evaluation.ranks",
        "rng",
    },
    "evaluation.samples": {
        "durable", "diffusion", "evaluation.fingerprint", "evaluation.image_shape", "evaluation.ranks",
        "evaluation.sampling",
    },
    "evaluation.score": {
        "config", "data", "diffusion", "evaluation.evaluate", "evaluation.metrics", "evaluation.ranks",
        "evaluation.sampling",
    },
    "evaluation.chain": {"data", "diffusion"},
    "evaluation.feature_network": set(),
    "evaluation.features": {"evaluation.feature_network", "evaluation.inception"},
    "evaluation.kernel_error": {"evaluation.feature_network"},
    "evaluation.fidelity": {
        "data", "evaluation.feature_network", "evaluation.features", "evaluation.frechet", "evaluation.inception",
        "evaluation.kernel_error", "evaluation.metrics", "evaluation.references", "rng",
    },
    "evaluation.frechet": set(),
    "evaluation.inception": {"evaluation.feature_network"},
    "evaluation.likelihood": {"data", "diffusion", "evaluation.chain", "evaluation.ranks", "rng"},
    "evaluation.metrics": set(),
    "evaluation.pixel_distance": set(),
    "evaluation.recognition": {"evaluation.pixel_distance"},
    "evaluation.references": {"data", "evaluation.feature_network", "evaluation.frechet"},
    "evaluation.sampling": {"diffusion", "evaluation.film", "evaluation.image_shape", "rng"},
    "evaluation.second_moments": {"data", "diffusion", "evaluation.chain", "evaluation.ranks", "rng"},
    "evaluation.contents": {"diffusion", "redaction"},
    "evaluation.verification": {"diffusion", "durable", "evaluation.contents", "redaction", "rng"},
    "report": {"durable", "evaluation.recognition", "plots", "redaction"},
    "hub": {"config", "diffusion", "evaluation.metrics", "hub", "plots", "redaction"},
    "hub.background": {"config", "hub.push"},
    "hub.export": {
        "diffusion", "evaluation.sampling", "evaluation.verification", "hub.card_facts", "plots", "redaction", "report",
    },
    "hub.publish": {"hub.card", "hub.export", "hub.push"},
    "hub.push": {"redaction"},
    "commands": {
        "ddpm_hf", "commands", "config", "data", "diffusion", "durable", "evaluation", "hub", "plots", "redaction",
        "report", "rng", "training",
    },
    "commands.plot": {
        "commands.parser", "commands.plot_inputs", "config", "data", "diffusion", "durable", "plots", "redaction",
        "rng", "training",
    },
    "cli": {"ddpm_hf", "commands", "redaction"},
    "__main__": {"cli"},
    "__init__": {"config", "diffusion", "training.trainer"},
}  # fmt: skip

# Library -> where it may be imported.
HOMES_OF_LIBRARIES = {
    "accelerate": {"training"},
    "datasets": {"data"},
    "huggingface_hub": {"commands.folders", "data", "diffusion.reverse_variance", "hub", "pretrained"},
    "jinja2": {"hub"},
    "jsonargparse": {"config"},
    "matplotlib": {"evaluation.picture", "plots"},
    "scipy": {"training.noise"},
    "sklearn": {"evaluation.recognition"},
    "tensorboard": {"training.tracking"},
    "torch_fidelity": {"evaluation.fidelity", "evaluation.inception"},
    "trackio": {"training.tracking"},
    "transformers": {"evaluation.features"},
    "wandb": {"training.tracking"},
}
# Imported where they are used, so that what does not use them runs without them and starts quickly.
ONLY_INSIDE_FUNCTIONS = {
    "datasets", "matplotlib", "scipy", "sklearn", "tensorboard", "torch_fidelity", "trackio", "transformers", "wandb",
}  # fmt: skip
# The core travels with every checkpoint, to machines that have no more than this.
LIBRARIES_OF_THE_CORE = {
    "torch", "diffusers", "numpy", "PIL",
    "typing_extensions",  # comes with torch
    "huggingface_hub",  # comes with diffusers
}  # fmt: skip
WITHOUT_TORCH = {
    "__init__", "config", "evaluation.frechet", "evaluation.metrics", "evaluation.pixel_distance",
    "evaluation.recognition", "plots", "redaction", "report", "training.checkpoint",
}  # fmt: skip

TORCH_DRAWS = {
    "bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "randperm",
}  # fmt: skip
DRAWS = {f"torch.{name}" for name in TORCH_DRAWS} | {"diffusers.utils.torch_utils.randn_tensor"}
IN_PLACE_DRAWS = {
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_normal_", "kaiming_uniform_", "log_normal_",
    "normal_", "orthogonal_", "random_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_",
}  # fmt: skip
SEEDING = {"Generator", "RandomState", "SeedSequence", "default_rng", "manual_seed", "manual_seed_all", "set_seed"}

# Module -> draws from torch's global generator that are meant: layers initialise themselves from it, so the whole
# initialisation does, after rng.py has seeded it.
MAY_DRAW_GLOBALLY = {"unet": {"xavier_uniform_"}}


def name_of(path: Path) -> str:
    """Returns the name of a module inside the package; that of a package ends in __init__."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def parse(module: str) -> ast.Module:
    return parse_file(MODULES[module])


@functools.cache
def parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_in(module: str, homes: set[str]) -> bool:
    """Says whether a module is one of the homes or inside one."""
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def row_of(module: str) -> str | None:
    """Returns the row of MAY_IMPORT that counts for a module."""
    return max((row for row in MAY_IMPORT if is_in(module, {row})), key=len, default=None)


def targets(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Returns the full names of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = ["ddpm_hf", *module.split(".")[:-1]]
        base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
    inside = base.removeprefix("ddpm_hf").lstrip(".")
    submodules = [f"{inside}.{alias.name}".lstrip(".") for alias in node.names]
    return [f"ddpm_hf.{name}" if base.startswith("ddpm_hf") and name in MODULES else base for name in submodules]


def imports(module: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(module, node):
                yield target, node


def library_of(target: str) -> str:
    return target.split(".")[0]


def at_module_level(module: str) -> set[int]:
    """Returns the lines of imports that run when the module is imported."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types:
                continue
            yield node
            yield from statements([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])

    return {node.lineno for node in statements(parse(module).body)}


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    """Returns all calls with the full name of what is called, as far as the module's imports tell."""
    tree = parse(module)
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full_names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            yield ".".join([full_names.get(first, first), *rest]), node


def arguments(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg}


every_module = pytest.mark.parametrize("module", MODULES)


@every_module
def test_imports_only_point_downwards(module: str) -> None:
    row = row_of(module)
    assert row is not None, f"ddpm_hf.{module} has no row in MAY_IMPORT: say where it stands in the house"
    ours = {target.removeprefix("ddpm_hf.") for target, _ in imports(module) if target.startswith("ddpm_hf")}
    assert sorted(target for target in ours if not is_in(target, MAY_IMPORT[row])) == []


def test_the_architecture_document_shows_every_module_once() -> None:
    """A line of the house names modules first; the line of the package that they are in is above and further left."""
    document = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = document.split("```")[1].split("ddpm_hf/\n")[1].split("benchmarks/")[0]
    found, package = [], ""
    for indent, first, line in re.findall(r"^( +)(\S+)(.*)$", block, re.M):
        if first.endswith("/"):
            package = f"{first[:-1]}."
        elif len(indent) < 4:
            package = ""
        if first.endswith(".py"):
            others = re.match(r"((?: +\w+\.py)*)", line)[1].split()
            found += [f"{package}{name.removesuffix('.py')}" for name in (first, *others)]
    packages = {module for module in MODULES if module.endswith("__init__")} | {"__main__"}
    assert sorted(name for name in found if name != "__init__") == sorted(MODULES.keys() - packages)


@every_module
def test_libraries_are_imported_in_their_homes_only(module: str) -> None:
    strays = [
        f"line {node.lineno}: {target}"
        for target, node in imports(module)
        if not is_in(module, HOMES_OF_LIBRARIES.get(library_of(target), {module}))
    ]
    assert strays == []


@every_module
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    top = at_module_level(module)
    found = [target for target, node in imports(module) if node.lineno in top]
    assert [target for target in found if library_of(target) in ONLY_INSIDE_FUNCTIONS] == []


@every_module
def test_no_module_needs_torch_that_should_run_without(module: str) -> None:
    if is_in(module, WITHOUT_TORCH):
        assert [target for target, _ in imports(module) if library_of(target) in {"torch", "diffusers"}] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("diffusion.")])
def test_the_core_runs_without_the_rest_of_the_package(module: str) -> None:
    """diffusers finds imports with a regular expression: even a line of a docstring that looks like one counts."""
    libraries = {library_of(target) for target, _ in imports(module)} - set(sys.stdlib_module_names)
    assert libraries <= LIBRARIES_OF_THE_CORE | {"ddpm_hf"}
    absolute = re.findall(r"^\s*(?:from|import)\s+ddpm_hf\b.*", MODULES[module].read_text(encoding="utf-8"), re.M)
    assert absolute == []


def test_the_pipeline_imports_every_file_of_the_core_itself() -> None:
    """Of a local folder diffusers copies the files that pipeline.py names, not those that these name in turn."""
    files = {module for module in MODULES if module.startswith("diffusion.")}
    named = {target.removeprefix("ddpm_hf.") for target, _ in imports("diffusion.pipeline")}
    assert files - named == {"diffusion.__init__", "diffusion.pipeline"}


@every_module
def test_everything_random_takes_a_generator(module: str) -> None:
    allowed = MAY_DRAW_GLOBALLY.get(module, set())
    found = [
        f"line {call.lineno}: {name}"
        for name, call in calls(module)
        if (name in DRAWS or name.split(".")[-1] in IN_PLACE_DRAWS)
        and "generator" not in arguments(call)
        and name.split(".")[-1] not in allowed
    ]
    assert found == []


@every_module
def test_seeds_are_made_in_rng_only(module: str) -> None:
    if module == "rng":
        return
    found = [
        f"line {call.lineno}: {name}"
        for name, call in calls(module)
        if name.split(".")[-1] in SEEDING or name.startswith(("numpy.random.", "random."))
    ]
    assert found == []


@every_module
def test_modules_and_functions_can_be_read_at_once(module: str) -> None:
    num_lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert num_lines <= LONGEST_MODULE
    functions = [node for node in ast.walk(parse(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("module", ["ddpm_hf", "ddpm_hf.config", "ddpm_hf.plots", "ddpm_hf.report"])
def test_import_is_quick_and_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'sklearn', 'matplotlib'}} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_rules_catch_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that never fires is worth nothing: each of these lines breaks one."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import torch as t\nimport numpy as np\nimport datasets\n"
        "from ..training import trainer\n"
        "t.randn(3)\nx.normal_()\nt.manual_seed(0)\n"
        "np.random.rand()\n"
    )
    monkeypatch.setitem(MODULES, "diffusion.gaussian", bad)
    for rule in (
        test_imports_only_point_downwards,
        test_libraries_are_imported_in_their_homes_only,
        test_heavy_libraries_are_imported_inside_functions,
        test_the_core_runs_without_the_rest_of_the_package,
        test_everything_random_takes_a_generator,
        test_seeds_are_made_in_rng_only,
    ):
        with pytest.raises(AssertionError):
            rule("diffusion.gaussian")
