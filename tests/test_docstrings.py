"""Every public name says what it is, functions and classes that users call show it, and what they show is true."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import pytest

import gradflow as gf

NAMES = sorted(name for name in dir(gf) if not name.startswith("_") and not inspect.ismodule(getattr(gf, name)))
# What functions return or hold, and what is abstract: shown where it is made.
MADE = (
    "Claim Descent DescentStatus Distribution Entry Estimate Flow Influence Limit LimitStatus Loss Optimum Path "
    "Placement Progress Record STATUSES Sensitivity Status Teacher Verdict"
).split()
MODULES = sorted(module.name for module in pkgutil.iter_modules(gf.__path__) if module.name != "__main__")


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_explained_and_shown(name):
    public = getattr(gf, name)
    if name == "STATUSES":
        return
    assert inspect.getdoc(public)
    if name not in MADE:
        assert ">>> " in inspect.getdoc(public), f"{name} shows no example"


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(f"gradflow.{name}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # what users have
        found = doctest.testmod(module, extraglobs={"jax": jax})
    assert found.failed == 0


def test_a_wrong_example_is_noticed():
    def lies():
        """>>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(lies, "lies", globs={}):
        runner.run(test, out=lambda text: None)
    assert runner.summarize(verbose=False).failed == 1
