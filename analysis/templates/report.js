"use strict";
// Without this script the page is whole: tables as written, figures as drawn. It adds sorting, filtering and zoom.
(() => {
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // ---- tables: a button in each heading sorts, words in a box filter ----

  const keyOf = (cell) => {
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "-" || text === "" ? null : text;
  };

  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });

  function sortable(table) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = make("button", { type: "button" }, ...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const ascending = heading.getAttribute("aria-sort") !== "ascending";
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
        // What has no value stands last, whichever way.
        rows.sort(([a], [b]) =>
          a === null || b === null ? (a === null) - (b === null) : (ascending ? 1 : -1) * compare(a, b));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  function filterable(table) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 2) return;
    const input = make("input", { type: "search", autocomplete: "off", placeholder: "words in a row" });
    const count = make("output");
    const name = table.caption ? table.caption.textContent.trim() : "";
    input.setAttribute("aria-label", `Filter rows of ${name}`);
    const show = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase());
        row.hidden = !words.every((word) => cells.some((text) => text.includes(word)));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    };
    input.addEventListener("input", show);
    table.closest(".scroll").before(make("p", { className: "filter" }, make("label", {}, "Filter ", input), " ", count));
  }

  // ---- power over time: a view [from, until] in seconds that keys, buttons, mouse and fingers move ----

  const INK = "#1b2733", MUTED = "#566370", GRID = "#e3e8ec", BAND = "rgba(43, 108, 163, 0.18)";
  const KINDS = { prefill: "#e07a2f", both: "#b96a7c", decode: "#2b6ca3" };
  const LEFT = 54, RIGHT = 10, TOP = 20, POWER = 190, GAP = 34, LOAD = 90, BELOW = 40;
  const LEAST_S = 0.02;  // about one engine step
  const PIXELS_A_BIN = 4;
  const PIXELS_A_STEP = 1.5;  // fewer, and a step cannot be told from the next

  const niceStep = (span, most) => {
    const raw = span / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw));
    return power * ([1, 2, 5].find((factor) => factor * power >= raw) ?? 10);
  };

  const ticks = (low, high, most) => {
    const step = niceStep(high - low, most), first = Math.ceil(low / step - 1e-9) + 0;  // no -0
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const found = [];
    for (let k = first; k * step <= high + 1e-9 * step; k += 1) {
      found.push([k * step, (k * step).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })]);
    }
    return found;
  };

  function zoomable(figure) {
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const whole = data.duration_s, layers = data.layers, steps = data.steps;
    const group = figure.querySelector(".zoom"), canvas = group.querySelector("canvas");
    const said = group.querySelector("output"), pen = canvas.getContext("2d");
    let from = 0, until = whole, band = null, width = 0;

    const inner = () => Math.max(1, width - LEFT - RIGHT);
    const xOf = (t) => LEFT + ((t - from) / (until - from)) * inner();
    const tOf = (x) => from + ((x - LEFT) / inner()) * (until - from);
    const endOf = (layer) => layer.start_s + layer.bin_s * layer.power_w.length;
    // The coarsest layer whose bins are not wider than a few pixels, else the finest that covers the view.
    const layerNow = () => {
      const there = layers.filter((layer) => layer.start_s <= from + 1e-9 && endOf(layer) >= until - 1e-9);
      return there.find((layer) => (until - from) / layer.bin_s >= inner() / PIXELS_A_BIN) ?? there[there.length - 1];
    };
    const binsNow = (layer) => {
      const first = Math.max(0, Math.floor((from - layer.start_s) / layer.bin_s + 1e-9));
      const last = Math.min(layer.power_w.length, Math.ceil((until - layer.start_s) / layer.bin_s - 1e-9));
      return [first, Math.max(last, Math.min(first + 1, layer.power_w.length))];
    };
    const stepsNow = () => {
      if (steps === null || from < steps.start_s[0] - 1 || until > steps.end_s[steps.end_s.length - 1] + 1) return [];
      const found = [];
      for (let k = 0; k < steps.start_s.length; k += 1) {
        if (steps.end_s[k] > from && steps.start_s[k] < until) found.push(k);
      }
      return found;
    };

    function axes(bottom, height, most, title, unit) {
      pen.fillStyle = MUTED;
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      for (const [value, text] of ticks(0, most, height / 40)) {
        const y = bottom - (value / most) * height;
        pen.strokeStyle = GRID;
        pen.beginPath();
        pen.moveTo(LEFT, y);
        pen.lineTo(width - RIGHT, y);
        pen.stroke();
        pen.fillText(text, LEFT - 6, y);
      }
      pen.textAlign = "left";
      pen.fillStyle = INK;
      pen.fillText(unit ? `${title}, ${unit}` : title, 2, bottom - height - 11);
    }

    function curve(layer, values, [first, last], bottom, scale, colour, filled) {
      pen.beginPath();
      const clamp = (x) => Math.min(Math.max(x, LEFT), width - RIGHT);
      for (let k = first; k < last; k += 1) {
        const y = bottom - (values[k] ?? 0) * scale;
        const start = layer.start_s + k * layer.bin_s;
        if (k === first) pen.moveTo(clamp(xOf(start)), filled ? bottom : y);
        pen.lineTo(clamp(xOf(start)), y);
        pen.lineTo(clamp(xOf(start + layer.bin_s)), y);
      }
      if (filled) {
        pen.lineTo(clamp(xOf(layer.start_s + last * layer.bin_s)), bottom);
        pen.fillStyle = colour;
        pen.fill();
      } else {
        pen.strokeStyle = colour;
        pen.lineWidth = 1.4;
        pen.stroke();
        pen.lineWidth = 1;
      }
    }

    function draw() {
      width = group.querySelector(".plot").clientWidth;
      if (!width) return;
      const height = TOP + POWER + GAP + LOAD + BELOW, sharp = window.devicePixelRatio || 1;
      canvas.width = Math.round(width * sharp);
      canvas.height = Math.round(height * sharp);
      canvas.style.height = `${height}px`;
      pen.setTransform(sharp, 0, 0, sharp, 0, 0);
      pen.clearRect(0, 0, width, height);
      pen.font = "12px Arial, Helvetica, sans-serif";

      const layer = layerNow(), range = binsNow(layer), shown = stepsNow();
      const power = layer.power_w.slice(...range), load = layer.requests.slice(...range);
      const single = shown.length > 0 && inner() / shown.length >= PIXELS_A_STEP;
      const mostW = Math.max(1, ...power) * 1.06;
      const mostRequests = Math.max(1, ...(single ? shown.map((k) => steps.requests[k]) : load)) * 1.06;

      axes(TOP + POWER, POWER, mostW, "power", "W");
      curve(layer, layer.power_w, range, TOP + POWER, POWER / mostW, "rgba(43, 108, 163, 0.16)", true);
      curve(layer, layer.power_w, range, TOP + POWER, POWER / mostW, KINDS.decode, false);

      const floor = TOP + POWER + GAP + LOAD;
      axes(floor, LOAD, mostRequests, single ? "requests in each step" : "requests in the engine", "");
      if (single) {
        for (const k of shown) {
          const a = Math.max(LEFT, xOf(steps.start_s[k])), b = Math.min(width - RIGHT, xOf(steps.end_s[k]));
          const tall = (steps.requests[k] / mostRequests) * LOAD;
          pen.fillStyle = KINDS[steps.kind[k]];
          pen.fillRect(a, floor - tall, Math.max(0.6, b - a - (b - a > 4 ? 0.8 : 0)), tall);
        }
      } else {
        curve(layer, layer.requests, range, floor, LOAD / mostRequests, "rgba(224, 122, 47, 0.55)", true);
      }

      pen.fillStyle = MUTED;
      pen.textAlign = "center";
      for (const [value, text] of ticks(from, until, inner() / 80)) {
        pen.fillText(text, Math.min(Math.max(xOf(value), LEFT), width - RIGHT - 12), floor + 13);
      }
      pen.fillText("seconds since the window's start", LEFT + inner() / 2, floor + 31);
      if (band) {
        pen.fillStyle = BAND;
        pen.fillRect(Math.min(...band), TOP, Math.abs(band[1] - band[0]), POWER + GAP + LOAD);
      }
      tell(power, load, shown, single);
    }

    function tell(power, load, shown, single) {
      const figure = (value, digits = 0) =>
        value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
      const digits = Math.max(0, Math.min(3, 2 - Math.floor(Math.log10(until - from))));
      const meanW = power.reduce((sum, value) => sum + value, 0) / Math.max(1, power.length);
      const most = Math.max(...(single ? shown.map((k) => steps.requests[k]) : load));
      const counted = shown.length ? `, ${figure(shown.length)} engine steps` : "";
      said.textContent =
        `${figure(from, digits)} to ${figure(until, digits)} s: mean ${figure(meanW)} W, at most ${figure(most)} requests${counted}`;
      Object.assign(group.dataset, { from: from, until: until });
    }

    function look(a, b) {
      const span = Math.min(whole, Math.max(Math.min(LEAST_S, whole), b - a));
      from = Math.min(Math.max(0, (a + b - span) / 2), whole - span);
      until = from + span;
      draw();
    }
    const zoom = (factor, at = (from + until) / 2) => {
      const span = Math.min(whole, Math.max(Math.min(LEAST_S, whole), (until - from) * factor));
      const start = at - (at - from) * (span / (until - from));
      look(start, start + span);
    };
    const pan = (share) => {
      const by = Math.min(Math.max(share * (until - from), -from), whole - until);
      look(from + by, until + by);
    };

    const moves = {
      in: () => zoom(0.5), out: () => zoom(2), left: () => pan(-0.5), right: () => pan(0.5),
      whole: () => look(0, whole), busiest: () => look(...data.busiest_s),
    };
    const keys = {
      "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", Home: "whole", 0: "whole",
    };
    for (const button of group.querySelectorAll("button")) {
      button.addEventListener("click", moves[button.dataset.move]);
    }
    group.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      moves[keys[event.key]]();
    });

    // A mouse marks what to look at; one finger moves the view, two spread it.
    const held = new Map();
    const place = (event) => event.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      held.set(event.pointerId, place(event));
      if (event.pointerType === "mouse") band = [place(event), place(event)];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!held.has(event.pointerId)) return;
      const x = place(event), old = held.get(event.pointerId);
      if (band) {
        band[1] = Math.min(Math.max(x, LEFT), width - RIGHT);
        draw();
        return;
      }
      const others = [...held].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      held.set(event.pointerId, x);
      if (others.length) {
        const apart = Math.abs(x - others[0]), was = Math.abs(old - others[0]);
        if (apart > 8 && was > 8) zoom(was / apart, tOf((x + others[0]) / 2));
      } else {
        pan((old - x) / inner());
      }
    });
    const release = (event) => {
      held.delete(event.pointerId);
      if (!band) return;
      const [a, b] = [...band].sort((one, other) => one - other);
      band = null;
      if (event.type === "pointerup" && b - a > 5) look(tOf(Math.max(a, LEFT)), tOf(b));
      else draw();
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("dblclick", moves.whole);
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;  // the page scrolls; a pinch on a touchpad comes with ctrlKey
      event.preventDefault();
      zoom(Math.exp(event.deltaY / 200), tOf(place(event)));
    }, { passive: false });

    group.hidden = false;
    figure.classList.add("live");
    new ResizeObserver(() => {
      if (group.querySelector(".plot").clientWidth !== width) draw();
    }).observe(group);
    draw();
  }

  // What scrolls sideways can be reached by keys; what does not is no stop on the way.
  const reach = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  document.querySelectorAll(".scroll, .still").forEach((box) => reach.observe(box));
  for (const table of document.querySelectorAll("table.sorts")) {
    sortable(table);
    filterable(table);
  }
  document.querySelectorAll("figure.zooms").forEach(zoomable);
})();
