"""A server on loopback that speaks Gemini's generateContent and OpenAI's chat completions, as scripted.

with FakeLLM() as server:
    server.script(Say(status=429, headers={"Retry-After": "3"}))  # the next reply; then the default again
    config = {"backend": "gemini", "base_url": server.url}         # of openai: server.openai_url
    ...
    assert len(server.asked) == 2
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Say:
    """How the server replies to one request. By default it answers what the prompt asks for."""

    text: str | Callable[[dict], str] | None = None  # of the model; a function of the prompt's JSON
    delay: float = 0.0  # seconds before the reply
    drip: float = 0.0  # seconds between the bytes of the body
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # the raw body, in place of the API's own form
    die: str = ""  # "before" any byte or in the "middle" of the body, the connection is closed
    finish: str = "STOP"  # why the model stopped: STOP or MAX_TOKENS


@dataclass
class Asked:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    raw: bytes
    body: Any  # its JSON
    prompt: Any  # the JSON document in it: actions, subgoals, situations; None where there is none


def good_answer(prompt: dict) -> dict:
    """What a well-behaved model says: it prefers the first action, and gives all that is asked for."""
    answers = []
    for situation in prompt["situations"]:
        first = prompt["actions"][0]
        said: dict[str, Any] = {"number": situation["number"], "confidence": 0.75}
        if "prior" in situation["give"]:
            said["action_prior"] = {"logits": {name: float(name == first) for name in prompt["actions"]}}
        if "features" in situation["give"]:
            said["features"] = [0.5] * prompt["features"]
        if "plan" in situation["give"]:
            said["plan"] = [first, first]
        if "skills" in situation["give"]:
            skill = {"name": "twice", "description": "the first action, twice", "confidence": 0.9}
            said["skills"] = [{**skill, "primitive_actions": [first, first], "expected_duration": 2}]
        answers.append(said)
    return {"answers": answers}


def retry_info(seconds: str) -> bytes:
    """Gemini's body of a 429 that says when to come back, as `7s`."""
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": seconds}
    error = {"code": 429, "message": "Quota exceeded", "status": "RESOURCE_EXHAUSTED", "details": [info]}
    return json.dumps({"error": error}).encode()


class FakeLLM:
    """The server. `stop` and `start` take it down and up again, on the same port."""

    def __init__(self, default: Say | None = None):
        self.default = default or Say()
        self.asked: list[Asked] = []
        self.models = ["fake-model"]  # of GET /models
        self._script: deque[Say] = deque()
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def script(self, *replies: Say) -> None:
        """The next replies, one each."""
        with self._lock:
            self._script.extend(replies)

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.fake = self
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections from here on; those that are open are cut."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.cut()

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def take(self, asked: Asked) -> Say:
        with self._lock:
            self.asked.append(asked)
            return self._script.popleft() if self._script else self.default


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args: Any):
        self.open: set[Any] = set()
        super().__init__(*args)

    def cut(self) -> None:
        for connection in list(self.open):
            _close(connection)

    def handle_error(self, *_: Any) -> None:
        """A client that went away is none of ours."""


def _close(connection: Any) -> None:
    try:
        connection.shutdown(2)
    except OSError:
        return  # closed by the other side before


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds back the body for 40 ms

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        asked = Asked(self.path, dict(self.headers), b"", None, None)
        say = self.server.fake.take(asked)
        listed = {"object": "list", "data": [{"id": name} for name in self.server.fake.models]}
        self.reply(say, say.body if say.body is not None else json.dumps(listed).encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw)
        if "contents" in body:
            text = body["contents"][0]["parts"][0]["text"]
        else:
            text = body["messages"][-1]["content"]
        asked = Asked(self.path, dict(self.headers), raw, body, json.loads(text))
        say = self.server.fake.take(asked)
        time.sleep(say.delay)
        self.reply(say, say.body if say.body is not None else self.api_body(say, asked))

    def api_body(self, say: Say, asked: Asked) -> bytes:
        if say.status != 200:
            return json.dumps({"error": {"code": say.status, "message": "as scripted"}}).encode()
        text = say.text(asked.prompt) if callable(say.text) else say.text
        text = json.dumps(good_answer(asked.prompt)) if text is None else text
        if self.path.endswith(":generateContent"):
            reply = {
                "candidates": [
                    {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": say.finish}
                ],
                "usageMetadata": {
                    "promptTokenCount": 100,
                    "candidatesTokenCount": 20,
                    "totalTokenCount": 125,
                },
            }
        elif self.path.endswith("/chat/completions"):
            finish = {"STOP": "stop", "MAX_TOKENS": "length"}[say.finish]
            message = {"role": "assistant", "content": text}
            reply = {
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 25, "total_tokens": 125},
            }
        else:
            return json.dumps({"error": {"code": 404, "message": f"no {self.path}"}}).encode()
        return json.dumps(reply).encode()

    def reply(self, say: Say, body: bytes) -> None:
        self.close_connection = bool(say.die) or self.close_connection
        if say.die == "before":
            return _close(self.connection)
        self.send_response(say.status)
        for name, value in {"Content-Type": "application/json", **say.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for place in range(len(body) if say.drip else 0):
            self.wfile.write(body[place : place + 1])
            time.sleep(say.drip)
        if not say.drip:
            self.wfile.write(body[: len(body) // 2] if say.die == "middle" else body)
        self.wfile.flush()
        if say.die == "middle":
            _close(self.connection)
