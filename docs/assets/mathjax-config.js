// MathJax 3.2.2 is stored in assets/mathjax, so that the site works without a network.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"], ["$", "$"]],
    displayMath: [["\\[", "\\]"], ["$$", "$$"]],
    processEscapes: true,
    tags: "ams",
  },
  // The menu would offer speech and other add-ons that are not stored here.
  options: { enableMenu: false },
  // Pages wrap their formulas in .arithmatex; notebook pages leave them in the text of the rendered cell.
  startup: { elements: [".arithmatex", ".jp-RenderedMarkdown", ".jp-RenderedLatex"] },
};
