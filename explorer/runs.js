// The claims of a run, beside those of another one, and its training curves.
import { call, go, into, snapshot, state } from "./api.js";
import { about, h, number } from "./dom.js";
import { curves } from "./draw.js";
import { info } from "./look.js";

const RUNS_METHOD = [
  "An effect claim is supported if the 95 % interval of its gain over every control lies above zero; a signals claim if the learned signals beat at least 19 random rotations (p at most 0.05) and every rival, such as PCA and ICA. A description has no verdict. The methods are in experiments/README.md.",
  "One run is one model: intervals count words or prompts, not seeds. A red line marks a claim whose verdict differs between the two runs.",
];

function verdict(claim) {
  return claim ? [h("span", { class: claim.verdict.split(" ")[0] }, claim.verdict), h("br"), h("small", {}, estimate(claim.measured))] : "–";
}

function estimate([value, low, high]) {
  return low === null || low === undefined ? number(value, 3) : `${number(value, 3)} [${number(low, 3)}, ${number(high, 3)}]`;
}

export function runsView() {
  const box = h("div", { id: "claims" }), lines = h("div", { class: "columns" });
  const pick = h("select", { id: "other", "aria-label": "another run", value: state.other ?? info.beside ?? "", onchange: (event) => go({ other: event.target.value }) },
    h("option", { value: "" }, "no other run"), info.runs.map((name) => h("option", { value: name }, name)));
  const update = () => {
    const name = state.other ?? info.beside;
    into([box, lines], async () => {
      const [own, other] = await Promise.all([call("claims"), name && !snapshot ? call("claims", { run: name }) : null]);
      const theirs = Object.fromEntries((other?.claims ?? []).map((claim) => [`${claim.experiment} ${claim.key}`, claim]));
      const count = (name) => own.claims.filter((claim) => claim.verdict === name).length;
      const drawn = Object.entries(own.curves);
      return [[
        h("h2", {}, `${own.name}, step ${own.step.toLocaleString("en")}`, other && ` beside ${other.name}, step ${other.step.toLocaleString("en")}`),
        own.claims.length ? h("p", {}, `${count("supported")} claims are supported, ${count("not supported")} are not, ${count("inconclusive")} are inconclusive, ${count("description")} are descriptions.`)
          : h("p", {}, "This run has no results. They come from ", h("code", {}, own.again)),
        other && !other.claims.length && h("p", {}, `${other.name} has no results. They come from `, h("code", {}, other.again)),
        Object.entries(own.left_out).map(([name, why]) => h("p", { class: "note" }, `Left out: ${name}: ${why}`)),
        own.claims.length > 0 && h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "claim"), h("th", {}, "verdict, measured"), other && h("th", {}, other.name))),
          h("tbody", {}, own.claims.map((claim) => {
            const second = theirs[`${claim.experiment} ${claim.key}`];
            return h("tr", { class: second && second.verdict !== claim.verdict ? "differs" : null },
              h("td", { class: "wrap" }, claim.claim, h("br"), h("small", {}, `${claim.experiment}, ${claim.kind}: ${claim.reason}`)), h("td", {}, verdict(claim)), other && h("td", {}, verdict(second)));
          })))],
      drawn.length ? drawn.map(([words, points]) => h("div", {}, h("h3", {}, words), curves([points, other?.curves[words]].filter(Boolean), words)))
        : h("p", { class: "note" }, "No metrics.jsonl lies beside this run: a release brings none.")];
    });
  };
  return { update, content: [about("Which claims about this run survive their controls, and how it was trained.", ...RUNS_METHOD),
    !snapshot && h("div", { class: "row" }, h("label", {}, "beside", pick)), box, h("h2", {}, "Training"), lines] };
}
