// The batch tab: one question of many files, four at a time. Uses what page.js defines.
"use strict";

let batch = null; // AbortController
let collected = [];

$("batch-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (batch) return;
  const files = [...$("files").files];
  const task = document.querySelector("input[name=batch-task]:checked").value;
  const question = $("batch-question").value.trim();
  $("batch-error").textContent = "";
  if (!files.length) { $("batch-error").textContent = "Choose images first."; $("files").focus(); return; }
  if (task === "ask" && !question) { $("batch-error").textContent = "Write a question first."; $("batch-question").focus(); return; }
  const rows = $("batch-table").tBodies[0];
  rows.replaceChildren();
  collected = files.map((file) => ({ file: file.name }));
  $("batch-table").hidden = false;
  $("batch-progress").max = files.length;
  $("batch-progress").value = 0;
  batch = new AbortController();
  $("batch-send").disabled = true;
  $("batch-stop").hidden = false;
  $("batch-save").hidden = true;
  const lines = files.map((file) => {
    const line = make("tr");
    line.append(make("td", file.name), make("td", "waiting"), make("td"), make("td"), make("td"));
    rows.append(line);
    return line;
  });
  let next = 0, done = 0, failed = 0;
  const status = () => { $("batch-status").textContent = `${done} of ${files.length} done` + (failed ? `, ${failed} failed` : ""); };
  status();
  const worker = async () => {
    while (next < files.length && !batch.signal.aborted) {
      const at = next++;
      const cells = lines[at].cells;
      try {
        const large = tooLarge(files[at]);
        if (large) throw new Problem(large);
        const form = new FormData();
        form.append("image", files[at], files[at].name);
        if (task === "ask") form.append("question", question);
        const body = await call("/v1/" + task, form, batch.signal);
        collected[at].result = body;
        cells[1].textContent = body.domain?.label || "–";
        cells[2].textContent = body.abstained ? "No answer: " + body.abstain_reason : body.answer.text;
        cells[3].textContent = body.answer?.p_yes === undefined ? "–" : body.answer.p_yes.toFixed(3);
        cells[4].textContent = body.references.filter((r) => r.used).length;
      } catch (error) {
        failed += 1;
        collected[at].error = error.name === "AbortError" ? "stopped" : error.message;
        cells[1].textContent = "–";
        cells[2].textContent = "Failed: " + collected[at].error;
        cells[2].className = "error";
      }
      done += 1;
      $("batch-progress").value = done;
      status();
    }
  };
  await Promise.all([worker(), worker(), worker(), worker()]);
  for (const row of collected) if (!row.result && !row.error) row.error = "stopped";
  batch = null;
  $("batch-send").disabled = false;
  $("batch-stop").hidden = true;
  $("batch-save").hidden = false;
});
$("batch-stop").addEventListener("click", () => batch?.abort());
$("batch-save").addEventListener("click", () => save("mmedrag-batch.json", collected));
