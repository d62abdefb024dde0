"""Weight files, model cards, and the trained regularizers shipped with the package."""
