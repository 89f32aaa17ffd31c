// What outlasts a reload. A browser that forbids storage, or has none left, keeps nothing.

const CHAT = "glm-fused.chat";
const SETTINGS = "glm-fused.settings";
const THEME = "glm-fused.theme";
const KEY = "glm-fused.key";

/** Settings that leave everything to the server. */
export const DEFAULTS = Object.freeze({
  system: "",
  temperature: "",
  top_p: "",
  seed: "",
  max_tokens: "",
  stop: "",
  thinking: "",
  format: "markdown",
  tools: "",
});

/** The messages of the conversation; none where there are none that can be read. */
export function loadChat() {
  const kept = parse(read(() => localStorage.getItem(CHAT)));
  if (!Array.isArray(kept)) return [];
  const roles = ["user", "assistant", "tool"];
  const whole = (m) => roles.includes(m?.role) && typeof m.content === "string";
  return kept.every(whole) ? kept : [];
}

/** Keep the messages; false where the browser does not. */
export function saveChat(messages) {
  return keep(() => localStorage.setItem(CHAT, JSON.stringify(messages)));
}

/** The settings, with defaults for what is missing. */
export function loadSettings() {
  const kept = parse(read(() => localStorage.getItem(SETTINGS))) ?? {};
  const names = Object.keys(DEFAULTS).filter((name) => typeof kept[name] === "string");
  return { ...DEFAULTS, ...Object.fromEntries(names.map((name) => [name, kept[name]])) };
}

/** Keep the settings; false where the browser does not. */
export function saveSettings(settings) {
  return keep(() => localStorage.setItem(SETTINGS, JSON.stringify(settings)));
}

/** The API key of this tab. */
export function loadKey() {
  return read(() => sessionStorage.getItem(KEY)) ?? "";
}

/** Keep the API key until the tab is closed. */
export function saveKey(key) {
  return keep(() => sessionStorage.setItem(KEY, key));
}

/** "light", "dark" or "" for the system's. */
export function loadTheme() {
  return read(() => localStorage.getItem(THEME)) ?? "";
}

/** Keep the theme. */
export function saveTheme(theme) {
  return keep(() => localStorage.setItem(THEME, theme));
}

function read(get) {
  try {
    return get();
  } catch {
    return null;
  }
}

function keep(set) {
  try {
    set();
    return true;
  } catch {
    return false;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
