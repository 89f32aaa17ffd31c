// The dialog of settings.
import { parseTools } from "./conversation.js";
import { $, show, write } from "./dom.js";
import { DEFAULTS, loadKey, loadSettings, saveKey, saveSettings } from "./storage.js";

/** The settings, and the dialog that changes them. */
export class Settings {
  /** `onChange` is called once settings or key are saved. */
  constructor(onChange) {
    this.values = loadSettings();
    this.key = loadKey();
    this.onChange = onChange;
    this.dialog = $("settings");
    this.form = $("settings-form");
    $("open-settings").addEventListener("click", () => this.open());
    $("close-settings").addEventListener("click", () => this.dialog.close());
    $("reset-settings").addEventListener("click", () => this.#fill(DEFAULTS, this.key));
    this.form.addEventListener("submit", (event) => this.#save(event));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
  }

  /** Open the dialog, with the field of that name in focus and a message, where there are any. */
  open(name = "system", message = "") {
    if (!this.dialog.open) {
      this.#fill(this.values, this.key);
      this.dialog.showModal();
    }
    this.#complain(message);
    this.form.elements[name].focus();
  }

  #fill(values, key) {
    for (const [name, value] of Object.entries(values)) this.form.elements[name].value = value;
    this.form.elements.key.value = key;
    this.#complain("");
  }

  #complain(text) {
    write($("settings-error"), text);
    show($("settings-error"), text !== "");
  }

  #save(event) {
    const names = Object.keys(DEFAULTS);
    const values = Object.fromEntries(names.map((name) => [name, this.form.elements[name].value]));
    try {
      parseTools(values.tools);
    } catch (error) {
      event.preventDefault();
      this.#complain(`Tools are no JSON list: ${error.message}`);
      this.form.elements.tools.focus();
      return;
    }
    this.values = values;
    this.key = this.form.elements.key.value.trim();
    saveSettings(values);
    saveKey(this.key);
    this.onChange();
  }
}
