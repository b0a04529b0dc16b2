"""A checkpoint as the authors distribute it, probed on files of features.

    python -m official.checkpoints FILE.pt ave.h5 --method micu
    python -m official.checkpoints FILE.pt ave.h5 --method micu --published  # and as their scripts do
"""
import importlib
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

import probes
from official import protocol
from run import InputError, explain_input_errors, first_line, pick_device

# Where the authors' names go in ours: {theirs: ours} of a modality `<m>`, and of the maps' pooling
OFFICIAL = {
    "<m>_self_att.affine_matrix": "semantic.<m>.proj", "<m>_self_att.encoder.layers": "semantic.<m>.transformer.layers",
    "<m>_semantic_encoder.se_layer": "semantic.<m>.pool.gate",
    "<m>_semantic_encoder.affine_<m>_ave": "semantic.<m>.pool.mean_proj",
    "<m>_semantic_encoder.affine_<m>_self": "semantic.<m>.pool.cell_proj",
    "<m>_semantic_encoder.ave_v_att": "semantic.<m>.pool.score"}
OFFICIAL_ORDER = ("video", "audio", "text")  # of the column blocks of CoDAAR's codebook
GROUPS = ("Encoder_parameters", "Text_ar_lstm_parameters")  # of weights, in a checkpoint


def load_official(path: Path, name: str | None):
    """A checkpoint of the authors (keys `Encoder_parameters`, `Text_ar_lstm_parameters`, `epoch`) -> as `probes.load`.

    `name`: the method, needed where the checkpoint does not tell (Uni-Code and MICU have the same names and shapes).
    The released pooling is a sum over the cells; MICU's code 0 is zero. Prints what is in the file and not used. Raises
    InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, epoch = dict(state["Encoder_parameters"]), int(state["epoch"])
        lstm = dict(state.get("Text_ar_lstm_parameters") or {})
        codebook = theirs.pop("Cross_quantizer.embedding")
        shape = shapes_of(path, theirs, lstm)
        code_dim = theirs["audio_self_att.affine_matrix.weight"].shape[0]
        name = method_of(path, name, codebook, code_dim, len(shape))
        method = importlib.import_module(name)
        args = method.Args(codebook_size=len(codebook), code_dim=code_dim, spatial_pool="sum")
        model = method.Model(shape, args).to(codebook.dtype)
        weights, unused = mapped(model.state_dict(), theirs, lstm, list(shape))
        if not all(value.isfinite().all() for value in (codebook, *weights.values())) or epoch < 0:
            raise ValueError(f"weights that are not finite, or epoch {epoch}")
        model.load_state_dict(weights)
        fill_codebook(model.quantizer, codebook, name, list(shape))
    except InputError:
        raise
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path}: not a checkpoint of the authors that could be mapped ({reason})")
    left = Counter(key.rsplit(".", 1)[0].split(".")[0] for key in unused)
    left.update(key for key in state if key not in (*GROUPS, "epoch"))
    print(f"{path}: {name}, {' '.join(shape)}, {len(codebook)} codes, epoch {epoch}; not used: "
          + (", ".join(f"{key} ({times})" for key, times in left.items()) or "nothing"))
    return method, args, shape, model, epoch + 1


def shapes_of(path: Path, theirs: dict, lstm: dict) -> dict:
    """{m: shape} of the features that these encoders take"""
    shape = {}
    for m in ("audio", "video", "text"):
        key = f"{m}_self_att.affine_matrix.weight"
        if m == "text" and key in theirs and not lstm:
            print(f"{path}: no Text_ar_lstm_parameters, so no text")
        elif m == "text" and key in theirs:
            shape[m] = (10, lstm["weight_ih_l0"].shape[1])
        elif key in theirs:
            shape[m] = (10, 7, 7, theirs[key].shape[1]) if m == "video" else (10, theirs[key].shape[1])
    return shape


def method_of(path: Path, name: str | None, codebook, code_dim: int, modalities: int) -> str:
    """The method whose codebook this is: CoDAAR's rows hold a codeword of every modality. Raises InputError if it could
    be one of two, ValueError if it is not that of `name`."""
    size, width = codebook.shape
    aligned = width == code_dim * modalities
    if width == code_dim * (modalities + 1) and modalities > 1:
        raise ValueError("the codebook has a part for text, which cannot be read without Text_ar_lstm_parameters")
    if not (aligned or width == code_dim) or name and aligned != (name == "codaar"):
        raise ValueError(f"a codebook of {size} x {width} is not {name or 'that of a method here'}")
    if name is None and not aligned:
        raise InputError(f"{path}: Uni-Code and MICU save the same names: --method uni_code or --method micu?")
    return name or "codaar"


def mapped(ours: dict, theirs: dict, lstm: dict, modalities: list):
    """The state dict `ours` with the authors' weights in their places -> (state dict, names that were not used). Raises
    ValueError if a weight has another shape, or if there are more layers than here."""
    places = {"semantic.text.lstm.": ""}  # {our prefix: their prefix}
    for m in modalities:
        for their_prefix, our_prefix in OFFICIAL.items():
            places[our_prefix.replace("<m>", m) + "."] = their_prefix.replace("<m>", m) + "."
    source, weights, used = theirs | lstm, dict(ours), set()
    for name, value in ours.items():
        for our_prefix, their_prefix in places.items():
            if name.startswith(our_prefix):
                key = their_prefix + name.removeprefix(our_prefix)
                if source[key].shape != value.shape:
                    raise ValueError(f"{key} has shape {tuple(source[key].shape)}, expected {tuple(value.shape)}")
                weights[name] = source[key]
                used.add(key)
    unused = [key for key in source if key not in used]
    for key in unused:
        is_layer = "_self_att.encoder.layers." in key and key.split("_")[0] in modalities
        if is_layer or key in lstm:
            raise ValueError(f"{key} has no place in these models")
    return weights, unused


def fill_codebook(quantizer, codebook, name: str, modalities: list) -> None:
    """Put the authors' codebook (K, D), or CoDAAR's (K, M * D), into ours."""
    if name == "codaar":
        order = [m for m in OFFICIAL_ORDER if m in modalities]
        blocks = dict(zip(order, codebook.split(codebook.shape[1] // len(order), 1)))
        quantizer.codebooks.copy_(torch.stack([blocks[m] for m in modalities]))
    else:
        quantizer.codebook.copy_(codebook)
    if name == "micu":
        quantizer.codebook[0] = 0


def main(paths: tyro.conf.Positional[tuple[str, ...]], *, method: Literal[tuple(protocol.PAPER)] | None = None,
         tasks: tuple[Literal[probes.TASKS], ...] = (), known: tuple[str, ...] = (),
         score: Literal[probes.SCORES] = "softmax", published: bool = False, target: tuple[str, ...] = (),
         class_map: tuple[str, ...] = (), out: str | None = None, device: str = "auto") -> None:
    """Probe a published checkpoint on FILE ..., by the clean protocol, and as published if asked to.

    Args:
        paths: CHECKPOINT FILE ..., one after the other, before all flags.
        method: the method of the checkpoint, where it does not tell.
        tasks: what is probed, see docs/tasks.md; default: classification and open_set, as far as there are labels.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of them.
        score: by which unknown clips are told from known ones in what is printed.
        published: the released protocol as well, of the tasks that have one.
        target: files to test on, of clips, modalities and classes of their own; default: the test split of FILE ...
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        out: a JSON file for all figures, those of the other scores as well.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    if len(paths) < 2:
        raise InputError("give a checkpoint of the authors and the feature files to probe it on")
    loaded, source, target = probes.open_run(paths, target, out, partial(load_official, name=method))
    method, args, shape, model, epochs = loaded
    device = pick_device(device)
    plan = probes.Plan(source, shape, device, tasks, known, score, target, class_map)
    released = [task for task in tasks if task in protocol.TASKS]
    published = published and (released or not tasks)
    if published:
        released_plan = probes.Plan(source, shape, device, released, known, score, target, class_map, every_clip=True)
    model = model.float().to(device)  # the authors' may be float64
    tags = plan.evaluate(model, method.encode, args.codebook_size)
    if published:
        settings = protocol.paper_settings(method.METHOD, epochs)
        tags |= protocol.evaluate(released_plan, model, method.encode, args.codebook_size, settings)
    probes.report(tags, out)


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)
