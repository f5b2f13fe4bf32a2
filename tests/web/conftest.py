"""What the tests of the page share: a page of a tiny model, served by a thread of this process."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the page needs Gradio: pip install "latentfm[app]"')


class Served:
    """A page that is served: its address, its studio, its folder of uploads."""

    def __init__(self, url: str, studio, uploads: Path):
        self.url, self.studio, self.uploads = url, studio, uploads


@pytest.fixture(scope="session")
def serving(tiny_folder, tmp_path_factory):
    """A function that serves a page with its own outputs folder, until the session ends: options are Limits', password, second tab."""
    from latentfm.web.serve import application, listening, private_uploads, server

    running = []
    with private_uploads() as uploads:
        from latentfm.web.limits import Limits
        from latentfm.web.models import Models
        from latentfm.web.studio import Studio

        def serve(password=None, loras=None, training=None, **limits) -> Served:
            out = tmp_path_factory.mktemp("page") / "outputs"
            studio = Studio.of(Models([tiny_folder], loras, "cpu", "float32"), Limits(**limits), out)
            found = listening("127.0.0.1", 0)
            uvicorn = server(application(studio, uploads, password, local=True, training=training))
            thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [found]}, daemon=True)
            thread.start()
            running.append((uvicorn, thread))
            return Served(f"http://127.0.0.1:{found.getsockname()[1]}", studio, uploads)

        yield serve
        for uvicorn, _ in running:
            uvicorn.should_exit = True
        for _, thread in running:
            thread.join(10)


@pytest.fixture(scope="session")
def served(serving):
    """One page for all tests that leave it as they found it."""
    return serving(size=256, steps=20, batch=6, prompt=500)
