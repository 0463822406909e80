"""What every test runs under: eight virtual CPU devices, strict dtypes, patient hypothesis."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
sys.path.insert(0, os.path.dirname(__file__))  # for the helpers `agreement` and `reference`

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
hypothesis.settings.register_profile("sleepnet", deadline=None)
hypothesis.settings.load_profile("sleepnet")


def pytest_configure(config):
    # Compiling is most of the suite's time: tests, and the next run, share compiled programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))  # of child processes
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
