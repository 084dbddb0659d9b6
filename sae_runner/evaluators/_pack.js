"use strict";
// One rater's way through a pack. What has been rated is kept in this browser after every key, and
// handed back as responses.jsonl.
const pack = JSON.parse(document.getElementById("pack").textContent);
const items = new Map(pack.items.map((item) => [item.item, item]));
const main = document.querySelector("main");
const RUBRIC = {
  confidence: ["Confidence", "in your interpretation: 0 none, 3 certain"],
  activation_consistency: ["Activation consistency", "0: the examples do not fit it, 5: all do, weak ones too"],
  logit_consistency: [pack.kind === "image" ? "Label consistency" : "Output consistency",
    "do the outputs named fit it: 0 not at all, 3 all of them"],
  specificity: ["Specificity", "0: it could mean anything, 3: one narrow thing"],
  interpretable: ["Interpretable", "useful or interesting, in any sense: 0 no, 1 yes"],
};
const FIELDS = Object.keys(RUBRIC).filter((name) => name in pack.fields);

let rater = null, turns = [], at = 0, row = 0, ratings = {}, since = Date.now(), kept = true, heat = true;

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
};

// -- What is kept ------------------------------------------------------------------------------
const place = (what) => `sae-run.rating.${pack.pack}.${what}`;
const keep = (what, value) => {
  try { localStorage.setItem(place(what), JSON.stringify(value)); } catch { kept = false; }
};
const recall = (what, otherwise) => {
  try { return JSON.parse(localStorage.getItem(place(what))) ?? otherwise; } catch { return otherwise; }
};
const key = (turn) => `${turn[0]}.${turn[1]}`;
const rating = (turn) => (ratings[key(turn)] ??= { interpretation: "", seconds: 0, scores: {} });
const isRated = (turn) => FIELDS.every((name) => ratings[key(turn)]?.scores[name] !== undefined);
const save = () => {
  const now = Date.now();
  // An item that lies open over lunch took no hour.
  if (turns[at]) rating(turns[at]).seconds += Math.min((now - since) / 1000, 120);
  since = now;
  keep(`rater-${rater}`, { ratings, at });
};

// -- Handing back ------------------------------------------------------------------------------
const responses = () => turns.filter(isRated).map((turn) => {
  const { interpretation, seconds, scores } = rating(turn);
  const every = Object.fromEntries(pack.scores.map((name) => [name, scores[name] ?? null]));
  return JSON.stringify({ pack: pack.pack, rater, item: turn[0], repeat: turn[1], ...every,
    interpretation, seconds: Math.round(seconds * 10) / 10 });
}).join("\n") + "\n";

const download = () => {
  save();
  const link = make("a", { download: `responses-${pack.pack}-${rater}.jsonl`,
    href: URL.createObjectURL(new Blob([responses()], { type: "application/jsonl" })) });
  document.body.append(link);
  link.click();
  link.remove();
};

// -- One item ----------------------------------------------------------------------------------
const shade = (share) => (share ? `background: rgba(var(--heat), ${(0.08 + 0.72 * share / 255).toFixed(3)})` : null);

const shownText = (example) => make("p", { class: "text" }, ...example.pieces.map((piece, i) =>
  make("span", { style: shade(example.acts[i]), class: i === example.peak ? "peak" : null },
    piece.replaceAll("\n", "↵"))));

const shownImage = (example) => {
  const box = make("div", { class: "picture" }, make("img", { src: pack.images[example.image], alt: "" }));
  if (example.heat) {
    const [height, width] = example.grid;
    const canvas = make("canvas", { width, height });
    const paint = canvas.getContext("2d");
    example.heat.forEach((share, i) => {
      paint.fillStyle = `rgba(255, 120, 0, ${0.65 * share / 255})`;
      paint.fillRect(i % width, Math.floor(i / width), 1, 1);
    });
    box.append(canvas);
  }
  return box;
};

const shownInterval = (interval, labels) => {
  const examples = interval.examples.map(pack.kind === "image" ? shownImage : shownText);
  const body = make("div", { class: pack.kind === "image" ? "images" : null }, ...examples);
  if (!labels) return make("div", { class: "interval bare" }, body);
  return make("div", { class: "interval" }, make("span", {}, `${interval.low}–${interval.high}%`), body);
};

const shownRow = (name, number) => {
  const [title, about] = RUBRIC[name];
  const buttons = Array.from({ length: pack.fields[name] + 1 }, (_, score) =>
    make("button", { type: "button", "aria-pressed": String(rating(turns[at]).scores[name] === score),
      onclick: () => { row = number; setScore(score); } }, String(score)));
  return make("div", { class: number === row ? "row current" : "row", "data-field": name },
    make("p", {}, make("b", {}, title), ` ${about}`), ...buttons);
};

const setScore = (score) => {
  const name = FIELDS[row];
  if (score > pack.fields[name]) return;
  rating(turns[at]).scores[name] = score;
  row = Math.min(row + 1, FIELDS.length - 1);
  save();
  drawForm();
};

const go = (step) => {
  const next = at + step;
  if (next < 0 || next > turns.length) return;
  save();
  at = next;
  row = 0;
  save();
  draw();
  scrollTo(0, 0);
};

const drawForm = () => {
  const turn = turns[at];
  const words = make("textarea", { "aria-label": "interpretation", placeholder: "What is it active on?",
    oninput: (event) => { rating(turn).interpretation = event.target.value; save(); } });
  words.value = rating(turn).interpretation;
  document.querySelector(".form").replaceChildren(words, ...FIELDS.map(shownRow),
    make("p", {}, make("button", { type: "button", id: "next", onclick: () => go(1) }, isRated(turn) ? "Next" : "Skip for now")));
  document.querySelector("progress").value = turns.filter(isRated).length;
  document.getElementById("count").textContent = `${turns.filter(isRated).length} of ${turns.length} rated`;
  document.getElementById("warning").hidden = kept;
};

const bar = () => make("div", { class: "bar" },
  make("h1", {}, at < turns.length ? `Item ${at + 1} of ${turns.length}` : "All items shown"),
  make("progress", { max: turns.length, value: 0 }), make("span", { id: "count", class: "soft" }),
  make("button", { type: "button", onclick: () => go(-1) }, "Back"),
  make("button", { type: "button", id: "export", onclick: download }, "Save responses"));

const help = () => make("p", { class: "soft" }, ...[
  ["0", "–", "5", " score  "], ["↑", " ", "↓", " row  "], ["Enter", "", "", " next  "], ["←", " ", "→", " items  "],
  ["t", "", "", " write  "], ["Esc", "", "", " stop writing  "],
  ...(pack.kind === "image" ? [["h", "", "", " heat on and off"]] : []),
].flatMap(([a, between, b, what]) => [make("kbd", {}, a), between, ...(b.trim() ? [make("kbd", {}, b)] : []), what]));

const byHand = () => make("details", { ontoggle: (event) => { event.target.querySelector("textarea").value = responses(); } },
  make("summary", {}, "No download? Copy the responses from here"), make("textarea", { id: "by-hand", readonly: true }));

const draw = () => {
  const warning = make("p", { id: "warning", class: "warning", hidden: true },
    "This browser keeps nothing for this page: save the responses before you close it.");
  if (at >= turns.length) {
    const left = turns.findIndex((turn) => !isRated(turn));
    main.replaceChildren(bar(), warning, make("p", {}, left < 0
      ? "Everything is rated. Save the responses and hand the file back. Thank you."
      : "Some items are not rated yet. You may hand back what there is, or go on."),
    ...(left < 0 ? [] : [make("p", {}, make("button", { type: "button",
      onclick: () => { at = left; row = 0; draw(); } }, "To the first that is not rated"))]), byHand());
    document.querySelector("progress").value = turns.filter(isRated).length;
    document.getElementById("count").textContent = `${turns.filter(isRated).length} of ${turns.length} rated`;
    return;
  }
  const item = items.get(turns[at][0]), { labels } = pack.raters[rater];
  const shown = item.intervals.map((interval) => shownInterval(interval, labels));
  const outputs = item.labels ? [make("h2", {}, "Outputs that it makes more likely"),
    make("ul", { class: "labels" }, ...item.labels.map((label) => make("li", {}, label)))] : [];
  main.replaceChildren(bar(), warning, make("div", { class: heat ? "item" : "item bare-images" },
    make("div", {}, ...outputs, make("h2", {}, labels ? "Examples, by how strongly it is active" : "Examples"), ...shown),
    make("div", {}, make("div", { class: "form" }), help(), byHand())));
  drawForm();
};

// -- Beginning ---------------------------------------------------------------------------------
const begin = (number) => {
  rater = number;
  turns = pack.raters[number].turns;
  ({ ratings, at } = recall(`rater-${number}`, { ratings: {}, at: 0 }));
  since = Date.now();
  keep("rater", number);
  draw();
};

const welcome = () => main.replaceChildren(
  make("h1", {}, `Rating pack ${pack.pack}`),
  make("p", {}, "Each item shows what one unit is active on: examples in which it is weakly or strongly " +
    "active, deeper colour for more. Say what it seems to be active on, and score that. Some items may " +
    "mean nothing; some come twice. Nothing leaves this page until you save the responses."),
  make("p", {}, "Which rater are you?"),
  make("div", { class: "raters" }, ...Object.keys(pack.raters).map((number) =>
    make("button", { type: "button", "data-rater": number, onclick: () => begin(number) }, `Rater ${number}`))));

addEventListener("keydown", (event) => {
  if (rater === null || event.ctrlKey || event.metaKey || event.altKey) return;
  const writing = event.target.tagName === "TEXTAREA";
  if (writing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const here = at < turns.length;
  if (/^[0-9]$/.test(event.key) && here) setScore(Number(event.key));
  else if (event.key === "ArrowDown" && here) { row = Math.min(row + 1, FIELDS.length - 1); drawForm(); }
  else if (event.key === "ArrowUp" && here) { row = Math.max(row - 1, 0); drawForm(); }
  else if (event.key === "ArrowRight") go(1);
  else if (event.key === "ArrowLeft") go(-1);
  else if (event.key === "Enter" && event.target.tagName !== "BUTTON" && event.target.tagName !== "SUMMARY") go(1);
  else if (event.key === "t" && here) document.querySelector(".form textarea").focus();
  else if (event.key === "h") { heat = !heat; draw(); }
  else return;
  event.preventDefault();
});
addEventListener("pagehide", () => { if (rater !== null) save(); });

const known = recall("rater", null);
if (known in pack.raters) begin(known);
else welcome();
