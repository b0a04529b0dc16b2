"""The tables of the documents, from benchmarks/*.json, and the line numbers in them, from the scripts.

    python -m benchmarks.tables           # rewrite the tables and line numbers in README.md and docs/

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; NAME is `headline`, or a set with a method or
`comparators` before it: `micu digits`. Mean and standard deviation over seeds, in percent; a direction such as a2v:
trained on audio, tested on video. A row that begins `| micu.py:NNN | `code` |` gets the number of the one line of
micu.py that holds this code.
"""
import json
import re
import statistics
from functools import partial
from importlib import import_module

from benchmarks.ablations import HEADLINE, ROOT, ROWS, SETS, command_of, rows_of

NAMES = {"micu": "MICU", "uni_code": "Uni-Code", "codaar": "CoDAAR"}
DEFAULT_SIZE = {method: import_module(method).Args().codebook_size for method in NAMES}  # K
DEFAULT_SIZE["comparators"] = import_module("benchmarks.comparators").Args().codebook_size
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAPER = {  # Uni-Code's Table 1: AVE after VGGSound-AVEL 40K, v2a and a2v
    "Baseline": "5.5 / 5.4", "S-MiT": "14.4 / 15.9", "MST": "19.5 / 23.1", "CODIS": "20.8 / 26.4",
    "TURN": "19.1 / 24.3", "CMCM": "32.7 / 36.8", "DCID+S-MiT": "32.2 / 34.0", "DCID+MST": "34.9 / 37.8",
    "DCID+CODIS": "36.7 / 41.0", "DCID+TURN": "29.7 / 36.9", "DCID+CMCM": "36.4 / 42.9", "Uni-Code": "47.7 / 52.3"}
LINE = re.compile(r"^\| (\w+)\.py:\d+ \| `(.+?)` \|", re.M)
MARKED = re.compile(r"(<!-- table ([a-z_ ]+) -->\n).*?(<!-- end of table -->)", re.S)


def read(method: str) -> dict:
    """{set: {row: its command and seeds}} of what has run with the flags that the row has now"""
    path = ROOT / "benchmarks" / f"{method}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return {data: {name: row for name, row in rows.items() if name in rows_of(method, data) and row["seeds"]
                   and row["command"] == command_of(method, data, name)} for data, rows in results.items()}


def cell(values: list, digits: int = 1) -> str:
    """`95.8 ± 1.0`; without the spread of one value, a dash of none"""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def over_directions(seeds: list, ending: str) -> list:
    """Of each seed the mean over all directions, in percent"""
    found = []
    for metrics in seeds:
        values = [value for tag, value in metrics.items() if tag.endswith(f"/{ending}") and "eval/" in tag]
        found += [100 * statistics.mean(values)] if values else []
    return found


def cells(seeds: list, size: int, ways: list) -> list:
    """The columns of one row, `size` being its number of codes"""
    shown = [cell(over_directions(seeds, "acc"))]
    for way in ways:
        tag = f"eval/classification/{way}/acc"
        shown.append(cell([100 * metrics[tag] for metrics in seeds if tag in metrics]))
    shown += [cell(over_directions(seeds, name)) for name in ("auroc", "hos", "hos_source", "hos_oracle")]
    codes = [tag for tag in seeds[0] if tag.startswith("eval/codebook/used_")]
    used = "/".join(cell([statistics.mean(metrics[tag] for metrics in seeds)], 0) for tag in codes)
    shown.append(f"{used} of {size}")
    chance = cell([statistics.mean(100 * metrics["eval/codebook/agreement_chance"] for metrics in seeds)])
    return [*shown, f"{cell([100 * metrics['eval/codebook/agreement'] for metrics in seeds])} ({chance})"]


def directions(rows: dict) -> list:
    """`a2v`, … of the row that has most of them"""
    found = [{tag.split("/")[2]: None for tag in seed["metrics"] if tag.startswith("eval/classification/")}
             for row in rows.values() for seed in row["seeds"].values()]
    return list(max(found, key=len))


def table(title: str, entries: list, ways: list) -> str:
    """entries: (name, [metrics of each seed], number of codes)"""
    head = [title, "seeds", "accuracy", *ways, "AUROC", "HOS", "HOS, source's threshold", "HOS, best threshold",
            "codes", "agreement (chance)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, seeds, size in entries:
        lines.append("| " + " | ".join([name, str(len(seeds)), *cells(seeds, size, ways)]) + " |")
    return "\n".join(lines)


def entry(name: str, method: str, row: dict) -> tuple:
    """What `table` shows of a row"""
    size = re.search(r"--codebook-size (\d+)", row["command"])
    return name, [seed["metrics"] for seed in row["seeds"].values()], int(size[1]) if size else DEFAULT_SIZE[method]


def made_at(rows: list) -> str:
    commits = sorted({seed["git"].removesuffix("-dirty") for row in rows for seed in row["seeds"].values()})
    return f"Made at commit {', '.join(commits)}.\n"


def of_method(method: str, data: str) -> str:
    """All rows of a method on one set, with their flags"""
    rows = read(method).get(data, {})
    if not rows:
        return "Not run yet.\n"
    entries = []
    for name in rows_of(method, data):
        if name in rows:
            flags = rows_of(method, data)[name]
            entries.append(entry(f"{name} `{flags}`" if flags else name, method, rows[name]))
    return table("row", entries, directions(rows)) + f"\n\n{made_at(list(rows.values()))}"


def of_comparators(data: str) -> str:
    """The rows of Uni-Code's Table 1 with the paper's figures beside them, below them the whole method"""
    rows = read("comparators").get(data, {})
    full = read("uni_code").get(data, {}).get("audio and video" if data == "digits" else "default")
    if not rows or not full:
        return "Not run yet.\n"
    rows = {name: rows[name] for name in ROWS["comparators"] if name in rows} | {"Uni-Code": full}
    flags = {name: f" `{flags}`" if flags else "" for name, flags in ROWS["comparators"].items()}
    entries = [entry(name + flags.get(name, ""), "comparators" if name in flags else "uni_code", row)
               for name, row in rows.items()]
    head, rule, *lines = table("row", entries, directions(rows)).splitlines()
    lines = [f"{line} {PAPER.get(name, '–')} |" for line, name in zip(lines, rows)]
    return "\n".join([f"{head} paper's v2a / a2v |", f"{rule}---|", *lines]) + f"\n\n{made_at(list(rows.values()))}"


def headline() -> str:
    """Default, paper and release of the three methods, a table for each set"""
    parts, shown = [], []
    for data in SETS:
        rows = {(method, name): read(method).get(data, {}).get(name) for method in ROWS for name in HEADLINE}
        rows = {key: row for key, row in rows.items() if row}
        if rows:
            entries = [entry(f"{NAMES[method]}, {name}", method, row) for (method, name), row in rows.items()]
            parts.append(table(data, entries, []) + "\n")
            shown += rows.values()
    return "\n".join([*parts, made_at(shown)]) if parts else "Not run yet.\n"


def numbered(match: re.Match) -> str:
    """The beginning of a row about a line of a script, with the number of that line"""
    lines = (ROOT / f"{match[1]}.py").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if match[2] in line]
    return f"| {match[1]}.py:{number} | `{match[2]}` |"


def filled(text: str) -> str:
    """A document with its tables made anew"""
    def replace(match: re.Match) -> str:
        method, _, data = match[2].partition(" ")
        makers = {"headline": headline, "comparators": partial(of_comparators, data)}
        return match[1] + makers.get(method, partial(of_method, method, data))() + match[3]
    return MARKED.sub(replace, LINE.sub(numbered, text))


def main() -> None:
    for path in DOCUMENTS:
        text = path.read_text()
        if filled(text) != text:
            path.write_text(filled(text))
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
