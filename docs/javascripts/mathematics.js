// Every formula of a page, by the KaTeX that lies beside this file: nothing is fetched.
document.addEventListener("DOMContentLoaded", () => {
  for (const formula of document.querySelectorAll(".arithmatex")) {
    const text = formula.textContent.trim();
    katex.render(text.slice(2, -2), formula, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
});
