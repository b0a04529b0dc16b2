"""The README tells the truth about commands and tags, the help explains every flag, scripts share their texts."""
import ast
import difflib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from conftest import run_here
from data import InputError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = [path for path in (ROOT / f"{name}.py" for name in ("uni_code", "micu", "codaar")) if path.exists()]
METHOD_SPECIFIC = {"Args", "METHOD", "QUANTIZER", "PAPER"}


OWN = ("epochs", "seed", "mm_ema", "codebook_size", "commitment_cost", "reset_source")  # of other defaults


def glossary() -> list:
    """Patterns of the tags in the README's glossary: <m>, <d>, <k> and <i> stand for one word."""
    rows = re.findall(r"^\| (`(?:losses|charts|codebook|eval)/.*?) \|", README, re.M)
    tags = [tag for row in rows for tag in re.findall(r"`([^`]+)`", row)]
    return [re.sub(r"<\w>", "[a-z0-9]+", re.escape(tag)) for tag in tags]


def test_logged_tags_and_glossary_are_the_same(default_runs):
    logged = {tag for run in default_runs.values() for line in run.metrics for tag in line} - {"step"}
    patterns = glossary()
    assert len(patterns) > 25
    undocumented = [tag for tag in logged if not any(re.fullmatch(p, tag) for p in patterns)]
    assert not undocumented
    never_logged = [p for p in patterns if not any(re.fullmatch(p, tag) for tag in logged)]
    assert not never_logged


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_commands_in_the_documents_parse(script):
    module = __import__(script.stem)
    sources = [README, *(path.read_text() for path in (ROOT / "benchmarks").glob("*.py")), script.read_text()]
    commands = {line.strip(" `") for text in sources
                for line in re.findall(rf"python {script.stem}\.py[^`\n\"#&|;]*", text) if "--help" not in line}
    assert commands
    for command in commands:
        tyro.cli(module.Args, args=[word.replace("...", "x") for word in shlex.split(command)[2:]])


@pytest.mark.parametrize("script", ["uni_code", "micu", "codaar"])
def test_the_rows_of_the_benchmarks_change_a_setting_and_stand_beside_their_command(script):
    rows = runpy.run_path(str(ROOT / "benchmarks" / "ablations.py"))["ROWS"][script]
    kept = json.loads((ROOT / "benchmarks" / f"{script}.json").read_text())
    Args = __import__(script).Args
    for name, (flags, seeds) in rows.items():
        assert (tyro.cli(Args, args=shlex.split(flags)) == Args()) == (flags == ""), name
        if name in kept:
            assert kept[name]["command"].split() == f"python {script}.py {flags} --protocol clean --seed S".split()
            assert len(kept[name]["seeds"]) == seeds, name
    assert set(kept) <= set(rows)


def test_the_two_commands_of_the_readme_are_there():
    for command in ("python micu.py --cujp-splits 8 --mask-ratio 0.3", "python -m pytest"):
        assert f"\npip install -r requirements.txt && {command}\n" in README


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_has_a_help_text(script):
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True,
                           env={"COLUMNS": "400", "PATH": ""}).stdout
    options = re.findall(r"^│ (--[a-z-]+)(.*)│$(?:\n^│  +(.*?) *│$)?", shown, re.M)
    assert len(options) > 30
    for name, rest, below in options:
        text = re.sub(r"\(default: .*\)|\{.*?\}|\[.*\]|[A-Z]{3,}|\|", "", rest + below).strip()
        assert len(text) > 5, f"{name} has no help"


def definitions(path: Path) -> dict:
    source = path.read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in METHOD_SPECIFIC} | {
            node.targets[0].id: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and node.targets[0].id not in METHOD_SPECIFIC}


def fields(path: Path) -> dict:
    """The fields of Args that scripts share, with their comments: the lines from one field's end to its own."""
    source = path.read_text()
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    ends = [args.lineno, *(node.end_lineno for node in args.body)]
    return {node.target.id: source.splitlines()[start:node.end_lineno] for node, start in zip(args.body, ends)
            if node.target.id not in OWN}


def test_shared_flags_have_one_text_and_order():
    every = [fields(path) for path in SCRIPTS]
    for a in every:
        for b in every:
            shared = [name for name in a if name in b]
            assert len(shared) > 20 and [a[name] for name in shared] == [b[name] for name in shared]
            assert shared == [name for name in b if name in a]


def test_same_name_same_text_and_order():
    every = [definitions(path) for path in SCRIPTS]
    for a in every:
        for b in every:
            shared = [name for name in a if name in b]
            assert [a[name] for name in shared] == [b[name] for name in shared]
            assert shared == [name for name in b if name in a]


def sections(path: Path) -> list:
    """Names of the sections: the comment lines that end a rule, and those inside the main program."""
    return re.findall(r"^(?:# -{20,} (.*)|    # ---- (.*))$", path.read_text(), re.M)


def test_sections_come_in_one_order():
    every = [sections(path) for path in SCRIPTS]
    assert len(every[0]) >= 12 and all(names == every[0] for names in every)


def without_method(path: Path) -> list:
    """The main program without the lines marked as the method's own."""
    main = path.read_text().split('if __name__ == "__main__":\n')[1]
    return [line for line in main.splitlines() if not line.endswith("# METHOD")]


def test_main_programs_differ_in_marked_lines_only():
    assert all(without_method(path) == without_method(SCRIPTS[0]) for path in SCRIPTS)


@pytest.mark.parametrize("pair", [("micu", "uni_code"), ("uni_code", "codaar"), ("micu", "codaar")])
def test_most_lines_are_shared(pair):
    a, b = ((ROOT / f"{name}.py").read_text().splitlines() for name in pair)
    same = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert same >= 0.7 * max(len(a), len(b))


def test_a_script_imports_only_data_and_probes_of_this_project():
    local = {path.stem for path in ROOT.glob("*.py")}
    for script in SCRIPTS:
        nodes = list(ast.walk(ast.parse(script.read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imported & local == {"data", "probes"}


def commands(text: str, program: str) -> list:
    found = re.findall(rf"python {program}\.py [^`\n#|]*", text)
    return sorted({re.sub(r"\bRUN\b|runs/\.\.\.", "absent", command.strip()) for command in found})


@pytest.mark.parametrize("command", commands((ROOT / "benchmarks" / "official.md").read_text(), "data"))
def test_a_conversion_of_the_recipes_stops_at_the_first_missing_file(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a readable list"):
        run_here(*shlex.split(command)[1:])


@pytest.mark.parametrize("command", commands((ROOT / "benchmarks" / "official.md").read_text() + README, "probes"))
def test_a_probe_of_the_documents_stops_at_the_missing_model(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a checkpoint"):
        run_here(*(word for word in shlex.split(command)[1:] if word not in ("[FILE", "...]", "...", "FILE")))
