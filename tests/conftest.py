"""What every test runs under: eight virtual CPU devices, strict dtypes, patient hypothesis."""

import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
sys.path.insert(0, os.path.dirname(__file__))  # for the helpers `agreement` and `reference`

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Several tests train the same tiny model from the start: they share its compiled step.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="sleepnet-tests-"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
hypothesis.settings.register_profile("sleepnet", deadline=None)
hypothesis.settings.load_profile("sleepnet")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a sweep that the default run leaves out")
