// The slider over the epochs: shows the searched cells as they were then. Without it the page shows the last epoch.
"use strict";
const slider = document.getElementById("epoch");
const shown = document.getElementById("epoch-shown");
const epochs = JSON.parse(slider.dataset.epochs);
const cells = Array.from(document.querySelectorAll("svg.course"), (svg) => ({
  operations: JSON.parse(svg.dataset.operations),
  edges: Array.from(svg.querySelectorAll("g[data-course]"), (group) => ({
    group, ends: group.dataset.ends, course: JSON.parse(group.dataset.course),
    label: group.querySelector("text"), title: group.querySelector("title"),
  })),
}));

function show() {
  let live = 0, candidates = 0, total = 0;
  for (const { operations, edges } of cells) {
    for (const { group, ends, course, label, title } of edges) {
      const [k, gate, left, state] = course[slider.value];
      const [operation, family] = k === null ? ["", "other"] : operations[k];
      group.setAttribute("class", `edge f-${family} ${state}`);
      group.style.setProperty("--gate", gate === null ? 1 : gate);
      label.textContent = operation;
      title.textContent = `${ends}: ${state === "gone" ? "removed" : operation}`;
      total += 1;
      if (state !== "gone") {
        live += 1;
        candidates += left;
      }
    }
  }
  const text = `Epoch ${epochs[slider.value]}: ${live} of ${total} edges, ${candidates} candidates`;
  shown.textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

slider.addEventListener("input", show);
slider.parentElement.hidden = false;
show();
