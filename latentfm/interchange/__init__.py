"""Weights in other people's forms: SD3's single files, folders, LoRA adapters, open_clip's towers."""
