// Separate a model's thinking from its answer while both stream in, as localrun/families/thinking.py does.

const START = 0, OPENED = 1, THINKING = 2, CLOSED = 3, ANSWER = 4;

export class ThinkingParser {
  #tags; #state; #held = "";

  // tags: {open, close}, or null for a model that does not think; startsInside: the prompt has opened the thinking.
  constructor(tags, startsInside) {
    this.#tags = tags;
    this.#state = tags ? START : ANSWER;
    this.opened = Boolean(tags && startsInside);
  }

  get part() {
    return this.opened && this.#state < CLOSED ? "thinking" : "answer";
  }

  // Returns the text that can be shown now, in order, as [part, text] with no empty text.
  feed(text) {
    this.#held += text;
    const out = [];
    if (this.#state === START) this.#lookForOpen();
    if (this.#state === OPENED && this.#held) {
      this.#held = withoutPrefix(this.#held, "\n");
      this.#state = THINKING;
    }
    if (this.#state === THINKING) {
      const thought = this.#takeThought();
      if (thought) out.push(["thinking", thought]);
    }
    if (this.#state === CLOSED) {
      this.#held = this.#held.replace(/^\n+/, "");
      if (this.#held) this.#state = ANSWER;
    }
    if (this.#state === ANSWER && this.#held) out.push(["answer", this.#take(0)]);
    return out;
  }

  // Returns what was held back, at the end of the stream.
  finish() {
    let held = this.#take(0);
    if (this.part === "thinking") {
      if (this.#state === START) held = withoutPrefix(held, "\n");
      held = withoutSuffix(held, "\n");
    }
    return held ? [[this.part, held]] : [];
  }

  #lookForOpen() {
    const { open } = this.#tags, text = this.#held.trimStart();
    if (text.startsWith(open)) {
      this.opened = true;
      this.#state = OPENED;
      this.#held = text.slice(open.length);
    } else if (!open.startsWith(text)) {
      this.#state = this.opened ? OPENED : ANSWER;
    }
  }

  #takeThought() {
    const { close } = this.#tags, end = this.#held.indexOf(close);
    if (end < 0) return this.#take(nHeldBack(this.#held, [close, `\n${close}`]));
    const thought = withoutSuffix(this.#held.slice(0, end), "\n");
    this.#held = this.#held.slice(end + close.length);
    this.#state = CLOSED;
    return thought;
  }

  // Takes all but the last n characters of the held text.
  #take(n) {
    const cut = this.#held.length - n, taken = this.#held.slice(0, cut);
    this.#held = this.#held.slice(cut);
    return taken;
  }
}

// How many last characters may yet turn out to begin one of the endings.
function nHeldBack(text, endings) {
  const longest = Math.max(...endings.map((ending) => ending.length));
  for (let n = Math.min(longest, text.length); n > 0; n--) {
    if (endings.some((ending) => ending.startsWith(text.slice(-n)))) return n;
  }
  return 0;
}

const withoutPrefix = (text, prefix) => (text.startsWith(prefix) ? text.slice(prefix.length) : text);
const withoutSuffix = (text, suffix) => (text.endsWith(suffix) ? text.slice(0, -suffix.length) : text);
