"""Chapter 5, the command line: settings, help, folders, signals, and the line that tells what was wrong."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, TINY, complains, contents, process, rows_of

import interventions
import train
from grpo import Tokens
from interventions import METHODS, build
from train import Ranks, Settings, UserError

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# Bad input: one or two lines that name flag, value and remedy; exit code 2; nothing left behind

WRONG = {  # a command line -> words of the complaint
    "--method opfeo": ["method 'opfeo'", "did you mean opefo"],
    "--method grpo stear": ["method 'stear'", "did you mean steer"],
    "--method clip_cov:ration=.02": ["ration", "did you mean ratio"],
    "--method clip_cov:ratio=much": ["ratio='much'", "a number"],
    "--method opefo:form=exactly": ["form", "exactly", "exact"],
    "--method opefo:form": ["form", "name=value"],
    "--method grpo:lr=fast": ["grpo: lr='fast'", "a number"],
    "--method grpo:lr=-1": ["--method grpo:lr=-1: --lr -1"],
    "--method grpo:ledger=half": ["grpo: ledger='half'", "off, step, full"],
    "--method grpo:steps=0": ["--method grpo:steps=0: --steps 0", "at least 1"],
    "--method grpo:micro_batch=-1": ["--method grpo:micro_batch=-1: --micro-batch -1", "at least 0"],
    "--method grpo:seed=1": ["seed"],
    "--method grpo grpo": ["--method grpo grpo", "twice"],
    "--method nosuch:help": ["nosuch", "did you mean"],
    "--method": ["--method", "at least one"],
    "--method reft:openers=3": ["--group-size 16", "3 openers of reft"],
    "--method reft+opefo --group-size 6": ["--group-size 6", "4 openers of reft"],
    "--method darling --reward length_penalty": ["--reward length_penalty", "darling"],
    "--method gcpo --reward length_penalty": ["--reward length_penalty", "gcpo"],
    "--method opefo+maxrl --reward length_penalty": ["--reward length_penalty", "maxrl"],
    "--method mixed_cuts --engine vllm": ["--engine vllm: mixed_cuts", "--engine torch"],
    "--stepz 4": ["--stepz: unknown; did you mean --steps?"],
    "opefo": ["opefo: unknown; did you mean --method opefo?"],
    "--step 4": ["--step", "--steps"],
    "--steps": ["--steps"],
    "--steps many": ["--steps", "many"],
    "--steps 0": ["--steps 0", "at least 1"],
    "--group-size 1": ["--group-size 1", "at least 2"],
    "--micro-batch -1": ["--micro-batch -1", "at least 0"],
    "--updates-per-rollout 3": ["--updates-per-rollout 3", "--prompts 32"],
    "--lr nan": ["--lr nan"],
    "--lr 1e38": ["--lr 1e+38"],
    "--temperature 0": ["--temperature 0"],
    "--grad-clip nan": ["--grad-clip nan"],
    "--mismatch-high .5": ["--mismatch-high 0.5", "at least 1"],
    "--seed -1": ["--seed -1"],
    f"--seed {'1' * 30}": [f"--seed {'1' * 30}", str(2**63 - 1)],
    f"--threads {'9' * 20}": [f"--threads {'9' * 20}", "1024"],
    "--ledger half": ["--ledger", "half", "'off', 'step', 'full'"],
    "--ledger full --gradient-checkpointing": ["--ledger full", "no --gradient-checkpointing"],
    "--ledger full --updates-per-rollout 2": ["--ledger full", "--updates-per-rollout 1"],
    "--device quantum": ["--device quantum", "cpu"],
    "--device cuda:99": ["--device cuda:99", "cpu"],
    "--data missing.jsonl": ["--data missing.jsonl", "no such file"],
    "--model owner/any": ["--model owner/any", "--data"],
    "--data owner/any": ["--data owner/any", "--model"],
    "--lora 4": ["--lora 4", "--model"],
    "--stop x": ["--stop x", "--model"],
    "--resume nowhere": ["--resume nowhere", "--out"],
    "--resume": ["--resume runs/"],
    "--resume a --out b": ["--out b", "leave --out out"],
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_bad_input_is_named_with_its_remedy_before_any_work(cli, home, monkeypatch, line):
    monkeypatch.setattr(train, "load_task_and_policy", None)  # refused before the warm start, whatever it is
    complains(cli(*line.split()), *WRONG[line])
    assert list(home.iterdir()) == [], "nothing is left behind"


def test_a_folder_with_other_files_is_refused_and_left_as_it_was(cli, home):
    """A run replaces checkpoint/ and its like, which may be somebody's."""
    mine = home / "a" / "checkpoint" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    complains(cli("--method", "grpo", "--out", "a", *TINY), "--out a", "mine.txt", "empty folder")
    assert [p for p in (home / "a").rglob("*") if p.is_file()] == [mine]
    mine.unlink()
    (home / "a" / ".lock").touch()  # of a killed warm start
    assert cli("--method", "grpo", "--out", "a", "--steps", 1, "--eval-problems", 4, *TINY)[0] == 0


def test_one_method_that_diverges_does_not_end_the_comparison(cli, home, monkeypatch):
    """Nor are evaluations of different k put under one name."""
    real = train.train

    def train_(run):
        rows = real(run)
        yield next(rows)
        if run.settings.method.startswith("opefo"):
            raise FloatingPointError("ten updates in a row had a non-finite loss or gradient")
        yield from rows

    monkeypatch.setattr(train, "train", train_)
    specs = ["opefo:eval_samples=4", "grpo"]
    code, out, err = cli("--method", *specs, "--steps", 2, "--eval-problems", 4, "--out", "a", *TINY)
    assert code == 1 and "opefo:eval_samples=4: ten updates" in err and "smaller --lr" in err
    assert json.loads((home / "a" / "grpo" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert "pass@k" in out and "pass@2" not in out and (home / "a" / "entropy.png").exists()


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_is_said_with_a_remedy(cli, home, monkeypatch, kind):
    def full(*_):
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte. out of memory")

    monkeypatch.setattr(train, "draw_responses", full)
    code, _, err = cli("--method", "grpo", "--steps", 1, "--eval-problems", 4, "--out", "a", *TINY)
    assert code == 1 and "out of memory" in err and "--micro-batch" in err and "Traceback" not in err


def test_bad_input_is_one_line_where_tyro_draws_a_frame_too(home):
    """It does on a terminal with UTF-8; inside pytest it has no frame."""
    run = process("--stepz", "1", cwd=home, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    complains((run.wait(), *run.communicate()), "--stepz: unknown; did you mean --steps?")


@pytest.mark.parametrize("place", ["file/below", "/proc/entropy", "/dev/full/x", "/dev/full", "x" * 300])
def test_an_unwritable_path_is_refused_before_any_work(cli, home, monkeypatch, place):
    monkeypatch.setattr(train, "load_task_and_policy", None)
    (home / "file").write_text("in the way")
    complains(cli("--method", "grpo", "--out", place), f"--out {place}", "writable folder")
    assert [p.name for p in home.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(28, "No space left on device"), ["--out a", "No space left", "make room"]),
        (ConnectionResetError(104, "Connection reset by peer"), ["Connection reset by peer"]),
        (UserError("--model x: what is wrong with it"), ["--model x"]),
        (RuntimeError("an illegal memory access"), None),  # a bug: its traceback says where
    ],
)
def test_what_fails_in_a_run_is_one_line_and_bugs_keep_their_traceback(cli, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train, "load_task_and_policy", fail)
    if words is None:
        with pytest.raises(RuntimeError):
            cli("--out", "a")
    else:
        complains(cli("--out", "a"), *words)


# ------------------------------------------------------------------------------------------------------------
# Settings


def jobs_of(monkeypatch, *argv):
    """What a command line asks for, without doing it."""
    jobs = []
    monkeypatch.setattr(train, "compare", lambda _, given, *__: jobs.extend(given) or 0)
    assert train.main(list(map(str, argv))) == 0
    return jobs


def test_a_setting_behind_a_name_overrides_the_flag(home, monkeypatch):
    spec = "grpo:lr=1e-4,updates-per-rollout=2,eps_high=.28,gradient_checkpointing=true"
    one, two = jobs_of(monkeypatch, "--method", spec, "grpo", "--lr", "1e-3")
    assert (one[0].lr, one[0].updates_per_rollout, one[0].gradient_checkpointing) == (1e-4, 2, True)
    assert one[1].eps_high == 0.28 and (two[0].lr, two[0].updates_per_rollout) == (1e-3, 1)


def test_a_language_model_has_defaults_of_its_own_which_give_way_to_what_is_given(home, monkeypatch):
    Path("sums.jsonl").write_text("{}")
    base = ["--model", "owner/any", "--data", "sums.jsonl"]
    ((s, _),) = jobs_of(monkeypatch, *base, "--method", "opefo:prompts=30", "--updates-per-rollout", 3)
    assert (s.lr, s.eval_samples, s.tokens_per_micro_batch) == (1e-6, 8, 16384)
    ((s, _),) = jobs_of(monkeypatch, *base, "--lr=3e-4", "--eval_samples", 4, "--micro-batch", 8)
    assert (s.lr, s.eval_samples) == (3e-4, 4), "given, though 3e-4 is the default of the embedded model"
    tokens = Tokens(torch.zeros(32, 3), torch.ones(32, 3).bool())
    run = SimpleNamespace(settings=s, ranks=Ranks())
    assert len(train.Passes(run, tokens).rows) == 4, "--micro-batch takes the place of the tokens"


@pytest.mark.parametrize(
    "argv, threads", [(["--threads", "3"], 3), ([], 1), (["--model", "a/b", "--data", "a/b"], 2)]
)
def test_the_embedded_model_has_one_thread_and_others_what_torch_takes(home, monkeypatch, argv, threads):
    torch.set_num_threads(2)
    jobs_of(monkeypatch, *argv)
    assert torch.get_num_threads() == threads


def test_auto_behind_a_name_is_auto():
    settings = replace(Settings(), engine="vllm", mismatch="off")
    assert train.parse_spec("grpo:mismatch=auto", settings)[0].mismatch == "tis"


def test_what_several_processes_refuse_names_the_method():
    with pytest.raises(UserError, match="^--method grpo:prompts=9: --prompts 9: .* x 2 processes"):
        train.make_job("grpo:prompts=9", Settings(), CPU, Ranks(0, 2))


def test_every_setting_has_a_range_or_words_or_is_a_name():
    """A new field is checked, or its omission here is on purpose."""
    free = {"method", "model", "data", "eval_data", "prompt_template", "device"}
    free |= {"gradient_checkpointing", "trust_remote_code"}
    for f in fields(Settings):
        bad = replace(Settings(), **{f.name: "?" if isinstance(f.default, str) else -1})
        told = next(train.complaints(bad, build("grpo"), CPU, Ranks()), "")
        assert f.name in free or told.startswith(train.flag(f.name)), f.name
    assert not next(train.complaints(Settings(mismatch="off"), build("grpo"), CPU, Ranks()), "")


# ------------------------------------------------------------------------------------------------------------
# Folders


def test_without_out_every_run_gets_a_new_folder(home):
    for name in ("grpo-s0", "grpo-s0-2"):
        assert str(train.new_folder("", ["grpo"], 0)) == f"runs/{name}"
        (home / "runs" / name).mkdir(parents=True)
        (home / "runs" / name / "config.json").write_text("{}")
    assert str(train.new_folder("", ["grpo:lr=1e-4", "opefo"], 1)) == "runs/grpo-lr=1e-4-vs-opefo-s1"


@pytest.mark.parametrize(
    "there, methods",
    [("config.json", ["grpo"]), ("metrics.jsonl", ["grpo"]), ("grpo/config.json", ["grpo", "psr"])],
)
def test_a_folder_with_a_run_is_refused(cli, home, there, methods):
    """A comparison's too: `--method grpo psr --out runs` would put its grpo into runs/grpo."""
    path = home / "a" / there
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    before = contents(home)
    complains(cli("--method", *methods, "--out", "a"), "--out a", f"--resume {path.parent.relative_to(home)}")
    assert contents(home) == before


def config_in(folder, *specs, **settings):
    folder.mkdir()
    stored = {"specs": specs, "settings": {**asdict(Settings()), "steps": 2, **settings}}
    (folder / "config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("name", ["--out", "--resume"])
def test_a_folder_in_which_a_run_is_at_work_is_refused(cli, home, name):
    """Also that of a method whose turn has not come."""
    if name == "--resume":
        config_in(home / "a", "grpo", "psr")
    before = contents(home)
    with train.locked([home / "a" / "psr"], Ranks()):
        methods = ["--method", "grpo", "psr"] if name == "--out" else []
        complains(cli(*methods, name, "a"), "a/psr: another run", "--out")
        assert not (home / "a" / "grpo").exists()
    assert contents(home) == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "1e-3"], ["--lr 0.001", "0.0003", "leave it out"]),
        (["--lr=1e-3"], ["--lr 0.001"]),
        (["--seed", "0"], ["--seed 0", "4"]),
        (["--steps", "1"], ["--steps 1", "2"]),
        (["--method", "opefo"], ["--method opefo", "grpo"]),
        (["--out", "elsewhere"], ["--out elsewhere"]),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(cli, home, argv, words):
    config_in(home / "a", "grpo", seed=4)
    before = contents(home)
    complains(cli("--resume", "a", *argv), *words)
    assert contents(home) == before


def test_a_run_goes_on_as_it_was_with_more_steps_at_most(home, monkeypatch):
    config_in(home / "a", "grpo:lr=1e-5", "opefo", seed=4, prompts=8)
    given = ["--seed", 4, "--prompts", 8, "--method", "grpo:lr=1e-5", "opefo", "--steps", 5]
    for argv, steps in (([], 2), (given, 5)):
        jobs = jobs_of(monkeypatch, "--resume", "a", *argv)
        settings = [s for s, _ in jobs]
        assert [(s.method, s.lr) for s in settings] == [("grpo:lr=1e-5", 1e-5), ("opefo", 3e-4)]
        assert {(s.steps, s.prompts, s.seed) for s in settings} == {(steps, 8, 4)}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"specs": ["grpo"]}', '{"specs": ["grpo"], "settings": {"speed": 1}}',
     '{"specs": 3, "settings": {}}', "\xff"],
)  # fmt: skip
def test_a_damaged_config_is_named(cli, home, text):
    (home / "a").mkdir()
    (home / "a" / "config.json").write_bytes(text.encode("latin-1"))
    before = contents(home)
    complains(cli("--resume", "a", "--quiet"), "--resume a", "config.json", "damaged")
    assert contents(home) == before


# ------------------------------------------------------------------------------------------------------------
# Progress, signals and pipes


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_the_progress_line_shows_the_last_of_each_number(monkeypatch, capsys, name):
    rows = [{"step": 0, "pass@1": 0.25}, {"step": 1, "entropy": None, "no_contrast": 1.0, "draws": 10}]
    run = SimpleNamespace(settings=Settings(steps=1, method=name), method=build(name), step=0, ranks=Ranks())
    monkeypatch.setattr(train, "train", lambda run: iter(rows))
    assert train.follow(run, quiet=False) == 0
    line = capsys.readouterr().err.split("\r")[-1]
    assert f"{name} 1/1" in line and "alike 100%" in line and "pass@1 0.25" in line and "None" not in line
    assert ("draws 10" in line) == (name == "dapo")


def interrupted(*_, **__):
    """Ctrl-C, as the terminal sends it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def test_the_first_ctrl_c_asks_and_the_second_stops_at_once(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with train.stop_on_signal() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop() and "checkpoint" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(tmp_path, program):
    (tmp_path / "torch.py").write_text("import signal, time\nsignal.raise_signal(2)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, REPO / program], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "stopped; nothing was written yet\n")


def test_ctrl_c_in_the_warm_start_ends_at_once_and_leaves_nothing(cli, home, monkeypatch):
    monkeypatch.setattr(train, "load_task_and_policy", interrupted)
    assert cli("--method", "grpo", "--out", "a") == (130, "", "stopped; nothing was written yet\n")
    assert list(home.iterdir()) == []


def test_a_reader_that_has_read_enough_is_no_error(home, monkeypatch, capsys):
    end, pipe = os.pipe()
    os.close(end)
    with os.fdopen(pipe, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert train.main(["--method", "grpo", "--steps", "1", "--out", "a", *TINY]) == 0
    assert capsys.readouterr().err == ""
    assert [row["step"] for row in rows_of("a")] == [0, 1] and (
        home / "a" / "entropy.png"
    ).stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------
# Help


def test_help_teaches_every_flag_and_every_method(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken
    code, out, _ = cli("--help")
    assert code == 0 and "examples:" in out and "(default: 0.0003)" in out and "(with --model: 1e-6)" in out
    for name in METHODS:
        assert f"  {name} " in out and METHODS[name].idea in out, name
    for f in fields(Settings):
        assert f"{train.flag(f.name)} " in out, f.name
    for title in ("training", "measuring", "language-model", "machine"):
        assert f" {title} options " in out, title


@pytest.mark.parametrize("name", METHODS)
def test_every_method_explains_its_options(name):
    text = train.method_help(name)
    for option, _, default, told in interventions.hyperparameters(METHODS[name]):
        assert f"{option}={default}" in text and told, f"{name}: {option} has no help"


def test_the_help_of_a_composition_is_that_of_its_members(cli):
    code, out, err = cli("--method", "opefo+clip_higher:help")
    assert (code, err) == (0, "") and "opefo: " in out and "clip_higher: " in out and "eps_high=" in out


# ------------------------------------------------------------------------------------------------------------
# The other chapters' demonstrations


@pytest.mark.slow
@pytest.mark.parametrize("chapter", ["entropy_math", "grpo", "interventions", "rollout", "eval"])
def test_every_chapter_shows_itself(chapter, tmp_path):
    """`python CHAPTER.py`, as the README says it, in a folder of its own."""
    done = subprocess.run(
        [sys.executable, REPO / f"{chapter}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and not done.stderr.count("Traceback"), done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 8
    if chapter == "interventions":
        assert all(f"{key} " in done.stdout for key in METHODS)
        assert (tmp_path / "runs" / "interventions.png").stat().st_size > 10_000
