"""A stand-in for wandb's server on the loopback, for the requests of wandb's own client: runs, and the rows of each."""

from __future__ import annotations

import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

KEY = "0123456789" * 4


class WandbServer(ThreadingHTTPServer):
    """A server that runs until it is closed.

    Attributes:
        histories: The rows of each run by its id, as the client has sent them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.histories: dict[str, list[dict]] = {}
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point wandb to this server, with a key."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": KEY}

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        if self.path == "/graphql":
            asked = json.loads(content)
            self._answer({"data": self._look_up(asked["operationName"], asked.get("variables", {}))})
        elif self.path.endswith("/file_stream"):
            self._take(self.path.split("/")[-2], json.loads(content).get("files", {}))
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({})

    def _take(self, run: str, files: dict) -> None:
        """Keep rows at the offset that the client gives, as wandb's server does: rows sent again replace those before."""
        if rows := files.get("wandb-history.jsonl"):
            kept = self.server.histories[run][: rows["offset"]]
            self.server.histories[run] = kept + [json.loads(row) for row in rows["content"]]

    def _look_up(self, operation: str, variables: dict) -> dict:
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": "me"}}
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            known = variables["name"] in self.server.histories
            return {"model": {**project, "bucket": self._bucket(variables["name"]) if known else None}}
        if operation == "UpsertBucket":
            inserted = variables["name"] not in self.server.histories
            self.server.histories.setdefault(variables["name"], [])
            return {
                "upsertBucket": {
                    "bucket": {**self._bucket(variables["name"]), "project": project},
                    "inserted": inserted,
                }
            }
        if operation == "CreateRunFiles":
            url = f"{self.server.environment['WANDB_BASE_URL']}/upload"
            files = [{"name": name, "uploadUrl": url} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, run: str) -> dict:
        rows = self.server.histories.get(run, [])
        return {
            "id": "1",
            "name": run,
            "displayName": run,
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',  # the run has begun
        }

    def _answer(self, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
