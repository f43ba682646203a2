"""Build the word lists and prompts of the experiments: five JSON files beside this script.

    pip install countryinfo vaderSentiment
    python experiments/probes/build.py

The files are committed, so that experiments need neither package. The same sources give the same bytes.
countryinfo 1.0.1 and vaderSentiment 3.3.2 gave the present ones.

Sources. Country facts: countryinfo (MIT, Porimol Chandro). Strength of sentiment words: the lexicon of VADER
(MIT, C.J. Hutto). All the rest is our own, in `sources/*.txt`: word classes, relations, templates and
prompts, under the licence of this repository (MIT). Lists of unclear or non-commercial licence are not used.

Every word is stored bare and used with one space before it. Experiments look up single rows of the embedding,
so each stored word is one GPT-2 token as " word". Other words are dropped; every list says how many it had.

Common fields: `source`, `licence`, `listed` (words, pairs or facts before the tokenizer's say) and `kept`
(stored).

categories.json
    {class: {words: [word], source, licence, listed, single_token, kept}}
    A word is in one class only. `single_token` counts the words of one token; of these the 50 with the
    lowest token ids are kept, in the order of the list. A low id is a common word, about.
analogies.json
    {relation: {pairs: [[a, b]], source, licence, listed, kept}}
    A question is two pairs of a relation: a is to b as c is to ?. Skip it if its answer is one of a, b, c:
    pairs may share a word (country_continent shares many).
sentiment.json
    {positive: {build: [word], held_out: [word]}, negative: {build, held_out},
     lexicon: {positive: [word], negative: [word]}, templates: {dev: [text], test: [text]},
     source, licence, listed, kept}
    `build` makes a direction, `held_out` measures it; both are adjectives that fit after a template. The four
    lists have equal lengths, and word i of one has about the token id of word i of the others. `lexicon`
    holds all strong words of VADER, the adjectives among them, to judge a continuation: leave `build` out
    there. `listed` and `kept` count the lexicon.
facts.json
    {relation: {templates: [{id, split, text}], facts: [{entity, answer, foil}],
     source, licence, listed, kept}}
    The prompt is text.replace("{}", entity), the answer is the next token, and the foil is the answer of
    another fact. An entity never opens a prompt, so it is one token. Choose on the templates of split `dev`,
    report on `test`. At most 40 facts of a relation are kept, and 8 with the same answer.
agreement.json
    {contexts: [text], pairs: [{template, task, split, clean, corrupted, correct, other, context}],
     source, licence, listed, kept}
    `correct` follows `clean` and `other` follows `corrupted`; both prompts have the same number of tokens.
    The short prompt is `clean`, the long one is contexts[context] + " " + clean; likewise for `corrupted`.
    A template belongs to one split.
"""

import importlib.util
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import configurator
from configurator import UserError
from data import tokenizer

OURS = {"source": "our own list", "licence": "MIT"}
COUNTRYINFO = {"source": "countryinfo", "licence": "MIT"}
BOTH = {"source": "countryinfo; our own list", "licence": "MIT"}
VADER = {
    "source": "VADER (vaderSentiment); templates and choice of adjectives our own",
    "licence": "MIT",
}

MAX_WORDS = 50  # of a class
MAX_FACTS = 40  # of a relation
MAX_PER_ANSWER = 8  # facts of a relation with the same answer: twenty countries pay in euro
NEAR_ID = 1.25  # ratio of the token ids of two words called equally common
STRONG = 1.9  # of VADER's mean rating, -4 to 4

# What countryinfo says and we leave out, since the fact is disputed, ambiguous, out of date or trivial.
NOT_COUNTRIES = {
    *("Antarctica", "Bermuda", "Gibraltar", "Greenland", "Guam", "Jersey"),  # no states
    *("Palestine", "Taiwan"),  # disputed
    *("Georgia",),  # the American state comes first
}
DOUBTFUL = {
    "capital": {
        *("Israel", "Switzerland", "Netherlands"),  # disputed, none in law, not the seat of government
        *("Indonesia",),  # about to move
        *("Luxembourg", "Monaco", "Singapore"),  # the country's own name
    },
    "nationality": set(),
    "continent": {"Armenia", "Azerbaijan", "Cyprus", "Kazakhstan", "Russia", "Turkey"},  # on a border
    "currency": {"Bulgaria", "Croatia", "Venezuela", "Zimbabwe"},  # changed since
    "language": {"Algeria", "Mali", "Morocco", "Niger", "Peru", "Philippines"},  # changed, or not alone
}
NEED_THE = {"Netherlands", "Philippines"}  # "the capital of Netherlands" is no English
NAMES = {"United Kingdom": "Britain"}  # names of one token for names of several

CODES = {
    "dollar": "AUD CAD FJD JMD LRD NZD SGD USD",
    "euro": "EUR",
    "pound": "EGP GBP LBP SDG SYP",
    "peso": "ARS CLF CLP COP CUC CUP MXN PHP UYI UYU",  # CLF, UYI: units of account
    "dinar": "BHD DZD IQD JOD KWD LYD RSD TND",
    "rupee": "INR NPR PKR",
    "franc": "CHE CHF CHW RWF XAF XOF",  # CHE, CHW: units of account
    "krone": "DKK NOK",
    "krona": "SEK",
    "rial": "IRR OMR YER",
    "yen": "JPY",
    "yuan": "CNY",
    "ruble": "RUB",
    "lira": "TRY",
    "baht": "THB",
    "real": "BRL",
    "zloty": "PLN",
    "forint": "HUF",
    "taka": "BDT",
    "birr": "ETB",
}
CURRENCIES = {code: name for name, codes in CODES.items() for code in codes.split()}
LANGUAGES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "da": "Danish", "de": "German", "el": "Greek"},
    **{"en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fr": "French", "hr": "Croatian"},
    **{"hu": "Hungarian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese"},
    **{"km": "Khmer", "lt": "Lithuanian", "lv": "Latvian", "nb": "Norwegian", "ne": "Nepali", "nl": "Dutch"},
    **{"nn": "Norwegian", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian"},
    **{"ru": "Russian", "sq": "Albanian", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian"},
    **{"vi": "Vietnamese", "zh": "Chinese"},
}

# Facts that are pairs of an own relation: {relation of facts.json: relation of pairs.txt}.
FACT_PAIRS = {
    "opposite": "opposites",
    "month_after": "month_next",
    "day_after": "day_next",
    "number_after": "number_next",
    "ordinal": "cardinal_ordinal",
    "plural": "singular_plural",
    "past_tense": "base_past_irregular",
    "comparative": "adjective_comparative",
    "female": "male_female",
}
# Templates of `female` say "a {}", of a male person; "man" is in them already.
NO_MALE_NOUNS = {
    *("he", "his", "her", "him", "himself", "male", "males"),
    *("man", "men", "gentlemen", "sir", "bull", "rooster"),
}


def main():
    """Write the files and print what they hold."""
    for name, content in build().items():
        (HERE / name).write_text(content, encoding="utf-8")
        print(f"{name}: {len(content) / 1000:.0f} kB")


def build():
    """Return {file name: text}."""
    countries = read_countries()
    pairs = {name: [item.split(":") for item in items] for name, items in read_words("pairs.txt").items()}
    lists = {
        "categories.json": categories(countries),
        "analogies.json": analogies(countries, pairs),
        "sentiment.json": sentiment(),
        "facts.json": facts(countries, pairs),
        "agreement.json": agreement(),
    }
    return {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in lists.items()}


def package_folder(package):
    """Where a package lies. Found, not imported: only its data are wanted."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"{package} is not installed: pip install countryinfo vaderSentiment")
    return Path(spec.submodule_search_locations[0])


def token_id(word):
    """Return the id of " word", None if that is not one token."""
    tokens = tokenizer.gpt2().encode_ordinary(" " + word)
    return tokens[0] if len(tokens) == 1 else None


def single(words):
    return all(token_id(word) is not None for word in words)


def read_sections(name):
    """Return {heading: [line]} of a source file: "[heading]" lines, "#" comments, lines of content."""
    sections = {}
    for line in (HERE / "sources" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            heading = line.strip("[]")
            assert heading not in sections, f"{name}: [{heading}] twice"
            sections[heading] = []
        elif line and not line.startswith("#"):
            sections[heading].append(line)
    return sections


def read_words(name):
    return {heading: " ".join(lines).split() for heading, lines in read_sections(name).items()}


def read_countries():
    """Return {country: {capital, nationality, continent, currency, language}} of one-token countries.

    Commonest countries first. A fact that is missing, doubtful or not one thing is None.
    """
    countries = {}
    for path in package_folder("countryinfo").glob("data/*.json"):
        info = json.loads(path.read_text(encoding="utf-8"))
        country = NAMES.get(info["name"], info["name"])
        if token_id(country) is None or country in NOT_COUNTRIES:
            continue
        known = {
            "capital": info.get("capital"),
            "nationality": info.get("demonym"),
            "continent": info.get("region"),
            "currency": only(CURRENCIES.get(code) for code in info.get("currencies") or []),
            "language": only(LANGUAGES.get(code) for code in info.get("languages") or []),
        }
        if known["continent"] not in ("Africa", "Asia", "Europe"):  # America is two, Oceania is none
            known["continent"] = None
        doubtful = {relation for relation, names in DOUBTFUL.items() if country in names}
        countries[country] = {
            relation: None if relation in doubtful else value or None for relation, value in known.items()
        }
    return dict(sorted(countries.items(), key=lambda item: token_id(item[0])))


def only(values):
    """Return the one value that `values` repeat, else None."""
    values = set(values)
    return values.pop() if len(values) == 1 else None


def categories(countries):
    """Return categories.json."""
    words = read_words("categories.txt")
    facts_of = {relation: [known[relation] for known in countries.values()] for relation in DOUBTFUL}
    added = {
        "countries": list(countries),
        "nationalities": facts_of["nationality"],
        "cities": facts_of["capital"],
    }
    seen, result = {}, {}
    for name, own in sorted(words.items()):
        listed = list(dict.fromkeys(word for word in [*added.get(name, []), *own] if word))
        for word in listed:
            assert word not in seen, f"{word} is in {seen[word]} and in {name}"
            seen[word] = name
        one = [word for word in listed if token_id(word) is not None]
        common = set(sorted(one, key=token_id)[:MAX_WORDS])
        kept = [word for word in one if word in common]
        counts = {"listed": len(listed), "single_token": len(one), "kept": len(kept)}
        result[name] = {**(BOTH if name in added else OURS), **counts, "words": kept}
    return result


def analogies(countries, pairs):
    """Return analogies.json."""
    result = {}
    for relation in DOUBTFUL:
        known = [(country, facts[relation]) for country, facts in countries.items() if facts[relation]]
        result[f"country_{relation}"] = COUNTRYINFO | entry("pairs", known, single)
    # Ordinary words from here on; a day's successor makes seven pairs only, which facts.json uses.
    for relation, own in pairs.items():
        if relation != "day_next":
            result[relation] = OURS | entry("pairs", own, single)
    return dict(sorted(result.items()))


def entry(key, items, keep):
    """Return the `listed`, `kept` and content fields of a list, with the items that pass `keep`."""
    kept = [item for item in items if keep(item)]
    return {"listed": len(items), "kept": len(kept), key: kept}


def sentiment():
    """Return sentiment.json."""
    own = read_sections("sentiment.txt")
    adjectives = {sign: " ".join(own[f"{sign}_adjectives"]).split() for sign in ("positive", "negative")}
    unwanted = set(" ".join(own["not_wanted"]).split())

    strong = {"positive": [], "negative": []}
    path = package_folder("vaderSentiment") / "vader_lexicon.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        word, mean, *_ = line.split("\t")
        is_word = len(word) > 2 and word.isascii() and word.isalpha() and word not in unwanted
        if is_word and abs(float(mean)) >= STRONG:
            strong["positive" if float(mean) > 0 else "negative"].append(word)
    lexicon = {sign: sorted(word for word in words if single([word])) for sign, words in strong.items()}

    # Couples of about the same token id, dealt out in turn.
    good, bad = (
        sorted(set(words) & set(lexicon[sign]), key=token_id, reverse=True)
        for sign, words in adjectives.items()
    )
    couples = []
    while good and bad:
        low, high = sorted((good, bad), key=lambda words: token_id(words[-1]))
        if token_id(high[-1]) < NEAR_ID * token_id(low[-1]):
            couples.append((good.pop(), bad.pop()))
        else:
            low.pop()
    couples = couples[: len(couples) // 2 * 2]
    split = {"build": couples[::2], "held_out": couples[1::2]}
    lists = {
        sign: {name: [couple[i] for couple in part] for name, part in split.items()}
        for i, sign in enumerate(("positive", "negative"))
    }
    counts = {"listed": sum(map(len, strong.values())), "kept": sum(map(len, lexicon.values()))}
    templates = {"dev": own["templates_dev"], "test": own["templates_test"]}
    return VADER | counts | lists | {"templates": templates, "lexicon": lexicon}


def facts(countries, pairs):
    """Return facts.json."""
    templates = {}
    for heading, lines in read_sections("facts.txt").items():
        relation, split = heading.split()
        for text in lines:
            number = len(templates.setdefault(relation, []))
            templates[relation].append({"id": f"{relation}.{number}", "split": split, "text": text})

    result = {}
    for relation, texts in templates.items():
        if relation in FACT_PAIRS:
            origin, known = OURS, pairs[FACT_PAIRS[relation]]
            if relation == "opposite":
                known = [(entity, answer) for entity, answer in known if entity.islower()]  # not "North"
            if relation == "female":
                known = [(m, f) for m, f in known if m not in NO_MALE_NOUNS and m[-1] != "s"]
            if relation in ("female", "plural"):  # "a {}", not "an {}"
                known = [(entity, answer) for entity, answer in known if entity[0] not in "aeiou"]
        else:
            origin = COUNTRYINFO
            known = [(c, f[relation]) for c, f in countries.items() if f[relation] and c not in NEED_THE]
        result[relation] = origin | {"listed": len(known)} | with_foils(known) | {"templates": texts}
    return result


def with_foils(known):
    """Return the `kept` and `facts` fields from (entity, answer) pairs."""
    answers, kept = {}, {}
    for entity, answer in known:
        if single([entity, answer]) and entity not in kept and len(kept) < MAX_FACTS:
            answers[answer] = answers.get(answer, 0) + 1
            if answers[answer] <= MAX_PER_ANSWER:
                kept[entity] = answer
    rows, items = [], list(kept.items())
    for i, (entity, answer) in enumerate(items):
        start = i + len(items) // 2  # neighbours in the list are too much alike: light:dark, day:night
        others = [items[j % len(items)][1] for j in range(start, start + len(items))]
        foil = next(other for other in others if other not in (answer, entity))
        rows.append({"entity": entity, "answer": answer, "foil": foil})
    return {"kept": len(rows), "facts": rows}


def agreement():
    """Return agreement.json."""
    sections = read_sections("agreement.txt")
    contexts = sections.pop("contexts")
    pairs = []
    for heading, lines in sections.items():
        template, task, split = heading.split()
        for line in lines:
            clean, corrupted, correct, other = (part.strip() for part in line.split("|"))
            row = {"template": template, "task": task, "split": split, "clean": clean, "corrupted": corrupted}
            row |= {"correct": correct, "other": other, "context": len(pairs) % len(contexts)}
            pairs.append(row)
    return OURS | entry("pairs", pairs, equal_length) | {"contexts": contexts}


def equal_length(pair):
    """Whether both prompts of a pair have as many tokens, alone and after a space, and one-token answers."""
    lengths = {
        len(tokenizer.encode(space + pair[prompt]))
        for prompt in ("clean", "corrupted")
        for space in ("", " ")
    }
    return len(lengths) == 1 and single([pair["correct"], pair["other"]])


if __name__ == "__main__":
    configurator.run(main)
