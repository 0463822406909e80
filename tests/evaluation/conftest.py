"""A tiny experiment: compiled in seconds."""

import jax
import pytest

import sleepnet
from sleepnet.config import EvaluationConfig, ModelConfig
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig


@pytest.fixture(scope="session")
def config():
    """Eight edges over windows of 6: the 16 tokens leave the first one short."""
    task = DepoConfig(nodes=8, hops=2, symbols=8, queries=3, window=6)
    return ExperimentConfig(
        model=ModelConfig(vocab_size=10, pattern="AG", d_model=16, num_heads=2, window=6, passes=3),
        task=task,
        evaluation=EvaluationConfig(examples=120, batch_size=50, streaming_examples=50),
    )


@pytest.fixture(scope="session")
def params(config):
    """Untrained."""
    return jax.jit(sleepnet.init_params, static_argnums=0)(config.model, jax.random.key(0))
