"""What a finished run shows: arrays in, tables and pictures out. Nothing here knows of features, networks or losses.

`show` draws every picture of a run. matplotlib is imported where something is drawn: all else does without.
Colours are those of Okabe and Ito, which people with any kind of colour blindness tell apart.
"""
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

SHARE = 0.1  # a modality shares a code if it makes at least this part of the code's selections
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
MODALITIES = (BLUE, RED, GREEN, SKY, PURPLE, BLACK)  # colours in the order of the modalities
SHARING = (SKY, ORANGE, PURPLE, BLACK)  # of codes that 1, 2, 3, more modalities use, as in MICU's Fig. 6
CLASSES = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BLACK, YELLOW)
MARKERS = "os^D"  # of the first eight classes, of the next eight ...
NAMED, NAME = 12, 12  # more classes than these are numbered; letters of a name that are shown
TICKS = (0.5, 0.9, 0.99, 0.999)  # of a confidence
GREY, PALE = "#888888", "#DDDDDD"
STYLE = {"font.size": 11, "axes.titlesize": 11, "legend.fontsize": 10, "axes.spines.top": False,
         "axes.spines.right": False, "figure.labelsize": 11, "legend.frameon": False, "figure.dpi": 200}
WIDTH = 8.0  # inches: 800 pixels of a README at 100 a inch, a projector's 1600 at 200


# ------------------------------------------------------------------------------------------------------------ pictures
def panels(count: int, height: float, columns: int = 3, **options):
    """A figure and `count` axes in rows of at most `columns`, each row `height` inches high."""
    from matplotlib.figure import Figure
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure((WIDTH, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def training(lines: list):
    """Lines of the log {"step": step, tag: value} -> a panel for each loss, one for the agreement of codes, one for
    their perplexity and, if probes ran along the way, one for accuracy."""
    tags = list(dict.fromkeys(tag for line in lines for tag in line))
    titles = {}  # {panel: {label of a curve: tag}}
    for tag in tags:
        if tag.startswith("losses/"):
            titles[f"loss: {tag.removeprefix('losses/')}"] = {"": tag}
        elif tag == "codebook/agreement":
            titles["agreement, % of segments"] = {"": tag}
        elif tag.startswith("codebook/perplexity_"):
            titles.setdefault("perplexity, codes", {})[tag.removeprefix("codebook/perplexity_")] = tag
    accuracy = [tag for tag in tags if tag.startswith("eval/classification") and tag.endswith("/acc")]
    if accuracy and sum(accuracy[0] in line for line in lines) > 1:
        titles["accuracy, %"] = {tag.split("/")[2]: tag for tag in accuracy}
    figure, axes = panels(len(titles), 1.9, sharex=True)
    for ax, (title, curves) in zip(axes, titles.items()):
        for (label, tag), colour in zip(curves.items(), itertools.cycle(MODALITIES)):
            scale = 100 if "%" in title else 1
            found = [(line["step"], scale * line[tag]) for line in lines if line.get(tag) is not None]
            ax.plot(*zip(*found), color=colour, label=label, marker="." if len(found) < 10 else "")
        ax.set_title(title)
        if len(curves) > 1:
            ax.legend(handlelength=1, labelspacing=0.2, fontsize=9, frameon=True, edgecolor="none")
    for ax in axes[-3:]:
        ax.tick_params(labelbottom=True)
    figure.supxlabel("step")
    return figure


def owners(selections: dict):
    """{m: (K,)} -> which modalities use each code (M, K) bool, by SHARE, and the selections of each code (K,)"""
    counts = torch.stack(list(selections.values()))
    return counts >= SHARE * counts.sum(0).clamp(min=1), counts.sum(0)


def usage(selections: dict):
    """{m: (K,)} -> who selects each code in use, those that most modalities share first, and how often."""
    users, total = owners(selections)
    sharing = users.sum(0)
    # by how many modalities share a code, which ones these are, and how often it is selected; the last: unused codes
    pattern = (users * 2 ** torch.arange(len(users)).flip(0)[:, None]).sum(0)
    order = np.lexsort((total, pattern, sharing, total > 0))[::-1][:int((total > 0).sum())].copy()
    x = np.arange(len(order) + 1)
    figure, (above, below) = panels(2, 2.2, columns=1, sharex=True)
    bottom = np.zeros(len(order))
    for (m, counts), colour in zip(selections.items(), itertools.cycle(MODALITIES)):
        top = bottom + (100 * counts[order] / total[order]).numpy()
        above.fill_between(x, np.append(bottom, 0), np.append(top, 0), step="post", color=colour, label=m, linewidth=0)
        bottom = top
    below.fill_between(x, np.append(total[order].numpy(), 0), step="post", color=GREY, linewidth=0)
    groups, end = [], 0
    for i in range(len(selections), 0, -1):
        groups.append(f"{(sharing == i).sum()} by {i}")
        end += int((sharing == i).sum())
        for ax in (above, below):
            ax.axvline(end, color=BLACK)
    above.set(ylabel="selections\nof a code, %", ylim=(0, 100), xlim=(0, max(len(order), 1)))
    above.set_title(f"codes by the modalities that use them: {', '.join(groups)}")
    below.set(ylabel="selections", yscale="symlog", ylim=(0, None))
    below.set_xlabel(f"the {len(order)} codes in use, of {len(total)}")
    figure.legend(loc="outside upper center", ncols=6)
    return figure


def plane(codebook, used):
    """The first two principal components of the codes in use: codebook (K, D), used (K,) -> places (K, 2), and the
    share of the variance along each."""
    x = codebook.double()
    if used.any():
        x = x - x[used].mean(0)
    _, spread, axes = torch.linalg.svd(x[used], full_matrices=False)
    share = torch.nn.functional.pad(spread.square() / spread.square().sum().clamp(min=1e-12), (0, 2))[:2]
    places = torch.nn.functional.pad(x @ axes[:2].T, (0, 2))[:, :2]  # fewer than two codes span no plane
    return places.numpy(), share.tolist()


def codebook_map(codebook, selections: dict, by_class, classes: list):
    """The codes (K, D) in a plane, larger the more they are selected {m: (K,)}: on the left coloured by how many
    modalities share each, on the right by the class in whose clips it is selected most, by_class (C, K)."""
    users, total = owners(selections)
    place, share = plane(codebook, total > 0)
    size = 6 + 60 * (total / total.max().clamp(min=1)).numpy()
    drawn = dict(linewidths=0.3, edgecolors="white")
    figure, axes = panels(1 + (len(classes) > 0), 4.2, sharex=True, sharey=True)
    unused = (total == 0).numpy()
    for ax in axes:
        ax.scatter(*place[unused].T, 3, PALE, label=f"unused: {unused.sum()}")
        ax.set_aspect("equal")
        ax.set_xlabel(f"component 1 ({share[0]:.0%} of the variance)")
    axes[0].set_ylabel(f"component 2 ({share[1]:.0%})")
    axes[0].set_title("modalities that share a code")
    for i in range(1, len(selections) + 1):
        of = ((users.sum(0) == i) & (total > 0)).numpy()
        label = f"{i} modalit{'y' if i == 1 else 'ies'}: {of.sum()}"
        axes[0].scatter(*place[of].T, size[of], SHARING[min(i, 4) - 1], label=label, **drawn)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handletextpad=0.1)
    if not classes:
        return figure
    axes[1].set_title("class in whose clips it is selected most")
    best, some = by_class.argmax(0).numpy(), by_class.sum(0).numpy() > 0
    if len(classes) > NAMED:
        shown = axes[1].scatter(*place[some].T, size[some], best[some], cmap="viridis", **drawn)
        figure.colorbar(shown, ax=axes[1], label="class number")
        return figure
    for i, name in enumerate(classes):
        of = some & (best == i)
        axes[1].scatter(*place[of].T, size[of], CLASSES[i % 8], marker=MARKERS[i // 8], label=str(name)[:NAME], **drawn)
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, handletextpad=0.1, columnspacing=0.8)
    return figure


def confusion(found: dict, classes: list):
    """{(trained on, tested on): (prediction (N,), label (N,))} -> a matrix each: of the clips of a class, the percent
    that are taken for each class. A class without clips stays grey."""
    figure, axes = panels(len(found), 2.7, sharex=True, sharey=True)
    many = len(classes)
    for ax, ((source, target), (prediction, label)) in zip(axes, found.items()):
        counts = (label * many + prediction).bincount(minlength=many**2).view(many, many).double()
        percent = (100 * counts / counts.sum(1, keepdim=True)).cpu().numpy()  # 0 / 0 is nan, which stays blank
        ax.set_facecolor(PALE)
        shown = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest", aspect="auto")
        right = (prediction == label).double().mean().item()
        ax.set_title(f"{source} \u2192 {target}: {right:.1%}")
        if many <= NAMED:
            names = [str(name)[:NAME] for name in classes]
            ax.set_xticks(range(many), names, rotation=90, fontsize=9)
            ax.set_yticks(range(many), names, fontsize=9)
    figure.supxlabel("class that the probe says" + " (number)" * (many > NAMED))
    figure.supylabel("class of the clip" + " (number)" * (many > NAMED))
    figure.colorbar(shown, ax=list(axes), label="clips of the class, %")
    return figure


def histogram(ax, confidence, known, thresholds: dict, score: str) -> None:
    """How the confidence (N,) of `known` and of unknown clips lies to the thresholds {rule: threshold}."""
    lines = {"hos_source": ("threshold of the source", "--"), "hos": ("threshold from pairs", "-")}
    everything = np.append(confidence, list(thresholds.values()))
    if score == "softmax":  # most lie near 1: 0.9, 0.99 and 0.999 are drawn equally far apart
        confidence, everything = confidence.clip(1e-4, 1 - 1e-4), everything.clip(1e-4, 1 - 1e-4)
        thresholds = {rule: min(max(threshold, 1e-4), 1 - 1e-4) for rule, threshold in thresholds.items()}
        edges = 1 / (1 + np.exp(-np.histogram_bin_edges(np.log(everything / (1 - everything)), 30)))
        edges[0], edges[-1] = min(edges[0], everything.min()), max(edges[-1], everything.max())  # rounding loses none
        ax.set_xscale("logit")
        ax.set_xticks(TICKS, TICKS)
        ax.minorticks_off()
        ax.set_xlim(edges[0], edges[-1])
    else:
        edges = np.histogram_bin_edges(everything, 30)
    for of, kind, label in ((known, {"color": SKY, "fill": True}, "known classes"),
                            (~known, {"color": RED, "linewidth": 2}, "unknown classes")):
        counts, _ = np.histogram(confidence[of], edges)
        ax.stairs(100 * counts / max(of.sum(), 1), edges, label=label, **kind)
    for rule, threshold in thresholds.items():
        label, line = lines[rule]
        ax.axvline(threshold, color=BLACK, linestyle=line, label=label)


def confidences(found: dict, score: str):
    """{(trained on, tested on): (confidence (N,), known (N,) bool, {rule: threshold})} -> a `histogram` each"""
    figure, axes = panels(len(found), 2.4)
    for ax, ((source, target), (confidence, known, thresholds)) in zip(axes, found.items()):
        thresholds = {rule: float(threshold) for rule, threshold in thresholds.items()}
        histogram(ax, confidence.double().cpu().numpy(), known.cpu().numpy(), thresholds, score)
        ax.set_title(f"{source} \u2192 {target}")
    figure.supxlabel(f"confidence ({score})")
    figure.supylabel("clips, %")
    entries = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=2)
    return figure


def masks(shown: dict, asked: list):
    """Of n clips `frame` (n, H, W, d), `truth` (n, h, w), and for each direction of the query the probability
    (n, h, w); `asked`: the class that each is asked for -> a row of each, a column a clip."""
    count = len(asked)
    frame, truth = shown["frame"], shown["truth"]
    height, width = truth.shape[1] // frame.shape[1], truth.shape[2] // frame.shape[2]
    if frame.shape[-1] == height * width:  # a cell's features are its pixels
        frame = frame.unflatten(-1, (height, width)).transpose(2, 3).reshape(truth.shape)
    else:
        frame = frame.norm(dim=-1)
    rows = {"frame": frame, "truth": truth} | {k: v for k, v in shown.items() if k not in ("frame", "truth")}
    figure, axes = panels(len(rows) * count, 1.7, columns=count)
    for (name, images), line in zip(rows.items(), axes.reshape(-1, count)):
        limits = {} if name == "frame" else {"vmin": 0, "vmax": 1}
        for ax, image in zip(line, images):
            ax.imshow(image.float().cpu().numpy(), cmap="gray", **limits)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for ax, name in zip(axes, asked):
        ax.set_title(f"asked for: {name}")
    return figure


# -------------------------------------------------------------------------------------------------- a run's pictures
def all_pictures(lines, codebook, selections, by_class, classes, outcomes, drawn):
    """{file name: () -> Figure} of what there is; the arguments are those of `show`."""
    found = {}
    if any(tag.startswith("losses/") for line in lines for tag in line):
        found["training"] = partial(training, lines)
    found["codes"] = partial(usage, selections)
    found["codebook"] = partial(codebook_map, codebook, selections, by_class, classes)
    directions, open_sets = {}, {}
    for (task, *way), outcome in outcomes.items():
        if task == "classification":
            directions[tuple(way)] = outcome.prediction, outcome.label
        for score, confidence in outcome.scores.items():
            thresholds = {rule: of_scores[score] for rule, of_scores in outcome.thresholds.items()}
            open_sets.setdefault((task, score), {})[tuple(way)] = confidence, outcome.known, thresholds
    if directions:
        found["confusion"] = partial(confusion, directions, classes)
    for (task, score), ways in open_sets.items():
        found[f"{task}_{score}".replace(",", "-")] = partial(confidences, ways, score)
    if drawn:
        found["masks"] = partial(masks, *drawn)
    return found


def show(folder, lines: list, codebook, selections: dict, by_class, classes: list, outcomes: dict, drawn, writer=None,
         step: int = 0) -> None:
    """Every picture of a run as PNG in `folder` and in TensorBoard, which also gets the codebook for its projector.

    lines: of the log, dicts. codebook (K, D), selections {m: (K,)} on the test clips, by_class (C, K): selections by
    clips of each class. outcomes {(task, trained on, tested on): scores, prediction, label, known, thresholds}, as
    `probes.Outcome`. drawn: None, or the arguments of `masks`."""
    if writer:
        embed(writer, codebook, selections, step)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.image import imsave
    Path(folder).mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in all_pictures(lines, codebook, selections, by_class, classes, outcomes, drawn).items():
            canvas = FigureCanvasAgg(draw())
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            imsave(Path(folder, f"{name}.png"), pixels)
            if writer:
                writer.add_image(f"run/{name}", pixels, step, dataformats="HWC")


def embed(writer, codebook, selections: dict, step: int) -> None:
    """TensorBoard: the codebook (K, D) in the projector, labelled with the modalities that use each code {m: (K,)}."""
    labels = []
    for column in owners(selections)[0].T.tolist():
        labels.append("+".join(m for m, uses in zip(selections, column) if uses) or "unused")
    writer.add_embedding(codebook, labels, tag="codebook", global_step=step)


# --------------------------------------------------------------------------------------------------------------- table
def table(tags: dict, hidden: tuple = ()) -> str:
    """The `eval/` tags in plain columns, without those whose ending is `hidden`: fractions in percent with one decimal,
    counts as they are."""
    tasks = {}  # {task: {row: {column: cell}}}
    for tag, value in tags.items():
        _, task, *where, metric = tag.split("/")
        cell = f"{100 * value:.1f}"
        if metric.startswith(("used_", "perplexity_", "queries", "database")):
            cell = f"{value:.0f}"
        rows = tasks.setdefault(task, {})
        if task == "codebook":
            rows[metric] = {"value": cell}
        elif not metric.endswith(hidden):
            rows.setdefault(where[0], {})[metric] = cell
    lines = []
    for task, rows in tasks.items():
        columns = dict.fromkeys(column for cells in rows.values() for column in cells)
        lines += ["", f"{task:19}" + "  ".join(f"{column:>6}" for column in columns)]
        for row, cells in rows.items():
            shown = [cells.get(column, "-").rjust(max(len(column), 6)) for column in columns]
            lines.append(f"  {row:17}" + "  ".join(shown))
        if any("hos_source" in cells and "hos" not in cells for cells in rows.values()):
            lines.append("  hos is missing where there are no pairs: --pairs FILE finds the target's threshold")
    return "\n".join(lines[1:])
