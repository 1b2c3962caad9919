"use strict";
// Filters of the gallery. Without script every case is shown and the filters stay hidden.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const cases = [...document.querySelectorAll(".case")];
  const texts = cases.map((c) => c.textContent.toLowerCase());
  const shown = document.getElementById("shown");
  const apply = () => {
    const { domain, task, outcome, words } = form.elements;
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    cases.forEach((c, i) => {
      const fits =
        (!domain.value || c.dataset.domain === domain.value) &&
        (!task.value || c.dataset.task === task.value) &&
        (!outcome.value || c.dataset.outcomes.includes(`|${outcome.value}|`)) &&
        wanted.every((w) => texts[i].includes(w));
      c.hidden = !fits;
      count += fits;
    });
    shown.textContent = `${count} of ${cases.length} cases`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();

// Paper cannot unfold: open what is folded while printing, then fold it again.
{
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((d) => (d.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((d) => (d.open = false)));
}
