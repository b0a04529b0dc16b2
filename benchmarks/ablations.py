"""Does each part earn its place? Runs the rows below as a user would and collects their results.json.

    python -m benchmarks.ablations micu                       # run what is missing, write benchmarks/micu.json
    python -m benchmarks.ablations micu --jobs 2 --threads 1  # two runs at a time, one thread each

Every number is from the `clean` protocol on the embedded digits: pairs are made by class there, so the rows compare
with each other and with nothing else.
"""
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
UNI_CODE = {  # rows of Uni-Code's Tables 1 to 3: flags
    "full method": "",
    "no CLUB": "--lambda-club 0",
    "no CPC": "--no-cpc",
    "no CLUB, no CPC": "--lambda-club 0 --no-cpc",
    "no MM-EMA": "--mm-ema none",
    "no reset": "--reset-after 0",
    "no code matching": "--no-cmcm",
    "no MM-EMA, no reset": "--mm-ema none --reset-after 0",
    "Baseline": "--lambda-club 0 --no-cpc --no-cmcm --mm-ema none --no-teacher --reset-after 0",
    "CMCM": "--lambda-club 0 --no-cpc --mm-ema none --no-teacher --reset-after 0",
}
CODAAR = {  # rows of CoDAAR's Tables 5 and 6: flags
    "full method": "",
    "no CSA": "--no-csa",
    "no CPC, no CSA": "--no-cpc --no-csa",
    "CPC alone": "--no-dta --no-csa --no-dqa",
    "no DTA": "--no-dta",
    "no CSA, no DQA": "--no-csa --no-dqa",
}
ROWS = {  # method: {row: (flags, seeds)}
    "micu": {
        "full method": ("", 3),
        "bf16": ("--precision bf16", 3),
        "no coarse": ("--lambda-coarse 0", 3),
        "no fine": ("--lambda-fine 0", 3),
        "no jigsaw": ("--lambda-cujp 0", 3),
        "MMJP, 24 parts": ("--jigsaw mmjp", 3),
        "paper's similarity": ("--similarity dot --temperature 1.0", 3),
        "2 splits": ("--cujp-splits 2", 1),
        "4 splits": ("--cujp-splits 4", 1),
        "MMJP, 6 parts": ("--jigsaw mmjp --cujp-splits 2", 1),
        "time mask": ("--mask-axis time", 1),
        "different masks": ("--mask-sharing different", 1),
        "256 codes": ("--codebook-size 256", 1),
        "800 codes": ("--codebook-size 800", 1),
        "audio and video": ("--modalities audio video", 1),
        "blunt attention": ("--spatial-pool paper", 1),
        "sum pooling": ("--spatial-pool sum", 1),
        "unused resets": ("--reset-rule unused", 1),
        "released recipe": ("--similarity cosine --temperature 0.1 --mask-axis time --mm-ema "
                            "--lambda-cujp 1 --cujp-splits 2 --spatial-pool sum --reset-rule unused "
                            "--reset-source live --reset-after 300 --codebook-init uniform", 1),
        "64 codes": ("--codebook-size 64", 1),
    },
    "uni_code": {
        **{name: (flags, 1 if flags else 3) for name, flags in UNI_CODE.items()},
        "bf16": ("--precision bf16", 3),
        **{f"AV, {name}": (f"--modalities audio video {flags}", 1 if flags else 3) for name, flags in UNI_CODE.items()},
        "map decoded": ("--specific map", 3),
        "paper's CLUB weight": ("--lambda-club 1", 1),
        "commitment summed over D": ("--commitment-cost 64", 1),
        "sum pooling": ("--spatial-pool sum", 1),
        "released recipe": ("--specific map --mm-ema time-aligned --spatial-pool sum "
                            "--reset-rule unused --reset-source live --reset-after 300 --codebook-init uniform", 1),
        "AT": ("--modalities audio text", 1),
        "VT": ("--modalities video text", 1),
    },
    "codaar": {
        **{name: (flags, 3 if name in ("full method", "no CSA") else 1) for name, flags in CODAAR.items()},
        "bf16": ("--precision bf16", 3),
        "no DQA": ("--no-dqa", 1),
        "independent start": ("--codebook-init uniform --reset-rule unused --reset-source live", 1),
        "independent start, no CSA": ("--codebook-init uniform --reset-rule unused --reset-source live --no-csa", 1),
        "paired resets": ("--reset-source paired", 1),
        **{f"AV, {name}": (f"--modalities audio video {flags}", 1 if flags else 3) for name, flags in CODAAR.items()},
        "AV, cascade video audio": ("--modalities audio video --cascade video audio", 1),
        **{f"cascade {order}": (f"--cascade {order}", 1) for order in (  # Table 7
            "text video audio", "audio text video", "audio video text", "video text audio", "video audio text")},
        "map decoded": ("--specific map", 3),
    },
}
COLUMNS = ["classification/v2a/acc", "classification/a2v/acc", "classification/t2a/acc", "classification/t2v/acc",
           "classification/a2t/acc", "classification/v2t/acc",
           "open_set_5/v2a/hos", "open_set_5/a2v/hos", "open_set_5/v2a/hos_oracle", "open_set_5/a2v/hos_oracle",
           "open_set_5/v2a/auroc", "open_set_5/a2v/auroc", "codebook/used_audio", "codebook/used_video",
           "codebook/used_text", "codebook/agreement", "codebook/weighted_1"]


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


def main(method: tyro.conf.Positional[Literal[tuple(ROWS)]], jobs: int = 1, threads: int = 0, runs_dir: str = "runs"):
    out, runs_dir = ROOT / "benchmarks" / f"{method}.json", (ROOT / runs_dir).resolve()
    rows, lock = json.loads(out.read_text()) if out.exists() else {}, Lock()

    def one(name: str, seed: int) -> None:
        flags = ROWS[method][name][0]
        row = rows.setdefault(name, {"command": f"python {method}.py {flags} --seed S", "seeds": {}})
        if str(seed) not in row["seeds"]:
            result = run(f"python {method}.py {flags} --seed {seed}", runs_dir, threads) | {"threads": threads or None}
            keep = ("git", "data_sha256", "torch", "threads", "seconds", "peak_memory_mb", "metrics", "last_log")
            with lock:
                row["seeds"][str(seed)] = {key: result[key] for key in keep}
                out.write_text(json.dumps({n: rows[n] for n in ROWS[method] if n in rows}, indent=1) + "\n")
            print(f"{name}, seed {seed}: {result['seconds']['train']:.0f} s", file=sys.stderr, flush=True)

    wanted = [(name, seed) for name, (_, seeds) in ROWS[method].items() for seed in range(1, seeds + 1)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: one(*job), wanted))
    print("| row | seeds | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 2))
    for name, row in rows.items():
        cells = []
        for column in COLUMNS:
            values = [seed["metrics"].get(f"eval/{column}") for seed in row["seeds"].values()]
            scale, digits = (1, 0) if "/used_" in column else (100, 1)
            if None in values:
                cells.append("–")
                continue
            spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{scale * statistics.mean(values):.{digits}f}{spread}")
        print(f"| {name} | {len(row['seeds'])} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    tyro.cli(main)
