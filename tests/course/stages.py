"""The tasks of the course in stages, each with its points and what it compares: a student's answers with golden ones.

Golden inputs and outputs are data, `golden.npz` and `golden.json`: calls, what comes out of a right solution, and what
comes out of common mistakes, so that a failure can name the mistake.
"""
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # of numbers; inputs are of the order of 1, in double precision


@dataclass
class Stage:
    """Of a task: the golden calls it makes, the keys of the answer that it looks at, and a hint for any failure."""
    task: str
    name: str
    points: int
    calls: tuple
    keys: str  # a regular expression of keys, see `worker.answer`
    hint: str
    shapes_only: bool = False

    @property
    def id(self) -> str:
        return f"{self.task}-{self.name}"


SHAPE = "the docstring says which shapes come in and which come out"
REFUSED = "the docstring promises ValueError on shapes that do not fit: `require_shape(name, tensor, shape)` raises it"
STAGES = [
    # ---- nearest_code
    Stage("nearest_code", "shape", 1, ("nearest_code/batch",), "out", SHAPE, shapes_only=True),
    Stage("nearest_code", "value", 4, ("nearest_code/batch",), "out",
          "the index of the row at the smallest squared distance |z - e|^2; the rows have different lengths here"),
    Stage("nearest_code", "any_shape", 1, ("nearest_code/one", "nearest_code/flat"), "out",
          "z may have any number of axes before the last one, also none"),
    Stage("nearest_code", "precision", 2, ("nearest_code/bfloat16",), "out",
          "measure distances in single precision at least: bfloat16 cannot tell neighbours apart"),
    Stage("nearest_code", "inputs", 1, ("nearest_code/batch",), "kept/.*", "z or the codebook is changed"),
    Stage("nearest_code", "refused", 1, ("nearest_code/batch", "nearest_code/unfit"), "out", REFUSED, shapes_only=True),
    # ---- straight_through: the quantizer's forward
    Stage("straight_through", "shape", 2, ("straight_through/forward",), "out/.*", SHAPE, shapes_only=True),
    Stage("straight_through", "index", 2, ("straight_through/forward",), "out/1/.*",
          "code_index is nearest_code of each modality, by its name"),
    Stage("straight_through", "value", 2, ("straight_through/forward",), "out/0/.*",
          "forward, quantized is the chosen row of the codebook"),
    Stage("straight_through", "gradient", 3, ("straight_through/forward",), "grad/out/0/.*",
          "backward, the gradient of quantized arrives at z as it is: what is added to z must have none"),
    Stage("straight_through", "codebook", 1, ("straight_through/forward",), "state/.*",
          "forward moves neither the codebook nor any count; update does that"),
    # ---- ema_update
    Stage("ema_update", "shape", 1, ("ema_update/step",), "out/.*", SHAPE, shapes_only=True),
    Stage("ema_update", "count", 2, ("ema_update/step", "ema_update/keep"), "out/0",
          "decay times the old count, and (1 - decay) times how many vectors chose the code now"),
    Stage("ema_update", "sum", 2, ("ema_update/step", "ema_update/keep"), "out/1",
          "decay times the old sum, and (1 - decay) times the sum of the vectors that chose the code"),
    Stage("ema_update", "codebook", 2, ("ema_update/step", "ema_update/keep"), "out/2",
          "new sum by new count, the count Laplace-smoothed by 1e-5 first: (c + eps) / (n + K eps) * n"),
    Stage("ema_update", "detached", 1, ("ema_update/step",), "flow/out/.*",
          "no gradient may flow from the codebook into the encoders"),
    Stage("ema_update", "inputs", 1, ("ema_update/step",), "kept/.*", "return new tensors; the old ones must stay"),
    Stage("ema_update", "refused", 1, ("ema_update/step", "ema_update/unfit"), "out/.*", REFUSED, shapes_only=True),
    # ---- reset
    Stage("reset", "which", 2, ("reset/unshared",), "derived/moved",
          "with `unshared` a code is dead if some modality has not used it for reset_after steps or more"),
    Stage("reset", "unused", 1, ("reset/unused",), "derived/moved",
          "with `unused` a code is dead only if no modality has used it for reset_after steps or more"),
    Stage("reset", "rows", 1, ("reset/unshared",), "derived/(moved|became)",
          "a dead code becomes what reset_source says, here something said at one segment of z"),
    Stage("reset", "sources", 2, ("reset/other_source", "reset/live"), "derived/(moved|became)",
          "reset_source has three values: new_codes knows `paired` and `batch`, copies_of_live gives `live`"),
    Stage("reset", "statistics", 3, ("reset/unshared",),
          "derived/(moved|sum_is_code)|state/(ema_count|steps_since_used|resets|usage)",
          "the statistics of a reset code begin anew: its sum is itself, its count 1, its steps 0; `resets` counts it"),
    Stage("reset", "none_live", 1, ("reset/all_dead",), "derived/moved",
          "with `live` and all codes dead there is nothing to copy: reset none"),
    # ---- info_nce
    Stage("info_nce", "shape", 1, ("info_nce/dot",), "out", SHAPE, shapes_only=True),
    Stage("info_nce", "dot", 3, ("info_nce/dot",), "out",
          "for each query the cross-entropy of its own candidate among all candidates, averaged over the queries"),
    Stage("info_nce", "cosine", 1, ("info_nce/cosine",), "out",
          "with `cosine`, query and candidates get length 1 along the last axis, before the temperature"),
    Stage("info_nce", "batch", 1, ("info_nce/batch",), "out",
          "axes before the last two are separate problems: their candidates do not mix"),
    Stage("info_nce", "gradient", 2, ("info_nce/dot",), "grad/.*", "query and candidates both learn"),
    Stage("info_nce", "large", 1, ("info_nce/large",), "out",
          "exp of a large number is infinite: log_softmax, logsumexp or cross_entropy do not take it"),
    Stage("info_nce", "refused", 1, ("info_nce/dot", "info_nce/unfit"), "out", REFUSED, shapes_only=True),
    # ---- fcmi
    Stage("fcmi", "shape", 1, ("fcmi/dot",), "out/.*", "the pair (fine, coarse), two scalars", shapes_only=True),
    Stage("fcmi", "fine", 2, ("fcmi/dot",), "out/0",
          "Eq. 4: each masked segment of m among the segments of the same clip in n, for all ordered pairs (m, n)"),
    Stage("fcmi", "coarse", 2, ("fcmi/dot",), "out/1",
          "Eq. 5: each masked clip of m, averaged over its segments, among all clips in n, for all ordered pairs"),
    Stage("fcmi", "cosine", 1, ("fcmi/cosine",), "out/.*", "similarity and temperature go on to info_nce"),
    Stage("fcmi", "masks", 1, ("fcmi/masks",), "out/.*", "mask may be a dictionary, one mask for each modality"),
    Stage("fcmi", "gradient", 2, ("fcmi/dot",), "grad/.*", "both losses teach queries and candidates"),
    Stage("fcmi", "refused", 1, ("fcmi/dot", "fcmi/unequal", "fcmi/unfit_mask"), "out/.*", REFUSED, shapes_only=True),
    # ---- cujp
    Stage("cujp", "shape", 1, ("cujp/one",), "out", SHAPE, shapes_only=True),
    Stage("cujp", "one", 2, ("cujp/one",), "out",
          "one modality: cut each vector into O parts side by side, put part permutations[p, o] at place o, classify"),
    Stage("cujp", "mixed", 2, ("cujp/mixed",), "out",
          "part o of vector n comes from modality number modality[n, o] of the dictionary"),
    Stage("cujp", "samples", 1, ("cujp/samples",), "out",
          "permutation has S columns: each vector is shown S times, and the mean is over all N * S"),
    Stage("cujp", "gradient", 2, ("cujp/mixed",), "grad/out/by/quantized/.*", "gradient flows into the parts in use"),
    Stage("cujp", "head", 1, ("cujp/mixed",), r"grad/out/by/self/\w+\.bias",
          "hidden and classify learn, with a ReLU between"),
    Stage("cujp", "refused", 1, ("cujp/mixed", "cujp/unfit"), "out", REFUSED, shapes_only=True),
    # ---- club
    Stage("club", "shape", 1, ("club/clips",), "out", SHAPE, shapes_only=True),
    Stage("club", "value", 4, ("club/clips",), "out",
          "mean over positives of log q minus mean over all N^2 pairs of clips, at the same segment, summed over d"),
    Stage("club", "one_clip", 1, ("club/one",), "out",
          "a single clip is its own only negative: the bound is 0, and not NaN"),
    Stage("club", "gradient", 3, ("club/clips",), "grad/.*", "mu, logvar and y all get gradient"),
    Stage("club", "refused", 1, ("club/clips", "club/unfit"), "out", REFUSED, shapes_only=True),
    # ---- cascade
    Stage("cascade", "shape", 1, ("cascade/usual",), "out/.*", SHAPE, shapes_only=True),
    Stage("cascade", "first", 2, ("cascade/usual",), "out/text", "the first of the order becomes the mean of all"),
    Stage("cascade", "all", 3, ("cascade/usual",), "out/.*",
          "each later one becomes the mean of all as they are by then, those already replaced included"),
    Stage("cascade", "order", 1, ("cascade/other",), "out/.*", "`order` says which comes first"),
    Stage("cascade", "keys", 1, ("cascade/usual", "cascade/other"), "derived/place",
          "keys keep the place they came in: the quantizer stacks the values, and would mix the codebooks up"),
    Stage("cascade", "inputs", 1, ("cascade/usual",), "kept/.*",
          "return a new dictionary; the codebooks given must stay"),
    Stage("cascade", "refused", 1, ("cascade/usual", "cascade/unequal", "cascade/short_order"), "out/.*",
          "the docstring promises ValueError on unequal shapes, and on an order that does not name every codebook once",
          shapes_only=True),
    # ---- open_set
    Stage("open_set", "names", 1, ("open_set/usual",), "out/.*", "a dictionary of four numbers", shapes_only=True),
    Stage("open_set", "os_star", 2, ("open_set/usual",), "out/os_star",
          "share of the known clips that are accepted and classified right; accepted is confidence >= threshold"),
    Stage("open_set", "class_mean", 1, ("open_set/usual",), "out/os_star_class_mean",
          "the same for each known class that is present, then the mean over these classes"),
    Stage("open_set", "unk", 2, ("open_set/usual",), "out/unk",
          "share of the unknown clips (target >= num_known) that are rejected"),
    Stage("open_set", "hos", 2, ("open_set/usual",), "out/hos", "harmonic mean: 2 os* unk / (os* + unk)"),
    Stage("open_set", "nothing", 2, ("open_set/no_unknown", "open_set/no_known"), "out/.*",
          "a share of nothing is 0, not NaN"),
]
TASKS = list(dict.fromkeys(stage.task for stage in STAGES))
SHARED = ["nearest_code", "straight_through", "ema_update", "reset"]
TASKS_OF = {"micu": [*SHARED, "info_nce", "fcmi", "cujp"], "uni_code": [*SHARED, "club"],
            "codaar": [*SHARED, "cascade"], "probes": ["open_set"]}


def kind(path) -> str:
    """Which script a file is a copy of, read from its text, as it may not run; "" if nobody can tell."""
    text = Path(path).read_bytes().decode(errors="replace") if Path(path).is_file() else ""
    method = re.search(r"^METHOD *= *[\"'](micu|uni_code|codaar)[\"']", text, re.M)
    return method[1] if method else "probes" if re.search(r"^SCRIPTS *=", text, re.M) else ""


def stages_of(script: str) -> list:
    """The stages of a script's tasks; all of them if nobody knows which script it is."""
    return [stage for stage in STAGES if stage.task in TASKS_OF.get(script, TASKS)]


DERIVED = {"moved": "for each code whether it was reset", "sum_is_code": "for each code whether its sum is right",
           "became": "for each code (-1 stayed, 1 became what reset_source says, 2 of another source, 0 neither)",
           "place": "for each key its place in the result"}


# -------------------------------------------------------------------------------------------------------- golden data
@cache
def golden():
    """(arrays {name: array}, {"calls": {call: request}, "hints": {task: {mistake: hint}}})"""
    with np.load(HERE / "golden.npz") as arrays:
        return dict(arrays), json.loads((HERE / "golden.json").read_text())


def filled(value):
    """A request from golden.json, names of arrays (`@in/...`) replaced by these as tensors."""
    if isinstance(value, dict):
        return {key: filled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part) for part in value]
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    tensor = torch.from_numpy(golden()[0][value[1:]].copy())
    return tensor.bfloat16() if value.startswith("@in/nearest_code/bfloat16") else tensor


def call_name(call: str, script: str) -> str:
    """CoDAAR's quantizer has calls of its own."""
    return f"{call}@codaar" if f"{call}@codaar" in golden()[1]["calls"] and script == "codaar" else call


def stored(where: str) -> dict:
    """{key: tensor} below a name"""
    return {name[len(where) + 1:]: torch.from_numpy(array) for name, array in golden()[0].items()
            if name.startswith(f"{where}/")}


def derived(request: dict, values: dict) -> dict:
    """What can be said of a reset without knowing what was drawn, for each code: whether it moved, what it became
    (1 what reset_source asks for, 2 of another source, 0 of none, -1 it stayed), whether its sum is itself, or as
    before if it stayed."""
    before, after = request["make"]["state"], {name[6:]: tensor for name, tensor in values.items()
                                               if name.startswith("state/")}
    outputs = torch.stack(list(request["arguments"]["z"].values())).flatten(1, 2)  # (M, N, D)
    said, name = {"paired": outputs.mean(0), "batch": outputs.flatten(0, 1)}, "codebook"
    if "codebooks" in before:  # an index moves in all codebooks: rows side by side
        name = "codebooks"
        said = {"paired": outputs.mean(0).repeat(1, len(outputs)), "batch": outputs.transpose(0, 1).flatten(1)}
    rows = {key: one[key].movedim(-2, 0).flatten(1) for one, key in ((after, name), (after, "ema_sum"))}  # (K, width)
    old = {key: before[key].movedim(-2, 0).flatten(1) for key in rows}
    moved = (rows[name] != old[name]).any(1)
    of = {source: among(rows[name], vectors) for source, vectors in said.items()}
    stayed = old[name][~moved]
    of["live"] = among(rows[name], stayed, 1e-2) & ~among(rows[name], stayed)  # a copy with noise
    became = torch.where(of[request["make"]["settings"]["reset_source"]], 1, 2 * torch.stack(list(of.values())).any(0))
    own = torch.where(moved, (rows["ema_sum"] - rows[name]).abs().amax(1) < 1e-6,
                      (rows["ema_sum"] == old["ema_sum"]).all(1))
    return {"derived/moved": moved, "derived/became": torch.where(moved, became, -1), "derived/sum_is_code": own}


def among(rows, others, near: float = 1e-6):
    """(K, D), (N, D) -> (K,) bool"""
    return ((rows[:, None] - others).abs().amax(-1) < near).any(1)


def values_of(request: dict, values: dict) -> dict:
    """An answer's values, with what is derived from them."""
    if request["call"].endswith(".reset"):
        values = values | derived(request, values)
    if request["call"] == "cascade":
        names = [key[4:] for key in values if key.startswith("out/")]
        places = [names.index(name) if name in names else -1 for name in request["arguments"]["codebooks"]]
        values = values | {"derived/place": torch.tensor(places)}
    return values


# ------------------------------------------------------------------------------------------------------------ checking
def same(value, wanted) -> bool:
    return value.shape == wanted.shape and torch.allclose(value.double(), wanted.double(), equal_nan=True, **TOLERANCE)


def equal(values: dict, wanted: dict) -> bool:
    return all(key in values and same(values[key], wanted[key]) for key in wanted)


def shown(tensor) -> str:
    """A tensor in one short line"""
    numbers = [str(bool(number)) if tensor.dtype == torch.bool else f"{number:.6g}"
               for number in tensor.double().flatten()[:8].tolist()]
    return numbers[0] if tensor.ndim == 0 else f"[{', '.join(numbers)}{', ...' if tensor.numel() > 8 else ''}]"


def mistake(stage: Stage, call: str, values: dict, wanted: dict):
    """The hint of a mistake that gives just these values, or None; NaN alone says nothing of where it began."""
    if not any(values[key].isfinite().any() for key in wanted if key in values):
        return None
    for name, hint in golden()[1]["hints"][stage.task].items():
        wrong = {key: tensor for key, tensor in stored(f"wrong/{call}/{name}").items() if key in wanted}
        if wrong and equal(values, wanted | wrong):
            return hint
    return None


def indexed(name: str, path: list) -> str:
    return name + "".join(f"[{part}]" for part in path)


def called(key: str) -> str:
    """A key of an answer in words: `grad/out/0/by/z/audio` is the gradient of result[0] by z[audio]."""
    what, *path = key.split("/")
    if what == "out":
        return indexed("result", path)
    if what == "flow":
        return f"that gradient flows into {called('/'.join(path))}"
    if what == "grad":
        by = path.index("by")
        return f"the gradient of {called('/'.join(path[:by]))} by {indexed(path[by + 1], path[by + 2:])}"
    if what == "derived":
        return DERIVED[path[0]]
    return f"{'self.' if what == 'state' else ''}{indexed(path[0], path[1:])} afterwards"


def difference(key: str, value, wanted) -> str:
    if value is None:
        return f"{called(key)} is missing"
    if value.shape != wanted.shape:
        return f"{called(key)} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
    if value.is_floating_point() != wanted.is_floating_point():
        return f"{called(key)} is of {value.dtype}, expected {wanted.dtype}"
    return f"{called(key)} is {shown(value)}, expected {shown(wanted)}"


def failure(stage: Stage, submission, script: str):
    """Why a submission fails a stage, in a few lines, or None if it passes."""
    for name in stage.calls:
        call = call_name(name, script)
        request = filled(golden()[1]["calls"][call])
        reply = submission.ask(call, request)
        printed = f"\nprinted: {reply['printed'].strip()}" if reply.get("printed", "").strip() else ""
        if reply.get("kind") == "unwritten":
            if reply["function"] == request["call"].split(".")[-1]:
                return f"{request['call']} is not written yet"
            return f"first {reply['function']}: {request['call']} calls it, and it is not written yet"
        if "unfit" in request:
            if reply.get("kind") == "ValueError":
                continue
            came = reply.get("error") or f"it returned {reply['returned']}"
            return f"hint: {stage.hint}\n{request['call']} was given {request['unfit']}: {came}{printed}"
        if "error" in reply:
            hint = "" if stage.shapes_only or submission.broken else f"\nhint: {stage.hint}"
            return f"{request['call']}: {reply['error']}{hint}{printed}"
        given = request.get("make", {}).get("state", {})
        if [name for name in given if reply["values"][f"state/{name}"].shape != given[name].shape]:
            return f"{request['call']} changes the shape of one of {', '.join(given)}: copy_ into them"
        values = values_of(request, reply["values"])
        wanted = {key: tensor for key, tensor in stored(f"out/{call}").items() if re.fullmatch(stage.keys, key)}
        if stage.shapes_only:
            wrong = [key for key, tensor in wanted.items() if key not in values
                     or values[key].shape != tensor.shape
                     or values[key].is_floating_point() != tensor.is_floating_point()]
        else:
            wrong = [key for key, tensor in wanted.items() if key not in values or not same(values[key], tensor)]
        if wrong:
            hint = None if stage.shapes_only else mistake(stage, call, values, wanted)
            found = [difference(key, values.get(key), wanted[key]) for key in wrong[:3]]
            said = [f"hint: {hint}", f"wanted: {stage.hint}"] if hint else [f"hint: {stage.hint}"]
            return "\n".join([*said, *found, f"{request['call']} returned {reply['returned']}{printed}"])
    return None
