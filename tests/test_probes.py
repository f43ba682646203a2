"""The word lists and prompts of the experiments: tokens, counts, facts, provenance. CPU, seconds."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import UserError
from data import tokenizer

FOLDER = ROOT / "experiments" / "probes"
NAMES = ["categories", "analogies", "sentiment", "facts", "agreement"]
PROBES = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
CATEGORIES, ANALOGIES, SENTIMENT, FACTS, AGREEMENT = PROBES.values()
SIGNS = ("positive", "negative")


@pytest.fixture(scope="module")
def build():
    """The script as a module: experiments/ is no package."""
    spec = importlib.util.spec_from_file_location("build_probes", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def n_tokens(text):
    return len(tokenizer.gpt2().encode(text))


def words():
    """Yield every stored word."""
    for entry in CATEGORIES.values():
        yield from entry["words"]
    for entry in ANALOGIES.values():
        for pair in entry["pairs"]:
            yield from pair
    for sign in SIGNS:
        yield from [*SENTIMENT[sign]["build"], *SENTIMENT[sign]["held_out"], *SENTIMENT["lexicon"][sign]]
    for entry in FACTS.values():
        for fact in entry["facts"]:
            yield from fact.values()
    for pair in AGREEMENT["pairs"]:
        yield from (pair["correct"], pair["other"])


def fact(relation, entity):
    return next(f["answer"] for f in FACTS[relation]["facts"] if f["entity"] == entity)


def test_every_word_is_one_token_after_a_space():
    assert [word for word in set(words()) if n_tokens(" " + word) != 1] == []


def test_every_list_states_source_licence_and_counts():
    entries = [*CATEGORIES.values(), *ANALOGIES.values(), *FACTS.values(), SENTIMENT, AGREEMENT]
    for entry in entries:
        assert entry["source"] and entry["licence"] == "MIT"
        assert 0 < entry["kept"] <= entry["listed"]
        contents = next((entry[key] for key in ("words", "pairs") if key in entry), None) or entry.get(
            "facts"
        )
        if contents:
            assert entry["kept"] == len(contents)
    assert SENTIMENT["kept"] == sum(len(SENTIMENT["lexicon"][sign]) for sign in SIGNS)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 400_000


def test_a_word_is_in_one_class():
    everything = [word for entry in CATEGORIES.values() for word in entry["words"]]
    assert len(everything) == len(set(everything))
    assert 20 <= len(CATEGORIES) <= 30
    assert {name: entry["kept"] for name, entry in CATEGORIES.items() if not 15 <= entry["kept"] <= 50} == {}


def test_analogies():
    sizes = {name: entry["kept"] for name, entry in ANALOGIES.items()}
    assert len(sizes) >= 20 and min(sizes.values()) >= 12
    for entry in ANALOGIES.values():
        assert len({tuple(pair) for pair in entry["pairs"]}) == entry["kept"]
        assert all(a != b for a, b in entry["pairs"])
    for relation, a, b in [
        ("male_female", "man", "woman"),
        ("male_female", "king", "queen"),
        ("gerund_past", "walking", "walked"),
        ("gerund_past", "running", "ran"),
        ("country_capital", "France", "Paris"),
        ("country_capital", "China", "Beijing"),
        ("country_nationality", "Denmark", "Danish"),
        ("country_language", "Brazil", "Portuguese"),
    ]:
        assert [a, b] in ANALOGIES[relation]["pairs"]


def test_sentiment_words_are_disjoint_and_equally_common(build):
    lists = {(sign, part): SENTIMENT[sign][part] for sign in SIGNS for part in ("build", "held_out")}
    assert {len(content) for content in lists.values()} == {len(SENTIMENT["positive"]["build"])}
    assert len(SENTIMENT["positive"]["build"]) >= 35
    together = [word for content in lists.values() for word in content]
    assert len(together) == len(set(together))
    for sign in SIGNS:
        assert set(SENTIMENT[sign]["build"] + SENTIMENT[sign]["held_out"]) <= set(SENTIMENT["lexicon"][sign])
        stems = [{word[:6] for word in SENTIMENT[sign][part]} for part in ("build", "held_out")]
        assert stems[0].isdisjoint(stems[1])  # "frustrating" beside "frustrated" is not held out
    assert set(SENTIMENT["lexicon"]["positive"]).isdisjoint(SENTIMENT["lexicon"]["negative"])
    for part in ("build", "held_out"):
        for couple in zip(*(SENTIMENT[sign][part] for sign in SIGNS), strict=True):
            low, high = sorted(map(build.token_id, couple))
            assert high < build.NEAR_ID * low, couple


def test_sentiment_templates():
    dev, test = SENTIMENT["templates"]["dev"], SENTIMENT["templates"]["test"]
    assert len(dev) >= 20 and len(test) >= 20 and len(set(dev + test)) == len(dev + test)
    adjectives = {word for sign in SIGNS for part in SENTIMENT[sign].values() for word in part}
    for text in dev + test:
        assert text == text.strip() and adjectives.isdisjoint(text.split()), text


def test_facts():
    prompts = []
    for relation, entry in FACTS.items():
        assert len(entry["templates"]) >= 5
        assert {template["split"] for template in entry["templates"]} == {"dev", "test"}
        assert [t["id"] for t in entry["templates"]] == [
            f"{relation}.{i}" for i in range(len(entry["templates"]))
        ]
        answers = {f["answer"] for f in entry["facts"]}
        entities = [f["entity"] for f in entry["facts"]]
        assert len(entities) == len(set(entities))
        for f in entry["facts"]:
            assert f["foil"] in answers and len({*f.values()}) == 3
        for template in entry["templates"]:
            assert (
                template["text"].count(" {}") == template["text"].count("{}") == 1
                and template["text"] == template["text"].strip()
            )
            prompts += [template["text"].replace("{}", entity) for entity in entities]
    assert len(prompts) == len(set(prompts)) >= 2000
    assert FACTS["capital"]["templates"][0] == {
        "id": "capital.0",
        "split": "dev",
        "text": "The capital of {} is",
    }
    assert fact("capital", "France") == "Paris"
    assert fact("continent", "Egypt") == "Africa"
    assert fact("currency", "Japan") == "yen"
    assert fact("plural", "child") == "children"
    assert fact("past_tense", "run") == "ran"


def test_agreement_pairs_differ_in_equally_many_tokens():
    pairs, contexts = AGREEMENT["pairs"], AGREEMENT["contexts"]
    assert len(pairs) >= 60 and len({pair["template"] for pair in pairs}) >= 6
    assert {pair["context"] for pair in pairs} == set(range(len(contexts)))
    assert all(40 <= n_tokens(text) <= 80 for text in contexts)
    for pair in pairs:
        clean, corrupted = pair["clean"], pair["corrupted"]
        assert clean != corrupted and pair["correct"] != pair["other"]
        assert clean == clean.strip() and corrupted == corrupted.strip()
        assert n_tokens(clean) == n_tokens(corrupted), clean
        context = contexts[pair["context"]] + " "
        assert n_tokens(context + clean) == n_tokens(context + corrupted), clean
    assert len({(pair["clean"], pair["corrupted"]) for pair in pairs}) == len(pairs)
    assert len({(pair["template"], pair["split"]) for pair in pairs}) == len({p["template"] for p in pairs})


def test_files_equal_what_the_script_writes(build):
    for package in ("countryinfo", "vaderSentiment"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for name, content in build.build().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == content, f"run {FOLDER / 'build.py'}"


def test_a_missing_package_is_named(build):
    with pytest.raises(UserError, match="^no_such_package is not installed: pip install"):
        build.package_folder("no_such_package")
