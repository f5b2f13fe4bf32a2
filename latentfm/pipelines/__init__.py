"""The pipelines: prompts, pictures and masks to pictures, with the calls and folders of diffusers' SD3 pipelines."""
