"""Does each part earn its place? Runs the rows below as a user would and collects their results.json.

    python -m benchmarks.ablations micu                       # run what is missing, write benchmarks/micu.json
    python -m benchmarks.ablations micu --jobs 2 --threads 1  # two runs at a time, one thread each
    python -m benchmarks.ablations comparators                # what Uni-Code's Table 1 compares with
    python -m benchmarks.tables                               # write the tables of the documents from them

A commit with `-dirty` differs by these JSON files alone, which runs write. Rows are of several commits: four of the
oldest, of the three methods on the watch, were made again at 9a82ef9, by hand, and came out equal in every figure.
Every number is of the clean protocol, on the embedded sets. Pairs of `digits` are made by class: its rows compare with
each other and with nothing else. The three rows of HEADLINE have five seeds, the others three.
"""
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Literal

import tyro

from run import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SETS = {"digits": "", "watch": "--data watch"}
HEADLINE = ("default", "as the paper says", "as released")
RELEASED = ("--spatial-pool sum --codebook-init uniform --reset-rule unused --reset-source live --reset-after 300 "
            "--clip module")  # what the three releases share
ISOLATED = {  # what no paper has, taken away one at a time
    "start U(-1/K, 1/K)": "--codebook-init uniform",
    "resets to live codes": "--reset-source live",
    "a code dies if nobody uses it": "--reset-rule unused",
    "gradients clipped per network": "--clip module",
}
PAIRS = {"digits": "--modalities audio video", "watch": "--data watch"}  # two modalities, as in the papers' comparisons
ALIGN = {"S-MiT": "smit", "MST": "mst", "CODIS": "codis", "TURN": "turn", "CMCM": "cmcm", "InfoNCE": "infonce"}
READINGS = {  # where a comparator hangs on how its paper is read; InfoNCE is MST unshared, and TURN without L_cross
    "S-MiT, dot product": "--align smit --similarity dot",
    "MST, sharing alone": "--align mst --no-contrast",
    "CODIS, L_code alone": "--align codis --no-contrast",
    "TURN, L_cross alone": "--align turn --no-contrast",
}
PLAIN = {"unsharpened attention": "--spatial-pool plain"}  # of maps, which digits alone has
SIZES = {f"{size} codes": f"--codebook-size {size}" for size in (16, 50, 200, 400, 800)}
ROWS = {  # method: {row: flags}; of `digits` also those of DIGITS
    "micu": {
        "default": "",
        "as the paper says": "--similarity dot --temperature 1.0",
        "as released": f"--mask-axis time --mm-ema --lambda-cujp 1 --cujp-splits 2 {RELEASED}",
        "no coarse": "--lambda-coarse 0",
        "no fine": "--lambda-fine 0",
        "no jigsaw": "--lambda-cujp 0",
        "MMJP": "--jigsaw mmjp",
        "time mask": "--mask-axis time",
        "start and resets of single outputs": "--codebook-init batch --reset-source batch",
        **ISOLATED, **{name: flags for name, flags in SIZES.items() if "400" not in name},
    },
    "uni_code": {
        "default": "",
        "as the paper says": "--lambda-club 1",
        "as released": f"--lambda-club 1 --specific map --mm-ema time-aligned {RELEASED}",
        "no CLUB": "--lambda-club 0",
        "as the paper says, clipped per network": "--lambda-club 1 --clip module",
        "no CPC": "--no-cpc",
        "no MM-EMA": "--mm-ema none",
        "no code matching": "--no-cmcm",
        "no reset": "--reset-after 0",
        "no teacher": "--no-teacher",
        "start and resets of single outputs": "--codebook-init batch --reset-source batch",
        **ISOLATED, **{name: flags for name, flags in SIZES.items() if "400" not in name},
    },
    "codaar": {
        "default": "",
        "as the paper says": "--codebook-init uniform --reset-rule unused --reset-source live",
        "as released": f"--specific map {RELEASED}",
        "no CSA": "--no-csa",
        "no DTA": "--no-dta",
        "no DQA": "--no-dqa",
        "no CPC": "--no-cpc",
        "as the paper says, no CSA": "--codebook-init uniform --reset-rule unused --reset-source live --no-csa",
        **ISOLATED, **{name: flags for name, flags in SIZES.items() if "800" not in name},
    },
    "comparators": {  # alone without resets, of which the papers do not tell; the rows `resets` are the other reading
        "Baseline": "--reset-after 0",
        **{name: f"--align {align} --reset-after 0" for name, align in ALIGN.items()},
        **{f"DCID+{name}": f"--align {align} --dcid" for name, align in ALIGN.items()},
        **{name: f"{flags} --reset-after 0" for name, flags in READINGS.items()},
        "Baseline, resets": "",
        **{f"{name}, resets": f"--align {align}" for name, align in ALIGN.items()},
    },
}
DIGITS = {
    "micu": {"bf16": "--precision bf16", **PLAIN},
    "uni_code": {"audio and video": "--modalities audio video", "map decoded": "--specific map", **PLAIN},
    "codaar": {"map decoded": "--specific map", "cascade reversed": "--cascade video audio text", **PLAIN},
}


def rows_of(method: str, data: str) -> dict:
    """{row: flags}"""
    return ROWS[method] | (DIGITS.get(method, {}) if data == "digits" else {})


def command_of(method: str, data: str, row: str) -> str:
    """How a user makes a row, but for the seed."""
    if method == "comparators":
        return f"python -m benchmarks.comparators {PAIRS[data]} {ROWS[method][row]}".strip()
    return f"python {method}.py {SETS[data]} {rows_of(method, data)[row]}".strip()


def run(command: str, runs_dir: Path, threads: int) -> dict:
    """One run -> its results.json and the last line of its training log"""
    arguments = [sys.executable, *shlex.split(command)[1:], "--runs-dir", str(runs_dir)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
    folder = Path(done.stdout.splitlines()[-1].removeprefix("run folder: "))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    *_, last = (line for line in logged if "losses/total" in line)
    return json.loads((folder / "results.json").read_text()) | {"last_log": last}


def main(methods: tyro.conf.Positional[tuple[Literal[tuple(ROWS)], ...]], jobs: int = 1, threads: int = 0,
         runs_dir: str = "runs", seeds: int = 5, rows: tuple[str, ...] = ()) -> None:
    """Run what is missing of these METHODS, of each row at most `seeds`; `rows`: of these alone."""
    runs_dir, lock = (ROOT / runs_dir).resolve(), Lock()
    results = {}
    for method in methods:
        path = ROOT / "benchmarks" / f"{method}.json"
        results[method] = json.loads(path.read_text()) if path.exists() else {}

    def one(method: str, data: str, name: str, seed: int) -> None:
        command = command_of(method, data, name)
        with lock:
            row = results[method].setdefault(data, {}).setdefault(name, {})
            if row.get("command") != command:  # its flags have changed: what is there is of other ones
                row.update(command=command, seeds={})
        if str(seed) not in row["seeds"]:
            result = run(f"{row['command']} --seed {seed}", runs_dir, threads) | {"threads": threads or None}
            keep = ("git", "data_sha256", "torch", "threads", "seconds", "peak_memory_mb", "warnings", "metrics",
                    "last_log")
            with lock:
                row["seeds"][str(seed)] = {key: result[key] for key in keep}
                text = json.dumps(results[method], indent=1) + "\n"
                write_atomically(ROOT / "benchmarks" / f"{method}.json", lambda stream: stream.write(text.encode()))
            print(f"{method}, {data}, {name}, seed {seed}: {result['seconds']['train']:.0f} s", file=sys.stderr,
                  flush=True)

    wanted = []
    for seed in range(1, seeds + 1):  # the first seed of all rows, then the second
        for method in methods:
            for data in SETS:
                chosen = [name for name in rows_of(method, data) if name in rows or not rows]
                wanted += [(method, data, name, seed) for name in chosen if seed <= 3 or name in HEADLINE]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: one(*job), wanted))


if __name__ == "__main__":
    tyro.cli(main)
