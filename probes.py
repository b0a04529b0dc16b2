"""Frozen-probe protocols: a probe trained on the codes of one modality is tested, untouched, on those of another.

    python probes.py RUN                              probe a finished run again, on its own data
    python probes.py RUN FILE --protocol clean        on another cmg-features file

`clean`: encoder in eval mode, last probe epoch, open-set threshold from held-out clips of the *source* modality;
nothing is chosen with test labels. `paper`: what the released scripts compute, tags end in `_paper`: dropout stays on
while the probe trains, the epoch (and the open-set threshold) is the best one on the test clips, and classification is
scored on the very clips of the training split, in the other modality. The model comes in as a module and a function
`encode(model, features, modality) -> (quantized (N, T, D), code_index (N, T))`, one vector a code; this file knows
nothing of the methods.
"""
import importlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import (SPLITS, Features, InputError, data_files, explain_input_errors, first_line, pick_device,
                  require_shape)

EPOCHS, LEARNING_RATE, BATCH_SIZE = 5, 4e-4, 80  # of the clean probes; by then the held-out source loss has levelled
REJECT = 0.05  # share of held-out known source clips that the clean open-set threshold rejects
DROPOUT_DRAWS = 2  # encodings with dropout that the epochs of a `paper` probe take in turn; released: one an epoch
SCRIPTS = ("uni_code", "micu", "codaar")  # the only modules that a checkpoint may name
SHARE = 0.1  # a modality shares a code if it makes at least this part of the code's selections


# ------------------------------------------------------------------------------------------------------------- metrics
def accuracy(prediction, target) -> dict:
    """Clip accuracy and the mean over the classes present of class recall; both (N,) int, fractions in [0, 1]."""
    require_shape("target", target, (len(prediction),))
    correct = (prediction == target).double()
    recall = [correct[target == c].mean() for c in target.unique()]
    return {"acc": correct.mean().item(), "macro_recall": torch.stack(recall).mean().item()}


def open_set_metrics(confidence, prediction, target, num_known: int, threshold: float) -> dict:
    """OS*, UNK and HOS (MICU 4.1) at one threshold; all (N,). Clips with target >= num_known are unknown.

    A clip with confidence < threshold is rejected. `os_star`: share of the known clips accepted and classified right;
    `os_star_class_mean`: the same as a mean over the known classes present; `unk`: share of the unknown clips rejected;
    `hos`: their harmonic mean, 0 if both are 0. Raises ValueError on unequal lengths."""
    shapes = [tuple(t.shape) for t in (confidence, prediction, target)]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError("confidence, prediction, target have shapes {}, {}, {}, expected (N,) each".format(*shapes))
    accepted, known = confidence >= threshold, target < num_known
    right = (accepted & (prediction == target)).double()
    rejected = (~accepted[~known]).double()
    per_class = [right[target == c].mean() for c in target[known].unique()]
    os_star = right[known].mean().item() if known.any() else 0.0
    unk = rejected.mean().item() if len(rejected) else 0.0
    return {"os_star": os_star, "os_star_class_mean": torch.stack(per_class).mean().item() if per_class else 0.0,
            "unk": unk, "hos": 2 * os_star * unk / (os_star + unk) if os_star + unk > 0 else 0.0}


def auroc(score_positive, score_negative) -> float:
    """Probability that a random positive scores above a random negative, ties counting half; (P,), (N,)."""
    negative = score_negative.double().sort().values
    positive = score_positive.double().contiguous()
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).item()


def segment_metrics(scores, target, threshold: float = 0.5) -> dict:
    """Pooled precision, recall and F1 of multi-hot labels; scores and target (..., C), score > threshold predicts.

    0 where nothing is predicted or nothing is there. Raises ValueError on unequal shapes."""
    require_shape("target", target, scores.shape)
    predicted, true = scores > threshold, target > 0.5
    hits = (predicted & true).sum().item()
    precision, recall = hits / max(predicted.sum().item(), 1), hits / max(true.sum().item(), 1)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def recall_at_k(query, database, query_group, database_group, k: int) -> float:
    """Share of queries with an item of their group among the k nearest by cosine; (Q, D), (N, D), (Q,), (N,).

    Raises ValueError on shapes that do not fit."""
    require_shape("query", query, (-1, -1))
    require_shape("database", database, (-1, query.shape[1]))
    require_shape("query_group", query_group, (len(query),))
    require_shape("database_group", database_group, (len(database),))
    if not 1 <= k <= len(database):
        raise ValueError(f"k {k} is not in 1..{len(database)}, the size of the database")
    similarity = F.normalize(query, dim=-1) @ F.normalize(database, dim=-1).T  # (Q, N)
    nearest = database_group[similarity.topk(k).indices]  # (Q, k)
    return (nearest == query_group[:, None]).any(1).double().mean().item()


def mask_metrics(probability, target) -> dict:
    """Segmentation over frames, (..., H, W) each: mIoU at 0.5, and the best F-score (beta^2 = 0.3) over 255 thresholds.

    A frame without a mask scores the share of its correctly empty pixels in mIoU and is left out of the F-score.
    Raises ValueError on unequal shapes."""
    require_shape("probability", probability, (*probability.shape[:-2], -1, -1))
    require_shape("target", target, probability.shape)
    frame = (-1, probability.shape[-2] * probability.shape[-1])
    p, true = probability.reshape(frame).double(), target.reshape(frame) > 0.5  # (frames, H*W)
    predicted = p > 0.5
    union = (predicted | true).sum(1)
    iou = torch.where(true.any(1), (predicted & true).sum(1) / union.clamp(min=1), (~predicted).double().mean(1))
    p, true = p[true.any(1)], true[true.any(1)]
    curve = []
    for threshold in torch.linspace(0, 1 - 1e-10, 255, dtype=torch.double):
        predicted = p >= threshold
        hits = (predicted & true).sum(1).double()
        precision, recall = hits / predicted.sum(1).clamp(min=1), hits / true.sum(1).clamp(min=1)
        curve.append((1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-12)).mean())
    return {"miou": iou.mean().item(), "f_score": torch.stack(curve).max().item() if len(p) else 0.0}


def code_sharing(counts, share: float) -> dict:
    """Of the codes in use, the parts shared by 1..M modalities: counts (M, K) selections; a modality has a code if it
    makes at least `share` of its selections. `shared_i` counts codes, `weighted_i` their selections (MICU, Fig. 6)."""
    require_shape("counts", counts, (-1, -1))
    total, ways = counts.sum(0).double(), range(1, len(counts) + 1)
    shared = ((counts / total >= share) & (total > 0)).sum(0)  # (K,) modalities sharing each code, 0 if unused
    tags = {f"shared_{i}": ((shared == i).sum() / (total > 0).sum().clamp(min=1)).item() for i in ways}
    return tags | {f"weighted_{i}": (total[shared == i].sum() / total.sum().clamp(min=1)).item() for i in ways}


def codebook_metrics(code_index: dict, codebook_size: int):
    """Health of the code: {m: (N, T) int} -> (tags, selections {m: (K,)}). Agreement is over pairs of modalities."""
    counts = torch.stack([i.flatten().bincount(minlength=codebook_size) for i in code_index.values()]).cpu()
    share = counts.double() / counts.sum(1, keepdim=True)
    pairs = itertools.combinations(code_index.values(), 2)
    tags = {f"used_{m}": (row > 0).sum().item() for m, row in zip(code_index, counts)}
    tags |= {f"perplexity_{m}": row.exp().item() for m, row in zip(code_index, torch.special.entr(share).sum(1))}
    tags["agreement"] = torch.stack([(a == b).double().mean() for a, b in pairs]).mean().item()
    return tags | code_sharing(counts, SHARE), dict(zip(code_index, counts))


# -------------------------------------------------------------------------------------------------------------- probes
@dataclass
class Codes:
    """Discrete codes of clips: `index` (N, T) int64 points into `rows` (K, D), the vectors of the codes that occur."""
    rows: torch.Tensor
    index: torch.Tensor

    def __getitem__(self, clips):
        return Codes(self.rows, self.index[clips])

    def __len__(self):
        return len(self.index)


class ClipProbe(nn.Module):
    """Codes of B clips -> class logits (B, C): linear (once for each code), maximum over the segments, linear."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.hidden, self.classify = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, codes):
        used, index = codes.index.unique(return_inverse=True)
        return self.classify(F.embedding(index, self.hidden(codes.rows[used])).amax(1))


class ProbeTraining:
    """A clip probe and its optimisation: Adam, halved after 10, 20 and 30 epochs, gradient norm clipped at 0.5."""

    def __init__(self, width: int, classes: int, device, learning_rate: float, batch_size: int):
        self.probe, self.batch_size = ClipProbe(width, classes).to(device), batch_size
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [10, 20, 30], 0.5)

    def epoch(self, codes: Codes, target) -> None:
        """One shuffled pass over the codes of N clips, target (N,); the last batch is kept."""
        for clips in torch.randperm(len(codes)).to(target.device).split(self.batch_size):
            self.optimizer.zero_grad()
            F.cross_entropy(self.probe(codes[clips]), target[clips]).backward()
            nn.utils.clip_grad_norm_(self.probe.parameters(), 0.5)
            self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def predict(self, codes: Codes):
        """Codes of N clips -> confidence (N,), the largest softmax, and prediction (N,)"""
        parts = [self.probe(codes[i:i + 1000]) for i in range(0, len(codes), 1000)]
        return torch.cat(parts).softmax(-1).max(-1)


@torch.no_grad()
def read_codes(model, encode, features: Features, modality: str, clips, codebook_size: int, device) -> Codes:
    """The codes of the clips with these numbers, encoded in the model's present mode."""
    rows, parts = None, []
    for i in range(0, len(clips), 200):
        x = torch.from_numpy(features.read(modality, clips[i:i + 200])).to(device).float()
        if not x.isfinite().all():
            raise InputError(f"NaN or infinity in {modality}: python data.py check FILE says where")
        quantized, index = encode(model, x, modality)
        rows = quantized.new_zeros(codebook_size, quantized.shape[-1]) if rows is None else rows
        rows[index.flatten()] = quantized.flatten(0, 1)  # a code is one vector
        parts.append(index)
    return Codes(rows, torch.cat(parts))


def direction(source: str, target: str, modalities: list) -> str:
    """`v2a`: trained on video, tested on audio. Initials, or whole names where initials are ambiguous."""
    ambiguous = len({m[0] for m in modalities}) < len(modalities)
    return f"{source}2{target}" if ambiguous else f"{source[0]}2{target[0]}"


# ----------------------------------------------------------------------------------------------------------- protocols
def known_counts(features: Features, known: tuple) -> tuple:
    return tuple(known) or (len(features.classes) // 2,)


def labelled_clips(features: Features) -> dict:
    """{split: indices of the labelled clips with one event}"""
    clips = {split: features.single_event(features.clips(split)) for split in SPLITS}
    return {split: index[features.label[index] >= 0] for split, index in clips.items()}


def check_request(features: Features, shape: dict, known: tuple) -> None:
    """Raise InputError before any training if the probes could not run on these features, of a model for `shape`."""
    path = features.files[0].path
    shared = [m for m in shape if m in features.modalities]
    if len(shared) < 2:
        raise InputError(f"{path}: holds {' '.join(features.modalities)}, probes need two of {' '.join(shape)}")
    for m in shared:
        if tuple(features.shape[m]) != tuple(shape[m]):
            raise InputError(f"{path}: {m} has shape {tuple(features.shape[m])}, the model wants {tuple(shape[m])}")
    if not (features.label >= 0).any():
        return
    clips = labelled_clips(features)
    for split, index in clips.items():
        if len(index) == 0:
            raise InputError(f"{path}: the {split} split is empty (no labelled clip with one event), probes need one")
    for k in known_counts(features, known):
        if not 1 <= k < len(features.classes):
            raise InputError(f"--known-classes {k}: the data has {len(features.classes)} classes, give 1 to "
                             f"{len(features.classes) - 1}")
        for split, index in clips.items():
            is_known = features.label[index] < k
            if not is_known.any() or split == "test" and is_known.all():
                lacking = "unknown" if is_known.any() else "known"
                raise InputError(f"{path}: the {split} split has no {lacking} classes for --known-classes {k}")


def evaluate(model, encode, features: Features, modalities: list, codebook_size: int, device, protocols: tuple,
             known: tuple, paper: dict):
    """All probes of a model on `features`. `paper`: per task the released epochs, learning rate and batch size.

    Returns ({tag: value}, {m: (K,) code selections on the test clips}). Leaves the model, its mode and the
    random state of the process as they were."""
    modalities, known = [m for m in modalities if m in features.modalities], known_counts(features, known)
    training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model.eval()
        labelled = (features.label >= 0).any()
        test = features.clips("test") if len(features.clips("test")) else features.clips("train")
        tested = {m: read_codes(model, encode, features, m, test, codebook_size, device) for m in modalities}
        tags, counts = codebook_metrics({m: codes.index for m, codes in tested.items()}, codebook_size)
        tags = {f"eval/codebook/{name}": value for name, value in tags.items()}
        if labelled:
            clips = labelled_clips(features)
            codes = {s: {m: read_codes(model, encode, features, m, clips[s], codebook_size, device)
                         for m in modalities} for s in ("train", "val")}
            codes["test"] = {m: tested[m][np.flatnonzero(np.isin(test, clips["test"]))] for m in modalities}
            label = {s: torch.from_numpy(features.label[index]).to(device) for s, index in clips.items()}
            if "clean" in protocols:
                tags |= clean(codes, label, features, modalities, known, device)
            if "paper" in protocols:
                def noisy(m):  # dropout on, as the released probes train
                    model.train()
                    noisy_codes = read_codes(model, encode, features, m, clips["train"], codebook_size, device)
                    model.eval()
                    return noisy_codes
                tags |= as_published(noisy, codes, label, features, modalities, known, device, paper)
        model.train(training)
    return tags, counts


def clean(codes, label, features, modalities, known, device) -> dict:
    """Nothing is chosen with test labels. codes {split: {m: Codes}}, label {split: (N,)} -> tags"""
    tags = {}
    for source in modalities:
        width = codes["train"][source].rows.shape[-1]
        for k in (None, *known):  # None: all classes
            keep = label["train"] < (k or len(features.classes))
            run = ProbeTraining(width, k or len(features.classes), device, LEARNING_RATE, BATCH_SIZE)
            for _ in range(EPOCHS):
                run.epoch(codes["train"][source][keep], label["train"][keep])
            if k:
                held_out = run.predict(codes["val"][source][label["val"] < k])[0]
                threshold = held_out.quantile(REJECT).item()
            for target in modalities:
                confidence, prediction = run.predict(codes["test"][target])
                if k is None:
                    result = accuracy(prediction, label["test"])
                    same = accuracy(run.predict(codes["test"][source])[1], label["test"])["acc"]
                    result = {"acc": result["acc"], "acc_same": same, "macro_recall": result["macro_recall"]}
                else:
                    result = open_set_metrics(confidence, prediction, label["test"], k, threshold)
                    result["hos_oracle"] = oracle_hos(confidence, prediction, label["test"], k)
                    result["auroc"] = auroc(confidence[label["test"] < k], confidence[label["test"] >= k])
                if target != source:
                    task = f"open_set_{k}" if k else "classification"
                    path = f"eval/{task}/{direction(source, target, modalities)}"
                    tags |= {f"{path}/{name}": value for name, value in result.items()}
    return tags


def oracle_hos(confidence, prediction, target, num_known: int) -> float:
    """The best HOS over all thresholds, found on the test clips: what a perfect threshold would give this probe."""
    ascending = confidence.argsort()
    first = torch.searchsorted(confidence[ascending], confidence[ascending])  # ties are rejected or accepted together
    known = target[ascending] < num_known
    right = (known & (prediction == target)[ascending]).double()
    os_star = ((right.sum() - right.cumsum(0) + right) / known.sum().clamp(min=1))[first]  # i accepts i, i+1, ..
    unk = (((~known).cumsum(0) - (~known).long()) / (~known).sum().clamp(min=1))[first]
    return (2 * os_star * unk / (os_star + unk).clamp(min=1e-12)).max().item()


def best_threshold(confidence, prediction, target, num_known: int) -> dict:
    """The released sweep: of 10 evenly spaced thresholds from the least to the greatest confidence, the best HOS."""
    low, high = confidence.min().item(), confidence.max().item()
    sweep = [low + (high - low) * i / 9 for i in range(9)] + [high]
    return max((open_set_metrics(confidence, prediction, target, num_known, t) for t in sweep), key=lambda r: r["hos"])


def as_published(noisy, codes, label, features, modalities, known, device, paper) -> dict:
    """The released protocol with its leaks; `noisy(m)` encodes the training clips anew with dropout on -> tags"""
    tags = {}
    for source in modalities:
        width, runs, draws = codes["train"][source].rows.shape[-1], {}, [noisy(source) for _ in range(DROPOUT_DRAWS)]
        for k in (None, *known):
            setting = paper["open_set" if k else "classification"]
            classes = k or len(features.classes)
            runs[k] = ProbeTraining(width, classes, device, setting["learning_rate"], setting["batch_size"])
        for epoch in range(max(setting["epochs"] for setting in paper.values())):
            train_codes = draws[epoch % DROPOUT_DRAWS]
            for k, run in runs.items():
                task = f"open_set_{k}" if k else "classification"
                if epoch >= paper["open_set" if k else "classification"]["epochs"]:
                    continue
                keep = label["train"] < (k or len(features.classes))
                run.epoch(train_codes[keep], label["train"][keep])
                for target in modalities:
                    if target == source:
                        continue
                    scored = "test" if k else "train"  # classification: the training clips in the other modality
                    confidence, prediction = run.predict(codes[scored][target])
                    result = best_threshold(confidence, prediction, label[scored], k) if k else \
                        {"acc": accuracy(prediction, label[scored])["acc"]}
                    path, goal = f"eval/{task}/{direction(source, target, modalities)}", "hos" if k else "acc"
                    if result[goal] > tags.get(f"{path}/{goal}_paper", -1):  # the best epoch on the test labels
                        names = ("os_star", "unk", "hos") if k else ("acc",)
                        tags |= {f"{path}/{name}_paper": result[name] for name in names}
    return tags


def show_codebook(writer, codebook, selections: dict, step: int) -> None:
    """TensorBoard: the codebook in the projector, labelled with the modalities that use each code, and a usage picture.

    selections {m: (K,)}: a modality uses a code if it makes at least SHARE of the code's selections (MICU, Fig. 6)."""
    modalities, counts = list(selections), torch.stack(list(selections.values()))
    share = counts / counts.sum(0).clamp(min=1)
    labels = ["+".join(m for m, s in zip(modalities, column) if s >= SHARE) or "unused" for column in share.T.tolist()]
    writer.add_embedding(codebook.cpu(), labels, tag="codebook", global_step=step)
    rows = counts[:, counts.sum(0).argsort(descending=True)].sqrt()
    picture = (rows / rows.amax(1, keepdim=True).clamp(min=1)).repeat_interleave(24, 0).repeat_interleave(2, 1)
    writer.add_image("codebook/usage", picture, step, dataformats="HW")  # one band a modality, codes by total use


def table(tags: dict) -> str:
    """The `eval/` tags in plain columns: fractions in percent with one decimal, counts as they are."""
    tasks = {}
    for tag, value in tags.items():
        _, task, *where, metric = tag.split("/")
        if task == "codebook":
            where, metric = [metric], "value"
        plain = task == "codebook" and where[0].startswith(("used", "perplexity"))
        tasks.setdefault(task, {}).setdefault(where[0], {})[metric] = f"{value:.0f}" if plain else f"{100 * value:.1f}"
    lines = []
    for task, rows in tasks.items():
        metrics = list(next(iter(rows.values())))
        widths = [max(len(name), 6) for name in metrics]
        lines += ["", f"{task:19}" + "  ".join(f"{name:>{w}}" for name, w in zip(metrics, widths))]
        lines += [f"  {row:17}" + "  ".join(f"{values[name]:>{w}}" for name, w in zip(metrics, widths))
                  for row, values in rows.items()]
    return "\n".join(lines[1:])


# -------------------------------------------------------------------------------------------------------- command line
def load(path: Path):
    """A run folder or its checkpoint.pt -> module of the method, its Args, {m: shape}, the model; raises InputError."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["method"] not in SCRIPTS:
            raise ValueError(f"its method is {state['method']}")
        method = importlib.import_module(state["method"])
        args, shape = method.Args(**state["args"]), state["shape"]
        model = method.Model(shape, args)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state["modules"].items()
                               if name.startswith("model.")})
        return method, args, shape, model
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        raise InputError(f"{path}: not a checkpoint of these scripts ({first_line(error)})")


def main(run: tyro.conf.Positional[str], files: tyro.conf.Positional[tuple[str, ...]] = (), *,
         protocol: tuple[Literal["clean", "paper"], ...] = ("clean", "paper"), known_classes: tuple[int, ...] = (),
         device: str = "auto") -> None:
    """Probe the model of RUN (a run folder or its checkpoint.pt) on FILES (default: the data it was trained on)."""
    method, args, shape, model = load(Path(run))
    device = pick_device(device)
    features = Features(data_files(files or args.probe_data or args.data, args.runs_dir))
    check_request(features, shape, known_classes or args.known_classes)
    tags, _ = evaluate(model.to(device), method.encode, features, list(shape), args.codebook_size, device, protocol,
                       known_classes or args.known_classes, method.paper_settings(args.epochs))
    print(table(tags))


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)
