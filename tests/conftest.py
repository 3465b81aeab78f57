"""Every test runs in float64, with JAX's strictest promotion rules."""

import gc

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """Compiled programs of one file are of no use to the next, and a process may map no more than 65,530 regions."""
    yield
    jax.clear_caches()
    gc.collect()
