"""Under JAX_DEBUG_NANS=1, by which users look for the first NaN of their own, any NaN that comes
out of a device is an error: none is ours. (Engine and rollout are tested beside their others.)"""

import jax
import numpy as np
import pytest
from minds import TINY, B, L, newborn, params, stream, woken

import sleepnet

LENGTHS = np.array([L, 2, 0], np.int32)


@pytest.fixture(autouse=True)
def nan_is_an_error():
    with jax.debug_nans(True):
        yield


def test_the_flag_is_heard():
    with pytest.raises(FloatingPointError):
        np.asarray(jax.numpy.log(-jax.numpy.ones(1)))


def test_rows_that_read_nothing_wake_and_sleep():
    """Beside full ones; and so they do in a `Decoder`, and in slices."""
    state = woken(TINY, length_B=LENGTHS)[1]
    sleepnet.wake(params(TINY), state, stream()[:, 0], config=TINY, length_B=[0] * B, logits="last")
    progress = sleepnet.begin_sleep(state, config=TINY)
    while not progress.done:
        progress = sleepnet.continue_sleep(params(TINY), progress, tokens=L)
    sleepnet.finish_sleep(progress, state)
    decoder = sleepnet.Decoder(params(TINY), newborn(TINY), config=TINY)
    decoder.read(stream()[:, 0], length_B=LENGTHS)
    decoder.rewind([3, 0, 0])
    decoder.wake([1, 2, 3])
    decoder.sleep()
    jax.block_until_ready(decoder.state)


@pytest.mark.parametrize("tokens", [1, L])
def test_a_session_scores_from_its_first_token(tokens):
    """Of which it knows no score: that is NaN in NumPy alone."""
    one = sleepnet.Session(params(TINY), config=TINY)
    nll_T = one.score(np.arange(tokens))
    assert np.isnan(nll_T).tolist() == [True] + [False] * (tokens - 1)
