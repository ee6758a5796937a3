"""A real language model, SmolLM2-135M-Instruct from its GGUF file, through the command line: trained, booked,
killed, resumed, evaluated.  ENTROPY_FLOW_SMOLLM2 names the file; README.md says where to get it."""

import json
import math
import subprocess
import sys
import time

import pytest
from conftest import REPO, SMOLLM2, needs_smollm2, process, rows_of

pytestmark = [pytest.mark.slow, needs_smollm2]
STEPS = 3


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """Three steps, each booked; killed after the second one's checkpoint, then resumed."""
    home = tmp_path_factory.mktemp("smollm2")
    how = ["--method", "grpo", "--model", SMOLLM2, "--data", "arithmetic", "--steps", STEPS, "--prompts", 4]
    how += ["--ledger-every", 1, "--eval-every", 1, "--eval-problems", 4, "--eval-samples", 4, "--out", "run"]
    run, log = process(*how, cwd=home), home / "run" / "metrics.jsonl"
    end = time.monotonic() + 600
    while (
        not log.exists() or len(log.read_text().splitlines()) < 3 or (home / "run/.checkpoint.part").exists()
    ):
        assert run.poll() is None and time.monotonic() < end, run.communicate()
        time.sleep(0.05)
    run.kill()
    run.communicate()
    before = rows_of(home / "run")
    resumed = process("--resume", "run", cwd=home)
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    return home / "run", before, out


def test_it_starts_as_the_model_that_was_measured_and_goes_on_where_it_was_killed(killed_and_resumed):
    folder, before, out = killed_and_resumed
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[: len(before) - 1] == before[:-1], "what was logged before the last checkpoint stays"
    assert 1.7 < rows[1]["entropy"] < 2.4, "nats a token: results/made_tasks.txt has 2.04"
    assert "grpo" in out and (folder / "entropy.png").stat().st_size > 10_000


def test_eq_5_1_the_ledger_predicts_a_real_model(killed_and_resumed):
    """Within 15 %, from the second step on.  Adam's first step moves every weight by the whole learning rate,
    which is no small step."""
    folder, _, _ = killed_and_resumed
    booked = [(row["dH_predicted"], row["dH_measured"]) for row in rows_of(folder)[2:]]
    assert len(booked) == STEPS - 1
    for predicted, measured in booked:
        assert predicted == pytest.approx(measured, rel=0.15) and abs(measured) > 0.005


def test_eval_py_samples_its_checkpoint(killed_and_resumed):
    folder, _, _ = killed_and_resumed
    command = [sys.executable, REPO / "eval.py", folder, "--k", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "pass@1" in done.stdout and "pass@4" in done.stdout
    assert json.loads((folder / "config.json").read_text())["origin"]["model"], "a digest of the GGUF file"
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert "quantization_config" not in config and math.isfinite(rows_of(folder)[-1]["entropy"])
