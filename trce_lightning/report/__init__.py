"""What people read and look at: tables, curves, grids of images, the page."""
