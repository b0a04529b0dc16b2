"""The pictures of the documents: docs/pictures/ from benchmarks/*.json, the embedded data and one run.

    python -m benchmarks.figures                # draw all of them anew
    python -m benchmarks.figures --pairs RUN    # first take the open set of a run folder to benchmarks/figures.json
    python -m benchmarks.figures --course RUN ...   # or the course of runs with --eval-every 1

A picture whose figures are missing is skipped with one line.
"""
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Optional

import h5py
import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import probes
from benchmarks.ablations import ROOT, SETS, SIZES, rows_of
from benchmarks.tables import DEFAULT_SIZE, NAMES, over_directions, read
from datasets import digits, watch
from pictures import (BLACK, BLUE, GREEN, GREY, MODALITIES, ORANGE, PALE, PURPLE, RED, SHARING, SKY, STYLE, WIDTH,
                      histogram)
from run import git_commit

TAKEN = ROOT / "benchmarks" / "figures.json"  # what is shown of single runs
COLOURS = dict(zip(NAMES, (BLUE, ORANGE, GREEN)))  # of the methods
RELEASED = {  # seconds a step as measured by hand, batch 80, two CPU threads, see docs/speed.md: (least, most)
    "digits": {"micu": {"release, fp32": (3.0, 4.1), "release, float64": (9.2, 9.2)},
               "uni_code": {"release, fp32": (0.69, 0.82), "release, float64": (1.8, 1.8)},
               "codaar": {"release, fp32": (0.98, 1.19), "release, float64": (2.3, 2.3)}},
    "vggsound": {"micu": {"release, fp32": (61, 61)}, "uni_code": {"release, fp32": (45.6, 45.6)},
                 "codaar": {"release, fp32": (24.6, 24.6)}}}
FLOW = {  # what each method does at the parts of the common flow
    "MICU": {"outputs z": "FCMI: a masked z finds its segment, its clip", "codebook": "one for all; codes follow "
             "the outputs that chose them (EMA)", "codes": "CUJP: parts of codes of any modality; which permutation?",
             "decoder": "from the code alone"},
    "Uni-Code": {"encoders": "a second one for what only one modality shows; CLUB: z shares little with it",
                 "outputs z": "Cross-CPC: one's past predicts another's next segment",
                 "codebook": "one for all; MM-EMA: codes follow what all modalities say", "codes": "code matching: "
                 "modalities of a clip choose alike", "decoder": "from the code and the specific part"},
    "CoDAAR": {"encoders": "a second one for what only one modality shows", "outputs z": "Cross-CPC: one's past "
               "predicts another's next segment", "codebook": "one each, aligned row by row; DTA mixes modalities into "
               "a row, CSA averages rows", "codes": "DQA: modalities of a clip choose the same index",
               "decoder": "from the codes of all and the specific part"}}


class Missing(Exception):
    """A picture cannot be drawn: its figures are not there yet."""


# ------------------------------------------------------------------------------------------------------------ diagrams
def canvas(height: float):
    """A figure without axes; places on it are inches from the lower left corner."""
    figure = Figure((WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def wrapped(text: str, letters: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def box(ax, x, y, width, height, text, colour=PALE, letters=16, size=9.5):
    """A box whose lower left corner is (x, y)"""
    ax.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06", facecolor=colour, alpha=0.45,
                                edgecolor="none"))
    ax.text(x + width / 2, y + height / 2, wrapped(text, letters), ha="center", va="center", fontsize=size)


def arrow(ax, start, end, colour=BLACK, **style):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.5} | style)


def methods():
    """The data flow of the three methods; what differs is in the method's colour."""
    figure, ax = canvas(6.6)
    columns = ("features", "encoders", "outputs z", "codebook", "codes", "decoder")
    width, gap = 1.16, 0.16
    for row, (method, own) in enumerate(FLOW.items()):
        top = 6.6 - 2.2 * row
        colour = list(COLOURS.values())[row]
        ax.text(0.1, top - 0.28, method, fontsize=14, weight="bold", color=colour)
        for i, part in enumerate(columns):
            x = 0.1 + i * (width + gap)
            box(ax, x, top - 0.82, width, 0.4, part, size=11)
            if i:
                arrow(ax, (x - gap, top - 0.62), (x, top - 0.62))
            if part in own:
                box(ax, x, top - 2.05, width, 1.15, own[part], colour, 17, 8.5)
    return figure


def one_clip():
    """A test clip of digits with a single event that is seen a little earlier or later than heard, as arrays, with its
    sentence and its frames"""
    with h5py.File(digits.BASE, "r") as base:
        clips = digits.compose(base, 2, 40, 0)
        audio, video = clips["events/audio"].any(2), clips["events/video"].any(2)  # (40, 10)
        chosen = (clips["events/audio"].any(1).sum(1) == 1) & (audio != video).any(1)
        clip = {name: values[chosen.argmax()] for name, values in clips.items()}
        tokens = base["text/tokens"][:]
        (row, *_) = (tokens == clip["text"]).all((1, 2)).nonzero()[0]
        clip["sentence"] = base["text/sentence"][row].decode()
    clip["frames"] = clip["video"].reshape(10, 7, 7, 8, 8).swapaxes(2, 3).reshape(10, 56, 56).astype(float)
    return clip


def task():
    """Three modalities, one code, one probe"""
    figure, ax = canvas(4.1)
    clip = one_clip()
    happens = {"audio": clip["events/audio"].any(1), "video": clip["events/video"].any(1), "text": np.ones(10, bool)}
    seen = happens["video"].nonzero()[0][0]
    ax.text(4.42, 3.85, "codes of one codebook", fontsize=12, ha="center", weight="bold")
    for i, ((m, on), colour) in enumerate(zip(happens.items(), MODALITIES)):
        y = 2.75 - 1.3 * i
        ax.text(0.1, y + 0.9, m, fontsize=12, weight="bold", color=colour, va="bottom")
        box(ax, 2.1, y + 0.18, 0.9, 0.5, "encoder", colour, size=11)
        arrow(ax, (1.78, y + 0.43), (2.1, y + 0.43))
        arrow(ax, (3.0, y + 0.43), (3.35, y + 0.43))
        for t in range(10):
            shade = PALE
            if on[t]:
                shade = (PURPLE, SKY)[t % 3 == 0]
            ax.add_patch(FancyBboxPatch((3.4 + 0.21 * t, y + 0.31), 0.17, 0.24, "square,pad=0", facecolor=shade,
                                        edgecolor="none"))
        arrow(ax, (5.52, y + 0.43), (6.15, 2.13 - 0.25 * i), colour, linestyle=("-", "--", "--")[i])
    images = {"cmap": "gray_r", "aspect": "auto"}
    ax.imshow(clip["audio"].astype(float).reshape(100, 13).T, extent=(0.1, 1.7, 2.75, 3.6), **images)
    for j, t in enumerate((seen, seen + 2)):
        ax.imshow(clip["frames"][t], extent=(0.1 + 0.82 * j, 0.88 + 0.82 * j, 1.45, 2.3), vmin=0, vmax=1, **images)
    box(ax, 0.1, 0.2, 1.6, 0.75, f"\u201c{clip['sentence']}\u201d", letters=22, size=9)
    box(ax, 6.2, 1.45, 1.65, 0.9, "one probe: what is it?", PURPLE, 14, 12)
    ax.text(7.02, 2.55, "trained on labelled\naudio codes", color=BLUE, ha="center", fontsize=11)
    ax.text(7.02, 0.75, "tested, untouched,\non codes of video\nand of text", ha="center", fontsize=11)
    ax.set(xlim=(0, WIDTH), ylim=(0, 4.1))
    return figure


# --------------------------------------------------------------------------------------------------------------- clips
def clip_digits():
    """What a clip of digits is made of: ten segments"""
    clip = one_clip()
    figure = Figure((WIDTH, 3.9), layout="constrained")
    rows = figure.subplots(3, 1, height_ratios=(1.5, 1, 0.5))
    rows[0].imshow(clip["audio"].astype(float).reshape(100, 13).T, aspect="auto", cmap="gray_r", origin="lower",
                   extent=(0, 10, 0, 13))
    rows[0].set(ylabel="audio:\n13 MFCC", title=f"a clip of \u201c{digits_class(clip)}\u201d: coloured bars show when "
                "it is heard and seen", yticks=[])
    strip = np.pad(clip["frames"], ((0, 0), (3, 3), (3, 3)), constant_values=0.3)
    rows[1].imshow(np.concatenate(list(strip), 1), cmap="gray_r", vmin=0, vmax=1, extent=(0, 10, 0, 1), aspect="auto")
    rows[1].set(ylabel="video:\n56 x 56", yticks=[])
    rows[2].text(5, 0.5, f"\u201c{clip['sentence']}\u201d", ha="center", va="center", fontsize=12)
    rows[2].set(ylabel="text", yticks=[], xlabel="segment", ylim=(0, 1))
    for ax, m, colour in zip(rows, ("audio", "video"), MODALITIES):
        top = ax.get_ylim()[1]
        for t in clip[f"events/{m}"].any(1).nonzero()[0]:
            ax.plot((t, t + 1), (1.04 * top, 1.04 * top), color=colour, linewidth=5, clip_on=False,
                    solid_capstyle="butt")
        for t in range(1, 10):
            ax.axvline(t, color=GREY, linewidth=0.5)
    for ax in rows:
        ax.set(xlim=(0, 10), xticks=np.arange(10) + 0.5, xticklabels=[])
    rows[2].set_xticklabels(range(1, 11))
    return figure


def digits_class(clip) -> str:
    return ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")[clip["label"]]


def clip_watch():
    """What a clip of the watch is made of: five seconds of two sensors"""
    with tempfile.TemporaryDirectory() as folder:
        watch.write(f"{folder}/watch.h5")
        with h5py.File(f"{folder}/watch.h5", "r") as h5:
            clip = {m: h5[m][40].reshape(-1, 3).astype(float) for m in ("accelerometer", "gyroscope")}
            name = h5["classes"][h5["label"][40]].decode()
    figure = Figure((WIDTH, 3.8), layout="constrained")
    rows = figure.subplots(2, 1, sharex=True)
    seconds = np.arange(250) / 50
    for ax, (m, samples) in zip(rows, clip.items()):
        for axis, colour, line in zip("xyz", MODALITIES, ("-", "--", ":")):
            ax.plot(seconds, samples[:, "xyz".index(axis)], line, color=colour, label=axis)
        for t in np.arange(0.5, 5, 0.5):
            ax.axvline(t, color=PALE, linewidth=0.8, zorder=0)
        ax.set(ylabel=f"{m},\nstandard deviations", xlim=(0, 5))
    rows[0].set_title(f"a clip of the exercise {name}: ten segments of half a second")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside right upper", title="axis")
    rows[1].set_xlabel("seconds")
    return figure


# ------------------------------------------------------------------------------------------------------- from one run
def open_set_of(run: str) -> dict:
    """Confidences in the direction whose HOS the threshold from pairs raises most, of the source's own clips as well"""
    (method, args, shape, model, _), features, _ = probes.open_run((run,), (), None)
    plan = probes.Plan(features, shape, "cpu", ("open_set",))
    tags, hos = plan.evaluate(model, method.encode, args.codebook_size), {}
    for task, source, target in plan.outcomes:
        where = f"eval/{task}/{probes.direction(source, target, plan.modalities)}"
        hos[task, source, target] = {rule: tags[f"{where}/{rule}"] for rule in ("hos_source", "hos")}
    way = max(hos, key=lambda way: hos[way]["hos"] - hos[way]["hos_source"])
    (_, source, target), outcome = way, plan.outcomes[way]
    with plan.probing(model, method.encode, args.codebook_size):
        parts, unknown = plan.with_known(outcome.classes), len(outcome.classes)
        train = parts["train"][parts["train"].label < unknown]
        seen = plan.codes(train, source)
        probe = probes.train_probe(probes.ClipProbe, unknown, seen, train.label)
        scores, _ = probes.judgement(probe, seen, plan.codes(parts["same"], source))
    sides = {source: (scores["softmax"], parts["same"].label < unknown),
             target: (outcome.scores["softmax"], outcome.known)}
    confidence = {m: {"known": rounded(c[known]), "unknown": rounded(c[~known])} for m, (c, known) in sides.items()}
    return {"method": method.METHOD, "data": features.name, "seed": args.seed, "git": git_commit(), "hos": hos[way],
            "thresholds": {rule: of["softmax"].item() for rule, of in outcome.thresholds.items()},
            "confidence": confidence}


def rounded(values) -> list:
    return [round(value, 4) for value in values.tolist()]


def course_of(run: str) -> dict:
    """Accuracy and AUROC of every direction, each time that the run was probed"""
    results = json.loads((Path(run) / "results.json").read_text())
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    course = [{tag: value for tag, value in line.items() if tag == "step" or tag.endswith(("/acc", "/auroc"))}
              for line in lines if any(tag.startswith("eval/") for tag in line)]
    return {key: results[key] for key in ("method", "data", "seed", "git")} | {"course": course}


def taken(name: str) -> dict:
    found = json.loads(TAKEN.read_text()) if TAKEN.exists() else {}
    if name not in found:
        raise Missing(f"python -m benchmarks.figures --{name} RUN takes its figures from a run")
    return found[name]


def threshold():
    """Why the source's threshold does not fit the target, and what the one from pairs does"""
    found = taken("pairs")
    figure = Figure((WIDTH, 4.4), layout="constrained")
    source, target = found["confidence"]
    rows, hos = figure.subplots(2, 1), {rule: f"{100 * value:.0f} %" for rule, value in found["hos"].items()}
    for ax, m in zip(rows, (source, target)):
        of, thresholds = found["confidence"][m], found["thresholds"]
        if m == source:
            thresholds = {"hos_source": thresholds["hos_source"]}
        known = np.repeat([True, False], [len(of["known"]), len(of["unknown"])])
        histogram(ax, np.array(of["known"] + of["unknown"]), known, thresholds, "softmax")
        ax.set(ylabel="test clips, %", xlim=(0.25, 0.9999))
    rows[0].set_title(f"the probe was trained on {source}")
    rows[1].set_title(f"tested on {target}: HOS {hos['hos_source']} by the source's threshold, {hos['hos']} by the one "
                      "from pairs")
    rows[1].set_xlabel("confidence: the probe's largest softmax")
    figure.legend(*rows[1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def transfer(method: str, data: str):
    """Accuracy and AUROC of every direction over the training"""
    found = taken("course").get(f"{method}_{data}")
    if not found:
        raise Missing(f"no course of {method} on {data}: python -m benchmarks.figures --course RUN")
    figure = Figure((WIDTH, 3.4), layout="constrained")
    for ax, (ending, title) in zip(figure.subplots(1, 2), (("acc", "accuracy, %"), ("auroc", "AUROC, %"))):
        tags = [tag for tag in found["course"][-1] if tag.endswith(f"/{ending}")]
        for i, tag in enumerate(tags):
            points = [(line["step"], 100 * line[tag]) for line in found["course"] if tag in line]
            ax.plot(*zip(*points), color=MODALITIES[i % 6], marker="os^Dvx"[i % 6], label=tag.split("/")[2])
        ax.set(title=title, xlabel="training step")
    ax.legend(ncols=2)
    figure.suptitle(f"{NAMES[found['method']]} on {found['data']}, seed {found['seed']}", fontsize=11)
    return figure


# ------------------------------------------------------------------------------------------------------ from the tables
def results(method: str, data: str) -> dict:
    """{row: [metrics of each seed]}"""
    rows = read(method).get(data, {})
    return {name: [seed["metrics"] for seed in row["seeds"].values()] for name, row in rows.items() if row["seeds"]}


def default_row(rows: dict) -> list:
    return rows.get("default", [])


def bars(ax, names: list, values: list, colour) -> None:
    """A bar a row, its mean, with the spread over seeds and each seed as a dot"""
    for y, of in enumerate(values):
        if of:
            ax.barh(y, statistics.mean(of), color=colour, alpha=0.5)
            ax.plot(of, [y] * len(of), ".", color=BLACK, markersize=4)
        if len(of) > 1:
            ax.errorbar(statistics.mean(of), y, xerr=statistics.stdev(of), color=BLACK, linewidth=1.5, capsize=3)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    ax.grid(axis="x", color=PALE)
    ax.set_axisbelow(True)


def ablations(method: str, data: str):
    """Every row of a method on one set, but for those of `sizes`: accuracy, AUROC and agreement"""
    found = results(method, data)
    rows = {name: found[name] for name in rows_of(method, data) if name in found and name not in SIZES}
    if not rows:
        raise Missing(f"no rows of {method} on {data}")
    figure = Figure((WIDTH, 1.0 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (ending, title) in zip(axes, (("acc", "accuracy, %"), ("auroc", "AUROC, %"))):
        bars(ax, list(rows), [over_directions(seeds, ending) for seeds in rows.values()], COLOURS[method])
        ax.set(xlabel=title, xlim=(0, 100))
    bars(axes[2], list(rows), [[100 * seed["eval/codebook/agreement"] for seed in seeds] for seeds in rows.values()],
         COLOURS[method])
    axes[2].set(xlabel="agreement, %")
    figure.suptitle(f"{NAMES[method]} on {data}: mean over directions and seeds, its spread over seeds, a dot a seed",
                    fontsize=11)
    return figure


def sharing():
    """How many modalities share the codes of each method, by number of codes and by selections"""
    rows = {}
    for method in NAMES:
        for data in SETS:
            if default_row(results(method, data)):
                rows[f"{NAMES[method]}, {data}"] = default_row(results(method, data))
    if not rows:
        raise Missing("no default rows")
    figure = Figure((WIDTH, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, kind, title in zip(axes, ("shared", "weighted"), ("codes in use, %", "selections, %")):
        left = np.zeros(len(rows))
        for i, colour in zip((1, 2, 3), SHARING):
            share = [100 * statistics.mean(seed.get(f"eval/codebook/{kind}_{i}", 0) for seed in seeds)
                     for seeds in rows.values()]
            ax.barh(list(rows), share, left=left, color=colour, label=f"{i} modalit{'y' if i == 1 else 'ies'}")
            left += share
        ax.set(xlabel=title, xlim=(0, 100))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  title="codes that are used by")
    return figure


def sizes(method: str):
    """Accuracy, AUROC and agreement, with what chance gives of it, by the number of codes, on both sets"""
    curves = {"accuracy": ("acc", BLUE, "o-"), "AUROC": ("auroc", ORANGE, "s-")}
    equal = {"agreement": ("agreement", GREEN, "^-"), "agreement by chance": ("agreement_chance", GREY, "v:")}
    figure = Figure((WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, data in zip(panels, SETS):
        rows = results(method, data)
        seeds = {int(name.split()[0]): rows[name] for name in rows if name in SIZES}
        if not seeds or not default_row(rows):
            raise Missing(f"no rows of other codebook sizes of {method} on {data}")
        seeds[DEFAULT_SIZE[method]] = default_row(rows)
        for label, (ending, colour, style) in curves.items():
            spread(ax, {k: over_directions(seeds[k], ending) for k in sorted(seeds)}, label, colour, style)
        for label, (name, colour, style) in equal.items():
            values = {k: [100 * metrics[f"eval/codebook/{name}"] for metrics in seeds[k]] for k in sorted(seeds)}
            spread(ax, values, label, colour, style)
        ax.set(xscale="log", xlabel="codes in the codebook", ylim=(0, 100), title=data)
        ax.set_xticks(sorted(seeds), sorted(seeds))
        ax.minorticks_off()
    panels[0].set_ylabel("%")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def spread(ax, values: dict, label: str, colour: str, style: str) -> None:
    """{x: [value of each seed]}: a curve through the means, bars of one standard deviation"""
    mean = [statistics.mean(of) for of in values.values()]
    deviation = [statistics.stdev(of) if len(of) > 1 else 0 for of in values.values()]
    ax.errorbar(list(values), mean, deviation, fmt=style, color=colour, capsize=3, label=label)


def seconds_here(method: str, shapes: str) -> tuple:
    """Of the last plain fp32 row of a method in benchmarks/speed.json: (lower, upper quartile) of a step"""
    wanted = "python -m benchmarks.speed" + " --shapes vggsound" * (shapes == "vggsound")
    rows = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    *_, last = (row for row in rows if row["method"] == method and row["command"] == wanted)
    low, _, high = last["milliseconds"]["step"]
    return round(low / 1e3, 2), round(high / 1e3, 2)


def speed():
    """Seconds a step, here and as released: a point, or from the least to the most that was measured"""
    figure = Figure((WIDTH, 3.2), layout="constrained")
    styles = {"here": (BLUE, "o"), "release, fp32": (ORANGE, "s"), "release, float64": (RED, "D")}
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, (shapes, of) in zip((left, right), RELEASED.items()):
        for i, (method, released) in enumerate(of.items()):
            for j, (what, seconds) in enumerate(({"here": seconds_here(method, shapes)} | released).items()):
                colour, marker = styles[what]
                y = i + 0.27 * (j - 1)
                ax.plot(seconds, (y, y), color=colour, marker=marker, linewidth=4, label=what if i == 0 else "")
                text = " to ".join(dict.fromkeys(f"{value:.3g}" for value in seconds))
                ax.text(seconds[1] * 1.25, y, f"{text} s", va="center", fontsize=9)
        ax.set(xscale="log", title=f"{shapes} shapes", xlabel="seconds a step of 80 clips, two CPU cores")
        ax.grid(axis="x", color=PALE)
    for ax, ticks in ((left, (0.5, 1, 2, 5, 10, 20)), (right, (0.5, 2, 10, 50, 200))):
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.set_xlim(0.4, 1.5 * ticks[-1])
    left.set(yticks=range(3), yticklabels=[NAMES[method] for method in RELEASED["digits"]], ylim=(2.6, -0.6))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


FIGURES = {"task.svg": task, "clip_digits.png": clip_digits, "clip_watch.svg": clip_watch, "methods.svg": methods,
           "threshold.svg": threshold, "sharing.svg": sharing, "speed.svg": speed}
FIGURES |= {f"ablations_{method}_{data}.svg": partial(ablations, method, data)
            for method in NAMES for data in SETS}
FIGURES |= {f"sizes_{method}.svg": partial(sizes, method) for method in NAMES}
FIGURES |= {f"transfer_{method}_{data}.svg": partial(transfer, method, data) for method in NAMES for data in SETS}


def draw(folder: Path) -> None:
    """All pictures, the same to the byte from the same figures"""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "pictures", "figure.dpi": 150}):
        for name, make in FIGURES.items():
            try:
                metadata = {"Date": None} if name.endswith("svg") else {}
                make().savefig(folder / name, metadata=metadata, facecolor="white", dpi=120)
            except Missing as missing:
                print(f"{name} skipped: {missing}")


def main(pairs: Optional[str] = None, course: tuple[str, ...] = ()) -> None:
    found = json.loads(TAKEN.read_text()) if TAKEN.exists() else {}
    if pairs:
        found["pairs"] = open_set_of(pairs)
    for run in course:
        results = course_of(run)
        found.setdefault("course", {})[f"{results['method']}_{results['data']}"] = results
    if pairs or course:
        TAKEN.write_text(json.dumps(found) + "\n")
    draw(ROOT / "docs" / "pictures")


if __name__ == "__main__":
    tyro.cli(main)
