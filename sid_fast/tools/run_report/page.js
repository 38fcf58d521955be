"use strict";
const kimg = (images) => (images / 1000).toLocaleString("en", { maximumFractionDigits: 2 }) + " kimg";

// The slider: every run shows its last sample grid until the images seen at the slider's position.
const player = document.querySelector(".player");
if (player) {
  const slider = player.querySelector("input");
  const shown = player.querySelector("output");
  const play = player.querySelector("[data-play]");
  const stops = slider.dataset.stops.split(" ").map(Number);
  const strips = [...document.querySelectorAll(".strip")].map((strip) =>
    [...strip.querySelectorAll(".frame")]);
  let timer = 0;
  const show = () => {
    const stop = stops[slider.value];
    for (const frames of strips) {
      let current = frames[0];
      for (const frame of frames) if (Number(frame.dataset.images) <= stop) current = frame;
      for (const frame of frames) frame.classList.toggle("on", frame === current);
    }
    shown.textContent = kimg(stop);
    slider.setAttribute("aria-valuetext", kimg(stop));
  };
  const pause = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  const move = (by) => {
    slider.value = Number(slider.value) + by;
    show();
  };
  slider.addEventListener("input", () => { pause(); show(); });
  for (const button of player.querySelectorAll("[data-by]"))
    button.addEventListener("click", () => { pause(); move(Number(button.dataset.by)); });
  play.addEventListener("click", () => {
    if (timer) return pause();
    if (Number(slider.value) === stops.length - 1) move(-stops.length);
    play.textContent = "Pause";
    timer = setInterval(() => {
      move(1);
      if (Number(slider.value) === stops.length - 1) pause();
    }, 350);
  });
  // Arrow keys work wherever nothing has the focus; on the slider the browser handles them.
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || document.activeElement !== document.body || event.altKey || event.ctrlKey
        || event.metaKey) return;
    pause();
    move(by);
    event.preventDefault();
  });
  show();
}

// Charts: the values under the pointer.
for (const svg of document.querySelectorAll(".chart svg")) {
  const [low, high, start, end, log] = svg.dataset.x.split(" ").map(Number);
  const scale = log ? Math.log : (x) => x;
  const pixel = (x) =>
    start + (end - start) * (scale(Math.max(x, low)) - scale(low)) / (scale(high) - scale(low));
  const lines = [...svg.querySelectorAll(".line")].map((g) => ({
    label: g.dataset.label,
    points: g.dataset.v.split(" ").map((p) => p.split(":").map(Number)),
  }));
  const out = svg.parentElement.querySelector(".readout");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = (points) => points.reduce((best, p) =>
      Math.abs(pixel(p[0]) - at) < Math.abs(pixel(best[0]) - at) ? p : best);
    const x = near(lines.map((line) => near(line.points)))[0];
    const values = lines.map((line) => [line.label, near(line.points)])
      .filter(([, p]) => Math.abs(pixel(p[0]) - pixel(x)) < 12)
      .map(([label, p]) => `${label} ${p[1]}`);
    out.textContent = `${Number(x.toPrecision(4))} ${svg.dataset.unit}: ${values.join(", ")}`;
    for (const [name, value] of [["x1", pixel(x)], ["x2", pixel(x)], ["y1", 14], ["y2", 236]])
      cursor.setAttribute(name, value);
    svg.append(cursor);
  });
  svg.addEventListener("pointerleave", () => { cursor.remove(); out.textContent = ""; });
}

// Paper shows what is folded on the screen.
const folded = [...document.querySelectorAll("details")];
addEventListener("beforeprint", () => folded.forEach((d) => { d.dataset.open = d.open; d.open = true; }));
addEventListener("afterprint", () => folded.forEach((d) => { d.open = d.dataset.open === "true"; }));
