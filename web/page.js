// The page: a picture comes in, boxes are drawn on it.
import { load } from "./detector.js";

const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
let detector; // what load returned
let shown; // { image, found, text }: what is on the canvas
let camera; // a video element, while the camera is on
let running = false; // a task, see alone
let waiting; // the task that comes next

function say(text, isError = false) {
  element("state").textContent = text;
  element("state").classList.toggle("error", isError);
}

const threshold = () => Number(element("score").value);
const colour = (label) => `hsl(${(label * 222.5) % 360} 85% 35%)`; // neighbours in the list differ clearly in hue
const nameOf = (label) => detector.classes[label] || `class ${label + 1}`;

// ---------------------------------------------------------------------- detect and draw

// Detect in whatever a canvas can draw, and show it.
async function detect(image, width, height) {
  const times = [performance.now()];
  shown = undefined;
  canvas.width = width;
  canvas.height = height;
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  times.push(performance.now());
  let found;
  try {
    found = await detector.detect(pixels);
  } catch (error) {
    element("found").replaceChildren();
    throw new Error(`the detector fails on ${width} × ${height} pixels: ${error.message}`);
  }
  times.push(performance.now());
  shown = { image: await createImageBitmap(pixels), found };
  draw();
  times.push(performance.now());
  const [read, detected, drawn] = [0, 1, 2].map((i) => (times[i + 1] - times[i]).toFixed(0));
  shown.text = `read ${read} + detect ${detected} + draw ${drawn} ms`;
  tell();
}

function draw() {
  const line = Math.max(1, Math.round(Math.min(canvas.width, canvas.height) / 250));
  const size = Math.max(12, Math.round(Math.min(canvas.width, canvas.height) / 30));
  context.drawImage(shown.image, 0, 0);
  context.lineWidth = line;
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (const { box: [x1, y1, x2, y2], score, label } of confident().reverse()) { // the best on top
    const text = `${nameOf(label)} ${score.toFixed(2)}`;
    context.strokeStyle = context.fillStyle = colour(label);
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const width = context.measureText(text).width + size / 2;
    const x = Math.max(0, Math.min(x1, canvas.width - width)); // the label stays in the picture
    const y = Math.max(y1, size * 1.2);
    context.fillRect(x, y - size * 1.2, width, size * 1.2);
    context.fillStyle = "white";
    context.fillText(text, x + size / 4, y);
  }
}

const confident = () => shown.found.filter(({ score }) => score > threshold());

// Say what was found, in a line and in a table.
function tell() {
  const found = confident();
  const rows = found.map(({ box, score, label }) => [nameOf(label), score.toFixed(3), ...box.map((side) => side.toFixed(1))]);
  element("found").replaceChildren(...[["class", "score", "x1", "y1", "x2", "y2"], ...rows].map((cells, i) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => Object.assign(document.createElement(i ? "td" : "th"), { textContent: cell })));
    return row;
  }));
  say(`${found.length} found, ${canvas.width} × ${canvas.height}: ${shown.text}`);
}

// ---------------------------------------------------------------------- where pictures come from

// Run one task at a time, and say what goes wrong. Of those that wait meanwhile, the latest is run.
async function alone(task) {
  if (!detector) return;
  waiting = task;
  if (running) return;
  running = true;
  while (waiting) {
    task = waiting;
    waiting = undefined;
    try {
      await task();
    } catch (error) {
      stopCamera();
      say(error.message, true);
    }
  }
  running = false;
}

async function detectBlob(blob, name) {
  stopCamera();
  say(`Detecting in ${name}`);
  let image;
  try {
    image = await createImageBitmap(blob, { colorSpaceConversion: "none" }); // the bytes that are in the file
  } catch {
    throw new Error(`${name} is not a picture that this browser can read`);
  }
  await detect(image, image.width, image.height);
}

async function fetchOrThrow(url, hint) {
  const response = await fetch(url, { cache: "no-store" }); // it may have been written anew
  if (!response.ok) throw new Error(`${url} is not there${hint}`);
  return response;
}

async function startCamera() {
  const video = document.createElement("video");
  if (!navigator.mediaDevices) throw new Error("no camera: browsers give it to pages of localhost and https only");
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    throw new Error(`no camera: ${error.message}`);
  }
  camera = video;
  element("camera").textContent = "Stop the camera";
  for (const track of video.srcObject.getTracks()) track.onended = stopCamera; // it was unplugged
  video.muted = video.playsInline = true;
  await video.play();
  requestAnimationFrame(() => nextFrame(video));
}

function stopCamera() {
  camera?.srcObject.getTracks().forEach((track) => track.stop());
  camera = undefined;
  element("camera").textContent = "Camera";
}

async function nextFrame(video) {
  if (camera !== video) return; // it was stopped
  if (!running) await alone(() => detect(video, video.videoWidth, video.videoHeight));
  requestAnimationFrame(() => nextFrame(video));
}

// ---------------------------------------------------------------------- what the buttons do

const detectBundled = () => alone(async () => detectBlob(await (await fetchOrThrow("../asset/shapes.png", "")).blob(), "the bundled picture"));
element("bundled").onclick = detectBundled;
element("camera").onclick = () => (camera ? stopCamera() : alone(startCamera));
element("file").onchange = ({ target }) => {
  const [file] = target.files;
  if (file) alone(() => detectBlob(file, file.name));
  target.value = ""; // so that the same file can be chosen again
};
element("score").oninput = () => {
  element("threshold").textContent = threshold().toFixed(2);
  if (shown) {
    draw();
    tell();
  }
};
document.ondragover = (event) => {
  event.preventDefault();
  element("drop").classList.add("over");
};
document.ondragleave = () => element("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) alone(() => detectBlob(file, file.name));
};

say("Loading the detector");
try {
  const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs").catch(() => {
    throw new Error("onnxruntime-web is not there: npm ci --prefix web");
  });
  const hint = ": write it with whole.py ckpt/shapes web/detector.onnx --from-picture";
  const response = await fetchOrThrow("detector.onnx", hint);
  detector = await load(ort, new Uint8Array(await response.arrayBuffer()));
  await detectBundled();
} catch (error) {
  say(error.message, true);
}
