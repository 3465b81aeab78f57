"""Every test runs in float64, with JAX's strictest promotion rules.

What has been compiled is kept in pytest's cache folder: for the other processes of the run, for those that tests start,
and for the next run. Most of the time still goes into compiling, and on the CPU XLA's older fusion emitters without
optimisation compile in three fifths of the time (a first flow takes 8.1 instead of 13.7 s): they are used unless slow
tests are asked for, or `XLA_FLAGS` is set, if only to an empty string. What is so compiled is slow, and rounded
otherwise: slow tests run what users run.
"""

import gc
import os

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    if config.getoption("markexpr") == "not slow":  # for this process, its notebooks and those that tests start
        flags = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_backend_optimization_level=0"
        os.environ.setdefault("XLA_FLAGS", flags)
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """Compiled programs of one file are of no use to the next, and a process may map no more than 65,530 regions."""
    yield
    jax.clear_caches()
    gc.collect()
