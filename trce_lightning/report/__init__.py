"""Show results: tables, curves, grids of images, and the page ``report.html``."""
