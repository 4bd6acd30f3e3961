"""The frame of the repository: walls between its parts, pins, and what guards the publishing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "bnlib").rglob("*.py"))
LIGHT = [m for m in MODULES if m.relative_to(ROOT).parts[1] in ("__init__.py", "scratch", "data")]


def name_of(module):
    return str(module.relative_to(ROOT))


def imported(module):
    """List the modules that a module imports, anywhere in it, by their full names."""
    return names_in(ast.parse(module.read_text("utf-8")), module)


def imported_at_once(module):
    """List the modules that a module imports when it is imported itself."""
    tree = ast.parse(module.read_text("utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    statements = [node for node in tree.body if not isinstance(node, functions)]
    return names_in(ast.Module(statements, []), module)


def names_in(tree, module):
    package = module.relative_to(ROOT).parent.parts
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def inside(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


class TestWalls:
    @pytest.mark.parametrize("module", MODULES, ids=name_of)
    def test_only_the_book_knows_the_book(self, module):
        if module.is_relative_to(ROOT / "bnlib/book"):
            return
        assert [name for name in imported(module) if inside(name, "bnlib.book")] == []

    @pytest.mark.parametrize("module", LIGHT, ids=name_of)
    def test_scratch_and_data_need_numpy_alone(self, module):
        allowed = (*sys.stdlib_module_names, "numpy", "bnlib.scratch", "bnlib.data")
        names = imported_at_once(module)
        if (
            module.name == "compiled.py"
        ):  # which `fast` imports when it is called, if there is Numba
            names.remove("numba.njit")
        assert [name for name in names if not inside(name, *allowed)] == []
        assert "bnlib.scratch.compiled" not in names
        heavy = ("torch", "matplotlib", "IPython", "bnlib.nn")
        assert [name for name in imported(module) if inside(name, *heavy)] == []


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_what_is_public_is_documented(module):
    tree = ast.parse(module.read_text("utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    definitions = [tree, *tree.body, *(node for c in classes for node in c.body)]
    kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    documented = [node for node in definitions if isinstance(node, kinds)]
    names = [
        getattr(node, "name", "the module") for node in documented if not ast.get_docstring(node)
    ]
    assert [name for name in names if not name.startswith("_")] == []


def requirements(file):
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


class TestPins:
    pins = requirements("requirements.txt")

    def test_each_package_is_pinned_to_one_version(self):
        assert all(re.fullmatch("==[^=*,]+", str(pin.specifier)) for pin in self.pins)
        names = [canonicalize_name(pin.name) for pin in self.pins]
        assert sorted(set(names)) == sorted(names)

    @pytest.mark.parametrize("wanted", requirements("requirements.in"), ids=str)
    def test_what_is_asked_for_is_pinned(self, wanted):
        self.assert_pinned(wanted)

    def test_the_pins_satisfy_the_library(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        extras = project["optional-dependencies"].values()
        for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
            wanted = Requirement(line)
            if wanted.name != project["name"]:
                self.assert_pinned(wanted)

    def assert_pinned(self, wanted):
        name = canonicalize_name(wanted.name)
        (pin,) = (pin for pin in self.pins if canonicalize_name(pin.name) == name)
        assert wanted.specifier.contains(str(pin.specifier).removeprefix("=="), prereleases=True)


class TestHosting:
    @pytest.fixture
    def guard(self):
        """Return the shell command of publish.yml that looks for the address."""
        workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text("utf-8"))
        steps = workflow["jobs"]["build"]["steps"]
        names = [step.get("name", "") for step in steps]
        guard = next(i for i, name in enumerate(names) if name.startswith("Refuse to publish"))
        build = next(i for i, step in enumerate(steps) if step.get("run") == "make book")
        assert guard < build
        return steps[guard]["run"]

    def publish(self, guard, folder, url):
        config = (ROOT / "_config.yml").read_text("utf-8")
        config, count = re.subn(r"(?m)^(  url: ).*$", rf"\g<1>{url}", config)
        assert count == 1
        (folder / "_config.yml").write_text(config)
        shell = ["bash", "-e", "-o", "pipefail", "-c", guard]  # as the workflow runs it
        return subprocess.run(shell, cwd=folder, text=True, capture_output=True)

    def test_a_book_without_an_address_is_not_published(self, guard, tmp_path):
        result = self.publish(guard, tmp_path, "https://github.com/OWNER/batchnorm-book")
        assert (result.returncode, result.stdout.count("\n"), result.stderr) == (1, 1, "")
        assert "make repository URL=" in result.stdout

    def test_a_book_with_an_address_is(self, guard, tmp_path):
        result = self.publish(guard, tmp_path, "https://github.com/ada/batch-norm")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def test_the_check_runs_the_command_of_the_readme(self):
        script = ROOT / ".ci/run"
        assert os.access(script, os.X_OK)
        lines = script.read_text("utf-8").splitlines()
        assert lines.index("make test") < lines.index("make book")
        assert "export REQUIRE_CHROMIUM=1" in lines
        assert "make test" in (ROOT / "README.md").read_text("utf-8")
        check = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text("utf-8"))
        steps = check["jobs"]["check"]["steps"]
        assert [step for step in steps if ".ci/run" in step.get("run", "")]
