// Three views: a prompt and its next token, a signal beside a rotated one, a token.
import { call, go, into, set, snapshot, state } from "./api.js";
import { about, cut, h, number, percent, quoted, soon, visible } from "./dom.js";
import { bars, heatMap, histogram, likely, waterfall } from "./draw.js";

export let info = null; // of the model

export async function readInfo() {
  info = await call("run");
  return info;
}

export function openSignal(signal) {
  return () => go({ view: "signal", signal });
}

// The server's words for a signal that there is not; a snapshot has no server.
function checkSignal(signal) {
  const last = info.n_signals - 1;
  if (!(signal >= 0 && signal <= last)) throw new Error(`no ${info.unit} ${signal}: ${info.unit}s are 0 to ${last}`);
}

// A box for the number of a signal; `pick` gets what was typed.
function signalBox(props, pick) {
  return h("input", { type: "number", min: 0, max: info.n_signals - 1, ...props,
    onchange: (event) => pick(Math.trunc(event.target.valueAsNumber) || 0) });
}

export function prompt() {
  return h("textarea", { id: "text", rows: 2, "aria-label": "Prompt", maxlength: 20000, spellcheck: "false", value: state.text,
    oninput: soon((event) => go({ text: event.target.value, position: null }), 250) });
}

// What the server reads of the prompt.
export async function readPrompt() {
  const found = await call("read", { text: state.text }, "reading");
  if (state.position !== null && state.position >= found.tokens.length) set({ position: null });
  return found;
}

// The tokens of the prompt as buttons, coloured by surprisal.
export function tokenRow({ tokens, dropped, empty }) {
  const at = state.position ?? tokens.length - 1;
  const move = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    go({ position: Math.min(tokens.length - 1, Math.max(0, at + step)) });
  };
  return [
    h("div", { class: "tokens", role: "group", "aria-label": "tokens", onkeydown: move }, tokens.map((token, i) =>
      h("button", { "aria-pressed": String(i === at), title: token.surprisal === null ? "the first token" : `surprisal ${number(token.surprisal)} nats`,
        style: { background: `rgb(var(--hot) / ${Math.min(0.75, (token.surprisal ?? 0) / 16).toFixed(3)})` }, onclick: () => go({ position: i }) },
      visible(token.text)))),
    h("p", { class: "note" }, "Colour: surprisal, from 0 (none) to 12 nats (deep orange).",
      empty && " The prompt is empty: this is the start of a document.",
      dropped > 0 && ` The first ${dropped.toLocaleString("en")} tokens are left out: only the last ${tokens.length} are read.`),
  ];
}

// Two boxes that say whose logit is explained.
export function pairBoxes() {
  const box = (key, words) => h("label", {}, words, h("input", { class: "word", id: key, placeholder: key === "foil" ? "none" : "the likeliest",
    value: typeof state[key] === "string" ? state[key] : "", onchange: (event) => go({ [key]: event.target.value || null }) }));
  return [box("target", "logit of"), box("foil", "minus that of"),
    h("button", { onclick: () => { go({ target: null, foil: null }); for (const id of ["target", "foil"]) document.getElementById(id).value = ""; } }, "reset")];
}

export function termRows(found, open = true) {
  const rows = found.terms.map((term) => ({ label: String(term.signal), hint: term.ends[0], value: term.value, before: term.before,
    control: term.rotated, open: open && openSignal(term.signal) }));
  if (found.n_others) rows.push({ label: `${found.n_others} others`, value: found.others });
  return [...rows, { label: "sum", value: found.sum, whole: true }];
}

export function sumTitle(found) {
  const of = (token) => `logit(${quoted(visible(token.text))})`;
  return found.foil ? `${of(found.target)} − ${of(found.foil)}, nats` : `${of(found.target)}, nats`;
}

export function shareOf(rows) {
  return ` These ${rows.length} have ${percent(rows.reduce((sum, row) => sum + row.p, 0))} of the probability.`;
}

// What a random rotation leaves as it is, for the methods.
function turned() {
  return info.vocab === "gains" ? "At the output alone, where logits are made, a random rotation of the signals is the same model: at the input this vocabulary has a gain for each signal, and rotated signals are another model."
    : "A random rotation of the signals is the same model.";
}

const promptMethod = () => [
  "A logit is a sum over signals, exactly: logit[v] = sum over s of A[s] W[v, s], with A the activations of the final state and W the recipes. The bars are these terms; the last one is their sum, which the forward pass gives as well.",
  turned() + " So the grey line under a bar is its control: how large a term of this rank is, in the mean, in 5 random rotations. Terms that are hardly longer say nothing about the learned signals. PCA and ICA of the same embedding are rivals found after training.",
  "Surprisal is −log p of a token after those before it. Logit lens: the stream at a layer, read as if it were the last one.",
];

export function promptView() {
  const row = h("div", { id: "tokens" }), next = h("div", { id: "next" }), terms = h("div", { id: "terms" }), map = h("div", { id: "map" });
  let tokens = [], last = {};
  const choice = (name) => h("label", {}, h("input", { type: "radio", name: "dictionary", value: name, checked: state.dictionary === name,
    onchange: () => go({ dictionary: name }) }), name === "native" ? "learned" : name);
  const showMap = () => into(map, async () => {
    const focused = map.contains(document.activeElement);
    if (focused) new MutationObserver((_, own) => { const svg = map.querySelector("svg"); if (svg) { own.disconnect(); svg.focus({ preventScroll: true }); } }).observe(map, { childList: true, subtree: true });
    if (state.lens !== null) checkSignal(state.lens);
    const found = await call("lens", { text: state.text, position: state.position, signal: state.lens }, "reading every layer");
    const here = { position: state.position ?? tokens.length - 1, layer: state.layer ?? info.n_layer };
    const n = found.rows[0].length;
    return [n < tokens.length && h("p", { class: "note" }, `Tokens ${found.first + 1} to ${found.first + n} of ${tokens.length}. Scroll, or click a token above for those around it.`),
      heatMap(found, tokens, here, (position, layer) => go({ position, layer }))];
  });
  const showNext = () => into([next, terms], async () => {
    const ask = { text: state.text, position: state.position, layer: state.layer, target: state.target, foil: state.foil, dictionary: state.dictionary };
    const found = await call("position", ask, state.dictionary === "ica" ? "fitting ICA, which may take minutes" : "summing signals");
    const after = `after ${quoted(visible(tokens[state.position ?? tokens.length - 1]?.text ?? ""))}`;
    return [
      [h("h2", {}, "Next token ", after), h("p", { class: "note" }, found.layer === info.n_layer ? `Click a token to explain its logit.${shareOf(found.top)}` :
        [`Read from the stream at layer ${found.layer}. `, h("button", { onclick: () => go({ layer: null }) }, "read the last one")]),
      likely(found.top, found.target.id, (target) => go({ target }))],
      [h("h2", {}, sumTitle(found)), h("p", { class: "note" }, `The ${found.terms.length} largest of ${found.terms.length + found.n_others} terms, beside each the words its signal promotes. Grey: size of this rank in random rotations. The forward pass gives ${number(found.logit, 4)}, the terms sum to ${number(found.sum, 4)}.`),
      waterfall(termRows(found, state.dictionary === "native")), found.notes.map((note) => h("p", { class: "note" }, note))]];
  });
  const update = () => {
    if (last.text !== state.text || last.position !== state.position) {
      into(row, async () => {
        const found = await readPrompt();
        tokens = found.tokens;
        showNext().then(showMap); // which takes longer
        return tokenRow(found);
      });
    } else {
      showNext();
      if (last.layer !== state.layer || last.lens !== state.lens) showMap();
    }
    last = { ...state };
  };
  const lens = signalBox({ "aria-label": `number of the ${info.unit}`, value: state.lens ?? 0, hidden: state.lens === null }, (signal) => go({ lens: signal }));
  const pick = h("select", { id: "lens", "aria-label": "what the map shows", value: state.lens === null ? "top" : "signal",
    onchange: (event) => { lens.hidden = event.target.value === "top"; go({ lens: lens.hidden ? null : lens.valueAsNumber || 0 }); } },
  h("option", { value: "top" }, "likeliest token"), h("option", { value: "signal" }, `activation of ${info.unit}`));
  return { update, content: [
    about("Type a prompt and click a token: the page shows what the model expects next, and which signals make it so.", ...promptMethod()),
    prompt(), row, h("div", { class: "row" }, pairBoxes()),
    h("div", { class: "row", role: "radiogroup", "aria-label": "signals" }, "signals:", ["native", "rotated", "pca", "ica"].map(choice)),
    h("div", { class: "columns" }, next, terms),
    h("h2", {}, "Layers by positions"), h("div", { class: "row" }, pick, lens,
      h("span", { class: "note" }, "From the embedding (0) up to the final norm (end). Deeper colour: larger. Click a cell to read the stream there.")), map,
  ] };
}

// ----------------------------------------------------------------------------------------------------

function column(title, pairs, open) {
  return h("div", {}, h("h3", {}, title), bars(pairs.map(([text, value]) => ({ label: text, value, text: number(value), open: open && (() => open(text)) }))));
}

function contextLines(lines) {
  return lines.map(([before, token, after, value]) => h("p", { class: "context" }, "…", before.replace(/\s+/g, " "), h("mark", {}, visible(token)),
    after.replace(/\s+/g, " "), "… ", h("small", {}, number(value))));
}

function card(found, contexts) {
  const learned = found.dictionary === "native";
  const z = found.classes.map(([name, value, q]) => h("span", { class: "chip" }, `${name} z ${number(value, 1)}, q ${number(q, 3)}`, q > 0.05 && " (not significant)"));
  return h("section", { class: `card ${found.dictionary}` },
    h("h2", {}, learned ? `${info.unit} ${found.signal}` : `random rotation, ${found.signal}: the control`),
    h("p", {}, `Rank ${found.rank + 1} of ${info.n_signals} by usage (${percent(found.usage)} of squared codes). Column: ${found.class}. Correlation with log frequency ${number(found["Spearman with log frequency"])}, skew ${number(found.skew)}, excess kurtosis ${number(found["excess kurtosis"])}.`),
    h("p", {}, "Word classes: ", z.length ? z : "too few labelled words"),
    found.ablation && h("p", { class: "ablation" }, `Removed after the prompt: log p of ${quoted(visible(found.ablation.token))} changes by ${number(found.ablation.change, 3)} nats, KL ${number(found.ablation.kl, 3)} nats. Exact.`),
    h("div", { class: "columns narrow" }, column("promotes, code", found.high), column("suppresses, code", found.low)),
    h("h3", {}, "Activations on held-out text"),
    found.histogram ? [histogram(found.histogram), h("h3", {}, "Strongest at"), contextLines(found.strong), h("h3", {}, "Weakest at"), contextLines(found.weak)]
      : h("p", { class: "note" }, contexts.missing ? `None: ${contexts.missing}.` : `Reading held-out text: ${contexts.done} of ${contexts.total} windows.`),
    learned && h("p", { class: "links" }, "Neighbours (cosine): ", found.neighbours.filter(([, cosine]) => Math.abs(cosine) > 0.005).map(([i, cosine]) => h("button", { onclick: openSignal(i) }, `${i} (${number(cosine)})`))));
}

const signalMethod = () => [
  "Codes are recipes times the length of the signal's row of the basis: how far along the signal a token's embedding goes. Because the embedding is tied, the tokens that a signal promotes at the output carry it most at the input.",
  `The rotated card is of one signal after all were rotated at random. ${turned()} The signal of the same rank by usage stands here. Whatever it shows as well is no property of the learned signal: a z, a long tail, contexts that seem to agree.`,
  "Word classes: rank-sum z of their words' codes, log frequency regressed out; q is the false discovery rate over all signals and classes. Contexts: the held-out windows with the most extreme activations A[s] of the final state, one place a window.",
];

export function signalView() {
  const cards = h("div", { id: "cards" }), near = h("p", { class: "links" });
  const input = signalBox({ id: "signal", "aria-label": `number of the ${info.unit}`, value: state.signal }, (signal) => go({ signal }));
  const step = (by) => () => go({ signal: (state.signal + by + info.n_signals) % info.n_signals });
  let timer;
  const update = () => {
    clearTimeout(timer);
    input.value = state.signal;
    const here = { text: state.text, position: state.position };
    if (!snapshot) into(near, async () => ["Strongest after the prompt: ",
      (await call("strongest", here)).signals.map((i) => h("button", { onclick: openSignal(i) }, String(i)))]);
    into(cards, async () => {
      checkSignal(state.signal);
      const found = await call("signal", snapshot ? { signal: state.signal } : { signal: state.signal, ...here }, "making the cards");
      if (!snapshot && !found.contexts.ready && !found.contexts.missing) timer = setTimeout(() => cards.isConnected && update(), 1500);
      return [h("div", { class: "columns" }, found.cards.map((each) => card(each, found.contexts))),
        found.claims.length > 0 && [h("h2", {}, "Claims about signals of this run"), h("ul", {}, found.claims.map((claim) =>
          h("li", {}, h("span", { class: claim.verdict.split(" ")[0] }, claim.verdict), ` ${claim.claim} `, h("small", {}, `${claim.experiment}: ${claim.reason}`))))]];
    });
  };
  return { update, content: [
    about("What a signal promotes and suppresses, and where in text it is strong; beside it, always, the same of a random rotation.", ...signalMethod()),
    h("div", { class: "row" }, h("label", {}, info.unit, input), h("button", { onclick: step(-1) }, "previous"), h("button", { onclick: step(1) }, "next"),
      !snapshot && h("span", { class: "note" }, "prompt at hand: ", quoted(cut(state.text, 50)))), near, cards,
  ] };
}

// ----------------------------------------------------------------------------------------------------

const TOKEN_METHOD = [
  "A recipe is a token's row of codes. A bar's share is that of the recipe's squared length.",
  "Neighbours by cosine, after subtracting the mean of the 2,000 most frequent tokens. Shuffled recipes are the control: each token has the recipe of another one that is as frequent, so these neighbours are of chance.",
  "Arithmetic is 3CosAdd: cosine with the first word, minus that with the second, plus that with the third. Many famous answers are only neighbours of one of the words, so these stand beside.",
];

export function tokenView() {
  const box = h("div", { id: "token" }), sums = h("div", { id: "sums" });
  const open = (text) => go({ word: text.trim() || text });
  const input = h("input", { id: "word", class: "word", value: state.word ?? "", placeholder: "a word", "aria-label": "a word",
    onchange: (event) => go({ word: event.target.value || null }) });
  const part = (key) => h("input", { class: "word", id: key, "aria-label": key, value: state[key], onchange: (event) => go({ [key]: event.target.value || "the" }) });
  const update = () => {
    input.value = state.word ?? "";
    into(box, async () => {
      const found = await call("token", { word: state.word ?? info.word }, "making the recipe");
      return [
        h("h2", {}, `${quoted(visible(found.text))}, token ${found.id}`), h("p", { class: "note" }, found.seen, found.rare && ": rare, so its row may say little", "."),
        h("div", { class: "columns" },
          h("div", {}, h("h3", {}, "Recipe, code and share"), bars(found.recipe.map((row) => ({ label: String(row.signal), hint: row.value < 0 ? row.ends[1] : row.ends[0],
            value: row.value, text: `${number(row.value)}, ${percent(row.share)}`, open: openSignal(row.signal) })))),
          h("div", {}, h("h3", {}, `Words that share its ${found.strong} strongest signals, with the same sign`), bars(found.sharing.map(([text, n]) => ({ label: text, value: n, text: `${n} shared`, open: () => open(text) }))))),
        h("h2", {}, "Neighbours, cosine"),
        h("div", { class: "columns narrow" }, Object.entries(found.neighbours).map(([name, pairs]) => column(name === "shuffled recipes" ? "shuffled recipes: the control" : `by ${name}`, pairs, open)))];
    });
    if (!snapshot) into(sums, async () => {
      const found = await call("arithmetic", { plus: state.plus, minus: state.minus, also: state.also }, "adding recipes");
      const [b, , c] = found.words, titles = { "3CosAdd": "the sum, of three cosines", "only b": `only ${b.trim()}: a control`, "only c": `only ${c.trim()}: a control` };
      return h("div", { class: "columns narrow" }, Object.entries(found.lists).map(([name, pairs]) => column(titles[name], pairs, open)));
    });
  };
  return { update, content: [
    about("What a token is made of: its recipe, the tokens with similar recipes, and sums of recipes.", ...TOKEN_METHOD),
    h("div", { class: "row" }, h("label", {}, "token", input), h("span", { class: "note" }, "a word that is one token of this model")), box,
    !snapshot && [h("h2", {}, "Arithmetic"), h("div", { class: "row" }, part("plus"), "−", part("minus"), "+", part("also")), sums],
  ] };
}
