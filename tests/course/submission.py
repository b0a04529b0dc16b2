"""A student's file, run in a process of its own: whatever it does, the grader gets an answer in time."""
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from . import worker

ROOT = Path(__file__).resolve().parents[2]
START = 300.0  # seconds that a process may take to import PyTorch and the project


class Submission:
    """`ask(call, request)` -> {"values": {key: tensor}, "returned": in words} or {"error": in words}.

    An answer may take `limit` seconds, reading the file too. After a call that did not end, others of its task get a
    quarter. The process is begun anew when it hangs or is gone. What was asked, or read in vain, is not tried twice."""

    def __init__(self, path, limit: float = 20.0):
        self.path, self.limit = Path(path).resolve(), limit
        self.process, self.broken, self.hung, self.answers = None, None, set(), {}
        self.printed = tempfile.TemporaryFile("a+b")

    def ask(self, call: str, request: dict) -> dict:
        """`call` is the task and a name, `fcmi/dot`."""
        self.start()
        if self.broken:
            return {"error": self.broken}
        if call not in self.answers:
            task = call.split("/")[0]
            reply = self.exchange(request, self.limit / 4 if task in self.hung else self.limit)
            if reply.get("kind") == "timeout":
                self.hung.add(task)
            self.answers[call] = reply
        return self.answers[call]

    def load(self, path) -> None:
        """Go on with another file, in the same process if it still runs."""
        self.path, self.broken, self.hung, self.answers = Path(path).resolve(), None, set(), {}
        if self.process:
            self.read_file()

    def start(self) -> None:
        if self.process or self.broken:
            return
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen([sys.executable, worker.__file__], cwd=ROOT, env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.printed,
                                        start_new_session=True)
        self.replies = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process.stdout, self.replies), daemon=True).start()
        if "error" in self.wait(START):
            self.printed.seek(0)
            raise RuntimeError(f"the grader cannot start here: {self.printed.read().decode(errors='replace')[-2000:]}")
        self.read_file()

    def read_file(self) -> None:
        if not self.path.is_file():
            self.broken = f"there is no file {self.path}"
            return
        reply = self.exchange({"load": str(self.path)}, self.limit)
        if "error" in reply:
            self.broken = f"{self.path.name} cannot be imported: {reply['error']}"

    @staticmethod
    def listen(stream, replies) -> None:
        """Pass on what the process says; None once it is gone, or says something else than messages."""
        try:
            while (reply := worker.receive(stream)) is not None:
                replies.put(reply)
        except Exception:  # a student's file can write anything into the pipe
            pass
        replies.put(None)

    def wait(self, seconds: float) -> dict:
        try:
            reply = self.replies.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"error": f"it did not end within {seconds:g} seconds: an endless loop?", "kind": "timeout"}
        if reply is None:
            self.process.wait()
            code = self.process.returncode
            self.close()
            return {"error": f"it ended the whole process (exit code {code})", "kind": "exit"}
        return reply

    def exchange(self, message: dict, seconds: float) -> dict:
        self.printed.truncate(0)  # it is opened to append, here and in the process
        try:
            worker.send(self.process.stdin, message)
        except OSError:  # it is gone already; `wait` says so
            pass
        reply = self.wait(seconds)
        self.printed.seek(0)
        lines = self.printed.read().decode(errors="replace").splitlines()
        reply["printed"] = "\n".join(line[:200] for line in lines[-3:])
        return reply

    def close(self) -> None:
        """End the process, and what it may have started."""
        if self.process:
            if os.name == "posix":
                try:
                    os.killpg(self.process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            else:
                self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None
