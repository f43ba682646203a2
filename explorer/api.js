// Calls of the server, or answers of a snapshot; the state, which is the URL.
import { fill, h } from "./dom.js";

export const snapshot = typeof SNAPSHOT === "undefined" ? null : SNAPSHOT;

const DEFAULTS = {
  token: "", view: snapshot ? "signal" : "prompt", text: "The capital of France is", position: null, layer: null, target: null,
  foil: null, dictionary: "native", lens: null, signal: 0, word: null, edits: [], seed: 0, temperature: 0.8, n: 40, other: null,
  plus: "king", minus: "man", also: "woman",
};
const PLAIN = ["token", "view", "text", "dictionary"]; // written as they are; others as JSON
export const state = { ...DEFAULTS };

export function readUrl() {
  Object.assign(state, DEFAULTS);
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (!(key in DEFAULTS)) continue;
    try {
      state[key] = PLAIN.includes(key) ? value : JSON.parse(value);
    } catch {
      state[key] = value; // a word that was typed into the URL
    }
    if (typeof DEFAULTS[key] === "number" && !Number.isFinite(state[key])) state[key] = DEFAULTS[key];
    if (key === "edits" && !Array.isArray(state.edits)) state.edits = [];
  }
}

export function url() {
  const params = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    const text = JSON.stringify(value);
    if (text !== JSON.stringify(DEFAULTS[key])) params.set(key, PLAIN.includes(key) ? value : text);
  }
  return "#" + params;
}

export function set(changes, push = false) {
  Object.assign(state, changes);
  history[push ? "pushState" : "replaceState"](null, "", url());
}

// Change the state and show it: app.js listens.
export function go(changes) {
  set(changes, "view" in changes);
  dispatchEvent(new Event("state"));
}

// A visible sign of work, for what takes longer than a moment.
const working = new Set();

function showWork() {
  const sign = document.getElementById("busy"), shown = [...working].filter((each) => each.late);
  sign.textContent = shown.at(-1)?.words ?? "";
  sign.classList.toggle("on", shown.length > 0);
  document.getElementById("main").setAttribute("aria-busy", String(working.size > 0));
}

export async function work(words, promise) {
  const own = { words, late: false };
  working.add(own);
  showWork();
  const timer = setTimeout(() => { own.late = true; showWork(); }, 150);
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    working.delete(own);
    showWork();
  }
}

async function post(name, ask, signal) {
  const headers = { "Content-Type": "application/json", "X-Token": state.token };
  let answer;
  try {
    answer = await fetch("/api/" + name, { method: "POST", headers, body: JSON.stringify(ask), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("explore.py does not answer: is it still running?");
  }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `error ${answer.status}`);
  return answer;
}

// The id of a token in a snapshot, by what one would type.
function tokenOf(word) {
  for (const [key, answer] of Object.entries(snapshot)) {
    if (key.startsWith("token ") && (answer.text === " " + word || answer.text === word)) return answer.id;
  }
  return word;
}

export async function call(name, ask = {}, words = "working") {
  if (!snapshot) return work(words, post(name, ask).then((answer) => answer.json()));
  if (name === "token" && typeof ask.word === "string") ask = { word: tokenOf(ask.word) };
  const found = snapshot[`${name} ${JSON.stringify(ask)}`];
  if (!found) throw new Error("This is not in the snapshot. python explore.py shows it with the model.");
  return found;
}

export async function stream(ask, each, signal) {
  const answer = await post("generate", ask, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) each(JSON.parse(line));
  }
}

// Fill an element with what a promise gives, or several with one part each. A mistake is a line in the first of them,
// unless the page says it already; an answer that comes too late is dropped.
const tickets = new WeakMap();

export async function into(places, make) {
  const elements = [places].flat(), ticket = {};
  for (const element of elements) {
    tickets.set(element, ticket);
    element.setAttribute("aria-busy", "true"); // what stands there is old: it is dimmed
  }
  let parts;
  try {
    parts = await make();
    if (elements.length === 1) parts = [parts];
  } catch (error) {
    const said = [...document.querySelectorAll(":not([aria-busy]) > .error")].some((line) => line.textContent === error.message);
    parts = said ? [] : [h("p", { class: "error", role: "alert" }, error.message)];
  }
  elements.forEach((element, i) => {
    if (tickets.get(element) !== ticket) return;
    element.removeAttribute("aria-busy");
    fill(element, parts[i]);
  });
}
