"""The released protocols, leaks and all: what the authors' scripts compute, for comparison only. Tags end in `_paper`.

    python -m official.protocol RUN [FILE ...]                classification and open set of a finished run
    python -m official.protocol RUN --tasks localization
    python -m official.protocol RUN ucf.h5 --target vgg.h5 --class-map "playing cello=PlayingCello"

Dropout stays on while the probe trains, the epoch (and the open-set threshold) is the best one on the test clips, and
classification is scored on the very clips of the training split, in the other modality.
"""
import itertools
import sys
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import Features
from probes import (ClipProbe, Plan, ProbeTraining, accuracy, annotated, open_run, open_set_metrics, report,
                    segment_metrics)
from run import InputError, explain_input_errors, pick_device

DROPOUT_DRAWS = 2  # encodings with dropout that the epochs of a probe take in turn; released: one an epoch
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
    precision, recall = 0.0, 0.0
    for score, true in zip(scores.split(batch_size), target.split(batch_size)):
        batch = segment_metrics(score, true)
        precision += batch["precision"] * len(score)
        recall += batch["recall"] * len(score)
    precision /= len(scores)
    recall /= len(scores)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-12)}


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
    best = open_set_metrics(confidence, prediction, target, num_known, low)
    for threshold in sweep[1:]:
        found = open_set_metrics(confidence, prediction, target, num_known, threshold)
        if found["hos"] > best["hos"]:
            best = found
    return best


class FadingSegmentProbe(nn.Module):
    """The released probe of segments, as `probes.SegmentProbe`, but with linear layers of `widths`, then one of C + 1;
    its second loss fades with weights alpha (C + 1,) that it learns."""

    def __init__(self, width: int, classes: int, widths: tuple):
        super().__init__()
        sizes = (width, *widths, classes + 1)
        self.layers = nn.Sequential(*map(nn.Linear, sizes, sizes[1:]))
        self.alpha = nn.Parameter(torch.full((classes + 1,), 0.1))

    def forward(self, codes):
        return codes.each(self.layers)

    def loss(self, codes, target):
        """target (B, T, C + 1): binary cross-entropy, less the mean of sum over c of y_c log softmax_c exp(-alpha_c)"""
        logits = self(codes)
        second = (target * logits.log_softmax(-1) * (-self.alpha).exp()).sum(-1).mean()
        return F.binary_cross_entropy_with_logits(logits, target) - second


def origins(features: Features) -> set:
    """The data sets that the files say they come from."""
    return {file.source for file in features.files}


def evaluate(plan: Plan, model, encode, codebook_size: int, paper: dict) -> dict:
    """The released probes of the plan's tasks, with the method's settings `paper` -> {tag: value}. The plan is one of
    `every_clip`; as with `Plan.evaluate`, the model, its mode and the random state are left as they were."""
    if plan.own_target:  # the release has settings of their own for other lists and for other data sets
        kind = "target" if origins(plan.source) == origins(plan.target) else "across"
        paper = {task: paper.get(f"{task}_{kind}", setting) for task, setting in paper.items()}
    tags = {}
    with plan.probing(model, encode, codebook_size) as read:
        @cache
        def noisy(modality):  # codes of the training clips with dropout on, as the released probes train
            torch.manual_seed(0)
            model.train()
            draws = [read(plan.source, modality, plan.parts["train"].index) for _ in range(DROPOUT_DRAWS)]
            model.eval()
            return draws

        if "classification" in plan.tasks:
            tags |= classification(plan, noisy, paper["classification"])
        if "open_set" in plan.tasks:
            tags |= open_set(plan, noisy, paper["open_set"])
        if "localization" in plan.tasks:
            tags |= localization(plan, noisy, paper["localization"])
    return tags


class BestEpoch:
    """The leak: of each target modality, the figures of the epoch that has the best `metric` on the scored clips."""

    def __init__(self, metric: str):
        self.metric = metric
        self.figures = {}

    def add(self, target: str, figures: dict) -> None:
        if target not in self.figures or figures[self.metric] > self.figures[target][self.metric]:
            self.figures[target] = figures

    def tags(self, plan: Plan, task: str, source: str) -> dict:
        tags = {}
        for target, figures in self.figures.items():
            tags |= plan.tags(task, source, target, {f"{name}_paper": value for name, value in figures.items()})
        return tags


def drawn(plan: Plan, part, draws: list) -> list:
    """Of encodings `draws` [Codes] of all training clips those of the clips of `part`."""
    rows = torch.from_numpy(np.isin(plan.parts["train"].index, part.index)).to(plan.device)
    return [draw[rows] for draw in draws]


def clip_probe_epochs(plan: Plan, draws: list, train, setting: dict):
    """Train a probe of whole clips on encodings `draws` [Codes] of the training clips, those of `train` with a class
    that it knows; gives it after every epoch."""
    known = train[train.label < len(train.classes)]
    draws = drawn(plan, known, draws)
    probe = partial(ClipProbe, draws[0].rows.shape[-1], len(train.classes))
    run = ProbeTraining(probe, plan.device, setting["learning_rate"], setting["batch_size"])
    for epoch in range(setting["epochs"]):
        run.epoch(draws[epoch % len(draws)], known.label)
        yield run


def classification(plan: Plan, noisy, setting: dict) -> dict:
    """Scored on the target or, without one of its own, on the training clips in the other modality; noisy(m) [Codes]"""
    tags, parts = {}, plan.with_known(plan.classes, closed=True)
    scored = parts["test" if plan.own_target else "train"]
    # of batches as the released loader shuffles them
    order = torch.randperm(len(scored), generator=torch.Generator().manual_seed(0)).to(plan.device)
    for source, targets in plan.directions.items():
        best = BestEpoch(setting["metric"])
        for run in clip_probe_epochs(plan, noisy(source), parts["train"], setting):
            for target in targets:
                prediction = run.logits(plan.codes(scored, target)).softmax(-1).argmax(-1)
                if setting["metric"] == "macro_precision":
                    value = macro_precision(prediction[order], scored.label[order], setting["batch_size"])
                else:
                    value = accuracy(prediction, scored.label)["acc"]
                best.add(target, {setting["metric"]: value})
        tags |= best.tags(plan, "classification", source)
    return tags


def open_set(plan: Plan, noisy, setting: dict) -> dict:
    """Threshold and epoch are those of the best HOS on the test clips; noisy(m) [Codes] -> tags"""
    tags = {}
    for (entry, classes), (source, targets) in itertools.product(plan.known.items(), plan.directions.items()):
        parts = plan.with_known(classes)
        scored = parts["test"]
        best = BestEpoch(setting["metric"])
        for run in clip_probe_epochs(plan, noisy(source), parts["train"], setting):
            for target in targets:
                confidence, prediction = run.logits(plan.codes(scored, target)).softmax(-1).max(-1)
                found = best_threshold(confidence, prediction, scored.label, len(classes))
                best.add(target, {name: found[name] for name in ("os_star", "unk", "hos")})
        tags |= best.tags(plan, f"open_set_{entry}", source)
    return tags


def localization(plan: Plan, noisy, setting: dict) -> dict:
    """A probe of every segment, its epoch chosen on the test clips; noisy(m) [Codes] -> tags"""
    tags = {}
    for source, targets in plan.event_directions.items():
        train, event = annotated(plan, "train", source)
        draws = drawn(plan, train, noisy(source))
        width = draws[0].rows.shape[-1]
        widths = [width // part for part in setting["widths"]]
        run = ProbeTraining(partial(FadingSegmentProbe, width, len(plan.classes), widths), event.device,
                            setting["learning_rate"], setting["batch_size"])
        run.clipped = list(run.probe.layers.parameters())  # not the fading weights
        tests = {target: annotated(plan, "test", target) for target in targets}
        best = BestEpoch(setting["metric"])
        for epoch in range(setting["epochs"]):
            run.epoch(draws[epoch % len(draws)], event)
            for target, (test, true) in tests.items():
                score = run.logits(plan.codes(test, target)).sigmoid()
                best.add(target, batch_segment_metrics(score, true, setting["batch_size"]))
        tags |= best.tags(plan, "localization", source)
    return tags


def main(paths: tyro.conf.Positional[tuple[str, ...]], *, tasks: tuple[Literal[TASKS], ...] = (),
         known: tuple[str, ...] = (), target: tuple[str, ...] = (), class_map: tuple[str, ...] = (),
         out: str | None = None, device: str = "auto") -> None:
    """Probe the model of RUN (a run folder or its checkpoint.pt) on FILE ... as published (default: the data it was
    trained on).

    Args:
        paths: RUN [FILE ...]
        tasks: what is probed; default: classification and open_set, as far as there are labels.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of them.
        target: files to test on, of clips, modalities and classes of their own; default: FILE ... itself.
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        out: a JSON file for all figures.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    (method, args, shape, model, epochs), source, target = open_run(paths, target, out)
    if method.METHOD not in PAPER:
        raise InputError(f"{paths[0]}: no probes of {method.METHOD} are released; python probes.py {paths[0]} has ours")
    device = pick_device(device)
    plan = Plan(source, shape, device, tasks, known, target=target, class_map=class_map, every_clip=True)
    settings = paper_settings(method.METHOD, epochs)
    report(evaluate(plan, model.to(device), method.encode, args.codebook_size, settings), out)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)
