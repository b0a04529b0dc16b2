"""The released protocols, with their leaks: what the authors' scripts compute, for comparison only. Tags end in `_paper`.

    python -m official.protocol RUN [FILE ...]                classification and open set of a finished run
    python -m official.protocol RUN --tasks localization
    python -m official.protocol RUN ucf.h5 --target vgg.h5 --class-map "playing cello=PlayingCello"

Dropout stays on while the probe trains, the epoch (and the open-set threshold) is the best one on the test clips, and
classification is scored on the very clips of the training split, in the other modality.
"""
import itertools
import json
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import tyro

from data import Features, data_files
from probes import (ClipProbe, ProbeSet, ProbeTraining, SegmentProbe, accuracy, annotated, check_request,
                    class_names, direction, load, localized, numbered, open_set_metrics, ordered_pairs, parts_of,
                    read_codes, segment_metrics, table, wanted_classes)
from run import InputError, explain_input_errors, pick_device

DROPOUT_DRAWS = 2  # encodings with dropout that the epochs of a `paper` probe take in turn; released: one an epoch
TASKS = ("classification", "localization", "open_set")  # of which the release has probes
# The released probes' settings; `metric` picks the epoch, `widths` are those of the layers of the segment probe, D / n.
# `_target`: tested on files of their own (UCF-51); `_across`: on another data set (UCF <-> VGG, AVE -> AVVP).
PAPER = {
    "micu": {
        "classification": {"epochs": 30, "learning_rate": 4e-4, "batch_size": 80, "metric": "acc"},
        "open_set": {"epochs": 25, "learning_rate": 4e-4, "batch_size": 80, "metric": "hos"},
        "localization": {"epochs": 30, "learning_rate": 4e-4, "batch_size": 80, "metric": "f1", "widths": (1,)},
        "open_set_target": {"epochs": 16, "learning_rate": 4e-4, "batch_size": 80, "metric": "hos"},
        "classification_across": {"epochs": 40, "learning_rate": 4e-4, "batch_size": 80, "metric": "acc"}},
    "uni_code": {
        "classification": {"epochs": 30, "learning_rate": 4e-4, "batch_size": 80, "metric": "acc"},
        "open_set": {"epochs": 25, "learning_rate": 4e-4, "batch_size": 80, "metric": "hos"},
        "localization": {"epochs": 50, "learning_rate": 4e-4, "batch_size": 80, "metric": "precision", "widths": (1,)},
        "open_set_target": {"epochs": 16, "learning_rate": 4e-4, "batch_size": 80, "metric": "hos"},
        "localization_across": {"epochs": 50, "learning_rate": 4e-4, "batch_size": 80, "metric": "f1", "widths": (1,)}},
    "codaar": {
        "classification": {"epochs": 30, "learning_rate": 2.5e-4, "batch_size": 256, "metric": "macro_precision"},
        "open_set": {"epochs": 25, "learning_rate": 4e-4, "batch_size": 80, "metric": "hos"},
        "localization": {"epochs": 50, "learning_rate": 4e-4, "batch_size": 64, "metric": "precision",
                         "widths": (1, 2, 2)},
        "open_set_target": {"epochs": 16, "learning_rate": 4e-4, "batch_size": 80, "metric": "hos"},
        "classification_across": {"epochs": 30, "learning_rate": 4e-4, "batch_size": 80, "metric": "acc"},
        "localization_across": {"epochs": 30, "learning_rate": 4e-4, "batch_size": 80, "metric": "f1", "widths": (1,)}},
}


def paper_settings(method: str, pretraining_epochs: int) -> dict:
    """The released probes stop at a fixed epoch number but start counting where pretraining ended."""
    return {task: {**s, "epochs": max(1, s["epochs"] - pretraining_epochs)} for task, s in PAPER[method].items()}


def batch_segment_metrics(scores, target, batch_size: int) -> dict:
    """`segment_metrics` as released: of each mini-batch of clips, averaged with its size; F1 of the two averages."""
    parts = [(segment_metrics(s, t), len(s)) for s, t in zip(scores.split(batch_size), target.split(batch_size))]
    precision, recall = (sum(m[name] * n for m, n in parts) / len(scores) for name in ("precision", "recall"))
    return {"precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0}


def macro_precision(prediction, target, batch_size: int) -> float:
    """CoDAAR's "precision": over the classes that a mini-batch predicts at all, the mean share that is right, averaged
    over the mini-batches by their size; both (N,) int."""
    total = 0.0
    for p, t in zip(prediction.split(batch_size), target.split(batch_size)):
        total += len(p) * torch.stack([(t[p == c] == c).double().mean() for c in p.unique()]).mean().item()
    return total / len(prediction)


def best_threshold(confidence, prediction, target, num_known: int) -> dict:
    """The released sweep: of 10 evenly spaced thresholds from the least to the greatest confidence, the best HOS."""
    low, high = confidence.min().item(), confidence.max().item()
    sweep = [low + (high - low) * i / 9 for i in range(9)] + [high]
    return max((open_set_metrics(confidence, prediction, target, num_known, t) for t in sweep), key=lambda r: r["hos"])


def evaluate(model, encode, features: Features, modalities: list, codebook_size: int, device, tasks: tuple,
             known: tuple, paper: dict, target: Optional[Features] = None, class_map: tuple = ()) -> dict:
    """The released probes of `tasks`, with the method's settings `paper` -> {tag: value}. As `probes.evaluate`."""
    training, (classes, names) = model.training, class_names(features, target, class_map)
    if target:  # the release has settings of their own for other lists and for other data sets
        origin = [{file.h5.attrs.get("source") for file in side.files} for side in (features, target)]
        kind = "target" if origin[0] == origin[1] else "across"
        paper = {task: paper.get(f"{task}_{kind}", setting) for task, setting in paper.items()}
    read = partial(read_codes, model, encode, codebook_size=codebook_size, device=device)
    source = ProbeSet(features, classes, {}, device, read)
    parts = parts_of(source, ProbeSet(target, classes, names, device, read) if target else None, every_clip=True)
    present = [[m for m in modalities if m in part.features.modalities] for part in (parts["train"], parts["test"])]
    pairs, tags = ordered_pairs(*present), {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()

        @lru_cache
        def noisy(m):  # codes of the training clips with dropout on, as the released probes train
            torch.manual_seed(0)
            model.train()
            draws = [read(features, m, parts["train"].clips) for _ in range(DROPOUT_DRAWS)]
            model.eval()
            return draws

        if wanted := wanted_classes(tasks, known, classes):
            single = {name: part.single() for name, part in parts.items()}
            keep = torch.from_numpy(np.isin(parts["train"].clips, single["train"].clips))
            draws = {a: [draw[keep.to(device)] for draw in noisy(a)] for a, _ in pairs}
            tags |= as_published(draws, single, wanted, pairs, modalities, paper)
        if "localization" in tasks:
            tags |= localization(noisy, parts, modalities, paper["localization"])
        model.train(training)
    return tags


def as_published(noisy, parts, wanted, pairs, modalities, paper) -> dict:
    """The released protocol with its leaks; noisy {m: [Codes]}, encodings of the training clips with dropout -> tags"""
    tags, total = {}, len(parts["train"].of.classes)
    # classification without a target of its own: the training clips in the other modality
    own_target = parts["test"].of is not parts["train"].of
    scored = {entry: parts["test" if own_target or entry else "train"] for entry in wanted}
    scored = {entry: part if entry else part[(part.label < total).cpu()] for entry, part in scored.items()}
    task = {entry: "open_set" if entry else "classification" for entry in wanted}
    longest = max(paper[name]["epochs"] for name in task.values())
    for source in dict.fromkeys(a for a, _ in pairs):
        draws, runs = noisy[source], {}
        label = {entry: numbered(numbers, parts["train"].label, total) for entry, numbers in wanted.items()}
        for entry, numbers in wanted.items():
            setting = paper[task[entry]]
            probe = partial(ClipProbe, draws[0].rows.shape[-1], len(numbers))
            runs[entry] = ProbeTraining(probe, label[entry].device, setting["learning_rate"], setting["batch_size"])
        for epoch, (entry, run) in itertools.product(range(longest), runs.items()):
            setting, known = paper[task[entry]], len(wanted[entry])
            if epoch >= setting["epochs"]:
                continue
            keep = label[entry] < known
            run.epoch(draws[epoch % len(draws)][keep], label[entry][keep])
            true = numbered(wanted[entry], scored[entry].label, total)
            for target in (b for a, b in pairs if a == source):
                confidence, prediction = run.logits(scored[entry].codes(target)).softmax(-1).max(-1)
                if entry:
                    result = best_threshold(confidence, prediction, true, known)
                elif setting["metric"] == "macro_precision":  # of batches as the released loader shuffles them
                    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(0)).to(true.device)
                    result = {"macro_precision": macro_precision(prediction[order], true[order],
                                                                 setting["batch_size"])}
                else:
                    result = {"acc": accuracy(prediction, true)["acc"]}
                path = f"eval/{f'open_set_{entry}' if entry else 'classification'}"
                path, goal = f"{path}/{direction(source, target, modalities)}", setting["metric"]
                if result[goal] > tags.get(f"{path}/{goal}_paper", -1):  # the best epoch on the scored labels
                    tags |= {f"{path}/{name}_paper": value for name, value in result.items()
                             if name != "os_star_class_mean"}
    return tags


def localization(noisy, parts, modalities, setting: dict) -> dict:
    """A probe of every segment, its epoch chosen on the test clips; noisy(m) [Codes], parts {name: Part} -> tags"""
    tags, own_target = {}, parts["test"].of is not parts["train"].of
    pairs = ordered_pairs(*(localized(parts[name].features, modalities) for name in ("train", "test")))
    for source in dict.fromkeys(a for a, _ in pairs):
        part, event, keep = annotated(parts["train"], source, own_target)
        width, classes = part.codes(source).rows.shape[-1], len(part.of.classes)
        tests = {b: annotated(parts["test"], b, own_target)[:2] for a, b in pairs if a == source}
        path = {b: f"eval/localization/{direction(source, b, modalities)}" for b in tests}
        draws = [draw[torch.from_numpy(keep)] for draw in noisy(source)]
        widths = [width // part for part in setting["widths"]]
        run = ProbeTraining(partial(SegmentProbe, width, classes, widths, True), event.device,
                            setting["learning_rate"], setting["batch_size"])
        for epoch in range(setting["epochs"]):
            run.epoch(draws[epoch % len(draws)], event)
            for target, (test, true) in tests.items():
                result = batch_segment_metrics(run.logits(test.codes(target)).sigmoid(), true, setting["batch_size"])
                if result[setting["metric"]] > tags.get(f"{path[target]}/{setting['metric']}_paper", -1):
                    tags |= {f"{path[target]}/{name}_paper": value for name, value in result.items()}
    return tags


def main(paths: tyro.conf.Positional[tuple[str, ...]], *,
         tasks: tuple[Literal[TASKS], ...] = ("classification", "open_set"), known: tuple[str, ...] = (),
         target: tuple[str, ...] = (), class_map: tuple[str, ...] = (), out: Optional[str] = None,
         device: str = "auto") -> None:
    """Probe the model of RUN (a run folder or its checkpoint.pt) on FILE ... as published (default: the data it was
    trained on).

    Args:
        paths: RUN [FILE ...]
        tasks: what is probed.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of them.
        target: files to test on, of clips, modalities and classes of their own; default: FILE ... itself.
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        out: a JSON file for all figures.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    if not paths:
        raise InputError("give a run folder")
    if out and not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist")
    run, *files = paths
    method, args, shape, model, epochs = load(Path(run))
    features, device = Features(data_files(files or args.data, args.runs_dir)), pick_device(device)
    target = Features(data_files(target, args.runs_dir)) if target else None
    check_request(features, shape, tasks, known, target, class_map, every_clip=True)
    tags = evaluate(model.to(device), method.encode, features, list(shape), args.codebook_size, device, tasks, known,
                    paper_settings(method.METHOD, epochs), target, class_map)
    if out:
        Path(out).write_text(json.dumps(tags, indent=1) + "\n")
    print(table(tags))


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)
