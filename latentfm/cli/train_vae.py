"""`latentfm train-vae`: a configuration and overrides to a finished autoencoder, or to what the run would take."""

from pathlib import Path
from typing import Annotated

import typer

from latentfm.cli.completion import VAEOverrides


def train_vae(
    overrides: VAEOverrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of options; see configs/vae.yaml.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output folder.")] = False,
    options: Annotated[bool, typer.Option("--options", help="List every option with its meaning and default, and leave.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do and take, and what is wrong with it; load and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="--dry-run: print one JSON object instead of lines.")] = False,
) -> None:
    """Train an autoencoder (AutoencoderKL) on pictures: a new one, one further, or a decoder alone.

    It is what turns pictures into the latents that `latentfm train` learns on, and latents back into pictures. A new one
    (model.widths, model.latent_channels, data.size) is the start of a new model; model.vae=FOLDER trains one that is there further; with
    model.part=decoder its latents stay what they are, so that the network trained on them goes on working, and pictures get sharper.

    The loss is the notes' (Algorithm 6): reconstruction (loss.l1, loss.l2, or loss.sigma for the Gaussian's likelihood) and the
    latents' divergence from a normal (loss.kl, growing over loss.kl_warmup steps); besides edges, a perceptual distance and a
    discriminator (adversarial.weight), which sharpens texture and should start late (adversarial.start).

    The result is OUTPUT/model, an AutoencoderKL folder for diffusers with its scaling_factor and shift_factor measured, and
    OUTPUT/report.html: PSNR, SSIM, edges, KL by channel, and a sheet of held-out pictures. It takes the place of vae/ in a pipeline folder,
    after which `latentfm verify --renew FOLDER` says that the change is meant. Several processes, --resume, signals, the run page and
    checkpoints are as in `latentfm train`.
    """
    from latentfm.config import load_config
    from latentfm.errors import InputError
    from latentfm.training.vae.options import VAE_OPTIONS, VAEConfig

    if options:
        from latentfm.cli.train import option_table

        print(option_table(VAE_OPTIONS))
        return
    if as_json and not dry_run:
        raise InputError("--json goes with --dry-run; give that too, or leave --json out")
    run = load_config(config, overrides, VAEConfig)

    from latentfm.cli.terminal import quiet_libraries, rank, tell_result

    quiet_libraries()
    if dry_run:
        import json

        from latentfm.training.vae.dry_run import dry_run as look
        from latentfm.training.vae.dry_run import lines

        found = look(run, resume)
        if rank():
            return
        print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
        return
    from latentfm.training.vae.trainer import train_vae as run_training

    tell_result(lambda: run_training(run, resume))
