"""What `python -m vllm.entrypoints.cli.main serve MODEL ...` is to replay, from the standard library alone.

FAKE_VLLM_LOG   file that the arguments and the environment are written to
FAKE_VLLM_MODE  "die": end while starting; "slow": never be ready; "refuse": answer no request
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = sys.argv[2]
KEPT = ("CUDA_VISIBLE_DEVICES", "VLLM_NO_USAGE_STATS", "WATTRACE_STEPS", "VLLM_API_KEY")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/health":
            self.answer(503 if os.environ.get("FAKE_VLLM_MODE") == "slow" else 200, b"")
        elif self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": MODEL, "max_model_len": 4096}]}).encode())
        else:
            self.answer(404, b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("FAKE_VLLM_MODE") == "refuse":
            self.answer(400, b"out of order")
            return
        events = []
        for i in range(1, body["max_tokens"] + 1):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": i}
            finish = "length" if i == body["max_tokens"] else None
            events.append({"choices": [{"index": 0, "text": "x", "finish_reason": finish}], "usage": usage})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.answer(200, text.encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    if os.environ.get("FAKE_VLLM_MODE") == "die":
        sys.stdout.write("Loading weights\nRuntimeError: CUDA out of memory\n[rank0] shutting down\n")
        sys.exit(1)
    if log := os.environ.get("FAKE_VLLM_LOG"):
        kept = {name: os.environ.get(name) for name in KEPT}
        Path(log).write_text(json.dumps({"argv": sys.argv[1:], "env": kept, "path": os.environ.get("PYTHONPATH")}))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
