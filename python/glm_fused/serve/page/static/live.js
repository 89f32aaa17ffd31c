// The panels of live numbers.
import { drawHeat, drawLine, drawStack } from "./charts.js";
import { $, make, show, write } from "./dom.js";
import { bytes, count, duration, percent, rate } from "./units.js";

const SECONDS = 120; // of the chart of speed
const RECENT = 15; // polls over which a layer's hit rate is taken

const KINDS = [
  ["weights", "Weights"],
  ["slots", "Expert slots"],
  ["kv", "KV caches"],
  ["prompt_cache", "Prompt cache"],
  ["scratch", "Scratch"],
  ["other", "Program and other"],
];

const TOTALS = { requests: "requests", generated: "tokens generated", prompt: "prompt tokens" };

/** Show what `GET /stats` says. */
export class Live {
  constructor() {
    this.experts = [];
    drawLine($("speed-chart"), [], SECONDS);
  }

  /** Show these numbers. */
  update(stats) {
    write($("speed-now"), rate(stats.tokens_per_second));
    drawLine($("speed-chart"), stats.history, SECONDS);
    this.#totals(stats);
    this.#requests(stats);
    this.#memory(stats.memory);
    this.#experts(stats.experts);
    this.#reuse(stats.prompt_cache);
    showPairs("drafts", stats.drafts);
  }

  #totals({ totals, uptime_seconds: uptime }) {
    const rows = Object.entries(TOTALS).map(([name, label]) => pair(label, count(totals[name])));
    if (totals.prompt > 0) {
      const share = totals.cached / totals.prompt;
      rows.push(pair("of these, cached", percent(share)));
    }
    $("totals").replaceChildren(...rows.flat(), ...pair("running for", duration(uptime)));
  }

  #requests({ active, queued, max_batch: batch }) {
    const of = batch ? ` of ${batch}` : "";
    write($("queue"), `${active.length}${of} running · ${queued} waiting`);
    show($("requests-none"), active.length === 0);
    $("requests").replaceChildren(...active.map(requestRow));
  }

  #memory(memory) {
    const parts = KINDS.map(([name, label]) => [name, label, memory[name] ?? 0]);
    const total = parts.reduce((sum, part) => sum + part[2], 0);
    write($("memory-total"), bytes(total));
    drawStack($("memory-bar"), $("memory-legend"), parts, total);
  }

  #reuse(cache) {
    show($("reuse-panel"), Boolean(cache));
    if (!cache) return;
    const of = (some, all, unit) => `${unit(some)} of ${unit(all)}`;
    const rows = [
      ["texts kept", count(cache.prompts)],
      ["in memory", of(cache.bytes, cache.limit_bytes, bytes)],
      ["requests that found a beginning", of(cache.hits, cache.asked, count)],
      ["prompt tokens found", of(cache.hit_tokens, cache.asked_tokens, count)],
    ];
    if (cache.disk) rows.splice(2, 0, ["on disk", of(cache.disk.bytes, cache.disk.limit_bytes, bytes)]);
    $("reuse").replaceChildren(...rows.flatMap(([label, value]) => pair(label, value)));
  }

  #experts(experts) {
    const streamed = Boolean(experts?.layers?.length);
    for (const id of ["experts-map", "experts-scale"]) show($(id), streamed);
    if (!streamed) {
      this.experts = [];
      write($("experts-rate"), "");
      write($("experts-none"), "All experts are in memory: none is read from disk.");
      return;
    }
    this.experts = [...this.experts.slice(-RECENT), experts.layers];
    const layers = experts.layers.map((now) => {
      const then = this.experts[0].find((one) => one.layer === now.layer);
      return { layer: now.layer, rate: rateSince(now, then), reads: count(now.reads) };
    });
    write($("experts-none"), drawHeat($("experts-map"), layers));
    const used = experts.layers.reduce((sum, one) => sum + one.hits + one.reads, 0);
    const hits = experts.layers.reduce((sum, one) => sum + one.hits, 0);
    const overall = used ? `${percent(hits / used)} found in memory` : "not used yet";
    write($("experts-rate"), `${overall} · ${experts.slots} slots a layer`);
  }
}

/** Show numbers in the panel of that name, which is hidden where there are none. */
function showPairs(name, numbers) {
  show($(`${name}-panel`), Boolean(numbers));
  const plain = ([, value]) => ["number", "string", "boolean"].includes(typeof value);
  const rows = Object.entries(numbers ?? {}).filter(plain).map(([key, value]) => {
    const label = key.replace(/_(bytes|seconds)$/, "").replaceAll("_", " ");
    return pair(label, shown(key, value));
  });
  $(name).replaceChildren(...rows.flat());
}

/** The share of hits since an earlier count, or since the start where nothing happened since. */
function rateSince(now, then) {
  const hits = now.hits - (then?.hits ?? 0);
  const used = hits + now.reads - (then?.reads ?? 0);
  if (used > 0) return hits / used;
  return now.hit_rate ?? null;
}

function requestRow(request) {
  const { phase, prompt_done: done, prompt_total: total, cached, tokens } = request;
  if (phase === "prompt") {
    const bar = make("progress", { max: "1", value: total ? done / total : 0, "aria-label": "Prompt" });
    const text = `${count(done)} of ${count(total)} prompt tokens`;
    return make("li", {}, make("span", {}, text), bar);
  }
  const reused = cached ? ` · ${count(cached)} of the prompt cached` : "";
  const text = `${count(tokens)} tokens · ${rate(request.tokens_per_second)} a second${reused}`;
  return make("li", { class: "writes" }, make("span", {}, text));
}

function pair(label, value) {
  return [make("dt", {}, label), make("dd", {}, value)];
}

function shown(name, value) {
  if (typeof value !== "number") return value === true ? "yes" : value === false ? "no" : value;
  if (/(^|_)n?bytes$/.test(name)) return bytes(value);
  if (/(rate|share|accepted_fraction)$/.test(name) && value <= 1) return percent(value);
  if (/_seconds$/.test(name)) return duration(value);
  return Number.isInteger(value) ? count(value) : value.toPrecision(3);
}
