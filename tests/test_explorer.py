"""The explorer's calls: values are those of reflow.py, edits do what they say, only the page is answered."""

import http.client
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

import dictionary
import explore
import hooks
from attribution import predict, remove_signals
from configurator import UserError
from explorer import views
from explorer.edits import Edit, edited
from explorer.server import LARGEST, make_app
from tests.explorer_fixtures import TOKEN, open_explorer, read_explorer, serving
from tests.lab_fixtures import token

TEXT = "the king and the queen of France"
HEADERS = {"x-token": TOKEN}


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    return read_explorer(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def client(explorer):
    app = make_app(explorer, TOKEN, ("localhost", "127.0.0.1", "[::1]", "proxy.example"))
    return TestClient(app, base_url="http://127.0.0.1:8765", headers=HEADERS, raise_server_exceptions=False)


def ask(client, name, status=200, **body):
    answer = client.post(f"/api/{name}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def ids_of(model):
    return torch.tensor([model.tokenizer.encode_ordinary(TEXT)])


def ids(explorer):
    return ids_of(explorer.model)


# -- values ------------------------------------------------------------------------------------------


def test_a_position_is_the_attribution_of_reflow(client, explorer):
    found = ask(client, "position", text=TEXT, target="king", foil="queen")
    same = explorer.model.attribute(TEXT, "king", "queen")
    values = {row["signal"]: row["value"] for row in found["terms"]}
    assert values == pytest.approx({s: same.contributions[s] for s in values}, abs=1e-5)
    assert found["sum"] == pytest.approx(float(same.contributions.sum()), abs=1e-5)
    assert found["sum"] == pytest.approx(found["logit"], abs=1e-4)
    assert sum(values.values()) + found["others"] == pytest.approx(found["sum"], abs=1e-5)
    k = len(values)
    assert [row["rotated"] for row in found["terms"]] == pytest.approx(
        same.rotated(k).mean(0).tolist(), abs=1e-5
    )


@pytest.mark.parametrize("name", ["native", "rotated", "pca", "ica"])
def test_a_logit_is_a_sum_in_every_dictionary(client, explorer, name):
    with torch.no_grad():
        logits = explorer.model.net(ids(explorer))[0][0, 2]
    found = ask(client, "position", text=TEXT, position=2, dictionary=name, target=token("king"))
    assert found["sum"] == pytest.approx(logits[token("king")].item(), abs=1e-3)
    assert found["top"][0]["id"] == int(logits[:50257].argmax())


def test_tokens_have_their_surprisal_and_layers_their_lens(client, explorer):
    x = ids(explorer)
    found = ask(client, "read", text=TEXT)["tokens"]
    losses = hooks.token_losses(explorer.model.net, x[:, :-1], x[:, 1:])[0].tolist()
    assert "".join(row["text"] for row in found) == TEXT
    assert found[0]["surprisal"] is None
    assert [row["surprisal"] for row in found[1:]] == pytest.approx(losses, abs=1e-4)
    rows = ask(client, "lens", text=TEXT)["rows"]
    resid = torch.stack(list(hooks.resid_streams(explorer.model.net, explorer.model.net.vocab.embed(x))))
    top, _ = hooks.lens_by_layer(explorer.model.net, resid[:, 0].transpose(0, 1))
    assert [[cell[0] for cell in row] for row in rows] == [
        [explorer.model.tokenizer.token_text(i) for i in layer] for layer in top.T
    ]
    strength = ask(client, "lens", text=TEXT, signal=3)["rows"][-1][-1][1]
    assert strength == pytest.approx(float(explorer.model.cache(TEXT)["signals"][0, -1, 3]), abs=1e-5)


def test_the_lens_of_a_long_prompt_has_the_newest_tokens_or_those_around_a_place(client, monkeypatch):
    monkeypatch.setattr(views, "MOST_COLUMNS", 4)
    whole = ask(client, "read", text=TEXT)["tokens"]
    assert len(whole) == 7
    for position, first in ((None, 3), (6, 3), (5, 3), (4, 2), (2, 0), (0, 0)):
        found = ask(client, "lens", text=TEXT, position=position)
        assert found["first"] == first and {len(row) for row in found["rows"]} == {4}
    monkeypatch.undo()
    every = ask(client, "lens", text=TEXT)
    assert every["first"] == 0 and [row[:4] for row in every["rows"]] == found["rows"]


def test_a_card_stands_beside_that_of_a_rotated_signal_of_equal_rank(client, explorer):
    native, rotated = ask(client, "signal", signal=3, text=TEXT)["cards"]
    card = explorer.model.signal(3, 8)
    assert [pair[0] for pair in native["high"]] == [row[0] for row in card.rows]
    assert [pair[1] for pair in native["low"]] == pytest.approx([row[3] for row in card.rows])
    assert native["rank"] == rotated["rank"] and rotated["dictionary"] == "rotated"
    pred = predict(explorer.model.net, ids(explorer))
    d = dictionary.rotated(explorer.model.dictionary, torch.Generator().manual_seed(0))
    for card, own in ((native, explorer.model.dictionary), (rotated, d)):
        change, kl = remove_signals(pred, own, torch.tensor([card["signal"]]))
        assert card["ablation"]["change"] == pytest.approx(change.item(), abs=1e-5)
        assert card["ablation"]["kl"] == pytest.approx(kl.item(), abs=1e-5)


def test_contexts_are_the_extremes_of_held_out_text_and_are_kept(client, explorer):
    cards = explorer.cards
    card = ask(client, "signal", signal=3)["cards"][0]
    x, _ = explorer.lab.heldout(192, 32)
    A = explorer.model.dictionary.activations(explorer.model.net.encode(x))[:, 4:, 3].detach()
    assert card["strong"][0][3] == pytest.approx(A.max().item(), abs=1e-3)
    assert card["weak"][0][3] == pytest.approx(A.min().item(), abs=1e-3)
    window, at = divmod(int(A.argmax()), A.size(1))
    before, own, after, _ = card["strong"][0]
    decode = explorer.model.tokenizer.decode
    assert own == decode(x[window, at + 4 : at + 5]) and before + own + after == decode(x[window])
    assert sum(card["histogram"][2]) == A.numel()
    before = cards.path.stat().st_mtime_ns
    again = type(cards)(explorer.lab)
    again.read_contexts()
    assert again.contexts == cards.contexts and cards.path.stat().st_mtime_ns == before


def test_a_token_has_its_recipe_and_neighbours(client, explorer):
    found = ask(client, "token", word="king")
    m = explorer.model
    recipe = m.dictionary.codes[token("king")]
    assert found["recipe"][0]["signal"] == int(recipe.abs().argmax())
    assert found["recipe"][0]["share"] == pytest.approx((recipe.abs().max() ** 2 / (recipe**2).sum()).item())
    near = m.nearest(m.dictionary.codes, token("king"), 10)
    assert found["neighbours"]["recipe"] == [list(pair) for pair in near]
    assert found["neighbours"]["shuffled recipes"] != found["neighbours"]["recipe"]
    lists = ask(client, "arithmetic", plus="king", minus="man", also="woman")["lists"]
    assert set(lists) == {"3CosAdd", "only b", "only c"}
    assert not {" king", " man", " woman"} & {text for pairs in lists.values() for text, _ in pairs}


# -- edits -------------------------------------------------------------------------------------------


def test_a_removed_signal_is_the_closed_form(client, explorer):
    found = ask(client, "edit", text=TEXT, edits=[{"op": "scale", "name": 3, "value": 0, "place": "output"}])
    pred = predict(explorer.model.net, ids(explorer))
    _, kl = remove_signals(pred, explorer.model.dictionary, torch.tensor([3]))
    assert found["exact"] and found["kl"] == pytest.approx(kl.item(), rel=0.02)
    assert all(row["value"] == 0 for row in found["terms"] if row["signal"] == 3)
    nothing = ask(client, "edit", text=TEXT, edits=[])
    assert nothing["kl"] == pytest.approx(0, abs=1e-9) and nothing["sum"] == pytest.approx(
        nothing["sum_before"]
    )


def test_an_added_word_is_the_steering_of_hooks(client, explorer):
    edit = {"op": "add", "name": "king", "value": 0.3, "place": "layers", "start": 0, "stop": 1}
    found = ask(client, "edit", text=TEXT, target="queen", edits=[edit])
    net = explorer.model.net
    with hooks.steer(net, net.vocab.matrix()[token("king")].detach(), 0.3, range(0, 2)):
        logits = net(ids(explorer))[0][0, -1]
    assert found["sum"] == pytest.approx(logits[token("queen")].item(), abs=1e-4) and not found["exact"]


@pytest.mark.parametrize("place", ["input", "layers", "output"])
@pytest.mark.parametrize("op, value", [("scale", 0.0), ("scale", 2.5), ("add", -0.4)])
@pytest.mark.parametrize("name", [3, "king"])
def test_edits_reach_their_place_and_leave_no_trace(explorer, place, op, value, name):
    m, edit = explorer.model, Edit(op, name, value, place, 1, 1)
    with torch.no_grad():
        before = m.net(ids(explorer))[0]
        entering = [hooks.resid_pre(m.net, ids(explorer), layer) for layer in range(3)]
        with edited(m, [edit]):
            changed = m.net(ids(explorer))[0]
            reached = [hooks.resid_pre(m.net, ids(explorer), layer) for layer in range(3)]
        with edited(m, [edit], control=1):
            control = m.net(ids(explorer))[0]
        after = m.net(ids(explorer))[0]
    assert torch.equal(before, after) and not torch.equal(before, changed)
    assert not torch.allclose(control, changed)
    same = [torch.equal(*pair) for pair in zip(entering, reached, strict=True)]
    term = op == "scale" and name == 3 and place == "output"
    first = {"input": 0, "layers": 1, "output": 3 if term else 2}[place]
    assert same == [layer < first for layer in range(3)]


def test_a_signal_is_scaled_in_every_recipe_at_the_input(explorer):
    m, x = explorer.model, ids(explorer)
    part = m.dictionary.recipes[x[0], 3, None] * m.dictionary.basis[3]  # (T, d)
    with edited(m, [Edit("scale", 3, 0.25, "input")]):
        embeddings = m.net.vocab.embed(x)[0]
    assert torch.allclose(embeddings, m.net.vocab.embed(x)[0] - 0.75 * part, atol=1e-6)


def test_a_control_is_as_large_as_its_edit(explorer):
    m = explorer.model
    for edit in (
        Edit("scale", 3, 0.0),
        Edit("scale", "king", 0.0, "layers", 1, 1),
        Edit("add", 3, 0.5, "layers", 2, 2),
    ):
        layer = 2 if edit.place == "output" else edit.start
        sizes = []
        for control in (None, 4):
            with torch.no_grad():
                if edit.place == "output":
                    h = m.net.encode(ids(explorer))
                    plain = m.net.vocab.signals(h)
                    with edited(m, [edit], control):
                        sizes.append((m.net.vocab.signals(h) - plain).norm(dim=-1))
                    continue
                plain = hooks.resid_pre(m.net, ids(explorer), layer)
                with edited(m, [edit], control):
                    sizes.append((hooks.resid_pre(m.net, ids(explorer), layer) - plain).norm(dim=-1))
        assert sizes[0].min() > 0 and torch.allclose(sizes[0], sizes[1], rtol=1e-3)


def test_a_plain_gpt_has_coordinates(tmp_path):
    found = open_explorer(tmp_path, vocab="dense")
    assert found.run()["unit"] == "coordinate"
    sums = found.position(TEXT, None, None, None, None, "native")
    assert sums["sum"] == pytest.approx(sums["logit"], abs=1e-4)
    assert found.edit(TEXT, None, None, None, [Edit("scale", 2, 0.0)])["kl"] > 0


KINDS = {
    "topk": {"vocab": "topk", "top_k": 4},
    "sparse": {"vocab": "sparse", "n_nonzero": 4, "n_core": 3},
    "gains": {"vocab": "gains"},
    "reinject": {"vocab": "gains", "reinject": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_vocabularies_are_read_and_edited(tmp_path, kind):
    """Sums are exact, edits hold where E is built once for speed, and the quick way equals the slow one."""
    found = open_explorer(tmp_path, **KINDS[kind])
    m = found.model
    with torch.no_grad():
        logits = m.net(ids(found))[0][0, -1]
    sums = found.position(TEXT, None, None, token("king"), None, "native")
    assert sums["sum"] == pytest.approx(sums["logit"], abs=1e-4)
    assert sums["logit"] == pytest.approx(logits[token("king")].item(), abs=1e-4)
    assert found.lens(TEXT, None, None)["rows"] and found.token("king")["neighbours"]["shuffled recipes"]
    assert len(found.signal(3, TEXT)["cards"]) == 2
    removed = [Edit("scale", 3, 0.0), Edit("add", "king", 0.2, "output")]
    quick = found.edit(TEXT, None, token("king"), None, removed)
    with torch.no_grad(), edited(m, removed):
        slow = m.net.vocab.logits(m.net.encode(ids(found)))[0, -1, token("king")]
    assert quick["exact"] and quick["sum"] == pytest.approx(slow.item(), abs=1e-4)
    assert quick["sum"] != pytest.approx(quick["sum_before"], abs=1e-3)
    texts = {0: [], 1: [], 2: []}
    for way, i in found.continuations(TEXT, [Edit("scale", 3, -50.0)], 5, 0.0, 0):
        texts[way].append(i)
    assert texts[0] == m.net.generate(ids(found).tolist(), 5, temperature=0)[0] and texts[1] != texts[0]


@pytest.mark.parametrize("kind", ["gains", "reinject"])
def test_a_signal_without_gains_is_a_signal_removed_at_the_input(tmp_path, kind):
    m = open_explorer(tmp_path, **KINDS[kind]).model
    with torch.no_grad(), edited(m, [Edit("scale", 3, 0.0, "input")]):
        removed = m.net.encode(ids_of(m))
    for gain in m.net.vocab.gain:
        gain.data[3] = 0
    assert torch.allclose(m.net.encode(ids_of(m)), removed, atol=1e-5)


def lines(client, **body):
    answer = client.post("/api/generate", json={"text": TEXT, "n": 6, **body})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_continuations_are_those_of_reflow_with_and_without_edits(client, explorer):
    edit = {"op": "add", "name": "king", "value": 0.5, "place": "layers", "start": 0, "stop": 1}
    texts = {0: "", 1: "", 2: ""}
    for line in lines(client, edits=[edit], seed=7, temperature=0.9):
        texts[line["way"]] += line["text"]
    how = {"max_new_tokens": 6, "temperature": 0.9, "seed": 7}
    assert TEXT + texts[0] == explorer.model.generate(TEXT, **how)
    assert TEXT + texts[1] == explorer.model.generate(TEXT, {" king": 0.5}, range(0, 2), **how)
    assert texts[2] not in (texts[0], texts[1])
    assert {line["way"] for line in lines(client)} == {0}


def test_the_price_is_zero_for_an_edit_that_does_nothing(client):
    nothing = ask(client, "price", edits=[{"op": "scale", "name": 3, "value": 1}])
    assert nothing["edits"] == pytest.approx(0, abs=1e-9)
    some = ask(client, "price", edits=[{"op": "scale", "name": 3, "value": -2}])
    assert some["edits"] > 0 and some["random direction"] > 0


# -- odd input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "🙂 é 字", "�", "<|endoftext|>", "<b>&amp;</b>", "word " * 2000]
)
def test_odd_prompts_are_read(client, text):
    found = ask(client, "read", text=text)
    assert 1 <= len(found["tokens"]) <= 64 and found["empty"] == (text == "")
    assert (found["dropped"] > 0) == (len(text) > 1000)
    assert ask(client, "position", text=text)["sum"]
    assert ask(client, "lens", text=text)["rows"]


def test_a_token_may_be_half_a_character(client, explorer):
    found = ask(client, "read", text="字")["tokens"]
    assert [row["text"] for row in found] == ["<0xE5 0xAD>", "<0x97>"]
    assert lines(client, text="字", n=3)


@pytest.mark.parametrize(
    "name, body, words",
    [
        ("position", {"text": TEXT, "target": "antidisestablishment"}, "pieces"),
        ("position", {"text": TEXT, "target": "king", "foil": "king"}, "give two tokens"),
        ("position", {"text": TEXT, "position": 99}, "the prompt has"),
        ("position", {"text": TEXT, "layer": 9}, "2 layers"),
        ("position", {"text": TEXT, "target": 50300}, "no token 50300"),
        ("position", {"text": TEXT, "dictionary": "other"}, "dictionary"),
        ("signal", {"signal": 16}, "no signal 16: signals are 0 to 15"),
        ("signal", {"signal": -1}, "no signal -1: signals are 0 to 15"),
        ("signal", {"signal": 10**30}, "signals are 0 to 15"),
        ("lens", {"text": TEXT, "signal": 99}, "no signal 99: signals are 0 to 15"),
        ("token", {"word": "antidisestablishment"}, "pieces"),
        ("edit", {"text": TEXT, "edits": [{"op": "scale", "name": 16, "value": 0}]}, "no signal 16"),
        (
            "edit",
            {"text": TEXT, "edits": [{"op": "add", "name": 1, "value": 1, "place": "layers", "stop": 9}]},
            "0 to 2",
        ),
        ("edit", {"text": TEXT, "edits": [{"op": "add", "name": 1, "value": 1e9}]}, "1000"),
        ("edit", {"text": TEXT, "edits": [{"op": "add", "name": 1, "value": 1}] * 9}, "edits"),
        ("read", {"text": "a" * 20_001}, "text"),
        ("read", {"text": TEXT, "path": "/etc/passwd"}, "path"),
        ("claims", {"run": "../../etc"}, "no run"),
        ("generate", {"text": TEXT, "n": 201}, "n:"),
    ],
)
def test_a_mistake_is_one_line(client, name, body, words):
    error = ask(client, name, 422, **body)["error"]
    assert words in error and "\n" not in error


def test_a_mistake_in_an_edit_ends_a_generation_with_one_line(client):
    assert "no signal 16" in lines(client, edits=[{"op": "scale", "name": 16, "value": 0}])[-1]["error"]


def test_a_run_without_results_says_how_to_make_them(client):
    found = ask(client, "claims")
    assert found["claims"] == [] and found["again"].startswith("python experiments/run_all.py --run=")


# -- safety ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü"])
def test_every_call_needs_the_token(client, explorer, given):
    outsider = TestClient(client.app, base_url="http://127.0.0.1:8765")
    headers = {} if given is None else {"x-token": given.encode()}
    for name in ("run", "read", "generate", "claims", "nothing"):
        answer = outsider.post(f"/api/{name}", json={"text": TEXT}, headers=headers)
        assert answer.status_code == 401 and "token" in answer.json()["error"]
    assert outsider.post(f"/api/run?token={TOKEN}", json={}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "evil:8765", "", "192.168.0.2:8765"]
)
def test_a_foreign_host_name_is_refused(client, host):
    for method, path in (("GET", "/"), ("GET", "/app.js"), ("POST", "/api/run")):
        answer = client.request(method, path, headers={"host": host}, json={} if method == "POST" else None)
        assert answer.status_code == 403


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1", "[::1]:8765", "[::1]", "proxy.example"])
def test_known_host_names_are_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


def test_every_answer_forbids_foreign_content_and_none_allows_other_sites(client):
    answers = [
        client.get("/"),
        client.get("/nothing"),
        client.post("/api/run", json={}),
        client.options("/api/run"),
    ]
    answers += [
        client.post("/api/run", json={}, headers={"x-token": "wrong", "origin": "http://evil.example"})
    ]
    for answer in answers:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_only_json_by_post_is_a_call(client):
    assert client.get("/api/run").status_code in (405, 415)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("/api/run", content="{}", headers={"content-type": kind}).status_code == 415
    for body in ("", "[]", "{", "null", '{"text": NaN}'):
        answer = client.post("/api/read", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422 and set(answer.json()) == {"error"}


def test_bodies_are_bounded(client):
    assert client.post("/api/read", json={"text": "a" * LARGEST}).status_code == 413
    headers = {"content-type": "application/json"}
    assert client.post("/api/read", content=iter([b"{}"]), headers=headers).status_code == 411  # chunked


@pytest.mark.parametrize(
    "path",
    [
        "/../explore.py",
        "/%2e%2e/explore.py",
        "/server.py",
        "/explorer/server.py",
        "//etc/passwd",
        "/app.js/x",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_but_the_page_is_served(client, path):
    assert client.get(path).status_code in (404, 405)


def test_the_page_has_no_inline_code_and_loads_nothing_from_elsewhere(client):
    for path in Path(explore.__file__).parent.joinpath("explorer").iterdir():
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http" not in text and "innerHTML" not in text and "eval(" not in text
            assert "insertAdjacentHTML" not in text and "document.write" not in text
            assert client.get(f"/{path.name}").text == path.read_text(encoding="utf-8")


def test_no_two_modules_of_the_page_share_a_name():
    """A snapshot puts them into one script."""
    names = []
    for module in explore.MODULES:
        text = Path(explore.__file__).parent.joinpath("explorer", module).read_text(encoding="utf-8")
        names += re.findall(r"^(?:export )?(?:async )?(?:const|let|function) (\w+)", text, re.M)
    assert sorted(set(names)) == sorted(names) and len(names) > 40


def test_a_fault_of_the_program_tells_nothing(client, explorer, monkeypatch, capsys):
    monkeypatch.setattr(explorer, "read", lambda text: 1 / 0)
    answer = client.post("/api/read", json={"text": TEXT})
    assert answer.status_code == 500 and "division" not in answer.text
    assert "ZeroDivisionError" in capsys.readouterr().err


def connect(url):
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)


def start(url, n):
    """An open generation: (connection, answer)."""
    connection = connect(url)
    headers = {"Content-Type": "application/json", "X-Token": TOKEN}
    connection.request("POST", "/api/generate", json.dumps({"text": TEXT, "n": n}), headers)
    return connection, connection.getresponse()


def test_generations_are_bounded_and_end_when_their_page_goes(explorer, monkeypatch):
    steps = []
    stream = explorer.model.net.stream

    def slow(*args, **how):
        for _tokens in stream(*args, **how):
            steps.append(1)
            time.sleep(0.05)
            yield [1]  # never the end

    monkeypatch.setattr(explorer.model.net, "stream", slow)
    with serving(explorer) as (url, app):
        first, second = start(url, 200), start(url, 200)
        assert json.loads(first[1].readline())["way"] == 0 and second[1].readline()
        third, refused = start(url, 200)
        assert refused.status == 429 and "stop one first" in refused.read().decode()
        for connection, answer in (first, second):
            answer.close()
            connection.close()
        deadline = time.monotonic() + 10
        while app.running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not app.running
        done = len(steps)
        time.sleep(0.3)
        assert len(steps) == done < 300
        _, again = start(url, 3)
        assert again.status == 200 and len(again.read().splitlines()) == 3


def test_nothing_is_written_but_the_contexts(explorer, client):
    def listing():
        return {
            path: path.stat().st_mtime_ns
            for path in explorer.lab.checkpoint.run.parents[1].rglob("*")
            if path.is_file()
        }

    before = listing()
    ask(client, "position", text=TEXT)
    ask(client, "signal", signal=1, text=TEXT)
    ask(client, "token", word="king")
    ask(client, "price", edits=[{"op": "scale", "name": 3, "value": 0}])
    lines(client)
    assert listing() == before and explorer.cards.path in before


# -- the command -------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_line(explorer, monkeypatch):
    with serving(explorer) as (url, _):
        config = explore.ExploreConfig(port=urlsplit(url).port)
        with pytest.raises(UserError, match="--port=.*give another --port"):
            explore.listen(config)


def test_a_missing_run_is_named_before_a_port_in_use(explorer, monkeypatch):
    with serving(explorer) as (url, _):
        arguments = ["--run=out/nothing", f"--port={urlsplit(url).port}"]
        monkeypatch.setattr(sys, "argv", ["explore.py", *arguments])
        with pytest.raises(UserError, match="^no run out/nothing: "):
            explore.main()


def test_other_computers_are_let_in_only_when_asked_and_with_a_warning(capsys):
    with explore.listen(explore.ExploreConfig(port=0)) as own:
        assert own.getsockname()[0] == "127.0.0.1" and capsys.readouterr().err == ""
    with explore.listen(explore.ExploreConfig(host="0.0.0.0", port=0)) as other:
        assert other.getsockname()[0] == "0.0.0.0"
        assert capsys.readouterr().err.startswith("warning: --host=0.0.0.0: whoever sees the URL")


def test_the_command_prints_a_url_that_works_and_binds_this_computer_alone(explorer):
    script = [
        sys.executable,
        explore.__file__,
        f"--run={explorer.lab.checkpoint.run}",
        "--port=0",
        "--no_browser",
        "--device=cpu",
    ]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        parts = urlsplit(lines[1].strip())
        token = parts.fragment.removeprefix("token=")
        assert parts.hostname == "127.0.0.1" and len(token) >= 32
        connection = connect(lines[1].strip())
        headers = {"Content-Type": "application/json", "X-Token": token}
        connection.request("POST", "/api/run", "{}", headers)
        assert json.loads(connection.getresponse().read())["name"] == "tiny"
        connection.close()
    finally:
        process.send_signal(2)
        assert process.wait(20) in (0, 130, -2)
        process.stdout.close()
