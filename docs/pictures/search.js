// In the search's language a word after "-" is one to leave out. Who types a flag looks for it, so the hyphens before a word go.
document.addEventListener("input", ({ target }) => {
  if (!target.matches(".md-search__input")) return;
  const words = target.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  if (words !== target.value) target.value = words;
}, true);
