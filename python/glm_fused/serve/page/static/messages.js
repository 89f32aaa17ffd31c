// How messages are shown.
import { hasBegun, wholeCalls } from "./conversation.js";
import { make, show, write } from "./dom.js";
import { codeElement, copyText, renderMarkdown, renderPlain } from "./markdown.js";
import { count, rate, significant } from "./units.js";

const ENDS = {
  length: "ended at its limit of tokens",
  stopped: "stopped",
  cut: "cut off",
  content_filter: "ended by the server",
};

/** The element of what the user wrote. */
export function userElement(message) {
  const text = make("div", { class: "text" }, message.content);
  return make("article", { class: "message user", "aria-label": "You" }, text);
}

/** The element of an answer, drawn anew by `update` as it grows. */
export class AnswerView {
  /** `actions` has `again()`, and `result(call, text)` for a tool's result. */
  constructor(answer, actions) {
    this.answer = answer;
    this.actions = actions;
    this.thought = make("div", { class: "text" });
    this.thinkingLabel = make("span");
    const summary = make("summary", {}, this.thinkingLabel);
    this.thinking = make("details", { class: "thinking", hidden: true }, summary, this.thought);
    // Whoever opens or closes it has decided; until then it is open while there is nothing else.
    summary.addEventListener("click", () => (this.decided = true));
    this.progress = make("progress", { max: "1", hidden: true, "aria-label": "Prompt" });
    this.waitingLabel = make("span", {}, "Waiting");
    this.waiting = make("div", { class: "waiting" }, this.waitingLabel, this.progress);
    this.text = make("div", { class: "text" });
    this.calls = make("div", { class: "calls" });
    this.error = make("p", { class: "error", hidden: true });
    this.foot = make("footer", { hidden: true });
    const parts = [this.thinking, this.waiting, this.text, this.calls, this.error];
    const attributes = { class: "message assistant", "aria-label": "Answer" };
    this.element = make("article", attributes, ...parts, this.foot);
  }

  /** Show the answer as it is now; `results` are tools' by the id of the call. */
  update(format, results, isLast) {
    const { answer } = this;
    const going = answer.finish === null;
    const begun = answer.content !== "" || answer.tool_calls.length > 0;
    const render = format === "plain" ? renderPlain : renderMarkdown;
    show(this.thinking, answer.reasoning !== "");
    if (answer.reasoning) {
      if (!this.decided) this.thinking.open = going && !begun;
      write(this.thinkingLabel, going && !begun ? "Thinking" : "Thought");
      this.thinking.classList.toggle("going", going && !begun);
      render(this.thought, answer.reasoning);
    }
    show(this.waiting, going && !hasBegun(answer));
    if (answer.content !== this.shown || format !== this.format) {
      render(this.text, answer.content);
      [this.shown, this.format] = [answer.content, format];
    }
    this.element.classList.toggle("going", going && begun);
    this.element.setAttribute("aria-busy", String(going));
    this.#updateCalls(results, isLast);
    show(this.error, Boolean(answer.error));
    write(this.error, answer.error ?? "");
    this.#updateFoot(going, isLast);
  }

  /** Until something comes, show how far the prompt is: {done, total, cached}, in tokens. */
  wait({ done, total, cached }) {
    show(this.progress, total > 0);
    this.progress.value = total ? done / total : 0;
    const reused = cached ? `, ${count(cached)} of them cached` : "";
    write(this.waitingLabel, `Reading the prompt: ${count(done)} of ${count(total)} tokens${reused}`);
  }

  #updateCalls(results, isLast) {
    const { answer } = this;
    const whole = new Set(wholeCalls(answer));
    const states = answer.tool_calls.map((call) => [call, whole.has(call), results.get(call.id)]);
    const key = JSON.stringify([states, isLast]);
    if (key === this.callsKey) return;
    this.callsKey = key;
    const asks = (isWhole, result) => isWhole && result === undefined && isLast;
    const elements = states.map(([call, isWhole, result]) =>
      callElement(call, result, asks(isWhole, result) ? this.actions.result : null),
    );
    this.calls.replaceChildren(...elements);
  }

  #updateFoot(going, isLast) {
    show(this.foot, !going);
    if (going) return;
    const { answer } = this;
    const note = [ENDS[answer.finish], ...numberTexts(answer.numbers)].filter(Boolean).join(" · ");
    const key = JSON.stringify([note, isLast, answer.content === ""]);
    if (key === this.footKey) return;
    this.footKey = key;
    const button = (label, act) => make("button", { type: "button", class: "quiet", onclick: act }, label);
    const copy = (event) => copyText(event.currentTarget, answer.content);
    this.foot.replaceChildren();
    if (answer.content) this.foot.append(button("Copy", copy));
    if (isLast) this.foot.append(button("Answer again", () => this.actions.again()));
    this.foot.append(make("span", { class: "numbers" }, note));
  }
}

function numberTexts(numbers) {
  if (!numbers?.tokens) return [];
  const { tokens, rate: speed, prompt, cached, wait } = numbers;
  const cachedText = cached ? ` (${count(cached)} cached)` : "";
  return [
    `${count(tokens)} token${tokens === 1 ? "" : "s"}`,
    speed && `${rate(speed)} tokens/s`,
    wait !== undefined && `first after ${significant(wait)} s`,
    prompt !== undefined && `prompt of ${count(prompt)}${cachedText}`,
  ];
}

/** A call of a tool with its arguments and its result; without one, a form where `give` is set. */
function callElement(call, result, give) {
  const name = make("code", {}, call.name || "…");
  const summary = make("summary", {}, "Calls ", name);
  const parts = [summary, codeElement(pretty(call.arguments), "arguments")];
  if (result !== undefined) {
    parts.push(codeElement(pretty(result), "result"));
  } else if (give) {
    parts.push(resultForm(call, give));
  }
  return make("details", { class: "call", open: true }, ...parts);
}

function resultForm(call, give) {
  const field = make("textarea", { rows: "2", spellcheck: "false", class: "code" });
  const label = make("label", {}, `Result of ${call.name}`, field);
  const form = make("form", {}, label, make("button", { class: "primary" }, "Give result"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    give(call, field.value);
  });
  return form;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
