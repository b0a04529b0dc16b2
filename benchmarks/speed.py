"""Milliseconds of a training step by part, clips a second and peak memory, on whatever device there is.

    python benchmarks/speed.py                                        # digits shapes
    python benchmarks/speed.py --shapes vggsound --precision bf16     # 10x7x7x512, 10x128, 10x768

Features are random numbers already on the device: timing needs shapes, not meaning. Device events on CUDA, a wall clock
on CPU; median and quartiles over --steps steps after a warm-up. Appends to benchmarks/speed.json.
"""
import json
import platform
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import micu  # noqa: E402
from data import git_commit, pick_device  # noqa: E402

SHAPES = {"digits": {"audio": (10, 130), "video": (10, 7, 7, 64), "text": (10, 384)},
          "vggsound": {"audio": (10, 128), "video": (10, 7, 7, 512), "text": (10, 768)}}


class Stopwatch:
    """Marks between the parts of a step; CUDA events are read after the step, so timing adds no synchronisation."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def mark(self, name: str):
        event = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            event.record()
        self.marks.append((name, event))

    def start(self):
        self.marks = []
        self.mark("start")

    def stop(self) -> dict:
        if self.cuda:
            torch.cuda.synchronize()
        spans = zip(self.marks, self.marks[1:])
        return {name: a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for (_, a), (name, b) in spans}


def main(shapes: Literal["digits", "vggsound"] = "digits", batch_size: int = 80, device: str = "auto",
         precision: Literal["fp32", "bf16"] = "fp32", compile: bool = False, steps: int = 20, warmup: int = 5,
         cujp_samples: int = -1) -> None:
    device, shape, small = pick_device(device), SHAPES[shapes], shapes == "digits"
    args = micu.Args(batch_size=batch_size, reset_after=10 if small else 300, recon_width=1 if small else 2, epochs=1,
                     cujp_samples=cujp_samples if cujp_samples >= 0 else 8 if small else 0)
    torch.manual_seed(0)
    model = micu.Model(shape, args).to(device)
    jigsaw = micu.CUJP(args.code_dim, args.cujp_splits, 256, len(shape), 0, args.cujp_samples).to(device)
    if compile:
        for module in (*model.semantic.values(), *model.specific.values(), *model.decoder.values()):
            module.compile()
    modules = nn.ModuleDict({"model": model, "jigsaw": jigsaw})
    optimizer = torch.optim.Adam(modules.parameters(), lr=4e-4, fused=True)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    pool = {m: torch.rand(4 * batch_size, *s, dtype=torch.half).to(device) for m, s in shape.items()}
    stream, watch, rows = torch.Generator(device).manual_seed(0), Stopwatch(device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    for step in range(warmup + steps):
        watch.start()
        index = torch.randint(4 * batch_size, (batch_size,), device=device)
        batch = {m: x[index].float() for m, x in pool.items()}
        watch.mark("input")
        with autocast():
            z = {m: model.semantic[m](x) for m, x in batch.items()}
        z = {m: v.float() for m, v in z.items()}
        watch.mark("encoders")
        if step == 0:
            model.quantizer.start(z, stream)
        quantized, code_index = model.quantizer(z)
        watch.mark("quantizer")
        with autocast():
            decoded = {m: model.decoder[m](quantized[m], model.specific[m](x)) for m, x in batch.items()}
        losses = {"recon": sum(F.mse_loss(decoded[m].float(), x) for m, x in batch.items())}
        watch.mark("reconstruction")
        losses["commitment"] = micu.commitment_loss(z, code_index, model.quantizer.codebook)
        watch.mark("commitment")
        losses["fine"], losses["coarse"] = micu.fcmi_loss(z, micu.draw_masks(z, args, stream), 0.1, "cosine")
        watch.mark("fcmi")
        with autocast():
            losses["cujp"] = jigsaw(quantized, stream)
        watch.mark("cujp")
        optimizer.zero_grad()
        into = torch.autograd.grad(losses.pop("cujp"), (*quantized.values(), *jigsaw.parameters()))
        watch.mark("cujp backward")
        torch.autograd.backward((sum(losses.values()), *quantized.values()), (None, *into[:len(quantized)]))
        watch.mark("other backward")
        nn.utils.clip_grad_norm_(modules.parameters(), 0.5)
        optimizer.step()
        watch.mark("optimizer")
        with torch.no_grad():
            model.quantizer.update(z, code_index, z, stream)
        watch.mark("ema")
        row = watch.stop()
        if step >= warmup:
            rows.append(row | {"step": sum(row.values())})

    report = {"command": "python benchmarks/speed.py " + " ".join(sys.argv[1:]), "git": git_commit(),
              "torch": torch.__version__, "threads": torch.get_num_threads(), "cujp_samples": args.cujp_samples,
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"}
    report["milliseconds"] = {name: [round(q, 2) for q in statistics.quantiles([r[name] for r in rows], n=4)]
                              for name in rows[0]}
    report["clips_per_second"] = round(1e3 * batch_size / report["milliseconds"]["step"][1], 1)
    report["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda"
                                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    out = Path(__file__).with_name("speed.json")
    out.write_text(json.dumps((json.loads(out.read_text()) if out.exists() else []) + [report], indent=1) + "\n")
    print(f"{report['device']}, torch {report['torch']}, {report['threads']} threads, batch {batch_size}, {precision}")
    for name, (low, median, high) in report["milliseconds"].items():
        print(f"  {name:15}{median:9.2f} ms   [{low:.2f}, {high:.2f}]")
    print(f"  {report['clips_per_second']} clips a second, peak memory {report['peak_memory_mb']} MB")


if __name__ == "__main__":
    tyro.cli(main)
