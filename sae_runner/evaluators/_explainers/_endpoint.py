"""A language model behind an OpenAI-compatible endpoint, asked over plain HTTP.

The key goes into one header of one request. It is never written, and where a server repeats it,
it is struck out. Redirects are not followed: they would carry it elsewhere.
"""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from typing import Any

LONGEST_REPLY = 2**20
"""Bytes of a response that are read."""
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP states that may pass."""
LONGEST_WAIT = 60.0
"""Seconds between two tries."""


class Unanswered(Exception):
    """No answer could be had; the message says why, in a few words."""


class Speaker(ABC):
    """Who can be asked."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        """Set to give up at once."""

    @abstractmethod
    def complete(self, prompt: str, max_tokens: int) -> str:
        """The answer to one question.

        Raises:
            Unanswered: none came, or none that says anything.
        """


class _Later(Exception):
    """What may pass; how long a server asks to wait."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint(Speaker):
    """Asks one model, again where that may help.

    Args:
        base_url: to which `/chat/completions` is added.
        model: its name there.
        key: sent as bearer token, or None.
        timeout: seconds for an answer.
        retries: further tries of a question.
        backoff: seconds before the second try; twice as many before each further one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None,
        *,
        timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        super().__init__()
        self.url, self.model, self._key = base_url.rstrip("/") + "/chat/completions", model, key
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._opener = urllib.request.build_opener(_NoRedirect)

    def complete(self, prompt: str, max_tokens: int) -> str:
        """See `Speaker.complete`."""
        why = "stopped"
        for attempt in range(self.retries + 1):
            if self.ended.is_set():
                break
            try:
                return self._post(prompt, max_tokens)
            except _Later as error:
                why = str(error)
                wait = max(self.backoff * 2**attempt, error.wait)
            if attempt < self.retries:
                self.ended.wait(min(wait, LONGEST_WAIT))
        raise Unanswered(why)

    def _post(self, prompt: str, max_tokens: int) -> str:
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}],
            "temperature": 0, "max_tokens": max_tokens,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = self._read(response)
        except urllib.error.HTTPError as error:
            error.close()
            why = f"HTTP {error.code}"
            if error.code in AGAIN:
                raise _Later(why, _seconds(error.headers.get("Retry-After"))) from None
            raise Unanswered(why) from None
        except TimeoutError:
            raise _Later(f"no answer within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            slow = isinstance(error.reason, TimeoutError)
            why = f"no answer within {self.timeout:g} s" if slow else "no connection"
            raise _Later(why) from None
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # A connection that breaks, a line that is no HTTP.
            raise _Later(f"{type(error).__name__} while reading") from None
        return self._content(raw)

    def _read(self, response: Any) -> bytes:
        """All of a response, within the time that it has: a server may trickle."""
        deadline, parts, size = time.monotonic() + self.timeout, list[bytes](), 0
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if time.monotonic() > deadline:
                raise TimeoutError
            if size > LONGEST_REPLY:
                raise ValueError
        return b"".join(parts)

    def _content(self, raw: bytes) -> str:
        try:
            text = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _Later("a response that is no chat completion")
        return text.replace(self._key, "***") if self._key else text


def _seconds(value: str | None) -> float:
    """`Retry-After` where it is a number of seconds."""
    return float(value) if value and value.isdigit() else 0.0
