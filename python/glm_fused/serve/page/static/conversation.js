// The messages of a conversation, and what is asked of the server for its next answer.

/**
 * Messages, as they are kept: {role: "user", content}, {role: "tool", tool_call_id, content} and
 * {role: "assistant", content, reasoning, tool_calls: [{id, name, arguments}], finish, error,
 * numbers}, of which `finish` is the server's reason, "stopped" by the user, "cut" where the stream
 * broke off, or null while it lasts.
 */
export class Conversation {
  constructor(messages = []) {
    this.messages = messages;
    // What was under way when the page was left has ended with it.
    for (const m of messages) if (m.role === "assistant" && m.finish === null) m.finish = "cut";
  }

  /** Begin an answer after what is there, and return its message. */
  begin() {
    const answer = { role: "assistant", content: "", reasoning: "", tool_calls: [], finish: null };
    this.messages.push(answer);
    return answer;
  }

  /** Take the last answer back, with results of its calls, so that it can be given again. */
  dropAnswer() {
    const last = this.messages.findLastIndex((m) => m.role === "assistant");
    if (last >= 0) this.messages.length = last;
  }

  /** Take back what the user wrote last, and return it; "" where something came after it. */
  dropQuestion() {
    return this.messages.at(-1)?.role === "user" ? this.messages.pop().content : "";
  }

  /** The calls of the last answer that have no result yet. */
  openCalls() {
    const last = this.messages.findLastIndex((m) => m.role === "assistant");
    if (last < 0) return [];
    const given = new Set(this.messages.slice(last + 1).map((m) => m.tool_call_id));
    return wholeCalls(this.messages[last]).filter((call) => !given.has(call.id));
  }

  /** What asks for the next answer, of any model. Throws SyntaxError for tools that are no JSON. */
  request(settings) {
    const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
    const body = {
      messages: [...system, ...this.messages.map(sent).filter((m) => m !== null)],
      stream: true,
      stream_options: { include_usage: true },
    };
    for (const name of ["temperature", "top_p", "seed", "max_tokens"]) {
      if (settings[name] !== "") body[name] = Number(settings[name]);
    }
    const stop = settings.stop.split("\n").filter((text) => text !== "");
    if (stop.length) body.stop = stop;
    const tools = parseTools(settings.tools);
    if (tools.length) body.tools = tools;
    if (settings.thinking) {
      body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
    }
    return body;
  }
}

/** The tools of a JSON text, none for an empty one. Throws SyntaxError for what is no list. */
export function parseTools(text) {
  if (!text.trim()) return [];
  const tools = JSON.parse(text);
  if (!Array.isArray(tools)) throw new SyntaxError("expected a list, as [{…}]");
  return tools;
}

/** The calls of an answer that came to its end; those of another may lack half their arguments. */
export function wholeCalls(answer) {
  return ["stopped", "cut", null].includes(answer.finish) ? [] : answer.tool_calls;
}

/** A message as the API has it; null for an answer without any content. */
function sent(message) {
  if (message.role === "user") return { role: "user", content: message.content };
  if (message.role === "tool") {
    return { role: "tool", tool_call_id: message.tool_call_id, content: message.content };
  }
  const { content, reasoning } = message;
  const calls = wholeCalls(message);
  if (!content && !calls.length) return null;
  const answer = { role: "assistant", content };
  if (reasoning) answer.reasoning_content = reasoning;
  if (calls.length) {
    answer.tool_calls = calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return answer;
}

/** Add what a chunk of a stream brings to an answer. */
export function addChunk(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const piece of delta.tool_calls ?? []) addCall(answer.tool_calls, piece);
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

/** Whether anything has come of an answer. */
export function hasBegun({ content, reasoning, tool_calls: calls }) {
  return content !== "" || reasoning !== "" || calls.length > 0;
}

function addCall(calls, piece) {
  const call = (calls[piece.index] ??= { id: "", name: "", arguments: "" });
  if (piece.id) call.id = piece.id;
  call.name += piece.function?.name ?? "";
  call.arguments += piece.function?.arguments ?? "";
}

/** What an answer took: {tokens, rate, prompt, cached, wait}, as far as it is known. */
export function numbersOf(answer, started, first, ended) {
  const usage = answer.usage;
  const tokens = usage?.completion_tokens;
  const spent = (ended - first) / 1000;
  const shownAsTheyCame = answer.tool_calls.length === 0; // calls may be held back until whole
  return {
    tokens,
    rate: shownAsTheyCame && tokens > 1 && spent > 0 ? (tokens - 1) / spent : undefined,
    prompt: usage?.prompt_tokens,
    cached: usage?.prompt_tokens_details?.cached_tokens,
    wait: first === undefined ? undefined : (first - started) / 1000,
  };
}
