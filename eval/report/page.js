"use strict";
// The questions of the report. What a model wrote is only ever set as textContent. Rows of the index:
const ID = 0, CATEGORY = 1, QUESTION = 2, GOLD = 3, ANSWERS = 4, RIGHT = 5, OUTPUTS = 6, FLAGS = 7;
const NO_ANSWER = 1, TRUNCATED = 2, SEVERAL = 4, WORD = 8, CHANCE = 16;
const PAGE = 50;          // questions on a page of the list
const SHOWN = 20000;      // characters of a text shown before "show all"
const LINE = 400;         // characters of a text in the list
const KEPT = 6;           // unpacked pieces kept in memory

const index = JSON.parse(document.getElementById("index").textContent);
const at = (id) => document.getElementById(id);
const state = { run: 0, task: 0, pair: null, page: 0, rows: [], search: 0 };
const unpacked = new Map();
let shownWhile = 0;       // the search that the list is of
const tasks = () => index.runs[state.run].tasks;
const task = () => tasks()[state.task];

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function fill(select, names) {
  select.replaceChildren(...names.map((name, i) => {
    const option = make("option", "", name);
    option.value = i;
    return option;
  }));
}

// The prompts and outputs of a piece, unpacked by the browser's own gzip.
async function piece(run, task, number) {
  const name = `t-${run}-${task}-${number}`;
  if (!unpacked.has(name)) {
    const bytes = Uint8Array.from(atob(at(name).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    if (unpacked.size >= KEPT) unpacked.delete(unpacked.keys().next().value);
    unpacked.set(name, new Response(stream).json());
  }
  return unpacked.get(name);
}

async function texts(run, task, row) {
  return (await piece(run, task, Math.floor(row / index.piece)))[row % index.piece];
}

function verdict(row) {
  if (row[RIGHT] === row[OUTPUTS]) return ["right", row[OUTPUTS] > 1 ? `all ${row[OUTPUTS]} right` : "✓ right"];
  if (row[RIGHT]) return ["", `${row[RIGHT]} of ${row[OUTPUTS]} right`];
  if (row[FLAGS] & NO_ANSWER && !row[ANSWERS].length) return ["wrong", "– no answer"];
  return ["wrong", row[OUTPUTS] > 1 ? `none of ${row[OUTPUTS]}` : "✗ wrong"];
}

const KINDS = {
  all: () => true,
  right: (row) => row[RIGHT] === row[OUTPUTS],
  wrong: (row) => row[RIGHT] === 0,
  mixed: (row) => row[RIGHT] > 0 && row[RIGHT] < row[OUTPUTS],
  none: (row) => row[FLAGS] & NO_ANSWER,
  truncated: (row) => row[FLAGS] & TRUNCATED,
  several: (row) => row[FLAGS] & SEVERAL,
  word: (row) => row[FLAGS] & WORD,
  chance: (row) => row[FLAGS] & CHANCE,
};

// What a question is searched by; made once.
function haystack(row) {
  row.text ??= [row[ID], row[QUESTION], row[GOLD], ...row[ANSWERS]].join("\n").toLowerCase();
  return row.text;
}

async function apply() {
  const ticket = ++state.search;
  const current = task();
  state.page = 0;
  if (!current) return show(0);
  const kind = KINDS[at("verdict").value];
  const category = Number(at("category").value) - 1;
  const words = at("search").value.trim().toLowerCase();
  const pool = state.pair ? [...state.pair.first, ...state.pair.second].sort((a, b) => a - b) : current.rows.keys();
  const rows = [];
  for (const i of pool) {
    const row = current.rows[i];
    if (kind(row) && (category < 0 || row[CATEGORY] === category)) rows.push(i);
  }
  if (!words) {
    state.rows = rows;
    return show(current.rows.length);
  }
  const hit = (i) => haystack(current.rows[i]).includes(words);
  if (!at("deep").checked) {
    state.rows = rows.filter(hit);
    return show(current.rows.length);
  }
  state.rows = [];
  const { run, task: number } = state;
  for (const [done, i] of rows.entries()) {
    if (hit(i)) state.rows.push(i);
    else {
      const found = await texts(run, number, i);
      if (ticket !== state.search) return;   // another search began
      const parts = [found.prompt, ...found.outputs.map((output) => output.text)];
      if (parts.some((part) => part.toLowerCase().includes(words))) state.rows.push(i);
    }
    if (done % 256 === 255) {
      show(current.rows.length, `searched ${(done + 1).toLocaleString("en")} of ${rows.length.toLocaleString("en")}…`);
      await new Promise((resume) => setTimeout(resume));
      if (ticket !== state.search) return;
    }
  }
  show(current.rows.length);
}

function show(total, progress) {
  const rows = task() ? state.rows : [];
  const start = state.page * PAGE, end = Math.min(start + PAGE, rows.length);
  const number = (value) => value.toLocaleString("en");
  at("count").textContent = progress ? `${number(rows.length)} found; ${progress}`
    : total === 0 ? "No question was asked in this task."
    : rows.length === 0 ? `No question of ${number(total)} matches.`
    : `${number(rows.length)} of ${number(total)} questions`;
  at("count").dataset.done = progress ? "" : "1";
  // while a search runs, a full list stays: somebody may be reading in it
  if (!progress || shownWhile !== state.search || at("list").children.length < PAGE) at("list").replaceChildren(...rows.slice(start, end).map(item));
  shownWhile = state.search;
  at("place").textContent = rows.length ? `${number(start + 1)}–${number(end)} of ${number(rows.length)}` : "";
  at("previous").disabled = start === 0;
  at("next").disabled = end >= rows.length;
}

function item(i) {
  const row = task().rows[i];
  const [kind, text] = verdict(row);
  const node = make("li"), details = make("details"), summary = make("summary");
  const marks = [String(row[ID]).slice(0, LINE), task().categories[row[CATEGORY]]].filter(Boolean);
  summary.append(make("span", `verdict ${kind}`, text), make("span", "what", row[QUESTION].slice(0, LINE)));
  const where = make("span", "where", marks.join(" · "));
  if (row[FLAGS] & TRUNCATED) where.prepend(make("span", "truncated", "truncated · "));
  summary.append(where);
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (details.open && !details.dataset.filled) {
      details.dataset.filled = "1";
      open(details, i);
    }
  });
  node.append(details);
  return node;
}

async function open(details, i) {
  const row = task().rows[i], box = make("div", "detail");
  const sides = [[state.run, state.task, i]];
  if (state.pair) {
    const [run, number] = [state.pair.runs[1], state.pair.tasks[1]];
    sides.push([run, number, index.runs[run].tasks[number].rows.findIndex((other) => other[ID] === row[ID])]);
  }
  let found;
  try {
    found = await Promise.all(sides.map((side) => texts(...side)));
  } catch (error) {
    details.append(make("p", "note", `The texts cannot be unpacked: ${error.message}. It takes a browser of 2023 or later.`));
    return;
  }
  const facts = make("dl");
  pair(facts, "Gold", row[GOLD]);
  box.append(make("h4", "", "Question"), long(row[QUESTION]), facts);
  const columns = make("div", "sides");
  found.forEach((one, number) => columns.append(side(one, sides.length > 1 ? index.runs[sides[number][0]].label : "")));
  box.append(columns);
  details.append(box);
}

function side(found, label) {
  const box = make("div");
  if (label) box.append(make("h5", "", label));
  const prompt = make("details");
  prompt.className = "prompt";
  prompt.append(make("summary", "", `Prompt, ${found.prompt.length.toLocaleString("en")} characters`));
  prompt.addEventListener("toggle", () => prompt.children.length > 1 || prompt.append(long(found.prompt)));
  box.append(prompt);
  found.outputs.forEach((output, i) => box.append(written(output, i, found.outputs.length)));
  return box;
}

function written(output, i, count) {
  const box = make("details", "output");
  const name = count > 1 ? `Output ${i + 1} of ${count}` : "Output";
  const mark = output.answer === undefined ? "no answer" : output.right ? "right" : "wrong";
  const summary = make("summary", "", `${name}: `);
  summary.append(make("span", output.right ? "verdict right" : "verdict wrong", mark));
  if (output.truncated) summary.append(make("span", "truncated", " · truncated"));
  box.append(summary);
  const fillIn = () => {
    const facts = make("dl");
    pair(facts, "Extracted", output.answer ?? "nothing");
    if (output.stock_right !== undefined) {
      pair(facts, "Stock lm-eval", `${output.stock_answer ?? "nothing"}: ${output.stock_right ? "right" : "wrong"}`);
    }
    if (output.order) pair(facts, "Options in the order", `${output.order}, in the letters of the first output`);
    for (const [name, read] of Object.entries(output.readings ?? {})) {
      pair(facts, `Read: ${name}`, `${read.answer ?? "nothing"}: ${read.right ? "right" : "wrong"}`);
    }
    pair(facts, "Tokens", output.tokens === undefined ? "unknown" : output.tokens.toLocaleString("en"));
    pair(facts, "Truncated", output.truncated === undefined ? "unknown" : output.truncated ? "yes, at the token limit" : "no");
    for (const [option, score] of Object.entries(output.scores ?? {})) pair(facts, `log p(${option})`, score);
    box.append(facts);
    if (!output.scores) box.append(long(output.text));
    if (output.prompt) box.append(make("h5", "", "Its prompt"), long(output.prompt));
  };
  box.addEventListener("toggle", () => box.children.length > 1 || fillIn());
  box.open = i === 0;
  return box;
}

function pair(list, name, value) {
  const text = String(value);
  list.append(make("dt", "", name), make("dd", "", text.length > SHOWN ? `${text.slice(0, SHOWN)}…` : text));
}

function long(text) {
  const box = make("div"), body = make("pre", "", text.slice(0, SHOWN) || "(empty)");
  body.tabIndex = 0;
  box.append(body);
  if (text.length > SHOWN) {
    const more = make("button", "", `Show all ${text.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.addEventListener("click", () => { body.textContent = text; more.remove(); });
    box.append(more);
  }
  return box;
}

function chooseRun(run, number) {
  state.run = run;
  state.task = number;
  at("run").value = run;
  fill(at("task"), tasks().map((one) => one.name));
  at("task").value = number;
  fill(at("category"), ["All", ...(task()?.categories ?? []).map((name) => name || "(none)")]);
}

function choosePair(found) {
  state.pair = found;
  at("pair").hidden = !found;
  at("pair").replaceChildren();
  if (!found) return;
  chooseRun(found.runs[0], found.tasks[0]);
  at("verdict").value = "all";
  at("search").value = "";
  const [first, second] = found.runs.map((run) => index.runs[run].label);
  const leave = make("button", "", "Show all questions");
  leave.type = "button";
  leave.addEventListener("click", () => { choosePair(null); apply(); });
  at("pair").append(`Only where ${first} and ${second} differ; verdicts are those of ${first}. `, leave);
}

function turn(step) {
  state.page += step;
  show(task().rows.length);
  at("questions").scrollIntoView();
}

fill(at("run"), index.runs.map((run) => run.label));
chooseRun(0, 0);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("run").addEventListener("change", () => { choosePair(null); chooseRun(Number(at("run").value), 0); apply(); });
at("task").addEventListener("change", () => { choosePair(null); chooseRun(state.run, Number(at("task").value)); apply(); });
for (const id of ["verdict", "category", "deep"]) at(id).addEventListener("change", apply);
let waiting;
at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
for (const button of document.querySelectorAll("[data-pair]")) {
  button.addEventListener("click", () => {
    choosePair(index.pairs[Number(button.dataset.pair)]);
    apply();
    at("questions").scrollIntoView();
  });
}
apply();
