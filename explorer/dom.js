// Elements by hand. Text enters the page as text alone: tokens are a stranger's strings.

const SVG = "http://www.w3.org/2000/svg";

function kept(children) {
  return children.flat(4).filter((child) => child !== null && child !== undefined && child !== false);
}

function build(element, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, text] of Object.entries(value)) element.style.setProperty(name, text);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...kept(children));
  if (props?.value !== undefined && element.tagName === "SELECT") element.value = props.value;
  return element;
}

export function h(tag, props, ...children) {
  return build(document.createElement(tag), props, children);
}

export function s(tag, props, ...children) {
  return build(document.createElementNS(SVG, tag), props, children);
}

export function number(x, digits = 2) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 10 ** -digits || size >= 1e6)) return x.toExponential(1);
  return x.toFixed(size >= 1000 ? 0 : digits);
}

export function percent(p) {
  if (p > 0 && p < 0.0001) return (100 * p).toExponential(0) + " %";
  return (100 * p).toFixed(p < 0.1 ? 2 : 1) + " %";
}

export function quoted(text) {
  return `“${text}”`;
}

// What a token looks like in a line: white space alone is made visible.
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
}

export function cut(text, n) {
  const letters = [...text];
  return letters.length > n ? letters.slice(0, n - 1).join("") + "…" : text;
}

export function fill(element, ...children) {
  element.replaceChildren(...kept(children));
  return element;
}

export function soon(f, wait) {
  let timer;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => f(...args), wait);
  };
}

export function about(sentence, ...paragraphs) {
  return [
    h("p", {}, sentence),
    h("details", {}, h("summary", {}, "Method and words"), paragraphs.map((text) => h("p", {}, text))),
  ];
}
