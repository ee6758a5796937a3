"""What the six exercises share: compare an answer with the repository's own, and name the mistake.

A mistake is recognised by making it. Each exercise lists typical wrong answers as functions, each with a
hint; where a student's answer is wrong, the wrong answer that gives the same numbers on the same cases is the
one that was made. Nothing is guessed from the student's code, only from what it returns.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

Outcome = list[Any]  # one entry per part of the answer: a float64 tensor, or the exception that was raised


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is often given, in one or several variants, and what to tell whoever gives it."""

    answer: Callable | tuple[Callable, ...]
    hint: str

    @property
    def variants(self) -> tuple[Callable, ...]:
        return self.answer if isinstance(self.answer, tuple) else (self.answer,)


@dataclass(frozen=True)
class Exercise:
    """`name` is the function to fill in, `see` where its derivation stands, `parts` what it returns."""

    number: int
    name: str
    see: str
    reference: Callable
    cases: dict[str, tuple]
    mistakes: dict[str, Mistake]
    parts: tuple[str, ...] = ("the answer",)

    def filled(self, answer: Callable) -> Callable:
        """The answer, once there is one: skips the test while the function still returns three dots."""
        try:
            out = answer(*copy.deepcopy(next(iter(self.cases.values()))))
        except Exception:
            return answer  # there is an answer, and `check` says what is wrong with it
        if out is ... or isinstance(out, (tuple, list)) and any(x is ... for x in out):
            pytest.skip(f"fill in {self.name} in tests/exercises/test_exercise_{self.number}.py")
        return answer

    def check(self, answer: Callable) -> None:
        """Fails with a hint unless the answer is the repository's on every case."""
        __tracebackhide__ = True
        self.filled(answer)
        want, got = self._outcomes(self.reference), self._outcomes(answer)
        wrong = [at for at in want if not agree(want[at], got[at], 1e-9)]
        if not wrong:
            return
        hint, hits = self._recognise(want, got, wrong)
        gross = [at for at in wrong if not agree(want[at], got[at])]
        at = (hits or gross or wrong)[0]
        if not hint and isinstance(got[at], Exception):
            print(f"{self.name} failed in the case {at[0]!r}")
            raise got[at]  # with the student's own lines in the traceback
        bad = f"wrong in {len({case for case, _ in wrong})} of {len(self.cases)} cases"
        if 0 < len(hits) < len(wrong):
            bad += ", and this is not the only mistake"
        text = textwrap.fill(f"{self.name}: {hint or describe(want[at], got[at])}", 100)
        where = at[0] if len(self.parts) == 1 else f"{at[0]}: {at[1]}"
        ensure(
            False, f"{text}\n\n  {bad}\n  {where}: {difference(want[at], got[at])}\n  derivation: {self.see}"
        )

    def _outcomes(self, answer: Callable) -> dict[tuple[str, str], Any]:
        """(case, part) -> what the function gives there."""
        out = {}
        for case, args in self.cases.items():
            out.update({(case, part): x for part, x in zip(self.parts, self._outcome(answer, args))})
        return out

    def _outcome(self, answer: Callable, args: tuple) -> Outcome:
        try:
            out = answer(*copy.deepcopy(args))
            values = out if isinstance(out, (tuple, list)) else [out]
            if any(x is None for x in values):
                raise TypeError(f"{self.name} returned None: is there a `return` on every way through it?")
            if len(values) != len(self.parts):
                raise TypeError(f"{self.name} must return {', '.join(self.parts)}; it returned {len(values)}")
            return [torch.as_tensor(x).detach().double() for x in values]
        except Exception as error:
            return [error] * len(self.parts)

    def _recognise(self, want: dict, got: dict, wrong: list) -> tuple[str, list]:
        """The hint of the mistake that explains most of what is wrong, and where it does. A mistake was made
        if the answer shows it wherever it makes a difference; elsewhere the answer may have another one."""
        best: tuple[str, list] = ("", [])
        for mistake in self.mistakes.values():
            for variant in mistake.variants:
                made = self._outcomes(variant)
                differs = [at for at in want if not agree(made[at], want[at], 1e-9)]
                if all(at in wrong and agree(made[at], got[at]) for at in differs):
                    best = max(best, (mistake.hint, differs), key=lambda x: len(x[1]))
        return best


def ensure(condition: bool, text: str) -> None:
    """An assertion that fails with this text and nothing around it."""
    if not condition:
        pytest.fail(text, pytrace=False)


def agree(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """The same numbers, NaN included, in the same shape; or exceptions of one type."""
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b)
    return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance * 1e-3, equal_nan=True)


def describe(want: Tensor, got: Tensor) -> str:
    """What can be said of a wrong answer that is none of the listed mistakes."""
    if got.shape != want.shape:
        return f"the shape is {tuple(got.shape)} and should be {tuple(want.shape)}."
    if not got.isfinite().all():
        return "NaN or infinity. Look for 0 · inf, inf - inf and 0/0: which quantity over- or underflows?"
    if agree(want, got):
        return "right up to rounding. The inputs are float64; stay in float64 all the way."
    ratio = (got / want)[want != 0]
    if len(ratio) > 1 and agree(got, ratio[0] * want):
        return f"everything is {float(ratio[0]):.6g} times what it should be: a constant factor."
    return (
        "not right yet, and no mistake that this exercise knows. Work the derivation through on paper for "
        "the case below."
    )


def difference(want: Tensor, got: Any) -> str:
    """The two values, or of a large tensor the first place where they differ."""
    if isinstance(got, Exception):
        return f"it raised {type(got).__name__}: {got}"
    if got.shape != want.shape or not want.dim():
        return f"expected {number(want)}, yours is {number(got)}"
    off = ~torch.isclose(want, got, 1e-9, 1e-12)
    index = tuple(off.nonzero()[0].tolist())
    text = f"at {list(index)} expected {number(want[index])}, yours is {number(got[index])}"
    if bool(((want == 0) | (want == 1)).all() and ((got == 0) | (got == 1)).all()):
        text += f" ({int(want.sum())} should be True, {int(got.sum())} are)"
    return text


def number(x: Tensor) -> str:
    return f"{float(x):.8g}" if x.dim() == 0 else f"a tensor of shape {tuple(x.shape)}"
