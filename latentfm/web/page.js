// The page's keys: Enter in a prompt and Ctrl+Enter anywhere draw, Escape cancels. And the light, which is the system's until it is switched.
(() => {
  const seen = (button) => button && !button.disabled && button.offsetParent !== null;
  const press = (id) => {
    const button = document.getElementById(id);
    if (seen(button)) button.click();
  };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const writing = event.target.closest?.("#prompt, #negative");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (writing && !event.shiftKey))) {
      event.preventDefault();
      event.stopPropagation();
      press("draw");
    } else if (event.key === "Escape") {
      press("cancel");
    }
  }, true);
  const kept = localStorage.getItem("latentfm-light");
  const switched = (dark) => {
    document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
  };
  if (kept) addEventListener("load", () => switched(kept === "dark"));
  document.addEventListener("click", (event) => {
    if (!event.target.closest?.("#light")) return;
    const dark = !document.body.classList.contains("dark");
    localStorage.setItem("latentfm-light", dark ? "dark" : "light");
    switched(dark);
  });
})();
