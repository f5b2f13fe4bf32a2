"""Who comes in, and to what: the few addresses that the page needs, from its own origin, with the password where there is one.

Gradio has many more (proxies, monitoring, editing by models, histories elsewhere); whatever is not listed here is not there.
"""

import asyncio
import hashlib
import hmac
import json
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from starlette.requests import ClientDisconnect

Scope = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]

GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(static|assets|svelte)/.*|/(pictures|small)/[^/]+"
    r"|/gradio_api/(info/?|queue/data|heartbeat/\w+|upload_progress|call/(v2/)?\w+/\w+|file=.*|startup-events|theme\.css|app_id/?|login_check/?)"
)
POST = re.compile(r"/gradio_api/(queue/join|cancel|reset/?|upload|component_server/?|call/(v2/)?\w+/?|(run|api)/\w+/?)")
FILE = "/gradio_api/file="
AT_ONCE = 8  # wrong passwords a second
FOREVER = 4096  # uploads whose owner is remembered
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; object-src 'none'; "
    "frame-ancestors 'self'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")
VISITOR, PASS = "latentfm-visitor", "latentfm-pass"
LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>latentfm</title>
<style>:root{color-scheme:light dark}body{font:16px system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0}
form{display:grid;gap:12px;width:min(300px,80vw)}input,button{font:inherit;padding:10px;border-radius:8px;border:1px solid #8888}
button{background:#4f46e5;color:#fff;border:0}p{margin:0;color:#c2410c}</style>
<form method="post" action="login"><label for="password">Password</label>
<input id="password" name="password" type="password" autofocus autocomplete="current-password">WRONG<button>Enter</button></form></html>"""


class Door:
    """An ASGI application before another one.

    password: None lets everybody in. local: only names of this machine are answered to, so that no page elsewhere can speak to a server on
    it under a name of its own (DNS rebinding). uploads: the folder of what is sent in. most: bytes of a request.
    """

    def __init__(self, app: App, password: str | None, local: bool, uploads: Path, most: int):
        self.app, self.local, self.uploads, self.most = app, local, uploads.resolve(), most
        self.digest = None if password is None else digest(password)
        self.token = secrets.token_urlsafe(32)
        self.owners: OrderedDict[str, str] = OrderedDict()
        self.waiting = 0  # wrong passwords that are being answered

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path, method, headers = scope["path"], scope["method"], dict(scope["headers"])
        cookies = cookies_of(headers)
        if self.local and host_of(headers.get(b"host", b"")) not in LOOPBACK:
            return await answer(send, 403, "this server answers to localhost alone")
        if method == "POST" and (origin := headers.get(b"origin")) and not same_origin(origin, headers):
            return await answer(send, 403, "requests from other sites are refused")
        if int_of(headers.get(b"content-length", b"0")) > self.most:
            return await answer(send, 413, f"more than {self.most:,} bytes, the most that is taken here")
        if path == "/login" and self.digest is not None:
            return await self.login(method, receive, send)
        if self.digest is not None and not hmac.compare_digest(cookies.get(PASS, "").encode(), self.token.encode()):
            if path == "/":
                return await answer(send, 200, page_of(""), "text/html")
            return await answer(send, 401, "a password is needed: POST /login")
        listed = {"GET": GET, "HEAD": GET, "POST": POST}.get(method)
        if listed is None or not listed.fullmatch(path):
            return await answer(send, 404, "there is nothing here")
        visitor = cookies.get(VISITOR) or secrets.token_urlsafe(16)
        if path.startswith(FILE) and not self.is_own(path.removeprefix(FILE), visitor):
            return await answer(send, 404, "there is nothing here")
        new = [] if VISITOR in cookies or path != "/" else [cookie(VISITOR, visitor)]
        if path == "/gradio_api/upload":
            send = self.noting(send, visitor if VISITOR in cookies else "")
        with suppress(ClientDisconnect):  # whoever asked has gone
            await self.app(scope, bounded(receive, self.most), with_headers(send, HEADERS + new))

    def is_own(self, path: str, visitor: str) -> bool:
        """Whether a file is one that the visitor has sent in, or that was made for the page: a regular one in the folder of uploads."""
        try:
            found = Path(path).resolve(strict=True)
            inside = found.is_relative_to(self.uploads) and found.is_file() and Path(os.path.abspath(path)) == found
        except (OSError, ValueError, RuntimeError):
            return False
        return inside and self.owners.get(str(found), visitor) == visitor

    def noting(self, send: Callable, visitor: str) -> Callable:
        """`send`, which notes whose the files are that an answer names."""
        body = bytearray()

        async def noted(message: dict) -> None:
            if message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    for path in paths_in(bytes(body)):
                        self.owners[str(Path(path).resolve())] = visitor
                        while len(self.owners) > FOREVER:
                            self.owners.popitem(last=False)
            await send(message)

        return noted

    async def login(self, method: str, receive: Callable, send: Callable) -> None:
        """Gives who knows the password the cookie that lets in; whoever does not waits a second, AT_ONCE of them at a time."""
        if method != "POST":
            return await answer(send, 200, page_of(""), "text/html")
        given = parse_qs((await body_of(receive, 10_000)).decode("utf-8", "replace"), keep_blank_values=True).get("password", [""])[0]
        if self.waiting >= AT_ONCE:  # or thousands would be tried in a second
            return await answer(send, 429, page_of("<p role=alert>Too many try at once; try again.</p>"), "text/html")
        if not hmac.compare_digest(digest(given), self.digest):
            self.waiting += 1
            try:
                await asyncio.sleep(1)
            finally:
                self.waiting -= 1
            return await answer(send, 401, page_of("<p role=alert>That is not it.</p>"), "text/html")
        await answer(send, 200, '<meta http-equiv="refresh" content="0;url=./">', "text/html", [cookie(PASS, self.token)])


def digest(password: str) -> bytes:
    """What passwords are compared by: of one length, whatever theirs."""
    return hashlib.sha256(password.encode("utf-8", "surrogateescape")).digest()


def page_of(wrong: str) -> str:
    return LOGIN.replace("WRONG", wrong)


def cookie(name: str, value: str) -> tuple[bytes, bytes]:
    return b"set-cookie", f"{name}={value}; Path=/; HttpOnly; SameSite=Strict".encode()


def cookies_of(headers: dict[bytes, bytes]) -> dict[str, str]:
    """The cookies of a request; none where they are no cookies."""
    try:
        return {name: found.value for name, found in SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).items()}
    except CookieError:
        return {}


def host_of(header: bytes) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


def same_origin(origin: bytes, headers: dict[bytes, bytes]) -> bool:
    """Whether an Origin header names the host that was asked, as it or a proxy before it is called."""
    try:
        place = urlsplit(origin.decode("latin-1")).netloc
    except ValueError:
        return False
    return place in {headers.get(name, b"").decode("latin-1") for name in (b"host", b"x-forwarded-host")} - {""}


def int_of(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) < 20 else 0


def paths_in(body: bytes) -> list[str]:
    """The texts of a JSON list; none of anything else."""
    try:
        found = json.loads(body)
    except ValueError:
        return []
    return [unquote(each) if "%" in each else each for each in found if isinstance(each, str)] if isinstance(found, list) else []


async def body_of(receive: Callable, most: int) -> bytes:
    """The first bytes of a request's body."""
    body, more = b"", True
    while more and len(body) < most:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body[:most]


def bounded(receive: Callable, most: int) -> Callable:
    """`receive`, which hangs up on a request that goes on beyond `most` bytes, whatever its header said."""
    taken = 0

    async def receiving() -> dict:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= most else {"type": "http.disconnect"}

    return receiving


def with_headers(send: Callable, more: list[tuple[bytes, bytes]]) -> Callable:
    """`send`, with further headers."""

    async def sending(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", []), *more]}
        await send(message)

    return sending


async def answer(
    send: Callable, status: int, text: str, kind: str = "text/plain", more: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Sends a whole answer."""
    headers = [(b"content-type", f"{kind}; charset=utf-8".encode()), *HEADERS, *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
