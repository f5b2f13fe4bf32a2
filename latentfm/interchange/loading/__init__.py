"""Pipelines as they are asked for: from a folder or a file, with the keywords of diffusers, on the devices that are named."""
