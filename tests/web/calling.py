"""How the tests call the page's endpoint: as plain HTTP, so that anything at all can be sent."""

import json

import httpx

NAMES = ("prompt", "negative", "size", "steps", "guidance", "guidance_rule", "solver", "schedule", "seed", "count", "model", "lora",
         "lora_strength", "image", "mask", "strength")  # fmt: skip
FILE = {"meta": {"_type": "gradio.FileData"}}
USUAL = {"prompt": "a cat", "negative": "", "size": "", "steps": "1", "guidance": "1", "guidance_rule": "cfg", "solver": "own",
         "schedule": "model", "seed": 3, "count": 1, "model": None, "lora": None, "lora_strength": 1.0, "image": None, "mask": None,
         "strength": None}  # fmt: skip


def sse(answer: httpx.Response) -> tuple[str, object]:
    """The last event of a stream, and its data."""
    events = [block.split("\n", 1) for block in answer.text.strip().split("\n\n") if block.startswith("event: ")]
    last = [each for each in events if "heartbeat" not in each[0]][-1]
    return last[0].removeprefix("event: "), json.loads(last[1].removeprefix("data: "))


def call(url: str, data: object, name: str = "generate", raw: bytes | None = None) -> tuple[str, object]:
    """What came of a request as plain HTTP sends it: "complete" and pictures, "error" and why, or the status that refused it."""
    body = raw if raw is not None else json.dumps({"data": data}, allow_nan=True).encode()
    answer = httpx.post(f"{url}/gradio_api/call/{name}", content=body, headers={"content-type": "application/json"}, timeout=60)
    if answer.status_code != 200:
        return str(answer.status_code), answer.text
    return sse(httpx.get(f"{url}/gradio_api/call/{name}/{answer.json()['event_id']}", timeout=120))


def generate(url: str, **values) -> tuple[str, object]:
    return call(url, [(USUAL | values)[name] for name in NAMES])


def sent(url: str, data: bytes, name: str = "p.png") -> dict:
    """A file sent in, as a parameter."""
    path = httpx.post(f"{url}/gradio_api/upload", files={"files": (name, data)}, timeout=60).json()[0]
    return {"path": path} | FILE
