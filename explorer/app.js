// The page: one view at a time, whose state is the URL.
import { readUrl, set, go, snapshot, state } from "./api.js";
import { fill, h, number } from "./dom.js";
import { editView } from "./edit.js";
import { info, promptView, readInfo, signalView, tokenView } from "./look.js";
import { runsView } from "./runs.js";

const VIEWS = { prompt: ["Prompt", promptView], signal: ["Signal", signalView], token: ["Token", tokenView], edit: ["Edit", editView], runs: ["Runs", runsView] };
const LIVE = ["prompt", "edit"]; // views that need the model
let current = {};

function show() {
  if (!VIEWS[state.view] || (snapshot && LIVE.includes(state.view))) set({ view: snapshot ? "signal" : "prompt" });
  for (const button of document.getElementById("nav").children) {
    if (button.dataset.view === state.view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  if (current.name !== state.view) {
    current.leave?.();
    current = { name: state.view, ...VIEWS[state.view][1]() };
    fill(document.getElementById("main"), current.content);
  }
  current.update();
}

async function start() {
  readUrl();
  try {
    await readInfo();
  } catch (error) {
    fill(document.getElementById("main"), h("p", { class: "error", role: "alert" }, error.message));
    return;
  }
  document.title = `${info.name}: reFlow explorer`;
  const size = `${info.n_layer} layers, width ${info.n_embd}, ${info.n_signals} ${info.unit}s`;
  fill(document.getElementById("name"), info.name, " ", h("small", {}, `${size}${info.loss ? `, loss ${number(info.loss)} nats per token` : ""}${snapshot ? ", a snapshot" : ""}`));
  const views = Object.entries(VIEWS).filter(([name]) => !(snapshot && LIVE.includes(name)));
  fill(document.getElementById("nav"), views.map(([view, [words]]) => h("button", { "data-view": view, onclick: () => go({ view }) }, words)));
  addEventListener("state", show);
  addEventListener("popstate", () => { readUrl(); current = {}; show(); });
  show();
}

start();
