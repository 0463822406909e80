"""Depo's labels, splits and floor, against a solver that reads nothing but tokens."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleepnet.tasks import Depo, DepoConfig
from sleepnet.tasks.depo import cycle_identity
from sleepnet.tasks.splits import split_of

LAPTOP = DepoConfig(nodes=12, min_nodes=6, symbols=12, queries=6, hops=5, window=8)
PAPER = DepoConfig(nodes=75, min_nodes=17, hops=16, symbols=50, max_word=2, queries=10, window=75)


class Reader:
    """Knows the language but no example: how tokens make words, edges and questions."""

    def __init__(self, config: DepoConfig):
        self.config = config
        self.long = config.max_word > 1
        symbols = config.symbols * (2 if self.long else 1)
        self.hops = {symbols + k - 1: k for k in range(1, config.hops + 1)}
        self.mark = symbols + config.hops

    def words(self, tokens):
        """Splits a stream into words: a word ends at a token of the upper half of the symbols."""
        words, word = [], ()
        for token in tokens:
            word += (token,)
            if not self.long or token >= self.config.symbols:
                words.append(word)
                word = ()
        assert word == (), "the stream ends inside a word"
        return words

    def successors(self, context):
        words = self.words(context)
        successor = dict(zip(words[::2], words[1::2], strict=True))
        assert len(successor) * 2 == len(words), "a node has two edges"
        return successor

    def labels(self, successor, window):
        """(position, token) -> what must be predicted there, and the hops, for one window."""
        position = 0
        while position < len(window):
            if self.long:
                hop, position = window[position], position + 1
                end = window.index(self.mark, position)
                (start,) = self.words(window[position:end])
                scored = end
            else:
                start, hop = (window[position],), window[position + 1]
                scored = position + 1
            answer, left = start, self.hops[hop]
            while left:
                answer, left = successor[answer], left - 1
            assert tuple(window[scored + 1 : scored + len(answer)]) == answer[:-1]
            yield start, scored, answer, self.hops[hop]
            position = scored + len(answer)


def context_of(task: Depo, example) -> list[int]:
    rows = zip(example.tokens_WL, example.length_W, strict=True)
    windows = [row[:length].tolist() for row, length in rows][: task.num_context_windows]
    return [token for window in windows for token in window]


def check_labels(task: Depo, split: str, indices):
    reader = Reader(task.config)
    for index in indices:
        example = task.example(split, index)
        successor = reader.successors(context_of(task, example))
        labels = np.zeros((4, *example.tokens_WL.shape), np.int32)  # target, mask, depth, answer
        labels[3] = -1
        starts = []
        for w in range(task.num_context_windows, task.num_windows):
            window = example.tokens_WL[w, : example.length_W[w]].tolist()
            for start, scored, answer, hops in reader.labels(successor, window):
                for i, token in enumerate(answer):
                    labels[:, w, scored + i] = token, True, hops, len(starts)
                starts.append(start)
        expected = example.targets_WL, example.mask_WL, example.depth_WL, example.answer_WL
        np.testing.assert_array_equal(labels, expected, err_msg=f"{split} {index}")
        assert len(set(starts)) == len(starts) == min(len(successor), task.config.queries)


def cycle_of(task: Depo, example) -> tuple:
    """The cycle from its least word on, checked to be one cycle of at least 3 nodes."""
    successor = Reader(task.config).successors(context_of(task, example))
    cycle = [min(successor)]
    while (word := successor[cycle[-1]]) != cycle[0]:
        cycle.append(word)
    assert len(cycle) == len(successor) >= 3
    return tuple(cycle)


@pytest.mark.parametrize(
    ("config", "split", "count"),
    [(LAPTOP, "train", 4500), (LAPTOP, "test", 3000), (PAPER, "train", 2000), (PAPER, "test", 600)],
    ids=["laptop-train", "laptop-test", "paper-train", "paper-test"],
)
def test_every_label_is_what_walking_the_edges_gives(config, split, count):
    check_labels(Depo(config), split, range(count))


@st.composite
def configs(draw):
    nodes = draw(st.integers(6, 14))
    max_word = draw(st.integers(1, 3))
    window = draw(st.integers(2 * max_word + 1, 30))
    min_nodes = draw(st.integers(5, nodes))
    return DepoConfig(
        nodes=nodes,
        min_nodes=min_nodes,
        hops=draw(st.integers(1, min_nodes - 1)),
        symbols=draw(st.integers(14, 20)),
        min_word=draw(st.integers(1, max_word)),
        max_word=max_word,
        queries=draw(st.integers(1, nodes)),
        window=window,
        curriculum=draw(st.sampled_from((0, 10))),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=60, deadline=None)
@given(config=configs(), split=st.sampled_from(("train", "test")))
def test_labels_hold_for_any_config(config, split):
    check_labels(Depo(config), split, range(5))


def test_a_test_cycle_always_has_all_nodes_and_train_sizes_follow_their_weights():
    task = Depo(LAPTOP)
    sizes = [len(cycle_of(task, task.example("test", i))) for i in range(50)]
    assert set(sizes) == {LAPTOP.nodes}
    count = 4000
    drawn = Counter(task.example("train", i).length_W[:3].sum() // 2 for i in range(count))
    weights = {n: 1 / (n + LAPTOP.nodes**0.5) for n in range(LAPTOP.min_nodes, LAPTOP.nodes + 1)}
    assert set(drawn) == set(weights)
    for n, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(drawn[n] / count - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_words_are_all_used_where_there_are_just_enough_and_lengths_are_uniform_elsewhere():
    task = Depo(DepoConfig(nodes=6, symbols=2, min_word=1, max_word=2, queries=2, window=24))
    assert all(len(set(cycle_of(task, task.example("train", i)))) == 6 for i in range(20))
    # Words are so many here that hardly any is drawn twice.
    many = Depo(DepoConfig(nodes=8, symbols=5000, max_word=3, queries=2, window=24, hops=2))
    lengths = Counter(
        len(word) for i in range(500) for word in cycle_of(many, many.example("train", i))
    )
    for length in (1, 2, 3):
        assert abs(lengths[length] / 4000 - 1 / 3) < 0.03


def test_the_neighbour_of_a_word_says_nothing_about_its_length():
    # Nearly all words are used, so the few short ones would come first if drawing set the order.
    task = Depo(DepoConfig(nodes=30, symbols=3, max_word=3, queries=2, window=30, hops=2))
    pairs, expected = 0, 0.0
    for i in range(300):
        is_short = [len(word) == 1 for word in cycle_of(task, task.example("train", i))]
        pairs += sum(a and b for a, b in zip(is_short, is_short[1:] + is_short[:1], strict=True))
        expected += sum(is_short) * (sum(is_short) - 1) / (30 - 1)
    assert abs(pairs - expected) < 4 * expected**0.5


@pytest.mark.parametrize("config", [LAPTOP, PAPER], ids=["laptop", "paper"])
def test_train_and_test_never_share_a_cycle(config):
    task = Depo(config)
    train = {cycle_of(task, task.example("train", i)) for i in range(1500)}
    test = {cycle_of(task, task.example("test", i)) for i in range(500)}
    assert not train & test


def test_every_cycle_of_six_nodes_is_in_exactly_one_split_whatever_the_seed():
    everything = {(0, *rest) for rest in itertools.permutations(range(1, 6))}
    expected = {split: set() for split in ("train", "test")}
    for cycle in everything:
        expected[split_of(cycle_identity(list(cycle)), 0.2)].add(cycle)
    for seed in (0, 1):
        task = Depo(DepoConfig(nodes=6, symbols=6, queries=2, test_fraction=0.2, seed=seed))
        for split, count in (("train", 1500), ("test", 500)):
            cycles = [cycle_of(task, task.example(split, i)) for i in range(count)]
            assert {tuple(word for (word,) in cycle) for cycle in cycles} == expected[split]
    assert len(expected["train"]) + len(expected["test"]) == 120
    assert 0.1 < len(expected["test"]) / 120 < 0.3


@given(st.permutations(range(7)), st.integers(0, 6))
def test_the_identity_of_a_cycle_is_that_of_its_rotations_alone(cycle, start):
    assert cycle_identity(cycle[start:] + cycle[:start]) == cycle_identity(cycle)
    assert cycle_identity(cycle[::-1]) != cycle_identity(cycle)


def test_the_split_is_pinned_for_ever():
    drawn = [split_of(cycle_identity([0, 1, *p]), 0.5) for p in itertools.permutations((2, 3, 4))]
    assert drawn == ["train", "test", "train", "train", "test", "test"]


def test_hops_are_uniform_in_train_and_over_test_hops_in_test():
    task = Depo(DepoConfig(nodes=8, hops=6, test_hops=(2, 5)))
    for split, choices in (("train", range(1, 7)), ("test", (2, 5))):
        examples = (task.example(split, i) for i in range(1000))
        asked = Counter(k for e in examples for k in e.depth_WL[e.mask_WL].tolist())
        p, count = 1 / len(choices), 8000
        assert set(asked) == set(choices)
        for k in choices:
            assert abs(asked[k] / count - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_the_curriculum_opens_hops_one_by_one_and_only_in_training():
    task = Depo(DepoConfig(hops=4, curriculum=400))
    largest = np.array([task.example("train", i).depth_WL.max() for i in range(600)])
    bound = np.minimum(4, 1 + np.arange(600) // 100)
    assert (largest <= bound).all()
    for start in range(0, 600, 100):
        assert largest[start : start + 100].max() == bound[start]
    assert max(task.example("test", i).depth_WL.max() for i in range(5)) == 4


def test_a_short_stream_leaves_the_first_windows_short_or_empty():
    task = Depo(DepoConfig(nodes=12, min_nodes=5, symbols=12, window=8, hops=4))
    assert task.num_context_windows == 3
    for index in range(100):
        *context, _, _ = task.example("train", index).length_W.tolist()
        tokens = sum(context)
        expected = {10: [0, 2, 8], 12: [0, 4, 8], 14: [0, 6, 8], 16: [0, 8, 8], 18: [2, 8, 8]}
        assert context == expected.get(tokens, [tokens - 16, 8, 8])


def test_paper_sizes():
    task = Depo(PAPER)
    assert task.num_context_windows == 4
    assert task.num_windows == 5
    assert task.vocab_size == 2 * 50 + 16 + 1
    assert task.scored_per_window == (0, 0, 0, 0, 20)
    examples = [task.example("test", i) for i in range(50)]
    assert max(e.length_W[-1] for e in examples) <= 60
    assert max(e.length_W[:-1].sum() for e in examples) <= 300


def guess_scores(task: Depo, depth: int, count: int, guess):
    """(right answers, exact examples) as lists of bools, for single-token words."""
    answers, exact = [], []
    for index in range(count):
        example = task.example("test", index)
        asked = np.argwhere(example.mask_WL)
        starts = [int(example.tokens_WL[w, position - 1]) for w, position in asked]
        right = [
            guess(number, starts) == example.targets_WL[w, position]
            for number, (w, position) in enumerate(asked)
            if example.depth_WL[w, position] == depth
        ]
        answers += right
        if right:
            exact.append(all(right))
    return answers, exact


def within_four_errors(outcomes, p):
    return abs(np.mean(outcomes) - p) < 4 * (p * (1 - p) / len(outcomes)) ** 0.5


def all_cycles(nodes):
    """Every successor map that is one cycle through all nodes."""
    for successor in itertools.permutations(range(nodes)):
        node, seen = 0, set()
        while node not in seen:
            seen.add(node)
            node = successor[node]
        if len(seen) == nodes:
            yield successor


def walk(successor, start, hops):
    for _ in range(hops):
        start = successor[start]
    return start


@pytest.mark.parametrize(
    ("nodes", "queries", "depth"), [(5, 5, 2), (6, 2, 3), (6, 4, 3), (4, 4, 2)]
)
def test_the_exact_floor_is_the_best_joint_guess_over_all_cycles(nodes, queries, depth):
    """Half-way round (6 nodes, 3 hops) two answers give each other away."""
    task = Depo(DepoConfig(nodes=nodes, symbols=nodes, hops=3, queries=queries))
    cycles = list(all_cycles(nodes))
    scores = []
    for asked in itertools.product(task.depths, repeat=queries):
        starts = [start for start in range(queries) if asked[start] == depth]
        if starts:
            ends = Counter(tuple(walk(c, start, depth) for start in starts) for c in cycles)
            scores.append(max(ends.values()) / len(cycles))
    assert task.floor(depth).exact == pytest.approx(np.mean(scores), rel=1e-12)


def test_guessing_some_other_node_scores_the_floor():
    task = Depo(DepoConfig(nodes=6, symbols=6, hops=3, queries=6))
    rng = np.random.default_rng(0)

    def guess(number, starts):
        return rng.choice([node for node in range(6) if node != starts[number]])

    answers, _ = guess_scores(task, depth=2, count=2500, guess=guess)
    assert within_four_errors(answers, task.floor(2).answer)


def test_the_exact_floor_of_many_nodes_is_not_known():
    assert Depo(DepoConfig(nodes=12, symbols=12)).floor(2).exact is None


def test_who_reads_the_questions_alone_reaches_the_floor_even_with_more_words_than_nodes():
    task = Depo(DepoConfig(nodes=8, symbols=200, hops=2, queries=8))
    answers, _ = guess_scores(
        task, depth=1, count=800, guess=lambda number, starts: starts[number - 1]
    )
    assert within_four_errors(answers, task.floor(1).answer)
