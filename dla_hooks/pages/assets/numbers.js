// Numbers and tokens as text.

const MINUS = "−";

function digitsFor(largest) {
  if (!(largest > 0) || !Number.isFinite(largest)) return 3;
  return Math.min(8, Math.max(0, 3 - Math.floor(Math.log10(largest))));
}

function signed(value, digits = digitsFor(Math.abs(value))) {
  if (value === null || !Number.isFinite(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 ? MINUS : "+") + text;
}

// What stands beside a row: parts of it have signs, errors and weights have none.
const besideText = (name, value, digits) => (!Number.isFinite(value) ? "–" : /error|weight|vote/.test(name) ? Number(value).toPrecision(3) : signed(value, digits));
const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(Math.abs(share) < 0.0995 ? 1 : 0).replace("-", MINUS)} %` : "–");
const brief = (value) => (value === null || value === undefined ? "–" : value.toExponential(1).replace("e", "e").replace("-", MINUS));
const largestOf = (values) => values.reduce((most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most), 0);

// Control characters as pictures, halves of surrogate pairs as their escapes: both can be drawn.
function visible(token) {
  if (/^ +$/.test(token)) return "␣".repeat(token.length);
  return token
    .replace(/[\u0000-\u001f]/g, (one) => (one === "\n" ? "↵" : one === "\t" ? "⇥" : String.fromCharCode(0x2400 + one.charCodeAt(0))))
    .replace(/[\u007f-\u009f\ufffe\uffff\u202a-\u202e\u2066-\u2069]/g, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`)
    .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, (one) => `\\u${one.charCodeAt(0).toString(16)}`);
}
const quoted = (token) => `“${visible(token)}”`;
const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
