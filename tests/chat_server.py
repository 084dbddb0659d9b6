"""A small local server that answers as an OpenAI-compatible endpoint does, or badly."""

import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers well, and as `mode` says: nonsense, html, empty, 500, 400, slow, flaky, redirect."""

    def __init__(self, mode="good"):
        self.mode, self.requests, self.headers, self.paths = mode, [], [], []
        self.n_failed, self.lock = 0, threading.Lock()
        self.spoil = lambda prompt: False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with server.lock:
                    server.requests.append(json.loads(body))
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                server.answer(self, server.requests[-1]["messages"][0]["content"])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answer(self, handler, prompt):
        mode = "nonsense" if self.spoil(prompt) else self.mode
        if mode == "flaky":
            with self.lock:
                self.n_failed += 1
                mode = "500" if self.n_failed % 2 else "good"
        if mode == "slow":
            time.sleep(2.0)
        status = int(mode) if mode.isdigit() else 302 if mode == "redirect" else 200
        text = {"nonsense": "purple, I think?"}.get(mode, well(prompt))
        if mode == "echo":
            text = f"{handler.headers['Authorization']} {text}"
        reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        data = {"html": b"<html>hello", "empty": b"{}"}.get(mode, json.dumps(reply).encode())
        try:
            handler.send_response(status)
            if status == 302:
                handler.send_header("Location", self.url + "/elsewhere")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # Whoever asked has gone.


def well(prompt):
    """What somebody says who understands: a latent is the token that is marked most often."""
    if "share" in prompt:
        marked = re.findall(r"<<([^>]*)>>", prompt)[1:]  # The first is the instruction's own.
        return "the token" + Counter(marked).most_common(1)[0][0]
    wanted = re.search(r"responds to: the token( \d+)", prompt)[1]
    if "JSON" in prompt:
        pieces = json.loads(prompt.splitlines()[-1])
        return str([10 if piece == wanted else 0 for piece in pieces])
    right = re.escape(wanted) + r"\b"
    if "right tokens" in prompt:
        right = r"<<( \d+)*" + right + r"( \d+)*>>"
    lines = re.findall(r"^(\d+)\. (.*)$", prompt, re.M)
    return ", ".join(n for n, line in lines if re.search(right, " " + line)) or "None"


@contextmanager
def serving(mode="good"):
    """A server that runs while the block does."""
    server = ChatServer(mode)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
