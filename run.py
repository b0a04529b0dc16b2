"""What must merely work, once for the three scripts: errors in one line, devices, processes, settings, and `Run`.

Nothing here knows of features, networks or losses. Under torchrun every process holds some clips of each batch; the few
collectives let all of them act as one.
"""
import atexit
import ctypes
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, make_dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RANK, WORLD_SIZE = 0, 1
if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:  # as torchrun sets them; a scheduler has its own ranks
    RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CONTROL_GROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may take
SAVE_MEMORY = "; try a smaller --batch-size, or --features-on file"
# What may differ from the run that is resumed: where it goes on, how far, how often it logs and probes; not how it
# trains.
FREE = ("resume", "max_steps", "epochs", "data", "device", "runs_dir", "features_on", "cuda_graph", "log_every",
        "eval_every")


# -------------------------------------------------------------------------------------------------------------- errors
class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line that a terminal can show."""
    if "weights_only" in str(error):  # torch tells how to let the file run code
        return "damaged, or it holds more than numbers and text"
    return "".join(filter(str.isprintable, (str(error).splitlines() or [type(error).__name__])[0]))


def note(text: str) -> None:
    """Something that the user may want to know, on stderr."""
    if RANK == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def explain_input_errors(kind, error, traceback, go_on=str, save_memory=""):
    """A `sys.excepthook`: an InputError, or a disk that takes no more, ends the program with one line on stderr and
    exit code 2, no traceback. `go_on()` says how to continue after it, `save_memory` how to need less."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if issubclass(kind, BrokenPipeError):  # `| head` has read enough
        os._exit(0)
    if WORLD_SIZE > 1 and issubclass(kind, RuntimeError) and re.search("gloo|nccl|connection", str(error), re.I):
        print(f"error: process {RANK} lost another one ({first_line(error)}); --resume goes on from its checkpoint",
              file=sys.__stderr__, flush=True)
        os._exit(2)  # the others cannot be waited for
    if isinstance(error.__context__, torch.OutOfMemoryError):  # in a step that was being recorded
        kind, error = torch.OutOfMemoryError, error.__context__
    if issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        error = InputError(f"{first_line(error)}{save_memory}")
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # what the disk said, which torch.save hides
    if isinstance(error, OSError) and re.search("No space|Read-only|quota|Permission|too large", str(error)):
        error = InputError(f"a file cannot be written ({first_line(error)}){go_on()}")
    if not isinstance(error, InputError):
        return sys.__excepthook__(kind, error, traceback)
    print(end="", flush=True)
    print(f"error: {error}", file=sys.__stderr__, flush=True)  # torch.distributed catches a hook's sys.stderr
    os._exit(2)  # without clearing up: HDF5 may crash if it ends before the datasets that a traceback holds


def require_shape(name: str, tensor, shape: tuple) -> None:
    """Raise ValueError naming the argument unless `tensor` has `shape`, in which -1 stands for any length."""
    if tensor.ndim != len(shape) or any(want not in (-1, have) for have, want in zip(tensor.shape, shape)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


# --------------------------------------------------------------------------------------------------- machine and files
def pick_device(name: str) -> torch.device:
    """`auto` or a torch device name -> device. Raises InputError if it does not exist here, or lacks float64."""
    if WORLD_SIZE > 1 and name.startswith("cuda:"):
        raise InputError(f"--device {name}: of several processes each takes its own GPU; give --device cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device, dtype=torch.double).item()  # in which probes count; Apple's MPS has none
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        crowded = WORLD_SIZE > torch.cuda.device_count() > 0
        advice = "fewer processes, or --device cpu" if crowded else "--device auto"
        raise InputError(f"--device {name}: not available here ({first_line(error)}); try {advice}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    respect_quota()
    if device.type == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # Let glibc keep what is freed: every step takes the same sizes, and new pages cost a tenth of its time.
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no pages of their own for large blocks, which go when freed
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: backward, a thread of its own, uses the same heap
    return device


def respect_quota() -> None:
    """No more threads than the cores whose time a container may take: OpenMP sees only on which cores it may run."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # control groups, version 2 and 1
        with suppress(OSError, ValueError):  # no such file, or `max` for a number
            quota, period = map(int, " ".join((CONTROL_GROUP / name).read_text() for name in names).split())
            if quota > 0 and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, min(torch.get_num_threads(), quota // period)))


def peak_memory_mb(device: torch.device):
    """The most memory this process held, in MiB: on a GPU what tensors took there; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB here


def write_atomically(path: Path, save) -> None:
    """`save(binary stream)`, then rename: a program killed at any point leaves the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            save(stream)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value):
    """Nested dicts with None for numbers that are not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda stream: stream.write(json.dumps(finite(value), indent=1).encode()))


def log_lines(path: Path) -> list:
    """The lines of a metrics.jsonl as dicts, but for what a kill or a full disk left of one."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) and isinstance(line.get("step"), int) else []
    return lines


def git_commit() -> str:
    """The commit of this code, with `-dirty` if files differ from it; `unknown` outside a repository."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --------------------------------------------------------------------------------------------------- several processes
class AllGather(torch.autograd.Function):
    """(n, ...) of each process -> (N, ...) of all. Backward: the sum of what all processes made of this one's rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD_SIZE)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return local_rows(gradient)


def all_gather(x):
    """The rows of all processes in the order of ranks, with gradients; alone, x itself. A loss that all processes
    compute alike gives W times its gradient, which `average_over_processes` makes right."""
    return AllGather.apply(x) if WORLD_SIZE > 1 else x


def local_rows(x):
    """This process's rows of something about the whole batch, (N, ...) -> (n, ...)"""
    return x.chunk(WORLD_SIZE)[RANK]


@torch.no_grad()
def average_over_processes(tensors) -> None:
    """Replace tensors that every process holds by their mean, in place and in one exchange. Of gradients: those of a
    process's own clips become those of all, those of gathered rows lose the factor W of `all_gather`."""
    tensors = [t for t in tensors if t is not None]
    if WORLD_SIZE > 1 and tensors:
        mean = torch.cat([t.flatten().float() for t in tensors]) / WORLD_SIZE
        dist.all_reduce(mean)
        for t, part in zip(tensors, mean.split([t.numel() for t in tensors])):
            t.copy_((part if t.is_floating_point() else part.round()).view_as(t))


def all_gather_object(value) -> list:
    """Any object of each process, in the order of ranks."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


# --------------------------------------------------------------------------------------------------------- CUDA graphs
@cache
def stream_of(name: str):
    return torch.cuda.Stream()


def in_parallel(calls: dict) -> dict:
    """{name: call()}; in a step that is recorded each call has its own stream, for small kernels fit beside others."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return {name: call() for name, call in calls.items()}
    main, results = torch.cuda.current_stream(), {}
    for name, call in calls.items():
        stream_of(name).wait_stream(main)
        with torch.cuda.stream(stream_of(name)):
            results[name] = call()
            torch.clear_autocast_cache()  # a weight that this stream casts is not there yet for the others
    for name in calls:
        main.wait_stream(stream_of(name))
    return results


class Recorded:
    """`step(batch, drawn)` from CUDA graphs, one for each `drawn`: the GPU starts the thousand small kernels of a
    step ten times as fast as Python can. A graph does again what the device did; Python's part is not run again."""

    def __init__(self, step, owners, generators):
        self.step, self.calls, self.graphs, self.pool = step, 0, {}, torch.cuda.graph_pool_handle()
        self.generators = [generator for generator in generators if generator.device.type == "cuda"]
        self.modules = [part for owner in owners if isinstance(owner, torch.nn.Module) for part in owner.modules()]
        for group in itertools.chain(*(getattr(owner, "param_groups", ()) for owner in owners)):
            group["capturable"] = True

    def __call__(self, batch: dict, drawn: int):
        self.calls += 1
        if self.calls <= 3:  # in which codes start, and libraries and optimizers make what they keep
            return self.step(batch, drawn)
        if self.calls == 4:
            self.batch = {m: torch.empty_like(x) for m, x in batch.items()}
        for m, x in batch.items():
            self.batch[m].copy_(x)
        if drawn not in self.graphs:
            self.graphs[drawn] = self.record(drawn)
        graph, result = self.graphs[drawn]
        graph.replay()
        return result

    def record(self, drawn: int) -> tuple:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators if torch.__version__ < (2, 14) else ():  # which finds them itself
            graph.register_generator_state(generator)
        buffers = [(part, name, buffer) for part in self.modules for name, buffer in part.named_buffers(recurse=False)]
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # others may go on reading ahead
            result = self.step(self.batch, drawn)
            for part, name, buffer in buffers:  # a step may assign a new one, but a graph reads where it has read
                setattr(part, name, buffer.copy_(getattr(part, name)))
        return graph, result


# ------------------------------------------------------------------------------------------------------------ settings
@dataclass
class Running:
    seed: int = 1  # of weights, batches and all other random numbers
    device: str = "auto"  # `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`
    runs_dir: str = "runs"  # where run folders and composed data go
    resume: Optional[str] = None  # run folder to continue; its settings are taken over, --epochs may be raised
    eval_every: int = 0  # probe every so many epochs besides the end; 0: at the end only
    log_every: int = 10  # steps between log lines
    max_steps: Optional[int] = None  # save a checkpoint after this many steps of the run and stop, as Ctrl-C does


def parse(Args, description: str = "", default=None):
    """The command line as an Args, over `default`. Args inherits from smaller dataclasses: groups of flags in --help,
    of which the last comes first."""
    kinds, before = list(reversed(Args.__bases__)), default or Args()
    Groups = make_dataclass("Groups", [(kind.__name__.lower(), kind) for kind in kinds])
    groups = Groups(*(kind(**{field.name: getattr(before, field.name) for field in fields(kind)}) for kind in kinds))
    groups = tyro.cli(Groups, default=groups, description=description, config=(tyro.conf.OmitArgPrefixes,))
    return Args(**{name: value for group in vars(groups).values() for name, value in vars(group).items()})


def check_numbers(args, above_zero: tuple, below_one: tuple = (), at_most_one: tuple = ()) -> None:
    """Raise InputError unless these are above 0, these in [0, 1), these in [0, 1], and no other number is negative."""
    for name, value in vars(args).items():
        wrong = None
        if not isinstance(value, (int, float)):
            continue
        if name in (*above_zero, "log_every", "max_steps") and not value > 0:
            wrong = "must be above 0"
        elif name in below_one and not 0 <= value < 1:
            wrong = "must be in [0, 1)"
        elif name in at_most_one and not 0 <= value <= 1:
            wrong = "must be in [0, 1]"
        elif not 0 <= value < math.inf:
            wrong = "must not be negative, nor infinite"
        elif isinstance(value, int) and value >= 2**32:  # seeds cannot be larger, and sizes overflow somewhere
            wrong = "must be below 2^32"
        if wrong:
            raise InputError(f"--{name.replace('_', '-')} {value}: {wrong}")


def resumed(method: str, args):
    """(settings, checkpoint) of the run `args.resume`: its own settings, the command line over them. Raises InputError
    if the folder holds no such run, if it is complete, or if a setting differs that may not."""
    path, Args = Path(args.resume) / "checkpoint.pt", type(args)
    if not path.is_file():
        raise InputError(f"--resume {args.resume}: no checkpoint.pt inside; give a run folder")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        if state["method"] != method:
            raise ValueError(f"but of {state['method']}")
        saved = Args(**state["args"])
    except Exception as error:  # whatever is wrong with the file, the user needs one line
        raise InputError(f"{path}: not a checkpoint of {method.replace('.', '/')}.py ({first_line(error)})")
    given = parse(Args, default=saved)
    given.max_steps = args.max_steps  # the limit of an earlier call has been reached
    for name, value in vars(given).items():
        flag, before = f"--{name.replace('_', '-')} {value}", getattr(saved, name)
        if name not in FREE and value != before or name == "epochs" and value < before:
            raise InputError(f"{flag}: the run was started with {before}; a resumed run keeps its settings or "
                             "has more epochs")
    finished = 0  # epochs after which there are results
    with suppress(Exception):  # no such file, or a damaged one
        finished = json.loads(path.with_name("results.json").read_text())["args"]["epochs"]
    if finished == given.epochs:
        raise InputError(f"--resume {args.resume}: this run is complete, see its results.json; more --epochs train on")
    return given, state


# ----------------------------------------------------------------------------------------------------------------- run
class Run:
    """One run of a script: its folder, settings, device, seeds, signals, log, checkpoints and results. The keywords are
    those of `check_numbers`."""

    def __init__(self, method: str, args, **limits):
        sys.excepthook = partial(explain_input_errors, save_memory=SAVE_MEMORY)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training: the HDF5 library never returns from some files
        self.method, self.saved, self.folder, self.signals, self.exit_code = method, None, None, [], 0
        self.trained = False
        self.started_at = time.perf_counter()
        if WORLD_SIZE == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no MASTER_ADDR to meet at: start "
                             "with torchrun, or unset WORLD_SIZE")
        if args.resume is not None:
            args, self.saved = resumed(method, args)
        check_numbers(args, **limits)
        if not args.runs_dir:
            raise InputError("--runs-dir is empty; . is the current folder")
        self.args, self.device = args, pick_device(args.device)
        if args.cuda_graph and (self.device.type != "cuda" or WORLD_SIZE > 1):
            raise InputError("--cuda-graph: needs one GPU and one process; give --no-cuda-graph")
        if WORLD_SIZE > 1:
            patience = timedelta(days=1)  # while the first process hashes the data or probes
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patience)
            atexit.register(dist.destroy_process_group)
        torch.manual_seed(args.seed)

    def generator(self, name: str, device=None) -> torch.Generator:
        """Random numbers for one part of the method: what other parts draw, or leave out, does not change them."""
        seed = zlib.crc32(f"{name} {self.args.seed}".encode())
        return torch.Generator(device or self.device).manual_seed(seed)

    def restore(self, data, shape: dict, generators: dict, **stateful) -> int:
        """Open the run folder -> the step to go on from: 0, or on resume that of the checkpoint, with all of `stateful`
        and `generators` as they were then, to the bit. `data` are Features, `shape` is kept for the probes."""
        self.data_name, self.shape, self.generators, self.stateful = data.name, shape, generators, stateful
        sha256 = all_gather_object(data.sha256() if RANK == 0 else None)[0]
        self.provenance = {"git": git_commit(), "resumed_at": [], "data_sha256": sha256}
        self.step, self.num_steps = 0, None
        self.seconds = {"data": time.perf_counter() - self.started_at, "train": 0.0, "probe": 0.0}
        # Dropout draws the same whatever the method built, and other numbers in each process.
        torch.manual_seed(self.args.seed + 1_000_003 * RANK)
        if self.saved:
            self._load(self.saved, f"{self.args.resume}/checkpoint.pt")
        if RANK == 0:
            self._open_folder()
        self.folder = all_gather_object(self.folder)[0]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        return self.step

    def _load(self, saved: dict, path: str) -> None:
        if saved.get("data_sha256") != self.provenance["data_sha256"]:
            raise InputError(f"{path}: the data changed since this run was started")
        try:
            for name, owner in self.stateful.items():
                owner.load_state_dict(saved[name])
            for name, generator in self.generators.items():
                generator.set_state(saved["rng"][name])
            processes = [saved["rng"], *saved.get("rng_of_others", ())]
            if RANK == 0 or len(processes) == WORLD_SIZE:
                torch.set_rng_state(processes[RANK]["cpu"])
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state(processes[RANK]["cuda"], self.device)
            else:  # not as many processes as before: numbers that none of them has drawn
                torch.manual_seed(self.args.seed + 1_000_003 * RANK + saved["step"])
            self.step, self.seconds = saved["step"], self.seconds | saved["seconds"]
            commits = [*saved["resumed_at"], self.provenance["git"]]
            self.provenance |= {"git": saved["git"], "resumed_at": commits}
        except Exception as error:  # of the last line: torch begins with where it was
            reason = first_line(type(error)(*str(error).splitlines()[-1:]))
            raise InputError(f"{path} does not fit these settings or this kind of device: {reason}")

    def _open_folder(self) -> None:
        """A new folder, or the one to resume: its log loses the lines that were written after the checkpoint."""
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() // 1000 % 1_000_000:06d}"  # to the microsecond
        data_name = re.sub(r"[^\w.-]", "-", self.data_name)[:100]
        name = f"{self.method}__{data_name}__{self.args.seed}__{stamp}"
        self.folder = Path(self.args.resume or Path(self.args.runs_dir) / name)
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
        except OSError as error:
            raise InputError(f"--runs-dir {self.args.runs_dir}: cannot be written ({error.strerror})")
        sys.excepthook = partial(explain_input_errors, go_on=self._go_on, save_memory=SAVE_MEMORY)
        threading.excepthook = lambda error: None  # TensorBoard's thread hands its errors on
        for half in self.folder.glob("*.tmp"):  # what a kill left
            half.unlink(missing_ok=True)
        write_json(self.folder / "args.json", asdict(self.args))
        self.log_file = self.folder / "metrics.jsonl"
        lines = [line for line in log_lines(self.log_file) if line["step"] <= self.step]
        *_, self.logged = {}, *(line for line in lines if "losses/total" in line)
        self.probed = {line["step"] for line in lines if any(tag.startswith("eval/") for tag in line)}
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        write_atomically(self.log_file, lambda stream: stream.write(text.encode()))
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1 if self.saved else None)

    def _go_on(self) -> str:
        """How to continue the run, if it has a checkpoint"""
        if not (self.folder / "checkpoint.pt").exists():
            return "; there is no checkpoint yet"
        program = ["-m", self.method] if "." in self.method else [sys.argv[0]]  # of a folder, or a file
        return f"; continue with: {shlex.join(['python', *program, '--resume', str(self.folder)])}"

    def _on_signal(self, number, frame) -> None:
        """The first signal ends the run after this step; a second one, or one after training, at once."""
        if self.signals and WORLD_SIZE == 1 or self.trained:
            print(f"stopped at once{self._go_on()}")
            sys.exit(128 + number)
        self.signals.append(number)

    def recorded(self, step):
        """`step(batch, drawn)` as it is, or with --cuda-graph as what `Recorded` makes of it."""
        owners, generators = self.stateful.values(), self.generators.values()
        return Recorded(step, owners, generators) if self.args.cuda_graph else step

    def progress(self, batches, evaluate):
        """The batches of the steps that are left; `evaluate()` -> tags is for --eval-every."""
        self.epoch_steps, self.num_steps = len(batches), self.args.epochs * len(batches)
        self.logged_seconds, self.logged_step = self.seconds["train"], self.step
        self.evaluate = evaluate
        if RANK == 0:
            with suppress(BrokenPipeError):  # nobody may be reading
                print(f"{self.num_steps} steps, {self.epoch_steps} an epoch; log: {self.log_file}", flush=True)
        hidden = not (sys.stdout and sys.stdout.isatty()) or RANK > 0
        with tqdm(total=self.num_steps, initial=self.step, desc=self.method, disable=hidden, dynamic_ncols=True) as bar:
            self.bar, self.clock = bar, time.perf_counter()
            self._probe(self.step)
            if self.step >= (self.args.max_steps or math.inf):  # steps that an earlier call has taken
                self._say_stopped(self.step)
                sys.exit(0)
            for batch in batches.stream(self.step, self.num_steps):
                yield batch
                self._count_time("train")
        self.trained = True  # from here on a signal ends the program at once
        if self.signals:  # that came after the last checkpoint had been asked for
            self._say_stopped(self.step)
            sys.exit(128 + self.signals[0])
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # what steps had, probes need in other sizes

    def _count_time(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self.clock
        self.clock = now

    def log(self, step: int, losses: dict, grad_norm, health) -> None:
        """After every step: `losses` {name: tensor ()}; `health()` -> {tag: tensor ()} is called when a line is due.

        Raises InputError naming the last good checkpoint if a loss is not finite. Reading the numbers is the only time
        at which the host waits for the device."""
        self.step, self.losses = step, losses | {"grad_norm": grad_norm}
        self.bar.update()
        if step % self.args.log_every and step % self.epoch_steps:
            return
        tags = {f"losses/{name}": value for name, value in losses.items()} | health() | {"charts/grad_norm": grad_norm}
        mean = torch.stack([value.detach().float() for value in tags.values()])
        average_over_processes([mean])
        tags = dict(zip(tags, mean.tolist()))
        self._require_finite(tags)
        self.logged = tags
        self._count_time("train")
        rate = self.args.batch_size * (step - self.logged_step) / (self.seconds["train"] - self.logged_seconds)
        tags |= {"charts/epoch": step / self.epoch_steps, "charts/clips_per_second": rate}
        self.logged_seconds, self.logged_step = self.seconds["train"], step
        self.bar.set_postfix_str(f"loss {tags['losses/total']:.2f}, agreement {tags['codebook/agreement']:.2f}")
        if RANK == 0:
            self._write(step, tags)

    def _require_finite(self, values: dict) -> None:
        if not all(map(math.isfinite, values.values())):
            found = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if "codebook" not in name)
            last = self.folder / "checkpoint.pt"
            raise InputError(f"not finite at step {self.step}: {found}; last good checkpoint: "
                             f"{last if last.exists() else 'none yet'}; try a smaller --learning-rate, and "
                             "python data.py check on the data")

    def _write(self, step: int, tags: dict) -> None:
        with open(self.log_file, "a") as stream:
            stream.write(json.dumps({"step": step, **finite(tags)}) + "\n")
        for tag, value in tags.items():
            self.writer.add_scalar(tag, value, step)

    def checkpoint(self, step: int) -> bool:
        """Save at the end of an epoch, and when a signal to any process or --max-steps asks to stop -> stop?

        Then, every --eval-every epochs, probe."""
        epoch_end = step % self.epoch_steps == 0
        # several processes stop at one step; on GPUs they ask each other only when they wait for the device anyway
        if WORLD_SIZE == 1 or self.device.type == "cpu" or epoch_end or step % self.args.log_every == 0:
            told = sum(all_gather_object(self.signals), [])
            self.exit_code = 128 + told[0] if told else 0
        stop = self.exit_code > 0 or step >= (self.args.max_steps or math.inf)
        if stop or epoch_end:
            self._require_finite({name: value.item() for name, value in self.losses.items()})
            state = self._state()  # of all processes
            if RANK == 0:
                write_atomically(self.folder / "checkpoint.pt", partial(torch.save, state))
        self._probe(step)
        if stop:
            self._say_stopped(step)
        return stop

    def _say_stopped(self, step: int) -> None:
        if RANK == 0:
            print(f"stopped after step {step} of {self.num_steps}, checkpoint saved{self._go_on()}")

    def _probe(self, step: int) -> None:
        """Log the tags of the probes if --eval-every asks for them, unless that was done before a kill."""
        every = self.args.eval_every * self.epoch_steps
        if RANK == 0 and every and step % every == 0 and 0 < step < self.num_steps and step not in self.probed:
            self._count_time("train")
            self._write(step, self.evaluate())
            self._count_time("probe")

    def _state(self) -> dict:
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        first, *others = all_gather_object(own)
        rng = {name: generator.get_state() for name, generator in self.generators.items()}
        return {"method": self.method, "args": asdict(self.args), "shape": self.shape, "step": self.step,
                "epoch": self.step // self.epoch_steps, "rng": rng | first, "rng_of_others": others,
                "seconds": self.seconds, **self.provenance,
                **{name: owner.state_dict() for name, owner in self.stateful.items()}}

    def finish(self, step: int, tags: dict, warnings: list, table: str, show) -> None:
        """Write results.json, with lines about what was not learned, and print the table of the final probes. Then what
        nobody has to have: `show()` draws pictures."""
        self._count_time("probe")
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if step not in self.probed:  # and killed before now
            self._write(step, tags)
        write_json(self.folder / "results.json", {
            "method": self.method, "data": self.data_name, **self.provenance, "seed": self.args.seed,
            "args": asdict(self.args), "torch": torch.__version__, "device": name, "seconds": self.seconds,
            "steps": step, "peak_memory_mb": peak_memory_mb(self.device), "warnings": warnings, "metrics": tags})
        for number in (signal.SIGINT, signal.SIGTERM):  # from here on there is nothing to resume
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
        print("\n".join([table, *warnings, f"run folder: {self.folder}"]), flush=True)
        try:
            show()
            self.writer.close()
        except Exception as error:
            note(f"{self.folder}: pictures are missing ({first_line(error)})")
