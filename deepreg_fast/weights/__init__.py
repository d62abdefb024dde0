"""Weight files, their model cards, and the trained regularizers that ship with the package."""
