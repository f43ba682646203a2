"""The explorer's page in a real browser, headless: what a person does, and what the page then shows."""

import shlex
import shutil
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")

import explore
import sample
from attribution import predict, remove_signals
from experiments import report
from experiments.lab import Report, Scores
from tests.explorer_fixtures import TOKEN, read_explorer, serving

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt install chromium")
VIEWS = ("prompt", "signal", "token", "edit", "runs")
TEXT = "the king and the queen"


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    return read_explorer(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(explorer):
    with serving(explorer) as (url, app):
        yield f"{url}/#token={TOKEN}", app


@pytest.fixture
def open_page(browser):
    """A function: open a URL, in a window of a size and a colour scheme. The console must stay empty."""
    said, contexts = [], []

    def open_url(url, width=1200, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))  # also what the policy blocks
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    yield open_url
    for context in contexts:
        context.close()
    refused = "status of 422"  # the browser's own note on a word that the page then explains
    assert [text for text in said if refused not in text] == []


def until(page, expression):
    """Wait until a JavaScript expression holds. (Playwright's own way needs eval, which the page forbids.)"""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def idle(page):
    """Wait until no call is on its way and its answer is drawn."""
    until(page, "document.getElementById('main').getAttribute('aria-busy') === 'false'")
    page.wait_for_timeout(50)


def bar(page, place, i):
    return page.locator(f"#{place} .bar").nth(i)


def value(page, place, i):
    return bar(page, place, i).locator(".value").text_content()


def test_type_a_prompt_click_a_token_a_bar_a_cell(server, explorer, open_page):
    page = open_page(server[0])
    page.fill("#text", TEXT)
    until(page, "document.getElementById('tokens').textContent.includes('queen')")
    idle(page)
    found = explorer.position(TEXT, None, None, None, None, "native")
    assert value(page, "terms", 0) == f"{found['terms'][0]['value']:.3f}"
    assert value(page, "terms", len(found["terms"]) + 1) == f"{found['sum']:.3f}"  # after the others

    page.locator("#tokens button").nth(1).click()
    until(page, "document.querySelector('#next h2').textContent.includes('king')")
    bar(page, "next", 2).click()  # the third likeliest token is explained
    idle(page)
    found = explorer.position(TEXT, 1, None, None, None, "native")
    third = explorer.position(TEXT, 1, None, found["top"][2]["id"], None, "native")
    assert value(page, "terms", len(third["terms"]) + 1) == f"{third['sum']:.3f}"

    page.fill("#foil", "queen")
    page.press("#foil", "Enter")
    until(page, "document.querySelector('#terms h2').textContent.includes('−')")
    page.locator("#map .cell[data-layer='1'][data-position='0']").click()
    until(page, "document.querySelector('#next').textContent.includes('layer 1')")
    page.check("input[value=pca]")
    idle(page)
    assert "the terms sum to" in page.text_content("#terms")
    page.check("input[value=native]")
    idle(page)
    bar(page, "terms", 0).click()
    page.wait_for_selector("section.card.rotated")
    state = parse_qs(urlsplit(page.url).fragment)
    assert state["view"] == ["signal"] and page.input_value("#signal") == state.get("signal", ["0"])[0]
    page.go_back()
    page.wait_for_selector("#map .cell")


def test_keys_move_along_the_prompt_and_open_a_bar(server, open_page):
    page = open_page(f"{server[0]}&text={TEXT}")
    page.locator("#tokens button").nth(4).focus()
    page.keyboard.press("ArrowLeft")
    until(page, "document.querySelectorAll('#tokens button')[3].getAttribute('aria-pressed') === 'true'")
    idle(page)
    page.locator("#map svg").focus()
    page.keyboard.press("ArrowDown")
    until(page, "document.querySelector('#next').textContent.includes('layer 1')")
    idle(page)
    page.keyboard.press("ArrowLeft")  # the map has kept the focus
    until(page, "document.querySelectorAll('#tokens button')[2].getAttribute('aria-pressed') === 'true'")
    idle(page)
    bar(page, "terms", 0).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("section.card")


def test_the_card_of_a_signal_has_its_control_contexts_and_neighbours(server, explorer, open_page):
    page = open_page(f"{server[0]}&view=signal&signal=3&text={TEXT}")
    page.wait_for_selector("section.card.rotated mark")
    native, rotated = explorer.signal(3, TEXT)["cards"]
    assert native["strong"][0][1].strip() in page.text_content("section.card.native mark")
    assert rotated["ablation"]["token"].strip() in page.text_content("section.card.rotated .ablation")
    page.click("text=next")
    until(page, "document.querySelector('section.card h2').textContent === 'signal 4'")
    page.locator("section.card .links button").first.click()
    idle(page)
    assert int(page.input_value("#signal")) == explorer.signal(4)["cards"][0]["neighbours"][0][0]


def test_a_token_and_its_neighbours(server, explorer, open_page):
    page = open_page(f"{server[0]}&view=token&word=king")
    page.wait_for_selector("#sums .bar")
    assert "king" in page.text_content("#token h2") and "the control" in page.text_content("#token")
    page.fill("#word", "antidisestablishment")
    page.press("#word", "Enter")
    assert "pieces" in page.locator("#token .error").text_content()


def test_a_mistake_is_said_once_and_names_what_there_is(server, open_page):
    page = open_page(f"{server[0]}&text={TEXT}")
    page.wait_for_selector("#terms .bar")
    page.fill("#target", "antidisestablishment")
    page.press("#target", "Enter")
    until(page, "document.querySelectorAll('.error').length > 0")
    idle(page)
    assert page.locator(".error").count() == 1 and "pieces" in page.text_content(".error")
    page.click("nav button[data-view=signal]")
    page.wait_for_selector("section.card")
    page.fill("#signal", "999")
    page.press("#signal", "Enter")
    until(page, "document.querySelectorAll('#cards .error').length > 0")
    assert page.text_content("#cards .error") == "no signal 999: signals are 0 to 15"


def test_a_slider_changes_the_numbers_to_the_right_value(server, explorer, open_page):
    page = open_page(f"{server[0]}&view=edit&text={TEXT}")
    page.wait_for_selector("#next .bar")
    page.click("#add")
    idle(page)
    slider = page.locator("input[type=range]")
    pred = predict(explorer.model.net, torch.tensor([explorer.model.tokenizer.encode_ordinary(TEXT)]))
    _, kl = remove_signals(pred, explorer.model.dictionary, torch.tensor([0]))
    assert explorer.edit(TEXT, None, None, None, [])["kl"] < 1e-9
    shown = float(page.text_content("#next .note").split("edits ")[1].split(" nats")[0])
    assert shown == pytest.approx(kl.item(), rel=0.1, abs=1e-4)
    slider.fill("-2")
    until(page, "document.querySelector('output').textContent === '-2.00'")
    idle(page)
    from explorer.edits import Edit

    found = explorer.edit(TEXT, None, None, None, [Edit("scale", 0, -2.0)])
    assert value(page, "terms", len(found["terms"]) + 1) == f"{found['sum']:.3f}"
    until(page, "document.getElementById('price').textContent.includes('random direction')")

    # The URL holds it all: a new page shows the same.
    again = open_page(page.url)
    again.wait_for_selector("#terms .bar")
    idle(again)
    assert again.locator("input[type=range]").input_value() == "-2"
    last = len(found["terms"]) + 1
    assert value(again, "terms", last) == value(page, "terms", last)
    assert 'Edit("scale", 0, -2, "output", 0, 0)' in page.text_content("#python")


def test_an_added_word_is_a_line_for_sample_py_and_python_that_runs(
    server, explorer, open_page, capsys, monkeypatch
):
    edits = '[{"op":"add","name":"king","value":0.5,"place":"layers","start":0,"stop":1}]'
    page = open_page(f"{server[0]}&view=edit&text={TEXT}&n=5&edits={edits}")
    page.wait_for_selector("#steer")
    assert "--steer='+king:0.5@0-1'" in page.text_content("#steer")
    page.click("#start")
    until(page, "!document.getElementById('start').disabled")
    shown = page.locator(".text").all_text_contents()
    exec(page.text_content("#python"), {})
    assert capsys.readouterr().out == shown[1] + "\n"
    assert len(shown) == 3 and len(set(shown)) == 3 and all(text.startswith(TEXT) for text in shown)
    monkeypatch.setattr("sys.argv", shlex.split(page.text_content("#steer"))[1:])
    sample.main()
    without, _, rest = capsys.readouterr().out.partition("\n== with --steer")
    assert without == f"== without --steer\n{shown[0]}\n" and rest.endswith(f"\n{shown[1]}\n")


def test_a_generation_starts_and_stops(server, open_page):
    page = open_page(f"{server[0]}&view=edit&text={TEXT}&n=200")
    page.wait_for_selector("#next .bar")
    page.click("#start")
    until(page, "document.querySelector('.text').textContent.length > 40")
    page.click("#stop")
    until(page, "!document.getElementById('start').disabled")
    page.wait_for_timeout(500)
    assert not server[1].running
    before = page.text_content(".text")
    page.wait_for_timeout(300)
    assert page.text_content(".text") == before


def test_a_tokens_text_is_never_code(server, open_page):
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page = open_page(server[0])
    page.on("dialog", lambda dialog: pytest.fail("a token ran as code"))
    page.fill("#text", text)
    until(page, "document.querySelectorAll('#tokens button').length > 10")
    idle(page)
    assert page.locator("#main img, #main script").count() == 0


def test_a_wrong_token_says_what_to_do(server, browser):
    page = browser.new_page()
    page.goto(server[0].replace(TOKEN, "old"))
    assert "open the URL that explore.py printed" in page.locator(".error").text_content()
    page.close()


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (390, "light")])
def test_every_view_fits_in_light_dark_and_on_a_phone(server, open_page, tmp_path, width, scheme):
    page = open_page(f"{server[0]}&text={TEXT}", width, scheme)
    for view in VIEWS:
        page.click(f"nav button[data-view={view}]")
        idle(page)
        until(page, "document.querySelectorAll('#main svg, #claims p').length > 0")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("main > p").first.text_content().endswith(".")
        page.screenshot(path=tmp_path / f"{view}.png", full_page=True)
        assert (tmp_path / f"{view}.png").stat().st_size > 10_000


def test_two_runs_stand_beside_each_other_and_differences_are_marked(explorer, open_page, monkeypatch):
    def record(name, *verdicts):
        fields = {"experiment": "ablate_signal", "kind": "effect", "claim": "it does", "reason": "why"}
        fields |= {"unit": "words", "n": 30, "measured": [1.0, None, None]}
        claims = [fields | {"key": f"{i}", "verdict": verdict} for i, verdict in enumerate(verdicts)]
        curves = {"validation loss": [[0, 9.0], [5, 8.0]], "Gini coefficient": [[0, 0.4], [5, 0.5]]}
        return {"name": name, "step": 5, "claims": claims, "left_out": {}, "again": "", "curves": curves}

    monkeypatch.setattr(explorer, "record", lambda: record("one", "supported", "supported"))
    monkeypatch.setattr(explorer, "others", {"two": lambda: record("two", "supported", "not supported")})
    monkeypatch.setattr(explorer, "beside", "two")
    with serving(explorer) as (url, _):
        page = open_page(f"{url}/#token={TOKEN}&view=runs")
        page.wait_for_selector("tr.differs")
        assert page.locator("#claims tbody tr").count() == 2 and page.locator("tr.differs").count() == 1
        assert "one, step 5 beside two, step 5" in page.text_content("#claims h2")
        until(page, "document.querySelectorAll('polyline.b').length === 2")
        assert "Gini" in page.text_content("main")
        page.select_option("#other", "")
        until(page, "document.querySelectorAll('tr.differs, polyline.b').length === 0")


def test_a_report_sorts_filters_and_fits_a_phone(explorer, open_page, monkeypatch):
    lab = explorer.lab
    found = Report(lab, "ablate_signal", {"bad": "one does not", "good": "one holds"})
    found.effect("bad", Scores({"native": [0] * 30, "chance": [2] * 30}), "words")
    found.effect("good", Scores({"native": [1] * 30, "chance": [0] * 30}), "words")
    found.save()
    monkeypatch.setattr("sys.argv", ["report.py", f"--run={lab.checkpoint.run}"])
    report.main()
    page = open_page((lab.results / "report.html").as_uri() + "#claim-ablate_signal-good", 390)
    items = page.locator("#claims ~ .items").first.locator(".item")
    assert page.evaluate("document.getElementById('claim-ablate_signal-good').open")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "one does not" in items.nth(0).text_content()
    page.select_option("select[name=sort]", "verdict")
    assert "one holds" in items.nth(0).text_content()
    page.select_option("select[name=verdict]", "not supported")
    assert [items.nth(i).is_visible() for i in range(2)] == [False, True]
    page.fill("#signals ~ form input", "no such words")
    assert page.locator("#signals ~ form output").text_content() == "0 of 16"


def test_a_snapshot_opens_from_the_file_system(explorer, open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "SNAPSHOT_TOKENS", 3)
    explore.snapshot(explorer, tmp_path / "site")
    page = open_page(Path(tmp_path / "site" / "index.html").as_uri())
    page.wait_for_selector("section.card.rotated mark")
    page.click("text=next")
    until(page, "document.querySelector('section.card h2').textContent === 'signal 1'")
    word = explorer.name(explorer.model.shown[1]).strip()
    page.click("nav button[data-view=token]")
    page.fill("#word", word)
    page.press("#word", "Enter")
    until(page, f"document.querySelector('#token h2')?.textContent.includes({word!r})")
    page.click("nav button[data-view=runs]")
    page.wait_for_selector("#claims h2")
    assert page.locator("nav button").count() == 3
