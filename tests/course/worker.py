"""The process that runs a student's file: it loads the file, calls what it is asked to, and sends back what came out.

It knows nothing of right or wrong. Messages are `torch.save`d dictionaries with their length before them, over standard
input and output; what the student's file prints goes to standard error instead.
"""
import importlib.util
import io
import os
import struct
import sys
import traceback
from importlib.machinery import SourceFileLoader

import torch

MEMORY = 4 * 2**30  # bytes that the process may hold
FILE = 64 * 2**20  # bytes that it may write into one file, what it prints included
ANSWER = 64 * 2**20  # bytes of one answer


# ------------------------------------------------------------------------------------------------------------ messages
def send(stream, message: dict) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    if buffer.tell() > ANSWER:
        return send(stream, {"error": f"what came back is larger than {ANSWER >> 20} MiB"})
    stream.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    stream.flush()


def receive(stream):
    """The next message, None at the end. Only tensors, numbers, texts and collections of them are unpacked."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return torch.load(io.BytesIO(stream.read(struct.unpack("<q", head)[0])), weights_only=True)


# --------------------------------------------------------------------------------------------------------------- calls
def load(path: str):
    """The file at `path` as a module; its main program does not run."""
    loader = SourceFileLoader("submission", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("submission", loader))
    sys.modules["submission"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def flat(value, name: str) -> dict:
    """{"name/key/0": tensor} of nested dictionaries, tuples and lists of tensors and numbers; else nothing"""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, (bool, int, float)):
        return {name: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    found = {}
    if isinstance(value, dict):
        for key, part in value.items():
            found |= flat(part, f"{name}/{key}")
    return found


def describe(value) -> str:
    """What kind of thing came back, in words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype)[6:]}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe(part)}" for key, part in list(value.items())[:6]) + "}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(map(describe, value[:6]))})"
    return "None" if value is None else f"a {type(value).__name__}"


def copied(value, leaves: dict, name: str, with_gradient: bool):
    """A copy of an argument for the student to do with as they like; `leaves` gets the tensors to differentiate by."""
    if isinstance(value, dict):
        return {key: copied(part, leaves, f"{name}/{key}", with_gradient) for key, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if not (with_gradient and value.is_floating_point()):
        return value.clone()
    leaves[name] = value.clone().requires_grad_()
    return leaves[name] * 1  # no leaf: what changes it in place is found by its value, not refused by PyTorch


def build(module, owner: str, make: dict):
    """An object of the student's class in double precision, with given tensors inside."""
    arguments = list(make["arguments"])
    if "settings" in make:
        arguments.append(module.Args(**make["settings"]))
    made = getattr(module, owner)(*arguments).double().eval()
    made.load_state_dict(made.state_dict() | make["state"])
    return made


def gradients(outputs: dict, leaves: dict) -> dict:
    """{"grad/output/by/leaf": tensor}, of the sum of an output's entries, each with a weight of its own."""
    found = {}
    for key, output in outputs.items():
        for name, leaf in leaves.items():
            found[f"grad/{key}/by/{name}"] = torch.zeros_like(leaf)
        if output.requires_grad:
            weight = torch.arange(1, output.numel() + 1, dtype=output.dtype).cos().view(output.shape)
            parts = torch.autograd.grad((weight * output).sum(), list(leaves.values()), retain_graph=True,
                                        allow_unused=True)
            for name, part in zip(leaves, parts):
                if part is not None:
                    found[f"grad/{key}/by/{name}"] = part
    return found


def answer(module, request: dict) -> dict:
    """Call what the request names -> {"values": {key: tensor}, "returned": in words}. Keys begin with `out` (what came
    back), `flow` (whether gradient can pass), `grad`, `kept` (the arguments afterwards), `state` (the object)."""
    owner, _, function = request["call"].rpartition(".")
    leaves, holder = {}, module
    if owner:
        holder = build(module, owner, request["make"])
        if request["gradients"]:
            leaves |= {f"self/{name}": parameter for name, parameter in holder.named_parameters()}
    given = {name: copied(value, leaves, name, name in request["gradients"])
             for name, value in request["arguments"].items()}
    more = [torch.Generator().manual_seed(request["seed"])] if "seed" in request else []
    returned = getattr(holder, function)(*given.values(), *more)
    outputs = flat(returned, "out")
    values = outputs | gradients(outputs, leaves)
    values |= {f"flow/{key}": torch.tensor(output.requires_grad) for key, output in outputs.items()}
    values |= flat(given, "kept")
    if owner:
        values |= {f"state/{name}": tensor for name, tensor in holder.state_dict().items()}
    values = {key: tensor.detach().to("cpu").clone() for key, tensor in values.items()}
    return {"values": values, "returned": describe(returned)}


# ------------------------------------------------------------------------------------------------------------- process
def explain(error: BaseException, path: str) -> dict:
    """What went wrong and where in the student's file."""
    kind, message = type(error).__name__, " ".join(str(error).split())[:300]
    if isinstance(error, SyntaxError):
        return {"error": f"{kind} in line {error.lineno}: {error.msg}", "kind": kind}
    if isinstance(error, MemoryError) or "can't allocate memory" in message:
        return {"error": f"it wants more than {MEMORY >> 30} GiB of memory", "kind": kind}
    frames = traceback.extract_tb(error.__traceback__)
    here = [frame for frame in frames if frame.filename == path]
    if isinstance(error, NotImplementedError) and frames[-1].filename == path:  # PyTorch raises it as well
        return {"error": f"{here[-1].name} is not written yet", "kind": "unwritten", "function": here[-1].name}
    where = f" in line {here[-1].lineno} ({here[-1].name}): {here[-1].line}" if here else ""
    if isinstance(error, SystemExit):
        return {"error": f"it ends the program (SystemExit {error.code}){where}", "kind": kind}
    return {"error": f"{kind}: {message}{where}", "kind": "ValueError" if isinstance(error, ValueError) else kind}


def limit_resources() -> None:
    """Memory and file sizes, where the system can; nowhere on Windows."""
    try:
        import resource
    except ImportError:
        return
    for what, most in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, FILE)):
        resource.setrlimit(what, (most, most))


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    import probes  # noqa: F401: takes seconds, which are not the student's
    limit_resources()
    send(answers, {})
    path, module = "", None
    while (request := receive(requests)) is not None:
        try:
            if "load" in request:
                path, module = request["load"], None
                module, reply = load(path), {}
            else:
                reply = answer(module, request)
        except BaseException as error:
            reply = explain(error, path)
        send(answers, reply)


if __name__ == "__main__":
    main()
