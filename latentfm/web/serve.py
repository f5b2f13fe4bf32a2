"""The page as a server: our own addresses before Gradio's, the door before both, on this machine's own address unless told otherwise."""

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from latentfm.errors import InputError
from latentfm.words import shown

TRIED = 10  # ports, where none was asked for
HERE = Path(__file__).parent


@contextmanager
def private_uploads() -> Iterator[Path]:
    """A context with the folder that is sent in goes to: its own, for the owner alone, gone afterwards. Before Gradio is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="latentfm-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder)
        try:
            yield Path(folder).resolve()
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def application(studio: Any, uploads: Path, password: str | None, local: bool, training: Callable[[], object] | None = None) -> Any:
    """The ASGI application of a `Studio`'s page."""
    import gradio as gr
    from fastapi import FastAPI, Response
    from fastapi.concurrency import run_in_threadpool

    from latentfm.web.door import Door
    from latentfm.web.page import page, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def handed_out(read: Callable[[str], bytes], name: str, kind: str) -> Response:
        try:
            return Response(await run_in_threadpool(read, name), media_type=kind, headers={"cache-control": "private, max-age=3600"})
        except (InputError, MemoryError):
            return Response("there is no such picture", status_code=404, media_type="text/plain")

    @app.get("/pictures/{name}")
    async def picture(name: str) -> Response:
        """A picture of the gallery, byte by byte as it is on disk, its settings in it."""
        return await handed_out(studio.gallery.read, name, "image/png")

    @app.get("/small/{name}")
    async def small(name: str) -> Response:
        """Its thumbnail."""
        return await handed_out(studio.gallery.small, name, "image/webp")

    script = (HERE / "page.js").read_text("utf-8")
    gr.mount_gradio_app(
        app, page(studio, training), path="/", footer_links=[], run_history=False, allowed_paths=[], blocked_paths=[], show_error=True,
        max_file_size=studio.limits.upload, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, theme=theme(),
        css_paths=[HERE / "style.css"], head=f"<script>{script}</script>",
    )  # fmt: skip
    return Door(app, password, local, uploads, 4 * studio.limits.upload)


def listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens; on the first free port from 7860 where none is given. Raises InputError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for each in [port] if port is not None else range(7860, 7860 + TRIED):
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, each))
            found.listen(128)
            return found
        except (OSError, OverflowError) as error:
            found.close()
            if port is not None or getattr(error, "errno", None) != errno.EADDRINUSE:
                why = getattr(error, "strerror", None) or error
                raise InputError(f"cannot listen on {host}, port {each}: {why}; give another --port") from None
    raise InputError(f"the ports {7860} to {7860 + TRIED - 1} are taken; give another --port")


class Harmless:
    """A stream on which nothing is obeyed that others wrote: a request's names and words may be in whatever a library prints."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.stream.write("\n".join(shown(line) for line in text.split("\n")))
        return len(text)


@contextmanager
def harmless_errors() -> Iterator[None]:
    """A context in which standard error is `Harmless`."""
    before, sys.stderr = sys.stderr, Harmless(sys.stderr)
    try:
        yield
    finally:
        sys.stderr = before


def server(app: Any) -> Any:
    """The uvicorn server of an application: `run(sockets=[...])` serves until Ctrl-C, SIGTERM, or should_exit."""
    import uvicorn

    quiet = {"log_level": "warning", "access_log": False, "use_colors": False, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, **quiet))
