"""The grader itself: right scripts get all points, wrong solutions lose theirs, broken files do no harm.

The golden data are compared with slow loops written from the equations.
"""
import ast
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn as nn

from .. import stages, worker
from ..blank import blank, functions, main
from ..submission import ROOT, Submission
from . import golden

pytestmark = pytest.mark.maintain
REFERENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "methods" / "reference.py")))
CALLS = stages.golden()[1]["calls"]
SCRIPTS = list(stages.TASKS_OF)


@pytest.fixture(scope="module")
def submission():
    running = Submission(ROOT / "micu.py", limit=3.0)
    yield running
    running.close()


@pytest.fixture
def graded(submission, tmp_path):
    """text -> {stage id: why it fails, or None} of all stages of a script, or those of some tasks or ids"""
    def grade(text: str, script: str, some=()):
        path = tmp_path / "solution.py"
        path.write_text(text)
        submission.load(path)
        return {stage.id: stages.failure(stage, submission, script) for stage in stages.stages_of(script)
                if not some or {stage.task, stage.id} & set(some)}
    return grade


def read(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


# ----------------------------------------------------------------------------------------------------- right and wrong
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_right_scripts_get_all_points(script, graded):
    failures = graded(read(script), script)
    assert {id.split("-")[0] for id in failures} == set(stages.TASKS_OF[script])
    assert not any(failures.values()), failures


def test_every_task_has_ten_points():
    for task in stages.TASKS:
        assert sum(stage.points for stage in stages.STAGES if stage.task == task) == 10, task


@pytest.mark.parametrize("wrong", golden.WRONG, ids=[f"{w['script']}-{w['task']}-{w['name']}" for w in golden.WRONG])
def test_a_wrong_solution_loses_its_stages_and_is_told_why(wrong, graded):
    failures = graded(golden.mistaken(wrong), wrong["script"], [wrong["task"]])
    failed = {id.split("-")[1]: why for id, why in failures.items() if why}
    assert sorted(failed) == sorted(wrong["loses"])
    assert any(f"hint: {wrong['hint']}\n" in why for why in failed.values()), failed


RIGHT = {  # other ways to the same: task, function, body
    "loops": ("fcmi", "micu", "fcmi_loss", """
    fine = coarse = 0
    for m in z:
        try:
            query = z[m] * (mask[m] if isinstance(mask, dict) else mask)
        except RuntimeError as error:
            raise ValueError(f"mask and {m} do not fit") from error
        for n in z:
            clips = [info_nce(query[i], z[n][i], temperature, similarity) for i in range(len(query))]
            fine = fine + sum(clips) / len(clips)
            coarse = coarse + info_nce(query.mean(1), z[n].mean(1), temperature, similarity)
    return fine, coarse
"""),
    "cross_entropy": ("info_nce", "micu", "info_nce", """
    if similarity == "cosine":
        query, candidates = (x / x.norm(dim=-1, keepdim=True) for x in (query, candidates))
    n = query.shape[-2]
    logits = torch.einsum("...id,...jd->...ij", query, candidates) / temperature
    return F.cross_entropy(logits.reshape(-1, n), torch.arange(n).repeat(logits.numel() // n ** 2))
"""),
    "cdist": ("nearest_code", "uni_code", "nearest_code", """
    return torch.cdist(z.reshape(1, -1, z.shape[-1]).float(), codebook[None].float())[0].argmin(1).view(z.shape[:-1])
"""),
    "one_hot": ("ema_update", "codaar", "ema_update", """
    chosen = F.one_hot(code_index, len(ema_count)).to(ema_sum.dtype)
    ema_count = ema_count * decay + chosen.sum(0) * (1 - decay)
    ema_sum = ema_sum.lerp(chosen.T @ vectors.detach(), 1 - decay)
    total = ema_count.sum()
    return ema_count, ema_sum, ema_sum / ((ema_count + 1e-5) / (total + 1e-5 * len(ema_count)) * total).unsqueeze(1)
"""),
    "one_vector_at_a_time": ("cujp", "micu", "CUJP.forward", """
        require_shape("modality", modality, (len(permutation), self.splits))
        parts = torch.stack([q.flatten(0, 1).chunk(self.splits, -1)[o] for q in quantized.values()
                             for o in range(self.splits)])
        parts = parts.view(len(quantized), self.splits, -1, self.code_dim // self.splits)
        losses = []
        for n, shown in enumerate(permutation.tolist()):
            for p in shown:
                order = self.permutations[p].tolist()
                puzzle = torch.cat([parts[modality[n, o], o, n] for o in order])
                losses.append(F.cross_entropy(self.classify(self.hidden(puzzle).relu())[None], torch.tensor([p])))
        return torch.stack(losses).mean()
"""),
    "all_pairs": ("club", "uni_code", "club_bound", """
    square = (y[None] - mu[:, None]).square()  # (clip of mu, clip of y, T, d)
    log_q = -0.5 * square / logvar.exp()[:, None]
    return log_q.diagonal().mean((0, 2)).sum() - log_q.mean((0, 1, 2)).sum()
"""),
    "copies_in_order": ("cascade", "codaar", "cascade", """
    if len({codebook.shape for codebook in codebooks.values()}) > 1 or sorted(order) != sorted(codebooks):
        raise ValueError("codebooks of one shape, and each of them once in the order")
    new = {m: codebook.clone() for m, codebook in codebooks.items()}
    for m in order:
        new[m] = torch.stack(list(new.values())).mean(0)
    return new
"""),
    "counting": ("open_set", "probes", "open_set_metrics", """
    share = lambda some, of: float(some.sum() / of.sum()) if of.any() else 0.0
    known, right = target < num_known, (confidence >= threshold) & (prediction == target)
    classes = [share(right & (target == c), target == c) for c in range(num_known) if (target == c).any()]
    os_star, unk = share(right & known, known), share((confidence < threshold) & ~known, ~known)
    hos = 2 / (1 / os_star + 1 / unk) if os_star and unk else 0
    return {"os_star": os_star, "unk": unk, "hos": hos, "os_star_class_mean": sum(classes) / max(1, len(classes))}
"""),
}


@pytest.mark.parametrize("name", RIGHT)
def test_another_right_solution_gets_all_points(name, graded):
    task, script, function, body = RIGHT[name]
    text = blank(read(script), function).replace("raise NotImplementedError\n", f"pass\n{body}", 1)
    failures = graded(text, script, [task])
    assert failures and not any(failures.values()), failures


# ---------------------------------------------------------------------------------------------------------- golden data
def slow_fcmi(z, mask, temperature, similarity):
    fine = coarse = 0
    for m, n in itertools.product(z, z):
        masked = z[m] * (mask[m] if isinstance(mask, dict) else mask)
        clips, segments, _ = masked.shape
        fine = fine + REFERENCE.mean(REFERENCE.minus_log_share(masked[i, j], z[n][i], j, temperature, similarity)
                                     for i in range(clips) for j in range(segments))
        means = [REFERENCE.mean(clip) for clip in z[n]]
        queries = [REFERENCE.mean(clip) for clip in masked]
        coarse = coarse + REFERENCE.mean(REFERENCE.minus_log_share(query, means, i, temperature, similarity)
                                         for i, query in enumerate(queries))
    return fine, coarse


def slow_info_nce(query, candidates, temperature, similarity):
    groups = zip(query.reshape(-1, *query.shape[-2:]), candidates.reshape(-1, *candidates.shape[-2:]))
    return REFERENCE.mean(REFERENCE.minus_log_share(q, group, i, temperature, similarity)
                          for queries, group in groups for i, q in enumerate(queries))


def slow_nearest(z, codebook):
    rows = z.detach().double().reshape(-1, z.shape[-1])
    return torch.tensor([REFERENCE.slow_nearest(row, codebook.detach().double()) for row in rows]).view(z.shape[:-1])


def log_density(mu, logvar, y):
    return torch.distributions.MultivariateNormal(mu, torch.diag_embed(logvar.exp())).log_prob(y)


def slow_club(mu, logvar, y):
    clips, segments = range(len(y)), range(y.shape[1])
    positive = [log_density(mu[i, t], logvar[i, t], y[i, t]) for i in clips for t in segments]
    negative = [log_density(mu[i, t], logvar[i, t], y[j, t]) for i in clips for j in clips for t in segments]
    return REFERENCE.mean(positive) - REFERENCE.mean(negative)


def slow_cascade(codebooks, order):
    """Eq. 6 and 7 written out for three."""
    first, second, third = order
    new_first = (codebooks[first] + codebooks[second] + codebooks[third]) / 3
    new_second = (new_first + codebooks[second] + codebooks[third]) / 3
    new = {first: new_first, second: new_second, third: (new_first + new_second + codebooks[third]) / 3}
    return {m: new[m] for m in codebooks}


def slow_open_set(confidence, prediction, target, num_known, threshold):
    clips = list(zip(confidence.tolist(), prediction.tolist(), target.tolist()))
    known = [c >= threshold and p == t for c, p, t in clips if t < num_known]
    unknown = [c < threshold for c, p, t in clips if t >= num_known]
    classes = [[c >= threshold and p == t for c, p, t in clips if t == k] for k in range(num_known)]
    shares = [sum(hits) / len(hits) for hits in classes if hits]
    a, b = sum(known) / max(len(known), 1), sum(unknown) / max(len(unknown), 1)
    return {"os_star": a, "os_star_class_mean": sum(shares) / max(len(shares), 1), "unk": b,
            "hos": 2 * a * b / (a + b) if a + b else 0.0}


class SlowCUJP(nn.Module):
    def __init__(self, code_dim, splits, permutations, seed):
        super().__init__()
        self.hidden, self.classify = nn.Linear(code_dim, 512), nn.Linear(512, permutations)
        self.register_buffer("permutations", torch.zeros(permutations, splits, dtype=torch.int64))

    def forward(self, quantized, modality, permutation):
        losses, splits = [], self.permutations.shape[1]
        vectors = [tensor.flatten(0, 1) for tensor in quantized.values()]
        for n, p in itertools.product(range(len(permutation)), range(permutation.shape[1])):
            parts = [vectors[modality[n, o]][n].chunk(splits)[o] for o in range(splits)]
            shown = torch.cat([parts[o] for o in self.permutations[permutation[n, p]].tolist()])
            logits = self.classify(torch.relu(self.hidden(shown)))
            losses.append(-torch.log(logits.exp()[permutation[n, p]] / logits.exp().sum()))
        return REFERENCE.mean(losses)


SLOW = SimpleNamespace(
    fcmi_loss=slow_fcmi, info_nce=slow_info_nce, nearest_code=slow_nearest, club_bound=slow_club, cascade=slow_cascade,
    open_set_metrics=slow_open_set, CUJP=SlowCUJP,
    ema_update=lambda count, total, index, vectors, decay: REFERENCE.slow_ema_update(
        count, total, index, vectors.detach(), decay))


OF_FUNCTIONS = [call for call in CALLS if call.split("/")[0] not in ("straight_through", "reset")
                and "unfit" not in CALLS[call]]
OF_FUNCTIONS.remove("info_nce/large")  # the loop takes the exponential of a thousand


@pytest.mark.parametrize("call", OF_FUNCTIONS)
def test_golden_outputs_and_gradients_are_those_of_the_slow_loop(call):
    request = stages.filled(CALLS[call])
    found = stages.values_of(request, worker.answer(SLOW, request)["values"])
    wanted = {key: value for key, value in stages.stored(f"out/{call}").items() if not key.startswith("kept")}
    assert wanted
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value.double(), rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("reset")])
def test_golden_resets_are_of_the_dead_codes(call):
    make, kept = stages.filled(CALLS[call])["make"], stages.stored(f"out/{call}")
    settings = make["settings"]
    dead, _ = REFERENCE.dead_and_live(make["state"]["steps_since_used"], settings["reset_after"],
                                      settings["reset_rule"], settings["reset_source"])
    assert kept["derived/moved"].nonzero().flatten().tolist() == dead
    assert 0 < len(dead) < 8 or "all_dead" in call
    if "derived/became" in kept:
        assert kept["derived/became"].tolist() == [1 if k in dead else -1 for k in range(8)]


@pytest.mark.parametrize("call", ["straight_through/forward", "straight_through/forward@codaar"])
def test_golden_codes_are_the_nearest_and_their_gradient_that_of_the_identity(call):
    request, kept = stages.filled(CALLS[call]), stages.stored(f"out/{call}")
    z, state = request["arguments"]["z"], request["make"]["state"]
    books = dict(zip(z, state["codebooks"])) if "codebooks" in state else dict.fromkeys(z, state["codebook"])
    index = {m: slow_nearest(z[m], books[m]) for m in z}
    chosen = {m: books[m][index[m]] for m in z}
    joint = torch.cat(list(chosen.values()), -1)
    for m in z:
        value = joint if "codebooks" in state else chosen[m]
        assert torch.equal(kept[f"out/1/{m}"], index[m])
        torch.testing.assert_close(kept[f"out/0/{m}"], value)
        weight = torch.arange(1, value.numel() + 1, dtype=torch.float64).cos().view(value.shape)
        for i, n in enumerate(z):
            wanted = weight[..., 4 * i:4 * i + 4] if "codebooks" in state else weight * (m == n)
            torch.testing.assert_close(kept[f"grad/out/0/{m}/by/z/{n}"], wanted)


# --------------------------------------------------------------------------------------------------------- broken files
BODY = {  # what fcmi_loss does, and what must be said of it
    "endless loop": ("while True: pass", "it did not end within"),
    "huge memory": ("return torch.zeros(2 ** 40, dtype=torch.uint8)", "more than 4 GiB"),
    "many objects": ("return [0] * 2 ** 33", "more than 4 GiB"),
    "end of the program": ("sys.exit(3)", "it ends the program (SystemExit 3) in line"),
    "end of the process": ("import os; os._exit(0)", "it ended the whole process"),
    "endless recursion": ("return fcmi_loss(z, mask, temperature, similarity)", "RecursionError"),
    "an error": ("return z['audio'] @ z['audio']", "RuntimeError: "),
    "its own error": ("raise type('Odd', (BaseException,), {})('so')", "Odd: so"),
    "nothing": ("return None", "returned None"),
    "words": ("return 'fine', 'coarse'", "returned a tuple of (a str, a str)"),
    "one too few": ("return z['audio'].sum()", "result[0] is missing"),
    "another kind": ("return z['audio'].sum().long(), z['audio'].sum()", "torch.int64"),
    "much print": ("print('x' * 10 ** 8); return None", "File too large"),
    "raw bytes": ("import os; os.write(1, b'x' * 100); return None", "returned None"),
    "not written": ("raise NotImplementedError", "fcmi_loss is not written yet"),
}


@pytest.mark.parametrize("name", BODY)
def test_a_broken_function_costs_its_task_and_nothing_else(name, graded):
    body, message = BODY[name]
    text = blank(read("micu"), "fcmi_loss").replace("raise NotImplementedError", body, 1)
    failures = graded(text, "micu", ["info_nce", "fcmi-fine", "fcmi-coarse"])
    assert len(failures) == 9
    for id, why in failures.items():
        assert (why is not None) == id.startswith("fcmi"), (id, why)
    assert message in failures["fcmi-fine"]


@pytest.mark.parametrize("script, name, task", [
    ("micu", "info_nce", "fcmi"), ("micu", "nearest_code", "straight_through"), ("codaar", "new_codes", "reset"),
    ("uni_code", "sample_rows", "reset"), ("codaar", "copies_of_live", "reset")])
def test_of_two_that_are_not_written_the_one_to_begin_with_is_named(script, name, task, graded):
    dotted = next(found for found in names_of(read(script)) if found.split(".")[-1] == name)
    failures = graded(blank(read(script), dotted), script, [task])
    assert any((why or "").startswith(f"first {name}: ") for why in failures.values()), failures


FILES = {
    "syntax": ("def f(:", "SyntaxError in line 1"),
    "import": ("import no_such_package", "No module named 'no_such_package' in line 1"),
    "exit": ("import sys; sys.exit()", "it ends the program"),
    "kill": ("import os; os._exit(1)", "it ended the whole process"),
    "loop": ("while True: pass", "it did not end within"),
    "bytes": ("\0\1", "cannot be imported"),
    "empty": ("", "has no attribute"),
    "prints": ("print('hello')\nraise ValueError('\\n'.join(['many'] * 9))", "ValueError: many many"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_gets_nothing(name, graded):
    text, message = FILES[name]
    failures = graded(text, "micu")
    assert len(failures) == 45 and all(message in why for why in failures.values()), failures


def test_a_missing_file_gets_nothing(submission, tmp_path):
    submission.load(tmp_path / "absent.py")
    assert "there is no file" in stages.failure(stages.STAGES[0], submission, "micu")
    assert stages.kind(tmp_path / "absent.py") == ""


# --------------------------------------------------------------------------------------------------------- command line
def grade(*args, cwd):
    return subprocess.run([sys.executable, "-m", "pytest", ROOT / "tests" / "course", "-p", "no:cacheprovider", *args],
                          cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_command_prints_points_and_writes_both_results_files(tmp_path):
    script = tmp_path / "my micu.py"
    script.write_text(blank(read("micu"), "fcmi_loss"))
    done = grade("--script", "my micu.py", "-m", "fcmi or info_nce", "--junitxml", "junit.xml", "--gradescope",
                 "results.json", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fcmi_loss is not written yet" in done.stdout and "Traceback" not in done.stdout
    assert "fcmi                0/10" in done.stdout and "total              10/20" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == 10 == sum(test["score"] for test in results["tests"])
    assert sum(test["max_score"] for test in results["tests"]) == 20
    by_name = {test["name"]: test for test in results["tests"]}
    assert by_name["fcmi: fine"]["output"].startswith("fcmi_loss is not written yet")
    assert by_name["fcmi: fine"]["status"] == "failed" and by_name["info_nce: dot"]["status"] == "passed"
    cases = ElementTree.parse(tmp_path / "junit.xml").findall(".//testcase")
    points = [sum(int(p.get("value")) for case in cases for p in case.iter("property") if p.get("name") == name)
              for name in ("points", "max_points")]
    assert points == [10, 20]


def test_nothing_is_graded_without_a_script(tmp_path):
    done = grade("--collect-only", "-q", cwd=tmp_path)
    assert "test_stage" not in done.stdout and done.returncode == 5, done.stdout


# ------------------------------------------------------------------------------------------------------------- blanking
def names_of(text: str) -> dict:
    """{dotted name: node} of functions alone"""
    return {name: node for name, node in functions(ast.parse(text)).items() if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("script, of_others", [("micu", ()), ("uni_code", ("micu",)), ("codaar", ("micu", "uni_code"))])
def test_every_function_can_be_taken_out_and_nothing_else_changes(script, of_others):
    text = read(script)
    lines, found = text.splitlines(), names_of(text)
    known = [name for other in of_others for name in names_of(read(other))]  # the same text there
    assert len(found) > 25
    for name, before in found.items():
        if name in known:
            continue
        shorter = blank(text, name)
        after = names_of(shorter)[name]
        assert ast.dump(after.args) == ast.dump(before.args) and ast.get_docstring(after) == ast.get_docstring(before)
        assert ast.unparse(after.body[-1]) == "raise NotImplementedError"
        docstring = ast.get_docstring(after) is not None
        checks = [ast.unparse(node) for node in after.body[docstring:-1]]
        assert all(check.startswith("require_shape(") for check in checks), checks
        left = shorter.splitlines()
        rest = len(lines) - before.end_lineno
        assert left[:before.lineno] == lines[:before.lineno] and left[len(left) - rest:] == lines[len(lines) - rest:]


def test_checks_of_shapes_stay():
    left = ast.unparse(names_of(blank(read("uni_code"), "club_bound"))["club_bound"])
    assert left.count("require_shape") == 3 and "y.var" not in left and "Eq. 5" in left


ODD = """
def one(x): return x
class A:
    def same(self): pass
    class B:
        def deep(self):
            # a comment
            def inner(): return 1
            return inner
if True:
    async def two():
        '''Doc.'''
    @property
    def three(
        x,
    ):  # head
        return 1
"""


@pytest.mark.parametrize("name", ["one", "A.same", "A.B.deep", "A.B.deep.inner", "three"])
def test_odd_places_are_found(name):
    (body,) = functions(ast.parse(blank(ODD, name)))[name].body
    assert ast.unparse(body) == "raise NotImplementedError"


@pytest.mark.parametrize("words, message", [
    ("micu.py fcmi_los", "no function fcmi_los; did you mean fcmi_loss"),
    ("micu.py CUJP", "CUJP is a class; give methods"),
    ("micu.py draw_puzzle CUJP.forward", "no function draw_puzzle"), ("absent.py f", "absent.py: No such file"),
    ("README.md f", "README.md is no Python file: line")])
def test_what_cannot_be_taken_out_is_said_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["blank", *words.split(), "-o", str(tmp_path / "out.py")])
    with pytest.raises(SystemExit, match=re.escape(message)) as stop:
        main()
    assert "\n" not in str(stop.value.code) and not (tmp_path / "out.py").exists()


def test_several_are_taken_out_and_nothing_is_overwritten(tmp_path, monkeypatch):
    out = tmp_path / "out.py"
    monkeypatch.setattr(sys, "argv", ["blank", str(ROOT / "micu.py"), "fcmi_loss", "CUJP.forward", "-o", str(out)])
    main()
    text = out.read_text()
    assert text.count("raise NotImplementedError\n") == 2
    with pytest.raises(SystemExit, match="is there already"):
        main()
    assert out.read_text() == text
