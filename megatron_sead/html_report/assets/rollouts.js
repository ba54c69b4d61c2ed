// Rollouts token by token. Everything that a model or a prompt wrote becomes text nodes, never markup.
(() => {
  "use strict";
  const source = document.getElementById("rollouts-data");
  if (!source) return;
  const { rollouts, texts } = JSON.parse(source.textContent);
  const byId = (id) => document.getElementById(id);
  const MEANINGS = { A: "A: both sure", B: "B: student unsure", C: "C: teacher unsure too", "-": "not taught from" };
  const MEASURES = {
    taught: ["what it taught", (r, i) => (r.wf && r.wr ? part(r.wf[i], r.fk?.[i]) + part(r.wr[i], r.rk?.[i]) : null)],
    rk: ["reverse KL", (r, i) => r.rk?.[i]],
    fk: ["forward KL", (r, i) => r.fk?.[i]],
    hs: ["student's entropy", (r, i) => r.hs?.[i]],
    ht: ["teacher's entropy", (r, i) => r.ht?.[i]],
    weight: ["weight", (r, i) => (r.wf && r.wr ? (r.wf[i] ?? 0) + (r.wr[i] ?? 0) : null)],
  };
  const part = (weight, divergence) => (weight && divergence ? weight * divergence : 0);
  let open = null; // the rollout that is shown
  let chosen = 0; // its token

  function node(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined) continue;
      if (name === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
      else element.setAttribute(name, value);
    }
    for (const child of children) if (child !== null && child !== undefined) element.append(child);
    return element;
  }
  const number = (v) => (v === null || v === undefined ? "unknown" : Math.abs(v) >= 1e-3 || v === 0 ? String(+v.toPrecision(3)) : v.toExponential(1));
  const percent = (p) => (p === null || p === undefined ? "?" : p >= 0.0995 ? (100 * p).toFixed(0) + " %" : (100 * p).toPrecision(2) + " %");

  // Characters that show nothing, or that turn the direction of others, are shown by their number
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  function shown(text) {
    const fragment = document.createDocumentFragment();
    let last = 0;
    const mark = (label) => node("span", { class: "mark" }, label);
    for (const found of text.matchAll(HIDDEN)) {
      const joins = found[0] === "\u200d" || found[0] === "\ufe0f";
      if (joins && text.length > 1) continue; // within an emoji
      fragment.append(text.slice(last, found.index), mark("\u2039" + "U+" + found[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u203a"));
      last = found.index + found[0].length;
    }
    fragment.append(text.slice(last));
    return fragment;
  }
  function tokenText(text) {
    if (text === "") return node("span", { class: "mark" }, "\u00b7");
    const fragment = document.createDocumentFragment();
    text.split("\n").forEach((line, place) => {
      if (place) fragment.append(node("span", { class: "mark" }, "\u21b5"), "\n");
      fragment.append(shown(line));
    });
    return fragment;
  }
  const named = (text) => (text === "" ? "part of the character before" : JSON.stringify(text));

  const share = (rollout, zone) => [...rollout.zones].filter((z) => z === zone).length / Math.max(1, rollout.zones.length);
  const mix = (rollout) => ["A", "B", "C"].map((zone) => `${zone} ${Math.round(100 * share(rollout, zone))}`).join(" / ") + " %";
  const verdict = (rollout) => (rollout.right ? "right" : "wrong");
  const ended = { finished: "finished", cut: "cut", repeated: "cut for repetition" };

  // ---- the list and its filters
  function options(id, values, every) {
    const select = byId(id);
    select.append(node("option", { value: "" }, every));
    for (const value of values) select.append(node("option", { value }, value));
  }
  const unique = (values) => [...new Set(values.filter((v) => v !== null && v !== undefined).map(String))];
  const inOrder = (values) => values.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  options("by-step", inOrder(unique(rollouts.map((r) => r.step))), "every step");
  options("by-level", inOrder(unique(rollouts.map((r) => r.level))), "every level");
  options("by-run", unique(rollouts.map((r) => r.run)), "every run");
  byId("by-run").parentElement.hidden = unique(rollouts.map((r) => r.run)).length < 2;
  byId("by-level").parentElement.hidden = unique(rollouts.map((r) => r.level)).length < 1;

  const haystack = (r) => (r.hay ??= [r.question, r.texts.join(""), r.prompt, r.answers.join(" ")].join("\n").toLowerCase());
  function fits(r) {
    const words = byId("by-text").value.toLowerCase().trim();
    const least = Number(byId("by-share").value) / 100;
    return (!words || haystack(r).includes(words))
      && (!byId("by-step").value || String(r.step) === byId("by-step").value)
      && (!byId("by-level").value || String(r.level) === byId("by-level").value)
      && (!byId("by-run").value || r.run === byId("by-run").value)
      && (!byId("by-verdict").value || verdict(r) === byId("by-verdict").value)
      && (!byId("by-end").value || (r.end === "finished") === (byId("by-end").value === "finished"))
      && (!least || share(r, byId("by-zone").value) >= least);
  }
  const current = (is) => ({ "aria-current": String(is), tabindex: is ? "0" : "-1" }); // Tab passes the list in one stop
  function list() {
    const fitting = rollouts.filter(fits);
    byId("count").textContent = `${fitting.length} of ${rollouts.length} rollouts; arrow keys walk through the list`;
    byId("list").replaceChildren(...fitting.map((r) => node("li", {},
      node("button", { type: "button", ...current(r === open), on: { click: () => show(r, 0) } },
        node("span", { class: "text", dir: "auto" }, shown(r.question.replace(/\s+/g, " ").slice(0, 160)) ),
        node("span", { class: "what" }, `${r.run ? r.run + ", " : ""}step ${r.step}, ${r.prompt}${r.level === null ? "" : ", level " + r.level}, `,
          node("span", { class: verdict(r) }, verdict(r)), `, ${ended[r.end]}, ${r.tokens} tokens, ${mix(r)}`)))));
    if (!fitting.includes(open) && fitting.length) show(fitting[0], 0);
  }

  // ---- one rollout
  const colouring = () => byId("colouring").value;
  const top = {}; // of a measure: the value that has full colour, the same for all rollouts
  function full(name) {
    if (!(name in top)) {
      const all = rollouts.flatMap((r) => r.texts.map((_, i) => MEASURES[name][1](r, i))).filter((v) => v > 0).sort((a, b) => a - b);
      top[name] = all.length ? all[Math.floor(0.98 * (all.length - 1))] : 1;
    }
    return top[name];
  }
  function paint(element, r, i) {
    const by = colouring();
    element.className = "token" + (by === "zone" ? " zone-" + (r.zones[i] ?? "-") : " heat");
    if (by !== "zone") element.style.setProperty("--heat", Math.min(1, (MEASURES[by][1](r, i) ?? 0) / full(by)).toFixed(3));
  }
  function show(r, token) {
    open = r;
    const place = rollouts.filter(fits).indexOf(r);
    byId("list").querySelectorAll("button").forEach((button, i) => {
      for (const [name, value] of Object.entries(current(i === place))) button.setAttribute(name, value);
    });
    byId("about-rollout").replaceChildren(`${r.run ? r.run + ", " : ""}step ${r.step}, prompt ${r.prompt}${r.level === null ? "" : ", level " + r.level}: `,
      node("strong", { class: verdict(r) }, verdict(r)), `, ${ended[r.end]} after ${r.tokens} tokens`);
    byId("question").replaceChildren(shown(r.question));
    byId("answers").replaceChildren(shown(r.answers.join("; ")));
    const tokens = r.texts.map((text, i) => {
      const element = node("span", { role: "option", tabindex: "-1", "data-i": i, "aria-selected": "false", title: text === "" ? "part of the character before" : null }, tokenText(text));
      paint(element, r, i);
      return element;
    });
    if (r.tokens > r.texts.length) tokens.push(node("span", { class: "soft" }, ` \u2026 ${r.tokens - r.texts.length} more tokens are not recorded`));
    byId("tokens").replaceChildren(...tokens);
    select(token, false);
  }
  function select(i, focus) {
    const before = byId("tokens").querySelector("[aria-selected=true]");
    if (before) { before.setAttribute("aria-selected", "false"); before.tabIndex = -1; }
    const element = byId("tokens").querySelector(`[data-i="${i}"]`);
    if (!element) return;
    chosen = i;
    element.setAttribute("aria-selected", "true");
    element.tabIndex = 0;
    if (focus) element.focus();
    about(i);
  }
  function about(i) {
    const r = open;
    const rows = [
      ["zone", MEANINGS[r.zones[i]] ?? "none"],
      ["taught", r.wf && r.wr ? (r.wf[i] || r.wr[i] ? `yes: ${number(MEASURES.taught[1](r, i))} of weighted divergence` : "no: weight 0") : "unknown"],
      ["weights, forward and reverse", r.wf && r.wr ? `${number(r.wf[i])}, ${number(r.wr[i])}` : "unknown"],
      ["entropy, student and teacher", `${number(r.hs?.[i])}, ${number(r.ht?.[i])} nats`],
      ["divergence, forward and reverse", `${number(r.fk?.[i])}, ${number(r.rk?.[i])} nats`],
      ["probability, student and teacher", `${percent(exp(r.ls?.[i]))}, ${percent(exp(r.lt?.[i]))}`],
    ];
    byId("about").replaceChildren(
      node("h3", {}, `token ${i + 1} of ${r.tokens}: `, node("bdi", { class: "said" }, shown(named(r.texts[i]))), node("span", { class: "soft" }, r.ids[i] === undefined ? "" : ` id ${r.ids[i]}`)),
      node("div", { class: "pairs" },
        node("table", {}, node("tbody", {}, ...rows.map(([name, value]) => node("tr", {}, node("th", { scope: "row" }, name), node("td", {}, value))))),
        node("div", {}, alternatives("student", r, r.as?.[i], r.ids[i]), alternatives("teacher", r, r.at?.[i], r.ids[i]))));
  }
  const exp = (v) => (v === null || v === undefined ? null : Math.exp(v));
  const textOf = (r, id) => texts[r.run][id] ?? (id === undefined ? "?" : `<${id}>`);
  function alternatives(who, r, entries, written) {
    if (!entries) return null;
    return node("table", {},
      node("thead", {}, node("tr", {}, node("th", { scope: "col" }, `${who}'s likeliest`), node("th", { scope: "col", class: "number" }, "student"), node("th", { scope: "col", class: "number" }, "teacher"))),
      node("tbody", {}, ...entries.map(([id, p, q]) => node("tr", {},
        node("td", {}, node("bdi", { class: "said" }, shown(named(textOf(r, id)))), id === written ? node("span", { class: "soft" }, " written") : null),
        node("td", { class: "number" }, percent(p)), node("td", { class: "number" }, percent(q))))));
  }
  byId("list").addEventListener("keydown", (event) => {
    const buttons = [...byId("list").querySelectorAll("button")], now = buttons.indexOf(document.activeElement);
    const to = buttons[{ ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: buttons.length - 1 }[event.key]];
    if (!to) return;
    event.preventDefault();
    to.focus();
  });
  const at = (event) => event.target.closest?.("[data-i]");
  byId("tokens").addEventListener("click", (event) => { const t = at(event); if (t) select(Number(t.dataset.i), true); });
  byId("tokens").addEventListener("mouseover", (event) => { const t = at(event); if (t && matchMedia("(hover: hover)").matches) about(Number(t.dataset.i)); });
  byId("tokens").addEventListener("mouseleave", () => { if (open) about(chosen); });
  byId("tokens").addEventListener("keydown", (event) => {
    const last = open.texts.length - 1;
    const to = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(Math.max(0, Math.min(last, to)), true);
  });

  // ---- the tokens with the largest values
  function worst() {
    const name = byId("worst-by").value;
    const found = [];
    for (const r of rollouts.filter(fits)) r.texts.forEach((_, i) => { const v = MEASURES[name][1](r, i); if (v > 0) found.push([v, r, i]); });
    found.sort((a, b) => b[0] - a[0]);
    byId("worst").replaceChildren(...found.slice(0, 25).map(([v, r, i]) => node("tr", {},
      node("td", { class: "number" }, number(v)),
      node("td", { class: "said", dir: "auto" }, shown(r.texts.slice(Math.max(0, i - 6), i).join("").slice(-24)), node("mark", {}, shown(r.texts[i])), shown(r.texts.slice(i + 1, i + 4).join("").slice(0, 12))),
      node("td", {}, r.zones[i] ?? ""),
      node("td", { class: "said" }, shown(named(textOf(r, r.at?.[i]?.[0]?.[0])))),
      node("td", {}, node("button", { type: "button", on: { click: () => { show(r, i); byId("rollouts").scrollIntoView(); select(i, true); } } }, `step ${r.step}, ${r.prompt}`)))));
  }

  for (const [name, [label]] of Object.entries(MEASURES)) {
    byId("colouring").append(node("option", { value: name }, label));
    byId("worst-by").append(node("option", { value: name }, label));
  }
  byId("worst-by").value = "rk";
  for (const control of document.querySelectorAll("#filters select, #filters input")) control.addEventListener("input", () => { list(); worst(); });
  byId("colouring").addEventListener("input", () => {
    byId("zone-legend").hidden = colouring() !== "zone";
    byId("tokens").querySelectorAll("[data-i]").forEach((element) => paint(element, open, Number(element.dataset.i)));
  });
  byId("worst-by").addEventListener("input", worst);
  // Where zone A teaches, zones do not decide: then weights say what taught
  if (rollouts.some((r) => r.texts.some((_, i) => r.zones[i] === "A" && (MEASURES.weight[1](r, i) ?? 0) > 0))) {
    byId("colouring").value = "taught";
    byId("zone-legend").hidden = true;
  }
  list();
  worst();
})();
