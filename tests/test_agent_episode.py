"""What experiments/agent_episode.py measures is what happens: an honest world, and a mind that
reads every byte.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

import sleepnet
from experiments.agent_episode import ACTION_TOKENS, Agent, Building, doubling, flatness, live

CONFIG = sleepnet.ModelConfig(vocab_size=256, pattern="AG", d_model=8, num_heads=2, window=64)


def test_who_reads_the_note_opens_every_door_and_who_guesses_does_not():
    """From the text alone; the same seed is the same day."""
    for seed in range(3):
        building = Building(doors=5, steps=40, seed=seed)
        first = observation = building.reset()
        codes = dict(re.findall(r"door (\d) code (\d)\.", first))
        assert len(codes) == 5
        rewards, done = [], False
        while not done:
            (door,) = re.findall(r"you stand before door (\d)", observation)
            observation, reward, done = building.step(codes[door])
            rewards.append(reward)
        assert rewards == [1.0] * 40
        assert building.step("x").reward == 0
        assert building.reset() == first == Building(doors=5, steps=40, seed=seed).reset()


def test_observations_have_one_length_so_that_steps_can_be_compared():
    building = Building(doors=8, steps=1000)
    building.reset()
    assert len({len(building.step("").observation) for _ in range(1000)}) == 1


def test_flatness_is_of_the_first_and_last_hundred():
    times_ms = [1.0] * 51 + [9.0] * 49 + [50.0] * 300 + [3.0] * 60 + [99.0] * 40
    assert flatness(times_ms) == 3.0


@pytest.mark.slow
def test_the_mind_of_an_agent_has_read_the_whole_day(monkeypatch):
    """Every observation and every action, and its size is that of a newborn."""
    session = sleepnet.Session(
        sleepnet.init_params(CONFIG, jax.random.key(0)), config=CONFIG, tokenizer="bytes"
    )
    size, building = session.state_bytes, Building(doors=2, steps=9)
    seen = []
    monkeypatch.setattr(
        building, "_ask", lambda ask=building._ask: seen.append(asked := ask()) or asked
    )
    day = list(live(Agent(session), building))
    note = len("door 0 code 0. ") * 2
    observed = note + sum(len(text) for text in seen[:9])
    assert [lived for *_, lived in day][-1] == observed + 9 * ACTION_TOKENS
    assert session.sleeps == (session.position - 1) // CONFIG.window
    assert session.state_bytes == size
    assert all(ms > 0 for ms, *_ in day)


@pytest.mark.slow
def test_attention_over_the_day_keeps_all_of_it_when_its_cache_doubles():
    """What it expects next is what a cache that was large enough from the start would expect."""
    small = dataclasses.replace(CONFIG, pattern="AA", window=16)
    params = sleepnet.init_params(small, jax.random.key(0))
    session = sleepnet.Session(params, config=small, tokenizer="bytes")
    make_room, text = doubling(params), "sixteen letters."
    for times in (1, 1, 6):  # the last is more than doubling once has room for
        session = make_room(session, times * len(text))
        session.feed(times * text)
    assert (session.config.window, session.position, session.sleeps) == (128, 128, 0)
    roomy = dataclasses.replace(small, window=128)
    expected = sleepnet.Session(params, config=roomy, tokenizer="bytes")
    expected.feed(8 * text)
    np.testing.assert_allclose(session.logits, expected.logits, rtol=1e-4, atol=1e-4)
