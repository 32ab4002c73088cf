"""How good a model is, how sure that is, and a page that shows it."""
