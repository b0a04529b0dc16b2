"""A checkpoint as the authors distribute it, probed on files of features.

    python -m official.checkpoints FILE.pt --method micu ave.h5
"""
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Literal, Optional

import torch
import tyro

import probes
from data import Features, data_files
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


def load_official(path: Path, name: Optional[str]):
    """A checkpoint of the authors (keys `Encoder_parameters`, `Text_ar_lstm_parameters`, `epoch`) -> as `load`.

    `name`: the method, needed where the checkpoint does not tell (Uni-Code and MICU have the same names and shapes).
    The released pooling is a sum over the cells; MICU's code 0 is zero. Prints what is in the file and not used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, epoch = dict(state["Encoder_parameters"]), int(state["epoch"])
        lstm = dict(state.get("Text_ar_lstm_parameters") or {})
        codebook = theirs.pop("Cross_quantizer.embedding")
        size, width = codebook.shape
        present = [m for m in ("audio", "video", "text") if f"{m}_self_att.affine_matrix.weight" in theirs]
        if "text" in present and not lstm:
            print(f"{path}: no Text_ar_lstm_parameters, so no text")
            present.remove("text")
        code_dim = theirs["audio_self_att.affine_matrix.weight"].shape[0]
        aligned = width == code_dim * len(present)  # a codebook per modality
        if not (aligned or width == code_dim) or name and aligned != (name == "codaar"):
            raise ValueError(f"a codebook of {size} x {width} is not {name or 'that of a method here'}")
        if name is None and not aligned:
            raise InputError(f"{path}: Uni-Code and MICU save the same names: --method uni_code or --method micu?")
        widths = {m: lstm["weight_ih_l0"].shape[1] if m == "text" else theirs[f"{m}_self_att.affine_matrix.weight"]
                  .shape[1] for m in present}
        shape = {m: (10, 7, 7, d) if m == "video" else (10, d) for m, d in widths.items()}
        method = importlib.import_module(name or "codaar")
        args = method.Args(codebook_size=size, code_dim=code_dim, spatial_pool="sum", recon_width=1)
        model = method.Model(shape, args).to(codebook.dtype)
        places = {ours.replace("<m>", m): (theirs, name.replace("<m>", m)) for m in present
                  for name, ours in OFFICIAL.items()} | {"semantic.text.lstm": (lstm, "")}
        found, used = model.state_dict(), {"Encoder_parameters": {"Cross_quantizer.embedding"}, "lstm": set()}
        for ours in found:
            for prefix, (source, their_prefix) in places.items():
                if ours.startswith(prefix + "."):
                    key = their_prefix + ours.removeprefix(prefix) if their_prefix else ours.removeprefix(prefix + ".")
                    if source[key].shape != found[ours].shape:
                        raise ValueError(f"{key} has shape {tuple(source[key].shape)}, expected "
                                         f"{tuple(found[ours].shape)}")
                    found[ours] = source[key]
                    used["lstm" if source is lstm else "Encoder_parameters"].add(key)
        deeper = [key for key in theirs if re.search(r"_self_att\.encoder\.layers\.", key)
                  and key.split("_")[0] in present and key not in used["Encoder_parameters"]]
        deeper += [key for key in lstm if key not in used["lstm"]]
        if deeper:
            raise ValueError(f"{deeper[0]} has no place in these models")
        if not all(value.isfinite().all() for value in (codebook, *found.values())) or epoch < 0:
            raise ValueError(f"weights that are not finite, or epoch {epoch}")
        model.load_state_dict(found)
        if aligned:
            blocks = dict(zip((m for m in OFFICIAL_ORDER if m in present), codebook.split(code_dim, 1)))
            model.quantizer.codebooks.copy_(torch.stack([blocks[m] for m in shape]))
        else:
            model.quantizer.codebook.copy_(codebook)
            if name == "micu":
                model.quantizer.codebook[0] = 0
    except InputError:
        raise
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path}: not a checkpoint of the authors that could be mapped ({reason})")
    unused = [key for key in theirs if key not in used["Encoder_parameters"]]
    unused += [f"Text_ar_lstm_parameters.{key}" for key in lstm if key not in used["lstm"]]
    unused = Counter(key.rsplit(".", 1)[0].split(".")[0] for key in unused) | Counter(
        {key: 1 for key in state if key not in ("Encoder_parameters", "Text_ar_lstm_parameters", "epoch")})
    print(f"{path}: {method.METHOD}, {' '.join(shape)}, {size} codes, epoch {epoch}; not used: "
          + (", ".join(f"{key} ({times})" for key, times in unused.items()) or "nothing"))
    return method, args, shape, model, epoch + 1


def main(paths: tyro.conf.Positional[tuple[str, ...]], *, method: Optional[Literal[probes.SCRIPTS]] = None,
         tasks: tuple[Literal[probes.TASKS], ...] = (), known: tuple[str, ...] = (),
         score: Literal[probes.SCORES] = "softmax", published: bool = False, target: tuple[str, ...] = (),
         class_map: tuple[str, ...] = (), out: Optional[str] = None, device: str = "auto") -> None:
    """Probe a published checkpoint on FILE ..., by the clean protocol, and as published if asked to.

    Args:
        paths: CHECKPOINT FILE ...
        method: the method of the checkpoint, where it does not tell.
        tasks: what is probed, see docs/tasks.md; default: classification and open_set if there are labels.
        known: open-set tasks: a number of known first classes, or class numbers such as 0,2,4; default: half of them.
        score: by which unknown clips are told from known ones in what is printed.
        published: the released protocol as well, of the tasks that have one.
        target: files to test on, of clips, modalities and classes of their own; default: the test split of FILE ...
        class_map: names of the target's classes that differ, each as "target's name=source's name".
        out: a JSON file for all figures, those of the other scores as well.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""
    if len(paths) < 2:
        raise InputError("give a checkpoint of the authors and the feature files to probe it on")
    if out and not Path(out).resolve().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist")
    device = pick_device(device)
    method, args, shape, model, epochs = load_official(Path(paths[0]), method)
    features = Features(data_files(paths[1:], args.runs_dir))
    target = Features(data_files(target, args.runs_dir)) if target else None
    tasks = tasks or probes.default_tasks(features)
    released = [task for task in tasks if task in protocol.TASKS] if published else []
    probes.check_request(features, shape, tasks, known, target, class_map)
    probes.check_request(features, shape, released, known, target, class_map, every_clip=True)
    model = model.float().to(device)  # the authors' may be float64
    common = model, method.encode, features, list(shape), args.codebook_size, device
    tags, _ = probes.evaluate(*common, tasks, known, score, target, class_map)
    if released:
        settings = protocol.paper_settings(method.METHOD, epochs)
        tags |= protocol.evaluate(*common, released, known, settings, target, class_map)
    if out:
        Path(out).write_text(json.dumps(tags, indent=1) + "\n")
    print(probes.table(tags))


if __name__ == "__main__":
    sys.excepthook = explain_input_errors
    tyro.cli(main)
