"""A small OpenAI-compatible server around the tests' model, which answers as vLLM does, or as lesser servers do."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from ropewalk.engine.sampling import SamplingParams


class Served(ThreadingHTTPServer):
    """Serves `model` under `names`.

    Attributes:
        tells: "prompt_logprobs" (and echo, as vLLM), "echo", or "nothing" about the prompt's tokens.
        limit: tokens of prompt and answer together; None does not say, and takes all.
        troubles: statuses with which the next completions are answered instead.
        left: completions until the server dies; None is forever.
        asked: the bodies of all completions.
        keys: what Authorization said in all requests.
    """

    daemon_threads = True

    def __init__(self, model, port=0, *, names=("tiny",), tells="prompt_logprobs", limit=None, troubles=(), left=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.names, self.tells, self.limit, self.left = model, names, tells, limit, left
        self.troubles, self.asked, self.keys = list(troubles), [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that go away are no news."""

    def models(self):
        return {"data": [{"id": name, **({"max_model_len": self.limit} if self.limit else {})} for name in self.names]}

    def complete(self, body):
        """Status and answer."""
        ids, new = body["prompt"], body["max_tokens"]
        assert all(isinstance(token, int) for token in ids), "token ids, never text"
        assert body["temperature"] == 0
        assert body["model"] in self.names
        if self.limit is not None and len(ids) + new > self.limit:
            message = f"This model's maximum context length is {self.limit} tokens."
            return 400, {"error": {"message": message, "code": 400}}
        with torch.inference_mode():
            laws = self.model.hf(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        params = SamplingParams(max_new_tokens=new, temperature=0)
        choice = {"index": 0, "text": self.model.generate_ids(ids, params).text if new > 1 else "", "logprobs": None}
        if self.tells == "prompt_logprobs":
            choice["prompt_logprobs"] = self.by_id(ids, laws) if body.get("prompt_logprobs") is not None else None
        if self.tells != "nothing" and body.get("echo"):
            choice["logprobs"] = self.by_place(ids, laws, body["logprobs"])
        return 200, {"object": "text_completion", "choices": [choice]}

    def by_id(self, ids, laws):
        """vLLM's form: the prompt's own token, then the likeliest."""
        places = [None]
        for law, token in zip(laws, ids[1:], strict=False):
            place = {}
            for one in (token, int(law.argmax())):
                rank = int((law > law[one]).sum()) + 1
                text = self.model.tokenizer.decode([one])
                place[str(one)] = {"logprob": float(law[one]), "rank": rank, "decoded_token": text}
            places.append(place)
        return places

    def by_place(self, ids, laws, top):
        """OpenAI's form, with the token that is written behind the prompt."""
        assert top == 1
        after = [*ids[1:], int(laws[-1].argmax())]
        nats = [float(law[token]) for law, token in zip(laws, after, strict=True)]
        tops = [{self.model.tokenizer.decode([int(law.argmax())]): float(law.max())} for law in laws]
        tokens = [self.model.tokenizer.decode([token]) for token in [ids[0], *after]]
        return {"tokens": tokens, "token_logprobs": [None, *nats], "top_logprobs": [None, *tops]}


class Handler(BaseHTTPRequestHandler):
    server: Served

    def log_message(self, *arguments):
        """Quiet."""

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        if self.path == "/v1/models":
            self.answer(200, self.server.models())
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.keys.append(self.headers["Authorization"])
        if server.troubles:
            return self.answer(server.troubles.pop(0), {"error": {"message": "busy with something else"}})
        if server.left == len(server.asked):
            server.socket.close()  # from here on nobody listens, and this request gets no answer
            return self.connection.close()
        server.asked.append(body)
        return self.answer(*server.complete(body))

    def answer(self, status, body):
        said = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@contextmanager
def serving(model, **options):
    server = Served(model, **options)
    thread = threading.Thread(target=serve, args=(server,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def serve(server):
    try:
        server.serve_forever(poll_interval=0.01)
    except ValueError:
        """Its socket was closed: it has died, as the test wanted."""
