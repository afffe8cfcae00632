"""Train the embedded model's siblings: small pipelines of SDXL, SD3 and FLUX on the same pictures."""
