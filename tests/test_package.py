"""The package's face: names, docstrings, version."""

import ast
import inspect
import tomllib
from pathlib import Path

import pytest

import gradflow

PUBLIC = [name for name in dir(gradflow) if not name.startswith("_") and not inspect.ismodule(getattr(gradflow, name))]


def members(value):
    """Public methods and properties that a class defines itself."""
    for name, member in vars(value).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
            yield name, member


def documented(value, name, member):
    """Whether the method, or the one it overrides, has a docstring."""
    return any(getattr(vars(base).get(name), "__doc__", None) for base in value.__mro__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    value = getattr(gradflow, name)
    # A dataclass without a docstring is given its signature for one.
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"
    if inspect.isclass(value):
        bare = [member for member, method in members(value) if not documented(value, member, method)]
        assert bare == [], f"{name} has bare methods {bare}"


def test_names_that_are_imported_later_are_those_that_type_checkers_see():
    tree = ast.parse(Path(gradflow.__file__).read_text())
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {(node.module, alias.name, alias.asname) for node in seen.body for alias in node.names}
    later = gradflow._LATER
    assert found == {(f"gradflow.{module}", name, name) for module, names in later.items() for name in names}
    assert set(PUBLIC) & set(gradflow.__all__) >= {name for names in later.values() for name in names}


def test_modules_have_docstrings():
    for path in Path(gradflow.__file__).parent.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


def test_version_is_that_of_the_project():
    project = tomllib.loads((Path(gradflow.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert gradflow.__version__ == project["version"]


@pytest.mark.parametrize(
    "name",
    [
        *["ReluNetwork", "Dataset", "Teacher", "Uniform", "TruncatedNormal", "Histogram", "Exponential", "Logistic"],
        *["integrate", "Until", "Flow", "Status", "linear_regions", "knots", "sign_changes", "population_error"],
        *["max_switches", "Trial", "run_study", "replay", "estimate_probability"],
    ],
)
def test_promised_names_are_there(name):
    assert name in PUBLIC
