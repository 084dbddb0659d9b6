"""Questions to a language model: each asked once, kept on disk, within a budget.

Answers are lines of a JSONL file, written as they come, so that a killed run asks nothing again.
What could not be understood is not kept.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sae_runner.evaluators._explainers._endpoint import Speaker, Unanswered
from sae_runner.log import Progress

log = logging.getLogger("sae_runner")
Item = TypeVar("Item")
Result = TypeVar("Result")
Parsed = TypeVar("Parsed")
CHARACTERS_PER_TOKEN = 4
FAILURES_IN_A_ROW = 8
"""After so many questions without an answer nobody is there, and no more are asked."""


class Unparsed(Exception):
    """An answer came, and could not be understood."""


class OverBudget(Unanswered):
    """One more question would be too many."""


class Asking:
    """Asks a speaker, or remembers.

    Args:
        speaker: who is asked.
        identity: what decides an answer besides the question: model, version of the prompts.
        path: the file of answers; None to remember in memory alone.
        max_calls: questions of this run at most.
        max_tokens: of questions and answers together, by the estimate of `tokens`.
        concurrency: questions at a time.
    """

    def __init__(
        self,
        speaker: Speaker,
        identity: str,
        path: Path | None,
        *,
        max_calls: int,
        max_tokens: int,
        concurrency: int,
    ) -> None:
        self.speaker, self.identity, self.path = speaker, identity, path
        self.max_calls, self.max_tokens, self.concurrency = max_calls, max_tokens, concurrency
        self.n_calls = self.n_tokens = self.n_unparsed = self.n_in_a_row = 0
        self.why: str = ""
        """The last reason why a question stayed without an answer."""
        self._lock = threading.Lock()
        self.known = {} if path is None or not path.is_file() else _read(path)

    def key(self, prompt: str, max_tokens: int) -> str:
        """What an answer is remembered by."""
        text = json.dumps([self.identity, prompt, max_tokens])
        return hashlib.sha256(text.encode()).hexdigest()

    def knows(self, prompt: str, max_tokens: int) -> bool:
        """Whether asking would cost nothing."""
        return self.key(prompt, max_tokens) in self.known

    def ask(self, prompt: str, max_tokens: int, parse: Callable[[str], Parsed | None]) -> Parsed:
        """The answer as `parse` understands it.

        Raises:
            Unanswered: there is none, or the budget is spent.
            Unparsed: `parse` gave None.
        """
        key = self.key(prompt, max_tokens)
        reply = self.known.get(key)
        if reply is None:
            self._spend(tokens(prompt) + max_tokens)
            try:
                reply = self.speaker.complete(prompt, max_tokens)
            except Unanswered as error:
                with self._lock:
                    self.n_in_a_row += 1
                    self.why = str(error)
                raise
            self.n_in_a_row = 0
        parsed = parse(reply)
        if parsed is None:
            with self._lock:
                self.n_unparsed += 1
            raise Unparsed
        self._keep(key, reply)
        return parsed

    def _spend(self, n: int) -> None:
        with self._lock:
            if self.n_in_a_row >= FAILURES_IN_A_ROW:
                raise Unanswered(self.why)
            if self.n_calls + 1 > self.max_calls:
                self.why = f"backend.max_calls={self.max_calls} is spent"
                raise OverBudget(self.why)
            if self.n_tokens + n > self.max_tokens:
                self.why = f"backend.max_tokens={self.max_tokens} is spent"
                raise OverBudget(self.why)
            self.n_calls += 1
            self.n_tokens += n

    def _keep(self, key: str, reply: str) -> None:
        with self._lock:
            if key in self.known:
                return
            self.known[key] = reply
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "reply": reply}) + "\n")

    def each(
        self, what: str, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Result]:
        """`work` of every item, several at a time, in the order of the items."""
        pool = ThreadPoolExecutor(self.concurrency)

        def counted(item: Item) -> Result:
            result = work(item)
            with self._lock:
                progress.advance(1)
            return result

        with Progress(what, len(items), "latents") as progress:
            try:
                return list(pool.map(counted, items))
            except BaseException:
                self.speaker.ended.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)


def tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _read(path: Path) -> dict[str, str]:
    """Answers of earlier runs; the end of a line that was being written is passed over."""
    found: dict[str, str] = {}
    text = path.read_text(errors="replace")
    for line in text.splitlines():
        try:
            record: Any = json.loads(line)
            found[record["key"]] = record["reply"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s: a line that is no answer is passed over", path)
    if text and not text.endswith("\n"):
        with path.open("a") as file:
            file.write("\n")
    return found
