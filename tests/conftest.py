"""Settings shared by all tests: one thread (several are far slower when the machine is busy), no network,
float64 checks."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# tyro reads the docstrings of fields from the sources, for which Python 3.11 parses the whole file at every
# command line: a sixth of a second each.  Sources do not change while tests run.
inspect.getsource = functools.cache(inspect.getsource)
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


SMOLLM2 = Path(
    os.environ.get("ENTROPY_FLOW_SMOLLM2", "")
)  # a real model's GGUF file; README.md: how to get it
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2.is_file(), reason="ENTROPY_FLOW_SMOLLM2 names no file: see README.md"
)


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
        patch.setenv("ENTROPY_FLOW_CACHE", str(folder))
        rollout.warm_policy(rollout.WarmStart(seed=0))
    return folder


# ------------------------------------------------------------------------------------------------------------
# The command line of train.py

REPO = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"

# A run of a few seconds: 64 responses a step, one thread so that numbers repeat exactly.
TINY = ["--prompts", "8", "--group-size", "8", "--eval-samples", "2", "--threads", "1", "--quiet"]


@pytest.fixture()
def home(warm_cache, monkeypatch, tmp_path):
    """An empty working directory, and the cached policy."""
    monkeypatch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture()
def cli(home, capsys, monkeypatch):
    """The command line in this process: (exit code, stdout, stderr).  An exception that leaves `main` would
    be a traceback, and fails the test.  The picture is empty: drawing would take half of the time, and the
    tests with a process of their own draw it."""
    import train

    monkeypatch.setattr(train, "draw", lambda runs, path: path.write_bytes(PNG))

    def call(*argv):
        capsys.readouterr()
        try:
            code = train.main([str(a) for a in argv])
        except SystemExit as leave:  # tyro
            code = leave.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def process(*argv, cwd, **kwargs):
    """The command line in a process of its own."""
    command = [sys.executable, str(REPO / "train.py"), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **pipes, **kwargs)


def without_clock(row):
    return {k: v for k, v in row.items() if not k.startswith("seconds")}


def rows_of(folder, name="metrics.jsonl"):
    """The rows of a run without the numbers that cannot repeat."""

    def no_constant(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (Path(folder) / name).read_text().splitlines()
    rows = [json.loads(line, parse_constant=no_constant) for line in lines]
    return [without_clock(row) for row in rows]


def complains(result, *words):
    """Exit code 2; one or two lines on stderr that hold the words; no traceback."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert "Traceback" not in err and out == ""
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    for word in words:
        assert str(word) in err, f"{word!r} is not in {err!r}"


def contents(folder):
    """Every file below a folder with its bytes and time: to see that nothing was touched."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()}
