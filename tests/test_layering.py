"""The floor plan: imports go one way, and each outside library has its room."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradflow

PACKAGE = Path(gradflow.__file__).parent
# A module may import from those before it.
ORDER = (
    "length network loss distribution piecewise data teacher sites lift slow clarke origin crossing events "
    "rosenbrock cones barrier polish program certificate undefined implicit limit outcome hybrid course trace "
    "saltation sensitivity flow descent closed_form two_switches optimum influence placement theory record trial "
    "lane engine statistics archive store watch dispatch study claim scaling table design style flow_plot "
    "study_plot sweep_plot animation plot __main__"
).split()
EVERYWHERE = {"equinox", "jax", "jaxtyping", "numpy"}
ROOMS = {
    "diffrax": {"course", "flow", "hybrid", "rosenbrock", "sensitivity"},
    "optax": {"descent", "placement"},
    "h5netcdf": {"archive"},
    "h5py": {"archive"},
    "xarray": {"archive", "store", "study", "claim", "scaling", "table", "sweep_plot"},
    "scipy": {"statistics"},
    "matplotlib": {"style", "flow_plot", "study_plot", "sweep_plot", "animation", "__main__"},
    "tqdm": {"__main__"},
    "argparse": {"__main__"},
}
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
rooms = pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])


def imports(source: str) -> set[str]:
    """Every module that `source` imports, anywhere in it, by its dotted name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "gradflow" else {node.module}
            )
    return found


def own(source: str) -> set[str]:
    return {name.split(".")[1] for name in imports(source) if name.startswith("gradflow.")}


def outside(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)} - {"gradflow"}


def test_the_walls_can_be_felt():
    inside = "def f():\n    from gradflow.flow import integrate\n    from gradflow import plot\n    import scipy.stats"
    source = f"import jax\n{inside}"
    assert own(source) == {"flow", "plot"} and outside(source) == {"jax", "scipy"}


@rooms
def test_imports_go_one_way(name):
    assert name in ORDER, "a new module needs its place in ORDER"
    below = set(ORDER[: ORDER.index(name)])
    assert own(MODULES[name].read_text()) <= below


@rooms
def test_outside_libraries_stay_in_their_rooms(name):
    for library in outside(MODULES[name].read_text()):
        if library in ROOMS:
            assert name in ROOMS[library], f"{library} belongs to {ROOMS[library]}"
        else:
            assert library in EVERYWHERE or library in sys.stdlib_module_names, f"{library} has no room"


def test_the_package_itself_only_gathers_names():
    source = MODULES["__init__"].read_text()
    assert own(source) <= set(ORDER) - {"plot", "__main__"} and outside(source) == {"importlib", "typing"}


def test_plot_is_imported_by_the_command_line_alone():
    assert {name for name, path in MODULES.items() if "plot" in own(path.read_text())} <= {"__main__"}


def test_rooms_are_small_and_flat():
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 400, name
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_only_the_public_jax_api_is_used():
    for name, path in MODULES.items():
        for module in imports(path.read_text()):
            assert "._src" not in module and not module.startswith(("jax.interpreters", "jaxlib")), (name, module)


def test_lengths_that_may_vanish_have_a_derivative():
    """`length` is the only place for `hypot` of two unknowns, whose derivative at 0 may be NaN."""
    for name, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in (call for call in calls if ast.unparse(call.func).endswith(("hypot", "linalg.norm"))):
            assert name == "length" or ast.unparse(call.args[0]) == "1", f"{name}: {ast.unparse(call)}"


def test_importing_changes_no_setting_and_starts_no_device():
    """In a fresh interpreter. With an unknown platform, anything that touched a device would raise."""
    script = """
import json, sys, warnings
import jax
before = dict(jax.config.values)
warnings.simplefilter("error")
import gradflow
modules = sorted({name.split(".")[0] for name in sys.modules})
[getattr(gradflow, name) for name in dir(gradflow)]
changed = [name for name, value in jax.config.values.items() if name not in before or before[name] != value]
print(json.dumps([changed, modules]))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "no_such_platform"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    changed, modules = json.loads(result.stdout)
    assert changed == []
    assert "gradflow" in modules and not {"matplotlib", "xarray", "h5py"} & set(modules)
