// Detect in pixels with web/detector.js, in Node: node tests/detect.mjs WEB DETECTOR PIXELS WIDTH HEIGHT
// WEB is the folder of the page, PIXELS a file of red, green, blue, alpha. Prints what is found as JSON.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [web, model, pixels, width, height] = process.argv.slice(2);
const { load } = await import(pathToFileURL(resolve(web, "detector.js")));
const ort = await import(pathToFileURL(resolve(web, "node_modules/onnxruntime-web/dist/ort.node.min.mjs")));
const { classes, detect } = await load(ort, new Uint8Array(readFileSync(model)));
const found = await detect({ data: new Uint8Array(readFileSync(pixels)), width: Number(width), height: Number(height) });
console.log(JSON.stringify({ classes, found }));
