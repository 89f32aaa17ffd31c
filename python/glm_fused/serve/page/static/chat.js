// The conversation on the page: what is sent, what comes back, what is kept.
import { ServerError, streamAnswer } from "./api.js";
import { addChunk, Conversation, hasBegun, numbersOf } from "./conversation.js";
import { $, show, write } from "./dom.js";
import { AnswerView, userElement } from "./messages.js";
import { loadChat, saveChat } from "./storage.js";

const SAVE_EVERY = 1000; // ms, while an answer grows
const NEAR_END = 60; // px from the end of the conversation that count as being there

export class Chat {
  /** `settings()` gives the settings, `model()` promises the model's name; `onRefused` takes a 401. */
  constructor({ settings, model, onRefused }) {
    this.settings = settings;
    this.model = model;
    this.onRefused = onRefused;
    this.conversation = new Conversation(loadChat());
    this.views = new Map();
    this.abort = null;
    this.atEnd = true;
    this.saved = 0;
    this.#listen();
    this.render();
    this.#scroll();
  }

  #listen() {
    const draft = $("draft");
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    draft.addEventListener("input", () => this.#fit());
    draft.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("notice-close").addEventListener("click", () => this.notify(""));
    const log = $("log");
    log.addEventListener("scroll", () => {
      this.atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
      show($("latest"), !this.atEnd);
    });
    new ResizeObserver(() => this.#scroll()).observe($("messages"));
    $("latest").addEventListener("click", () => {
      this.atEnd = true;
      this.#scroll();
      draft.focus();
    });
    window.addEventListener("pagehide", () => this.busy && this.#save());
  }

  /** Whether an answer is being given. */
  get busy() {
    return this.abort !== null;
  }

  /** Send what has been written. */
  send() {
    const draft = $("draft");
    if (this.busy || !draft.value.trim()) return;
    if (this.conversation.openCalls().length) {
      this.notify("Give the results of the calls first.");
      document.querySelector(".call form textarea")?.focus();
      return;
    }
    this.conversation.messages.push({ role: "user", content: draft.value });
    draft.value = "";
    this.#fit();
    this.#answer();
  }

  /** Give the last answer again. */
  again() {
    if (this.busy) return;
    this.conversation.dropAnswer();
    $("draft").focus();
    this.#answer();
  }

  /** Stop the answer where it is. */
  stop() {
    this.abort?.abort();
  }

  /** Begin a new conversation. */
  clear() {
    this.stop();
    this.conversation = new Conversation();
    this.notify("");
    this.render();
    this.#save();
    $("draft").focus();
  }

  /** A message above the field, or none for an empty text. */
  notify(text) {
    write($("notice-text"), text);
    show($("notice"), text !== "");
  }

  async #answer() {
    const { conversation } = this;
    let body;
    try {
      body = conversation.request(this.settings());
    } catch (error) {
      return this.#refuse(`The tools in the settings are no JSON list: ${error.message}`);
    }
    const answer = conversation.begin();
    this.abort = new AbortController();
    this.atEnd = true;
    this.notify("");
    this.render();
    const view = this.views.get(answer);
    const times = { started: performance.now(), first: undefined };
    const onChunk = (chunk) => {
      addChunk(answer, chunk);
      if (hasBegun(answer)) times.first ??= performance.now();
      this.#renderSoon();
    };
    try {
      body.model = await this.model();
      await streamAnswer(body, this.abort.signal, onChunk, (progress) => view.wait(progress));
      answer.finish ??= "cut";
    } catch (error) {
      this.#fail(answer, error);
    }
    this.abort = null;
    answer.numbers = numbersOf(answer, times.started, times.first, performance.now());
    this.#end(answer);
  }

  #refuse(text) {
    $("draft").value ||= this.conversation.dropQuestion();
    this.#fit();
    this.render();
    this.notify(text);
  }

  #fail(answer, error) {
    if (error.name === "AbortError") {
      answer.finish = "stopped";
      return;
    }
    answer.finish = "cut";
    answer.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
    if (error.status === 401) this.onRefused(error.message);
  }

  #end(answer) {
    this.render();
    this.#save();
    const text = answer.error ?? (answer.content || "The answer has ended.");
    write($("announce"), answer.finish === "stopped" ? "Stopped." : text);
  }

  /** Show all of the conversation as it is now. */
  render() {
    const { messages } = this.conversation;
    const { format } = this.settings();
    const results = new Map();
    for (const m of messages) if (m.role === "tool") results.set(m.tool_call_id, m.content);
    const shown = messages.filter((m) => m.role !== "tool");
    const last = shown.at(-1);
    const elements = shown.map((message) => {
      if (message.role === "user") return this.#kept(message, () => userElement(message));
      const view = this.#kept(message, () => new AnswerView(message, this.#actions()));
      view.update(format, results, message === last);
      return view.element;
    });
    this.#place(elements);
    for (const message of this.views.keys()) {
      if (!messages.includes(message)) this.views.delete(message);
    }
    show($("empty"), messages.length === 0);
    show($("send"), !this.busy);
    show($("stop"), this.busy);
    this.#scroll();
  }

  #actions() {
    return {
      again: () => this.again(),
      result: (call, text) => this.#giveResult(call, text),
    };
  }

  #giveResult(call, text) {
    if (this.busy) return;
    const { conversation } = this;
    conversation.messages.push({ role: "tool", tool_call_id: call.id, content: text });
    if (conversation.openCalls().length === 0) {
      $("draft").focus();
      this.#answer();
      return;
    }
    this.render();
    this.#save();
    document.querySelector(".call form textarea")?.focus();
  }

  #kept(message, create) {
    if (!this.views.has(message)) this.views.set(message, create());
    return this.views.get(message);
  }

  /** Have `elements` be the ones shown, leaving those alone that are there already. */
  #place(elements) {
    const parent = $("messages");
    elements.forEach((element, i) => {
      if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] ?? null);
    });
    while (parent.children.length > elements.length) parent.lastElementChild.remove();
  }

  /** Draw once a frame, however many tokens come; in a hidden page, which has no frames, later. */
  #renderSoon() {
    if (Date.now() - this.saved > SAVE_EVERY) this.#save();
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.render();
    });
  }

  #save() {
    this.saved = Date.now();
    if (!saveChat(this.conversation.messages)) {
      this.notify("This browser keeps no more: the conversation will be gone after a reload.");
    }
  }

  #scroll() {
    const log = $("log");
    if (this.atEnd) log.scrollTop = log.scrollHeight;
  }

  #fit() {
    const draft = $("draft");
    draft.style.height = "auto";
    draft.style.height = `${Math.min(draft.scrollHeight, window.innerHeight * 0.4)}px`;
  }
}
