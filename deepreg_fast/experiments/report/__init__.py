"""Report of an experiment: tables, curves, images and provenance on one page."""
