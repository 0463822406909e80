"""Facts: keys and their values, read once, and asked for many windows of distractors later."""

import dataclasses
from collections import Counter

import numpy as np

from sleepnet.config import checks
from sleepnet.config.checks import FOLLOWS, MAX_SEED, ConfigError
from sleepnet.tasks.base import Floor, QuestionTask
from sleepnet.tasks.layout import Content, Layout, Question, cut_right_aligned
from sleepnet.tasks.splits import draw_in_split, generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """Facts: "key value" pairs in a stream of distractors, then questions "which value had this?".

    The stream is laid out in pages of `page` tokens. A fact stands on one page; everything else is
    noise; all questions stand on the last page. A question's depth is how many pages lie from its
    fact's page to its own: where a window is a page, as it is by default, so many times does the
    model sleep in between. With `window` as long as the whole stream, the same tokens are one
    window: for models that keep all of it.
    """

    name: str = "facts"
    facts: int = 4  # of each example, with distinct keys
    keys: int = 16
    values: int = 16
    noise: int = 16  # tokens that distract
    depths: tuple[int, ...] = (1, 2, 4, 8)  # each fact's is one of them
    queries: int = FOLLOWS  # facts that are asked; None: all
    window: int = 8
    page: int = FOLLOWS  # divides `window`; None: a window is a page
    curriculum: int = 0  # training examples over which depths open up from the first
    test_fraction: float = 0.1  # of all sets of facts, kept from training
    seed: int = 0

    def __post_init__(self):
        checks.normalize(self)
        checks.one_of(self, "name", ("facts",))
        checks.positive(self, "facts", "keys", "values", "noise", "window")
        checks.positive_if_given(self, "queries", "page")
        checks.default(self, "queries", self.facts)
        checks.default(self, "page", self.window)
        checks.divides(self, "page", "window")
        checks.fraction(self, "test_fraction")
        checks.not_negative(self, "curriculum")
        checks.in_range(self, "seed", 0, MAX_SEED)
        checks.in_range(
            self, "facts", 1, min(self.keys, self.page // 2)
        )  # one page has room for all
        checks.in_range(self, "queries", 1, self.facts)
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ConfigError(f"depths must rise from 1 or more, such as (1, 8); got {self.depths}")
        if self.window > self.tokens:
            raise ConfigError(
                f"window must be at most {self.tokens}, the tokens of the whole stream; got "
                f"{self.window}"
            )

    @property
    def tokens(self) -> int:
        """Of the whole stream, the page of questions too."""
        return (self.depths[-1] + 1) * self.page


_Facts = list[tuple[int, int]]  # key and value, both from 0


class Facts(QuestionTask):
    """Recall the value that stood behind a key.

    Tokens: the keys, the values, the distractors, and one that asks.

    A fact is "key value", at a random even place of the page that its depth tells; depths are
    drawn fact by fact. The last page reads [key, ask] for each question, and the answer is scored
    at the token that asks. The tokens do not depend on `window`; those of the last window that
    stand before the last page are context, too.

    Training and test never share a set of facts, by construction: the set, whatever the order,
    depths and distractors, is hashed into one of the two splits.
    """

    depth_name = "pages"
    config: FactsConfig

    def __init__(self, config: FactsConfig):
        self._first_noise_token = config.keys + config.values
        self._ask = self._first_noise_token + config.noise
        layout = Layout(
            window=config.window,
            num_context_windows=-(-config.tokens // config.window) - 1,
            num_questions=config.queries,
            question_tokens=2,
            answer_tokens=1,
        )
        super().__init__(config, layout, self._ask + 1)

    @property
    def depths(self) -> tuple[int, ...]:
        """The distances, in pages, that the test split asks."""
        return self.config.depths

    def _content(self, split: str, index: int) -> Content:
        rng = generator(self.config.seed, split, index)
        facts = self._draw_facts(rng, split)
        opened = self._depths_open(split, index)
        depths = [opened[i] for i in rng.integers(len(opened), size=len(facts))]
        stream_PT = self._draw_noise(rng)
        self._write(rng, stream_PT, facts, depths)
        asked = rng.permutation(len(facts))[: self.config.queries].tolist()
        questions = [self._question(facts[i], depths[i]) for i in asked]
        return Content(self._cut(stream_PT), questions)

    def _draw_facts(self, rng: np.random.Generator, split: str) -> _Facts:
        config = self.config

        def draw():
            keys = rng.permutation(config.keys)[: config.facts].tolist()
            values = rng.integers(config.values, size=config.facts).tolist()
            return list(zip(keys, values, strict=True))

        return draw_in_split(split, config.test_fraction, draw, facts_identity)

    def _depths_open(self, split: str, index: int) -> tuple[int, ...]:
        """The curriculum: training begins with the least of `depths`."""
        everything, curriculum = self.config.depths, self.config.curriculum
        if split == "test" or not curriculum:
            return everything
        return everything[: 1 + len(everything) * index // curriculum]

    def _draw_noise(self, rng: np.random.Generator) -> np.ndarray:
        """All pages but the last, each of distractors alone."""
        shape = (self.config.depths[-1], self.config.page)
        return rng.integers(self._first_noise_token, self._ask, size=shape)

    def _write(self, rng, stream_PT: np.ndarray, facts: _Facts, depths: list[int]):
        """Facts over distractors, each on its page."""
        free = {
            depth: rng.permutation(self.config.page // 2)[:count].tolist()
            for depth, count in Counter(depths).items()
        }
        for (key, value), depth in zip(facts, depths, strict=True):
            place = 2 * free[depth].pop()
            stream_PT[-depth, place : place + 2] = key, self.config.keys + value

    def _cut(self, stream_PT: np.ndarray) -> list[list[int]]:
        """Windows that end with the last page, which is still to be written."""
        stream, page = stream_PT.ravel().tolist(), self.config.page
        windows = cut_right_aligned([*stream, *[0] * page], self.window, self.num_windows)
        return [*map(list, windows[:-1]), list(windows[-1][:-page])]

    def _question(self, fact: tuple[int, int], depth: int) -> Question:
        key, value = fact
        return Question(tokens=[key, self._ask], targets=[self.config.keys + value], depth=depth)

    def floor(self, depth: int) -> Floor:
        """What guessing scores: some value, each of which is as likely as the others.

        `exact` is the expectation over the number m of an example's questions that ask this depth,
        given m > 0 (m is binomial). What is left of the values of the other split is not counted.
        """
        self._check_depth(depth)
        queries, guess = self.config.queries, 1 / self.config.values
        elsewhere = 1 - 1 / len(self.depths)
        none = elsewhere**queries
        some_right = (elsewhere + (1 - elsewhere) * guess) ** queries
        return Floor(answer=guess, exact=(some_right - none) / (1 - none))

    def token_name(self, token: int) -> str:
        """A key "k3", a value "v7", a distractor "n0", or "?"."""
        self._check_token(token)
        if token == self._ask:
            return "?"
        if token >= self._first_noise_token:
            return f"n{token - self._first_noise_token}"
        is_key = token < self.config.keys
        return f"k{token}" if is_key else f"v{token - self.config.keys}"


def facts_identity(facts: _Facts) -> bytes:
    """The same bytes for every order of the same facts, and for no other facts."""
    return np.array(sorted(facts), "<i8").tobytes()
