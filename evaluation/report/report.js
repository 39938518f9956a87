"use strict";
// Hover or focus on a point of a plot: say which configuration it is and its numbers.
const tip = document.getElementById("tip");
function show(event) {
  const point = event.currentTarget;
  tip.textContent = point.dataset.name + " · " + point.dataset.detail;
  tip.hidden = false;
  const box = point.getBoundingClientRect();
  const left = Math.min(box.left + window.scrollX, window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(window.scrollX + 8, left) + "px";
  tip.style.top = box.bottom + window.scrollY + 8 + "px";
}
function hide() {
  tip.hidden = true;
}
for (const point of document.querySelectorAll(".point")) {
  point.addEventListener("pointerenter", show);
  point.addEventListener("pointerleave", hide);
  point.addEventListener("focus", show);
  point.addEventListener("blur", hide);
}
