"""Exercise 6. Which tokens belong to the response?                    pytest tests/exercises -k 6

A rollout is a rectangle of token ids; responses end at different places. A response is everything up to and
*including* its first EOS. Choosing to stop is an action like any other: it was sampled, it has a probability,
and the policy has to learn when to take it. What follows is padding, whatever its ids.    rollout, section 5

1. Many tokenizers have no pad token and pad with EOS itself. So neither "is not EOS" nor "is not pad" is a
   criterion; only the *position* of the first EOS is.
2. A response that hit the length limit has no EOS. All of it counts.
3. A hint for doing it without a loop: how many EOS stand *before* this position, not counting itself?
"""

import itertools

import torch
from checking import Exercise, Mistake, ensure
from torch import Tensor

import rollout


def response_mask(ids: Tensor, eos: int) -> Tensor:
    """(B, T) token ids -> (B, T) bool: True up to and including the first EOS of each row."""
    return ...  # replace the three dots


# ---- the checks; what follows gives the answer away --------------------------------------------------------


def by_position(before):
    """A mistake in the comparison of the position t with that of the first EOS, T if there is none."""

    def answer(ids: Tensor, eos: int) -> Tensor:
        t, hits = torch.arange(ids.shape[1]), ids == eos
        return before(t, torch.where(hits, t, ids.shape[1]).min(-1, keepdim=True).values, hits)

    return answer


MISTAKES = {
    "EOS dropped": Mistake(
        by_position(lambda t, first, hits: t < first),
        "the EOS itself is missing. It is the last action of the response: without it in the loss the "
        "policy never learns to stop, and responses grow to the limit. A cumulative count of EOS includes "
        "the position itself; take that off again.",
    ),
    "is not EOS": Mistake(
        lambda ids, eos: ids != eos,
        "`ids != eos` goes wrong twice: it drops the EOS, which is an action, and keeps whatever stands "
        "after it if the padding has another id. Only the position of the *first* EOS decides.",
    ),
    "is not pad": Mistake(
        lambda ids, eos: ids != 0,
        "you take one id for padding. Which id pads is not known here, it may be EOS itself, and an "
        "ordinary token of a response may have that id. Only the position of the first EOS decides.",
    ),
    "one after": Mistake(
        by_position(lambda t, first, hits: t <= first + 1),
        "one token too many: the one right after EOS was never sampled by the policy. Include the EOS and "
        "stop there.",
    ),
    "second EOS": Mistake(
        lambda ids, eos: (ids == eos).cumsum(-1) <= 1,
        "you keep all positions with at most one EOS so far, and so what follows the first EOS up to the "
        "second. Count the EOS *before* a position, without itself.",
    ),
    "last EOS": Mistake(
        by_position(
            lambda t, first, hits: hits.flip(-1).cumsum(-1).flip(-1).bool() | ~hits.any(-1, keepdim=True)
        ),
        "you go up to the *last* EOS. Where a tokenizer pads with EOS that is the whole padding; the "
        "response ends at the first one.",
    ),
    "everything": Mistake(
        lambda ids, eos: torch.ones_like(ids, dtype=torch.bool),
        "everything counts, padding included. Tokens after EOS were not chosen by the policy and must not "
        "be trained.",
    ),
    "argmax": Mistake(
        lambda ids, eos: torch.arange(ids.shape[1]) <= (ids == eos).int().argmax(-1, keepdim=True),
        "a row without EOS keeps its first token only. argmax of a row of zeros is 0, as if the EOS stood "
        "there. A response that hit the length limit counts as a whole.",
    ),
    "no EOS, no answer": Mistake(
        lambda ids, eos: torch.stack([torch.arange(len(row)) <= (row == eos).nonzero()[0] for row in ids]),
        "a row without EOS has no first EOS to be found, and the search for it fails. Such a response hit "
        "the length limit and counts as a whole (step 2).",
    ),
    "no EOS, no response": Mistake(
        by_position(lambda t, first, hits: (t <= first) & hits.any(-1, keepdim=True)),
        "a row without EOS is lost. It hit the length limit and is a response as any other; if it should "
        "not be trained, that is the method's decision (DAPO's overlong filter), not the mask's.",
    ),
    "inverted": Mistake(
        by_position(lambda t, first, hits: t > first),
        "turned around: True is what belongs to the response.",
    ),
}
CASES = {
    "padded with another id": (torch.tensor([[5, 6, 9, 0, 0], [5, 9, 0, 0, 0], [7, 8, 6, 5, 9]]), 9),
    "padded with EOS": (torch.tensor([[5, 6, 9, 9, 9], [5, 9, 9, 9, 9]]), 9),
    "EOS at once": (torch.tensor([[9, 0, 0, 0], [9, 9, 9, 9]]), 9),
    "no EOS": (torch.tensor([[5, 6, 7, 8], [0, 0, 5, 0]]), 9),
    "an old token after EOS": (torch.tensor([[5, 9, 6, 9, 7], [9, 6, 0, 9, 0]]), 9),
}
EXERCISE = Exercise(6, "response_mask", "rollout.py, section 5", rollout.response_mask, CASES, MISTAKES)


def test_response_mask():
    EXERCISE.check(response_mask)


def test_against_reading_from_left_to_right():
    """All sequences of five ids from {0, 1, EOS}: read, and stop after the first EOS."""
    answer, rows = EXERCISE.filled(response_mask), list(itertools.product((0, 1, 2), repeat=5))
    for row, mine in zip(rows, answer(torch.tensor(rows), 2).bool().tolist()):
        length = row.index(2) + 1 if 2 in row else 5
        want = [True] * length + [False] * (5 - length)
        ensure(mine == want, f"ids {row} with EOS = 2: {want}, yours {mine}")
