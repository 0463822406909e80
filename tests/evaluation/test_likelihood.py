"""The likelihood of text, of models whose score is known without running them."""

import dataclasses
import json
import math

import corpora
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sleepnet
from sleepnet import tasks
from sleepnet.config import EvaluationConfig, ModelConfig
from sleepnet.cycle.rollout import Rollout
from sleepnet.evaluation import likelihood, markdown, record, streaming
from sleepnet.evaluation.accuracy import evaluate
from sleepnet.evaluation.likelihood import evaluate_text
from sleepnet.evaluation.streaming import agreement
from sleepnet.experiment import ExperimentConfig


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    task = corpora.text_config(tmp_path_factory.mktemp("corpus"))
    return ExperimentConfig(
        model=ModelConfig(vocab_size=257, pattern="G", d_model=8, num_heads=1, window=16, passes=2),
        task=task,
        evaluation=EvaluationConfig(
            examples=10**6, batch_size=8, passes=(2,), streaming_examples=6
        ),
    )


@pytest.fixture(scope="module")
def text_params(text):
    """Untrained."""
    return jax.jit(sleepnet.init_params, static_argnums=0)(text.model, jax.random.key(0))


def test_equal_logits_cost_the_logarithm_of_the_vocabulary(text, text_params):
    """On every token of the split once, however many examples are asked for."""
    *by_window, overall = evaluate_text(jax.tree.map(jnp.zeros_like, text_params), text, passes=2)
    size = sum(len(document.encode()) for document in corpora.TEXTS["test"])
    assert (overall.tokens, overall.depth) == (size, None)
    assert overall.loss == pytest.approx(math.log(257))
    assert overall.perplexity == pytest.approx(257)
    assert overall.bits_per_byte == pytest.approx(math.log2(257))  # a byte is a token here
    assert overall.lost_bytes == 0
    assert overall.loss_high - overall.loss_low < 1e-5
    examples = [tasks.make(text.task).example("test", i) for i in range(overall.examples)]
    for result in by_window:
        here = [(e.depth_WL == result.depth).sum() for e in examples]
        assert (result.tokens, result.examples) == (sum(here), np.count_nonzero(here))
    assert sum(result.tokens for result in by_window) == size


def test_the_mean_is_over_tokens_of_all_windows(text, text_params):
    *by_window, overall = evaluate_text(text_params, text, passes=2)
    total = sum(result.loss * result.tokens for result in by_window)
    assert overall.loss == pytest.approx(total / overall.tokens)
    assert overall.loss_low < overall.loss < overall.loss_high
    assert 0 <= overall.accuracy < 0.1


def test_streaming_is_rollout_where_rows_begin_anew(text, text_params):
    """Documents end and begin at windows in the middle of the rows."""
    (batch,) = tasks.batches(tasks.make(text.task), "test", 6, num_batches=1)
    assert batch.reset_W[:, 1:].any()
    agreed = agreement(text_params, text)
    assert (agreed.examples, agreed.equal_predictions) == (6, 1.0)
    assert agreed.max_nll_difference <= 1e-5 * agreed.max_nll


def test_streaming_takes_no_row_of_a_small_split_twice(text, monkeypatch):
    """Of models that need no computing: how often tokens agree counts every row once."""
    many = dataclasses.replace(text.evaluation, streaming_examples=1000)

    def scores(params, batch, **_):
        return np.zeros(batch.tokens_WL.shape), np.zeros(batch.tokens_WL.shape)

    monkeypatch.setattr(streaming, "compiled_score", lambda *a, **k: Rollout(*scores(*a), None))
    monkeypatch.setattr(streaming, "stream", scores)
    rows = tasks.make(text.task).packing("test").rows
    assert agreement({}, dataclasses.replace(text, evaluation=many)).examples == rows < 1000


def test_the_record_of_a_text_run_is_a_table_of_losses(text, text_params):
    measured = record.measure(text_params, record.widen(text), step=1, latency=False)
    assert [(r["passes"], r["depth"]) for r in measured["results"]] == [
        (2, depth) for depth in (1, 2, 3, 4, None)
    ]
    table = markdown.record_table(measured)
    for heading in ("nats per token", "perplexity", "bits per byte", "window 4"):
        assert heading in table
    assert f"{measured['results'][-1]['bits_per_byte']:.4f}" in table


@pytest.mark.parametrize("nats", [709.0, 1000.0, math.inf, math.nan])
def test_a_hopeless_model_is_measured_to_the_end(text, monkeypatch, tmp_path, nats):
    """Its perplexity may be beyond float64: all other figures stand in a file that is JSON."""

    def hopeless(params, batch, **_):
        shape = batch.tokens_WL.shape
        return Rollout(np.where(batch.mask_WL, nats, 0.0), np.zeros(shape, int), None)

    def streamed(params, batch, **_):
        return hopeless(params, batch).nll_BWL, np.zeros(batch.tokens_WL.shape, int)

    for module in (likelihood, streaming):
        monkeypatch.setattr(module, "compiled_score", hopeless)
    monkeypatch.setattr(streaming, "stream", streamed)
    record.save(tmp_path, record.measure({}, record.widen(text), step=1, latency=False))
    json.loads((tmp_path / record.FILE).read_text(), parse_constant=pytest.fail)
    stored = record.load(tmp_path, text)
    overall = stored["results"][-1]
    assert overall["loss"] == pytest.approx(nats, nan_ok=True)
    assert overall["perplexity"] == pytest.approx(
        math.exp(709) if nats == 709 else nats if math.isnan(nats) else math.inf, nan_ok=True
    )
    assert 0 <= overall["accuracy"] <= 1 and overall["tokens"] > 0
    assert stored["agreement"]["max_nll"] == pytest.approx(nats, nan_ok=True)
    assert markdown.record_table(stored).count("|") > 20


@pytest.mark.parametrize(("lost", "said"), [(2000, "2,000 bytes"), (None, "an unknown number of")])
def test_bits_per_byte_are_not_stated_of_text_that_is_lost(
    text, text_params, monkeypatch, lost, said
):
    """A tokenizer that drops what is hard to predict would seem to be better."""
    whole = evaluate_text(text_params, text, passes=2)
    monkeypatch.setattr(tasks.Text, "lost_bytes", lambda *_: lost)
    for result, one in zip(evaluate_text(text_params, text, passes=2), whole, strict=True):
        assert (result.bits_per_byte, result.lost_bytes, result.loss) == (None, lost, one.loss)
    brief = dataclasses.replace(text.evaluation, streaming_examples=0)
    measured = record.measure(
        text_params, dataclasses.replace(text, evaluation=brief), step=1, latency=False
    )
    table = markdown.record_table(measured)
    assert f"Bits per byte are not stated: the tokens do not determine {said}" in table


def test_neither_measure_takes_the_others_task(text, text_params, config, params):
    with pytest.raises(ValueError, match="only questions have answers by depth; got text"):
        evaluate(text_params, text, passes=2)
    with pytest.raises(ValueError, match="only text has a likelihood by window; got depo"):
        evaluate_text(params, config, passes=2)
