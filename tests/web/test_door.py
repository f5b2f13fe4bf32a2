"""Who comes in, and to what: no file of the server but the gallery's pictures, no address that is not listed, the password."""

import asyncio
import os
import socket

import httpx
import pytest
from PIL import Image
from web.calling import generate

FILE = "/gradio_api/file="


@pytest.fixture(scope="module")
def secret(served, tmp_path_factory):
    """A file that nobody may have."""
    path = tmp_path_factory.mktemp("secret") / "secret.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def raw(url: str, target: str) -> bytes:
    """The answer to a request for a target that no client would leave as it is."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while more := connection.recv(65536):
            data += more
    return data


def test_files_of_the_server_cannot_be_read(served, secret):
    folder = served.studio.gallery.folder
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "blue").save(folder / "mine.png")
    (folder / "link.png").symlink_to(secret)
    (folder / "deeper").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "blue").save(folder / "deeper" / "in.png")
    (folder / "text.txt").write_text("hidden")
    os.mkfifo(folder / "pipe.png")
    (served.uploads / "out.png").symlink_to(secret)
    assert httpx.get(f"{served.url}/pictures/mine.png").content == (folder / "mine.png").read_bytes()
    up = os.path.relpath(secret, folder)
    tried = [
        "/pictures/link.png", "/small/link.png", "/pictures/pipe.png", "/pictures/text.txt", "/pictures/deeper/in.png",
        "/pictures/deeper%2fin.png", f"/pictures/{up}", f"/pictures/{up.replace('/', '%2f')}", f"/pictures/{up.replace('.', '%2e')}",
        f"/pictures/{str(secret).replace('/', '%2f')}", f"/pictures/{secret}", "/pictures/..%2fmine.png", "/pictures/mine.png%00",
        "/pictures/.hidden.png", "/pictures/", "/pictures", f"{FILE}{secret}", f"{FILE}/{secret}", f"{FILE}{folder}/mine.png",
        f"{FILE}{served.uploads}/../{secret.parent.name}/secret.png", f"{FILE}{served.uploads}/out.png", f"{FILE}{served.uploads}",
        f"{FILE}/etc/passwd", f"{FILE}etc/passwd", f"{FILE}../../../../../../etc/passwd", f"{FILE}%2fetc%2fpasswd",
        f"{FILE}file:///etc/passwd",
        f"{FILE}/proc/self/environ", f"{FILE}http://localhost/", "/gradio_api/proxy=http://localhost/", "/gradio_api/file/etc/passwd",
        "/static/../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd", "//etc/passwd", "/svelte/../../../../etc/passwd", "/..%2f..%2fetc/passwd", f"/{secret}",
    ]  # fmt: skip
    private = (secret.read_bytes(), (folder / "deeper" / "in.png").read_bytes(), b"root:", b"hidden", b"PATH=")
    for target in tried:
        answer = raw(served.url, target)
        assert b" 200 " not in answer.split(b"\r\n", 1)[0], target
        assert not any(each in answer for each in private), target
    (folder / "pipe.png").unlink()
    assert generate(served.url)[0] == "complete"


@pytest.mark.parametrize(
    "path",
    ["/monitoring", "/monitoring/summary", "/gradio_api/vibe-code", "/gradio_api/runs", "/gradio_api/openapi.json", "/docs",
     "/openapi.json", "/gradio_api/run-history/buckets", "/gradio_api/dev/reload", "/gradio_api/token", "/gradio_api/deep_link",
     "/gradio_api/profiling/traces"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(served, path):
    assert httpx.get(f"{served.url}{path}").status_code == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "ODD"])
def test_other_methods_are_not_there(served, method):
    assert httpx.request(method, served.url).status_code in (404, 405)


def test_other_peoples_uploads_cannot_be_read(served):
    with httpx.Client(base_url=served.url) as mine, httpx.Client(base_url=served.url) as other:
        mine.get("/"), other.get("/")
        path = mine.post("/gradio_api/upload", files={"files": ("me.png", b"private words")}).json()[0]
        assert mine.get(f"{FILE}{path}").content == b"private words"
        for spelling in (path, f"/{path}", path.replace("/me.png", "/./me.png"), path.replace("/", "%2f")):
            assert other.get(f"{FILE}{spelling}").status_code == 404
            assert httpx.get(f"{served.url}{FILE}{spelling}").status_code == 404
        unknown = httpx.post(f"{served.url}/gradio_api/upload", files={"files": ("p.png", b"of a program")}).json()[0]
        assert other.get(f"{FILE}{unknown}").status_code == 404
    assert served.uploads.stat().st_mode & 0o077 == 0


def test_other_sites_cannot_ask_for_anything(served):
    data = {"data": ["a cat"]}
    where = f"{served.url}/gradio_api/call/generate"
    assert httpx.post(where, json=data, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.post(where, json=data, headers={"origin": "null"}).status_code == 403
    assert httpx.get(served.url, headers={"host": "evil.example"}).status_code == 403  # a name of theirs for this machine
    assert httpx.post(where, json=data, headers={"origin": served.url}).status_code == 200
    answer = httpx.get(served.url)
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"] and "access-control-allow-origin" not in answer.headers


def test_a_password_is_asked_for_before_anything(serving):
    from gradio_client import Client

    closed = serving(password="ünguessable", steps=4)
    with httpx.Client(base_url=closed.url) as visitor:
        assert "password" in visitor.get("/").text and "gradio" not in visitor.get("/").text
        for path in ("/config", "/gradio_api/info", "/pictures/a.png", "/theme.css", "/gradio_api/heartbeat/x", f"{FILE}/etc/passwd"):
            assert visitor.get(path).status_code == 401
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/cancel"):
            assert visitor.post(path).status_code == 401
        for wrong in ({"password": "guess"}, {}, {"password": "ünguessable "}, {"username": "ünguessable"}):
            assert visitor.post("/login", data=wrong).status_code == 401
        assert visitor.get("/config").status_code == 401
        assert httpx.get(f"{closed.url}/config", headers={"cookie": "latentfm-pass=x"}).status_code == 401
        answer = visitor.post("/login", data={"password": "ünguessable"})
        assert answer.status_code == 200 and "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
        assert visitor.get("/config").status_code == 200
    client = Client(closed.url, auth=("anyone", "ünguessable"), verbose=False)
    assert len(client.predict("a cat", steps="1", api_name="/generate")) == 1


def test_nothing_is_sent_to_gradio_or_anywhere(served):
    page = httpx.get(served.url).text
    config = httpx.get(f"{served.url}/config").json()
    assert config["analytics_enabled"] is False and not config.get("run_history")
    loaded = [part.split('"')[0] for tag in ('src="', 'link rel="stylesheet" href="') for part in page.split(tag)[1:]]
    assert loaded and not [each for each in loaded if each.startswith(("http", "//"))]


def test_passwords_cannot_be_tried_by_the_thousand(tmp_path):
    from latentfm.web.door import Door

    door = Door(None, "secret", False, tmp_path, 1000)

    async def tried(password):
        said = []

        async def receive():
            return {"type": "http.request", "body": f"password={password}".encode()}

        async def send(message):
            said.append(message)

        await door({"type": "http", "path": "/login", "method": "POST", "headers": []}, receive, send)
        return said[0]["status"]

    async def all_at_once():
        return await asyncio.gather(*(tried(f"guess{number}") for number in range(24)))

    codes = asyncio.run(all_at_once())
    assert codes.count(401) == 8 and codes.count(429) == 16
    assert asyncio.run(tried("secret")) == 200
