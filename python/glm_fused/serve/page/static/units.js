// Numbers as people read them.

/** Bytes in decimal units, as the command line writes them. */
export function bytes(n) {
  for (const [unit, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (n >= unit) return `${significant(n / unit)} ${name}`;
  }
  return `${n} B`;
}

/** A count with separators between thousands. */
export function count(n) {
  return Math.round(n).toLocaleString("en-US");
}

/** A number of events a second. */
export function rate(n) {
  return n >= 100 ? count(n) : significant(n);
}

/** A share of 1 in per cent. */
export function percent(share) {
  return `${significant(100 * share)} %`;
}

/** A duration of so many seconds. */
export function duration(seconds) {
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

/** A number with about three digits. */
export function significant(n) {
  if (n === 0) return "0";
  if (n < 10) return n.toFixed(2);
  return n < 100 ? n.toFixed(1) : count(n);
}
