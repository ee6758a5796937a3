"""Exercise 4. Which tokens does Clip-Cov drop?                        pytest tests/exercises -k 4

To first order entropy falls by the covariance of what is likely and what is reinforced (1.3), so Clip-Cov
(2505.22617, eq. 10-12) takes a few tokens with a large share in it out of the loss. For every response token,
    c = (A - mean A)(log p - mean log p)           over the N response tokens        interventions (3.7)
1. The means are over all response tokens of the batch: not per response, and not over padding.
2. Candidates are the tokens with lb < c < ub. (None is removed by the PPO clip here: one update a rollout.)
3. Dropped are n of them *at random*, n = max(⌊ratio · N⌋, 1), or all if there are fewer. A random draw that
   is the same on every machine and in every micro-batch needs a key per token: drop the n largest keys.
"""

import math
import statistics
import warnings

import torch
from checking import Exercise, Mistake, ensure
from torch import Tensor

from grpo import Progress, Tokens
from interventions import ClipCov, centred, covariance, token_keys, top


def clip_cov_picks(
    logp: Tensor, adv: Tensor, mask: Tensor, keys: Tensor, ratio: float, lb: float, ub: float
) -> Tensor:
    """All (B, T): log p, A, True on response tokens, random keys -> (B, T) bool, True on what is dropped."""
    return ...  # replace the three dots


# ---- the checks; what follows gives the answer away --------------------------------------------------------

real = torch.arange(14) < torch.tensor([[14], [9], [12], [5], [14], [7]])
draw = torch.Generator().manual_seed(1)
LOGP = torch.where(real, -10 * torch.rand(6, 14, generator=draw, dtype=torch.float64) ** 3, -0.5)
ADV = torch.where(real, torch.tensor([1.6, -0.4, -0.4, 1.2, -1.6, -0.4]).double()[:, None], 0.5)
IDS = torch.randint(50, (6, 14), generator=draw)
KEYS = token_keys(Tokens(IDS, real), Progress())  # as the trainer draws them


def reference(logp, adv, mask, keys, ratio, lb, ub) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one token of so few is more than the ratio asks for
        return ClipCov(ratio=ratio, lb=lb, ub=ub).weight(Tokens(IDS, mask, logp=logp), adv, {}) == 0


def picks(score=None, pool=None, count=None, rank=None):
    """A mistake: another covariance, other candidates, another number or another order of dropping."""

    def answer(logp, adv, mask, keys, ratio, lb, ub) -> Tensor:
        c = (score or (lambda *_: covariance(Tokens(IDS, mask, logp=logp), adv)))(logp, adv, mask)
        candidates = (pool or (lambda c, m, lb, ub: m & (c > lb) & (c < ub)))(c, mask, lb, ub)
        n = (count or (lambda ratio, N, E: max(int(ratio * N), 1)))(
            ratio, int(mask.sum()), int(candidates.sum())
        )
        return top((rank or (lambda c, keys: keys))(c, keys), candidates, n)

    return answer


def per_response(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    return torch.cat(
        [centred(a, m) * centred(x, m) for a, x, m in zip(adv[:, None], logp[:, None], mask[:, None])]
    )


MISTAKES = {
    "not centred": Mistake(
        picks(score=lambda logp, adv, mask: adv * logp),
        "A · log p is no covariance. log p is never positive, so without its mean taken off a rewarded "
        "token never counts as likely. Subtract both means first (3.7).",
    ),
    "half centred": Mistake(
        picks(score=lambda logp, adv, mask: adv * centred(logp, mask)),
        "A has not been centred. Group advantages have mean 0 over *responses*; over tokens long responses "
        "weigh more and the mean is not 0. Subtract it (3.7).",
    ),
    "padding": Mistake(
        picks(score=lambda logp, adv, mask: (adv - adv.mean()) * (logp - logp.mean())),
        "your means run over padding. Its values are left over from the computation; take means over "
        "logp[mask] and adv[mask].",
    ),
    "padding dropped": Mistake(
        picks(
            pool=lambda c, m, lb, ub: (c > lb) & (c < ub),
            score=lambda logp, adv, mask: (adv - adv[mask].mean()) * (logp - logp[mask].mean()),
        ),
        "padded positions are among your candidates, and take places of the n. Only response tokens can be "
        "dropped.",
    ),
    "per response": Mistake(
        picks(score=per_response),
        "you centre each response by itself. Within one response A is constant, so its covariance is 0 and "
        "nothing is ever selected. The means are over the batch (step 1).",
    ),
    "correlation": Mistake(
        picks(
            score=lambda logp, adv, mask: (
                covariance(Tokens(IDS, mask, logp=logp), adv) / adv[mask].std() / logp[mask].std()
            )
        ),
        "you have divided by the standard deviations. lb and ub are meant for the covariance itself, in "
        "units of A times nats.",
    ),
    "absolute": Mistake(
        picks(pool=lambda c, m, lb, ub: m & (c.abs() > lb) & (c.abs() < ub)),
        "|c| also finds tokens with a very negative covariance, rare ones that were rewarded. They *raise* "
        "entropy; dropping them speeds the collapse up. Candidates have lb < c < ub.",
    ),
    "no upper bound": Mistake(
        picks(pool=lambda c, m, lb, ub: m & (c > lb)),
        "the upper bound is missing. Clip-Cov leaves tokens with c >= ub alone; they are outliers.",
    ),
    "largest covariance": Mistake(
        picks(rank=lambda c, keys: c),
        "you drop the candidates of largest covariance. That is how KL-Cov selects; Clip-Cov draws at "
        "random among all candidates: rank them by `keys`, not by c.",
    ),
    "smallest keys": Mistake(
        picks(rank=lambda c, keys: -keys),
        "right candidates, right number, other end: by convention the n *largest* keys are drawn (step 3).",
    ),
    "all": Mistake(
        picks(count=lambda ratio, N, E: N),
        "you drop every candidate. They are the most instructive tokens of the batch; only n of them may go "
        "(step 3).",
    ),
    "share of candidates": Mistake(
        picks(count=lambda ratio, N, E: max(int(ratio * E), 1)),
        "your n is a share of the candidates. `ratio` is a share of all N response tokens (step 3).",
    ),
    "no floor": Mistake(
        picks(count=lambda ratio, N, E: int(ratio * N)),
        "⌊ratio · N⌋ is 0 in a small batch and the method silently does nothing: at the paper's 2e-4 below "
        "5,000 tokens. At least one token goes, if there is a candidate.",
    ),
    "padded count": Mistake(
        lambda logp, adv, mask, keys, ratio, lb, ub: picks(
            count=lambda r, N, E: max(int(r * mask.numel()), 1)
        )(logp, adv, mask, keys, ratio, lb, ub),
        "N counts padding. The number of dropped tokens must not depend on how wide the batch is padded: N "
        "= mask.sum().",
    ),
}
CASES = {
    "a few of many": (LOGP, ADV, real, KEYS, 0.05, 0.3, 2.5),
    "fewer candidates than n": (LOGP, ADV, real, KEYS, 0.5, 0.8, 2.5),
    "a tiny ratio": (LOGP, ADV, real, KEYS, 2e-4, 0.3, 2.5),
    "no candidate": (LOGP, ADV, real, KEYS, 0.05, 50.0, 60.0),
}
EXERCISE = Exercise(4, "clip_cov_picks", "interventions.py, (3.7)", reference, CASES, MISTAKES)


def test_clip_cov_picks():
    EXERCISE.check(clip_cov_picks)


def test_token_by_token():
    """The same in plain Python, one token at a time."""
    answer = EXERCISE.filled(clip_cov_picks)
    for case, (logp, adv, mask, keys, ratio, lb, ub) in CASES.items():
        at = [tuple(i) for i in mask.nonzero().tolist()]
        a, l = statistics.fmean(float(adv[i]) for i in at), statistics.fmean(float(logp[i]) for i in at)
        band = [i for i in at if lb < (float(adv[i]) - a) * (float(logp[i]) - l) < ub]
        n = max(math.floor(ratio * len(at)), 1)
        want = sorted(sorted(band, key=lambda i: float(keys[i]))[-n:])
        mine = [tuple(i) for i in answer(logp, adv, mask, keys, ratio, lb, ub).nonzero().tolist()]
        text = f"{case}: of {len(band)} candidates go (row, position) {want}, yours: {mine}"
        ensure(mine == want, text)
