"""
Look into a trained model in the browser: why a token, what a signal is, what an edit changes.

    python explore.py                                   the newest run with signals, else the release
    python explore.py --run=out/reflow-nano --port=9000 --no_browser
    python explore.py --run=release/reflow-mini --export=site    a snapshot, which needs no server

The page is served to this computer alone, at a URL with a random token. Its numbers are those of reflow.py
and stand beside their controls; a look is not a claim. Where in held-out text each signal is strongest is
computed once a run and kept among its results; nothing else is written.
"""

import json
import re
import secrets
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import threads
from tqdm import tqdm

import checkpoint
import configurator
import files
import metrics
from configurator import UserError
from experiments.lab import Lab, LabConfig
from experiments.lab.report import plain
from experiments.report import read_results, sort_results

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SNAPSHOT_TOKENS = 500
MODULES = ["dom.js", "api.js", "draw.js", "look.js", "edit.js", "runs.js", "app.js"]  # by what they need


@dataclass
class ExploreConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    baseline: str | None = None  # another run whose claims stand beside; None: any run can be chosen
    device: str = "auto"  # auto: cuda, then mps, then cpu
    port: int = 8765  # 0: any that is free
    host: str = "127.0.0.1"  # another address lets other computers in; the token is all that keeps them out
    allow_host: str | None = None  # further names in the URL that are answered: of a proxy, or for 0.0.0.0
    no_browser: bool = False  # only print the URL
    export: str | None = None  # write a static snapshot into this folder instead

    def __post_init__(self):
        configurator.check(self, "0 <= port <= 65535")


def record_of(ckpt):
    """The claims of a Checkpoint's record, what is left out, and its training curves, as JSON."""
    results, left_out = read_results(ckpt.results)
    record, others = sort_results(results, ckpt)
    claims = [plain(dump(claim)) for result in record.values() for claim in result.claims]
    return {
        "name": ckpt.name,
        "step": ckpt.step,
        "claims": claims,
        "left_out": left_out | others,
        "again": f"python experiments/run_all.py --run={files.shortest(ckpt.run)}",
        "curves": metrics.curves(ckpt.run),
    }


def dump(claim):
    """What the page shows of a Claim."""
    keys = ("experiment", "key", "kind", "claim", "verdict", "reason")
    measured = claim.measured
    found = {key: getattr(claim, key) for key in keys}
    return found | {"measured": [measured.value, measured.low, measured.high]}


def other_runs(own):
    """{name: function that gives its record} of the other runs and releases that are here."""
    folders = [*checkpoint.runs(own.run.parent), *checkpoint.runs(), *checkpoint.releases()]
    found = {path.name: path.resolve() for path in folders if path.resolve() != own.run.resolve()}
    return {name: lambda path=path: record_of(checkpoint.open_run(path)) for name, path in found.items()}


def snapshot(explorer, folder):
    """Write the page into a folder with all answers that need no model: open its index.html."""
    from explorer.server import PAGE

    files.check_writable(folder)
    model, n = explorer.model, explorer.model.dictionary.n_signals
    bar = tqdm(total=1, desc="contexts", disable=None)
    explorer.cards.read_contexts(lambda done, total: (bar.reset(total), bar.update(done)))
    bar.close()
    answers = {"run {}": explorer.run(), "claims {}": explorer.claims()}
    for s in tqdm(range(n), desc="signals", disable=None):
        answers[call("signal", signal=s)] = explorer.signal(s)
    for token in tqdm(model.shown[:SNAPSHOT_TOKENS].tolist(), desc="tokens", disable=None):
        answers[call("token", word=token)] = explorer.token(token)
    code = "".join((PAGE / name).read_text(encoding="utf-8") for name in MODULES)
    code = re.sub(r"^import .*\n|^export ", "", code, flags=re.M)  # modules cannot be opened as files
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    page = page.replace('type="module" src="app.js"', 'src="page.js" defer')
    data = json.dumps(plain(answers)).replace("</", "<\\/")
    texts = {"index.html": page, "page.js": f"const SNAPSHOT = {data};\n{code}"}
    texts |= {name: (PAGE / name).read_text(encoding="utf-8") for name in ("style.css", "icon.svg")}
    for name, text in texts.items():
        checkpoint.write_atomically(folder / name, text)
    size = sum((folder / name).stat().st_size for name in texts)
    print(f"{folder}/index.html: {n} {model.unit}s, {size / 1e6:.1f} MB")


def call(name, **ask):
    """The key of an answer in a snapshot, as the page makes it."""
    return f"{name} {json.dumps(ask, separators=(',', ':'))}"


def listen(c):
    """The open socket of --host and --port, with a warning if other computers reach it. UserError."""
    if c.host not in LOOPBACK:
        print(f"warning: --host={c.host}: whoever sees the URL can use this server", file=sys.stderr)
    family = socket.AF_INET6 if ":" in c.host else socket.AF_INET
    try:
        return socket.create_server((c.host, c.port), family=family)
    except OSError as error:
        remedy = "give another --port, 0 for any that is free"
        raise UserError(f"--host={c.host} --port={c.port}: {error.strerror}: {remedy}") from None


def main():
    (c,) = configurator.parse(ExploreConfig)
    try:
        import uvicorn

        from explorer.server import LOCAL, make_app
        from explorer.views import Explorer
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements.txt") from None
    # A mistake is an error before the model is read.
    run = str(checkpoint.default_run() if c.run is None else c.run)
    others = other_runs(checkpoint.open_run(run))
    beside = None
    if c.baseline is not None:
        given = checkpoint.open_run(c.baseline)
        beside = given.name
        others |= {beside: lambda: record_of(given)}
    sock = None if c.export else listen(c)
    lab = Lab(LabConfig(run=run, device=c.device))
    explorer = Explorer(lab, lambda: record_of(lab.checkpoint), others, beside)
    if c.export:
        return snapshot(explorer, Path(c.export).expanduser())

    token = secrets.token_urlsafe(24)
    host, port = c.host, sock.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    allowed = (*LOCAL, shown, *(c.allow_host or "").replace(" ", "").split(","))
    url = f"http://{shown}:{port}/#token={token}"
    print(f"{explorer.model}\n{url}\nCtrl-C ends it.", flush=True)
    threading.Thread(target=explorer.cards.read_contexts, daemon=True).start()
    if not c.no_browser:
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    app = make_app(explorer, token, tuple(filter(None, allowed)))
    settings = {"log_level": "warning", "server_header": False, "ws": "none", "limit_concurrency": 64}
    uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[sock])


if __name__ == "__main__":
    configurator.run(main)
