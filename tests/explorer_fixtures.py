"""An explorer of a small run, and a server of it in a thread, as explore.py starts it."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("fastapi")
import uvicorn

import explore
from explorer.server import make_app
from explorer.views import Explorer
from tests.lab_fixtures import corpus, loud, open_lab, save_run, tiny

TOKEN = "a-token-of-the-tests"


def open_explorer(tmp_path, **changes):
    """The Explorer of an untrained run whose blocks do something."""
    data = corpus(tmp_path / "data")
    model = loud(tiny(**changes))
    if hasattr(model.vocab, "basis"):  # signals are not orthogonal, so terms and directions differ
        model.vocab.basis.data += 0.1 * torch.randn(model.vocab.basis.shape)
    run = save_run(tmp_path / "out" / "tiny", model, data)
    lab = open_lab(run)
    return Explorer(lab, lambda: explore.record_of(lab.checkpoint), {})


def read_explorer(tmp_path):
    """The Explorer of `open_explorer` that has read its contexts."""
    found = open_explorer(tmp_path)
    found.cards.read_contexts()
    return found


@contextmanager
def serving(explorer):
    """(URL of a server in a thread, its app)."""
    app = make_app(explorer, TOKEN)
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()
