"""Controls: what the probes report when there is nothing to find. Both must sit at chance (0.1 on the ten digits).

    python -m benchmarks.controls RUN [--seeds 3]

`untrained`: fresh encoders, codewords are single outputs of theirs. `shuffled`: the codes of RUN, but every clip
carries the codes of another one. A third row is not a control: `paired start` is `untrained` with the default start,
whose codewords are means over the modalities at one segment; pairs are information, and the row shows how much of it
is there before the first step. Writes `--out`.
"""
import itertools
import json
from pathlib import Path

import torch
import tyro

import micu
import probes
from data import Batches, Features
from run import git_commit


def main(run: tyro.conf.Positional[str], seeds: int = 3, out: Path = Path("benchmarks/controls.json")) -> None:
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    args, shape = micu.Args(**state["args"]), state["shape"]
    features = Features(args.data, args.runs_dir)

    def shuffled(model, x, modality):
        codes, code_index = micu.encode(model, x, modality)
        order = torch.randperm(len(codes))
        return codes[order], code_index[order]

    rows, plan = {}, probes.Plan(features, shape, "cpu")
    for seed, source in itertools.product(range(1, seeds + 1), ("batch", "paired")):
        torch.manual_seed(seed)
        model = micu.Model(shape, args).eval()
        batch = next(Batches(features, shape, "train", args.batch_size, "cpu", seed).epoch(0))
        with torch.no_grad():
            z = {m: model.semantic[m](x) for m, x in batch.items()}
            model.quantizer.codebook.copy_(model.quantizer.new_codes(z, source, torch.Generator().manual_seed(seed)))
        name = "untrained" if source == "batch" else "paired start"
        rows[f"{name}, seed {seed}"] = plan.evaluate(model, micu.encode, args.codebook_size)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state["networks"].items()
                           if name.startswith("model.")})
    rows["shuffled"] = plan.evaluate(model, shuffled, args.codebook_size)
    out.write_text(json.dumps({"command": "python -m benchmarks.controls RUN", "git": git_commit(), "rows": rows},
                              indent=1) + "\n")
    for name, tags in rows.items():
        print(f"\n# {name}\n{probes.table(tags, probes.SCORES)}")


if __name__ == "__main__":
    tyro.cli(main)
