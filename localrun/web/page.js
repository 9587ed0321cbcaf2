// Load the model, then chat with it: one request at a time, streamed, with its thinking folded as in the terminal.

import { Wllama, WllamaAbortError } from "./wllama/index.min.js";
import { finishStore, openStore, read } from "./store.js";
import { ThinkingParser } from "./thinking.js";

const { name, about, files, shell, shards, nCtx, maxTokens, tags, startsInside } = self.EXPORT;
const at = (id) => document.getElementById(id);
const [form, question, send, stop, reset, log, state, bar] = ["form", "question", "send", "stop", "reset", "log", "state", "progress"].map(at);

let wllama, talking = null;
const turns = []; // as the chat template takes them

document.title = name;
at("name").textContent = name;
at("about").textContent = about;
start().catch((error) => fail(explain(error)));

async function start() {
  const isKept = await openStore();
  const needsCompat = lacksModernWasm();
  const wasm = needsCompat ? "wllama/compat.wasm" : "wllama/wllama.wasm";
  const engine = needsCompat ? [wasm, "wllama/compat.js"] : [wasm];
  const total = [...shards, ...engine].reduce((sum, path) => sum + files[path], 0);
  let loaded = 0;
  bar.hidden = false;
  const count = (n) => {
    loaded += n;
    bar.value = loaded / total;
    state.textContent = `Loading ${megabytes(loaded)} of ${megabytes(total)}`;
  };
  const blobs = {};
  for (const path of [...engine, ...shards]) blobs[path] = await read(path, isKept, count);
  if (isKept) await finishStore(shell);
  state.textContent = "Starting the model…";
  bar.removeAttribute("value");

  const wasmUrl = URL.createObjectURL(new Blob([blobs[wasm]], { type: "application/wasm" }));
  // We do not use its own cache (store.js keeps the files): without https it would refuse to start.
  wllama = new Wllama({ default: wasmUrl }, { logger: quiet, cacheManager: {}, modelManager: {} });
  wllama.setCompat(needsCompat ? { wasm: wasmUrl, worker: { code: await blobs["wllama/compat.js"].text() } } : null);
  await wllama.loadModel(
    shards.map((path) => new File([blobs[path]], path.split("/").pop())),
    // On the processor: a small model is fast enough there, and gives the same answers as everywhere else.
    { n_ctx: nCtx, n_parallel: 1, n_gpu_layers: 0, jinja: true, reasoning_format: "none", skip_chat_parsing: true },
  );
  const nThreads = wllama.getNumThreads();
  bar.hidden = true;
  state.textContent = `Ready · ${nThreads} ${nThreads === 1 ? "thread" : "threads"} · ${isKept ? "works offline" : "not kept for offline use (that needs https or localhost)"}`;
  document.body.dataset.ready = "yes";
  question.disabled = send.disabled = false;
  if (matchMedia("(pointer: fine)").matches) question.focus();
}

// Browsers without 64-bit memory or stack switching run an older, slower build; Firefox runs the usual one without the latter.
function lacksModernWasm() {
  if (navigator.userAgent.includes("Firefox/")) return false;
  try {
    new WebAssembly.Memory({ address: "i64", initial: 1n });
    return !WebAssembly.Suspending;
  } catch {
    return true;
  }
}

async function ask(text) {
  const asked = { role: "user", content: text };
  const view = show(text), parser = new ThinkingParser(tags, startsInside), said = { thinking: "", answer: "" };
  let timings = {}, nThoughts = 0, reason = null;
  const take = (pieces) => {
    for (const [part, piece] of pieces) said[part] += piece;
    view.update(said, parser, nThoughts, timings);
  };
  talking = new AbortController();
  busy(true);
  view.update(said, parser, 0, timings);
  try {
    await wllama.createChatCompletion({
      messages: [...turns, asked],
      stream: true,
      temperature: 0,
      max_tokens: maxTokens,
      timings_per_token: true,
      cache_prompt: true,
      abortSignal: talking.signal,
      onData: ({ choices: [choice], timings: measured }) => {
        timings = measured ?? timings;
        reason = choice?.finish_reason ?? reason;
        if (parser.part === "thinking") nThoughts = timings.predicted_n ?? 0; // the token that closes it counts too
        take(parser.feed(choice?.delta?.content ?? ""));
      },
    });
  } catch (error) {
    if (!(error instanceof WllamaAbortError)) view.fail(explain(error));
    reason = "stopped";
  }
  take(parser.finish());
  view.end(reason, parser.part === "thinking" ? nThoughts : null);
  if (reason !== "stopped" || said.answer.trim()) {
    turns.push(asked, { role: "assistant", content: said.answer, ...(parser.opened && { reasoning_content: said.thinking }) });
  }
  talking = null;
  busy(false);
}

// Add a question and a place for its answer to the page; what a model writes is text, never markup.
function show(text) {
  const [folded, answer, note] = [element("details", ""), element("div", "answer"), element("p", "note")];
  const [summary, thought] = [element("summary", ""), element("div", "")];
  folded.append(summary, thought);
  folded.hidden = true;
  at("welcome")?.remove();
  log.append(element("p", "question", text), folded, answer, note);
  log.scrollTop = log.scrollHeight;
  let rate = "";
  return {
    update(said, parser, nThoughts, timings) {
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      const thinking = parser.part === "thinking";
      folded.hidden = !parser.opened;
      summary.textContent = thinking ? `Thinking… ${count(nThoughts)}` : `Thought for ${count(nThoughts)}`;
      thought.textContent = said.thinking;
      answer.textContent = said.answer;
      if (timings.predicted_per_second) rate = `${count(timings.predicted_n)} · ${timings.predicted_per_second.toFixed(1)} tokens/s`;
      note.textContent = rate || "Reading…";
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    },
    end(reason, nThoughts) {
      if (nThoughts !== null) summary.textContent = `Thought for ${count(nThoughts)}, unfinished`;
      const why = { length: "cut off at the limit", stopped: "stopped" }[reason];
      note.textContent = [rate, why].filter(Boolean).join(" · ");
      answer.dataset.done = "yes";
      log.scrollTop = log.scrollHeight;
    },
    fail(message) {
      log.append(element("p", "note bad", message));
    },
  };
}

function busy(isBusy) {
  send.hidden = isBusy;
  stop.hidden = !isBusy;
  reset.hidden = isBusy || turns.length === 0;
}

function fail(message) {
  bar.hidden = true;
  state.textContent = message;
  state.className = "bad";
}

function explain(error) {
  const message = String(error?.message ?? error);
  if (/exceed.*context|context size|kv_cache_full/i.test(message)) return "The conversation is longer than the model's context: start a new one.";
  if (/memory|allocat/i.test(message)) return "There is not enough memory for this model: close other tabs, or export a smaller one.";
  if (error instanceof TypeError && !navigator.onLine) return "There is no network, and the model is not on this device yet.";
  return message;
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const count = (n) => `${n} ${n === 1 ? "token" : "tokens"}`;
const megabytes = (n) => `${Math.round(n / 1e6)} MB`;
const quiet = { debug() {}, log() {}, warn: console.warn, error: console.error };

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || !wllama || talking) return;
  question.value = "";
  fit();
  ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
question.addEventListener("input", fit);
stop.addEventListener("click", () => talking?.abort());
reset.addEventListener("click", () => {
  turns.length = 0;
  log.replaceChildren();
  reset.hidden = true;
  question.focus();
});

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}
