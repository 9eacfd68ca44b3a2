"""A W&B server on this machine: it speaks what the client asks for, and keeps all it is told."""

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

KEY = "0123456789abcdef0123456789abcdef01234567"


class Request(NamedTuple):
    """What the client has sent."""

    method: str
    path: str
    authorization: str
    body: str


@dataclass
class Run:
    """What the server knows of a run; ``history`` by the line's place in the run's history."""

    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None


class WandbServer:
    """Runs by their id, and every request.

    ``answers``: ``ok``; ``500``; ``hang``; or ``hang later``, after the first request.
    """

    def __init__(self, url: str, answers: str) -> None:
        self.url, self.answers = url, answers
        self.runs: dict[str, Run] = {}
        self.requests: list[Request] = []
        self.closed = threading.Event()

    @property
    def hangs(self) -> bool:
        """Whether the next request gets no answer."""
        return self.answers == "hang" or (self.answers == "hang later" and bool(self.requests))

    def environment(self) -> dict[str, str]:
        """Return what a process needs to track online here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Return a run's history as W&B shows it: step and values, without the client's own."""
        found = []
        for _, line in sorted(self.runs[run_id].history.items()):
            values = {key: value for key, value in line.items() if not key.startswith("_")}
            found.append({"step": line["_step"]} | values)
        return found

    def answer(self, request: Request) -> Any:
        """Take note of a request and return the answer, as JSON."""
        self.requests.append(request)
        if request.path == "/graphql":
            asked = json.loads(request.body)
            return {"data": self._graphql(asked["query"], asked.get("variables") or {})}
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", request.path):
            self._stream(self.runs[match[1]], json.loads(request.body))
        if match := re.fullmatch(r"/storage/([^/]+)/(.+)", request.path):
            self.runs[match[1]].files[match[2]] = request.body
        return {}

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "P", "name": "align", "entity": {"id": "E", "name": "me"}}
        if "upsertBucket" in query:
            new = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], Run())
            run.facts |= {key: value for key, value in variables.items() if value is not None}
            config = json.loads(variables.get("config") or "{}")
            run.config |= {key: item["value"] for key, item in config.items()}
            bucket = self._bucket(variables["name"]) | {"project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "RunResumeStatus" in query:
            known = variables["name"] in self.runs
            return {
                "model": project | {"bucket": self._bucket(variables["name"]) if known else None}
            }
        if "createRunFiles" in query:
            folder = f"{self.url}/storage/{variables['run']}"
            files = [{"name": n, "uploadUrl": f"{folder}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "V", "entity": "me", "username": "me", "teams": {"edges": []}}}
        return {}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        config = {key: {"value": value} for key, value in run.config.items() if key != "_wandb"}
        lines = [json.dumps(line) for _, line in sorted(run.history.items())]
        return {
            "id": f"B-{run_id}",
            "name": run_id,
            "displayName": run.facts.get("displayName"),
            "description": None,
            "config": json.dumps(config),
            "sweepName": None,
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(lines[-1:]),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {}}),
        }

    def _stream(self, run: Run, sent: dict[str, Any]) -> None:
        history = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for i, line in enumerate(history["content"]):
            run.history[history["offset"] + i] = json.loads(line)
        for line in sent.get("files", {}).get("wandb-summary.json", {}).get("content", ()):
            run.summary |= json.loads(line)
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]


@contextlib.contextmanager
def wandb_server(answers: str = "ok") -> Iterator[WandbServer]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            text = body.decode("utf-8", "replace")
            authorization = self.headers.get("Authorization") or ""
            request = Request(self.command, self.path, authorization, text)
            if server.hangs:
                server.requests.append(request)
                server.closed.wait()
                return
            status = 500 if server.answers == "500" else 200
            answer = server.answer(request) if status == 200 else server.requests.append(request)
            sent = json.dumps(answer or {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_PUT = do_POST

        def log_message(self, *words: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # a client that is killed closes its connections
    server = WandbServer(f"http://127.0.0.1:{http.server_port}", answers)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        http.shutdown()
        http.server_close()
