// Runs before the page is drawn, so that a chosen theme does not flash the other one first.
"use strict";
try {
  const theme = localStorage.getItem("glm-fused.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage that is forbidden: the system's theme stays.
}
