"""Do two modalities choose the same index for the same segment? If not, do they choose one that means the same?

    python -m benchmarks.agreement RUN [RUN ...]

For each pair of modalities, over the test segments in which both hold the clip's event and chose indices that such
training segments chose as well, in percent:
`exact`: the same index; `class`: indices of one class, that is the class of most training segments that chose the
index, in any modality; `N groups`: the same group after the nearest of the used rows were merged (complete linkage,
Euclidean) until N groups were left. In brackets what independent choices with the same frequencies would give: fewer
groups agree more for that reason alone. Of CoDAAR's codebooks also the mean `cosine` of the rows that the first one
chose with the second one's rows of the same index, and their mean `rank`: how many of its rows have a greater one.
Writes `--out`.
"""
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

import probes
from data import Features
from run import git_commit

GROUPS = (100, 50, 20, 10)


def merge(rows, groups: int):
    """Complete linkage: rows (U, D) -> group of each row (U,); those two merge whose farthest members are nearest."""
    group = torch.arange(len(rows))
    distance = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf)
    for _ in range(len(rows) - groups):
        a, b = divmod(distance.argmin().item(), len(rows))
        group[group == b] = a
        distance[a] = distance[:, a] = torch.maximum(distance[a], distance[b])
        distance[b] = distance[:, b] = distance[a, a] = torch.inf
    return group


def agreement(a, b) -> tuple:
    """Share of equal choices in a and b (N,), and what independence would give."""
    size = int(max(a.max(), b.max())) + 1
    frequency = [x.bincount(minlength=size) / len(x) for x in (a, b)]
    return (a == b).double().mean().item(), (frequency[0] * frequency[1]).sum().item()


def alignment(first, second, code_index) -> dict:
    """Rows of two codebooks (K, D) at one index, over what the first one's modality chose: code_index (N,)"""
    cosine = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T  # (K, K)
    right = cosine.diagonal()
    rank = (cosine > right[:, None]).sum(1).double()
    return {"cosine": right[code_index].mean().item(), "rank": rank[code_index].mean().item()}


def analyse(run: Path) -> dict:
    method, args, shape, model, _ = probes.load(run)
    features = Features(args.data, args.runs_dir)
    plan, code, event = probes.Plan(features, shape, "cpu"), {}, {}
    clips = {split: plan.single[split].index for split in ("train", "test")}
    for split, m in itertools.product(("train", "test"), shape):
        code[split, m] = probes.read_codes(model.eval(), method.encode, features, m, clips[split], args.codebook_size,
                                           torch.device("cpu")).index
        label = torch.from_numpy(features.label[clips[split]]).long()[:, None].expand_as(code[split, m])
        event[split, m] = label  # (N, T); a sentence is about its event throughout
        if m in features.files[0].events:
            happens = torch.from_numpy(features.read(f"events/{m}", clips[split])).bool().any(-1)
            event[split, m] = torch.where(happens, label, -1)
    votes = torch.zeros(args.codebook_size, len(features.classes))
    for m in shape:
        heard = event["train", m] >= 0
        votes.index_put_((code["train", m][heard], event["train", m][heard]), torch.ones(()), True)
    meaning, used = votes.argmax(1), votes.sum(1).nonzero()[:, 0]
    maps = {"exact": torch.arange(args.codebook_size), "class": meaning}
    for groups in GROUPS:
        maps[f"{groups} groups"] = torch.full((args.codebook_size,), -1)
        maps[f"{groups} groups"][used] = merge(model.quantizer.codebook[used], min(groups, len(used)))
    table = {}
    for a, b in itertools.combinations(shape, 2):
        both = (event["test", a] >= 0) & (event["test", b] >= 0)
        chosen = [code["test", m][both] for m in (a, b)]
        seen = (votes.sum(1) > 0)[torch.stack(chosen)].all(0)  # a code without meaning agrees with none
        table[f"{a}, {b}"] = {name: agreement(*(to[c[seen]] for c in chosen)) for name, to in maps.items()}
    rows = {}
    if hasattr(model.quantizer, "by_modality"):
        codebooks = model.quantizer.by_modality()
        for a, b in itertools.combinations(shape, 2):
            rows[f"{a}, {b}"] = alignment(codebooks[a], codebooks[b], code["test", a].flatten())
    return {"args": {k: v for k, v in asdict(args).items() if k != "runs_dir"}, "pairs": table, "rows": rows}


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("benchmarks/agreement.json")) -> None:
    if not runs:
        raise SystemExit("give run folders of codaar.py")
    result = {run.name: analyse(run) for run in runs}
    out.write_text(json.dumps({"command": "python -m benchmarks.agreement RUN ...", "git": git_commit(),
                               "runs": result}, indent=1) + "\n")
    for name, found in result.items():
        print(f"\n{name}")
        for pair, row in found["rows"].items():
            print(f"  {pair:14}rows of one index: cosine {row['cosine']:.2f}, rank {row['rank']:.1f}")
        for pair, row in found["pairs"].items():
            print(f"  {pair:14}" + "  ".join(f"{key} {100 * v:.1f} ({100 * c:.1f})" for key, (v, c) in row.items()))


if __name__ == "__main__":
    tyro.cli(main)
