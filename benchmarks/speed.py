"""Milliseconds of a training step by part, clips a second, arithmetic, a GPU's peak memory, of a script run as it is.

    python -m benchmarks.speed                                            # all methods, digits shapes
    python -m benchmarks.speed --shapes vggsound --precision bf16         # 10x7x7x512, 10x128, 10x768
    python -m benchmarks.speed --method micu --features-on file --clips 4000     # read ahead from the file
    python -m benchmarks.speed --method micu -- --cujp-samples 0          # flags of the script after --
    python -m benchmarks.speed --warmup 40 -- --cuda-graph                # a GPU's recorded step: of it only the whole

The script's own main program runs on random features; around the functions and modules of its step lie stopwatches:
device events on CUDA, which add no synchronisation, a wall clock on CPU. Median and quartiles over --steps steps after
a warm-up. Over one step, part by part, FLOP are counted by torch (LSTMs and elementwise work are not in it), and bytes
as what each operation reads and writes. Both are compared with what the device does in one large matrix product and one
large copy: the share of its limit. Appends to benchmarks/speed.json.
"""
import ast
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal, Optional

import h5py
import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
from data import Batches, Features
from run import git_commit, peak_memory_mb, pick_device

SHAPES = {"digits": {"audio": (10, 130), "video": (10, 7, 7, 64), "text": (10, 384)},
          "vggsound": {"audio": (10, 128), "video": (10, 7, 7, 512), "text": (10, 768)}}
PARTS = {  # of a step: names in a script
    "encoders": ["SemanticEncoder"], "quantizer": ["Quantizer.forward", "AlignedQuantizer.forward"],
    "specific": ["SpecificEncoder"], "decoders": ["Decoder"],
    "commitment": ["commitment_loss", "teacher_commitment_loss", "row_commitment_loss"],
    "fcmi": ["draw_mask", "fcmi_loss"], "cujp": ["CUJP", "draw_puzzles"],
    "cpc": ["CrossModalCPC"], "cmcm": ["cmcm_loss"],
    "club fit": ["fit_club"], "club": ["CLUB", "pool_specific"],
    "ema": ["Quantizer.update", "AlignedQuantizer.update", "mm_ema_input", "temporal_mix"]}


class BytesMoved(TorchDispatchMode):
    """`total`: bytes of the tensors that operations took and gave, those left out that only give a view"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(part) if isinstance(t, torch.Tensor)] for part in (args, out))
        places = [{t.untyped_storage().data_ptr() for t in tensors} for tensors in (read, written)]
        if function._schema.is_mutable or not places[0] & places[1]:
            self.total += sum(t.numel() * t.element_size() for t in read + written)
        return out


class Stopwatches:
    """Spans of named parts within steps. A part that runs inside another one belongs to the outer one."""

    def __init__(self, device, warmup: int, steps: int):
        self.cuda, self.warmup, self.last = device.type == "cuda", warmup, warmup + steps
        self.step, self.inside, self.spans = -1, False, []
        self.counters, self.work = None, defaultdict(lambda: [0, 0])  # {part: [FLOP, bytes]} of the second step

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, part: str, function):
        def around(*args, **keywords):
            if self.inside or self.cuda and torch.cuda.is_current_stream_capturing():  # nobody could read those events
                return function(*args, **keywords)
            self.inside, start, before = True, self.now(), self.counted()
            try:
                return function(*args, **keywords)
            finally:
                self.inside = False
                self.spans.append((self.step, part, start, self.now()))
                for i, (old, new) in enumerate(zip(before, self.counted())):
                    self.work[part][i] += new - old
        return around

    def counted(self) -> tuple:
        return (self.counters[0].get_total_flops(), self.counters[1].total) if self.counters else (0, 0)

    def input(self, epoch):
        """Around `Batches.epoch`: what lies between two batches is a step."""
        def around(*args, **keywords):
            batches = epoch(*args, **keywords)
            while True:
                if self.counters:
                    for counter in reversed(self.counters):
                        counter.__exit__(None, None, None)
                    self.work["step"], self.counters = list(self.counted()), None
                start = self.now()
                batch = next(batches, None)
                if batch is None:
                    return
                self.step += 1
                if self.step == 2:  # the second step: the first one starts the codebook
                    self.counters = FlopCounterMode(display=False), BytesMoved()
                    for counter in self.counters:
                        counter.__enter__()
                if self.step == self.warmup and self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                self.spans.append((self.step, "input", start, self.now()))
                yield batch
        return around

    def rows(self) -> list:
        """[{part: milliseconds}] of the measured steps, with `rest` and `step`"""
        if self.cuda:
            torch.cuda.synchronize()
        between = (lambda a, b: a.elapsed_time(b)) if self.cuda else (lambda a, b: 1e3 * (b - a))
        rows, starts = defaultdict(lambda: defaultdict(float)), {}
        for step, part, start, end in self.spans:
            starts.setdefault(step, start)
            rows[step][part] += between(start, end)
        whole = []
        for step in range(self.warmup, self.last):
            row = dict(rows[step])
            total = between(starts[step], starts[step + 1])
            whole.append(row | {"rest": total - sum(row.values()), "step": total})
        return whole


def write_random(path: Path, shape: dict, clips: int) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as h5:
        h5.attrs.update(format="cmg-features", version=1, name="random")
        h5["split"], h5["id"] = np.zeros(clips, np.uint8), [str(i) for i in range(clips)]
        for m, s in shape.items():
            data = h5.create_dataset(m, (clips, *s), np.float16)
            for i in range(0, clips, 100):
                data[i:i + 100] = rng.standard_normal((min(100, clips - i), *s), np.float32)


def run(method: str, device, warmup: int, steps: int, options: list) -> Stopwatches:
    """Run `python METHOD.py options` in this process with stopwatches around its parts; its last step is the end."""
    watch, source = Stopwatches(device, warmup, steps), (ROOT / f"{method}.py").read_text()
    *body, main = ast.parse(source).body
    namespace = {"__name__": "__main__", "__file__": f"{method}.py"}
    exec(compile(ast.Module(body, []), f"{method}.py", "exec"), namespace)
    for part, names in PARTS.items():
        for name in names:
            owner, _, attribute = name.partition(".")
            if owner not in namespace:
                continue
            if attribute:
                setattr(namespace[owner], attribute, watch.timed(part, getattr(namespace[owner], attribute)))
            elif isinstance(namespace[owner], type):
                namespace[owner].__call__ = watch.timed(part, namespace[owner].__call__)
            else:
                namespace[owner] = watch.timed(part, namespace[owner])
    patched = [(torch.Tensor, "backward", "backward"), (torch.optim.Adam, "step", "optimizer"),
               (torch.nn.utils, "clip_grad_norm_", "optimizer"), (torch.optim.Optimizer, "zero_grad", "optimizer")]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    batches = namespace["Batches"]
    kept.append((batches, "epoch", batches.epoch))
    for owner, name, part in patched:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    batches.epoch = watch.input(batches.epoch)
    saved, sys.argv = sys.argv, [f"{method}.py", *options]
    try:
        exec(compile(ast.Module([main], []), f"{method}.py", "exec"), namespace)
    except SystemExit:
        pass
    finally:
        sys.argv = saved
        for owner, name, value in kept:
            setattr(owner, name, value)
    return watch


def matrix_peak(device, dtype) -> float:
    """TFLOP a second of a large matrix product, the best of several"""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2e-12 * n**3 / (time.perf_counter() - start))
    return best


def copy_rate(device) -> float:
    """GB a second that a large copy reads and writes, the best of several"""
    a, best = torch.zeros(1 << 26, device=device), 0.0
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a.clone()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 8e-9 * len(a) / (time.perf_counter() - start))
    return best


def reading_alone(path: Path, batch_size: int) -> float:
    """Clips a second that the disk and the reader give without training, the page cache dropped where possible"""
    features = Features([path])
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    batches, start = Batches(features, features.modalities, "train", batch_size, "cpu", 0, "file"), time.perf_counter()
    read = sum(len(next(iter(batch.values()))) for batch in batches.epoch(0))
    return read / (time.perf_counter() - start)


def main(options: tyro.conf.Positional[tuple[str, ...]] = (), *,
         method: tuple[Literal["uni_code", "micu", "codaar"], ...] = ("uni_code", "micu", "codaar"),
         shapes: Literal["digits", "vggsound"] = "digits", precision: Literal["fp32", "bf16"] = "fp32",
         batch_size: int = 80, device: str = "auto", steps: int = 20, warmup: int = 5, clips: Optional[int] = None,
         features_on: Literal["auto", "device", "memory", "file"] = "auto", keep: bool = True) -> None:
    if warmup < 3:
        raise SystemExit("--warmup: at least 3, for arithmetic is counted in the second step")
    device, shape, reports = pick_device(device), SHAPES[shapes], []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peak, bandwidth = matrix_peak(device, dtype), copy_rate(device)
    with tempfile.TemporaryDirectory() as folder:
        path, needed = Path(folder) / "random.h5", batch_size * (warmup + steps + 2)  # one epoch
        write_random(path, shape, clips or needed)
        for name in method:
            gc.collect()
            epochs = -(-(warmup + steps + 1) // ((clips or needed) // batch_size))
            flags = ["--data", str(path), "--runs-dir", folder, "--batch-size", str(batch_size), "--epochs",
                     str(epochs), "--max-steps", str(warmup + steps + 1), "--precision", precision, "--device",
                     str(device), "--features-on", features_on, "--log-every", "1000000"]
            watch = run(name, device, warmup, steps, [*flags, *options])
            rows = watch.rows()
            parts = {part: [round(q, 2) for q in statistics.quantiles([row.get(part, 0.0) for row in rows], n=4)]
                     for part in dict.fromkeys(part for row in rows for part in row)}
            median = parts["step"][1]
            flop, moved = watch.work["step"]
            work = {part: [round(count / 1e9, 2) for count in watch.work[part]] for part in watch.work}
            report = {"command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]), "method": name,
                      "git": git_commit(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                      "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
                      platform.processor() or "cpu", "milliseconds": parts,
                      "clips_per_second": round(1e3 * batch_size / median, 1), "gflop_and_gb": work,
                      "peak_tflops": round(peak, 3), "share_of_peak": round(flop / 1e9 / median / peak, 3),
                      "copy_gb_per_second": round(bandwidth, 1),
                      "share_of_copy": round(moved / 1e6 / median / bandwidth, 3)}
            if device.type == "cuda":  # in main memory it would be that of all methods so far
                report["peak_memory_mb"] = round(peak_memory_mb(device))
            if features_on == "file":
                report["reading_alone_clips_per_second"] = round(reading_alone(path, batch_size))
            reports.append(report)
            print(f"\n{name}: {report['device']}, torch {report['torch']}, {report['threads']} threads, batch "
                  f"{batch_size}, {shapes}, {precision}")
            for part, (low, middle, high) in parts.items():
                gflop, gb = work.get(part, (0, 0))
                print(f"  {part:12}{middle:9.2f} ms   [{low:.2f}, {high:.2f}]{gflop:9.2f} GFLOP{gb:8.3f} GB")
            print(f"  {report['clips_per_second']} clips a second; {100 * report['share_of_peak']:.0f} % of the "
                  f"{peak:.2f} TFLOP/s of a matrix product, {100 * report['share_of_copy']:.0f} % of the "
                  f"{bandwidth:.1f} GB/s of a copy")
            if features_on == "file":
                print(f"  reading alone {report['reading_alone_clips_per_second']} clips a second")
    if keep:
        out = Path(__file__).with_name("speed.json")
        out.write_text(json.dumps((json.loads(out.read_text()) if out.exists() else []) + reports, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
