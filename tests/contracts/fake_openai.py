"""A small OpenAI-compatible chat server on the loopback interface, for tests."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class State:
    """What the server saw, and how it shall behave."""

    def __init__(self):
        self.bodies, self.headers = [], []
        self.fail = []  # status codes of the next replies
        self.logprobs = True
        self.most_logprobs = 20
        self.refuses = {}  # setting → what the server says of it
        self.message = lambda body: {}  # more fields of the reply's message
        self.finish = "stop"
        self.tokens = None  # of the reply: lists of (token, probability), best first
        self.html = None  # a page in place of any reply, and its content type
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.say = lambda body: "No." if "effusion" in text_of(body) else "Yes, it is."
        self.wait = threading.Event()
        self.wait.set()


def text_of(body):
    return body["messages"][0]["content"][-1]["text"]


def listed_as(alternatives):
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in alternatives]
    return {**top[0], "top_logprobs": top}


@contextmanager
def serve():
    """(base_url, state) of a running server."""
    state = State()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            return None

        def reply(self, status, body):
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(raw)

        def page(self):
            self.send_response(200)
            self.send_header("Content-Type", state.html[1])
            self.send_header("Content-Length", str(len(state.html[0])))
            self.end_headers()
            self.wfile.write(state.html[0].encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.headers.append({k.lower(): v for k, v in self.headers.items()})
                failing = state.fail.pop(0) if state.fail else None
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            state.wait.wait(10)
            with state.lock:
                state.at_once -= 1
            if state.html:
                return self.page()
            if failing:
                return self.reply(failing, {"error": {"message": f"made to fail ({failing})"}})
            if body.get("logprobs") and not state.logprobs:
                return self.reply(400, {"error": {"message": "logprobs are not supported"}})
            if body.get("top_logprobs", 0) > state.most_logprobs:
                told = f"Invalid value for 'top_logprobs': must be <= {state.most_logprobs}."
                return self.reply(400, {"error": {"message": told, "param": "top_logprobs"}})
            for name in [name for name in state.refuses if name in body]:
                return self.reply(400, {"error": {"message": state.refuses[name]}})
            said = state.say(body)
            choice = {"index": 0, "finish_reason": state.finish}
            choice["message"] = {"role": "assistant", "content": said, **state.message(body)}
            if body.get("logprobs"):
                listed = [("Yes", 0.5), (" yes", 0.1), ("No", 0.2), ("The", 0.1)]
                top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in listed]
                choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
                if state.tokens:
                    choice["logprobs"] = {"content": [listed_as(one) for one in state.tokens]}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return self.reply(
                200,
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                    "usage": usage,
                },
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", state
    finally:
        state.wait.set()
        server.shutdown()
        server.server_close()
