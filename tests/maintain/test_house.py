"""The layout: same name, same text; imports downward only; no long functions, lines or hidden methods."""
import ast
import difflib
import re
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.maintain
SCRIPTS = [ROOT / f"{name}.py" for name in ("uni_code", "micu", "codaar", "benchmarks/comparators")]
OWN = {"Args", "Method", "METHOD", "QUANTIZER", "LIMITS"}  # names whose texts differ
OWN_FIELDS = {"epochs", "codebook_size", "codebook_init", "reset_source", "mm_ema", "similarity",
              "temperature"}  # of other defaults or choices
FLOORS = {"run": set(), "pictures": set(), "data": {"run", "datasets"}, "probes": {"run", "data", "pictures"},
          **dict.fromkeys(("micu", "uni_code", "codaar"), {"run", "data", "probes"})}
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("official/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("datasets/*.py")]


def definitions(path: Path) -> dict:
    """{name: text} of the classes, functions and constants, in order. `Codebook`, `Optimisation`: see the fields."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            [node.targets[0].id] if isinstance(node, ast.Assign) else []
        found |= {name: ast.get_source_segment(source, node) for name in names}
    return {name: text for name, text in found.items() if name not in OWN | {"Codebook", "Optimisation"}}


def fields(path: Path) -> dict:
    """{flag: lines} of all groups: from the end of the field before to its own."""
    lines, found = path.read_text().splitlines(), {}
    for group in ast.parse("\n".join(lines)).body:
        if isinstance(group, ast.ClassDef) and group.name in ("Method", "Codebook", "Optimisation", "Data"):
            ends = [group.lineno, *(node.end_lineno for node in group.body)]
            found |= {node.target.id: lines[start:node.end_lineno] for node, start in zip(group.body, ends)}
    return found


@pytest.mark.parametrize("read", [definitions, fields])
def test_same_name_same_text_and_order(read):
    every = [read(path) for path in SCRIPTS]
    for a in every:
        for b in every:
            shared = [name for name in a if name in b and name not in OWN_FIELDS]
            assert len(shared) >= 10
            assert [a[name] for name in shared] == [b[name] for name in shared]
            assert shared == [name for name in b if name in a and name not in OWN_FIELDS]


def sections(path: Path) -> list:
    """Names of the sections: the comment lines that end a rule, and those inside the main program."""
    return re.findall(r"^(?:# -{20,} (.*)|    # ---- (.*))$", path.read_text(), re.M)


def test_sections_come_in_one_order():
    every = [sections(path) for path in SCRIPTS]
    assert len(every[0]) >= 9 and all(names == every[0] for names in every)


def shared_main(path: Path) -> str:
    """The main program without what lies between the rules of the method."""
    main = path.read_text().split('if __name__ == "__main__":\n')[1]
    without, parts = re.subn(r"^ +# =+ (.*)\n(?:.*\n)*? +# =+ end of \1\n", "METHOD\n", main, flags=re.M)
    assert parts == 2
    return without


def test_main_programs_differ_between_the_rules_only():
    assert all(shared_main(path) == shared_main(SCRIPTS[0]) for path in SCRIPTS)


def test_the_main_program_is_short_and_its_step_fits_a_screen():
    for path in SCRIPTS:
        main = path.read_text().split('if __name__ == "__main__":\n')[1]
        step = main[main.index("        # Encode."):main.index("        step += 1\n")]
        refusals = main.count("raise InputError")  # of settings that do not go together, two lines each
        assert len(step.splitlines()) <= 55 and len(main.splitlines()) - 2 * refusals <= 108, path.stem


@pytest.mark.parametrize("pair", [("micu", "uni_code"), ("uni_code", "codaar"), ("micu", "codaar"),
                                  ("uni_code", "benchmarks/comparators")])
def test_most_lines_are_shared(pair):
    a, b = ((ROOT / f"{name}.py").read_text().splitlines() for name in pair)
    same = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert same >= 0.5 * max(len(a), len(b))


def imported(path: Path, late: bool) -> set:
    """Names of the modules that a file imports, at its top or (`late`) inside functions."""
    tree = ast.parse(path.read_text())
    nodes = set(ast.walk(tree)) - set(tree.body) if late else tree.body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in names | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_imports_run_downward():
    local = {path.stem for path in ROOT.glob("*.py")} | {"official", "benchmarks", "datasets"}
    for path in ROOT.glob("*.py"):
        assert imported(path, False) & local <= FLOORS[path.stem], path.stem
    for path in SCRIPTS:  # also the one among the benchmarks
        assert imported(path, False) & local == {"run", "data", "probes"}, path.stem
    for path in SOURCES:
        assert not imported(path, True) & local, f"{path.name} imports late"
        assert "sys.path" not in path.read_text(), f"{path.name} changes where modules are found"
    for path in ROOT.glob("official/*.py"):
        assert not imported(path, False) & {"benchmarks"}
    for path in ROOT.glob("datasets/*.py"):
        assert not imported(path, False) & local, path.name


def test_shared_machinery_names_no_method():
    words = re.compile(r"micu|uni.?code|codaar|fcmi|cujp|club|cascade|\bdta\b|\bcsa\b", re.I)
    for name in ("run", "data", "probes"):
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        found = [line for line in lines if words.search(line) and "SCRIPTS =" not in line and "(MICU" not in line
                 and "Uni-Code's Table" not in line]  # a paper may be cited
        assert not found, name


def test_lines_and_functions_are_short():
    for path in SOURCES:
        text = path.read_text()
        assert not [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120], path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path.parent == ROOT:
                assert node.end_lineno - node.lineno < 50, (path.name, node.name)


def test_every_flag_is_read():
    for path in SCRIPTS:
        text = path.read_text() + (ROOT / "run.py").read_text()
        for name in fields(path):
            assert re.search(rf"args\.{name}\b", text), f"{path.stem}: {name}"
