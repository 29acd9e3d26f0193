// fastnca studio: the page. It shows what the server holds and sends what the person does; it keeps nothing itself.

const SAMPLE_RATE = 22050;
const HOP_LENGTH = 256;
const ROWS = { mel: 80, linear: 513 };
const POLL_MS = 300;
const GONE_POLL_MS = 1000;
const FRAME_MS = 33;
const LOSSES_MS = 3000;
const COMMAND_MS = 3000;
const RECORD_SECONDS = 6;
const SPEEDS = [1, 2, 5, 8, 15, 30, 60, 0]; // steps per second; 0: as fast as it can
const BRUSHES = ["erase", "noise", "quieter", "louder", "protect", "unprotect"];
const BOXES = { regrow: "regrow", "protect-box": "protect" };
const NOTE_KEYS = "awsedftgyhujk";
const BLACK_KEYS = [1, 3, 6, 8, 10];
const CAPTIONS = { grown: "what grew", target: "the recording", wounded: "the wound", growth: "its growth", take: "a take" };

const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const db = (value) => `${value.toFixed(1)} dB`;

let state = null;
let tool = "listen";
let choosing = false; // the first screen is wanted although a sound is open

// ---- The server ----------------------------------------------------------------------------------------------------

const token = new URLSearchParams(location.search).get("token");
let requests = 0; // numbers them, so that an older answer never replaces a newer one
let newestState = 0;

class Refused extends Error {}
class Gone extends Error {}

async function request(path, { body, json, timeout } = {}) {
  const headers = token ? { "X-Token": token } : {};
  if (json) headers["Content-Type"] = "application/json";
  const options = { headers, cache: "no-store", method: body || json ? "POST" : "GET", body: json ? JSON.stringify(json) : body };
  if (timeout) options.signal = AbortSignal.timeout(timeout);
  const answer = await wholeAnswer(path, options).catch((cause) => { throw new Gone(cause.message); });
  if (!answer.ok) throw new Refused(reason(answer));
  return answer;
}

async function wholeAnswer(path, options) {
  const response = await fetch(path, options);
  return { ok: response.ok, status: response.status, headers: response.headers, buffer: await response.arrayBuffer() };
}

const textOf = ({ buffer }) => new TextDecoder().decode(buffer);
const jsonOf = (answer) => JSON.parse(textOf(answer));

function reason(answer) {
  try {
    return jsonOf(answer).error;
  } catch {
    return `The server refused this (${answer.status}).`;
  }
}

async function refresh() {
  const number = ++requests;
  accept(jsonOf(await request("api/state", { timeout: 10000 })), number);
}

const post = (path, json = {}) => postAny(`api/${path}`, { json });

// A poll that was sent later may have been answered earlier: then the answer's order is not known, and a new one is.
async function postAny(path, options) {
  const number = ++requests;
  const answer = await request(path, options);
  if (number < newestState) await refresh();
  else accept(jsonOf(answer), number);
}

// What a person asked for: a refusal is shown, and success clears the refusal before it.
async function attempt(deed) {
  try {
    const result = await deed();
    clearError();
    return result;
  } catch (error) {
    report(error);
    return null;
  }
}

function report(error) {
  if (error instanceof Gone) markGone();
  else showError(error.message);
}

function showError(text) {
  if (isGone()) return;
  $("error-text").textContent = text;
  $("dismiss").hidden = false;
  $("error").hidden = false;
}

function clearError() {
  if (!isGone()) $("error").hidden = true;
}

let lostServer = null; // its name while it is gone: another afterwards has started anew

const isGone = () => document.body.dataset.server === "gone";

function markGone() {
  if (isGone()) return;
  showError("The server does not answer. Nothing that it has saved in the studio's folder is lost. Trying again every second …");
  $("dismiss").hidden = true;
  lostServer = state?.server;
  document.body.dataset.server = "gone";
}

async function markThere() {
  if (!isGone()) return;
  document.body.dataset.server = "there";
  clearError();
  await tell(state.server === lostServer ? "The server is back, and nothing is lost." : "The server has started anew, and goes on from what it had saved.");
}

async function tell(text) {
  $("notice").textContent = text;
  await sleep(4000);
  if ($("notice").textContent === text) $("notice").textContent = "";
}

const visible = () => document.hidden
  ? new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }))
  : Promise.resolve();

async function keepPolling() {
  for (;;) {
    await visible();
    await refresh().then(markThere, report);
    await sleep(isGone() ? GONE_POLL_MS : POLL_MS);
  }
}

// For what may be asked for faster than it can be answered (sliders): one request at a time, then the newest value.
function newestOnly(send) {
  let waiting = null;
  let busy = false;
  return async (value) => {
    waiting = { value };
    if (busy) return;
    busy = true;
    while (waiting) {
      const next = waiting.value;
      waiting = null;
      await attempt(() => send(next));
    }
    busy = false;
  };
}

async function everyWhile(ms, wanted, deed) {
  for (;;) {
    await visible();
    if (state && !isGone() && wanted()) await deed().catch(report);
    await sleep(ms);
  }
}

// ---- The state -----------------------------------------------------------------------------------------------------

let shownMessage = null;
let shownFailure = null;
let openSound = null;

const soundKey = () => state?.sound ? [state.server, state.sound.name, state.sound.has_target].join("|") : null;

function accept(newState, number) {
  if (number < newestState) return;
  newestState = number;
  const before = JSON.stringify(state?.mixture);
  state = newState;
  if (soundKey() !== openSound) changeSound();
  else if (JSON.stringify(state.mixture) !== before) forgetGrown();
  showMessages();
  render();
}

function changeSound() {
  openSound = soundKey();
  choosing = false;
  heal = null;
  drawn = nothingDrawn();
  sounds.clear();
  notes.clear();
  stop();
  pictures.target = pictures.grown = null;
  if (state.sound?.has_target) loadTarget().catch(report);
  if (state.mixture) loadSpace().catch(report);
}

// Keys must not play the mixture that was there before, not even once.
function forgetGrown() {
  sounds.delete("grown");
  notes.clear();
  heal = null;
}

function showMessages() {
  const message = state.message && `${state.server} ${state.message.id}`;
  if (message && message !== shownMessage) showError(state.message.text);
  shownMessage = message;
  const failure = state.learning?.error ?? null;
  if (failure && failure !== shownFailure) showError(failure);
  shownFailure = failure;
}

// ---- Colors --------------------------------------------------------------------------------------------------------

const MAGMA = ["000004", "0a0822", "1d1147", "36106b", "51127c", "6a1c81", "832681", "9c2e7f", "b73779", "d0416f", "e75263",
  "f56b5c", "fc8961", "fea772", "fec488", "fde2a3", "fcfdbf"];
const AROUND_ZERO = ["bfe9f2", "2b9fb3", "0b3a44", "08090b", "5a2209", "d9652a", "ffe0c2"];

const rgb = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));

// 256 colors, each as the four bytes of a pixel.
function colorTable(anchors) {
  const colors = anchors.map(rgb);
  const table = new Uint8ClampedArray(256 * 4);
  for (let level = 0; level < 256; level++) {
    const place = (level / 255) * (colors.length - 1);
    const below = Math.min(Math.floor(place), colors.length - 2);
    for (let c = 0; c < 3; c++) {
      table[4 * level + c] = colors[below][c] + (place - below) * (colors[below + 1][c] - colors[below][c]);
    }
    table[4 * level + 3] = 255;
  }
  return new Uint32Array(table.buffer);
}

const COLORS = { level: colorTable(MAGMA), alpha: colorTable(MAGMA), hidden: colorTable(AROUND_ZERO) };

// ---- Pictures ------------------------------------------------------------------------------------------------------

const pictures = { target: null, grown: null }; // {bytes: {mel, linear}, frames, colors}
const scratch = document.createElement("canvas");

function readFrame({ headers, buffer }, view = "level") {
  const frames = Number(headers.get("X-Frames"));
  const bytes = new Uint8Array(buffer);
  const mel = bytes.subarray(0, ROWS.mel * frames);
  const linear = bytes.subarray(ROWS.mel * frames, (ROWS.mel + ROWS.linear) * frames);
  return { bytes: { mel, linear }, frames, colors: COLORS[view], version: headers.get("X-Version"), age: Number(headers.get("X-Age")) };
}

// Row 0 is the lowest. Where a canvas has fewer lines than the grid has rows, a line shows the highest of its rows, so
// that no thin partial falls between two lines.
function paint(canvas, picture, grid) {
  const context = canvas.getContext("2d");
  if (!picture) return context.clearRect(0, 0, canvas.width, canvas.height);
  const { frames, colors } = picture;
  const bytes = picture.bytes[grid];
  const lines = Math.min(ROWS[grid], canvas.height);
  const image = new ImageData(frames, lines);
  const pixels = new Uint32Array(image.data.buffer);
  for (let line = 0; line < lines; line++) {
    const first = Math.floor((line * ROWS[grid]) / lines);
    const last = Math.floor(((line + 1) * ROWS[grid]) / lines);
    for (let t = 0, at = (lines - 1 - line) * frames; t < frames; t++, at++) {
      let level = bytes[first * frames + t];
      for (let row = first + 1; row < last; row++) level = Math.max(level, bytes[row * frames + t]);
      pixels[at] = colors[level];
    }
  }
  scratch.width = frames;
  scratch.height = lines;
  scratch.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(scratch, 0, 0, canvas.width, canvas.height);
}

const grids = []; // every canvas with what lies over it: {canvas, side, grid, plot, playhead, brush, box}

function prepareGrid(side, grid) {
  const canvas = $(`${side}-${grid}`);
  const plot = canvas.parentElement;
  const clip = element("div", "clip", plot);
  const made = { canvas, side, grid, plot, playhead: element("div", "playhead", clip), brush: element("div", "brush", clip), box: element("div", "box", clip), cursor: [0.5, 0.5] };
  for (const over of [made.playhead, made.brush, made.box]) over.hidden = true;
  new ResizeObserver(() => fit(made)).observe(plot);
  listenToPointer(made);
  listenToArrows(made);
  grids.push(made);
}

function element(tag, className, parent) {
  const made = document.createElement(tag);
  made.className = className;
  parent.append(made);
  return made;
}

function fit(made) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth, clientHeight } = made.plot;
  made.canvas.width = Math.max(1, Math.round(clientWidth * ratio));
  made.canvas.height = Math.max(1, Math.round(clientHeight * ratio));
  paint(made.canvas, pictures[made.side], made.grid);
  drawAxes(made);
}

function show(side, picture) {
  const lengthChanged = pictures[side]?.frames !== picture.frames;
  pictures[side] = picture;
  for (const made of grids.filter((g) => g.side === side)) {
    paint(made.canvas, picture, made.grid);
    if (lengthChanged) drawAxes(made);
  }
}

async function loadTarget() {
  const key = openSound;
  const picture = readFrame(await request("api/target"));
  if (key === openSound) show("target", picture);
}

// ---- Axes ----------------------------------------------------------------------------------------------------------

const MEL_LOG_STEP = Math.log(6.4) / 27; // Slaney's scale, as in librosa: linear below 1000 Hz
const hzToMel = (hz) => hz < 1000 ? (hz * 3) / 200 : 15 + Math.log(hz / 1000) / MEL_LOG_STEP;
const melToHz = (mel) => mel < 15 ? (mel * 200) / 3 : 1000 * Math.exp(MEL_LOG_STEP * (mel - 15));
const TOP_HZ = SAMPLE_RATE / 2;
const MEL_STEP = hzToMel(TOP_HZ) / (ROWS.mel + 1); // between two bands

// Frequencies lie in the middle of their row.
const shareOfHz = {
  mel: (hz) => (hzToMel(hz) / MEL_STEP - 0.5) / ROWS.mel,
  linear: (hz) => ((hz / TOP_HZ) * (ROWS.linear - 1) + 0.5) / ROWS.linear,
};
const hzOfShare = {
  mel: (share) => melToHz(clamp(share * ROWS.mel + 0.5, 0, ROWS.mel + 1) * MEL_STEP),
  linear: (share) => clamp(((share * ROWS.linear - 0.5) / (ROWS.linear - 1)) * TOP_HZ, 0, TOP_HZ),
};
const HZ_TICKS = {
  mel: [[250, "250 Hz"], [500, "500"], [1000, "1 kHz"], [2000, "2"], [4000, "4"], [8000, "8"]],
  linear: [[0, "0 kHz"], [2000, "2"], [4000, "4"], [6000, "6"], [8000, "8"], [10000, "10"]],
};

const secondsOf = (side) => ((pictures[side]?.frames ?? state?.life?.n_frames ?? 0) * HOP_LENGTH) / SAMPLE_RATE;

function timeStep(seconds, width) {
  const least = (seconds * 46) / Math.max(width, 1);
  return [0.1, 0.2, 0.5, 1, 2, 5, 10].find((step) => step >= least) ?? 20;
}

function drawAxes({ plot, side, grid }) {
  for (const old of plot.querySelectorAll(".tick")) old.remove();
  let below = Infinity;
  for (const [hz, label] of HZ_TICKS[grid]) {
    const y = (1 - shareOfHz[grid](hz)) * plot.clientHeight;
    if (below - y < 12) continue;
    below = y;
    const tick = element("span", "tick hz", plot);
    tick.textContent = label;
    tick.style.top = `${y}px`;
  }
  const seconds = secondsOf(side);
  if (!seconds) return;
  const step = timeStep(seconds, plot.clientWidth);
  for (let i = 0; i * step <= seconds; i++) {
    const tick = element("span", "tick s", plot);
    tick.textContent = i === 0 ? "0 s" : String(Number((i * step).toFixed(1)));
    tick.style.left = `${(100 * i * step) / seconds}%`;
  }
}

const hzInWords = (hz) => hz < 1000 ? `${Math.round(hz)} Hz` : `${(hz / 1000).toFixed(2)} kHz`;

function readOut({ side, grid }, [band, time]) {
  $("readout").textContent = `${(time * secondsOf(side)).toFixed(2)} s, ${hzInWords(hzOfShare[grid](band))}`;
}

// ---- Frames: the next is asked for when the last is drawn ----------------------------------------------------------

// gap, next: how long to wait, and until when, before asking whether life has gone on meanwhile.
const nothingDrawn = () => ({ version: null, asked: null, view: null, number: requests + 1, gap: FRAME_MS, next: 0 });

let drawn = nothingDrawn();

const viewQuery = () => $("view").value === "hidden" ? `view=hidden&channel=${clamp(Number($("channel").value) || 2, 2, 15)}` : `view=${$("view").value}`;

function frameWanted() {
  if (!state?.life || isGone() || stroke.sending || $("studio").hidden) return false;
  if (drawn.view !== viewQuery()) return true;
  const version = String(state.version);
  if (version !== drawn.version && version !== drawn.asked) return true;
  return state.life.running && performance.now() >= drawn.next;
}

async function drawNext() {
  const number = ++requests;
  const [view, asked] = [viewQuery(), String(state.version)];
  const picture = readFrame(await request(`api/frame?${view}`, { timeout: 20000 }), $("view").value);
  waitLonger(picture.version === drawn.version);
  drawFrame(picture, number, view);
  drawn.asked = asked;
}

// Life that runs may rest. Then the next frame is asked for later and later, and at last only when the state says so.
function waitLonger(resting) {
  drawn.gap = resting ? 2 * drawn.gap : FRAME_MS;
  drawn.next = drawn.gap > POLL_MS ? Infinity : performance.now() + drawn.gap - FRAME_MS;
}

function drawFrame(picture, number, view) {
  if (number < drawn.number) return;
  Object.assign(drawn, { number, view, version: picture.version });
  show("grown", picture);
  showAge(picture.age);
}

async function keepDrawing() {
  for (;;) {
    await visible();
    const begun = performance.now();
    if (frameWanted()) await drawNext().catch(awaitNextState);
    await sleep(Math.max(1, FRAME_MS - (performance.now() - begun)));
  }
}

// A frame may be refused while another sound is being opened, and a lost server is noticed here as well.
async function awaitNextState(error) {
  if (error instanceof Gone) markGone();
  await sleep(POLL_MS);
}

// ---- Listening -----------------------------------------------------------------------------------------------------

let audio = null; // {context, analyser}
const sounds = new Map(); // recording and grown: name -> {stamp, buffer, rms, peak}
const voices = []; // one, or two while the next waits for the loop's end: {of, source, gain, begins, seconds}
let wanted = 0; // numbers what was asked to play: only the last of it begins
let refreshing = false;
let samples = 0;

function audioOutput() {
  if (!audio) {
    const context = new AudioContext();
    const analyser = new AnalyserNode(context, { fftSize: 2048 });
    analyser.connect(context.destination);
    audio = { context, analyser };
  }
  audio.context.resume();
  return audio;
}

async function fetchSound(query) {
  const { context } = audioOutput();
  const answer = await request(`api/sound?${query}`);
  const buffer = await context.decodeAudioData(answer.buffer);
  return { buffer, ...loudness(buffer) };
}

function loudness(buffer) {
  let [sum, peak] = [0, 0];
  for (const x of buffer.getChannelData(0)) {
    sum += x * x;
    peak = Math.max(peak, Math.abs(x));
  }
  return { rms: Math.sqrt(sum / buffer.length), peak };
}

const grownStamp = () => `${openSound} ${state.version}`;

async function loadSound(of, query = `of=${of}`) {
  const stamp = of === "target" ? openSound : grownStamp();
  const known = sounds.get(of);
  if (known?.stamp === stamp) return known;
  const sound = { stamp, ...(await fetchSound(query)) };
  if (stamp.startsWith(openSound) && (of === "target" || of === "grown")) sounds.set(of, sound);
  return sound;
}

// The gain that makes recording and grown equally loud, the louder one turned down, and nothing above full scale.
function equalGain(sound) {
  const pair = [sounds.get("target"), sounds.get("grown")].filter((s) => s && s.rms > 1e-5);
  if (!pair.length) return Math.min(1, 1 / (sound.peak || 1));
  const level = Math.min(...pair.map((s) => s.rms), ...pair.map((s) => s.rms / s.peak));
  const own = pair.includes(sound) ? sound.rms : (sounds.get("grown") ?? pair[0]).rms;
  return Math.min(own > 1e-5 ? level / own : 1, 1 / (sound.peak || 1));
}

function makeVoice(of, sound, when, offset, loop) {
  const { context, analyser } = audioOutput();
  const source = new AudioBufferSourceNode(context, { buffer: sound.buffer, loop });
  const gain = new GainNode(context, { gain: equalGain(sound) });
  source.connect(gain).connect(analyser);
  source.start(when, offset);
  const voice = { of, source, gain, begins: when - offset, seconds: sound.buffer.duration, stamp: sound.stamp };
  source.onended = () => endVoice(voice);
  return voice;
}

function endVoice(voice) {
  const at = voices.indexOf(voice);
  if (at >= 0) voices.splice(at, 1);
  if (!voices.length) showPlaying();
}

function silence(voice) {
  const { context } = audio;
  voice.gain.gain.setTargetAtTime(0, context.currentTime, 0.004);
  voice.source.stop(context.currentTime + 0.03);
}

async function play(of = $("listen-to").value, share = 0, query, known = null) {
  const number = ++wanted;
  const { context } = audioOutput();
  $("play").setAttribute("aria-busy", "true");
  setText("playing", `Preparing ${caption(of)} …`);
  const [sound] = await attempt(() => Promise.all([known ?? loadSound(of, query), equalPartner(of)])) ?? [];
  if (number !== wanted) return;
  $("play").removeAttribute("aria-busy");
  if (!sound) return showPlaying();
  voices.splice(0).forEach(silence);
  const loop = $("loop").checked && of !== "growth";
  voices.push(makeVoice(of, sound, context.currentTime + 0.01, share * sound.buffer.duration, loop));
  showPlaying();
}

// For equal loudness the recording has to be known when what grew is played, and what grew when the recording is.
async function equalPartner(of) {
  if (of !== "target" && state.sound.has_target) return loadSound("target");
  if (of === "target" && state.life && !sounds.has("grown")) return loadSound("grown").catch(() => null);
  return null;
}

function stop() {
  wanted++;
  $("play").removeAttribute("aria-busy");
  voices.splice(0).forEach(silence);
  showPlaying();
}

const isPlaying = () => voices.length > 0;
const togglePlay = () => isPlaying() || $("play").hasAttribute("aria-busy") ? stop() : play();

function listenTo(of) {
  $("listen-to").value = of;
  if (isPlaying()) play(of, playingShare(), undefined, $("loop").checked ? sounds.get(of) : null); // the loop renews it
}

const otherSide = () => listenTo($("listen-to").value === "target" ? "grown" : "target");

function setLoop() {
  for (const voice of voices) voice.source.loop = $("loop").checked;
}

// The sound that grew meanwhile takes over at the loop's end.
async function renewLoop() {
  const [voice] = voices;
  if (refreshing || voices.length !== 1 || voice.of !== "grown" || !voice.source.loop) return;
  if (voice.stamp === grownStamp()) return;
  refreshing = true;
  const sound = await loadSound("grown").catch(() => sleep(GONE_POLL_MS));
  refreshing = false;
  if (!sound || voices.length !== 1 || voices[0] !== voice || !voice.source.loop) return;
  const { context } = audio;
  const rounds = Math.ceil((context.currentTime + 0.03 - voice.begins) / voice.seconds);
  const end = voice.begins + rounds * voice.seconds;
  voice.source.stop(end);
  voices.push(makeVoice("grown", sound, end, 0, true));
}

const soundingVoice = () => voices.findLast((voice) => audio.context.currentTime >= voice.begins) ?? voices[0];

function playingShare() {
  const voice = soundingVoice();
  if (!voice) return 0;
  return (Math.max(0, audio.context.currentTime - voice.begins) / voice.seconds) % 1;
}

const caption = (of) => CAPTIONS[of.split(" ")[0]];

function showPlaying() {
  const playing = isPlaying();
  if ($("play").dataset.state !== (playing ? "playing" : "stopped")) {
    $("play").dataset.state = playing ? "playing" : "stopped";
    $("play").querySelector("use").setAttribute("href", playing ? "#i-stop" : "#i-play");
    $("play").querySelector("span").textContent = playing ? "Stop" : "Play";
    if (playing) startFollowing();
  }
  setText("playing", playing ? `Playing ${caption(voices[0].of)}` : "");
  for (const button of all(".take-play")) button.toggleAttribute("data-playing", playing && voices[0].of === `take ${button.dataset.id}`);
  if (!playing) for (const { playhead } of grids) playhead.hidden = true;
}

const wave = new Float32Array(2048);
let lastTick = null; // null while nothing sounds

function startFollowing() {
  if (lastTick !== null) return;
  lastTick = audio.context.currentTime;
  requestAnimationFrame(follow);
}

function follow() {
  const { analyser, context } = audio;
  samples += (context.currentTime - lastTick) * context.sampleRate;
  lastTick = context.currentTime;
  analyser.getFloatTimeDomainData(wave);
  $("play").dataset.peak = wave.reduce((most, x) => Math.max(most, Math.abs(x)), 0).toFixed(3);
  if (isPlaying()) {
    movePlayheads();
    renewLoop();
  }
  if (isPlaying() || ringing.size) requestAnimationFrame(follow);
  else lastTick = null;
}

function movePlayheads() {
  const share = playingShare();
  for (const { playhead, plot } of grids) {
    playhead.hidden = soundingVoice().of === "growth";
    playhead.style.transform = `translateX(${share * plot.clientWidth}px)`;
  }
}

// ---- The keyboard --------------------------------------------------------------------------------------------------

const notes = new Map(); // semitones -> {stamp, buffer, rms, peak}
const held = new Map(); // keys that are down: semitones -> {source, gain}, or null while the note is still to come
const ringing = new Set();
let tuning = Promise.resolve(); // notes are grown one at a time
let tunings = 0;

const asItIs = (semitones) => semitones === 0 || !state.sound.pitch_hz;

async function fetchNote(semitones) {
  if (asItIs(semitones)) return loadSound("grown");
  const stamp = grownStamp();
  const known = notes.get(semitones);
  if (known?.stamp === stamp) return known;
  const note = { stamp, ...(await fetchSound(`of=grown&semitones=${semitones}`)) };
  if (stamp.startsWith(openSound)) notes.set(semitones, note);
  return note;
}

function tune(semitones) {
  tunings++;
  tuning = tuning.then(() => attempt(() => fetchNote(semitones))).finally(() => tunings--);
  return tuning;
}

// A note that was grown before sounds at once, and is grown anew for the next time if what lives has changed.
function findNote(semitones) {
  const known = asItIs(semitones) ? sounds.get("grown") : notes.get(semitones);
  if (known && (known.stamp === grownStamp() || tunings)) return known;
  const fresh = tune(semitones);
  return known ?? fresh;
}

async function noteOn(semitones, strength = 1) {
  if (!state?.life || held.has(semitones)) return;
  audioOutput();
  held.set(semitones, null);
  showKeys();
  const sound = await findNote(semitones);
  if (!sound) return noteOff(semitones);
  const released = !held.has(semitones); // a key touched before its note was grown is still heard, once
  const { context, analyser } = audio;
  const playbackRate = state.sound.pitch_hz ? 1 : 2 ** (semitones / 12);
  const source = new AudioBufferSourceNode(context, { buffer: sound.buffer, playbackRate });
  const gain = new GainNode(context, { gain: 0.7 * strength * equalGain(sound) });
  source.connect(gain).connect(analyser);
  source.start();
  ringing.add(source);
  startFollowing();
  if (!released) held.set(semitones, { source, gain });
  source.onended = () => {
    ringing.delete(source);
    if (held.get(semitones)?.source === source) noteOff(semitones);
  };
}

function noteOff(semitones) {
  const note = held.get(semitones);
  held.delete(semitones);
  showKeys();
  if (!note) return;
  note.gain.gain.setTargetAtTime(0, audio.context.currentTime, 0.05);
  note.source.stop(audio.context.currentTime + 0.4);
}

function showKeys() {
  for (const key of $("keyboard").children) key.toggleAttribute("data-held", held.has(Number(key.dataset.semitone)));
}

function makeKeyboard() {
  for (let semitones = 0; semitones <= 12; semitones++) {
    const key = element("button", BLACK_KEYS.includes(semitones) ? "black" : "white", $("keyboard"));
    key.dataset.semitone = semitones;
    key.textContent = NOTE_KEYS[semitones].toUpperCase();
    key.title = semitones ? `Play what grew ${semitones} semitones higher` : "Play what grew at its own pitch";
    key.setAttribute("aria-label", key.title);
    key.addEventListener("pointerdown", (event) => { key.setPointerCapture(event.pointerId); noteOn(semitones); });
    for (const end of ["pointerup", "pointercancel"]) key.addEventListener(end, () => noteOff(semitones));
    key.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.repeat) noteOn(semitones); });
    key.addEventListener("keyup", (event) => { if (event.key === "Enter") noteOff(semitones); });
  }
}

const midiHeld = new Map(); // keys of MIDI keyboards that are down -> semitones

async function useMidi() {
  const access = await navigator.requestMIDIAccess()
    .catch((cause) => { throw new Refused(`MIDI keyboards cannot be used: ${cause.message}.`); });
  const listen = () => {
    for (const input of access.inputs.values()) input.onmidimessage = onMidi;
    setText("midi", access.inputs.size ? `MIDI: ${access.inputs.size} in` : "MIDI: none in");
  };
  access.onstatechange = listen;
  listen();
}

function onMidi({ data: [status, key, velocity] }) {
  const kind = status & 0xf0;
  if (kind === 0x90 && velocity && state?.life) {
    const semitones = semitonesOfKey(key);
    if (Math.abs(semitones) > 48) return;
    midiHeld.set(key, semitones);
    noteOn(semitones, velocity / 127);
  } else if ((kind === 0x80 || kind === 0x90) && midiHeld.has(key)) {
    noteOff(midiHeld.get(key));
    midiHeld.delete(key);
  }
}

// How far a MIDI key lies above what lives, to a cent; a sound without a pitch is as it is on the middle C.
function semitonesOfKey(key) {
  const { sound, shape } = state;
  if (!sound.pitch_hz) return key - 60;
  return Number((key - 69 - 12 * Math.log2(sound.pitch_hz / 440) - shape.semitones).toFixed(2));
}

// ---- A space of sounds ---------------------------------------------------------------------------------------------

const CORNERS = ["corner-0", "corner-1", "corner-2", "corner-3"]; // upper left, upper right, lower left, lower right
const SVG = "http://www.w3.org/2000/svg";
const MAP_EDGE = 20; // pixels around the outermost sounds
const FAN = 9; // pixels from their place of sounds that share it

let space = []; // [{name, place, pitch_hz, seconds}]
let gesture = null; // numbers the drag that is under way: what it does is undone together
let lastGrown = null;
let growing = false;

async function loadSpace() {
  const key = openSound;
  const loaded = jsonOf(await request("api/map"));
  if (key !== openSound) return;
  space = loaded;
  const chosen = farApart(4);
  for (const [id, at] of [["morph-a", 0], ["morph-b", 1], ...CORNERS.map((corner, i) => [corner, i])]) {
    $(id).replaceChildren(...space.map(({ name }) => new Option(name)));
    $(id).value = chosen[at].name;
  }
  drawMap();
  renderSpace();
}

// Sounds that differ: each is the one farthest from those before it.
function farApart(count) {
  const far = [space[0]];
  const away = ({ place: [x, y] }) => Math.min(...far.map(({ place }) => Math.hypot(place[0] - x, place[1] - y)));
  while (far.length < count) far.push(space.reduce((best, sound) => away(sound) > away(best) ? sound : best));
  return far;
}

const growNewest = newestOnly(async ({ path, json, heard }) => {
  const asked = JSON.stringify(json);
  setGrowing(true);
  try {
    if (asked !== lastGrown) await post(path, json);
    lastGrown = asked;
  } finally {
    setGrowing(false);
  }
  if (heard) play("grown");
});

function setGrowing(yes) {
  growing = yes;
  $("space").setAttribute("aria-busy", String(yes));
}

// While a drag is under way only the newest mixture grows; it is heard when the drag ends.
function mix(shares, ends) {
  gesture ??= Date.now();
  const kept = Object.fromEntries(Object.entries(shares).filter(([, share]) => share > 0));
  showMixture({ shares: kept });
  const json = { shares: kept, stroke: gesture };
  if (ends) gesture = null;
  if (ends) $("listen-to").value = "grown";
  return growNewest({ path: "mix", json, heard: ends });
}

function addShares(pairs) {
  const shares = {};
  for (const [name, share] of pairs) shares[name] = (shares[name] ?? 0) + share;
  return shares;
}

function mixTwo(ends) {
  const amount = Number($("amount").value) / 100;
  touched.set("amount", performance.now());
  return mix(addShares([[$("morph-a").value, 1 - amount], [$("morph-b").value, amount]]), ends);
}

const square = { x: 0, y: 0 }; // of the point, shares of the sides from the upper left corner

function mixFour(ends) {
  const { x, y } = square;
  Object.assign($("point").style, { left: `${100 * x}%`, top: `${100 * y}%` });
  const shares = [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y];
  return mix(addShares(CORNERS.map((id, i) => [$(id).value, shares[i]])), ends);
}

async function glide() {
  $("glide").setAttribute("aria-busy", "true");
  gesture = null;
  $("listen-to").value = "grown";
  await growNewest({ path: "glide", json: { from: $("morph-a").value, to: $("morph-b").value }, heard: true });
  $("glide").removeAttribute("aria-busy");
  lastGrown = null;
}

function renderSpace() {
  const { mixture } = state;
  $("space").hidden = !mixture;
  $("learning").hidden = Boolean(mixture);
  if (!mixture || !space.length || growing || gesture) return;
  showMixture(mixture);
  const { shares } = mixture;
  if (!shares) return;
  const names = Object.keys(shares);
  const [a, b] = [$("morph-a").value, $("morph-b").value];
  if (a !== b && names.every((name) => name === a || name === b)) sync("amount", Math.round(100 * (shares[b] ?? 0)));
}

function mixtureInWords({ shares, glide: ends }) {
  if (ends) return `from ${ends[0]} to ${ends[1]}`;
  const parts = Object.entries(shares).sort(([, one], [, other]) => other - one);
  const total = parts.reduce((sum, [, share]) => sum + share, 0);
  return parts.length === 1 ? parts[0][0] : parts.map(([name, share]) => `${name} ${Math.round((100 * share) / total)} %`).join(", ");
}

function showMixture(mixture) {
  const words = mixtureInWords(mixture);
  setText("mixture", words);
  $("mixture").title = words;
  $("amount").setAttribute("aria-valuetext", words);
  for (const one of all("#map .sound")) one.toggleAttribute("data-in", mixture.shares ? one.dataset.sound in mixture.shares : mixture.glide.includes(one.dataset.sound));
  showHere(mixture);
}

// The map. What lies between sounds lies, in the space of codes and so in the map, at the mean of their places.

let mapPlaces = new Map(); // name -> [x, y] in pixels

function drawMap() {
  const map = $("map");
  const [width, height] = [map.clientWidth, map.clientHeight];
  if (!space.length || !width) return;
  map.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const along = [0, 1].map((axis) => space.map(({ place }) => place[axis]));
  const [low, high] = [along.map((values) => Math.min(...values)), along.map((values) => Math.max(...values))];
  const share = (place, axis) => high[axis] > low[axis] ? (place[axis] - low[axis]) / (high[axis] - low[axis]) : 0.5;
  mapPlaces = new Map(space.map(({ name, place }) => [name, [
    MAP_EDGE + share(place, 0) * (width - 2 * MAP_EDGE),
    height - MAP_EDGE - share(place, 1) * (height - 2 * MAP_EDGE),
  ]]));
  fanOut();
  const way = svgElement("polyline", { id: "way" });
  map.replaceChildren(way, ...space.map(mapSound), svgElement("circle", { id: "here", r: 7.5 }));
  placeLabels(width, height);
  if (state.mixture) showMixture(state.mixture);
}

// Sounds of one instrument share a code, and so a place: they stand around it.
function fanOut() {
  const together = {};
  for (const place of mapPlaces.values()) (together[place.map(Math.round)] ??= []).push(place);
  for (const places of Object.values(together).filter(({ length }) => length > 1)) {
    places.forEach((place, i) => {
      const angle = (2 * Math.PI * i) / places.length;
      place[0] += FAN * Math.cos(angle);
      place[1] += FAN * Math.sin(angle);
    });
  }
}

function svgElement(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function mapSound({ name, pitch_hz: hz, seconds }) {
  const [x, y] = mapPlaces.get(name);
  const words = `${name}, ${hz ? hzInWords(hz) : "without a pitch"}, ${seconds.toFixed(1)} s`;
  const made = svgElement("g", { class: hz ? "sound pitched" : "sound", tabindex: 0, role: "button", "aria-label": words },
    svgElement("title", {}, words), svgElement("circle", { class: "touch", cx: x, cy: y, r: 9 }),
    svgElement("circle", { class: "dot", cx: x, cy: y, r: 4 }), svgElement("text", {}, name));
  made.dataset.sound = name;
  const choose = () => { gesture = null; mix({ [name]: 1 }, true); };
  made.addEventListener("click", choose);
  made.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
  return made;
}

// Each name stands beside its dot where it covers no other; where it cannot, it shows when it is pointed at.
function placeLabels(width, height) {
  const taken = [...mapPlaces.values()].map(([x, y]) => [x - 5, y - 5, x + 5, y + 5]);
  for (const one of all("#map .sound")) {
    const text = one.querySelector("text");
    const [x, y] = mapPlaces.get(one.dataset.sound);
    const long = 1.1 * text.getComputedTextLength(); // bold where it is part of what lives
    const beside = [3.5, -4, 11].flatMap((down) => [[x + 9, y + down], [x - 8 - long, y + down]]);
    const spots = [...beside, [x - long / 2, y - 8], [x - long / 2, y + 15]];
    const boxOf = ([left, base]) => [left - 1, base - 9, left + long + 1, base + 2];
    const free = ([left, top, right, bottom]) => left >= 0 && right <= width && top >= 0 && bottom <= height
      && taken.every(([l, t, r, b]) => right <= l || left >= r || bottom <= t || top >= b);
    const spot = spots.find((each) => free(boxOf(each)));
    const [left, base] = spot ?? [clamp(x + 7, 0, width - long), clamp(y - 8, 10, height)];
    text.setAttribute("x", left);
    text.setAttribute("y", base);
    text.classList.toggle("crowded", !spot);
    if (spot) taken.push(boxOf(spot));
  }
}

function showHere({ shares, glide: ends }) {
  if (!$("here")) return;
  const mean = Object.entries(shares ?? { [ends[1]]: 1 });
  const total = mean.reduce((sum, [, share]) => sum + share, 0);
  const [x, y] = [0, 1].map((axis) => mean.reduce((sum, [name, share]) => sum + (share / total) * mapPlaces.get(name)[axis], 0));
  $("here").setAttribute("cx", x);
  $("here").setAttribute("cy", y);
  $("way").setAttribute("points", ends ? ends.map((name) => mapPlaces.get(name).join()).join(" ") : "");
}

// Between the sounds of the map: the three nearest ones, the nearer the more.
function mixNear(event, ends) {
  const edge = $("map").getBoundingClientRect();
  const [x, y] = [event.clientX - edge.left, event.clientY - edge.top];
  const near = [...mapPlaces].map(([name, place]) => [name, 1 / (1 + Math.hypot(place[0] - x, place[1] - y)) ** 2])
    .sort(([, one], [, other]) => other - one).slice(0, 3);
  const total = near.reduce((sum, [, share]) => sum + share, 0);
  mix(Object.fromEntries(near.map(([name, share]) => [name, share / total])), ends);
}

// What follows the pointer from where it comes down until it goes up again.
function dragging(area, wanted, move) {
  let down = false;
  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !wanted(event)) return;
    down = true;
    area.setPointerCapture(event.pointerId);
    move(event, false);
  });
  area.addEventListener("pointermove", (event) => { if (down) move(event, false); });
  for (const end of ["pointerup", "pointercancel"]) {
    area.addEventListener(end, (event) => {
      if (down) move(event, true);
      down = false;
    });
  }
}

function moveSquare(event, ends) {
  const edge = $("square").getBoundingClientRect();
  square.x = clamp((event.clientX - edge.left) / edge.width, 0, 1);
  square.y = clamp((event.clientY - edge.top) / edge.height, 0, 1);
  mixFour(ends);
}

function squareKey(event) {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!move) return;
  event.preventDefault();
  square.x = clamp(square.x + 0.05 * move[0], 0, 1);
  square.y = clamp(square.y + 0.05 * move[1], 0, 1);
  mixFour(false);
}

function wireSpace() {
  $("amount").addEventListener("input", () => mixTwo(false));
  $("amount").addEventListener("change", () => mixTwo(true));
  for (const id of ["morph-a", "morph-b"]) $(id).addEventListener("change", () => mixTwo(true));
  for (const id of CORNERS) $(id).addEventListener("change", () => mixFour(true));
  dragging($("square"), () => true, moveSquare);
  $("square").addEventListener("keydown", squareKey);
  $("square").addEventListener("keyup", (event) => { if (event.key.startsWith("Arrow")) mixFour(true); });
  dragging($("map"), (event) => !event.target.closest(".sound"), mixNear);
  click("glide", glide);
  new ResizeObserver(drawMap).observe($("map"));
}

// ---- Tools on the grids --------------------------------------------------------------------------------------------

const stroke = { number: 0, points: [], sending: false, on: null, box: null };
let heal = null; // {before, worst}: the errors when the brush came down, and the largest since

const brushRadius = () => Number($("brush-size").value) / 100;
const isBrush = () => BRUSHES.includes(tool);

function chooseTool(name) {
  tool = name;
  giveUpBox();
  $("studio").dataset.toolNow = isBrush() ? "brush" : name;
  for (const button of all("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  for (const made of grids) made.brush.hidden = true;
}

function placeOf(event, canvas) {
  const edge = canvas.getBoundingClientRect();
  return [clamp(1 - (event.clientY - edge.top) / edge.height, 0, 1), clamp((event.clientX - edge.left) / edge.width, 0, 1)];
}

function showBrush(made, [band, time], point = !isBrush()) {
  const { brush, plot } = made;
  const side = point ? 5 : 2 * brushRadius() * plot.clientHeight;
  brush.hidden = false;
  brush.classList.toggle("point", point);
  Object.assign(brush.style, { width: `${side}px`, height: `${side}px`, left: `${100 * time}%`, top: `${100 * (1 - band)}%` });
  readOut(made, [band, time]);
}

function hideBrush(made) {
  made.brush.hidden = true;
  $("readout").textContent = "";
}

function sizeBrush(change) {
  $("brush-size").value = Number($("brush-size").value) + change;
  showBrushSize();
}

function showBrushSize() {
  $("brush-size-value").textContent = `${$("brush-size").value} %`;
  for (const made of grids) if (!made.brush.hidden && isBrush()) showBrush(made, made.cursor);
}

function listenToPointer(made) {
  const { canvas, side } = made;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || listens(made)) return;
    canvas.setPointerCapture(event.pointerId);
    made.cursor = placeOf(event, canvas);
    useTool(made, made.cursor);
  });
  canvas.addEventListener("click", (event) => { if (listens(made)) auditionFrom(made, placeOf(event, canvas)); });
  canvas.addEventListener("pointermove", (event) => {
    made.cursor = placeOf(event, canvas);
    if (side === "grown" && isBrush()) showBrush(made, made.cursor);
    else readOut(made, made.cursor);
    if (stroke.on === made) for (const each of coalesced(event)) addPoint(placeOf(each, canvas));
    if (stroke.box?.made === made) showBox(made.cursor);
  });
  canvas.addEventListener("pointerup", () => { if (stroke.box?.made === made) finishBox(made.cursor); endStroke(); });
  canvas.addEventListener("pointercancel", () => { giveUpBox(); endStroke(); });
  canvas.addEventListener("pointerleave", () => hideBrush(made));
  canvas.addEventListener("wheel", (event) => {
    if (side !== "grown" || !isBrush()) return;
    event.preventDefault();
    made.cursor = placeOf(event, canvas);
    sizeBrush(event.deltaY < 0 ? 1 : -1);
  }, { passive: false });
}

function coalesced(event) {
  const events = event.getCoalescedEvents?.() ?? [];
  return events.length ? events : [event];
}

function listenToArrows(made) {
  const moves = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  made.canvas.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 0.1 : 0.01;
    if (moves[event.key]) {
      made.cursor = made.cursor.map((share, i) => clamp(share + step * moves[event.key][i], 0, 1));
    } else if (event.key === "Enter") {
      if (stroke.box?.made === made) finishBox(made.cursor);
      else useTool(made, made.cursor);
      endStroke();
    } else {
      return;
    }
    event.preventDefault();
    showBrush(made, made.cursor, made.side === "target" || !isBrush());
    if (stroke.box?.made === made) showBox(made.cursor);
  });
  made.canvas.addEventListener("focus", () => { if (lastInput === "keyboard") showBrush(made, made.cursor, made.side === "target" || !isBrush()); });
  made.canvas.addEventListener("blur", () => hideBrush(made));
}

const listens = ({ side }) => side === "target" || tool === "listen";

function useTool(made, place) {
  if (listens(made)) return auditionFrom(made, place);
  if (!state?.life) return;
  if (tool === "seed") return attempt(() => post("seed", { grid: made.grid, place }));
  if (BOXES[tool]) {
    stroke.box = { made, from: place };
    return showBox(place);
  }
  stroke.number = Date.now();
  stroke.on = made;
  if (tool !== "protect" && tool !== "unprotect") rememberErrors();
  addPoint(place);
  holdBrush(stroke.number);
}

function auditionFrom(made, [, time]) {
  if (made.side === "target") $("listen-to").value = "target";
  else if ($("listen-to").value === "target") $("listen-to").value = "grown";
  play($("listen-to").value, Math.min(time, 0.99));
}

function rememberErrors() {
  const { mel_error_db: mel, linear_error_db: linear } = state.life;
  heal = mel === null ? null : { before: { mel, linear }, worst: { mel, linear } };
}

function addPoint(place) {
  stroke.points.push(place);
  sendPoints();
}

// One request at a time; the points that come meanwhile go with the next one.
async function sendPoints() {
  if (stroke.sending) return;
  stroke.sending = true;
  while (stroke.points.length && stroke.on) {
    const { grid, plot } = stroke.on;
    const size = brushRadius();
    const json = { grid, points: stroke.points.splice(0), size, size_time: Math.min(1, (size * plot.clientHeight) / plot.clientWidth), mode: tool, both: $("both").checked, stroke: stroke.number };
    await attempt(() => sendStroke(json));
  }
  stroke.sending = false;
}

async function sendStroke(json) {
  const number = ++requests;
  const picture = readFrame(await request("api/brush", { json }));
  if ($("view").value === "level") drawFrame(picture, number, "view=level");
  else drawn.version = null;
}

// A brush that is held still goes on working, so that life has to grow against it.
async function holdBrush(number) {
  for (;;) {
    await sleep(120);
    if (!stroke.on || stroke.number !== number || isGone()) return;
    if (!stroke.sending && tool !== "protect" && tool !== "unprotect") addPoint(stroke.on.cursor);
  }
}

async function endStroke() {
  if (!stroke.on) return;
  const number = stroke.number;
  while (stroke.sending) await sleep(10);
  if (stroke.number === number) stroke.on = null;
  await refresh().catch(report);
}

function showBox([band, time]) {
  const { made, from } = stroke.box;
  made.box.hidden = false;
  Object.assign(made.box.style, {
    left: `${100 * Math.min(from[1], time)}%`, width: `${100 * Math.abs(time - from[1])}%`,
    top: `${100 * (1 - Math.max(from[0], band))}%`, height: `${100 * Math.abs(band - from[0])}%`,
  });
}

function finishBox(to) {
  const { made, from } = stroke.box;
  const action = BOXES[tool];
  giveUpBox();
  if (Math.abs(to[0] - from[0]) < 0.004 || Math.abs(to[1] - from[1]) < 0.004) return;
  if (action === "regrow") rememberErrors();
  attempt(() => post("region", { action, grid: made.grid, from, to }));
}

function giveUpBox() {
  if (stroke.box) stroke.box.made.box.hidden = true;
  stroke.box = null;
}

// ---- What the state looks like -------------------------------------------------------------------------------------

const touched = new Map(); // controls that the person is using are not set from the state

function sync(id, value) {
  const control = $(id);
  const busy = performance.now() - (touched.get(id) ?? -Infinity) < 900;
  const typing = document.activeElement === control && control.type === "number" && control.dataset.typing;
  if (!busy && !typing && control.value !== String(value)) control.value = value;
}

function enable(id, possible, why = "") {
  const control = $(id);
  control.dataset.title ??= control.title;
  control.disabled = !possible;
  control.title = possible || !why ? control.dataset.title : `${control.dataset.title}. Not now: ${why}`;
}

function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function render() {
  const begin = choosing || !state.sound;
  document.body.dataset.screen = begin ? "begin" : "studio";
  $("begin").hidden = !begin;
  $("studio").hidden = begin;
  renderHeader();
  renderSounds();
  if (!state.sound) return;
  renderSpace();
  renderLearning();
  renderLife();
  renderListening();
  renderShape();
  renderTakes();
}

function renderHeader() {
  const { sound, life } = state;
  setText("sound-name", sound?.name ?? "");
  setText("sound-note", sound?.note ?? "");
  $("sound-title").title = sound?.note ?? "";
  document.title = sound ? `${sound.name} – fastnca studio` : "fastnca studio";
  for (const id of ["another", "undo", "redo"]) $(id).hidden = !sound;
  $("another").hidden ||= choosing;
  $("back").hidden = !sound;
  enable("undo", life?.can_undo, "there is nothing to take back");
  enable("redo", life?.can_redo, "nothing was taken back");
}

let listedSounds = "";

function renderSounds() {
  const listed = JSON.stringify([state.sounds, state.sound?.name]);
  if (listed === listedSounds) return;
  listedSounds = listed;
  $("kept").hidden = !state.sounds.length;
  $("sounds").replaceChildren(...state.sounds.map(soundItem));
}

function soundItem({ name, is_space: isSpace, epochs, mel_l1_db: error }) {
  const item = document.createElement("li");
  const button = element("button", "", item);
  button.dataset.sound = name;
  button.title = `Open ${name}`;
  element("strong", "", button).textContent = name;
  const facts = [name === state.sound?.name && "open now", isSpace && "many sounds", epochs !== null && `${epochs} epochs`, error !== null && `mel ${db(error)}`];
  element("small", "", button).textContent = facts.filter(Boolean).join(", ") || "not learned yet";
  button.addEventListener("click", () => name === state.sound?.name ? showBegin(false) : attempt(() => begin(() => post("open", { name }), `Opening ${name} …`)));
  return item;
}

function inMinutes(seconds) {
  if (seconds >= 90) return `about ${Math.round(seconds / 60)} minutes`;
  return seconds >= 45 ? "about a minute" : "less than a minute";
}

function learningInWords(learning) {
  if (!learning) return "Nothing is being learned now.";
  const { status, epoch, mel_l1_db: mel, linear_l1_db: linear, seconds_left: left, error } = learning;
  const errors = mel === null ? "the first number comes soon" : `mel ${db(mel)} and linear ${db(linear)} from the recording after ${epoch} epochs`;
  return {
    learning: `Learning: ${errors}. ${left === null ? "" : `It takes ${inMinutes(left)} more.`}`,
    paused: `Paused: ${errors}.`,
    finishing: `Finishing: ${errors}.`,
    finished: `Finished: ${errors}.`,
    stopped: `Stopped and kept: ${errors}.`,
    failed: `Learning failed: ${error ?? "no reason is known"}`,
  }[status];
}

function renderLearning() {
  const { learning, sound } = state;
  const status = learning?.status;
  setText("learning-status", learningInWords(learning));
  const known = learning?.mel_l1_db ?? null;
  setText("mel-error", known === null ? "" : `mel ${db(known)}`);
  $("progress").value = learning?.progress ?? 0;
  $("progress").hidden = !learning;
  const going = status === "learning";
  setText("pause-learning", status === "paused" ? "Go on" : "Pause");
  enable("pause-learning", going || status === "paused", learning ? "it has ended; 5 minutes longer goes on" : "nothing is being learned");
  enable("stop-learning", going || status === "paused", "nothing is being learned");
  enable("longer", sound.has_target && status !== "finishing", sound.has_target ? "it is just finishing" : "there is no recording to learn from");
}

function showAge(age) {
  setText("age", String(age));
  sync("scrub", age);
}

function renderLife() {
  const { life, sound } = state;
  const missing = "nothing has been learned yet";
  for (const id of ["run", "step", "scrub", "speed", "restart-one", "restart-many", "empty", "view", "hear-growth", "keep", "wav16", "wav24", "wav32", "model-file", "gif", "mp4", "picture"]) enable(id, life, missing);
  for (const button of all("[data-tool]")) button.disabled = !life && button.dataset.tool !== "listen";
  setText("run", life?.running ? "Pause" : "Run");
  enable("step", life && !life.running, life ? "it runs; pause it first" : missing);
  $("target").hidden = !sound.has_target;
  $("studio").classList.toggle("of-space", Boolean(state.mixture));
  if (!life) return;
  $("scrub").max = Math.max(life.oldest, life.age);
  if (!life.running || drawn.view === null) showAge(life.age);
  setText("alive", `${Math.round(100 * life.alive)} % alive`);
  if (performance.now() - (touched.get("speed") ?? -Infinity) > 900) {
    sync("speed", nearestSpeed(life.speed));
    showSpeed(life.speed);
  }
  setText("grown-error", heal ? "" : errorsInWords(life));
  setText("protected", life.protected > 0 ? `${Math.max(1, Math.round(100 * life.protected))} % may not change` : "");
  $("clear-protection").hidden = !(life.protected > 0);
  renderHealing(life);
}

function errorsInWords({ mel_error_db: mel, linear_error_db: linear }) {
  return mel === null ? "" : `Now: mel ${db(mel)}, linear ${db(linear)} from the recording`;
}

function nearestSpeed(speed) {
  if (speed === 0) return SPEEDS.length - 1;
  const distance = (i) => Math.abs(Math.log(SPEEDS[i] / speed));
  return [...SPEEDS.keys()].slice(0, -1).reduce((best, i) => distance(i) < distance(best) ? i : best);
}

function showSpeed(speed) {
  const words = speed === 0 ? "as fast as it can" : `${Number(speed.toFixed(1))} steps/s`;
  setText("speed-value", words);
  $("speed").setAttribute("aria-valuetext", words);
}

function renderHealing({ mel_error_db: mel, linear_error_db: linear }) {
  if (!heal || mel === null) return setText("healing", "");
  heal.worst = { mel: Math.max(heal.worst.mel, mel), linear: Math.max(heal.worst.linear, linear) };
  const path = (name, now) => `${name} ${heal.before[name].toFixed(1)} before, ${heal.worst[name].toFixed(1)} at its worst, ${db(now)} now`;
  setText("healing", `Wound: ${path("mel", mel)}; ${path("linear", linear)}`);
}

function renderListening() {
  const { sound, life } = state;
  const possible = { grown: life, target: sound.has_target, wounded: life?.wounded };
  for (const option of $("listen-to").options) option.disabled = !possible[option.value];
  if (!possible[$("listen-to").value]) $("listen-to").value = life ? "grown" : "target";
  enable("play", life || sound.has_target, "there is no sound yet");
  enable("ab", life && sound.has_target, "there are no two sounds to compare");
  enable("hear-wound", life?.wounded, "nothing was wounded");
  for (const key of $("keyboard").children) key.disabled = !life;
  setText("keyboard-note", sound.pitch_hz
    ? `Keys A to K grow it at each pitch, from ${Math.round(sound.pitch_hz * 2 ** (state.shape.semitones / 12))} Hz up.`
    : "No steady pitch was found: the keys A to K play it faster, not grown anew.");
}

function renderShape() {
  const { shape, sound, life } = state;
  enable("semitones", life && sound.pitch_hz, life ? "this sound has no steady pitch to bend" : "nothing has been learned yet");
  enable("seconds", life, "nothing has been learned yet");
  enable("time", life, "nothing has been learned yet");
  sync("semitones", shape.semitones);
  sync("seconds", Number(shape.seconds.toFixed(2)));
  sync("time", shape.time);
  showSemitones();
}

function showSemitones() {
  const value = Number($("semitones").value);
  const words = state.sound.pitch_hz ? `${value > 0 ? "+" : ""}${value} semitones` : "none to bend";
  setText("semitones-value", words);
  $("semitones").setAttribute("aria-valuetext", words);
}

// ---- Takes ---------------------------------------------------------------------------------------------------------

let listedTakes = "";

function renderTakes() {
  const listed = JSON.stringify([openSound, state.takes]);
  if (listed === listedTakes || document.activeElement?.classList.contains("take-name")) return;
  listedTakes = listed;
  $("takes").replaceChildren(...state.takes.map(takeItem));
  $("no-takes").hidden = state.takes.length > 0;
}

function takeItem(take) {
  const item = $("take-template").content.cloneNode(true).firstElementChild;
  const part = (name) => item.querySelector(`.take-${name}`);
  item.dataset.take = take.id;
  part("play").dataset.id = take.id;
  part("play").setAttribute("aria-label", `Hear ${take.name}`);
  part("name").value = take.name;
  part("numbers").textContent = takeInWords(take);
  part("play").addEventListener("click", () => hearTake(take.id));
  part("name").addEventListener("change", () => attempt(() => post("take", { action: "rename", id: take.id, name: part("name").value })));
  part("recall").addEventListener("click", () => attempt(() => post("take", { action: "recall", id: take.id })));
  part("forget").addEventListener("click", (event) => pressTwice(event.currentTarget, () => post("take", { action: "forget", id: take.id })));
  drawTake(take.id, item.querySelector("canvas")).catch(report);
  return item;
}

function takeInWords({ age, seconds, semitones, mel_error_db: error }) {
  const pitch = semitones ? `, ${semitones > 0 ? "+" : ""}${semitones} st` : "";
  return `age ${age}, ${seconds.toFixed(1)} s${pitch}${error === null ? "" : `, mel ${db(error)}`}`;
}

async function drawTake(id, canvas) {
  paint(canvas, readFrame(await request(`api/take?id=${id}`)), "mel");
}

function hearTake(id) {
  const of = `take ${id}`;
  if (isPlaying() && voices[0].of === of) stop();
  else play(of, 0, `of=take&id=${id}`);
}

async function pressTwice(button, deed) {
  if (button.dataset.sure) return attempt(deed);
  const text = button.textContent;
  button.dataset.sure = "yes";
  button.textContent = "Really?";
  await sleep(3000);
  delete button.dataset.sure;
  button.textContent = text;
}

// ---- The curve of the losses ---------------------------------------------------------------------------------------

let losses = { epoch: [], mel: [], linear: [] };
let lossesOf = null;

const lossesKey = () => `${openSound} ${state.learning?.epoch}`;
const curveWanted = () => state.sound && !$("studio").hidden && lossesKey() !== lossesOf;

async function loadLosses() {
  lossesOf = lossesKey();
  losses = jsonOf(await request("api/losses", { timeout: 10000 }));
  $("curve").hidden = losses.epoch.length < 2;
  redrawCurve();
}

function redrawCurve() {
  if ($("curve").clientWidth && losses.epoch.length > 1) drawCurve();
}

function drawCurve() {
  const { epoch, mel, linear } = losses;
  const canvas = $("curve");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const logs = [...mel, ...linear].filter((value) => value > 0).map(Math.log);
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  const [first, last] = [epoch[0], epoch.at(-1)];
  const x = (i) => ((epoch[i] - first) / Math.max(1, last - first)) * (width - 86) + 1;
  const y = (value) => 5 + (1 - (Math.log(value) - low) / Math.max(1e-6, high - low)) * (height - 10);
  const style = getComputedStyle(document.documentElement);
  context.font = "10px system-ui, sans-serif";
  context.textBaseline = "middle";
  const ends = { mel: y(mel.at(-1)), linear: y(linear.at(-1)) };
  const crowded = Math.abs(ends.mel - ends.linear) < 11;
  for (const [name, values, color] of [["linear", linear, "--second"], ["mel", mel, "--accent"]]) {
    context.strokeStyle = context.fillStyle = style.getPropertyValue(color);
    context.lineWidth = 1.5;
    context.beginPath();
    values.forEach((value, i) => { if (value > 0) context.lineTo(x(i), y(value)); });
    context.stroke();
    const lower = crowded && ends[name] >= ends[name === "mel" ? "linear" : "mel"];
    const at = crowded ? ends[name] + (lower ? 6 : -6) : ends[name];
    context.fillText(`${name} ${db(values.at(-1))}`, width - 81, clamp(at, 6, height - 6));
  }
  canvas.setAttribute("aria-label", `Losses after ${last} epochs: mel ${db(mel.at(-1))}, linear ${db(linear.at(-1))}`);
}

// ---- Out -----------------------------------------------------------------------------------------------------------

async function download(button, path) {
  button.setAttribute("aria-busy", "true");
  await attempt(async () => {
    const { headers, buffer } = await request(path);
    const name = /filename="?([^";]+)"?/.exec(headers.get("Content-Disposition") ?? "")?.[1] ?? "fastnca";
    save(new Blob([buffer], { type: headers.get("Content-Type") }), name);
  });
  button.removeAttribute("aria-busy");
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

let commandOf = null;
const commandKey = () => JSON.stringify([openSound, state.mixture, state.shape, state.learning?.status, !state.life.running && state.version]);
const commandWanted = () => state.life && !$("studio").hidden && commandKey() !== commandOf;

async function loadCommand() {
  commandOf = commandKey();
  setText("command", textOf(await request("api/export?what=command", { timeout: 10000 })).trim());
}

async function copyCommand() {
  await attempt(loadCommand);
  getSelection().selectAllChildren($("command"));
  const copied = navigator.clipboard ? await navigator.clipboard.writeText($("command").textContent).then(() => true, () => false) : document.execCommand("copy");
  tell(copied ? "The command line is copied." : "The browser does not let a page copy here: the command line is selected, copy it with Ctrl C.");
}

// ---- Beginning -----------------------------------------------------------------------------------------------------

function showBegin(yes) {
  choosing = yes;
  if (yes) stop();
  render();
}

const BEGIN_HINT = $("begin-hint").textContent;

async function begin(deed, words) {
  $("begin-hint").textContent = words;
  tell(words);
  try {
    await deed();
    choosing = false;
    render();
  } finally {
    $("begin-hint").textContent = BEGIN_HINT;
    $("notice").textContent = "";
  }
}

function upload(file) {
  const { name } = file;
  return attempt(() => begin(async () => {
    if (!file.size) throw new Refused(`${name} is empty.`);
    await postAny(`api/recording?name=${encodeURIComponent(name)}`, { body: file }).catch((error) => explainBrokenUpload(error, name));
  }, `Reading ${name} …`));
}

// A server that refuses a large file before it has come ends the connection, which looks as if it were gone.
async function explainBrokenUpload(error, name) {
  if (error instanceof Gone) await refresh();
  throw error instanceof Gone ? new Refused(`${name} was not taken: the server ended the transfer. Is it too large?`) : error;
}

let dragDepth = 0;

function listenToDrops() {
  const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
  const dragging = (change) => {
    dragDepth = Math.max(0, dragDepth + change);
    $("dropping").hidden = dragDepth === 0;
  };
  document.addEventListener("dragenter", (event) => { if (carriesFile(event)) dragging(1); });
  document.addEventListener("dragleave", (event) => { if (carriesFile(event)) dragging(-1); });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(-dragDepth);
    const [file] = event.dataTransfer?.files ?? [];
    if (file) upload(file);
  });
}

let recorder = null;

async function record() {
  if (recorder) return recorder.stop();
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false } })
    .catch((cause) => { throw new Refused(`The microphone cannot be used: ${cause.message}.`); });
  const parts = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => parts.push(event.data);
  const ended = new Promise((resolve) => { recorder.onstop = resolve; });
  recorder.start();
  countDown(recorder);
  await ended;
  recorder = null;
  for (const track of stream.getTracks()) track.stop();
  $("microphone").textContent = MICROPHONE_LABEL;
  await uploadRecording(new Blob(parts));
}

const MICROPHONE_LABEL = $("microphone").textContent;

async function countDown(running) {
  for (let left = RECORD_SECONDS; left > 0 && recorder === running; left -= 0.1) {
    $("microphone").textContent = `Stop and use it (${left.toFixed(1)} s left)`;
    await sleep(100);
  }
  if (running.state === "recording") running.stop();
}

async function uploadRecording(blob) {
  const buffer = await audioOutput().context.decodeAudioData(await blob.arrayBuffer());
  const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "-");
  await upload(new File([encodeWav(withoutSilence(mono(buffer)), buffer.sampleRate)], `microphone-${time}.wav`));
}

function mono(buffer) {
  const mixed = new Float32Array(buffer.length);
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    buffer.getChannelData(c).forEach((x, i) => { mixed[i] += x / buffer.numberOfChannels; });
  }
  return mixed;
}

// Starts where the sound does: silence before it would only take its place.
function withoutSilence(samples) {
  const peak = samples.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  const first = samples.findIndex((x) => Math.abs(x) > 0.03 * peak);
  return samples.subarray(Math.max(0, first - 1000));
}

function encodeWav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // one channel
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.round(32767 * clamp(x, -1, 1)), true));
  return view.buffer;
}

// ---- Controls and keys ---------------------------------------------------------------------------------------------

const click = (id, deed) => $(id).addEventListener("click", deed);
const clickPost = (id, path, json) => click(id, () => attempt(() => post(path, json)));

function lifeAction(json) {
  if (json.action === "restart" || json.action === "empty") heal = null;
  return attempt(() => post("life", json));
}

function slider(id, shown, send) {
  const newest = newestOnly(send);
  $(id).addEventListener("input", () => {
    touched.set(id, performance.now());
    shown();
    newest(Number($(id).value));
  });
}

function wireControls() {
  click("another", () => showBegin(true));
  click("back", () => showBegin(false));
  click("dismiss", clearError);
  click("help", () => $("help-sheet").showModal());
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) upload(file).then(() => { $("file").value = ""; });
  });
  click("microphone", () => attempt(record));
  click("builtin", () => attempt(() => begin(() => post("builtin"), "Preparing the bowed string …")));

  click("play", togglePlay);
  $("loop").addEventListener("change", setLoop);
  $("listen-to").addEventListener("change", () => listenTo($("listen-to").value));
  click("ab", otherSide);
  click("hear-growth", () => play("growth"));
  click("midi", () => attempt(useMidi));
  click("hear-wound", () => { $("listen-to").value = "wounded"; play("wounded"); });

  click("run", toggleLife);
  click("step", () => lifeAction({ action: "step", steps: 1 }));
  click("restart-one", () => lifeAction({ action: "restart", seeds: "one" }));
  click("restart-many", () => lifeAction({ action: "restart", seeds: "many" }));
  click("empty", () => lifeAction({ action: "empty" }));
  slider("scrub", () => setText("age", $("scrub").value), (age) => post("life", { action: "scrub", age }));
  slider("speed", () => showSpeed(SPEEDS[$("speed").value]), (index) => post("life", { action: "speed", speed: SPEEDS[index] }));
  $("view").addEventListener("change", () => { $("channel-label").hidden = $("view").value !== "hidden"; });

  for (const button of all("[data-tool]")) button.addEventListener("click", () => chooseTool(button.dataset.tool));
  $("brush-size").addEventListener("input", showBrushSize);
  clickPost("clear-protection", "region", { action: "clear", grid: "mel", from: [0, 0], to: [1, 1] });
  clickPost("undo", "undo");
  clickPost("redo", "redo");

  slider("semitones", showSemitones, (semitones) => post("shape", { semitones }));
  $("seconds").addEventListener("input", () => { $("seconds").dataset.typing = "yes"; });
  $("seconds").addEventListener("change", changeLength);
  $("time").addEventListener("change", () => { touched.set("time", performance.now()); attempt(() => post("shape", { time: $("time").value })); });
  clickPost("keep", "take", { action: "keep" });

  click("pause-learning", () => attempt(() => post("learning", { action: state.learning.status === "learning" ? "pause" : "go_on" })));
  clickPost("stop-learning", "learning", { action: "stop" });
  clickPost("longer", "learning", { action: "longer", minutes: 5 });

  for (const bits of [16, 24, 32]) click(`wav${bits}`, (event) => download(event.currentTarget, `api/sound?of=grown&bits=${bits}&download=1`));
  for (const [id, what] of [["model-file", "model"], ["gif", "gif"], ["mp4", "mp4"], ["picture", "picture"]]) {
    click(id, (event) => download(event.currentTarget, `api/export?what=${what}`));
  }
  click("copy", copyCommand);
}

function changeLength() {
  delete $("seconds").dataset.typing;
  const seconds = Number($("seconds").value);
  if (!(seconds > 0)) return showError("The length must be a number of seconds above 0.");
  touched.set("seconds", performance.now());
  return attempt(() => post("shape", { seconds }));
}

const toggleLife = () => lifeAction({ action: state.life.running ? "pause" : "run" });

const press = (id) => { if (!$(id).disabled && !$(id).hidden) $(id).click(); };

const KEYS = {
  l: () => press("loop"), b: () => press("ab"), p: () => press("run"), ".": () => press("step"),
  "[": () => sizeBrush(-1), "]": () => sizeBrush(1),
};

let lastInput = "pointer";

// After a mouse click the space bar plays; one who walks with Tab presses the focused control with it.
function wantsSpace(control) {
  if (control.matches("input[type=number], input:not([type]), select")) return true;
  return lastInput === "keyboard" && control.matches("button, input, a");
}

function onKey(event) {
  const { target } = event;
  if (event.key === "Enter" && isTyping(target)) return target.blur();
  if (event.key === "Tab") lastInput = "keyboard";
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !isTyping(target)) {
    event.preventDefault();
    return press(event.shiftKey ? "redo" : "undo");
  }
  if (event.ctrlKey || event.metaKey || event.altKey || $("help-sheet").open) return;
  if (event.key === "Escape") return escape();
  if (isTyping(target)) return;
  if (event.key === "?") return $("help-sheet").showModal();
  if ($("studio").hidden || !state?.sound) return;
  if (event.key === " ") {
    if (wantsSpace(target)) return;
    event.preventDefault();
    if (target !== document.body && target.matches("button, input")) target.blur();
    if (!event.repeat) press("play");
    return;
  }
  studioKey(event);
}

function studioKey(event) {
  const key = event.key.toLowerCase();
  const note = NOTE_KEYS.indexOf(key);
  const number = "1234567890".indexOf(key);
  if (note >= 0 && key.length === 1) {
    if (!event.repeat) noteOn(note);
  } else if (number >= 0 && key.length === 1) {
    const button = all("[data-tool]")[number];
    if (!button.disabled) chooseTool(button.dataset.tool);
  } else {
    KEYS[key]?.();
  }
}

const isTyping = (target) => target.matches?.("input[type=number], input:not([type]), select, textarea");

function escape() {
  if (stroke.box) giveUpBox();
  else if (!$("error").hidden) clearError();
  else if (choosing && state.sound) showBegin(false);
}

function wireKeys() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("keyup", (event) => {
    const note = NOTE_KEYS.indexOf(event.key.toLowerCase());
    if (note >= 0 && event.key.length === 1) noteOff(note);
  });
  document.addEventListener("pointerdown", () => { lastInput = "pointer"; }, true);
  for (const select of all("select")) select.addEventListener("change", () => { if (lastInput === "pointer") select.blur(); });
  window.addEventListener("blur", () => [...held.keys()].forEach(noteOff));
}

function explainMidi() {
  if (!navigator.requestMIDIAccess) enable("midi", false, "this browser knows no MIDI");
}

function explainMicrophone() {
  if (navigator.mediaDevices && window.MediaRecorder) return;
  enable("microphone", false, "a browser gives the microphone only to pages on this computer, or by https");
}

for (const side of ["grown", "target"]) for (const grid of ["mel", "linear"]) prepareGrid(side, grid);
makeKeyboard();
wireControls();
wireSpace();
wireKeys();
listenToDrops();
explainMicrophone();
explainMidi();
chooseTool("listen");
showBrushSize();
new ResizeObserver(redrawCurve).observe($("curve"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCurve);
window.studio = { samplesPlayed: () => Math.round(samples) };
keepPolling();
keepDrawing();
everyWhile(LOSSES_MS, curveWanted, loadLosses);
everyWhile(COMMAND_MS, commandWanted, loadCommand);
