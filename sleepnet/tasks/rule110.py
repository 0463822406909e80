"""Rule 110: random bits evolve on a ring, and single cells are asked after t steps."""

import dataclasses

import numpy as np

from sleepnet.config import checks
from sleepnet.config.checks import MAX_SEED, ConfigError
from sleepnet.tasks.automaton import evolve_packed, probability_of_one
from sleepnet.tasks.base import Floor, QuestionTask
from sleepnet.tasks.layout import Content, Layout, Question
from sleepnet.tasks.splits import draw_in_split, generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule110Config:
    """Rule 110: bits evolve on a periodic ring; asked is a bit after t steps.

    Each of `strings` windows holds one random state of `cells` bits; then come
    questions, one window or several, each about one bit of one string.

    The paper's setting: cells=24, strings=4, steps=(32,), cells_asked=1 (bit 0),
    questions=4.
    """

    name: str = "rule110"
    cells: int = 24  # of the ring, and tokens of each context window
    strings: int = 4
    steps: tuple[int, ...] = (32,)  # the t that are asked; one t holds for a whole example
    cells_asked: int = 1  # questions are about cells 0..cells_asked - 1
    questions: int = 4
    window: int = 24
    curriculum: int = 0  # training examples over which t opens up from the first of `steps`
    test_fraction: float = 0.1  # of all states, kept from training
    seed: int = 0

    def __post_init__(self):
        checks.normalize(self)
        checks.one_of(self, "name", ("rule110",))
        checks.positive(self, "cells", "strings", "cells_asked", "questions", "window")
        checks.fraction(self, "test_fraction")
        checks.not_negative(self, "curriculum")
        checks.in_range(self, "seed", 0, MAX_SEED)
        checks.in_range(self, "cells", 3, min(self.window, 62))
        checks.in_range(self, "cells_asked", 1, self.cells)
        checks.in_range(self, "questions", 1, self.strings * self.cells_asked)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ConfigError(f"steps must rise from 1 or more, such as (4, 8); got {self.steps}")


_NUM_BITS = 2  # the tokens 0 and 1


class Rule110(QuestionTask):
    """Predict cells of several rings after t steps of rule 110.

    Tokens: the bits 0 and 1, then one step token for each t where there are several, then one
    cell token for each cell that may be asked, string by string.

    Context window i holds the bits of string i. A question reads [step, cell], or [cell] where
    there is a single t, and its bit is scored at the cell token. One t holds for a whole example.
    The questions are a random choice in a random order, or, where all cells are asked, in order.

    Training and test never share a state, by construction: each state is hashed into one of the
    two splits, whatever the seed, and each string is drawn until it falls into the example's own.
    """

    depth_name = "steps"
    config: Rule110Config

    def __init__(self, config: Rule110Config):
        num_step_tokens = len(config.steps) if len(config.steps) > 1 else 0
        self._num_cell_tokens = config.strings * config.cells_asked
        self._first_cell_token = _NUM_BITS + num_step_tokens
        layout = Layout(
            window=config.window,
            num_context_windows=config.strings,
            num_questions=config.questions,
            question_tokens=2 if num_step_tokens else 1,
            answer_tokens=1,
        )
        super().__init__(config, layout, self._first_cell_token + self._num_cell_tokens)

    @property
    def depths(self) -> tuple[int, ...]:
        """The t that the test split asks."""
        return self.config.steps

    def _content(self, split: str, index: int) -> Content:
        config = self.config
        rng = generator(config.seed, split, index)
        step_number = int(rng.integers(self._num_steps_open(split, index)))
        states = [self._draw_state(rng, split) for _ in range(config.strings)]
        evolved = [evolve_packed(s, config.cells, config.steps[step_number]) for s in states]
        context = [_bits(state, config.cells) for state in states]
        questions = [self._question(step_number, q, evolved) for q in self._draw_asked(rng)]
        return Content(context, questions)

    def _num_steps_open(self, split: str, index: int) -> int:
        """The curriculum: training asks only the first few of `steps` at first."""
        everything = len(self.config.steps)
        if split == "test" or not self.config.curriculum:
            return everything
        return min(everything, 1 + everything * index // self.config.curriculum)

    def _draw_state(self, rng: np.random.Generator, split: str) -> int:
        return draw_in_split(
            split,
            self.config.test_fraction,
            draw=lambda: int(rng.integers(2**self.config.cells)),
            identity=lambda state: state_identity(state, self.config.cells),
        )

    def _draw_asked(self, rng: np.random.Generator) -> list[int]:
        if self.config.questions == self._num_cell_tokens:
            return list(range(self._num_cell_tokens))
        return rng.permutation(self._num_cell_tokens)[: self.config.questions].tolist()

    def _question(self, step_number: int, asked: int, evolved: list[int]) -> Question:
        string, cell = divmod(asked, self.config.cells_asked)
        tokens = [self._first_cell_token + asked]
        if len(self.config.steps) > 1:
            tokens.insert(0, _NUM_BITS + step_number)
        answer = evolved[string] >> cell & 1
        return Question(tokens=tokens, targets=[answer], depth=self.config.steps[step_number])

    def floor(self, depth: int) -> Floor:
        """What it scores to always answer the bit that is more frequent after `depth` steps.

        The frequency is taken over all states, as test states are a random choice of them.
        `exact` is known where one cell of each string is asked: the answers are then independent.
        """
        self._check_depth(depth)
        one = probability_of_one(self.config.cells, depth)
        answer = max(one, 1 - one)
        independent = self.config.cells_asked == 1
        return Floor(answer=answer, exact=answer**self.config.questions if independent else None)

    def token_name(self, token: int) -> str:
        """A bit, "t=32", or "s0c5" for cell 5 of string 0."""
        self._check_token(token)
        if token < _NUM_BITS:
            return str(token)
        if token < self._first_cell_token:
            return f"t={self.config.steps[token - _NUM_BITS]}"
        string, cell = divmod(token - self._first_cell_token, self.config.cells_asked)
        return f"s{string}c{cell}"


def state_identity(state: int, cells: int) -> bytes:
    """Different bytes for every state of every size of ring."""
    return bytes([cells]) + state.to_bytes(8, "little")


def _bits(state: int, cells: int) -> list[int]:
    return [state >> cell & 1 for cell in range(cells)]
