"""Settings shared by all tests: one thread (several are far slower when the machine is busy), no network,
float64 checks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A shared machine can stall for a second at any moment, so an example has no deadline; examples are
# derandomized so that a green run today is a green run tomorrow. HYPOTHESIS_PROFILE=explore searches anew
# every time.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory):
    """One cache for all runs of the tests.  In the place of the warm start: few problems, three solutions
    each, learnt by heart, a policy in four seconds instead of thirty, that solves about half of what a run of
    seed 0 asks first, and nothing else.  The machinery is tested with it, not the score; `test_rollout` tests
    the real warm start."""
    import rollout
    from train import prompts_at

    problems, solutions, start = rollout.chain_solutions()
    number = {p: i for i, p in enumerate(problems)}
    few = torch.tensor([number[p] for p in prompts_at(rollout.chain_task().train, 0, 0, 80)])

    class Memorise(rollout.WarmStart):
        def draw(self, generator):
            pick = few[torch.randint(len(few), (self.batch,), generator=generator)]
            first, last = torch.from_numpy(start)[pick][:, [0, -1]].T
            third = torch.randint(3, (self.batch,), generator=generator)
            row = first + third * (last - first) // 3
            return torch.cat([rollout._train_prompts()[0][pick], torch.from_numpy(solutions)[row]], 1)

    how = Memorise(steps=320, batch=64, lr=6e-3, decay_steps=340)
    folder, real = tmp_path_factory.mktemp("warm"), rollout.supervised
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "supervised", lambda m, _, progress=iter: real(m, how, progress))
        rollout.warm_policy(rollout.WarmStart(seed=0), folder=folder)
    return folder
