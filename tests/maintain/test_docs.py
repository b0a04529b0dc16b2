"""The documents tell the truth about commands and tags, and the help explains every flag."""
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro

from benchmarks import ablations, tables
from conftest import ROOT, SCRIPTS, run_here
from official import checkpoints
from run import InputError

pytestmark = pytest.mark.maintain
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "official" / "README.md"]
TEXT = "\n".join(path.read_text() for path in DOCUMENTS)
EVERY = {**{name: f"{name}.py" for name in SCRIPTS}, "benchmarks.comparators": "-m benchmarks.comparators"}


def glossary() -> list:
    """Patterns of the tags in docs/metrics.md: <m>, <d>, <k> and <i> stand for one word."""
    rows = re.findall(r"^\| (`(?:losses|charts|codebook|eval)/.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    tags = [tag for row in rows for tag in re.findall(r"`([^`]+)`", row)]
    return [re.sub(r"<\w>", "[a-z0-9]+", re.escape(tag)) for tag in tags]


@pytest.fixture(scope="session")
def every_tag(default_runs) -> set:
    """What the scripts log, and what all probes, clean and published, find of MICU and CoDAAR."""
    tags = {tag for run in default_runs.values() for line in run.metrics for tag in line} - {"step"}
    tags |= {f"losses/{name}" for name in ("align", "cross")}  # of comparators, whose own tests hold them
    micu, codaar = default_runs["micu"], default_runs["codaar"]
    for module, run, tasks in (("probes.py", micu, "localization retrieval x_retrieval segmentation"),
                               ("official/protocol.py", micu, "classification open_set localization"),
                               ("official/protocol.py", codaar, "classification")):
        out = micu.cwd / "tags.json"
        assert run_here(module, run.run, micu.results["args"]["data"][0], "--tasks", *tasks.split(), "--out", out) == 0
        tags |= set(json.loads(out.read_text()))
    return tags


def test_logged_tags_and_glossary_are_the_same(every_tag):
    patterns = glossary()
    assert len(patterns) > 25
    undocumented = [tag for tag in every_tag if not any(re.fullmatch(p, tag) for p in patterns)]
    assert not undocumented
    never_logged = [p for p in patterns if not any(re.fullmatch(p, tag) for tag in every_tag)]
    assert not never_logged


@pytest.mark.parametrize("script", EVERY)
def test_commands_in_the_documents_parse(script):
    module, called = importlib.import_module(script), f"python {EVERY[script]}"
    benchmarks = [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    sources = [TEXT, *benchmarks, Path(module.__file__).read_text()]
    commands = {line.strip(" `") for text in sources
                for line in re.findall(rf"{re.escape(called)}[^`\n\"#&|;]*", text) if "--help" not in line and "{" not in line}
    assert commands
    for command in commands:
        words = shlex.split(command.removeprefix(called))
        tyro.cli(module.Args, args=[word.replace("...", "x") for word in words])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_rows_of_the_benchmarks_are_settings_that_differ(script):
    Args = __import__(script).Args
    for data in ablations.SETS:
        settings = [tyro.cli(Args, args=shlex.split(flags)) for flags in ablations.rows_of(script, data).values()]
        assert settings[0] == Args() and all(settings.count(one) == 1 for one in settings)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_recipes_stand_in_the_documents_and_parse(script):
    """`as the paper says` and `as released`, as the benchmarks run them."""
    text = (ROOT / "docs" / f"{script}.md").read_text()
    for name in ("as the paper says", "as released"):
        flags = ablations.ROWS[script][name]
        assert f"python {script}.py {flags}  # {name}" in text
        tyro.cli(__import__(script).Args, args=shlex.split(flags))


def test_the_tables_of_the_documents_are_those_of_the_results():
    assert set(tables.DOCUMENTS) <= set(DOCUMENTS)
    for path in tables.DOCUMENTS:
        assert tables.filled(path.read_text()) == path.read_text(), f"python -m benchmarks.tables: {path.name}"


def test_the_lines_of_the_readme_that_encode_an_array(default_runs):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    exec(code.replace('"RUN"', repr(str(default_runs["micu"].run))), names)
    assert names["quantized"].shape == (8, 10, 64) and names["code_index"].shape == (8, 10)
    codebook = names["model"].quantizer.codebook
    assert torch.equal(codebook[names["code_index"]], names["quantized"])


def test_the_two_commands_of_the_readme_are_there():
    for command in ("python micu.py --cujp-splits 8 --mask-ratio 0.3", "python -m pytest"):
        assert f"\npip install -r requirements.txt && {command}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("data", ablations.PAIRS)
def test_the_rows_of_the_comparators_are_settings_that_differ(data):
    Args, called = importlib.import_module("benchmarks.comparators").Args, f"python {EVERY['benchmarks.comparators']} "
    commands = [ablations.command_of("comparators", data, row) for row in ablations.ROWS["comparators"]]
    assert len(commands) == 24 and all(command.startswith(called) for command in commands)
    settings = [tyro.cli(Args, args=shlex.split(command.removeprefix(called))) for command in commands]
    assert all(settings.count(one) == 1 for one in settings)


@pytest.mark.parametrize("script", EVERY)
def test_the_help_explains_every_flag_in_groups_and_shows_its_default(script):
    shown = subprocess.run([sys.executable, *EVERY[script].split(), "--help"], capture_output=True, text=True,
                           check=True, cwd=ROOT, env={"COLUMNS": "100", "PATH": ""}).stdout
    assert re.findall(r"^╭─ (\w+) options ─", shown, re.M) == ["method", "codebook", "optimisation", "data", "running"]
    flat = re.sub(r"\s+", " ", re.sub(r"[│╭╰─╮╯]", " ", shown))
    options = re.findall(r" (--[a-z-]+)(?:, --no-[a-z-]+)? (.*?)\(default: (.*?)\)", flat)
    assert 30 <= len(options) <= 36 and len(options) == len(importlib.import_module(script).Args.__dataclass_fields__)
    for name, text, _ in options:
        text = re.sub(r"\{.*?\}|\[.*\]|[A-Z]{3,}|\|", "", text).strip()
        assert len(text) > 5, f"{name} has no help"
    unset = {name for name, _, default in options if default == "None"}
    assert unset <= {"--resume", "--max-steps", "--lambda-self"}


def commands(text: str, program: str) -> list:
    found = re.findall(rf"python {program} [^`\n#|]*", text)
    return sorted({re.sub(r"\bRUN\b|runs/\.\.\.", "absent", command.strip()) for command in found})


@pytest.mark.parametrize("command", commands(TEXT, r"-m official\.convert"))
def test_a_conversion_of_the_recipes_stops_at_the_first_missing_file(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[3:]
    if words[0].isupper():  # SET ROOT
        pytest.skip("a pattern of commands, not a command")
    with pytest.raises(ValueError, match="not a readable list"):
        run_here("official.convert", *words)


@pytest.mark.parametrize("command", commands(
    TEXT + checkpoints.__doc__, r"(?:probes\.py|-m official\.protocol|-m official\.checkpoints)"))
def test_a_probe_of_the_documents_stops_at_the_missing_model(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(command)[1:] if word not in ("-m", "[FILE", "...]", "...", "FILE")]
    with pytest.raises(InputError, match="not a checkpoint"):
        run_here(*words)
