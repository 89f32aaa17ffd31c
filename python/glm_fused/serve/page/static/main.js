// Joins the parts of the page.
import { fetchStats, ServerError, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { $, write } from "./dom.js";
import { Live } from "./live.js";
import { Settings } from "./settings.js";
import { loadTheme, saveTheme } from "./storage.js";
import { rate } from "./units.js";

const POLL = 1000; // ms between numbers
const POLL_SLOWEST = 8000; // while the server does not answer
const THEMES = { "": "as the system has them", light: "light", dark: "dark" };

let stats = null;
let failures = 0;
let polls = 0;
let timer = 0;

const live = new Live();
const settings = new Settings(() => {
  useKey(settings.key);
  chat.render();
  poll();
});
useKey(settings.key);
const chat = new Chat({
  settings: () => settings.values,
  model: async () => (stats ?? (await fetchStats())).model,
  onRefused: (message) => settings.open("key", message),
});

/** Get the numbers, show them, and do so again after a while; what is asked last counts. */
async function poll() {
  clearTimeout(timer);
  const mine = ++polls;
  const found = await fetchStats().catch((error) => error);
  if (mine !== polls) return;
  failures = found instanceof Error ? failures + 1 : 0;
  if (failures) showFailure(found);
  else showStats((stats = found));
  if (!document.hidden) timer = setTimeout(poll, delay());
}

function delay() {
  if (failures) return Math.min(POLL * 2 ** (failures - 1), POLL_SLOWEST);
  return POLL;
}

function showStats(stats) {
  write($("model"), stats.model);
  document.title = `${stats.model} · glm-fused`;
  const running = stats.active.length;
  const text = running ? `${rate(stats.tokens_per_second)} tokens/s` : "Ready";
  showState(running ? "busy" : "ready", text);
  live.update(stats);
}

function showFailure(error) {
  if (error instanceof ServerError && error.status === 401) showState("locked", "API key needed");
  else if (error instanceof ServerError && error.status) showState("failed", error.message);
  else showState("offline", "No connection, trying again");
}

function showState(state, text) {
  $("state").dataset.state = state;
  write($("state-text"), text);
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  const label = `Colours: ${THEMES[theme]}`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

function listen() {
  $("new-chat").addEventListener("click", () => chat.clear());
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % 3];
    setTheme(next);
    saveTheme(next);
  });
  for (const button of document.querySelectorAll(".views button")) {
    button.addEventListener("click", () => showView(button.dataset.view));
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("settings").open) chat.stop();
  });
  document.addEventListener("visibilitychange", () => document.hidden || poll());
  window.addEventListener("online", poll);
}

function showView(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll(".views button")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
}

setTheme(loadTheme() in THEMES ? loadTheme() : "");
listen();
poll();
