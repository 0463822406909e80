"""Depo: a cycle told as shuffled edges, then "which node is k hops from here?"."""

import dataclasses
import functools
import itertools
import math

import numpy as np

from sleepnet.config import checks
from sleepnet.config.checks import FOLLOWS, MAX_SEED, ConfigError
from sleepnet.tasks.base import Floor, QuestionTask
from sleepnet.tasks.layout import Content, Layout, Question, cut_right_aligned
from sleepnet.tasks.splits import draw_in_split, generator
from sleepnet.tasks.words import Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepoConfig:
    """Depo: a directed cycle told as shuffled edges, then questions "k hops from here?".

    A context of `nodes` edges "u v" fills windows of `window` tokens; questions
    follow in windows of their own. A node's name is a word of `min_word` to
    `max_word` tokens out of `symbols`; when words may be longer than one token,
    the last token of each is marked as the end of the word.

    The paper's setting (PAPER: Depo, 75 nodes): nodes=75, window=75, hops=16,
    symbols=50, max_word=2, queries=10, min_nodes=3. In a training cycle of n < k nodes
    the walk goes round.
    """

    name: str = "depo"
    nodes: int = 8  # of the longest cycle; every test cycle has this many
    min_nodes: int = FOLLOWS  # training cycles vary in size from here; None: always `nodes`
    hops: int = 4  # k is uniform on 1..hops
    test_hops: tuple[int, ...] = FOLLOWS  # the k that evaluation asks; None: 1..hops
    symbols: int = 8
    min_word: int = 1
    max_word: int = 1
    queries: int = 8  # with distinct starts; fewer when the cycle is smaller
    window: int = 8
    curriculum: int = 0  # training examples over which the largest k rises from 1 to hops
    test_fraction: float = 0.1  # of all cycles, kept from training
    seed: int = 0

    def __post_init__(self):
        checks.normalize(self)
        checks.one_of(self, "name", ("depo",))
        checks.positive(
            self, "nodes", "hops", "symbols", "min_word", "max_word", "queries", "window"
        )
        checks.fraction(self, "test_fraction")
        checks.default(self, "min_nodes", self.nodes)
        checks.default(self, "test_hops", tuple(range(1, self.hops + 1)))
        checks.not_negative(self, "curriculum")
        checks.in_range(self, "seed", 0, MAX_SEED)
        checks.in_range(self, "min_nodes", 3, self.nodes)
        checks.in_range(self, "min_word", 1, self.max_word)
        checks.in_range(self, "queries", 1, self.nodes)
        checks.in_range(self, "hops", 1, self.nodes - 1)  # k = nodes asks nothing: it leads back
        rising = list(self.test_hops) == sorted(set(self.test_hops))
        within = all(1 <= k <= self.hops for k in self.test_hops)
        if not self.test_hops or not rising or not within:
            raise ConfigError(f"test_hops must rise within 1..{self.hops}; got {self.test_hops}")
        words = sum(self.symbols**size for size in range(self.min_word, self.max_word + 1))
        if words < self.nodes:
            raise ConfigError(
                f"symbols={self.symbols} with words of {self.min_word} to {self.max_word} tokens "
                f"name only {words} nodes, and nodes is {self.nodes}; set symbols to {self.nodes}"
            )
        if words > MAX_SEED:
            raise ConfigError(
                f"symbols={self.symbols} with words of up to {self.max_word} tokens make {words} "
                f"words, and at most 2**63 - 1 can be numbered; lower max_word"
            )
        if self.query_tokens > self.window:
            raise ConfigError(
                f"a question takes up to {self.query_tokens} tokens and must fit a window; "
                f"got window={self.window}"
            )

    @property
    def query_tokens(self) -> int:
        """Tokens of the longest question with the part of its answer that is read."""
        # hop, start word, and for longer words an answer mark and the answer but its last token.
        return 1 + self.max_word + (self.max_word if self.max_word > 1 else 0)


_MOST_NODES_COUNTED = 9  # 8! cycles


class Depo(QuestionTask):
    """Walk k hops along a directed cycle of words.

    Tokens: the words' tokens, then one hop token for each k in 1..hops, then, where words may be
    longer than one token, one that starts an answer.

    The context lists the edges "u v" in a random order. It is cut at every window, whether or not
    an edge is whole, and a short one leaves the first windows short or empty.

    A question reads [start, hop] where words are single tokens, and its answer is scored at the
    hop token. Else it reads [hop, start.., answer mark, answer but its last token]; the answer is
    scored from the mark on, each of its tokens given those before (teacher forcing).

    Training and test never share a cycle, by construction: the cycle itself, whatever the order of
    its edges, the questions and the seed, is hashed into one of the two splits, and an example
    draws cycles until one falls into its own.
    """

    depth_name = "hops"
    config: DepoConfig

    def __init__(self, config: DepoConfig):
        self._words = Words(config.symbols, config.min_word, config.max_word)
        self._first_hop_token = self._words.num_tokens - 1  # of k = 0, which is never asked
        self._answer_mark = self._first_hop_token + config.hops + 1
        self._train_sizes = np.arange(config.min_nodes, config.nodes + 1)
        cumulative = np.cumsum(1 / (self._train_sizes + math.sqrt(config.nodes)))
        self._train_size_cdf = cumulative / cumulative[-1]
        layout = Layout(
            window=config.window,
            num_context_windows=math.ceil(config.nodes * 2 * config.max_word / config.window),
            num_questions=config.queries,
            question_tokens=config.query_tokens,
            answer_tokens=config.max_word,
        )
        super().__init__(config, layout, self._answer_mark + (config.max_word > 1))

    @property
    def depths(self) -> tuple[int, ...]:
        """The k that the test split asks."""
        return self.config.test_hops

    def _content(self, split: str, index: int) -> Content:
        rng = generator(self.config.seed, split, index)
        cycle = self._draw_cycle(rng, split)
        names = [self._words.tokens(word) for word in cycle]
        successors = names[1:] + names[:1]
        edges = [names[i] + successors[i] for i in rng.permutation(len(names)).tolist()]
        stream = [token for edge in edges for token in edge]
        context = cut_right_aligned(stream, self.window, self.num_context_windows)
        return Content(context, self._draw_questions(rng, split, index, names))

    def _draw_cycle(self, rng: np.random.Generator, split: str) -> list[int]:
        n = self.config.nodes
        if split == "train" and self.config.min_nodes < n:
            drawn = np.searchsorted(self._train_size_cdf, rng.random(), side="right")
            n = int(self._train_sizes[drawn])
        return draw_in_split(
            split, self.config.test_fraction, lambda: self._words.draw(rng, n), cycle_identity
        )

    def _draw_questions(
        self, rng: np.random.Generator, split: str, index: int, names: list[list[int]]
    ) -> list[Question]:
        n = len(names)
        starts = rng.permutation(n)[: self.config.queries].tolist()
        hops = self._hops_asked(split, index)
        # Cheaper than rng.integers, and as uniform as 53 bits can be.
        asked = [hops[int(u * len(hops))] for u in rng.random(len(starts)).tolist()]
        return [
            self._question(names[start], k, names[(start + k) % n])
            for start, k in zip(starts, asked, strict=True)
        ]

    def _hops_asked(self, split: str, index: int) -> tuple[int, ...] | range:
        if split == "test":
            return self.config.test_hops
        largest = self.config.hops
        if self.config.curriculum:
            largest = min(largest, 1 + largest * index // self.config.curriculum)
        return range(1, largest + 1)

    def _question(self, start: list[int], k: int, answer: list[int]) -> Question:
        hop = self._first_hop_token + k
        if self.config.max_word == 1:
            return Question(tokens=[*start, hop], targets=answer, depth=k)
        tokens = [hop, *start, self._answer_mark, *answer[:-1]]
        return Question(tokens=tokens, targets=answer, depth=k)

    def floor(self, depth: int) -> Floor:
        """What guessing scores: to name some other node of the cycle.

        Who has not read the edges still learns nodes from the questions, and without the edges
        every node but the start is equally likely: 1 / (nodes - 1). Only the first question of
        an example, when there are more words than nodes, is harder to guess. What the answers that
        are read to longer words rule out is left out.

        `exact` is the expectation over the number m of an example's questions that ask this
        depth, given m > 0 (m is binomial), of the best joint guess: where k hops lead from m nodes
        is counted over all cycles, as the answers depend on each other. Too many nodes: None.
        """
        self._check_depth(depth)
        n, queries = self.config.nodes, self.config.queries
        if n > _MOST_NODES_COUNTED:
            return Floor(answer=1 / (n - 1), exact=None)
        ask = 1 / len(self.depths)
        m = np.arange(1, queries + 1)
        asked_m = np.array([math.comb(queries, i) for i in m]) * ask**m * (1 - ask) ** (queries - m)
        exact = float(asked_m @ _best_joint_guess(n, depth)[:queries] / asked_m.sum())
        return Floor(answer=1 / (n - 1), exact=exact)

    def token_name(self, token: int) -> str:
        """A symbol's number with a full stop where it ends a word, "+k" for k hops, or "=>"."""
        self._check_token(token)
        if token == self._answer_mark:
            return "=>"
        if token > self._first_hop_token:
            return f"+{token - self._first_hop_token}"
        end = token >= self.config.symbols
        return f"{token - self.config.symbols}." if end else str(token)


@functools.cache
def _best_joint_guess(n: int, k: int) -> np.ndarray:
    """For m = 1..n: the share of all n-cycles on which one guess, from m nodes k hops on, holds.

    The likeliest such guess; by symmetry it matters not which m nodes.
    """
    orders = np.array([(0, *rest) for rest in itertools.permutations(range(1, n))])
    ends = np.empty_like(orders)
    np.put_along_axis(ends, orders, np.roll(orders, -k, axis=1), axis=1)
    counts = (np.unique(ends[:, :m], axis=0, return_counts=True)[1] for m in range(1, n + 1))
    return np.array([count.max() / len(ends) for count in counts])


def cycle_identity(cycle: list[int]) -> bytes:
    """The same bytes for every rotation of a cycle of distinct words, and for no other cycle."""
    least = cycle.index(min(cycle))
    return np.array(cycle[least:] + cycle[:least], "<i8").tobytes()
