"""Scoring by answer and by example against a count by hand and by brute force."""

import numpy as np

from sleepnet import tasks
from sleepnet.evaluation import scoring
from sleepnet.tasks import DepoConfig, Example


def batch_of(targets_BWL, depth_BWL, answer_BWL):
    targets, depth, answer = (np.array(x, np.int32) for x in (targets_BWL, depth_BWL, answer_BWL))
    length = np.full(targets.shape[:2], targets.shape[2], np.int32)
    return Example(np.zeros_like(targets), length, targets, answer >= 0, depth, answer)


def test_an_answer_is_right_if_all_its_tokens_are():
    batch = batch_of(
        targets_BWL=[[[7, 8, 0, 9], [5, 0, 0, 0]], [[7, 0, 0, 0], [1, 2, 3, 0]]],
        depth_BWL=[[[1, 1, 0, 2], [1, 0, 0, 0]], [[2, 0, 0, 0], [2, 2, 2, 0]]],
        answer_BWL=[[[0, 0, -1, 1], [2, -1, -1, -1]], [[0, -1, -1, -1], [1, 1, 1, -1]]],
    )
    prediction = np.array(
        [[[7, 0, -1, 9], [5, -1, -1, -1]], [[7, -1, -1, -1], [1, 2, 3, -1]]], np.int32
    )
    answers = scoring.score_answers(prediction, batch, first_example=4)
    assert answers.example_Q.tolist() == [4, 4, 4, 5, 5]
    assert answers.depth_Q.tolist() == [1, 2, 1, 2, 2]
    assert answers.right_Q.tolist() == [False, True, True, True, True]
    assert scoring.count(answers) == (2, 5, 4, 1)
    assert scoring.count(answers.where(answers.depth_Q == 1)) == (1, 2, 1, 0)
    assert scoring.count(answers.where(answers.depth_Q == 2)) == (2, 3, 3, 2)
    assert scoring.count(answers.where(answers.depth_Q == 3)) == (0, 0, 0, 0)


def test_counts_are_those_of_brute_force_on_answers_of_several_tokens():
    config = DepoConfig(nodes=6, hops=3, symbols=4, max_word=3, queries=5, window=16)
    (batch,) = tasks.batches(tasks.make(config), "test", 40, num_batches=1)
    rng = np.random.default_rng(0)
    flipped = rng.random(batch.targets_WL.shape) < 0.2
    prediction = np.where(batch.mask_WL, batch.targets_WL + flipped, -1)

    answers = scoring.score_answers(prediction, batch)
    for depth in (1, 2, 3):
        expected = brute_force(prediction, batch, depth)
        assert scoring.count(answers.where(answers.depth_Q == depth)) == expected


def brute_force(prediction, batch, depth):
    examples = total = right = exact = 0
    for b in range(len(prediction)):
        verdicts = []
        for answer in range(batch.answer_WL[b].max() + 1):
            places = [
                p for p in np.ndindex(*batch.answer_WL[b].shape) if batch.answer_WL[b][p] == answer
            ]
            if batch.depth_WL[b][places[0]] == depth:
                verdicts.append(all(prediction[b][p] == batch.targets_WL[b][p] for p in places))
        examples += bool(verdicts)
        total += len(verdicts)
        right += sum(verdicts)
        exact += bool(verdicts) and all(verdicts)
    return examples, total, right, exact


def test_parts_join_in_order():
    one = scoring.Answers(np.array([0]), np.array([1]), np.array([True]))
    two = scoring.Answers(np.array([3, 3]), np.array([1, 2]), np.array([False, True]))
    joined = scoring.concatenate([one, two])
    assert joined.example_Q.tolist() == [0, 3, 3]
    assert scoring.count(joined) == (2, 3, 2, 1)
