// What the page asks of the server.

/** An answer of the server that is no success; `status` is 0 where there was none at all. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// The comments by which the server says how far a prompt is; other clients skip them.
const PROGRESS = /^prompt (\d+)\/(\d+), (\d+) at hand$/;

let key = "";

/** Use this API key from now on; an empty one: none. */
export function useKey(value) {
  key = value;
}

/** The live numbers. Throws ServerError, or TimeoutError where the server does not answer. */
export async function fetchStats(timeout = 5000) {
  const response = await send("stats", { signal: AbortSignal.timeout(timeout) });
  return response.json();
}

/**
 * Ask for an answer and hand each chunk of it, parsed, to `onChunk` as it comes, and how far the
 * prompt is to `onPrompt`: {done, total, cached}, in tokens.
 *
 * Returns once the stream has ended as it should. Throws ServerError for an error that the server
 * names, before or amid the answer, and for a stream that breaks off; AbortError once `signal` is.
 */
export async function streamAnswer(body, signal, onChunk, onPrompt) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const { data, comment } of events(response.body, signal)) {
    if (comment !== undefined) {
      const progress = PROGRESS.exec(comment);
      if (progress) onPrompt(tokensOf(progress));
      continue;
    }
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(messageOf(chunk) ?? "The server failed.", 0);
    onChunk(chunk);
  }
  throw new ServerError("The connection ended before the answer did.", 0);
}

function tokensOf([, done, total, cached]) {
  return { done: Number(done), total: Number(total), cached: Number(cached) };
}

async function send(path, options) {
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  const message = messageOf(found) ?? `The server answered ${response.status}.`;
  throw new ServerError(message, response.status);
}

function messageOf(body) {
  const message = body?.error?.message ?? body?.error;
  return typeof message === "string" && message ? message : null;
}

/** Each server-sent event of a stream of bytes, {data}, and each comment, {comment}. */
export async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done && !buffer.endsWith("\r")) return;
      // A carriage return at the end may be half of a line's end: it waits for the rest.
      const lines = (buffer + (done ? "\n" : value)).split(/\r\n|\n|\r(?!$)/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield { data: data.join("\n") };
          data = [];
        } else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The connection broke off before the answer ended.", 0);
  }
}
