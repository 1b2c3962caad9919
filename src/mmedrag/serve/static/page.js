// The page's script (the batch tab is in batch.js). It talks to the API of the same service and to nothing else; whatever
// comes back is shown as text, never as markup. State lives in this tab alone.
"use strict";

const $ = (id) => document.getElementById(id);
const NAMES = { ask: "Ask", report: "Write report" };
let settings = { max_bytes: Infinity, needs_key: false };
let picture = null; // {blob, name} that will be sent
let truth = null; // of an example image
let running = null; // AbortController of the request in flight

function make(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const percent = (value) => (value * 100).toFixed(1) + " %";
const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, seconds * 1000);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); });
});

// --- talking to the service --------------------------------------------------------------------

class Problem extends Error {}

async function call(path, form, signal, waiting) {
  const headers = {};
  const key = $("key").value.trim();
  if (key) headers.Authorization = "Bearer " + key;
  for (let turn = 0; ; turn++) {
    let response;
    try {
      response = await fetch(path, { method: "POST", body: form, headers, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The service cannot be reached.");
    }
    if (response.status === 429 && turn < 20) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      waiting?.(seconds);
      await pause(seconds, signal);
      continue;
    }
    let body;
    try { body = await response.json(); } catch { throw new Problem(`No answer (status ${response.status}).`); }
    if (response.ok) return body;
    if (response.status === 401) { $("key-box").open = true; }
    throw new Problem(body.error?.message || `Refused (status ${response.status}).`);
  }
}

function tooLarge(file) {
  if (file.size > settings.max_bytes)
    return `${file.name}: ${(file.size / 2 ** 20).toFixed(1)} MiB, at most ${(settings.max_bytes / 2 ** 20).toFixed(0)} MiB are taken.`;
  return file.size ? "" : `${file.name}: the file is empty.`;
}

// --- tabs --------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];
function choose(tab) {
  for (const other of tabs) {
    const on = other === tab;
    other.setAttribute("aria-selected", String(on));
    other.tabIndex = on ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !on;
  }
}
tabs.forEach((tab, at) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(at + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
    event.preventDefault();
  });
});

// --- choosing an image -------------------------------------------------------------------------

let previews = 0; // only the last chosen file may be shown
async function take(blob, name, about = "") {
  const mine = ++previews;
  picture = null;
  $("error").textContent = "";
  $("result").hidden = true; // an old answer must not stand beside a new image
  $("shown").hidden = true;
  $("shown-about").textContent = "";
  const large = tooLarge({ size: blob.size, name });
  if (large) { $("error").textContent = large; return; }
  $("status").textContent = "Reading the image…";
  const form = new FormData();
  form.append("image", blob, name);
  try {
    const view = (await call("/v1/preview", form)).views[0];
    if (mine !== previews) return;
    picture = { blob, name };
    $("shown").src = view.png;
    $("shown").alt = about || `The chosen image, ${name}`;
    $("shown").hidden = false;
    $("shown-about").textContent = `${name}: ${view.kind || "image"}, ${view.width} × ${view.height} pixels`;
    $("status").textContent = "";
  } catch (error) {
    if (mine !== previews) return;
    $("status").textContent = "";
    $("error").textContent = `${name}: ${error.message}`;
  }
}

$("file").addEventListener("change", () => {
  truth = null;
  if ($("file").files.length) take($("file").files[0], $("file").files[0].name);
});

function droppable(zone, accept) {
  for (const kind of ["dragover", "dragenter"])
    zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.add("over"); });
  for (const kind of ["dragleave", "drop"])
    zone.addEventListener(kind, () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) accept(event.dataTransfer.files);
  });
}
droppable($("drop"), (files) => { truth = null; take(files[0], files[0].name); });
droppable($("batch-drop"), (files) => { $("files").files = files; });
for (const kind of ["dragover", "drop"]) // a file dropped beside the zone must not replace the page
  window.addEventListener(kind, (event) => event.preventDefault());

async function loadExamples() {
  const { examples } = await (await fetch("/examples")).json();
  for (const example of examples) {
    const item = make("li");
    const button = make("button", null, { type: "button" });
    button.append(make("img", null, { src: example.url, alt: "", loading: "lazy" }));
    button.append(`${example.domain}: ${example.question}`);
    button.addEventListener("click", async () => {
      $("file").value = "";
      $("question").value = example.question;
      document.querySelector("input[name=task][value=ask]").click();
      const blob = await (await fetch(example.url)).blob();
      await take(blob, example.name + ".png", `Benchmark image, ${example.domain}`);
      truth = { question: example.question, answer: example.truth };
      $("send").focus();
    });
    item.append(button);
    $("example-list").append(item);
  }
  $("examples").hidden = !examples.length;
}

// --- one image ---------------------------------------------------------------------------------

function follow(name, box, button) {
  for (const radio of document.querySelectorAll(`input[name=${name}]`))
    radio.addEventListener("change", () => {
      const task = document.querySelector(`input[name=${name}]:checked`).value;
      $(box).hidden = task === "report";
      if (button) $(button).textContent = NAMES[task];
    });
}
follow("task", "question-box", "send");
follow("batch-task", "batch-question-box");

$("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  $("error").textContent = "";
  const task = document.querySelector("input[name=task]:checked").value;
  const question = $("question").value.trim();
  if (!picture) { $("error").textContent = "Choose an image first."; $("file").focus(); return; }
  if (task === "ask" && !question) { $("error").textContent = "Write a question first."; $("question").focus(); return; }
  const form = new FormData();
  form.append("image", picture.blob, picture.name);
  if (task === "ask") form.append("question", question);
  form.append("compare", $("compare").checked);
  form.append("preview", $("compare").checked); // the noise image; the clean one is shown above
  running = new AbortController();
  const started = Date.now();
  const timer = setInterval(() => { $("seconds").textContent = `${Math.round((Date.now() - started) / 1000)} s`; }, 1000);
  const say = (text) => { $("status").textContent = text; };
  say("Waiting for the model…");
  $("result").hidden = true;
  $("send").disabled = true;
  $("cancel").hidden = false;
  try {
    const body = await call("/v1/" + task, form, running.signal, (wait) => say(`Many requests are waiting; trying again in ${wait} s…`));
    show(body, task === "ask" && truth?.question === question ? truth.answer : null);
    $("status").textContent = `Answered after ${((Date.now() - started) / 1000).toFixed(1)} s.`;
  } catch (error) {
    $("status").textContent = "";
    $("error").textContent = error.name === "AbortError" ? "Cancelled." : error.message;
  } finally {
    clearInterval(timer);
    $("seconds").textContent = "";
    running = null;
    $("send").disabled = false;
    $("cancel").hidden = true;
  }
});
$("cancel").addEventListener("click", () => running?.abort());

function pairs(rows) {
  const list = make("dl", null, { class: "pairs" });
  for (const [name, value] of rows) {
    if (value === null || value === undefined || value === "") continue;
    const cell = make("dd");
    cell.append(value);
    list.append(make("dt", name), cell);
  }
  return list;
}

function chance(value, name) {
  const box = document.createDocumentFragment();
  const bar = make("meter", percent(value), { min: 0, max: 1, value, "aria-label": name });
  box.append(bar, " " + value.toFixed(3));
  return box;
}

function save(name, body) {
  const link = make("a", null, { download: name });
  link.href = URL.createObjectURL(new Blob([JSON.stringify(body, null, 2)], { type: "application/json" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function verdict(part, task) {
  const box = document.createDocumentFragment();
  if (part.abstained) {
    box.append(make("p", "No answer is given: " + part.abstain_reason + ".", { class: "abstained" }));
    if (part.answer?.text) box.append(make("p", "The model said: " + part.answer.text));
  } else {
    box.append(make("p", part.answer?.text || "(empty)", { class: "said" + (task === "report" ? " report" : "") }));
  }
  return box;
}

function referenceTable(rows) {
  const table = make("table", null, { class: "cards" });
  const head = make("tr");
  for (const name of ["#", "Score", "Used", "Why", "Report"]) head.append(make("th", name, { scope: "col" }));
  table.append(make("caption", `${rows.length} similar cases were retrieved, ${rows.filter((r) => r.used).length} used`), make("thead"));
  table.tHead.append(head);
  const body = make("tbody");
  for (const row of rows) {
    const line = make("tr");
    line.append(
      make("td", row.rank + 1, { class: "number", "data-name": "#" }),
      make("td", row.score.toFixed(4), { class: "number", "data-name": "Score" }),
      make("td", row.used ? "✓ kept" : "✗ dropped", { class: "state " + (row.used ? "used" : "dropped"), "data-name": "Used" }),
      make("td", row.why, { class: "why", "data-name": "Why" }),
      make("td", `${row.text} (${row.id})`, { class: "text", "data-name": "Report" }));
    body.append(line);
  }
  table.append(body);
  return scrolled(table, "References");
}

function scrolled(table, name) {
  const box = make("div", null, { class: "scroll", role: "region", "aria-label": name, tabindex: 0 });
  box.append(table);
  return box;
}

function comparison(conditions, task) {
  const table = make("table", null, { class: "cards" });
  const head = make("tr");
  for (const name of ["Condition", "Answer", "p(yes)", "References"]) head.append(make("th", name, { scope: "col" }));
  table.append(make("caption", `The same ${task === "report" ? "image" : "question"} under four conditions`), make("thead"));
  table.tHead.append(head);
  const body = make("tbody");
  for (const [name, part] of Object.entries(conditions)) {
    const line = make("tr");
    const answer = (part.answer?.text || "(empty)") + (part.abstained ? " (abstains: " + part.abstain_reason + ")" : "");
    const yes = make("td", null, { class: "number", "data-name": "p(yes)" });
    yes.append(part.answer?.p_yes === undefined ? "–" : chance(part.answer.p_yes, `probability of yes, ${name}`));
    line.append(
      make("th", name, { scope: "row" }),
      make("td", answer, { "data-name": "Answer" }),
      yes,
      make("td", part.references.filter((r) => r.used).length, { class: "number", "data-name": "References" }));
    body.append(line);
  }
  table.append(body);
  return scrolled(table, "Side by side");
}

function show(body, right) {
  const out = $("result-body");
  out.replaceChildren();
  $("result-title").textContent = body.task === "report" ? "Report" : "Answer";
  if (body.question) out.append(make("p", "“" + body.question + "”"));
  out.append(verdict(body, body.task));
  const label = body.domain?.label || "–";
  const sure = body.domain?.confidence;
  const domain = make("span", label + (sure === undefined ? "" : `, confidence ${percent(sure)}`));
  out.append(pairs([
    ["p(yes)", body.answer?.p_yes === undefined ? null : chance(body.answer.p_yes, "probability of yes")],
    ["Outside yes and no", body.answer?.other_mass === undefined ? null : body.answer.other_mass.toFixed(3)],
    ["Benchmark's truth", right],
    ["Domain", domain],
    ["Selection", body.selection && body.selection.reason ? `${body.selection.rule}: ${body.selection.reason}` : null],
    ["Left out", body.excluded ? `${body.excluded} of the patient's own or near-identical` : null],
  ]));
  for (const notice of body.notices.slice(1)) out.append(make("p", notice, { class: "warn" }));
  if (body.conditions) {
    out.append(make("h3", "Side by side"), comparison(body.conditions, body.task));
  }
  if (body.previews) {
    const seen = make("div", null, { class: "seen" });
    for (const [name, url] of Object.entries(body.previews)) {
      const figure = make("figure");
      figure.append(make("img", null, { src: url, alt: `The ${name} image` }), make("figcaption", name));
      seen.append(figure);
    }
    out.append(make("h3", "The image, and with noise at the model's resolution"), seen);
  }
  out.append(make("h3", "References"));
  out.append(body.references.length ? referenceTable(body.references) : make("p", "None were retrieved: the answer rests on the image alone."));
  const details = make("details");
  details.append(make("summary", "Prompt, versions and image hash"), make("pre", body.prompt ? body.prompt.text : ""),
    pairs([["Template", body.prompt?.template], ["Image sha256", body.image.sha256], ["Request", body.id], ["Versions", JSON.stringify(body.versions)]]));
  out.append(details);
  const button = make("button", "Download JSON", { type: "button", id: "save" });
  button.addEventListener("click", () => save(`mmedrag-${body.id}.json`, body));
  const line = make("p", null, { class: "buttons" });
  line.append(button);
  out.append(line);
  $("result").hidden = false;
  $("result").focus();
}

// --- start -------------------------------------------------------------------------------------

(async () => {
  try {
    settings = await (await fetch("/page-settings")).json();
    $("question").maxLength = $("batch-question").maxLength = settings.max_text;
    $("about").textContent = settings.model ? `Model: ${settings.model}.` : "";
    $("key-box").hidden = !settings.needs_key;
    $("key-box").open = settings.needs_key;
    const more = settings.notices.slice(1).join(" ");
    $("more-notices").textContent = more;
    $("more-notices").hidden = !more;
    await loadExamples();
  } catch {
    $("error").textContent = "The service cannot be reached.";
  }
})();
