// Runs before the theme's own script.
const search = document.querySelector("[data-md-component=search]");
if (location.protocol === "file:") {
  // Browsers start no search worker for a page that was opened as a file.
  document.querySelectorAll("[data-md-component=search], header label[for=__search]").forEach(e => e.remove());
} else {
  search.setAttribute("aria-label", "Search");
  // The theme asks for the index, more than a megabyte, with every page. It can wait until somebody searches.
  const { open, send } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (method, url, ...rest) {
    open.call(this, method, url, ...rest);
    if (url.endsWith("/search_index.json"))
      this.send = () => search.addEventListener("focusin", () => send.call(this), { once: true });
  };
}
