"""The options of the grader, the table of points and the results file; without `--script` there is nothing to grade."""
import json
import time
from pathlib import Path

import pytest

from . import stages
from .submission import Submission


def pytest_addoption(parser):
    group = parser.getgroup("course", "grading a script, tests/course")
    group.addoption("--script", help="the file to grade, a copy of one of the scripts or of probes.py")
    group.addoption("--gradescope", metavar="FILE", help="also write the results file that Gradescope reads")


def pytest_configure(config):
    for task in stages.TASKS:
        config.addinivalue_line("markers", f"{task}: a task of the course, graded with --script")
    if config.getoption("script", None):
        config.pluginmanager.register(Points(config.getoption("gradescope", None)), "course-points")
        config.option.reportchars = "N"  # the table of points says what failed


def pytest_ignore_collect(collection_path, config):
    """Either the grader's stages or the test of the grader."""
    grading = bool(config.getoption("script", None))
    if collection_path.name == "test_course.py" and not grading or collection_path.name == "teacher" and grading:
        return True
    return None


def pytest_generate_tests(metafunc):
    if "stage" in metafunc.fixturenames:
        script = stages.kind(metafunc.config.getoption("script"))
        chosen = [pytest.param(stage, id=stage.id, marks=getattr(pytest.mark, stage.task))
                  for stage in stages.stages_of(script)]
        metafunc.parametrize("stage", chosen)


def pytest_collection_modifyitems(items):
    for item in items:
        if "stage" in getattr(item, "fixturenames", ()):
            stage = item.callspec.params["stage"]
            item.user_properties += [("task", stage.task), ("stage", stage.name), ("max_points", stage.points)]


@pytest.fixture(scope="session")
def script(request) -> str:
    return request.config.getoption("script")


@pytest.fixture(scope="session")
def submission(script):
    running = Submission(script)
    yield running
    running.close()


class Points:
    """Collects what the tests earn."""

    def __init__(self, gradescope):
        self.gradescope, self.rows, self.started_at = gradescope, {}, time.time()

    def pytest_runtest_logreport(self, report):
        row = dict(report.user_properties)
        if "task" in row and (report.when == "call" or report.failed):
            row["points"] = row["max_points"] * report.passed
            self.rows[report.nodeid] = row | {"message": report.longreprtext}

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("points")
        for task in dict.fromkeys(row["task"] for row in self.rows.values()):
            rows = [row for row in self.rows.values() if row["task"] == task]
            single = "  ".join(f"{row['stage']} {row['points']}/{row['max_points']}" for row in rows)
            terminalreporter.write_line(f"{task:<17}{self.sum(rows):>7}   {single}")
        terminalreporter.write_line(f"{'total':<17}{self.sum(self.rows.values()):>7}")

    def sum(self, rows) -> str:
        rows = list(rows)
        return f"{sum(row['points'] for row in rows)}/{sum(row['max_points'] for row in rows)}"

    def pytest_sessionfinish(self):
        if not self.gradescope:
            return
        tests = [{"name": f"{row['task']}: {row['stage']}", "score": row["points"], "max_score": row["max_points"],
                  "status": "passed" if row["points"] else "failed", "output": row["message"], "tags": [row["task"]],
                  "visibility": "visible"} for row in self.rows.values()]
        found = {"score": sum(test["score"] for test in tests), "execution_time": round(time.time() - self.started_at),
                 "output_format": "text", "stdout_visibility": "visible", "tests": tests}
        Path(self.gradescope).write_text(json.dumps(found, indent=1))
