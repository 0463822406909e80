"""Token by token with sleeps gives the scores of a rollout."""

import numpy as np
import pytest

from sleepnet import tasks
from sleepnet.evaluation.streaming import agreement, stream


@pytest.mark.parametrize("passes", [1, 3])
def test_streaming_is_rollout_over_padded_windows(config, params, passes):
    (batch,) = tasks.batches(tasks.make(config.task), "test", 50, num_batches=1)
    assert np.any(batch.length_W < config.model.window)
    agreed = agreement(params, config, passes)
    assert (agreed.passes, agreed.examples, agreed.equal_predictions) == (passes, 50, 1.0)
    assert agreed.max_nll > 0.5
    assert agreed.max_nll_difference <= 1e-5 * agreed.max_nll


def test_targets_that_are_no_tokens_are_refused(config, params):
    """Before anything is read: none is scored as another token."""
    task = tasks.make(config.task)
    (batch,) = tasks.batches(task, "test", 2, num_batches=1)
    for wrong in (-1, task.vocab_size):
        targets_WL = np.where(batch.mask_WL, np.int32(wrong), 0)
        with pytest.raises(ValueError, match=rf"target {wrong} at .* outside 0\.\."):
            stream(
                params, batch._replace(targets_WL=targets_WL),
                model=config.model, window_passes=task.window_passes(3),
            )  # fmt: skip


def test_nothing_is_said_where_nothing_is_scored(config, params):
    task = tasks.make(config.task)
    (batch,) = tasks.batches(task, "test", 50, num_batches=1)
    nll_BWL, prediction_BWL = stream(
        params, batch, model=config.model, window_passes=task.window_passes(3)
    )
    assert np.all(nll_BWL[~batch.mask_WL] == 0)
    assert np.all(prediction_BWL[~batch.mask_WL] == -1)
    assert np.all(nll_BWL[batch.mask_WL] > 0)
    assert np.all(prediction_BWL[batch.mask_WL] >= 0)
