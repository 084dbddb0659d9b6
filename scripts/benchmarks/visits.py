"""Processes that each do one kind of work when they are visited, one at a time.

Each has a peak memory of its own, and all have the same allocator settings. A process is a module
with `prepare(options) -> work`, where `work()` gives what a visit is answered with, as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPTS = Path(__file__).parents[1]


class Visited:
    """A process that waits for its next visit.

    Args:
        module: of this package; its `prepare` is called in the process.
        options: what `prepare` is given; must go through JSON.
        keeps: whether the allocator keeps what it once had, as it does in `sae-run`.
    """

    def __init__(self, module: str, options: dict[str, Any], *, keeps: bool = True) -> None:
        found = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found)}
        self.name = f"{module} {json.dumps(options)}"
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.visits", module, json.dumps(options),
                *(["keeps"] if keeps else []),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self._answer()  # That it is ready: one at a time is.

    def visit(self) -> Any:
        """Let it work, and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate()
            sys.exit(f"{self.name}: exit code {self.process.returncode}")
        return json.loads(line)

    def __enter__(self) -> "Visited":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.kill()  # It holds nothing that is worth a farewell.
        self.process.communicate()


def wait_for_visits(prepare: Callable[[dict[str, Any]], Callable[[], Any]], options: str) -> None:
    """Answer a line on standard input with a line on standard output, until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Whatever else is printed is no answer.
    work = prepare(json.loads(options))
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(work()), file=answers, flush=True)


if __name__ == "__main__":
    import importlib

    from sae_runner.allocator import keep_pages

    if "keeps" in sys.argv:
        keep_pages()
    wait_for_visits(importlib.import_module(f"benchmarks.{sys.argv[1]}").prepare, sys.argv[2])
