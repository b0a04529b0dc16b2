"""Does the open set hang on which classes are known, and on the score?

    python -m benchmarks.known RUN [RUN ...]      # write benchmarks/known.json, print its tables

Every choice of `KNOWN` classes of the run's data, in every direction: AUROC and HOS by each score, averaged over the
choices, over the directions and over the runs of a method. Nothing is chosen by these figures.
"""
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

import tyro

import probes
from data import Features
from run import git_commit, pick_device

KNOWN = 3
NAMES = ("auroc", "hos", "hos_source")


def figures(run: Path) -> tuple:
    """(method, {score: {name: mean over choices and directions}}, AUROC by softmax of each choice)"""
    method, args, shape, model, _ = probes.load(run)
    features = Features(args.data, args.runs_dir)
    choices = itertools.combinations(range(len(features.classes)), KNOWN)
    known = tuple(",".join(map(str, choice)) for choice in choices)
    plan = probes.Plan(features, shape, pick_device("cpu"), ("open_set",), known)
    tags = plan.evaluate(model, method.encode, args.codebook_size)
    mean = {}
    for score in probes.SCORES:
        found = {name: [v for tag, v in tags.items() if tag.endswith(f"/{name}_{score}")] for name in NAMES}
        mean[score] = {name: statistics.mean(values) for name, values in found.items()}
    softmax = {entry: [v for tag, v in tags.items() if f"/open_set_{entry}/" in tag and tag.endswith("/auroc")]
               for entry in known}
    return method.METHOD, mean, {entry: statistics.mean(values) for entry, values in softmax.items()}


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("benchmarks/known.json")) -> None:
    methods = defaultdict(list)
    for run in runs:
        method, mean, choices = figures(run)
        methods[method].append({"run": run.name, "mean": mean, "auroc of each choice": choices})
    out.write_text(json.dumps({"command": "python -m benchmarks.known RUN ...", "git": git_commit(), "known": KNOWN,
                               "methods": methods}, indent=1) + "\n")
    print("| method | score | AUROC | HOS | HOS, source's threshold |\n|---|---|---|---|---|")
    for method, found in methods.items():
        for score in probes.SCORES:
            cells = []
            for name in NAMES:
                values = [100 * run["mean"][score][name] for run in found]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            print(f"| {method} | {score} | {' | '.join(cells)} |")


if __name__ == "__main__":
    tyro.cli(main)
