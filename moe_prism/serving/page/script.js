"use strict";
const $ = (id) => document.getElementById(id);
const state = { model: null, full: 1, named: {}, points: null, live: null, abort: null, turns: [] };
const checked = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const round = (x, digits = 0) => x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}
async function getJson(path) {
  const reply = await fetch(path, { headers: headers() });
  const body = await reply.json();
  if (!reply.ok) throw new Error(body.error?.message ?? reply.statusText);
  return body;
}
function setStatus(kind, text) {
  $("status").className = `status ${kind}`;
  $("status").lastElementChild.textContent = text;
  $("status").title = text;
}

/* ---- charts: plain SVG ---- */
function svg(width, height, content, label) {
  return `<svg class="chart" viewBox="0 0 ${width} ${height}" role="img" aria-label="${label}">${content}</svg>`;
}
const squeeze = (loss) => Math.asinh(Math.max(0, loss) / 0.01); // linear below 0.01 nats, logarithmic above
function lossAt(k) {
  const p = state.points.elastic, after = p.findIndex((q) => q.k >= k);
  if (after <= 0) return p[after < 0 ? p.length - 1 : 0];
  const a = p[after - 1], b = p[after], t = (k - a.k) / (b.k - a.k);
  return { k, cost: a.cost + t * (b.cost - a.cost), loss: a.loss + t * (b.loss - a.loss) };
}
function drawCurve() {
  if (!state.points) {
    $("curve-text").textContent = "Not measured for this checkpoint. Measure with: moe-prism sweep";
    return;
  }
  const W = 300, H = 175, left = 34, right = 8, top = 8, bottom = 32, all = [...state.points.elastic, ...state.points.baseline];
  const most = Math.max(0.02, ...all.map((p) => p.loss));
  const x = (cost) => left + (W - left - right) * Math.min(1.05, cost);
  const y = (loss) => H - bottom - (H - top - bottom) * (squeeze(loss) / squeeze(most));
  let out = "";
  for (const loss of [0, 0.01, 0.1, 1, 10].filter((v) => v <= most)) {
    out += `<line class="grid" x1="${left}" x2="${W - right}" y1="${y(loss)}" y2="${y(loss)}"/><text x="${left - 5}" y="${y(loss) + 4}" text-anchor="end">${loss}</text>`;
  }
  for (const cost of [0, 0.25, 0.5, 0.75, 1]) out += `<text x="${x(cost)}" y="${H - bottom + 14}" text-anchor="middle">${cost}</text>`;
  out += `<text x="${(left + W) / 2}" y="${H - 3}" text-anchor="middle">cost: share of the experts' FLOPs</text>`;
  out += `<polyline class="line" points="${state.points.elastic.map((p) => `${x(p.cost)},${y(p.loss)}`).join(" ")}"/>`;
  out += state.points.elastic.map((p) => `<circle class="dot" cx="${x(p.cost)}" cy="${y(p.loss)}" r="2"><title>k_active ${p.k}: +${p.loss.toFixed(4)} nats at ${p.cost.toFixed(3)}</title></circle>`).join("");
  out += state.points.baseline.map((p) => `<rect class="square" x="${x(p.cost) - 3.5}" y="${y(p.loss) - 3.5}" width="7" height="7"><title>original with ${p.k} experts: +${p.loss.toFixed(4)} nats</title></rect>`).join("");
  const at = lossAt(Number($("dial").value));
  out += `<circle id="mark-floor" class="floor" cx="${x(at.cost)}" cy="${y(at.loss)}" r="6"/>`;
  if (state.live) {
    const now = lossAt(state.live);
    out += `<circle id="mark-now" class="now" cx="${x(now.cost)}" cy="${y(now.loss)}" r="5"/>`;
  }
  $("curve").innerHTML = svg(W, H, out, "Loss over the full model, in nats per token, against cost");
  $("curve-text").innerHTML = "Loss over the full model, nats per token. Ring: the dial. Dot: budget in use." +
    (state.points.baseline.length ? " Squares: the original with fewer experts." : "");
}
function drawLines(id, series, label, limit) {
  const W = 420, H = 120, left = 34, bottom = 6, top = 8, length = 120;
  const highest = limit ?? Math.max(1, ...series.flat().filter((v) => v !== null)), most = highest * 1.1;
  const x = (i, n) => left + (W - left) * ((length - n + i) / (length - 1));
  const y = (v) => H - bottom - (H - top - bottom) * (v / most);
  let out = [0, highest / 2, highest].map((v) => `<line class="grid" x1="${left}" x2="${W}" y1="${y(v)}" y2="${y(v)}"/>`).join("");
  out += [0, highest].map((v) => `<text x="${left - 5}" y="${y(v) + 4}" text-anchor="end">${round(v)}</text>`).join("");
  series.forEach((values, s) => {
    const points = values.map((v, i) => (v === null ? null : `${x(i, values.length)},${y(v)}`)).filter(Boolean);
    if (s === 0 && points.length > 1) out += `<polygon class="area" points="${points[0].split(",")[0]},${y(0)} ${points.join(" ")} ${points.at(-1).split(",")[0]},${y(0)}"/>`;
    out += `<polyline class="line ${s ? "two" : ""}" points="${points.join(" ")}"/>`;
  });
  $(id).innerHTML = svg(W, H, out, label);
}
function drawBars(id, bars, label) {
  const W = 420, H = 120, bottom = 18, most = Math.max(1, ...bars.map((b) => b.count)), width = W / Math.max(1, bars.length);
  let out = `<line class="grid" x1="0" x2="${W}" y1="${H - bottom}" y2="${H - bottom}"/>`;
  bars.forEach((b, i) => {
    const h = (H - bottom - 6) * (b.count / most);
    out += `<rect class="bar" x="${i * width + 1}" y="${H - bottom - h}" width="${Math.max(1, width - 2)}" height="${h}"><title>up to ${b.to}: ${round(b.count)} tokens</title></rect>`;
  });
  const ticks = [0, Math.floor((bars.length - 1) / 2), bars.length - 1];
  out += [...new Set(ticks)].filter((i) => i >= 0 && bars[i]).map((i) => `<text x="${i * width + width / 2}" y="${H - 4}" text-anchor="${i === 0 ? "start" : i === bars.length - 1 ? "end" : "middle"}">${bars[i].to}</text>`).join("");
  $(id).innerHTML = svg(W, H, out, label);
}

/* ---- the dial ---- */
function quality() {
  const k = Number($("dial").value), asked = checked("mode") === "floor" ? { k_min: k } : { k_min: k, k_active: k };
  return { ...asked, ttft_ms: number("ttft"), tpot_ms: number("tpot") };
}
function showDial() {
  const k = Number($("dial").value), floor = checked("mode") === "floor";
  $("dial-value").textContent = `${k} of ${state.full}`;
  $("dial").setAttribute("aria-valuetext", `${k} of ${state.full} sub-experts`);
  $("dial-text").textContent = floor
    ? `${k} or more of a token's ${state.full} sub-experts run in each layer; the server adds what it can spare.`
    : `Exactly ${k} of a token's ${state.full} sub-experts run in each layer.`;
  for (const button of $("named").children) button.setAttribute("aria-pressed", String(Number(button.dataset.k) === k));
  drawCurve();
}
function setUpDial() {
  $("dial").max = state.full;
  $("dial").disabled = false;
  $("dial").value = state.named.medium ?? state.full;
  $("named").innerHTML = "";
  for (const [name, k] of Object.entries(state.named).sort((a, b) => a[1] - b[1])) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name, title: `k_active ${k}` });
    button.dataset.k = k;
    button.onclick = () => { $("dial").value = k; showDial(); };
    $("named").append(button);
  }
  showDial();
}

/* ---- writing ---- */
function turn(who, said) {
  const box = Object.assign(document.createElement("div"), { className: "turn" });
  if (who) box.append(Object.assign(document.createElement("span"), { className: "who", textContent: who }));
  if (said) box.append(Object.assign(document.createElement("span"), { className: "said", textContent: said }));
  $("output").append(box);
  return box;
}
function addPiece(box, text, k) {
  const piece = document.createElement("span");
  piece.textContent = text;
  if (k && k < state.full) {
    piece.style.background = `color-mix(in srgb, var(--other) ${Math.round(30 * (1 - k / state.full))}%, transparent)`;
  }
  if (k) piece.title = `k_active ${k} of ${state.full}`;
  box.append(piece);
  const out = $("output");
  if (out.scrollHeight - out.scrollTop - out.clientHeight < 120) out.scrollTop = out.scrollHeight;
}
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}
async function send() {
  const prompt = $("prompt").value, chat = checked("kind") === "chat";
  if (!prompt.trim() || state.abort || !state.model) return;
  const box = turn(chat ? "You" : "", prompt), answer = chat ? turn(state.model) : box;
  if (chat) {
    state.turns.push({ role: "user", content: prompt });
    $("prompt").value = "";
  }
  const body = {
    model: state.model, stream: true, max_tokens: number("max-tokens"), temperature: number("temperature"), seed: number("seed"),
    stream_options: { continuous_usage_stats: true }, vllm_xargs: quality(), ...(chat ? { messages: state.turns } : { prompt }),
  };
  state.abort = new AbortController();
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  answer.classList.add("busy");
  const started = performance.now();
  let first = null, tokens = 0, text = "";
  try {
    const path = chat ? "v1/chat/completions" : "v1/completions";
    const reply = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: state.abort.signal });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice?.k_active) continue;
      const now = performance.now();
      first ??= now;
      tokens = event.usage.completion_tokens;
      const piece = chat ? choice.delta.content : choice.text;
      text += piece;
      addPiece(answer, chat && text === piece ? piece.trimStart() : piece, choice.k_active);
      state.live = choice.k_active;
      $("live-first").innerHTML = `${round(first - started)} <small>ms</small>`;
      $("live-speed").textContent = tokens > 1 && now > first ? round(((tokens - 1) / (now - first)) * 1000, 1) : "–";
      $("live-budget").innerHTML = `${state.live} <small>mean ${round(event.usage.mean_k_active, 1)}</small>`;
      $("live-tokens").textContent = tokens;
      drawCurve();
    }
    setStatus("ok", "ready");
  } catch (error) {
    if (error.name !== "AbortError") turn("").append(Object.assign(document.createElement("span"), { className: "error", textContent: error.message }));
  } finally {
    if (chat) state.turns.push({ role: "assistant", content: text });
    answer.classList.remove("busy");
    state.abort = null;
    $("send").innerHTML = "Send <kbd>Ctrl ↵</kbd>";
    $("send").classList.remove("stop");
  }
}

/* ---- load ---- */
const history = [];
function parseMetrics(text) {
  const found = {};
  for (const [, name, labels, value] of text.matchAll(/^moe_prism:(\w+)\{([^}]*)\} (\S+)$/gm)) {
    const rest = [...labels.matchAll(/(\w+)="([^"]*)"/g)].filter(([, key]) => key !== "model_name").map(([, , v]) => v).join(",");
    (found[name] ??= {})[rest] = Number(value);
  }
  return found;
}
const one = (m, name) => m[name]?.[""] ?? 0;
function attainment(m, objective) {
  const met = m.slo_requests_total?.[`${objective},met`] ?? 0, missed = m.slo_requests_total?.[`${objective},missed`] ?? 0;
  return met + missed ? `${round((100 * met) / (met + missed), 1)} %` : "–";
}
async function poll() {
  const reply = await fetch("metrics");
  const m = parseMetrics(await reply.text()), at = performance.now() / 1000, last = history.at(-1);
  const gained = (name) => one(m, name) - one(last.m, name);
  const entry = { at, m, speed: null, budget: null };
  if (last) {
    entry.speed = gained("generation_tokens_total") / (at - last.at);
    const tokens = gained("token_k_active_count");
    entry.budget = tokens ? gained("token_k_active_sum") / tokens : null;
  }
  history.push(entry);
  if (history.length > 120) history.shift();
  $("load-running").textContent = one(m, "num_requests_running");
  $("load-waiting").textContent = one(m, "num_requests_waiting");
  $("load-speed").textContent = entry.speed === null ? "–" : round(entry.speed, 1);
  $("load-budget").textContent = entry.budget === null ? "–" : round(entry.budget, 1);
  $("load-ttft").textContent = attainment(m, "ttft");
  $("load-tpot").textContent = attainment(m, "tpot");
  $("load-cache").textContent = `${round(100 * one(m, "kv_cache_usage_perc"))} %`;
  $("load-floor").textContent = one(m, "floor_violations_total");
  $("load-floor").classList.toggle("bad", one(m, "floor_violations_total") > 0);
  drawLines("chart-requests", [history.map((h) => one(h.m, "num_requests_running")), history.map((h) => one(h.m, "num_requests_waiting"))], "Running and waiting requests");
  drawLines("chart-speed", [history.map((h) => h.speed)], "Tokens per second");
  drawLines("chart-budget", [history.map((h) => h.budget)], "Mean budget", state.full);
  const old = history.find((h) => h.at > at - 60)?.m.token_k_active_bucket ?? {}, bounds = Object.keys(m.token_k_active_bucket ?? {}).filter((b) => b !== "+Inf");
  let before = 0;
  drawBars("chart-budgets", bounds.map((to) => {
    const upTo = m.token_k_active_bucket[to] - (old[to] ?? 0), count = upTo - before;
    before = upTo;
    return { to: Number(to), count };
  }), "Tokens by budget");
}
function tick() {
  if (!$("view-load").hidden && !document.hidden) poll().then(() => setStatus("ok", "ready"), () => setStatus("bad", "no connection"));
}

/* ---- start ---- */
function select(tab) {
  for (const name of ["write", "load"]) {
    const on = name === tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(on));
    $(`tab-${name}`).tabIndex = on ? 0 : -1;
    $(`view-${name}`).hidden = !on;
  }
  tick();
}
async function start() {
  try {
    const [models, points] = await Promise.all([getJson("v1/models"), getJson("v1/operating_points")]);
    state.model = models.data[0].id;
    state.full = points.full_budget;
    state.named = points.named;
    $("model").textContent = state.model;
    document.title = `${state.model} · moe-prism`;
    $("max-tokens").max = models.data[0].max_model_len;
    const full = points.measured?.elastic.find((p) => p.k_active === points.full_budget);
    state.points = full ? {
      elastic: points.measured.elastic.map((p) => ({ k: p.k_active, cost: p.flops_share, loss: p.nll - full.nll })),
      baseline: points.measured.baseline.map((p) => ({ k: p.k, cost: p.share, loss: p.nll - full.nll })),
    } : null;
    if (models.data[0].has_chat_template) document.querySelector("input[value=chat]").checked = true;
    setUpDial();
    setStatus("ok", "ready");
  } catch (error) {
    setStatus("bad", error instanceof TypeError ? "no connection" : error.message);
  }
}
$("form").onsubmit = (event) => { event.preventDefault(); state.abort ? state.abort.abort() : send(); };
$("clear").onclick = () => { $("output").innerHTML = ""; state.turns = []; $("prompt").focus(); };
$("prompt").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); } };
document.onkeydown = (event) => { if (event.key === "Escape") { state.abort?.abort(); document.querySelector(".more").open = false; } };
document.onclick = (event) => { if (!event.target.closest(".more")) document.querySelector(".more").open = false; };
$("dial").oninput = showDial;
for (const radio of document.querySelectorAll("input[name=mode]")) radio.onchange = showDial;
for (const name of ["write", "load"]) {
  $(`tab-${name}`).onclick = () => select(name);
  $(`tab-${name}`).onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = name === "write" ? "load" : "write";
    select(other);
    $(`tab-${other}`).focus();
  };
}
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => { sessionStorage.setItem("key", $("key").value); start(); };
setInterval(tick, 1000);
start();
