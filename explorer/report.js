// Lists that are sorted and filtered by the form above them; a link opens what it points at.
for (const form of document.querySelectorAll("form.tools")) {
  const list = form.nextElementSibling, items = [...list.children];
  const order = { supported: 0, "not supported": 1, inconclusive: 2, description: 3, effect: 0, signals: 1, gauge: 2 };
  const show = () => {
    const { verdict, kind, find, sort } = Object.fromEntries(new FormData(form));
    let n = 0;
    for (const item of items) {
      const fits = (!verdict || item.dataset.verdict === verdict) && (!kind || item.dataset.kind === kind);
      item.hidden = !(fits && item.textContent.toLowerCase().includes((find ?? "").toLowerCase()));
      n += !item.hidden;
    }
    const key = (item) => order[item.dataset[sort]] ?? 0;
    list.append(...[...items].sort((a, b) => key(a) - key(b)));
    form.querySelector("output").textContent = `${n} of ${items.length}`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.tagName === "DETAILS") target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
