// Edits that are moved by sliders: the distribution, the sum over signals, and continuations side by side.
import { call, go, into, set, snapshot, state, stream, url } from "./api.js";
import { about, fill, h, number, quoted, soon, visible } from "./dom.js";
import { likely, waterfall } from "./draw.js";
import { info, pairBoxes, prompt, readPrompt, shareOf, sumTitle, termRows, tokenRow } from "./look.js";

const EDIT_METHOD = [
  "add: the direction of a signal or of a word's embedding enters the stream, value times as long as the stream is there, at every token. scale: what there is of it is multiplied by the value; 0 removes it.",
  "input changes the embeddings of all tokens; layers a to b the streams entering these blocks; output the input of the final norm, or, for a signal that is scaled, its term in every logit. At the output no forward pass is needed, and the result is exact.",
  "The dark ticks are the values without edits. The third continuation is the control: the same amount, along a random direction. All three draw from the same seed. The price is the KL divergence, nats per token, that the edits cause on held-out text which they are not about.",
];

const START = { op: "scale", name: 0, value: 0, place: "output", start: 0, stop: 0 };

// The edits as sample.py takes them, null if one scales; and as Python.
export function asSteer(edits) {
  if (!edits.length || edits.some((edit) => edit.op !== "add")) return null;
  const layers = (edit) => edit.place === "input" ? "0" : edit.place === "output" ? String(info.n_layer) : `${edit.start}-${edit.stop}`;
  const name = (edit) => typeof edit.name === "number" ? `s${edit.name}` : edit.name;
  const items = edits.map((edit) => `${edit.value < 0 ? "-" : "+"}${name(edit)}:${Math.abs(edit.value)}@${layers(edit)}`);
  return `python sample.py --run=${info.place} --prompt=${shell(state.text)} --steer=${shell(items.join(","))} --compare --num_samples=1 --max_new_tokens=${state.n} --temperature=${state.temperature} --seed=${state.seed} --dtype=fp32`;
}

function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function asPython(edits) {
  const items = edits.map((e) => `Edit(${[e.op, e.name, e.value, e.place, e.start, e.stop].map((x) => JSON.stringify(x)).join(", ")})`);
  return `from explorer.edits import Edit, edited\nfrom reflow import load\n\nm = load(${JSON.stringify(info.place)})\nwith edited(m, [${items.join(", ")}]):\n    print(m.generate(${JSON.stringify(state.text)}, max_new_tokens=${state.n}, temperature=${state.temperature}, seed=${state.seed}))`;
}

export function editView() {
  const rows = h("div", { id: "edits" }), row = h("div", { id: "tokens" }), next = h("div", { id: "next" }), terms = h("div", { id: "terms" });
  const price = h("p", { id: "price", class: "note" }), copies = h("div", {}), panes = h("div", { class: "columns narrow" });
  let busy = false, again = false, last = {}, going = null;

  // One request at a time; of those that a moving slider asks for meanwhile, the last one counts.
  const show = async () => {
    if (busy) { again = true; return; }
    busy = true;
    const ask = { text: state.text, position: state.position, target: state.target, foil: state.foil, edits: state.edits };
    await into([next, terms], async () => {
      const found = await call("edit", ask, "computing");
      return [[h("h2", {}, "Next token"), h("p", { class: "note" }, `KL from the model without edits ${number(found.kl, 4)} nats. ${found.exact ? "Exact, no forward pass" : "A forward pass"}, ${number(found.ms, 0)} ms. Ticks: without edits.${shareOf(found.top)}`),
        likely(found.top, found.target.id, (target) => go({ target }))],
      [h("h2", {}, sumTitle(found)), h("p", { class: "note" }, `Terms with edits; ticks: without. The sum was ${number(found.sum_before, 3)}, it is ${number(found.sum, 3)}.`), waterfall(termRows(found))]];
    });
    busy = false;
    if (again) { again = false; show(); }
  };
  const showPrice = soon(() => into(price, async () => {
    if (!state.edits.length) return ["No edits yet."];
    if (!price.querySelector(".paid")) fill(price, "The price is being measured.");
    const found = await call("price", { edits: state.edits }, "measuring the price");
    return [h("span", { class: "paid" }, `Price on ${found.tokens} tokens of held-out text: KL ${number(found.edits, 4)} nats per token; a random direction of equal size: ${number(found["random direction"], 4)}.`)];
  }), 400);
  const showCopies = () => {
    const steer = asSteer(state.edits);
    const copy = (text) => h("button", { onclick: (event) => { navigator.clipboard?.writeText(text); event.target.textContent = "copied"; } }, "copy");
    fill(copies, state.edits.length > 0 && [
      h("div", { class: "row" }, h("span", {}, "This page: its URL, with the token of this server"), copy(location.origin + location.pathname + url())),
      steer ? [h("pre", { id: "steer" }, steer), copy(steer)] : h("p", { class: "note" }, "sample.py --steer adds and does not scale: the Python has it."),
      h("pre", { id: "python" }, asPython(state.edits)), copy(asPython(state.edits))]);
  };
  const changed = () => { show(); showCopies(); showPrice(); };
  const change = (i, part) => { set({ edits: state.edits.map((edit, j) => (j === i ? { ...edit, ...part } : edit)) }); changed(); };

  const editRow = (edit, i) => {
    const range = edit.op === "add" ? { min: -1, max: 1, step: 0.01 } : { min: -2, max: 4, step: 0.05 };
    const shown = h("output", {}, number(edit.value)), rebuild = (part) => { change(i, part); showRows(); };
    const layer = (key) => h("input", { type: "number", min: 0, max: info.n_layer, value: edit[key], "aria-label": key === "start" ? "first layer" : "last layer",
      onchange: (event) => change(i, { [key]: event.target.valueAsNumber || 0 }) });
    const option = (name) => h("option", { value: name }, name);
    return h("div", { class: "edit" },
      h("select", { "aria-label": "what to do", value: edit.op, onchange: (event) => rebuild({ op: event.target.value, value: event.target.value === "add" ? 0.1 : 0 }) }, option("scale"), option("add")),
      h("input", { class: "word", "aria-label": `a ${info.unit}'s number, or a word`, value: String(edit.name),
        onchange: (event) => { const text = event.target.value.trim(); if (text) change(i, { name: /^s?\d+$/.test(text) ? Number(text.replace("s", "")) : text }); } }),
      "at", h("select", { "aria-label": "where", value: edit.place, onchange: (event) => rebuild({ place: event.target.value }) }, option("output"), option("input"), option("layers")),
      edit.place === "layers" && [layer("start"), "to", layer("stop")],
      h("input", { type: "range", "aria-label": "value", ...range, value: edit.value, oninput: (event) => { shown.textContent = number(event.target.valueAsNumber); change(i, { value: event.target.valueAsNumber }); } }),
      shown, h("button", { "aria-label": "remove this edit", onclick: () => { set({ edits: state.edits.filter((_, j) => j !== i) }); showRows(); changed(); } }, "remove"));
  };
  const showRows = () => fill(rows, state.edits.map(editRow));
  const add = () => { set({ edits: [...state.edits, { ...START }] }); showRows(); changed(); };

  const start = h("button", { id: "start", class: "primary" }, "Continue the text"), stop = h("button", { id: "stop", disabled: true, onclick: () => going?.abort() }, "Stop");
  const generate = async () => {
    const names = state.edits.length ? ["without edits", "with edits", "random direction: the control"] : ["without edits"];
    const texts = names.map(() => h("span", {}));
    fill(panes, names.map((name, i) => h("div", {}, h("h3", {}, name), h("div", { class: "text", "data-way": i }, state.text, texts[i]))));
    going = new AbortController();
    [start.disabled, stop.disabled] = [true, false];
    const ask = { text: state.text, edits: state.edits, n: state.n, temperature: state.temperature, seed: state.seed };
    try {
      await stream(ask, (line) => { if (line.error) throw new Error(line.error); texts[line.way].append(line.text); }, going.signal);
    } catch (error) {
      if (error.name !== "AbortError") panes.append(h("p", { class: "error", role: "alert" }, error.message));
    }
    [start.disabled, stop.disabled] = [false, true];
  };
  start.addEventListener("click", generate);
  const field = (key, words, props) => h("label", {}, words, h("input", { type: "number", id: key, value: state[key], ...props,
    onchange: (event) => { if (Number.isFinite(event.target.valueAsNumber)) set({ [key]: event.target.valueAsNumber }); showCopies(); } }));

  const update = () => {
    if (last.text !== state.text || last.position !== state.position)
      into(row, async () => tokenRow(await readPrompt()));
    if (rows.childElementCount !== state.edits.length || last.edits !== state.edits) showRows();
    last = { ...state };
    changed();
  };
  const leave = () => going?.abort();
  return { update, leave, content: [
    about("Remove, scale or add signals or directions of words, and watch what follows.", ...EDIT_METHOD),
    prompt(), row, h("h2", {}, "Edits"), rows, h("div", { class: "row" }, h("button", { id: "add", onclick: add }, "Add an edit")), price,
    h("div", { class: "row" }, pairBoxes()), h("div", { class: "columns" }, next, terms),
    h("h2", {}, "Continuations"), h("div", { class: "row" }, field("n", "tokens", { min: 1, max: 200 }), field("temperature", "temperature", { min: 0, max: 10, step: 0.1 }),
      field("seed", "seed", { min: 0, step: 1 }), start, stop), panes, h("h2", {}, "Take it along"), copies,
  ] };
}
