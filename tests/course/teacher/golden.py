"""Makes the golden data anew: calls with random inputs, what the scripts answer, and what wrong solutions answer.

    python -m tests.course.teacher.golden --seed 7     # other numbers than those that are checked in

Not needed to grade, and not for students: it reads the right scripts and `wrong.json`.
"""
import argparse
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from .. import stages, worker
from ..blank import find

ROOT = Path(__file__).resolve().parents[3]
WRONG = json.loads((Path(__file__).parent / "wrong.json").read_text())
SCRIPTS = ("micu", "uni_code", "codaar", "probes")
TWO, THREE = ("audio", "video"), ("audio", "video", "text")


# --------------------------------------------------------------------------------------------------------------- calls
class Draw:
    """Random inputs in double precision, all from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def whole(self, below: int, *shape):
        return torch.randint(below, shape, generator=self.generator)

    def each(self, names, *shape) -> dict:
        return {name: self.normal(*shape) for name in names}


def request(call: str, arguments: dict, gradients=(), **more) -> dict:
    return {"call": call, "arguments": arguments, "gradients": list(gradients), **more}


def code_calls(draw: Draw) -> dict:
    codebook = draw.normal(6, 4) * torch.linspace(0.3, 2, 6, dtype=torch.float64)[:, None]
    near = draw.normal(8, 16)
    near[4:] = near[:4] * 1.002  # as near as bfloat16 cannot tell, a sum of products at least
    calls = {name: request("nearest_code", {"z": draw.normal(*shape, 4), "codebook": codebook}, ["z", "codebook"])
             for name, shape in (("batch", (3, 5)), ("one", ()), ("flat", (7,)))}
    calls["bfloat16"] = request("nearest_code", {"z": (near * 1.001).bfloat16(), "codebook": near.bfloat16()})
    index = torch.tensor([3, 1, 3, 2, 4, 3, 1])
    step = {"ema_count": torch.tensor([0.0, 1e-4, 1.0, 3.0, 0.5, 20.0]).double(), "ema_sum": draw.normal(6, 4),
            "code_index": index, "vectors": draw.normal(7, 4), "decay": 0.9}
    old = step | {"decay": 1.0, "ema_count": 1e-3 * step["ema_count"]}  # so few that smoothing shows
    ema = {"step": request("ema_update", step, ["vectors"]), "keep": request("ema_update", old)}
    return {f"nearest_code/{name}": call for name, call in calls.items()} | {
        f"ema_update/{name}": call for name, call in ema.items()}


def quantizer_calls(draw: Draw) -> dict:
    calls, size = {}, 8
    steps = torch.tensor([[3, 0, 2, 9, 0, 3, 5, 0], [0, 3, 2, 5, 0, 3, 2, 0]])
    for owner, of, source, other in (("Quantizer", "", "paired", "batch"),
                                     ("AlignedQuantizer", "@codaar", "batch", "paired")):
        cases = {"unshared": {}, "unused": {"reset_rule": "unused"}, "other_source": {"reset_source": other},
                 "live": {"reset_source": "live"}, "all_dead": {"reset_source": "live"}}
        many = (2,) if of else ()
        books = draw.normal(*many, size, 4)
        state = {"codebooks" if of else "codebook": books, "ema_sum": draw.normal(*many, size, 4),
                 "ema_count": draw.normal(*many, size).abs() + 2, "steps_since_used": steps}
        settings = {"codebook_size": size, "code_dim": 4, "reset_after": 3, "reset_source": source}
        make = {"arguments": [list(TWO)], "settings": settings, "state": state}
        z = draw.each(TWO, 3, 4, 4)
        calls[f"straight_through/forward{of}"] = request(f"{owner}.forward", {"z": z}, ["z"], make=make)
        for name, case in cases.items():
            age = torch.full_like(steps, 4) if name == "all_dead" else steps
            more = {"reset_rule": "unshared"} | case
            made = {**make, "settings": settings | more, "state": state | {"steps_since_used": age}}
            calls[f"reset/{name}{of}"] = request(f"{owner}.reset", {"z": z}, make=made, seed=0)
    return calls


def micu_calls(draw: Draw) -> dict:
    calls, mask = {}, draw.normal(3, 4, 5).abs()  # not 0 and 1: a mask applied twice, or to the candidates, shows
    for name, shape, similarity, tau in (("dot", (5, 4), "dot", 0.7), ("cosine", (5, 4), "cosine", 0.2),
                                         ("batch", (2, 3, 4, 5), "dot", 0.7)):
        inputs = {"query": draw.normal(*shape), "candidates": draw.normal(*shape)}
        more = {"temperature": tau, "similarity": similarity}
        calls[f"info_nce/{name}"] = request("info_nce", inputs | more, inputs)
    large = {name: 1e3 * value for name, value in draw.each(("query", "candidates"), 5, 4).items()}
    large["candidates"][0] = 10 * large["query"][0]  # one query at least is nearest to its own, the others seldom
    calls["info_nce/large"] = request("info_nce", large | {"temperature": 1.0, "similarity": "dot"}, large)
    masks = {name: draw.normal(3, 1, 5).abs() for name in THREE}
    for name, shown, similarity, tau in (("dot", mask, "dot", 0.7), ("cosine", mask, "cosine", 0.2),
                                         ("masks", masks, "dot", 1.0)):
        inputs = {"z": draw.each(THREE, 3, 4, 5), "mask": shown, "temperature": tau, "similarity": similarity}
        calls[f"fcmi/{name}"] = request("fcmi_loss", inputs, ["z"])
    table = torch.tensor([[1, 2, 3, 0], [2, 0, 3, 1], [3, 0, 1, 2]])  # of four parts; none is its own inverse
    head = {"hidden.weight": draw.normal(512, 8) / 2, "hidden.bias": draw.normal(512) / 2,
            "classify.weight": draw.normal(3, 512) / 10, "classify.bias": draw.normal(3) / 10, "permutations": table}
    for name, many, samples in (("one", 1, 1), ("mixed", 3, 1), ("samples", 2, 3)):
        inputs = {"quantized": draw.each(THREE[:many], 2, 3, 8), "modality": draw.whole(many, 6, 4),
                  "permutation": draw.whole(3, 6, samples)}
        calls[f"cujp/{name}"] = request("CUJP.forward", inputs, ["quantized"],
                                        make={"arguments": [8, 4, 3, 0], "state": head})
    return calls


def other_calls(draw: Draw) -> dict:
    calls = {}
    for name, clips in (("clips", 4), ("one", 1)):
        inputs = draw.each(("mu", "logvar", "y"), clips, 3, 2)
        calls[f"club/{name}"] = request("club_bound", inputs, inputs)
    books = draw.each(THREE, 5, 4)
    for name, order in (("usual", ["text", "audio", "video"]), ("other", ["video", "text", "audio"])):
        calls[f"cascade/{name}"] = request("cascade", {"codebooks": books, "order": order})
    confidence = torch.tensor([0.9, 0.5, 0.4, 0.8, 0.7, 0.95, 0.3, 0.6, 0.5, 0.2, 0.1, 0.05]).double()
    prediction = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1])
    target = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 3, 4, 4])  # 2 is known, and absent
    for name, chosen in (("usual", target), ("no_unknown", target % 3), ("no_known", target + 3)):
        inputs = {"confidence": confidence, "prediction": prediction, "target": chosen, "num_known": 3,
                  "threshold": 0.5}
        calls[f"open_set/{name}"] = request("open_set_metrics", inputs)
    return calls


def unfit_calls(calls: dict) -> dict:
    """Calls that a docstring promises to refuse, made from those that fit; some would go through without a check."""
    def unfit(call: str, words: str, **changed) -> dict:
        return calls[call] | {"arguments": calls[call]["arguments"] | changed, "unfit": words}

    given = {call: calls[call]["arguments"] for call in calls}
    z, books = given["fcmi/dot"]["z"], given["cascade/usual"]["codebooks"]
    return {
        "nearest_code/unfit": unfit("nearest_code/batch", "z of width 3 for codes of width 4",
                                    z=given["nearest_code/batch"]["z"][..., :3]),
        "ema_update/unfit": unfit("ema_update/step", "a code_index of 6 for 7 vectors",
                                  code_index=given["ema_update/step"]["code_index"][:6]),
        "info_nce/unfit": unfit("info_nce/dot", "4 candidates for 5 queries",
                                candidates=given["info_nce/dot"]["candidates"][:4]),
        "fcmi/unequal": unfit("fcmi/dot", "a modality of width 4 beside others of width 5",
                              z=z | {"video": z["video"][..., :4]}),
        "fcmi/unfit_mask": unfit("fcmi/dot", "a mask of 2 segments, clips of 4", mask=given["fcmi/dot"]["mask"][:, :2]),
        "cujp/unfit": unfit("cujp/mixed", "a modality for each vector, not for each of its 4 parts",
                            modality=given["cujp/mixed"]["modality"][:, :1]),
        "club/unfit": unfit("club/clips", "y of width 1 with mu of width 2", y=given["club/clips"]["y"][..., :1]),
        "cascade/unequal": unfit("cascade/usual", "a codebook of one code beside others of 5",
                                 codebooks=books | {"video": books["video"][:1]}),
        "cascade/short_order": unfit("cascade/usual", "an order of two for three codebooks", order=["text", "audio"]),
    }


# ------------------------------------------------------------------------------------------------------------- answers
def scripts_with(call: dict) -> list:
    """Scripts that answer a call: those that hold its function or class."""
    texts = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
    owner = call["call"].split(".")[0]
    return [script for script, text in texts.items() if f"class {owner}(" in text or f"def {owner}(" in text]


def mistaken(wrong: dict) -> str:
    """The text of the script with one mistake. Raises ValueError if the replaced text is not there once."""
    text = (ROOT / f"{wrong['script']}.py").read_text()
    node, lines = find(text, wrong["function"]), text.splitlines(keepends=True)
    body = "".join(lines[node.lineno - 1:node.end_lineno])
    for old, new in wrong["replace"]:
        if body.count(old) != 1:
            raise ValueError(f"{wrong['task']}, {wrong['name']}: not once in {wrong['function']}: {old}")
        body = body.replace(old, new)
    return "".join([*lines[:node.lineno - 1], body, *lines[node.end_lineno:]])


def answers_of(text: str, calls: dict) -> dict:
    """{call: {key: tensor}} of a script's text; calls that fail are left out."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.py"
        path.write_text(text)
        module = worker.load(str(path))
        for name, call in calls.items():
            try:
                found[name] = stages.values_of(call, worker.answer(module, call)["values"])
            except Exception:  # noqa: BLE001: a wrong solution may do anything
                continue
    return found


def packed(value, where: str, arrays: dict, places: dict):
    """A request as JSON, its tensors put into `arrays` and named instead; `places` {id: name} of those already there"""
    if isinstance(value, dict):
        return {key: packed(part, f"{where}/{key}", arrays, places) for key, part in value.items()}
    if isinstance(value, torch.Tensor):
        arrays.setdefault(places.setdefault(id(value), where), array(value))
        return f"@{places[id(value)]}"
    return value


def array(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def looked_at(call: str, key: str) -> bool:
    """Whether any stage compares this part of the answer."""
    name = call.removesuffix("@codaar")
    return any(name in stage.calls and re.fullmatch(stage.keys, key) for stage in stages.STAGES)


def make(seed: int):
    """(arrays, {"calls": ..., "hints": ...}), as `stages.golden` gives them"""
    draw, arrays, places = Draw(seed), {}, {}
    calls = code_calls(draw) | quantizer_calls(draw) | micu_calls(draw) | other_calls(draw)
    calls |= unfit_calls(calls)
    requests = {name: packed(call, f"in/{name}", arrays, places) for name, call in calls.items()}
    right = {}
    for script in SCRIPTS:
        mine = {name: call for name, call in calls.items() if script == scripts_with(call)[0]}
        right |= answers_of((ROOT / f"{script}.py").read_text(), mine)
    hints = {task: {} for task in stages.TASKS}
    for name, values in right.items():
        arrays |= {f"out/{name}/{key}": array(value) for key, value in values.items() if looked_at(name, key)}
    for wrong in WRONG:
        hints[wrong["task"]].setdefault(wrong["name"], wrong["hint"])
        mine = {name: call for name, call in calls.items()
                if name.startswith(f"{wrong['task']}/") and wrong["script"] in scripts_with(call)}
        for name, values in answers_of(mistaken(wrong), mine).items():
            for key in sorted(values.keys() & right.get(name, {}).keys()):  # nothing right comes of what does not fit
                differs = not stages.same(values[key], right[name][key])
                if differs and looked_at(name, key):
                    value = values[key].float() if values[key].is_floating_point() else values[key]
                    arrays[f"wrong/{name}/{wrong['name']}/{key}"] = value.numpy()
    return arrays, {"calls": requests, "hints": hints}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/course/golden.npz and golden.json anew.")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    arrays, data = make(parser.parse_args().seed)
    np.savez_compressed(stages.HERE / "golden.npz", **arrays)
    (stages.HERE / "golden.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
