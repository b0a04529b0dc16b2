"""Controls: what the probes report when there is nothing to find. Both must sit at chance (0.1 on the ten digits).

    python benchmarks/controls.py RUN [--seeds 3]

`untrained`: fresh encoders, codewords are single outputs of theirs. `shuffled`: the codes of RUN, but every clip
carries the codes of another one. A third row is not a control: `paired start` is `untrained` with the default start,
whose codewords are means over the modalities at one segment; pairs are information, and the row shows how much of it
is there before the first step. Writes benchmarks/controls.json.
"""
import itertools
import json
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import micu  # noqa: E402
import probes  # noqa: E402
from data import Batches, Features, data_files, git_commit  # noqa: E402


def main(run: tyro.conf.Positional[str], seeds: int = 3) -> None:
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    args, shape = micu.Args(**state["args"]), state["shape"]
    features = Features(data_files(args.data, args.runs_dir))

    def shuffled(model, x, modality):
        codes, code_index = micu.encode(model, x, modality)
        order = torch.randperm(len(codes))
        return codes[order], code_index[order]

    rows, tasks = {}, ("classification", "open_set")
    for seed, source in itertools.product(range(1, seeds + 1), ("batch", "paired")):
        torch.manual_seed(seed)
        model = micu.Model(shape, args).eval()
        batch = next(Batches(features, list(shape), "train", args.batch_size, "cpu", seed).epoch(0))
        with torch.no_grad():
            z = {m: model.semantic[m](x) for m, x in batch.items()}
            rows_drawn = model.quantizer.candidates(z, source, torch.Generator().manual_seed(seed))
            model.quantizer.codebook.copy_(rows_drawn)
        name = "untrained" if source == "batch" else "paired start"
        rows[f"{name}, seed {seed}"] = probes.evaluate(model, micu.encode, features, list(shape), args.codebook_size,
                                                       torch.device("cpu"), tasks, ("clean",), (), "softmax", {})[0]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state["modules"].items()
                           if name.startswith("model.")})
    rows["shuffled"] = probes.evaluate(model, shuffled, features, list(shape), args.codebook_size, torch.device("cpu"),
                                       tasks, ("clean",), (), "softmax", {})[0]
    out = Path(__file__).with_name("controls.json")
    out.write_text(json.dumps({"command": "python benchmarks/controls.py RUN", "git": git_commit(), "rows": rows},
                              indent=1) + "\n")
    for name, tags in rows.items():
        print(f"\n# {name}\n{probes.table(tags)}")


if __name__ == "__main__":
    tyro.cli(main)
