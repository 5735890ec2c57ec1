"""Runs parts inside their time boxes, in worker processes: prepared side by side, measured one at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from benchmarks.gpu import worker
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.rows import Store, Task

PREPARING = 0.7  # of a part's box; what is not ready then is cut off, for measuring wants a quiet machine
MEASURING = 3  # seconds a task, which is all that the end of a box is kept for where preparing takes long
Say = Callable[[str], None]


class Worker:
    """One process and the task it has."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=worker.work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.task: Task | None = None
        self.state, self.since = "starting", time.monotonic()

    @property
    def limit(self) -> float:
        return self.task.limit if self.task else 0.0

    def enter(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()

    def give(self, task: Task) -> None:
        self.task = task
        self.enter("preparing")
        self.send(task)

    def go(self) -> None:
        self.enter("measuring")
        self.send("go")

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # a process that died is noticed when it is listened to
            self.pipe.send(message)

    def stop(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


class Runner:
    def __init__(self, store: Store, dry: bool, workers: int, say: Say) -> None:
        began = time.monotonic()
        self.store, self.dry = store, dry
        self.say: Say = lambda line: say(f"{time.monotonic() - began:4.0f}  {line}")
        self.versions: dict[str, str] = {}
        # Few for each process: there are as many processes as cores.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.workers = [Worker() for _ in range(workers)]

    def close(self) -> None:
        for one in self.workers:
            one.stop()

    def run(self, parts: Sequence[str], seconds: float, again: bool) -> None:
        end = time.monotonic() + seconds
        while any(w.state == "starting" for w in self.workers) and time.monotonic() < end - 0.8 * seconds:
            self.listen()
        self.say(f"== {sum(w.state == 'idle' for w in self.workers)} workers started")
        for index, name in enumerate(parts):
            part = PARTS[name]
            weights = sum(PARTS[n].weight for n in parts[index:])
            box = (end - time.monotonic()) * part.weight / weights
            todo = [t for t in part.tasks(self.dry, self.store) if again or not self.store.done(t)]
            self.say(f"== {name}: {len(todo)} tasks, {box:.0f} s")
            if name == "tuning":
                todo = [self._with_compiled(t) for t in todo]
            started = time.monotonic()
            if self.workers:
                self.part(todo, started + box, part.quiet, part.wave)
            else:
                self.here(todo, started + box)
            if part.after is not None:
                part.after(self.store)
            self.say(f"== {name} took {time.monotonic() - started:.0f} s")

    def _with_compiled(self, task: Task) -> Task:
        """A tuning task is told what compiled, where candidates were compiled before."""
        shape = (task.args["op"], task.args["shape"])
        rows = [r for r in self.store.rows if "compiled" in r and (r["op"], r["shape"]) == shape]
        known = [dict(key=r["key"], config=r["config"], compiled=r["compiled"]) for r in rows]
        return task._replace(args=task.args | dict(compiled=known)) if known else task

    def here(self, tasks: Sequence[Task], end: float) -> None:
        """In this process, for dry runs."""
        for task in tasks:
            if time.monotonic() > end:
                self.finish(task, time.monotonic(), cut="not begun")
                continue
            started = time.monotonic()
            try:
                with worker.settings(task):
                    for row in worker.resolve(task):
                        if row is not None:
                            self.row(task, row)
            except Exception as error:
                self.row(task, worker.error_row(error))
            self.finish(task, started)

    def part(self, tasks: Sequence[Task], end: float, quiet: bool, most: int | None = None) -> None:
        pending, begun = deque(tasks), time.monotonic()
        filling = True  # a wave of tasks is being prepared
        while pending or any(w.task for w in self.workers):
            now = time.monotonic()
            if now > end:
                break
            active = [w for w in self.workers if w.task]
            if not active:
                filling, begun = True, now
            for one in self.workers[:most]:
                if pending and one.state == "idle" and (filling or not quiet):
                    one.give(pending.popleft())
            # Processes that still start join the wave as long as nobody measures.
            filling = filling and any(w.state in ("idle", "starting") for w in self.workers[:most]) and bool(pending)
            self.listen()
            late = begun + PREPARING * (end - begun)
            if most is not None:
                late = max(late, end - MEASURING * most)
            for one in self.workers:
                if quiet and one.state == "preparing" and time.monotonic() > late:
                    self.cut(one, "preparing")
                elif quiet and one.state == "measuring" and time.monotonic() - one.since > one.limit:
                    self.cut(one, "measuring")
            ready = [w for w in self.workers if w.state == "ready"]
            busy = [w for w in self.workers if w.state in ("preparing", "measuring")]
            if not quiet:
                for one in ready:
                    one.go()
            elif ready and not busy:
                filling = False
                min(ready, key=lambda w: tasks.index(w.task)).go()
        for one in self.workers:
            if one.task:
                self.cut(one, one.state)
        for task in pending:
            self.finish(task, time.monotonic(), cut="not begun")

    def listen(self) -> None:
        """Take what workers say for a moment."""
        pipes = {w.pipe: w for w in self.workers}
        for pipe in wait(list(pipes), timeout=0.2):
            one = pipes[pipe]  # type: ignore[index]
            try:
                while one.pipe.poll():
                    kind, content = one.pipe.recv()
                    self.heard(one, kind, content)
                    if kind == "lost":
                        return
            except (EOFError, OSError):
                if one.task:
                    one.process.join(5)
                    code = one.process.exitcode
                    self.row(one.task, dict(error=f"the process ended while {one.state} (exit code {code})"))
                    self.finish(one.task, one.since)
                self.replace(one)
                return

    def heard(self, one: Worker, kind: str, content: Any) -> None:
        if kind in ("ready", "hello"):
            one.enter("ready" if kind == "ready" else "idle")
        elif kind == "row" and one.task:
            self.row(one.task, content)
        elif kind in ("end", "lost"):
            if one.task:
                self.finish(one.task, one.since)
            one.task = None
            one.enter("idle")
            if kind == "lost":
                self.replace(one)

    def replace(self, one: Worker) -> None:
        one.stop()
        self.workers[self.workers.index(one)] = Worker()

    def cut(self, one: Worker, doing: str) -> None:
        if one.task:
            self.finish(one.task, one.since, cut=doing)
        self.replace(one)

    def row(self, task: Task, row: dict[str, Any]) -> None:
        self.say(brief(self.store.add(row, task, self.version(task))))

    def version(self, task: Task) -> str:
        """Of the code, not of what a tuning task is told."""
        if task.name not in self.versions:
            args = {k: v for k, v in task.args.items() if k != "compiled"}
            self.versions[task.name] = task._replace(args=args).version
        return self.versions[task.name]

    def finish(self, task: Task, since: float, cut: str = "") -> None:
        spent = time.monotonic() - since
        end = dict(cut=cut) if cut else dict(done=True)
        self.store.add(dict(end, seconds=round(spent, 1)), task, self.version(task))
        if cut and cut != "not begun":
            self.say(f"   CUT OFF after {spent:.0f} s {cut}: {task.name}")


def brief(row: dict[str, Any]) -> str:
    """One line for a screen."""
    words = [row["task"], *(str(row[n]) for n in ("form", "way", "mode", "config", "best") if row.get(n))]
    if "median_us" in row:
        words.append(f"{row['median_us']:.1f} us")
    if "images_per_s" in row:
        words.append(f"{row['images_per_s']:.0f} images/s")
    if "rate" in row:
        words.append(f"{row['rate'] / 1e12:.3g}e12 a second")
    if "worst" in row:
        words.append(f"{row['worst']:.2f} of what is allowed")
    if row.get("compiled") is False or row.get("reason"):
        words.append(f"no: {row['reason'][:60]}")
    if "error" in row:
        words.append(f"ERROR {row['error'][:150]!r}")
    return "  ".join(words)
