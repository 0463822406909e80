"""What every test runs under: eight virtual CPU devices, strict dtypes, patient hypothesis."""

import gc
import os
import signal
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
sys.path.insert(0, os.path.dirname(__file__))  # for the helpers `agreement` and `reference`

import hypothesis
import jax
import pytest
import waiting

from launch.common.ports import reserved_port

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
hypothesis.settings.register_profile(
    "sleepnet", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("sleepnet")


# Compiling is most of the suite's time, and LLVM's optimizations are two thirds of that. They
# change rounding at most: tests for which that matters are marked `optimized`.
QUICK = (
    "--xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def pytest_addoption(parser):
    parser.addoption("--optimize", action="store_true", help="compile with XLA's optimizations")


def pytest_configure(config):
    if not config.getoption("--optimize"):
        os.environ["XLA_FLAGS"] += f" {QUICK}"  # also of child processes
    # Shells start what is to run in the background with SIGINT ignored, and programs inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Compiling is most of the suite's time: tests, and the next run, share compiled programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))  # of child processes
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(autouse=True)
def no_program_is_left_running():
    yield
    waiting.end_programs()


@pytest.fixture
def port():
    """A port that no other program is given while the test runs."""
    with reserved_port() as number:
        yield number


@pytest.fixture
def no_garbage():
    """What earlier tests have left is gone, so that none of it goes while arrays are counted."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
